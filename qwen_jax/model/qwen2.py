"""Qwen2.5 as a Flax NNX module.

Axes: B rows, T tokens, D model, K KV heads, G query heads per KV head, H head dim, F MLP, V vocabulary. Every matrix
keeps the axis it contracts last, as Hugging Face stores it: conversion is then a reshape, and on CPU a dot product
of a few rows reads such a matrix up to twice as fast as its transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from qwen_kernels.attention import causal_attention

from qwen_jax.config import ModelConfig
from qwen_jax.model.partition import WHOLE, Partition
from qwen_jax.model.rope import apply_rope, rope_tables
from qwen_jax.quantization import INT8, QuantizedTensor, matrix, product

# Attention of a layer: (layer index, q[B, T, K, G, H], k[B, T, K, H], v[B, T, K, H]) -> [B, T, K, G, H]
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]
# Change of a product's output y: (layer index, site, input x[B, T, I], y) -> the new y. Sites: "qkv" (y is
# [B, T, K, G + 2, H], before the bias), "o" and "down" ([B, T, D]), "gate_up" ([2, B, T, F]).
Adapt = Callable[[int, str, jax.Array, jax.Array], jax.Array]


def _param(shape: tuple[int, ...], axes: tuple[str, ...], rngs: nnx.Rngs | None, dtype,
           scale: float | None) -> nnx.Param:
    """Make a parameter with its logical axes as metadata.

    rngs: None where the values do not matter, which is much faster. scale: standard deviation of normal values; 0 for
    zeros, None for ones.
    """
    if scale is None:
        value = jnp.ones(shape, dtype)
    elif scale == 0 or rngs is None:
        value = jnp.zeros(shape, dtype)
    else:
        value = (jax.random.normal(rngs.params(), shape, jnp.float32) * scale).astype(dtype)
    return nnx.Param(value, axes=axes)


def _unchanged(site: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return y


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, dtype) -> None:
        self.epsilon = config.rms_norm_eps
        self.scale = _param((config.hidden_size,), ("embed",), rngs, dtype, None)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(variance + self.epsilon)).astype(x.dtype) * self.scale[...]


class Attention(nnx.Module):
    """Projections before and after attention; the caller computes attention itself.

    ``wqkv[K, G + 2, H, D]`` holds, for each KV head, its G query heads, then its key, then its value, so that a
    shard of the first axis is a whole group.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, dtype) -> None:
        kv, group, dim, model = config.num_kv_heads, config.group_size, config.head_dim, config.hidden_size
        self.wqkv = _param((kv, group + 2, dim, model), ("kv_heads", "group", "head_dim", "embed"), rngs, dtype,
                           model**-0.5)
        self.bqkv = _param((kv, group + 2, dim), ("kv_heads", "group", "head_dim"), rngs, dtype, 0)
        self.wo = _param((model, kv, group, dim), ("embed", "kv_heads", "group", "head_dim"), rngs, dtype,
                         (kv * group * dim) ** -0.5)

    def project(self, x: jax.Array, cos: jax.Array, sin: jax.Array, adapt=_unchanged, bare: bool = False
                ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project ``x[B, T, D]`` to rotated ``q[B, T, K, G, H]``, rotated ``k[B, T, K, H]``, and ``v[B, T, K, H]``.

        bare: leave out the biases of k and v.
        """
        kv, rows, dim, _ = self.wqkv.shape
        qkv = product("btd,nd->btn", x, matrix(self.wqkv.get_value(), 1)).reshape(*x.shape[:2], kv, rows, dim)
        bias = self.bqkv[...]
        qkv = adapt("qkv", x, qkv) + (bias.at[:, -2:].set(0) if bare else bias)
        rotated = apply_rope(qkv[..., :-1, :], cos[:, :, None, None], sin[:, :, None, None])
        return rotated[..., :-1, :], rotated[..., -1, :], qkv[..., -1, :]

    def output(self, attended: jax.Array, adapt=_unchanged) -> jax.Array:
        """Project the attended values ``[B, T, K, G, H]`` to ``[B, T, D]``."""
        flat = attended.reshape(*attended.shape[:2], -1)
        return adapt("o", flat, product("btn,dn->btd", flat, matrix(self.wo.get_value(), 3)))


class MLP(nnx.Module):
    """Feed-forward part of a layer: SwiGLU, with gate and up as one array ``gate_up[2, F, D]`` and one product.

    A matrix of 2F rows would be no faster, and a split of F over devices would not survive joining it with the 2.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, dtype) -> None:
        inner, model = config.intermediate_size, config.hidden_size
        self.gate_up = _param((2, inner, model), ("gate_up", "mlp", "embed"), rngs, dtype, model**-0.5)
        self.down = _param((model, inner), ("embed", "mlp"), rngs, dtype, inner**-0.5)

    def __call__(self, x: jax.Array, adapt=_unchanged) -> jax.Array:
        twice = jnp.broadcast_to(x, (2, *x.shape))
        gate, up = adapt("gate_up", x, product("gbtd,gfd->gbtf", twice, self.gate_up.get_value()))
        inner = jax.nn.silu(gate) * up
        return adapt("down", inner, product("btf,df->btd", inner, self.down.get_value()))


class Layer(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, dtype) -> None:
        self.attention_norm = RMSNorm(config, rngs, dtype)
        self.attention = Attention(config, rngs, dtype)
        self.mlp_norm = RMSNorm(config, rngs, dtype)
        self.mlp = MLP(config, rngs, dtype)

    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend, adapt=_unchanged,
                 bare: bool = False, partition: Partition = WHOLE) -> jax.Array:
        """Run the transformer block on hidden states ``x[B, T, D]``; the result has the same shape.

        ``attend(q, k, v)`` does attention and any caching, of keys and values without their biases if ``bare``;
        ``adapt(site, x, y)`` may change the output y of a product. In tensor parallelism, the layer is a device's part
        in ``partition``.
        """
        x = self.add_attention(x, cos, sin, attend=attend, adapt=adapt, bare=bare, partition=partition)
        return self.add_mlp(x, adapt, partition)

    def add_attention(self, x: jax.Array, cos: jax.Array, sin: jax.Array, *, attend, adapt, bare: bool,
                      partition: Partition) -> jax.Array:
        """Run the first half of the block: norm, attention, and the sum with the residual."""
        normed = partition.gathered(self.attention_norm(x))
        q, k, v = self.attention.project(normed, cos, sin, adapt, bare)
        return x + partition.summed(self.attention.output(attend(q, k, v), adapt))

    def add_mlp(self, x: jax.Array, adapt, partition: Partition) -> jax.Array:
        """Run the second half of the block: norm, MLP, and the sum with the residual."""
        return x + partition.summed(self.mlp(partition.gathered(self.mlp_norm(x)), adapt))


class Embedding(nnx.Module):
    """Embedding table ``[V, D]``, looked up for tokens at the input, or multiplied at the output to give logits."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None, dtype) -> None:
        self.weight = _param((config.vocab_size, config.hidden_size), ("vocab", "embed"), rngs, dtype,
                             config.hidden_size**-0.5)


class Qwen2(nnx.Module):
    """Qwen2.5 for causal language modelling.

    ``model(tokens[B, T])`` returns float32 logits ``[B, T, V]``. A tied head is the embedding itself: no second copy
    exists, and ``model.head`` is None. Weights are random, or zeros if ``rngs`` is None; ``build`` puts those of a
    checkpoint in their place.

    partition: the part of the network that this model is, in tensor parallelism. first, last: whether it looks tokens
    up, and whether it computes logits; a stage of a pipeline may do neither. layers: whether it has layers.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs | None, dtype=jnp.float32, partition: Partition = WHOLE,
                 first: bool = True, last: bool = True, layers: bool = True) -> None:
        self.config, self.partition = config, partition
        self.embed = nnx.data(Embedding(config, rngs, dtype) if first else None)
        self.layers = nnx.List([Layer(config, rngs, dtype) for _ in range(config.num_layers if layers else 0)])
        self.norm = nnx.data(RMSNorm(config, rngs, dtype) if last else None)
        own_head = last and not (config.tie_word_embeddings and first)
        self.head = nnx.data(Embedding(config, rngs, dtype) if own_head else None)

    def __call__(self, tokens: jax.Array, *, positions: jax.Array | None = None,
                 segment_ids: jax.Array | None = None) -> jax.Array:
        """Return float32 logits ``[B, T, V]`` for ``tokens[B, T]``.

        ``positions[B, T]`` default to 0..T-1. With ``segment_ids[B, T]``, a token sees only earlier tokens of its own
        segment: packed examples, or padding (give padding a segment of its own).
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = self.hidden(tokens, positions, lambda _, q, k, v: causal_attention(q, k, v, segment_ids=segment_ids))
        return self.logits(hidden)

    def hidden(self, tokens: jax.Array, positions: jax.Array, attend: Attend, adapt: Adapt | None = None,
               bare: Sequence[bool] = ()) -> jax.Array:
        """Run the layers and the final norm: return hidden states ``[B, T, D]``, from which logits are computed.

        A stage that is not the first takes hidden states ``[B, T, D]`` as ``tokens``; a stage that is not the last
        returns the output of its last layer.

        attend: does attention and any caching. Where the partition halves the tokens, it is called for each half, with
        the ``offset`` of the half's first token.
        adapt: changes the outputs of products, as adapters do.
        bare: for each layer, whether ``attend`` gets keys and values without their biases; by default with them.
        """
        partition = self.partition.for_step(positions)
        cos, sin = rope_tables(self.config.rope, self.config.head_dim, positions)
        slices = partition.token_slices(positions.shape[1])
        if self.embed is None:
            x = [partition.share(tokens[:, part]) for part in slices]
        else:
            x = [self.looked_up(tokens[:, part], partition, self.dtype) for part in slices]
        for index, layer in enumerate(self.layers):
            adapt_layer = partial(adapt, index) if adapt else _unchanged
            for i, part in enumerate(slices):
                attend_layer = partial(attend, index, offset=part.start) if partition.halved else partial(attend, index)
                x[i] = layer.add_attention(x[i], cos[:, part], sin[:, part], attend=attend_layer, adapt=adapt_layer,
                                           bare=bool(bare) and bare[index], partition=partition)
            x = [layer.add_mlp(hidden, adapt_layer, partition) for hidden in x]
        x = [partition.gathered(hidden if self.norm is None else self.norm(hidden)) for hidden in x]
        return jnp.concatenate(x, axis=1) if partition.halved else x[0]

    def looked_up(self, tokens: jax.Array, partition: Partition, dtype) -> jax.Array:
        """Return the embeddings ``[B, T, D]`` of ``tokens[B, T]``: those that this device has in ``partition``."""
        return partition.lookup(self.embed.weight.get_value(), tokens, dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the model's computation; 8-bit weights are stored in another."""
        return self.layers[0].attention_norm.scale.dtype

    @property
    def head_weight(self) -> jax.Array | QuantizedTensor:
        """Weight ``[V, D]`` of the output head, which is the embedding table when they are tied."""
        return (self.embed if self.head is None else self.head).weight.get_value()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return float32 logits ``[..., V]`` of final hidden states ``hidden[..., D]``, the same on every device."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        # XLA:CPU widens the whole matrix for a product of a single row of 16 bits.
        weight = self.head_weight
        least = 1 if weight.dtype == INT8 else 2
        padded = jnp.pad(flat, ((0, max(0, least - len(flat))), (0, 0)))
        logits = product("nd,vd->nv", padded, weight, jnp.float32)[: len(flat)]
        logits = self.partition.gathered_logits(logits, self.config.vocab_size)
        return logits.reshape(*hidden.shape[:-1], -1)
