"""Measure what rounding weights to 8 or 4 bits costs a model, with one scale for a tensor, a channel, or a block.

    python scripts/experiments/scales.py [configs/experiments/scales.toml] [--picture FILE.png]

The matrices of all layers are rounded and multiplied back; everything else stays in float32. Prints a table and draws
a picture of the divergence from the model's own distribution of the next token, the loss, and the bits per weight.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import prod
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from qwen_kernels.attention import PAGE, causal_attention

from qwen_jax.checkpoint import load_params, load_tokenizer, resolve
from qwen_jax.errors import UserError
from qwen_jax.evaluation.calibrate_sparsity import default_texts
from qwen_jax.evaluation.sparse_fidelity import token_losses
from qwen_jax.model import build
from qwen_jax.quantization import E4M3, INPUTS, saturate
from qwen_jax.training.recipe import Names, Table, load_recipe

LARGEST = {"e4m3": 448.0, "int8": 127.0, "int4": 7.0}
SCALE_BITS = 32


class Granularity(Table):
    """The part of a weight matrix that shares a scale: `rows` outputs times `columns` inputs, 0 for all of them."""
    name: str
    rows: int
    columns: int


class Recipe(Table):
    """Settings of the experiment: a model, and the element types and granularities of scales to compare."""
    model: str
    kinds: Names
    granularities: Annotated[tuple[Granularity, ...], msgspec.Meta(min_length=1)]
    tokens: int  # length of each of six conversations


class Point(NamedTuple):
    """Cost of rounding a model's weights to an element type with a granularity of scales."""
    kind: str
    granularity: str
    bits: float        # bits per weight, including its share of a scale
    divergence: float  # nats
    loss: float        # nats per token


def rounded(matrix: jax.Array, kind: str, rows: int, columns: int) -> tuple[jax.Array, int]:
    """Round ``matrix[outputs, inputs]`` to type `kind`, with a scale per block; return it and the number of scales."""
    height, width = matrix.shape
    rows, columns = rows or height, columns or width
    padded = jnp.pad(matrix, ((0, -height % rows), (0, -width % columns)))
    blocks = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    largest = jnp.max(jnp.abs(blocks), axis=(1, 3), keepdims=True)
    scale = jnp.where(largest == 0, 1, largest / LARGEST[kind])
    scaled = blocks / scale
    held = saturate(scaled, E4M3).astype(jnp.float32) if kind == "e4m3" else jnp.round(scaled)
    return (held * scale).reshape(padded.shape)[:height, :width], scale.size


def round_matrices(params: dict[str, jax.Array], kind: str, granularity: Granularity
                   ) -> tuple[dict[str, jax.Array], float]:
    """Round the weight matrices of all layers; return all parameters, and the matrices' bits per weight with scales."""
    changed, weights, scales = dict(params), 0, 0
    for path, value in params.items():
        inputs = INPUTS.get(".".join(path.split(".")[2:]))
        if inputs:
            flat = value.reshape(-1, prod(value.shape[-inputs:]))
            new, count = rounded(flat, kind, granularity.rows, granularity.columns)
            changed[path], weights, scales = new.reshape(value.shape), weights + value.size, scales + count
    width = 4 if kind == "int4" else 8
    return changed, width + SCALE_BITS * scales / weights


def run(recipe: Recipe, progress=lambda _: None) -> tuple[list[Point], float]:
    """Measure every element type with every granularity of scales; return the results and the exact model's loss."""
    unknown = [kind for kind in recipe.kinds if kind not in LARGEST]
    if unknown:
        raise UserError(f"unknown element type {unknown[0]}: use {', '.join(LARGEST)}")
    source = resolve(recipe.model)
    config, params = source.config, load_params(source, source.config, "float32")
    texts = default_texts(load_tokenizer(source), recipe.tokens, 0)
    width = -(-max(map(len, texts)) // PAGE) * PAGE
    positions = jnp.arange(width)[None]

    @jax.jit
    def compare(params, exact_params, tokens, length):
        models = [build(config, tree) for tree in (params, exact_params)]
        states = [model.hidden(tokens[None], positions, lambda _, *qkv: causal_attention(*qkv))[0] for model in models]
        values = token_losses([model.logits for model in models], states, jnp.roll(tokens, -1))
        return tuple(jnp.sum(jnp.where(jnp.arange(width) < length - 1, x, 0)) / (length - 1) for x in values)

    points, full = [], 0.0
    for kind in recipe.kinds:
        for granularity in recipe.granularities:
            changed, bits = round_matrices(params, kind, granularity)
            means = np.mean([compare(changed, params, np.pad(text, (0, width - len(text))).astype(np.int32), len(text))
                             for text in texts], axis=0)
            loss, full, divergence = map(float, means)
            points.append(Point(kind, granularity.name, bits, divergence, loss))
            progress(f"{len(points)} of {len(recipe.kinds) * len(recipe.granularities)}: {kind} by {granularity.name}")
    return points, full


def draw_picture(points: Sequence[Point], full: float, title: str, path: str) -> None:
    """Draw the divergence and the added loss of every element type, by granularity of scales, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds, names = (list(dict.fromkeys(getattr(p, field) for p in points)) for field in ("kind", "granularity"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    wide = 0.8 / len(kinds)
    for index, kind in enumerate(kinds):
        of_kind = [point for point in points if point.kind == kind]
        at = np.arange(len(names)) + (index - (len(kinds) - 1) / 2) * wide
        left.bar(at, [point.divergence for point in of_kind], wide * .92, label=kind)
        right.bar(at, [point.loss - full for point in of_kind], wide * .92, label=kind)
        for x, point in zip(at, of_kind, strict=True):
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
