"""Sharding plans against predicted step time: which split of some devices gives a token soonest, by batch size.

    python scripts/experiments/sharding.py [configs/experiments/sharding.toml] [--picture FILE.png]

Everything is predicted by a roofline (docs/planner.md) and nothing is run. Prints a table and draws a picture: the time
per token by batch size, and what a decode step of one batch size spends its time on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.parallel.hardware import BANDWIDTH_SHARE, COMPUTE_SHARE, hardware
from qwen_jax.parallel.planner import Predicted, Request, plans
from qwen_jax.parallel.roofline import Work
from qwen_jax.quantization import default_precision
from qwen_jax.training.recipe import load_recipe


@dataclass(frozen=True)
class Recipe:
    model: str                # a preset
    device: str
    devices: int
    tokens: int               # of each sequence
    batches: tuple[int, ...]  # sequences at once
    split_at: int             # the batch whose steps are taken apart


class Point(NamedTuple):
    batch: int
    plan: str
    per_token: float    # seconds
    first_token: float  # seconds
    gigabytes: float    # of a device


class Parts(NamedTuple):
    """Seconds of one decode step of all stages, one micro-batch after another."""
    memory: float     # reading weights, keys and values
    computing: float  # what products take beyond that
    exchanging: float


def request(recipe: Recipe, batch: int) -> Request:
    return Request(ModelConfig.preset(recipe.model), hardware(recipe.device), recipe.devices, batch, recipe.tokens)


def run(recipe: Recipe) -> tuple[list[Point], dict[str, Parts]]:
    """Every plan that fits at every batch size, the best first; and the parts of a step at `split_at`."""
    points = []
    for batch in recipe.batches:
        report = plans(request(recipe, batch))
        points += [Point(batch, str(one.plan), one.per_token, one.first_token, one.bytes / 1e9)
                   for one in report.feasible]
    if not points:
        raise UserError(f"{recipe.model} fits on {recipe.devices} x {recipe.device} with none of the batches: name "
                        "smaller ones, or more devices")
    asked = request(recipe, recipe.split_at)
    return points, {str(one.plan): parts(asked, one) for one in plans(asked).feasible}


def parts(asked: Request, one: Predicted) -> Parts:
    precision = asked.precision or default_precision(asked.config, False, None)
    work = Work(asked.config, one.plan, asked.hardware, precision, asked.dtype)
    rows, stages = -(-asked.batch // one.plan.data), len(one.plan.stages)
    size = -(-rows // stages)
    memory = computing = exchanging = 0.0
    for stage in range(stages):
        step = work.step(stage, size, 1, asked.seq_len)
        reading = step.bytes / (BANDWIDTH_SHARE * asked.hardware.bandwidth)
        products = step.flops / (COMPUTE_SHARE * asked.hardware.peak(asked.dtype, any(precision.weights)))
        memory, computing = memory + reading, computing + max(0.0, products - reading)
        exchanging += step.exchanging
    passing = work.seconds(size, 1, asked.seq_len) - memory - computing - exchanging
    return Parts(memory, computing, exchanging + passing)


def _axes(plan: str) -> dict[str, int]:
    """``data=2 stage=1 tensor=4`` as a mapping."""
    return {axis: int(size) for axis, size in (part.split("=") for part in plan.split())}


def draw_picture(points: Sequence[Point], split: dict[str, Parts], recipe: Recipe, path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    best = {batch: min((p for p in points if p.batch == batch), key=lambda p: p.per_token)
            for batch in sorted({p.batch for p in points})}
    degrees = sorted({_axes(point.plan)["tensor"] for point in points})
    for name in sorted({point.plan for point in points}, key=lambda name: [-n for n in _axes(name).values()][::-1]):
        some, axes = [point for point in points if point.plan == name], _axes(name)
        # Colour for the degree of tensor parallelism, line for the replicas.
        left.plot([p.batch for p in some], [p.per_token * 1e3 for p in some], marker="o", ms=4, lw=1.5, label=name,
                  color=f"C{degrees.index(axes['tensor'])}", ls={1: "-", 2: "--", 4: "-."}.get(axes["data"], ":"))
    left.plot(list(best), [point.per_token * 1e3 for point in best.values()], "o", ms=11, mfc="none", mec="black",
              label="the best")
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
