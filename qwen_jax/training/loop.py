"""The training loop: steps, progress, evaluation, checkpoints that survive an interruption."""
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from qwen_jax.errors import UserError
from qwen_jax.model import Qwen2
from qwen_jax.training.data import Batch
from qwen_jax.training.recipe import Recipe
from qwen_jax.training.step import make_optimizer, make_train_step

REPORT_EVERY = 10  # steps between looks at the metrics: each look waits for the device


def save_state(path: Path, step: int, state) -> None:
    """Writes step and every leaf of `state` in one file, complete or not at all."""
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    with open(path.with_suffix(".part"), "wb") as file:
        np.savez(file, step=step, **leaves)
    os.replace(path.with_suffix(".part"), path)


def load_state(path: Path, like):
    """The step and state that `save_state` wrote; UserError when they belong to another model."""
    with np.load(path) as saved:
        leaves, tree = jax.tree.flatten(like)
        found = [saved[str(i)] for i in range(len(leaves)) if str(i) in saved]
        if [x.shape for x in found] != [x.shape for x in leaves] or len(saved.files) != len(leaves) + 1:
            raise UserError(f"{path} was written by a run with another model: remove it, or give another folder")
        return int(saved["step"]), jax.tree.unflatten(tree, [jax.numpy.asarray(x) for x in found])


def fit(model: Qwen2, recipe: Recipe, batch_of: Callable[[int], Batch], folder: Path,
        evaluate: Callable[[Qwen2], dict[str, float]]) -> Qwen2:
    """Trains `model` for `recipe.steps` steps and returns it with its new weights.

    batch_of(step) gives the step's batch, the same whenever asked, so a run that is started again in the same
    `folder` continues where its last checkpoint was. Writes ``state.npz`` and ``metrics.jsonl`` there; each line of the
    latter has a ``step`` and either training metrics or what `evaluate` returned. Progress goes to stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(recipe)
    train_step, opt_state, first = make_train_step(model, optimizer), optimizer.init(params), 0
    if (folder / "state.npz").exists():
        first, (params, opt_state) = load_state(folder / "state.npz", (params, opt_state))
        print(f"continuing at step {first}", file=sys.stderr)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as log:
        start = mark = time.perf_counter()
        for step in range(first + 1, recipe.steps + 1):
            params, opt_state, metrics = train_step(params, opt_state, batch_of(step))
            if step % REPORT_EVERY == 0 or step == recipe.steps:
                metrics = {name: round(float(value), 5) for name, value in metrics.items()}
                now = time.perf_counter()
                rate = REPORT_EVERY * recipe.batch_size * recipe.sequence_length / (now - mark)
                left = (now - start) / (step - first) * (recipe.steps - step)
                mark = now
                log.write(json.dumps({"step": step, "tokens_per_second": round(rate), **metrics}) + "\n")
                print(f"step {step}/{recipe.steps}  loss {metrics['loss']:.3f}  answer {metrics['answer_loss']:.3f}  "
                      f"accuracy {metrics['verdict_accuracy']:.2f}  {rate:.0f} tokens/s  {left / 60:.0f} min left",
                      file=sys.stderr)
            if step % recipe.evaluate_every == 0 or step == recipe.steps:
                save_state(folder / "state.npz", step, (params, opt_state))
                result = evaluate(nnx.merge(graph, params, rest))
                log.write(json.dumps({"step": step, **result}) + "\n")
                log.flush()
                shown = "  ".join(f"{name} {value:.3f}" for name, value in result.items())
                print(f"step {step} held out: {shown}", file=sys.stderr)
    return nnx.merge(graph, params, rest)
