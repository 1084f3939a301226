"""Compare sharding plans by predicted step time: the fastest way to split a model over devices, by batch size.

    python scripts/experiments/sharding.py [configs/experiments/sharding.toml] [--picture FILE.png]

Everything is predicted by a roofline (docs/planner.md) and nothing is run. Prints a table and draws a picture: the time
per token by batch size, and the parts of the time of a decode step of one batch size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.parallel.hardware import BANDWIDTH_SHARE, COMPUTE_SHARE, hardware
from qwen_jax.parallel.planner import PlanRequest, Prediction, plans
from qwen_jax.parallel.roofline import CostModel
from qwen_jax.quantization import default_precision
from qwen_jax.training.recipe import Numbers, Table, load_recipe


class Recipe(Table):
    """Settings of the experiment: a model, the devices to split it over, and the batch sizes."""
    model: str        # name of a preset
    device: str
    devices: int
    tokens: int       # length of each sequence
    batches: Numbers  # numbers of sequences at once
    split_at: int     # batch size whose step times are split into parts


class Point(NamedTuple):
    """Predicted times and memory of a sharding plan at a batch size."""
    batch: int
    plan: str
    per_token: float    # seconds
    first_token: float  # seconds
    gigabytes: float    # memory used on a device


class Parts(NamedTuple):
    """Seconds of a decode step by what takes them; all pipeline stages run one micro-batch, one after another."""
    memory: float      # reading weights, keys and values
    computing: float   # products, beyond the time of reading
    exchanging: float  # collectives, and transfers between stages


def request(recipe: Recipe, batch: int) -> PlanRequest:
    """Return the planner's input for the recipe's model and devices at a batch size."""
    return PlanRequest(ModelConfig.preset(recipe.model), hardware(recipe.device), recipe.devices, batch, recipe.tokens)


def run(recipe: Recipe) -> tuple[list[Point], dict[str, Parts]]:
    """Predict all plans that fit, for each batch size the best first, and the parts of a step's time at `split_at`."""
    points = []
    for batch in recipe.batches:
        report = plans(request(recipe, batch))
        points += [Point(batch, str(predicted.plan), predicted.per_token, predicted.first_token, predicted.bytes / 1e9)
                   for predicted in report.feasible]
    if not points:
        raise UserError(f"{recipe.model} fits on {recipe.devices} x {recipe.device} with none of the batches: name "
                        "smaller batches, or more devices")
    split = request(recipe, recipe.split_at)
    return points, {str(predicted.plan): parts(split, predicted) for predicted in plans(split).feasible}


def parts(planned: PlanRequest, predicted: Prediction) -> Parts:
    """Split a plan's predicted decode step into the seconds for reading memory, computing, and exchanging data."""
    precision = planned.precision or default_precision(planned.config, False, None)
    work = CostModel(planned.config, predicted.plan, planned.hardware, precision, planned.dtype)
    rows, stages = -(-planned.batch // predicted.plan.data), len(predicted.plan.stages)
    size = -(-rows // stages)
    memory = computing = exchanging = 0.0
    for stage in range(stages):
        step = work.step(stage, size, 1, planned.seq_len)
        reading = step.bytes / (BANDWIDTH_SHARE * planned.hardware.bandwidth)
        products = step.flops / (COMPUTE_SHARE * planned.hardware.peak(planned.dtype, any(precision.weights)))
        memory, computing = memory + reading, computing + max(0.0, products - reading)
        exchanging += step.exchanging
    passing = work.seconds(size, 1, planned.seq_len) - memory - computing - exchanging
    return Parts(memory, computing, exchanging + passing)


def _axes(plan: str) -> dict[str, int]:
    """Return the sizes of the axes that a plan's name gives, such as ``data=2 stage=1 tensor=4``, as a mapping."""
    return {axis: int(size) for axis, size in (part.split("=") for part in plan.split())}


def draw_picture(points: Sequence[Point], split: dict[str, Parts], recipe: Recipe, path: str) -> None:
    """Draw each plan's time per token by batch size, and the parts of its decode step's time, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    best = {batch: min((p for p in points if p.batch == batch), key=lambda p: p.per_token)
            for batch in sorted({p.batch for p in points})}
    degrees = sorted({_axes(point.plan)["tensor"] for point in points})
    for name in sorted({point.plan for point in points}, key=lambda name: [-n for n in _axes(name).values()][::-1]):
        curve, axes = [point for point in points if point.plan == name], _axes(name)
        # Colour for the degree of tensor parallelism, line for the replicas.
        left.plot([p.batch for p in curve], [p.per_token * 1e3 for p in curve], marker="o", ms=4, lw=1.5, label=name,
                  color=f"C{degrees.index(axes['tensor'])}", ls={1: "-", 2: "--", 4: "-."}.get(axes["data"], ":"))
    left.plot(list(best), [point.per_token * 1e3 for point in best.values()], "o", ms=11, mfc="none", mec="black",
              label="fastest plan")
    left.set(xscale="log", yscale="log", xlabel="sequences at once", ylabel="ms per token of each sequence")
    left.set_xticks(list(best), [str(batch) for batch in best])
    left.minorticks_off()
    left.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    left.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, .5))

    shown, start = sorted(split, key=lambda name: -sum(split[name])), [0.0] * len(split)
    for field, label, colour in (("memory", "reading memory", "#8da0cb"), ("computing", "products beyond that",
                                 "#66c2a5"), ("exchanging", "collectives and transfers", "#fc8d62")):
        widths = [getattr(split[name], field) * 1e3 for name in shown]
        if max(widths) > 0:
            right.barh(shown, widths, left=start, label=label, color=colour, height=.65)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.set(xlabel=f"ms of one micro-batch through all stages, {recipe.split_at} sequences")
    right.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(.5, 1), ncols=3)
    for panel in (left, right):
        panel.grid(alpha=.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{recipe.model} on {recipe.devices} x {recipe.device}, {recipe.tokens:,} tokens a sequence: "
                    "predicted by a roofline, not measured")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="configs/experiments/sharding.toml")
    parser.add_argument("--picture", default="sharding.png", metavar="FILE.png")
    args = parser.parse_args(arguments)
    recipe = load_recipe(args.recipe, Recipe)
    points, split = run(recipe)
    print(f"{'batch':>6}  {'plan':<26}{'per token':>12}{'first token':>13}{'a device':>11}")
    for p in points:
        print(f"{p.batch:>6}  {p.plan:<26}{p.per_token * 1e3:>9.2f} ms{p.first_token * 1e3:>10.0f} ms"
              f"{p.gigabytes:>8.1f} GB")
    draw_picture(points, split, recipe, args.picture)
    print(args.picture, file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
