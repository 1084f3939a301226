"""Which parts of a model are 8-bit, and with what scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from qwen_kernels.attention import EightBit
from qwen_kernels.attention.eight_bit import MOST

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.quantization.fp8 import FP8Tensor, quantize

KV_DTYPES = tuple(MOST)
MARGIN = 1.5  # times the largest value that was seen: what exceeds it is computed in 16 bits, late
# How many of a matrix's last axes a product contracts.
INPUTS = {"attention.wqkv": 1, "attention.wo": 3, "mlp.gate_up": 1, "mlp.down": 1}
_TABLES = {"embed.weight": 1, "head.weight": 1}


@dataclass(frozen=True)
class Precision:
    """What is 8-bit.

    Attributes:
      weights: for each layer, whether its matrices are e4m3.
      tables: whether the embedding and the head are.
      kv_cache: for each layer, how pages hold its keys and values: "int8", "e4m3", or None for the model's own type.
    """

    weights: tuple[bool, ...]
    tables: bool = False
    kv_cache: tuple[str | None, ...] = ()

    @property
    def eight_bit(self) -> bool:
        """Whether anything is."""
        return any(self.weights) or self.tables or any(self.kv_cache)

    def inputs(self, path: str) -> int | None:
        """How many axes of an 8-bit parameter a product contracts; None for a parameter that stays as it is."""
        if path in _TABLES:
            return _TABLES[path] if self.tables else None
        kind, _, rest = path.partition(".")
        index, _, name = rest.partition(".")
        return INPUTS.get(name) if kind == "layers" and self.weights[int(index)] else None

    def store(self, path: str, value: Any) -> Any:
        """A parameter as this precision holds it: an array or its shape, or an `FP8Tensor`."""
        inputs = self.inputs(path)
        if inputs is None or isinstance(value, FP8Tensor):
            return value
        return _lazily(_quantize, value, inputs=inputs)


def default_precision(config: ModelConfig, weights: bool, kv_cache: str | None, tables: bool = False) -> Precision:
    """8-bit matrices in all layers but the first and the last, and 8-bit pages in all.

    UserError for an element type that pages cannot have.
    """
    if kv_cache not in (None, *KV_DTYPES):
        raise UserError(f"kv_cache_dtype is 'auto', None or one of {', '.join(KV_DTYPES)}, not {kv_cache!r}")
    last = config.num_layers - 1
    return Precision(tuple(weights and 0 < layer < last for layer in range(config.num_layers)), tables and weights,
                     (kv_cache,) * config.num_layers)


class Ranges(NamedTuple):
    """The largest absolute values of one layer's keys and values that were seen, f32 ``[K, H]`` each.

    Without biases and YaRN's factor. Of a key, those of planes, which a rotation leaves as they are: equal for both
    channels of one.
    """

    keys: jax.Array
    values: jax.Array


class Calibrated(NamedTuple):
    """What was found to lose little, and each layer's ranges."""

    precision: Precision
    ranges: tuple[Ranges, ...]


Scales = tuple[tuple[jax.Array, jax.Array] | None, ...]  # of each layer's keys and values, f32 [K, H]; None: 16-bit


def scales_of(params: Mapping[str, Any], precision: Precision, ranges: tuple[Ranges, ...] | None = None) -> Scales:
    """Scales of 8-bit pages.

    Those of e4m3 are so large that no token's key or value exceeds them: a normalised vector has length ``sqrt(D)``, so
    a projection's row w gives at most ``sqrt(D) |w|`` (Cauchy-Schwarz). That is tens of times more than it usually
    gives, for which a floating-point type has the range. Integers do not: theirs leave room for `MARGIN` times what was
    seen. UserError for int8 pages without ranges.
    """
    found = []
    for layer, kind in enumerate(precision.kv_cache):
        if kind == "int8":
            if ranges is None:
                raise UserError("an int8 KV cache needs ranges that were measured: run `qwen-jax calibrate MODEL "
                                "--fp8`, or use kv_cache_dtype='e4m3'")
            found.append(tuple(_scale_for(jnp.asarray(x, jnp.float32) * MARGIN, kind) for x in ranges[layer]))
            continue
        here = f"layers.{layer}."
        found.append(_lazily(_bounds, params[here + "attention.wqkv"], params[here + "attention_norm.scale"])
                     if kind else None)
    return tuple(found)


def forms(bqkv: jax.Array, scales: tuple[jax.Array, jax.Array], frequencies: jax.Array, magnitude: float
          ) -> tuple[EightBit, EightBit]:
    """How a layer's pages hold keys and values. bqkv: ``[K, G + 2, H]``; the others as in `EightBit`."""
    bias = bqkv.astype(jnp.float32)
    return (EightBit(scales[0] * magnitude, bias[:, -2], jnp.asarray(frequencies, jnp.float32), magnitude),
            EightBit(scales[1], bias[:, -1]))


@partial(jax.jit, static_argnames="inputs")
def _quantize(value: jax.Array, inputs: int) -> FP8Tensor:
    return quantize(value, inputs)


@jax.jit
def _bounds(wqkv: jax.Array | FP8Tensor, norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    two = jax.tree.map(lambda x: x[:, -2:], wqkv)  # [K, 2, H, D]
    two = two.dequantize(jnp.float32) if isinstance(two, FP8Tensor) else two.astype(jnp.float32)
    bound = jnp.linalg.norm(two * norm.astype(jnp.float32), axis=-1) * two.shape[-1] ** 0.5
    keys, values = bound[:, 0], bound[:, 1]
    planes = jnp.tile(jnp.hypot(*jnp.split(keys, 2, axis=-1)), 2)  # RoPE moves length between a plane's channels
    return tuple(_scale_for(x, "e4m3") for x in (planes, values))


def _scale_for(largest: jax.Array, kind: str) -> jax.Array:
    """The scale with which ``largest`` is the largest that ``kind`` stores; positive where nothing is."""
    return jnp.where(largest > 0, largest, 1) / MOST[kind]


def _lazily(function, *arguments, **static):
    """A jitted function of arrays, or of the shapes of some."""
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arguments))
    return jax.eval_shape(partial(function, **static), *arguments) if shapes else function(*arguments, **static)
