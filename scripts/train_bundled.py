"""Trains the bundled fraud-screening model from nothing and writes its Hugging Face folder.

    python scripts/train_bundled.py [configs/train/bundled.toml] [--run runs/bundled] [--out qwen_jax/bundled]

Run again with the same folder, it continues after an interruption. About twice as fast with jemalloc:
    LD_PRELOAD=libjemalloc.so.2 MALLOC_CONF=dirty_decay_ms:-1,muzzy_decay_ms:-1,thp:always python scripts/...
"""
import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from qwen_jax.checkpoint.conversion import save_hf
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud import conversations, format_messages, generate, profile_conversations
from qwen_jax.evaluation.fraud_score import answers_in_one_pass, score
from qwen_jax.model import build, init, params_of
from qwen_jax.training.curves import plot_curves
from qwen_jax.training.data import batches
from qwen_jax.training.initial import prepare_for_retrieval
from qwen_jax.training.loop import fit
from qwen_jax.training.recipe import Recipe, load_recipe
from qwen_jax.training.tokenizer import END_OF_TEXT, IM_END, save_tokenizer, train_tokenizer


def build_tokenizer(recipe: Recipe) -> Tokenizer:
    """Learned from training conversations only: held-out names get no token of their own."""
    source = conversations(recipe.seed, "train", recipe.turns, recipe.explain)
    return train_tokenizer((format_messages(m, False) for m in itertools.islice(source, 4000)), recipe.vocab_size)


def model_config(recipe: Recipe, tokenizer: Tokenizer) -> ModelConfig:
    shape = {**vars(recipe.model), "rope": Rope(recipe.model.rope_theta)}
    del shape["rope_theta"]
    return ModelConfig(vocab_size=tokenizer.get_vocab_size(), **shape, tie_word_embeddings=True, dtype="bfloat16",
                       bos_token_id=tokenizer.token_to_id(END_OF_TEXT), eos_token_id=tokenizer.token_to_id(IM_END))


def write_folder(params, config: ModelConfig, tokenizer: Tokenizer, out: Path) -> None:
    """The Hugging Face folder: weights rounded to bfloat16, configuration, tokenizer, greedy generation defaults."""
    with tempfile.TemporaryDirectory() as side:
        save_tokenizer(tokenizer, side, config.max_position_embeddings)
        end_of_text, im_end = config.bos_token_id, config.eos_token_id
        generation = {"bos_token_id": end_of_text, "pad_token_id": end_of_text, "do_sample": False,
                      "eos_token_id": [im_end, end_of_text]}
        (Path(side) / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        save_hf(params, config, out, side)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="configs/train/bundled.toml")
    parser.add_argument("--run", type=Path, default=Path("runs/bundled"), help="checkpoints and metrics")
    parser.add_argument("--out", type=Path, default=Path("qwen_jax/bundled"), help="the finished Hugging Face folder")
    parser.add_argument("--examples", type=int, default=4000, help="held-out examples of the final table")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists: move it away, or name another folder with --out")
    recipe = load_recipe(args.recipe)
    tokenizer = build_tokenizer(recipe)
    config = model_config(recipe, tokenizer)
    model = init(config, recipe.seed, "float32")
    model = build(config, prepare_for_retrieval(params_of(model), config, recipe.seed))
    print(f"{config.num_parameters:,} parameters, vocabulary {config.vocab_size}")

    def batch_of(step: int):
        seed, rows, length = recipe.seed + 1_000_003 * step, recipe.batch_size, recipe.sequence_length
        source = conversations(seed, "train", recipe.turns, recipe.explain)
        if step <= recipe.profile_steps:
            source, rows, length = profile_conversations(seed, "train", 4), 2 * rows, length // 2
        return next(batches(tokenizer, source, rows, length, recipe.lm_weight))

    held_out = generate(1, "heldout", 400)
    forward = jax.jit(lambda model, tokens: model(tokens))

    def evaluate(model) -> dict[str, float]:
        result = score(answers_in_one_pass(lambda t: forward(model, t), tokenizer, held_out), held_out)
        patterns = {name: (p.fraud + p.twin) / 2 for name, p in result.patterns.items()}
        return {"accuracy": result.accuracy, "reason": result.reason, **patterns}

    trained = params_of(fit(model, recipe, batch_of, args.run, evaluate))
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
