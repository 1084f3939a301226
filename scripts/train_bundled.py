"""Trains the bundled fraud-screening model from nothing and writes its Hugging Face folder.

    python scripts/train_bundled.py [configs/train/bundled.toml] [--run runs/bundled] [--out qwen_jax/bundled]

Run again with the same folder, it continues after an interruption. About twice as fast with jemalloc:
    LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always python scripts/...
"""
import argparse
import collections
import itertools
import re
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.names import pieces
from qwen_jax.evaluation.fraud.score import answers_in_one_pass, score
from qwen_jax.evaluation.fraud.task import conversations, generate
from qwen_jax.evaluation.fraud.text import format_messages
from qwen_jax.model import build, init, params_of
from qwen_jax.training.curves import plot_curves
from qwen_jax.training.initial import prepare_for_retrieval
from qwen_jax.training.loop import Run, fit
from qwen_jax.training.new_model import model_config, write_folder
from qwen_jax.training.recipe import BundledRecipe, load_recipe
from qwen_jax.training.stacked import stack, unstack
from qwen_jax.training.step import init_state, language_model_loss, make_optimizer, make_train_step
from qwen_jax.training.tokenizer import train_tokenizer
from qwen_jax.training.turns import OPENING, batches


def build_tokenizer(recipe: BundledRecipe) -> Tokenizer:
    """Knows the words that most conversations share and the pieces of names, but no name as a whole."""
    source = itertools.islice(conversations(recipe.seed, "train", recipe.turns, recipe.explain), 400)
    texts = ["\n".join([format_messages(opening, False), *map("{0.request}\n{0.answer}".format, turns)])
             for opening, turns in source]
    count = collections.Counter(word for text in texts for word in set(re.findall(r" ?[A-Za-z]+", text)))
    common = [word for word, texts_with in count.items() if texts_with > 0.03 * len(texts)]
    return train_tokenizer([*common, *pieces()] * 10, recipe.vocab_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="configs/train/bundled.toml")
    parser.add_argument("--run", type=Path, default=Path("runs/bundled"), help="checkpoints and metrics")
    parser.add_argument("--out", type=Path, default=Path("qwen_jax/bundled"), help="the finished Hugging Face folder")
    parser.add_argument("--examples", type=int, default=4000, help="held-out examples of the final table")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists: move it away, or name another folder with --out")
    recipe = load_recipe(args.recipe, BundledRecipe)
    tokenizer = build_tokenizer(recipe)
    config = model_config(recipe.model, tokenizer)
    initial = prepare_for_retrieval(params_of(init(config, recipe.seed, "float32")), config, recipe.seed)
    print(f"{config.num_parameters:,} parameters, vocabulary {config.vocab_size}")

    def batch_of(step: int):
        source = conversations(recipe.seed + 1_000_003 * step, "train", recipe.turns, recipe.explain)
        rows = ((format_messages(opening, False).removesuffix("<|im_end|>\n") + "\n",
                 [(turn.request, turn.answer) for turn in turns]) for opening, turns in source)
        return next(batches(tokenizer, rows, recipe.batch_size, recipe.sequence_length, recipe.lm_weight))

    held_out = generate(1, "heldout", 400)
    forward = jax.jit(lambda model, tokens: model(tokens))

    def evaluate(state) -> dict[str, float]:
        model = build(config, unstack(state.trainable))
        result = score(answers_in_one_pass(lambda t: forward(model, t), tokenizer, held_out), held_out)
        patterns = {name: (p.fraud + p.twin) / 2 for name, p in result.patterns.items()}
        return {"accuracy": result.accuracy, "reason": result.reason, **patterns}

    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    step = make_train_step(language_model_loss(config, shared_segment=OPENING), optimizer)
    state = init_state(stack({path: jnp.asarray(value) for path, value in initial.items()}), optimizer)
    run = Run(args.run, recipe.steps, recipe.evaluate_every, keep=1, max_skipped=10, facts=asdict(recipe))
    trained = unstack(fit(state, step, {}, batch_of, run, evaluate).trainable)
    plot_curves(args.run / "metrics.jsonl", args.run / "curves.png")
    rounded = {path: value.astype(jnp.bfloat16) for path, value in trained.items()}
    write_folder(rounded, config, tokenizer, args.out)

    examples = generate(2, "heldout", args.examples)
    model = build(config, {path: value.astype(jnp.float32) for path, value in rounded.items()})
    result = score(answers_in_one_pass(lambda t: forward(model, t), tokenizer, examples), examples)
    print(f"{args.examples} held-out examples, weights as written to {args.out}:\n{result.table()}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
