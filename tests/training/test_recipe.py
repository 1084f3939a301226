"""Recipes: every key is known, and every value has its type."""
from pathlib import Path

import pytest
from model_recipes import BundledRecipe, YardstickRecipe

from qwen_jax.errors import UserError
from qwen_jax.training.recipe import Lora, Recipe, load_recipe

BUNDLED = "configs/train/bundled.toml"
FINETUNE = """
model = "bundled"
data = ["a.jsonl", "b.jsonl"]
output = "runs/x"
steps = 10
sequence_length = 64
batch_size = 4

[optimizer]
learning_rate = 1
"""


def write(folder, text):
    (folder / "r.toml").write_text(text)
    return folder / "r.toml"


def test_the_shipped_recipe_loads():
    assert load_recipe(BUNDLED, BundledRecipe).model.num_layers == 4


def test_defaults(tmp_path):
    recipe = load_recipe(write(tmp_path, FINETUNE))
    assert isinstance(recipe, Recipe) and recipe.data == ("a.jsonl", "b.jsonl") and recipe.lora is None
    assert recipe.optimizer.learning_rate == 1.0 and recipe.optimizer.clip_norm == 1.0
    lora = load_recipe(write(tmp_path, FINETUNE + "[lora]\nrank = 8\n")).lora
    assert lora == Lora(8, 32.0, ("q_proj", "k_proj", "v_proj", "o_proj"))


@pytest.mark.parametrize("edit, message", [
    (lambda text: "learning_rat = 1\n" + text, "unknown key learning_rat"),
    (lambda text: text.replace("learning_rate", "rate"), r"\[optimizer\]: unknown key rate"),
    (lambda text: text.replace("steps = 10", ""), "missing key steps"),
    (lambda text: text.replace("steps = 10", "steps = '10'"), "steps must be int, not '10'"),
    (lambda text: text.replace("steps = 10", "steps = true"), "steps must be int, not True"),
    (lambda text: text.replace("steps = 10", "steps = 0"), "steps must be int >= 1, not 0"),
    (lambda text: "accumulate = 3\n" + text, "batch_size must be a multiple of accumulate=3, not 4"),
    (lambda text: "compute_dtype = 'float16'\n" + text, "compute_dtype must be 'bfloat16' or 'float32', not 'float16'"),
    (lambda text: "on_bad = 'ignore'\n" + text, "on_bad must be 'refuse' or 'skip', not 'ignore'"),
    (lambda text: text.replace('["a.jsonl", "b.jsonl"]', '"a.jsonl"'), r"data must be array, not 'a\.jsonl'"),
    (lambda text: text.replace('"a.jsonl", "b.jsonl"', ""), r"data must be array of length >= 1, not \[\]"),
    (lambda text: text.replace('"b.jsonl"', "2"), r"data\[1\] must be str, not 2"),
    (lambda text: text.replace("learning_rate = 1", "learning_rate = 'x'"), "optimizer.learning_rate must be float"),
    (lambda text: text + "[lora]\nranks = 1\n", r"\[lora\]: unknown key ranks; known keys: rank, alpha, targets"),
    (lambda text: text + "[distill]\n", r"\[distill\]: distillation needs a teacher, or the layers"),
    (lambda text: "devices = 2\n" + text, "devices must be table, not 2"),
    (lambda text: text.replace("[optimizer]\nlearning_rate", "optimizer"), "optimizer must be table, not 1"),
    (lambda text: text.replace("[optimizer]", "[optimizer"), "not valid TOML"),
])
def test_a_wrong_recipe_is_refused(tmp_path, edit, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, edit(FINETUNE)))


def test_errors_in_lists_of_tables_name_the_item(tmp_path):
    text = Path("configs/train/yardstick.toml").read_text()
    for edit, message in (("{long = 256,", r"\[stages\[0\]\]: unknown key long; known keys: length, rows, steps"),
                          ("{length = 'a',", r"stages\[0\]\.length must be int, not 'a'")):
        with pytest.raises(UserError, match=message):
            load_recipe(write(tmp_path, text.replace("{length = 256,", edit)), YardstickRecipe)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
