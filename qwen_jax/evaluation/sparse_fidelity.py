"""Comparison of a model with sparse attention to the same with full attention on given tokens, layer by layer."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import Selection, Sparsity

from qwen_jax.evaluation.sparse_recall import Paged, Recall, recall_of, true_shares
from qwen_jax.model import Qwen2
from qwen_jax.model.rope import rope_tables
from qwen_jax.quantization import rows

CHUNK = 128  # states that have logits at a time


@dataclass(frozen=True)
class Fidelity:
    """Closeness of sparse attention to full attention on a text.

    Attributes:
      density: pages attended to, as a share of the pages before the queries.
      cosine: ``[L]`` cosine of the residual streams of both models after each layer.
      token_losses: ``[T - 1]`` negative log-likelihood of each token but the first with sparse attention, in nats.
      full_token_losses: the same with full attention.
      divergence: mean Kullback-Leibler divergence of the next token's distribution from full attention's, in nats.
      recall: the share of full attention that falls on the selected pages, and related numbers, each ``[L, K]``; of
        full attention's queries. None if not asked for.
    """
    density: float
    cosine: np.ndarray
    token_losses: np.ndarray
    full_token_losses: np.ndarray
    divergence: float
    recall: Recall | None

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the next token with sparse attention, in nats."""
        return float(self.token_losses.mean())

    @property
    def full_loss(self) -> float:
        """Mean negative log-likelihood of the next token with full attention, in nats."""
        return float(self.full_token_losses.mean())


class Closeness(NamedTuple):
    """Part of a `Fidelity`: divergence from full attention in nats, and density."""
    divergence: float
    density: float


class Text:
    """A text of token ids, padded to whole pages, with what every layer of a model needs to run on it.

    Attributes:
      tokens: i32 ``[S]``, S a multiple of PAGE. length: number of real tokens. rope: tables of the positions.
    """

    def __init__(self, model: Qwen2, tokens: Sequence[int]):
        self.length = len(tokens)
        self.tokens = jnp.zeros(-(-self.length // PAGE) * PAGE, jnp.int32).at[: self.length].set(jnp.asarray(tokens))
        self.rope = rope_tables(model.config.rope, model.config.head_dim, jnp.arange(len(self.tokens))[None])

    def embedded(self, model: Qwen2) -> jax.Array:
        """Return the first layer's input ``[1, S, D]``."""
        return rows(model.embed.weight.get_value(), self.tokens, model.dtype)[None]

    def observe(self, layer, x: jax.Array, sparsity: Sparsity, recall: bool = False):
        """Run a layer with full attention on ``x[1, S, D]``, and watch what sparse attention would do in its place.

        Returns the layer's output, the error of each KV head ``[K]`` (see `_observe_layer`), and their `Recall`, None
        unless ``recall``.
        """
        return _observe_layer(*nnx.split(layer), x, rope=self.rope, **_settings(layer, sparsity), length=self.length,
                              recall=recall)

    def run(self, layer, x: jax.Array, sparsity: Sparsity) -> tuple[jax.Array, jax.Array]:
        """Run a layer with sparse attention on ``x[1, S, D]``; return its output, and pages ``[attended, visible]``.

        The text counts as the middle of a prompt: its end is not attended to densely.
        """
        return _run_layer(*nnx.split(layer), x, rope=self.rope, **_settings(layer, sparsity), length=self.length)

    def compare(self, model: Qwen2, sparse: jax.Array, full: jax.Array, every: int = 1) -> tuple[np.ndarray, ...]:
        """Compare a model's final states ``[1, S, D]``: return losses, full attention's losses, divergences.

        Each is ``[N]``, in nats, of every ``every``-th token but the last, which has no successor.
        """
        values = _compare(*nnx.split(model), sparse, full, self.tokens, every=every)
        return tuple(np.asarray(value)[: -(-(self.length - 1) // every)] for value in values)


class SparseRun:
    """Runs of a model on a text with settings of sparse attention that change in one layer after another.

    A run begins at the first layer whose settings are not those of `adopt`: the states before it are kept.
    """

    def __init__(self, model: Qwen2, text: Text, full: jax.Array, layers: Sequence[Sparsity]):
        """full: final states ``[1, S, D]`` with full attention. layers: the settings to begin with."""
        self.model, self.text, self.full = model, text, full
        self.layers = tuple(layers)
        self.states, self.counts = [text.embedded(model)], []  # before each layer; of each layer

    def measure(self, layers: Sequence[Sparsity], every: int = 1) -> Closeness:
        """Run the text with these settings and compare it with full attention at every ``every``-th token."""
        same = self._unchanged(layers)
        while len(self.counts) < same:
            x, counts = self._layer(len(self.counts), self.states[-1], self.layers)
            self.states.append(x)
            self.counts.append(counts)
        x, counts = self.states[same], self.counts[:same]
        for index in range(same, len(layers)):
            x, count = self._layer(index, x, layers)
            counts = [*counts, count]
        attended, visible = np.sum(jax.device_get(counts), axis=0)
        _, _, divergences = self.text.compare(self.model, x, self.full, every)
        return Closeness(float(divergences.mean()), float(attended / visible))

    def adopt(self, layers: Sequence[Sparsity]) -> None:
        """Make these the settings with which later ones are compared."""
        kept = self._unchanged(layers)
        self.layers = tuple(layers)
        self.states, self.counts = self.states[: kept + 1], self.counts[:kept]

    def _unchanged(self, layers: Sequence[Sparsity]) -> int:
        """Return the number of first layers that have the adopted settings."""
        changed = (index for index, (old, new) in enumerate(zip(self.layers, layers, strict=True)) if old != new)
        return next(changed, len(self.layers))

    def _layer(self, index: int, x: jax.Array, layers: Sequence[Sparsity]):
        return self.text.run(self.model.layers[index], x, layers[index])


def observe(model: Qwen2, text: Text, layers: Sequence[Sparsity]) -> tuple[jax.Array, np.ndarray]:
    """Run a text with full attention: return final states ``[1, S, D]``, and the errors of sparse heads ``[L, K]``."""
    x, errors = text.embedded(model), []
    for layer, sparsity in zip(model.layers, layers, strict=True):
        x, error, _ = text.observe(layer, x, sparsity)
        errors.append(error)
    return x, np.stack(jax.device_get(errors))


def fidelity(model: Qwen2, tokens: Sequence[int], layers: Sequence[Sparsity], recall: bool = True) -> Fidelity:
    """Run a text with full attention and with each layer's sparsity, and return how close the two are.

    The text counts as the middle of a prompt: its end is not attended to densely. recall: whether to measure it, by
    brute force.
    """
    text = Text(model, tokens)
    full = sparse = text.embedded(model)
    counts, recalls, cosines = [], [], []
    for layer, sparsity in zip(model.layers, layers, strict=True):
        full, _, found = text.observe(layer, full, sparsity, recall)
        sparse, count = text.run(layer, sparse, sparsity)
        counts.append(count)
        recalls.append(found)
        cosines.append(_cosine(full, sparse, text.length))
    losses, full_losses, divergences = text.compare(model, sparse, full)
    attended, visible = np.sum(jax.device_get(counts), axis=0)
    return Fidelity(density=float(attended / visible), cosine=np.array(cosines), token_losses=losses,
                    full_token_losses=full_losses, divergence=float(divergences.mean()),
                    recall=jax.tree.map(lambda *x: np.stack(x), *jax.device_get(recalls)) if recall else None)


def _settings(layer, sparsity: Sparsity) -> dict:
    """Return settings as the compiled programs take them: dense heads are an array, so that they share a program."""
    heads = layer.attention.wqkv.shape[0]
    return {"sparsity": replace(sparsity, dense_heads=()), "dense": np.isin(np.arange(heads), sparsity.dense_heads)}


@partial(jax.jit, static_argnames=("graph", "sparsity", "recall"))
def _observe_layer(graph, params, x, *, rope, sparsity: Sparsity, dense, length, recall: bool):
    """Run a layer with full attention, as `Text.observe` says.

    The error of a KV head is the square of what its sparse attention changes in the residual stream, as a share of the
    square of what attention adds to it, mean over the tokens.
    """
    layer, seen = nnx.merge(graph, params), {}

    def attend(q, k, v):
        pages = Paged(k, v, length)
        selection = with_dense(pages.select(q, sparsity), dense, length)
        full = pages.attend(q, with_dense(selection, True, length))
        change = (full - pages.attend(q, selection))[0].astype(jnp.float32)  # [S, K, G, H]
        wo = layer.attention.wo.get_value().astype(jnp.float32)
        added = jnp.sum(jnp.square(jnp.einsum("skgh,dkgh->sd", full[0].astype(jnp.float32), wo)), axis=-1)
        changed = jax.lax.map(lambda head: jnp.sum(jnp.square(jnp.einsum("sgh,dgh->sd", *head)), axis=-1),
                              (change.swapaxes(0, 1), wo.swapaxes(0, 1)))  # [K, S]
        real = jnp.arange(len(added)) < length
        seen["error"] = jnp.sum(jnp.where(real, changed / jnp.maximum(added, 1e-30), 0), axis=-1) / length
        seen["recall"] = recall_of(true_shares(q, k, length), selection, sparsity, length) if recall else None
        return full

    return layer(x, *rope, attend), seen["error"], seen["recall"]


@partial(jax.jit, static_argnames=("graph", "sparsity"))
def _run_layer(graph, params, x, *, rope, sparsity: Sparsity, dense, length):
    seen = {}

    def attend(q, k, v):
        pages = Paged(k, v, length)
        selection = with_dense(pages.select(q, sparsity), dense, length)
        seen["counts"] = jnp.stack([jnp.sum(selection.count), jnp.sum(with_dense(selection, True, length).count)])
        return pages.attend(q, selection)

    return nnx.merge(graph, params)(x, *rope, attend), seen["counts"]


@jax.jit
def _cosine(full, sparse, length):
    """Return the mean cosine of states ``[1, S, D]`` over the ``length`` real tokens."""
    similar = jnp.sum(full * sparse, -1) / (jnp.linalg.norm(full, axis=-1) * jnp.linalg.norm(sparse, axis=-1))
    return jnp.sum(jnp.where(jnp.arange(full.shape[1]) < length, similar[0], 0)) / length


@partial(jax.jit, static_argnames=("graph", "every"))
def _compare(graph, params, sparse, full, tokens: jax.Array, every: int):
    model: Qwen2 = nnx.merge(graph, params)
    targets = jnp.roll(tokens, -1)[::every]
    return token_losses((model.logits,) * 2, (model.norm(sparse)[0, ::every], model.norm(full)[0, ::every]), targets)


def with_dense(selection: Selection, dense, length) -> Selection:
    """Return the selection of pages, changed so that the heads in `dense`, bool ``[K]``, attend to every page."""
    block = jnp.arange(selection.count.shape[1])[:, None]
    everything = jnp.where(block * PAGE < length, block + 1, 0)
    return selection._replace(count=jnp.where(dense, everything, selection.count),
                              dense=jnp.where(dense, True, selection.dense))


def token_losses(logits: Sequence[Callable], states: Sequence[jax.Array], targets: jax.Array
                 ) -> tuple[jax.Array, ...]:
    """Return each target's loss by two models, and the first model's divergence from the second there, in nats.

    logits: each model's function from hidden states to logits. states: each model's final states ``[N, D]``. targets:
    the next token of each state. Only a few states at a time have logits. The results are f32 ``[N]``.
    """
    def of_chunk(item):
        *states, targets = item
        first, second = (jax.nn.log_softmax(of(x), axis=-1) for of, x in zip(logits, states, strict=True))
        divergence = jnp.sum(jnp.exp(second) * (second - first), axis=-1)
        return *(-jnp.take_along_axis(x, targets[:, None], axis=1)[:, 0] for x in (first, second)), divergence

    count = len(targets)
    chunks = [jnp.pad(x, [(0, -count % CHUNK)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, CHUNK, *x.shape[1:])
              for x in (*states, targets)]
    return tuple(x.reshape(-1)[:count] for x in jax.lax.map(of_chunk, tuple(chunks)))
