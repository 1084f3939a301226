"""Selectors compared: how much of full attention each finds at the same density, as figures and as a picture."""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qwen_kernels.attention import PAGE, causal_attention
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.evaluation.sparse_recall import Paged, Shares, recall_of, true_shares
from qwen_jax.model import Qwen2

BUDGETS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Point:
    """One selector at one budget on texts of one length: means over texts, layers and KV heads.

    Attributes:
      density: pages attended to, as a share of those before the queries.
      recall: share of full attention that falls on them; reachable: the most that as many pages can hold.
      found: share of the pages that some query gives over `recall.NEEDED` of its attention to.
    """
    selector: str
    length: int
    budget: float
    density: float
    recall: float
    reachable: float
    found: float


def compare(model: Qwen2, texts: Sequence[Sequence[int]], selectors: Sequence[str],
            budgets: Sequence[float] = BUDGETS, progress: Callable[[str], None] = lambda _: None) -> Iterator[Point]:
    """Every selector at every budget, on queries and keys of full attention; no head is left dense."""
    seen = []
    for index, text in enumerate(texts):
        seen.append(_queries_and_keys(model, text))
        progress(f"full attention: text {index + 1} of {len(texts)}")
    length = round(float(np.mean([len(text) for text in texts])))
    for selector in selectors:
        for budget in budgets:
            sparsity = Sparsity(selector=selector, budget=budget)
            sums = np.zeros(6)  # of attended, visible, recall, reachable, needed, found
            for layers, count in seen:
                for layer in layers:
                    sums += np.asarray(_measure(*layer, count, sparsity))
            layers = sum(len(layers) for layers, _ in seen)
            point = Point(selector, length, budget, float(sums[0] / sums[1]), *map(float, sums[2:4] / layers),
                          float(sums[5] / max(sums[4], 1)))
            progress(f"{selector}, budget {budget:g}: recall {point.recall:.3f} at density {point.density:.3f}")
            yield point


def _queries_and_keys(model: Qwen2, text: Sequence[int]) -> tuple[list[tuple[jax.Array, jax.Array, Shares]], int]:
    """Of every layer, queries, keys and full attention's shares; and the number of tokens."""
    tokens = np.zeros(-(-len(text) // PAGE) * PAGE, np.int32)
    tokens[:len(text)] = text
    graph, params = nnx.split(model)
    return _run(graph, params, jnp.asarray(tokens), len(text)), len(text)


@partial(jax.jit, static_argnums=0)
def _run(graph, params, tokens: jax.Array, length):
    layers = []

    def attend(layer, q, k, v):
        layers.append((q, k, true_shares(q, k, length)))
        return causal_attention(q, k, v)

    nnx.merge(graph, params).hidden(tokens[None], jnp.arange(len(tokens))[None], attend)
    return layers


@partial(jax.jit, static_argnums=4)
def _measure(q: jax.Array, k: jax.Array, shares: Shares, length, sparsity: Sparsity) -> jax.Array:
    selection = Paged(k, k, length).select(q, sparsity)
    width = len(shares.mean)
    visible = jnp.sum(jnp.where(jnp.arange(width) * PAGE < length, jnp.arange(width) + 1, 0)) * k.shape[2]
    recall = recall_of(shares, selection, sparsity, length)
    return jnp.stack([jnp.sum(selection.count), visible, jnp.mean(recall.recall), jnp.mean(recall.reachable),
                      jnp.sum(recall.needed), jnp.sum(recall.found)])


def picture(points: Sequence[Point], path: str | Path, title: str) -> None:
    """Recall over density, and pages found over density, a panel for each length and measure, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    lengths = sorted({point.length for point in points})
    figure, panels = plt.subplots(len(lengths), 2, figsize=(10, 3.8 * len(lengths)), layout="constrained",
                                  squeeze=False)
    for length, row in zip(lengths, panels, strict=True):
        for panel, measure, label in zip(row, ("recall", "found"), ("share of full attention on selected pages",
                                                                    "share of needed pages selected"), strict=True):
            for name in dict.fromkeys(point.selector for point in points):
                some = [point for point in points if (point.selector, point.length) == (name, length)]
                panel.plot([point.density for point in some], [getattr(point, measure) for point in some], "-o", ms=4,
                           lw=2.2 if name == "pyramid" else 1.2, label=name)
            if measure == "recall":
                best = {point.density: point.reachable for point in points if point.length == length}
                panel.plot(*zip(*sorted(best.items()), strict=True), "--", color="0.5", lw=1, label="most reachable")
            panel.set(xlabel="density (pages)", ylabel=label, title=f"{length:,} tokens")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
