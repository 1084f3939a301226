"""How finely an 8-bit weight needs scales: one for a tensor, for a channel, for a block, against loss.

    python scripts/experiments/scales.py [configs/experiments/scales.toml] [--picture FILE.png]

The matrices of all layers are rounded and multiplied back; everything else stays in float32. Prints a table and draws
a picture: how far the next token's distribution is from the model's own, its loss, and the bits that a weight takes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from qwen_kernels.attention import PAGE, causal_attention

from qwen_jax.checkpoint import load_params, load_tokenizer, resolve
from qwen_jax.errors import UserError
from qwen_jax.evaluation.calibrate_sparsity import default_texts
from qwen_jax.evaluation.sparse_fidelity import losses
from qwen_jax.model import build
from qwen_jax.quantization import E4M3, INPUTS, saturate
from qwen_jax.training.recipe import load_recipe

LARGEST = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0}
SCALE_BITS = 32


@dataclass(frozen=True)
class Granularity:
    """One scale for `rows` outputs times `columns` inputs of a matrix; 0 means all of them."""
    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Recipe:
    model: str
    kinds: tuple[str, ...]
    granularities: tuple[Granularity, ...]
    tokens: int  # of each of six conversations


class Point(NamedTuple):
    kind: str
    granularity: str
    bits: float        # of a weight, its share of a scale included
    divergence: float  # nats
    loss: float        # nats per token


def rounded(matrix: jax.Array, kind: str, rows: int, columns: int) -> tuple[jax.Array, int]:
    """``matrix[outputs, inputs]`` as blocks of `kind` hold it, and the number of scales."""
    height, width = matrix.shape
    rows, columns = rows or height, columns or width
    padded = jnp.pad(matrix, ((0, -height % rows), (0, -width % columns)))
    blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    largest = jnp.max(jnp.abs(blocks), axis=(1, 3), keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / LARGEST[kind])
    scaled = blocks / scale
    held = saturate(scaled, E4M3).astype(jnp.float32) if kind == "e4m3" else jnp.round(scaled)
    return (held * scale).reshape(padded.shape)[:height, :width], scale.size


def round_matrices(params: dict[str, jax.Array], kind: str, one: Granularity) -> tuple[dict[str, jax.Array], float]:
    """Parameters with the matrices of all layers rounded, and the bits that a weight of these takes."""
    changed, weights, scales = dict(params), 0, 0
    for path, value in params.items():
        inputs = INPUTS.get(".".join(path.split(".")[2:]))
        if inputs:
            flat = value.reshape(-1, prod(value.shape[-inputs:]))
            new, count = rounded(flat, kind, one.rows, one.columns)
            changed[path], weights, scales = new.reshape(value.shape), weights + value.size, scales + count
    width = 4 if kind == "int4" else 8
    return changed, width + SCALE_BITS * scales / weights


def run(recipe: Recipe, progress=lambda _: None) -> tuple[list[Point], float]:
    """A point for every kind and granularity, and the loss of the model as it is."""
    unknown = [kind for kind in recipe.kinds if kind not in LARGEST]
    if unknown:
        raise UserError(f"unknown element type {unknown[0]}: use some of {', '.join(LARGEST)}")
    source = resolve(recipe.model)
    config, params = source.config, load_params(source, source.config, "float32")
    texts = default_texts(load_tokenizer(source), recipe.tokens, 0)
    width = -(-max(map(len, texts)) // PAGE) * PAGE
    positions = jnp.arange(width)[None]

    @jax.jit
    def compare(params, exact_params, tokens, length):
        models = [build(config, one) for one in (params, exact_params)]
        states = [model.hidden(tokens[None], positions, lambda _, *qkv: causal_attention(*qkv))[0] for model in models]
        return losses([model.logits for model in models], states, tokens, length)

    points, full = [], 0.0
    for kind in recipe.kinds:
        for one in recipe.granularities:
            changed, bits = round_matrices(params, kind, one)
            means = np.mean([compare(changed, params, np.pad(text, (0, width - len(text))).astype(np.int32), len(text))
                             for text in texts], axis=0)
            loss, full, divergence = map(float, means)
            points.append(Point(kind, one.name, bits, divergence, loss))
            progress(f"{len(points)} of {len(recipe.kinds) * len(recipe.granularities)}: {kind} by {one.name}")
    return points, full


def draw_picture(points: Sequence[Point], full: float, title: str, path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds, names = (list(dict.fromkeys(getattr(p, field) for p in points)) for field in ("kind", "granularity"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    wide = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        some = [point for point in points if point.kind == kind]
        at = np.arange(len(names)) + (index - (len(kinds) - 1) / 2) * wide
        left.bar(at, [point.divergence for point in some], wide * .92, label=kind)
        right.bar(at, [point.loss - full for point in some], wide * .92, label=kind)
        for x, point in zip(at, some, strict=True):
            left.annotate(f"{point.bits:.2f}", (x, point.divergence), ha="center", va="bottom", fontsize=8, color="0.3",
                          xytext=(0, 1), textcoords="offset points")
    left.set(yscale="log", ylabel="divergence from the model, nats", title="above each bar: bits per weight")
    left.set_ylim(top=left.get_ylim()[1] * 1.6)
    right.set(ylabel="loss beyond the model's own, nats per token", title=f"the model's own: {full:.4f}")
    right.set_yscale("symlog", linthresh=1e-4)
    right.axhline(0, color="0.2", lw=.8)
    for panel in (left, right):
        panel.title.set_fontsize(9)
        panel.set_xticks(range(len(names)), names)
        panel.grid(axis="y", alpha=.25)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="configs/experiments/scales.toml")
    parser.add_argument("--picture", default="scales.png", metavar="FILE.png")
    args = parser.parse_args(arguments)
    recipe = load_recipe(args.recipe, Recipe)
    points, full = run(recipe, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    print(f"{'type':<7}{'one scale for':<16}{'bits':>7}{'divergence':>12}{'loss':>10}{'more':>10}")
    for p in points:
        print(f"{p.kind:<7}{p.granularity:<16}{p.bits:>7.2f}{p.divergence:>12.6f}{p.loss:>10.5f}"
              f"{p.loss - full:>+10.5f}")
    print(f"{'float32':<7}{'':<16}{32:>7.2f}{0:>12.6f}{full:>10.5f}")
    draw_picture(points, full, f"{recipe.model}: all matrices rounded, one scale for each ...", args.picture)
    print(args.picture, file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
