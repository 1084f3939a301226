"""The training loop: steps, progress, evaluation, checkpoints that survive an interruption."""
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.atomic import replace_file
from qwen_jax.errors import UserError
from qwen_jax.training import checkpoints
from qwen_jax.training.batch import Batch
from qwen_jax.training.step import TrainState

REPORT_EVERY = 10  # steps between looks at the metrics: each look waits for the device


@dataclass(frozen=True)
class Run:
    """Settings of a training run: its length, its folder, and when it writes checkpoints or gives up."""
    folder: Path           # place of checkpoints and metrics
    steps: int
    checkpoint_every: int  # steps
    keep: int              # number of checkpoints
    max_skipped: int       # steps in a row with non-finite gradients, and so without effect, that end the run
    facts: dict[str, Any]  # settings that a continued run must share with the interrupted run, as JSON values


def fit(state: TrainState, train_step: Callable, frozen: Any, batch_of: Callable[[int], Batch], run: Run,
        evaluate: Callable[[TrainState], dict[str, float]] | None = None) -> TrainState:
    """Train up to step `run.steps`, from the last checkpoint if there is one, and return the last state.

    ``batch_of(step)`` always gives the same batch for a step, so a run that is started again in the same folder
    continues bit for bit from its last checkpoint. Writes ``step-*`` (checkpoints) and ``metrics.jsonl``; each line of
    the latter has a ``step`` and either training metrics or the result of `evaluate`, which is called at every
    checkpoint. Where TensorBoard is installed, its event files are written too. Progress goes to stderr. Raises
    UserError, which names the first parameter concerned, when gradients stay non-finite.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    restored, first = checkpoints.restore(run.folder, state, run.facts), 0
    if restored:
        first, state = restored
        print(f"continuing at step {first}", file=sys.stderr)
    _drop_lines_after(run.folder / "metrics.jsonl", first)
    board = _tensorboard(run.folder)
    with open(run.folder / "metrics.jsonl", "a", encoding="utf-8") as log:
        def record(step: int, values: dict[str, float]) -> None:
            log.write(json.dumps({"step": step, **values}) + "\n")
            log.flush()
            if board:
                for name, value in values.items():
                    board.add_scalar(name, value, step)
                board.flush()

        start = mark = time.perf_counter()
        tokens = 0
        for step in range(first + 1, run.steps + 1):
            batch = batch_of(step)
            tokens += batch.tokens.size
            state, metrics = train_step(state, frozen, batch)
            if step % REPORT_EVERY == 0 or step == run.steps:
                _check(state, metrics, run.max_skipped)
                shown = {name: float(value) for name, value in metrics.items() if name != "finite"}
                now = time.perf_counter()
                rate, left = tokens / (now - mark), (now - start) / (step - first) * (run.steps - step)
                mark, tokens = now, 0
                record(step, {"tokens_per_second": round(rate), "skipped": int(state.skipped),
                              **{name: round(value, 6) for name, value in shown.items()}})
                values = "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
                print(f"step {step}/{run.steps}  {values}  {rate:.0f} tokens/s  {_duration(left)} left",
                      file=sys.stderr)
            if step % run.checkpoint_every == 0 or step == run.steps:
                _check(state, metrics, run.max_skipped)
                checkpoints.save(run.folder, step, state, run.facts, run.keep)
                if evaluate:
                    result = evaluate(state)
                    record(step, result)
                    shown = "  ".join(f"{name} {value:.3f}" for name, value in result.items())
                    print(f"step {step} held out: {shown}", file=sys.stderr)
    return state


def _tensorboard(folder: Path) -> Any:
    """Return a writer of event files, or None where TensorBoard is not installed."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(folder))


def _check(state: TrainState, metrics: dict, limit: int) -> None:
    """Raise UserError when the gradients of `limit` steps in a row were not finite."""
    in_a_row = int(state.skipped_in_a_row)
    if in_a_row >= limit:
        bad = [name for name, finite in metrics["finite"].items() if not np.asarray(finite)]
        raise UserError(f"the gradients of {in_a_row} steps in a row were not finite, first that of {bad[0]} "
                        f"({len(bad)} of {len(metrics['finite'])} parameters): lower the learning rate, or look at the "
                        "data")


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove the metrics after `step`, which the continued run writes again, and an incomplete last line."""
    if not path.exists():
        return
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        lines.append(line)
    replace_file(path, "".join(lines).encode())


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min"
