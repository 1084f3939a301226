"""Train the bundled fraud-screening model from random initial values and write its Hugging Face folder.

    python scripts/models/train_bundled.py [configs/train/bundled.toml] [--run runs/bundled] [--out qwen_jax/bundled]

Run again with the same folder, it continues after an interruption. About twice as fast with jemalloc:
    LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always python scripts/...
"""
import collections
import itertools
import re
import sys

import screening
from bpe_tokenizer import train_tokenizer
from model_recipes import BundledRecipe
from tokenizers import Tokenizer
from turn_rows import OPENING

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.names import pieces
from qwen_jax.evaluation.fraud.task import conversations
from qwen_jax.evaluation.fraud.text import format_messages
from qwen_jax.training.recipe import load_recipe
from qwen_jax.training.step import language_model_loss


def build_tokenizer(recipe: BundledRecipe) -> Tokenizer:
    """Train a tokenizer on the words that most conversations share and on the pieces of names, but on no whole name."""
    source = itertools.islice(conversations(recipe.seed, "train", recipe.turns, recipe.explain), 400)
    texts = ["\n".join([format_messages(opening, False), *map("{0.request}\n{0.answer}".format, turns)])
             for opening, turns in source]
    count = collections.Counter(word for text in texts for word in set(re.findall(r" ?[A-Za-z]+", text)))
    common = [word for word, texts_with in count.items() if texts_with > 0.03 * len(texts)]
    return train_tokenizer([*common, *pieces()] * 10, recipe.vocab_size)


def main() -> None:
    args = screening.arguments(__doc__.splitlines()[0], "bundled")
    recipe = load_recipe(args.recipe, BundledRecipe)
    screening.train(recipe, build_tokenizer(recipe), args,
                    lambda config: language_model_loss(config, shared_segment=OPENING), frozen={})


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
