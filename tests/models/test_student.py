"""The shipped student: smaller than its teacher, and nearly as often right about transactions neither has seen."""
import json
from pathlib import Path

import jax
import msgspec
import numpy as np
import pytest
from model_recipes import StudentRecipe
from retrieval_init import prepare_for_retrieval
from tokenizers import Tokenizer

from qwen_jax import load_model
from qwen_jax.checkpoint import resolve
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.evaluation.fraud.score import answers_in_one_pass, score
from qwen_jax.evaluation.fraud.task import generate
from qwen_jax.model import build, init, params_of
from qwen_jax.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
STUDENT, TEACHER = (resolve(name) for name in ("student", "bundled"))


def test_it_is_small_and_complete():
    assert sum(file.stat().st_size for file in STUDENT.path.iterdir()) <= 3_000_000
    assert STUDENT.config.num_parameters < TEACHER.config.num_parameters / 3
    assert STUDENT.config.num_layers < TEACHER.config.num_layers
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        ours, theirs = (json.loads((source.path / name).read_text()) for source in (STUDENT, TEACHER))
        assert ours == theirs, name


def test_accuracy_beside_its_teachers():
    """Both models are scored on the same examples, drawn by a seed that neither was chosen by."""
    examples = generate(11, "heldout", 800)
    tokenizer = Tokenizer.from_file(str(STUDENT.path / "tokenizer.json"))
    scores = {}
    for source in (STUDENT, TEACHER):
        model = load_model(source, dtype="float32")
        forward = jax.jit(lambda tokens, model=model: model(tokens))
        scores[source] = score(answers_in_one_pass(forward, tokenizer, examples), examples)
    assert scores[STUDENT].accuracy >= 0.97 * scores[TEACHER].accuracy, scores[STUDENT].table()
    assert scores[STUDENT].majority == 0.5 and len(scores[STUDENT].patterns) == 8


def test_the_recipe_is_that_of_the_shipped_model():
    recipe = load_recipe(ROOT / "configs" / "train" / "student.toml", StudentRecipe)
    shape = {name: value for name, value in msgspec.structs.asdict(recipe.model).items() if name != "rope_theta"}
    assert {name: getattr(STUDENT.config, name) for name in shape} == shape
    assert resolve(recipe.distill.teacher).path == TEACHER.path


@pytest.mark.parametrize("heads", [2, 4])
def test_initial_values_copy_with_heads_of_a_third_of_the_hidden_size(heads):
    config = ModelConfig(vocab_size=320, hidden_size=96, intermediate_size=48, num_layers=2, num_heads=heads,
                         num_kv_heads=2, head_dim=32, rope=Rope(1e6), tie_word_embeddings=True)
    tokens = np.random.default_rng(0).permutation(300).astype(np.int32)[:100]
    tokens[65:95] = tokens[5:35]  # a passage said twice
    plain = params_of(init(config, 0, "float32"))
    right = [(np.asarray(build(config, params)(tokens[None]))[0, 65:94].argmax(-1) == tokens[66:95]).mean()
             for params in (plain, prepare_for_retrieval(plain, config))]
    assert right[0] < 0.1 and right[1] > 0.5, right
