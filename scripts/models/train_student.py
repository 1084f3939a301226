"""Train the bundled model's student on its teacher's probabilities and write its Hugging Face folder.

    python scripts/models/train_student.py [configs/train/student.toml] [--run runs/student] [--out qwen_jax/student]

The material and the initial values are those of `train_bundled.py`, the tokenizer is the teacher's, and the loss is
that of `qwen_jax.training.recipe.Distill`. Run again with the same folder, it continues after an interruption. About
twice as fast with jemalloc (see `train_bundled.py`).
"""
import sys

import screening
from model_recipes import StudentRecipe
from tokenizers import Tokenizer
from turn_rows import OPENING

from qwen_jax.checkpoint import load_params, resolve
from qwen_jax.errors import UserError
from qwen_jax.training.recipe import load_recipe
from qwen_jax.training.stacked import stack
from qwen_jax.training.step import distillation_loss


def main() -> None:
    args = screening.arguments(__doc__.splitlines()[0], "student")
    recipe = load_recipe(args.recipe, StudentRecipe)
    source = resolve(recipe.distill.teacher)
    tokenizer = Tokenizer.from_file(str(source.path / "tokenizer.json"))
    teacher = stack(load_params(source, source.config, "float32"))
    screening.train(recipe, tokenizer, args, lambda config: distillation_loss(
        config, source.config, recipe.distill, shared_segment=OPENING), frozen=teacher)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
