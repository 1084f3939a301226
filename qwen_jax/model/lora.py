"""Low-rank adapters (https://arxiv.org/abs/2106.09685): ``y + scale · B (A x)`` beside the matrices of a layer.

Targets carry Hugging Face's names. A site is a product of a layer, which may serve several targets (q, k and v share a
product): the adapters of a site read the same input and add to their own part of its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError, check_positive_integer

SITES = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",), "gate_up": ("gate_proj", "up_proj"),
         "down": ("down_proj",)}
TARGETS = tuple(target for targets in SITES.values() for target in targets)
Axis = tuple[str, int]  # name and size


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter.

    Attributes:
      rank: the inner dimension of each target's two matrices.
      alpha: numerator of the scale ``alpha / rank``, as in PEFT.
      targets: the matrices that are adapted, of `TARGETS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown:
            raise UserError(f"an adapter's targets must be of {', '.join(TARGETS)}, not {', '.join(map(str, unknown))}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(f"an adapter's targets must be one or more different matrices, not {list(self.targets)}")
        check_positive_integer("the rank of an adapter", self.rank)
        if not np.isfinite(self.alpha) or self.alpha <= 0:
            raise UserError(f"the alpha of an adapter must be a positive number, not {self.alpha!r}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def target_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return the number of inputs and of outputs of each matrix that an adapter can target, by its name."""
    return {target: tuple(prod(size for _, size in axes) for axes in split_axes(config, target)) for target in TARGETS}


def split_axes(config: ModelConfig, target: str) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Return the logical axes (see `model.abstract`) that a target's inputs and its outputs are flattened from."""
    model, inner = (("embed", config.hidden_size),), (("mlp", config.intermediate_size),)
    keys = (("kv_heads", config.num_kv_heads), ("head_dim", config.head_dim))
    queries = (keys[0], ("group", config.group_size), keys[1])
    return {"q_proj": (model, queries), "k_proj": (model, keys), "v_proj": (model, keys), "o_proj": (queries, model),
            "gate_proj": (model, inner), "up_proj": (model, inner), "down_proj": (inner, model)}[target]


def num_parameters(config: ModelConfig, lora: LoraConfig) -> int:
    """Return the number of trainable parameters of an adapter."""
    sizes = target_sizes(config)
    return config.num_layers * lora.rank * sum(sum(sizes[target]) for target in lora.targets)


def init_adapter(config: ModelConfig, lora: LoraConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Make a new adapter, float32: ``{target}.a`` ``[L, r, I]`` is random, ``{target}.b`` ``[L, O, r]`` zero.

    It changes nothing until trained. The random numbers are drawn as in PEFT: Kaiming-uniform with a = √5, which is
    uniform within ± 1 / √I.
    """
    sizes, keys = target_sizes(config), jax.random.split(jax.random.key(seed), len(TARGETS))
    adapter = {}
    for target, key in zip(TARGETS, keys, strict=True):
        if target in lora.targets:
            inputs, outputs = sizes[target]
            shape, bound = (config.num_layers, lora.rank, inputs), inputs**-0.5
            adapter[f"{target}.a"] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
            adapter[f"{target}.b"] = jnp.zeros((config.num_layers, outputs, lora.rank), jnp.float32)
    return adapter


def adapt_site(config: ModelConfig, adapter: Mapping[str, jax.Array], scale, site: str, x: jax.Array,
               y: jax.Array) -> jax.Array:
    """Add the adapters of a layer's site to its output ``y`` (shapes: ``qwen2.Adapt``), computed from ``x[B, T, I]``.

    ``adapter`` holds the layer's ``{target}.a`` ``[r, I]`` and ``{target}.b`` ``[O, r]``, or, for rows with adapters of
    their own, ``[B, r, I]`` and ``[B, O, r]`` with ``scale[B]``. The products accumulate in float32.
    """
    targets = SITES[site]
    if not any(f"{target}.a" in adapter for target in targets):
        return y
    sizes = target_sizes(config)
    scale = jnp.reshape(scale, (-1, 1, 1))
    parts = [scale * _delta(adapter, target, x, sizes[target][1]) for target in targets]
    if site == "qkv":  # each KV head has its queries, then its key, then its value
        parts = [part.reshape(*part.shape[:2], config.num_kv_heads, -1, config.head_dim) for part in parts]
        delta = jnp.concatenate(parts, axis=3)
    else:
        delta = jnp.stack(parts) if len(parts) > 1 else parts[0]
    return (y + delta).astype(y.dtype)


def _delta(adapter: Mapping[str, jax.Array], target: str, x: jax.Array, outputs: int) -> jax.Array:
    """Return a target's low-rank update ``B (A x)``, float32 ``[B, T, O]``; zeros for a target without an adapter."""
    if f"{target}.a" not in adapter:
        return jnp.zeros((*x.shape[:2], outputs), jnp.float32)
    a, b = adapter[f"{target}.a"].astype(x.dtype), adapter[f"{target}.b"].astype(x.dtype)
    row = "b" if a.ndim == 3 else ""
    inner = jnp.einsum(f"bti,{row}ri->btr", x, a, preferred_element_type=jnp.float32).astype(x.dtype)
    return jnp.einsum(f"btr,{row}or->bto", inner, b, preferred_element_type=jnp.float32)


def merge_adapter(config: ModelConfig, params: Mapping[str, jax.Array], adapter: Mapping[str, jax.Array],
                  lora: LoraConfig) -> dict[str, jax.Array]:
    """Return the model's parameters by canonical path with the adapter's ``scale · B A`` added, rounded once."""
    merged, group = dict(params), config.group_size
    kv, dim, model = config.num_kv_heads, config.head_dim, config.hidden_size
    parts = {  # target: (parameter, index of the target's part, shape of that part)
        "q_proj": ("attention.wqkv", (slice(None), slice(0, group)), (kv, group, dim, model)),
        "k_proj": ("attention.wqkv", (slice(None), group), (kv, dim, model)),
        "v_proj": ("attention.wqkv", (slice(None), group + 1), (kv, dim, model)),
        "o_proj": ("attention.wo", (), (model, kv, group, dim)),
        "gate_proj": ("mlp.gate_up", (0,), (config.intermediate_size, model)),
        "up_proj": ("mlp.gate_up", (1,), (config.intermediate_size, model)),
        "down_proj": ("mlp.down", (), (model, config.intermediate_size)),
    }
    for target in lora.targets:
        name, index, shape = parts[target]
        update = lora.scale * jnp.einsum("lor,lri->loi", adapter[f"{target}.b"].astype(jnp.float32),
                                         adapter[f"{target}.a"].astype(jnp.float32), precision="highest")
        for layer in range(config.num_layers):
            path = f"layers.{layer}.{name}"
            wide = jnp.asarray(merged[path], jnp.float32)
            merged[path] = wide.at[index].add(update[layer].reshape(shape))
    return {path: value.astype(params[path].dtype) for path, value in merged.items()}
