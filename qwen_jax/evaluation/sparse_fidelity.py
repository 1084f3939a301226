"""Comparison of a model with sparse attention to the same with full attention on given tokens, layer by layer."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import Selection, Sparsity

from qwen_jax.evaluation.sparse_recall import Paged, recall_of, true_shares
from qwen_jax.model import Qwen2
from qwen_jax.model.rope import rope_tables
from qwen_jax.quantization import rows


@dataclass(frozen=True)
class Fidelity:
    """Closeness of sparse attention to full attention, over the blocks of queries that leave pages out.

    Losses are over all tokens.

    Attributes:
      density: pages attended to, as a share of the pages before the queries.
      recall: ``[L, K]`` share of full attention that falls on the selected pages, per layer and KV head.
      reachable: ``[L, K]`` largest recall that any selection of as many pages can have.
      needed: ``[L, K]`` number of pages per block that get over `sparse_recall.NEEDED` of some query's attention and
        are not among the first and last pages, which are always selected.
      found: ``[L, K]`` number of needed pages that were selected.
      cosine: ``[L]`` cosine of the residual streams of both models after each layer.
      loss: mean negative log-likelihood of the next token with sparse attention, in nats.
      full_loss: the same with full attention.
      divergence: mean Kullback-Leibler divergence of the next token's distribution from full attention's, in nats.
    """
    density: float
    recall: np.ndarray
    reachable: np.ndarray
    needed: np.ndarray
    found: np.ndarray
    cosine: np.ndarray
    loss: float
    full_loss: float
    divergence: float


def fidelity(model: Qwen2, tokens: Sequence[int], layers: Sequence[Sparsity]) -> Fidelity:
    """Run a text with full attention and with each layer's sparsity, and return how close the two are.

    The text counts as the middle of a prompt: its end is not attended to densely.
    """
    length = len(tokens)
    padded = np.zeros(-(-length // PAGE) * PAGE, np.int32)
    padded[:length] = tokens
    rope = rope_tables(model.config.rope, model.config.head_dim, jnp.arange(len(padded))[None])
    full = sparse = rows(model.embed.weight.get_value(), jnp.asarray(padded), model.dtype)[None]
    attended, visible, per_head, cosines = 0, 0, [], []
    for layer, sparsity in zip(model.layers, layers, strict=True):
        # Dense heads are an array, so that other choices of dense heads need no other program.
        dense = np.isin(np.arange(model.config.num_kv_heads), sparsity.dense_heads)
        full, sparse, counts, recall, cosine = _run_layer(*nnx.split(layer), full, sparse, rope=rope, dense=dense,
                                                          sparsity=replace(sparsity, dense_heads=()), length=length)
        attended, visible = attended + counts[0], visible + counts[1]
        per_head.append(recall)
        cosines.append(cosine)
    both = _losses_of(*nnx.split(model), sparse, full, jnp.asarray(padded), length)
    per_head = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(per_head))
    return Fidelity(float(attended / visible), *per_head, np.array(cosines), *map(float, both))


@partial(jax.jit, static_argnames=("graph", "sparsity"))
def _run_layer(graph, params, full, sparse, *, rope, dense, sparsity: Sparsity, length):
    """Run a layer with full attention on ``full`` and with sparse attention on ``sparse``, both ``[1, S, D]``.

    Equal layers with equal settings share the compiled program. dense: heads that attend to everything, bool ``[K]``.

    Returns both outputs, pages attended to and visible, the recall of every head, of full attention's queries, and the
    mean cosine of the outputs.
    """
    layer, seen = nnx.merge(graph, params), {}

    def attend_fully(q, k, v):
        pages = Paged(k, v, length)
        selection = with_dense(pages.select(q, sparsity), dense, length)
        everything = with_dense(selection, True, length)
        seen["counts"] = jnp.sum(selection.count), jnp.sum(everything.count)
        seen["recall"] = recall_of(true_shares(q, k, length), selection, sparsity, length)
        return pages.attend(q, everything)

    def attend_sparsely(q, k, v):
        pages = Paged(k, v, length)
        return pages.attend(q, with_dense(pages.select(q, sparsity), dense, length))

    full, sparse = layer(full, *rope, attend_fully), layer(sparse, *rope, attend_sparsely)
    similar = jnp.sum(full * sparse, -1) / (jnp.linalg.norm(full, axis=-1) * jnp.linalg.norm(sparse, axis=-1))
    cosine = jnp.sum(jnp.where(jnp.arange(full.shape[1]) < length, similar[0], 0)) / length
    return full, sparse, seen["counts"], seen["recall"], cosine


@partial(jax.jit, static_argnums=0)
def _losses_of(graph, params, sparse, full, tokens: jax.Array, length) -> tuple[jax.Array, ...]:
    """Return `losses` of the model's final states ``[1, S, D]`` with sparse and with full attention."""
    model: Qwen2 = nnx.merge(graph, params)
    return losses((model.logits,) * 2, (model.norm(sparse)[0], model.norm(full)[0]), tokens, length)


def with_dense(selection: Selection, dense, length) -> Selection:
    """Return the selection of pages, changed so that the heads in `dense`, bool ``[K]``, attend to every page."""
    block = jnp.arange(selection.count.shape[1])[:, None]
    everything = jnp.where(block * PAGE < length, block + 1, 0)
    return selection._replace(count=jnp.where(dense, everything, selection.count),
                              dense=jnp.where(dense, True, selection.dense))


def losses(logits: Sequence[Callable], states: Sequence[jax.Array], tokens: jax.Array, length
           ) -> tuple[jax.Array, ...]:
    """Return next-token losses of two models and the first model's divergence from the second, in nats per token.

    logits: each model's function from hidden states to logits. states: each model's final states ``[S, D]``, S a
    multiple of PAGE. tokens: ``[S]``, of which ``length`` are real. Only one page at a time has logits.
    """
    targets = jnp.roll(tokens, -1).reshape(-1, PAGE, 1)
    counted = (jnp.arange(len(tokens)) < length - 1).reshape(-1, PAGE)

    def of_page(item):
        *states, targets, counted = item
        first, second = (jax.nn.log_softmax(of(x), axis=-1) for of, x in zip(logits, states, strict=True))
        divergence = jnp.sum(jnp.exp(second) * (second - first), axis=-1)
        nll = [-jnp.take_along_axis(x, targets, axis=1)[:, 0] for x in (first, second)]
        return tuple(jnp.sum(jnp.where(counted, x, 0)) for x in (*nll, divergence))

    pages = [x.reshape(-1, PAGE, x.shape[-1]) for x in states]
    return tuple(jnp.sum(x) / (length - 1) for x in jax.lax.map(of_page, (*pages, targets, counted)))
