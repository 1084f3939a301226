"""Comparison of page selectors: the share of full attention that each finds when it selects as many pages."""
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
    """Quality of one page selector with one budget, as means over texts of one length, layers and KV heads.

    Attributes:
      density: pages attended to, as a share of the pages before the queries.
      recall: share of full attention that falls on the selected pages.
      reachable: largest recall that any selection of as many pages can have.
      found: share selected of the pages that get over `sparse_recall.NEEDED` of some query's attention.
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
    """Measure how much of full attention the pages of every selector hold, at every budget of pages.

    Queries and keys are those of the model with full attention; no heads are left dense.
    """
    observed = []
    for index, text in enumerate(texts):
        observed.append(_queries_and_keys(model, text))
        progress(f"full attention: text {index + 1} of {len(texts)}")
    length = round(float(np.mean([len(text) for text in texts])))
    for selector in selectors:
        for budget in budgets:
            sparsity = Sparsity(selector=selector, budget=budget)
            sums = np.zeros(6)  # attended, visible, recall, reachable, needed, found
            for layers, count in observed:
                for layer in layers:
                    sums += np.asarray(_measure(*layer, count, sparsity))
            attended, visible, recall, reachable, needed, found = map(float, sums)
            num_layers = sum(len(layers) for layers, _ in observed)
            point = Point(selector=selector, length=length, budget=budget, density=attended / visible,
                          recall=recall / num_layers, reachable=reachable / num_layers, found=found / max(needed, 1))
            progress(f"{selector}, budget {budget:g}: recall {point.recall:.3f} at density {point.density:.3f}")
            yield point


def _queries_and_keys(model: Qwen2, text: Sequence[int]) -> tuple[list[tuple[jax.Array, jax.Array, Shares]], int]:
    """Run a model on token ids; return every layer's queries, keys and softmax weights, and the number of tokens."""
    tokens = np.zeros(-(-len(text) // PAGE) * PAGE, np.int32)
    tokens[:len(text)] = text
    graph, params = nnx.split(model)
    return _run(graph, params, jnp.asarray(tokens), len(text)), len(text)


@partial(jax.jit, static_argnums=0)
def _run(graph, params, tokens: jax.Array, length):
    """Run the model with full attention on tokens: return (queries, keys, attention shares) of every layer."""
    layers = []

    def attend(layer, q, k, v):
        layers.append((q, k, true_shares(q, k, length)))
        return causal_attention(q, k, v)

    nnx.merge(graph, params).hidden(tokens[None], jnp.arange(len(tokens))[None], attend)
    return layers


@partial(jax.jit, static_argnums=4)
def _measure(q: jax.Array, k: jax.Array, shares: Shares, length, sparsity: Sparsity) -> jax.Array:
    """Select pages in one layer and return six measures of them, of which `compare` makes a `Point`.

    They are the pages attended to and visible, mean recall and reachable recall, and the pages needed and found.
    """
    selection = Paged(k, k, length).select(q, sparsity)
    width = len(shares.mean)
    visible = jnp.sum(jnp.where(jnp.arange(width) * PAGE < length, jnp.arange(width) + 1, 0)) * k.shape[2]
    recall = recall_of(shares, selection, sparsity, length)
    return jnp.stack([jnp.sum(selection.count), visible, jnp.mean(recall.recall), jnp.mean(recall.reachable),
                      jnp.sum(recall.needed), jnp.sum(recall.found)])


def picture(points: Sequence[Point], path: str | Path, title: str) -> None:
    """Draw recall, and needed pages found, against density as a PNG with a panel for each length and measure."""
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
                curve = [point for point in points if (point.selector, point.length) == (name, length)]
                panel.plot([point.density for point in curve], [getattr(point, measure) for point in curve], "-o",
                           ms=4, lw=2.2 if name == Sparsity.selector else 1.2, label=name)
            if measure == "recall":
                best = {point.density: point.reachable for point in points if point.length == length}
                panel.plot(*zip(*sorted(best.items()), strict=True), "--", color="0.5", lw=1, label="most reachable")
            panel.set(xlabel="density (pages)", ylabel=label, title=f"{length:,} tokens")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
