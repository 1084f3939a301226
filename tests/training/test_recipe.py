"""Recipes: every key known, every value of its type."""
import pytest

from qwen_jax.errors import UserError
from qwen_jax.training.recipe import BundledRecipe, Lora, Recipe, load_recipe

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
    (lambda text: text.replace("steps = 10", "steps = '10'"), "steps should be int, is '10'"),
    (lambda text: text.replace("steps = 10", "steps = true"), "steps should be int, is True"),
    (lambda text: text.replace("steps = 10", "steps = 0"), "steps must be at least 1"),
    (lambda text: text.replace("steps = 10", "steps = 10\naccumulate = 3"), "do not split into accumulate=3 groups"),
    (lambda text: text.replace("steps = 10", "steps = 10\ncompute_dtype = 'float16'"), "compute_dtype must be"),
    (lambda text: text.replace('["a.jsonl", "b.jsonl"]', '"a.jsonl"'), "data should be a list with at least one item"),
    (lambda text: text.replace("[optimizer]\nlearning_rate", "optimizer"), "optimizer should be a table"),
    (lambda text: text.replace("[optimizer]", "[optimizer"), "not valid TOML"),
])
def test_a_wrong_recipe_is_refused(tmp_path, edit, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, edit(FINETUNE)))


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")
