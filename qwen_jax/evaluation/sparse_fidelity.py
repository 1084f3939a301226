"""How close sparse attention comes to full attention on given tokens, layer by layer."""
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
    """Sparse against full attention, over blocks of queries that do not attend to everything (losses: over all).

    Attributes:
      density: pages attended to, as a share of those before the queries.
      recall: ``[L, K]`` share of full attention that falls on the selected pages, per layer and KV head.
      reachable: ``[L, K]`` the most that as many pages can hold.
      needed: ``[L, K]`` how often a query gives over `recall.NEEDED` of its attention to a page that is not taken
        anyway, counted once for each block and page; found: how many of these pages were selected.
      cosine: ``[L]`` between the residual streams after each layer, sparse layers before it included.
      loss, full_loss: mean negative log-likelihood of the next token in nats.
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
    """Runs one text with full attention and with the sparsity of every layer.

    The text is taken for the middle of a prompt: its end is not attended to densely.
    """
    length = len(tokens)
    padded = np.zeros(-(-length // PAGE) * PAGE, np.int32)
    padded[:length] = tokens
    # Dense heads as an array: other heads need no other program.
    dense = np.zeros((model.config.num_layers, model.config.num_kv_heads), bool)
    for layer, one in enumerate(layers):
        dense[layer, list(one.dense_heads)] = True
    ranked = tuple(replace(layer, dense_heads=()) for layer in layers)
    graph, params = nnx.split(model)
    measured = jax.device_get(_measure(graph, ranked, params, jnp.asarray(padded), length, dense))
    attended, visible, per_head, cosine, losses = measured
    return Fidelity(float(attended / visible), *per_head, cosine, *map(float, losses))


@partial(jax.jit, static_argnums=(0, 1))
def _measure(graph, layers: tuple[Sparsity, ...], params, tokens: jax.Array, length, dense: jax.Array):
    model: Qwen2 = nnx.merge(graph, params)
    positions = jnp.arange(len(tokens))[None]
    cos, sin = rope_tables(model.config.rope, model.config.head_dim, positions)
    full = sparse = rows(model.embed.weight.get_value(), tokens, model.dtype)[None]
    per_head, cosines = [], []
    attended = visible = 0
    for index, (layer, sparsity) in enumerate(zip(model.layers, layers, strict=True)):
        seen = {}

        def attend_fully(q, k, v, index=index, sparsity=sparsity, seen=seen):
            pages = Paged(k, v, length)
            selection = pages.select(q, sparsity)
            seen["selection"] = _with(selection, dense[index], length)
            seen["per_head"] = recall_of(true_shares(q, k, length), seen["selection"], sparsity, length)
            return pages.attend(q, _with(selection, True, length))

        def attend_sparsely(q, k, v, index=index, sparsity=sparsity):
            pages = Paged(k, v, length)
            return pages.attend(q, _with(pages.select(q, sparsity), dense[index], length))

        full = layer(full, cos, sin, attend_fully)
        sparse = layer(sparse, cos, sin, attend_sparsely)
        attended += jnp.sum(seen["selection"].count)
        visible += jnp.sum(_with(seen["selection"], True, length).count)
        per_head.append(seen["per_head"])
        known = jnp.arange(len(tokens)) < length
        similar = jnp.sum(full * sparse, -1) / (jnp.linalg.norm(full, axis=-1) * jnp.linalg.norm(sparse, axis=-1))
        cosines.append(jnp.sum(jnp.where(known, similar[0], 0)) / length)
    said = losses((model.logits,) * 2, (model.norm(sparse)[0], model.norm(full)[0]), tokens, length)
    return attended, visible, jax.tree.map(lambda *x: jnp.stack(x), *per_head), jnp.stack(cosines), said


def _with(selection: Selection, dense, length) -> Selection:
    """A selection in which some heads, bool ``[K]``, attend to every page before each block."""
    block = jnp.arange(selection.count.shape[1])[:, None]
    everything = jnp.where(block * PAGE < length, block + 1, 0)
    return selection._replace(count=jnp.where(dense, everything, selection.count),
                              dense=jnp.where(dense, True, selection.dense))


def losses(logits: Sequence[Callable], states: Sequence[jax.Array], tokens: jax.Array, length
           ) -> tuple[jax.Array, ...]:
    """Loss of two models, and the first one's divergence from the second, in nats per token.

    logits: of each model, the function from hidden states; states: its final ones ``[S, D]``, S a multiple of PAGE;
    tokens: ``[S]``, of which ``length`` are real. Logits exist for one page at a time.
    """
    targets = jnp.roll(tokens, -1).reshape(-1, PAGE, 1)
    wanted = (jnp.arange(len(tokens)) < length - 1).reshape(-1, PAGE)

    def one(item):
        *states, targets, wanted = item
        ours, theirs = (jax.nn.log_softmax(of(x), axis=-1) for of, x in zip(logits, states, strict=True))
        divergence = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
        said = [-jnp.take_along_axis(x, targets, axis=1)[:, 0] for x in (ours, theirs)]
        return tuple(jnp.sum(jnp.where(wanted, x, 0)) for x in (*said, divergence))

    pages = [x.reshape(-1, PAGE, x.shape[-1]) for x in states]
    return tuple(jnp.sum(x) / (length - 1) for x in jax.lax.map(one, (*pages, targets, wanted)))
