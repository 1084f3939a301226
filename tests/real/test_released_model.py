"""A released model, which scripts/real_model.sh names: its answers are those of transformers, sparse attention costs
it little, and its calibration is found.

`greedy.json` has transformers' greedy answers in float32 to ten conversations of one turn, by
Qwen2.5-Coder-0.5B-Instruct.
"""
import argparse
import json
import os
from pathlib import Path

import pytest
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax import Engine, SamplingParams
from qwen_jax.checkpoint import load_model, load_tokenizer, read_calibrated, read_sparsity, resolve
from qwen_jax.evaluation.sparse_fidelity import fidelity

pytestmark = pytest.mark.real
ANSWERS = json.loads((Path(__file__).parent / "greedy.json").read_text())
TEXT = Path(argparse.__file__)
TOKENS = 3072


@pytest.fixture(scope="module")
def source():
    name = os.environ.get("QWEN_JAX_REAL_MODEL")
    if not name:
        pytest.fail("QWEN_JAX_REAL_MODEL names no checkpoint: run scripts/real_model.sh FOLDER")
    return resolve(name)


def test_greedy_answers_are_those_of_transformers(source):
    tokenizer = load_tokenizer(source)
    for answer in ANSWERS:
        turn = [{"role": "user", "content": answer["prompt"]}]
        assert tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) == answer[
            "prompt_ids"]
    if (source.config.num_layers, source.config.hidden_size) != (24, 896):
        pytest.skip("greedy.json is of a 0.5B: scripts/verify_release.sh compares other models with transformers")
    engine = Engine.from_pretrained(source.path, dtype="float32", max_batch_size=10, max_seq_len=256)
    outs = engine.generate([answer["prompt_ids"] for answer in ANSWERS],
                           [SamplingParams(max_tokens=len(answer["greedy_ids"]), temperature=0.0, ignore_eos=True,
                                           repetition_penalty=1.0)  # not the checkpoint's
                            for answer in ANSWERS])
    assert [out.token_ids for out in outs] == [answer["greedy_ids"] for answer in ANSWERS]


def test_sparse_attention_adds_little_to_the_loss(source):
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    tokens = tokenizer.encode(TEXT.read_text())[:TOKENS]
    found = fidelity(model, tokens, (Sparsity(),) * model.config.num_layers, recall=False)
    assert found.density < 0.65, "some pages must be left out"
    assert 0.5 < found.full_loss < 3, "a model of code knows code"
    assert found.loss - found.full_loss <= 0.02


def test_its_calibration_comes_with_the_package(source):
    if source.config.hidden_size != 896:
        pytest.skip("the package has the calibration of the 0.5B alone")
    layers, eight_bit = read_sparsity(source, source.config), read_calibrated(source, source.config)
    assert sum(len(layer.dense_heads) for layer in layers) == 3 and {layer.budget for layer in layers} == {3, 6}
    assert sum(eight_bit.precision.weights) == 12 and set(eight_bit.precision.kv_cache) == {"int8"}
