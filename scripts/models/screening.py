"""Training of a card-screening model: command line, material, held-out scores, and the finished folder."""
import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
from model_folder import model_config, write_folder
from model_recipes import ScreeningRecipe
from retrieval_init import prepare_for_retrieval
from tokenizers import Tokenizer
from turn_rows import batches

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.score import Score, answers_in_one_pass, score
from qwen_jax.evaluation.fraud.task import Example, conversations, generate
from qwen_jax.evaluation.fraud.text import format_messages
from qwen_jax.model import build, init, params_of
from qwen_jax.training.batch import Batch
from qwen_jax.training.curves import plot_curves
from qwen_jax.training.loop import Run, fit
from qwen_jax.training.stacked import stack, unstack
from qwen_jax.training.step import Loss, TrainState, init_state, make_optimizer, make_train_step


def arguments(description: str, name: str) -> argparse.Namespace:
    """Parse the command line of the script that trains the model `name`. UserError when the output folder exists."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe", nargs="?", default=f"configs/train/{name}.toml")
    parser.add_argument("--run", type=Path, default=Path("runs") / name, help="checkpoints and metrics")
    parser.add_argument("--out", type=Path, default=Path("qwen_jax") / name, help="the finished Hugging Face folder")
    parser.add_argument("--examples", type=int, default=4000, help="held-out examples of the final table")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists: move it away, or name another folder with --out")
    return args


def train(recipe: ScreeningRecipe, tokenizer: Tokenizer, args: argparse.Namespace,
          loss_of: Callable[[ModelConfig], Loss], frozen: Mapping[str, jax.Array]) -> None:
    """Train a new card-screening model, write its folder, and print how often it is right on held-out examples.

    loss_of: returns the loss for the model's configuration. frozen: parameters that the loss needs but does not train.
    """
    config = model_config(recipe.model, tokenizer)
    print(f"{config.num_parameters:,} parameters, vocabulary {config.vocab_size}")
    initial = prepare_for_retrieval(params_of(init(config, recipe.seed, "float32")), config, recipe.seed)
    forward = jax.jit(lambda params, tokens: build(config, params)(tokens))

    def score_of(params: Mapping[str, jax.Array], examples: list[Example]) -> Score:
        return score(answers_in_one_pass(lambda tokens: forward(params, tokens), tokenizer, examples), examples)

    held_out = generate(1, "heldout", 400)

    def evaluate(state: TrainState) -> dict[str, float]:
        result = score_of(unstack(state.trainable), held_out)
        patterns = {name: (p.fraud + p.twin) / 2 for name, p in result.patterns.items()}
        return {"accuracy": result.accuracy, "reason": result.reason, **patterns}

    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    step = make_train_step(loss_of(config), optimizer)
    state = init_state(stack({path: jnp.asarray(value) for path, value in initial.items()}), optimizer)
    run = Run(folder=args.run, steps=recipe.steps, checkpoint_every=recipe.evaluate_every, keep=1, max_skipped=10,
              facts=msgspec.to_builtins(recipe))
    state = fit(state, step, frozen, lambda step: batch_of_step(recipe, tokenizer, step), run=run, evaluate=evaluate)
    plot_curves(args.run / "metrics.jsonl", args.run / "curves.png")
    rounded = {path: value.astype(jnp.bfloat16) for path, value in unstack(state.trainable).items()}
    write_folder(rounded, config, tokenizer, args.out)
    result = score_of({path: value.astype(jnp.float32) for path, value in rounded.items()},
                      generate(2, "heldout", args.examples))
    print(f"{args.examples} held-out examples, weights as written to {args.out}:\n{result.table()}")


def batch_of_step(recipe: ScreeningRecipe, tokenizer: Tokenizer, step: int) -> Batch:
    """Return the training batch of a step, counted from 1: one account per row, with several requests about it."""
    material = conversations(recipe.seed + 1_000_003 * step, "train", recipe.turns, recipe.explain)
    rows = ((format_messages(opening, False).removesuffix("<|im_end|>\n") + "\n",
             [(turn.request, turn.answer) for turn in turns]) for opening, turns in material)
    return next(batches(tokenizer, rows, recipe.batch_size, recipe.sequence_length, recipe.lm_weight))
