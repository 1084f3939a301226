"""Precision of a model: which of its parts are 8-bit, and the scales of 8-bit pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from qwen_kernels.attention import PageFormat
from qwen_kernels.attention.eight_bit import LARGEST

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.quantization.quantized_tensor import E4M3, INT4, INT8, QuantizedTensor, quantize

KV_DTYPES = tuple(LARGEST)
MARGIN = 1.5  # times the largest value that calibration saw: the range; rows far outside are computed again in 16 bits
# Number of last axes of each matrix that a product contracts.
INPUTS = {"attention.wqkv": 1, "attention.wo": 3, "mlp.gate_up": 1, "mlp.down": 1}
_TABLES = {"embed.weight": 1, "head.weight": 1}


@dataclass(frozen=True)
class Precision:
    """Choice of the parts of a model that are 8-bit: layers' matrices, embedding and head, and cache pages.

    Attributes:
      weights: for each layer, whether its matrices are 8-bit.
      tables: whether the embedding and the head are 8-bit.
      kv_cache: for each layer, the element type of its pages: "int8", "e4m3", or None for the model's own type.
      format: element type of quantised weights, "e4m3", "int8" or "int4"; with "int4", tables are int8.
    """

    weights: tuple[bool, ...]
    tables: bool = False
    kv_cache: tuple[str | None, ...] = ()
    format: str = "e4m3"

    @property
    def eight_bit(self) -> bool:
        """True if a number that is computed is rounded to 8 bits: keys and values, or operands of products."""
        return any(self.kv_cache) or self.format == "e4m3" and (any(self.weights) or self.tables)

    def weight_dtype(self, path: str) -> jnp.dtype:
        """Return the element type of the parameter at ``path`` if it is quantised."""
        return {"e4m3": E4M3, "int8": INT8, "int4": INT8 if path in _TABLES else INT4}[self.format]

    def inputs(self, path: str) -> int | None:
        """Return the number of contracted axes of the parameter at ``path`` if it is 8-bit, else None."""
        if path in _TABLES:
            return _TABLES[path] if self.tables else None
        kind, _, rest = path.partition(".")
        index, _, name = rest.partition(".")
        return INPUTS.get(name) if kind == "layers" and self.weights[int(index)] else None

    def store(self, path: str, value: Any) -> Any:
        """Return a parameter as this precision stores it: unchanged, or quantised to a `QuantizedTensor`.

        value: the parameter, or its shape.
        """
        inputs = self.inputs(path)
        if inputs is None or isinstance(value, QuantizedTensor):
            return value
        return _lazily(_quantize, value, inputs=inputs, dtype=self.weight_dtype(path))


def default_precision(config: ModelConfig, weights: bool, kv_cache: str | None, tables: bool = False) -> Precision:
    """Return a precision with 8-bit matrices in all layers but the first and the last, and 8-bit pages in all layers.

    weights, tables: whether the matrices, and with them the tables, are 8-bit. kv_cache: element type of the pages, or
    None. Raises UserError for an element type that pages cannot have.
    """
    if kv_cache not in (None, *KV_DTYPES):
        raise UserError(f"kv_cache_dtype must be 'auto', None or one of {', '.join(KV_DTYPES)}, not {kv_cache!r}")
    last = config.num_layers - 1
    return Precision(tuple(weights and 0 < layer < last for layer in range(config.num_layers)), tables and weights,
                     (kv_cache,) * config.num_layers)


class Ranges(NamedTuple):
    """Largest absolute values that calibration saw of a layer's keys and values, without biases and YaRN's factor.

    Attributes:
      keys: f32 ``[K, H]``, lengths in each RoPE plane, which rotation does not change: equal for its two channels.
      values: f32 ``[K, H]``.
    """

    keys: jax.Array
    values: jax.Array


class Calibrated(NamedTuple):
    """Result of a calibration: the parts of a model to store in 8 bits, and the ranges of its keys and values.

    Attributes:
      precision: the parts that lose little accuracy in 8 bits.
      ranges: ranges of each layer's keys and values.
    """

    precision: Precision
    ranges: tuple[Ranges, ...]


Scales = tuple[tuple[jax.Array, jax.Array] | None, ...]  # of each layer's keys and values, f32 [K, H]; None: 16-bit


def scales_of(params: Mapping[str, Any], precision: Precision, ranges: tuple[Ranges, ...] | None = None) -> Scales:
    """Return the scales with which 8-bit pages store each layer's keys and values; None for 16-bit pages.

    Scales of e4m3 are so large that no token's key or value exceeds them: a normalised vector has length ``sqrt(D)``,
    so a projection's row w gives at most ``sqrt(D) |w|`` (Cauchy-Schwarz). That is tens of times more than it usually
    gives, for which a floating-point type has the range. Integers do not: their scales leave room for `MARGIN` times
    the calibrated ranges. Raises UserError for int8 pages without ranges.
    """
    scales = []
    for layer, kind in enumerate(precision.kv_cache):
        if kind == "int8":
            if ranges is None:
                raise UserError("an int8 KV cache needs ranges that were measured: run `qwen-jax calibrate MODEL "
                                "--fp8`, or use kv_cache_dtype='e4m3'")
            scales.append(tuple(_scale_for(jnp.asarray(x, jnp.float32) * MARGIN, kind) for x in ranges[layer]))
            continue
        prefix = f"layers.{layer}."
        scales.append(_lazily(_bounds, params[prefix + "attention.wqkv"], params[prefix + "attention_norm.scale"])
                      if kind else None)
    return tuple(scales)


def page_formats(bqkv: jax.Array, scales: tuple[jax.Array, jax.Array], frequencies: jax.Array, magnitude: float
                 ) -> tuple[PageFormat, PageFormat]:
    """Return the formats (scale and bias of 8-bit elements) of a layer's pages of keys and of values.

    bqkv: ``[K, G + 2, H]``, the projection's biases. scales: of keys and of values, f32 ``[K, H]``. frequencies,
    magnitude: as in `PageFormat`.
    """
    bias = bqkv.astype(jnp.float32)
    return (PageFormat(scales[0] * magnitude, bias[:, -2], jnp.asarray(frequencies, jnp.float32), magnitude),
            PageFormat(scales[1], bias[:, -1]))


@partial(jax.jit, static_argnames=("inputs", "dtype"))
def _quantize(value: jax.Array, inputs: int, dtype: jnp.dtype) -> QuantizedTensor:
    return quantize(value, inputs, dtype)


@jax.jit
def _bounds(wqkv: jax.Array | QuantizedTensor, norm: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return e4m3 scales for a layer's keys and values, so large that none is out of range (see `scales_of`)."""
    wkv = jax.tree.map(lambda x: x[:, -2:], wqkv)  # [K, 2, H, D]
    wkv = wkv.dequantize(jnp.float32) if isinstance(wkv, QuantizedTensor) else wkv.astype(jnp.float32)
    bound = jnp.linalg.norm(wkv * norm.astype(jnp.float32), axis=-1) * wkv.shape[-1] ** 0.5
    keys, values = bound[:, 0], bound[:, 1]
    planes = jnp.tile(jnp.hypot(*jnp.split(keys, 2, axis=-1)), 2)  # RoPE moves length between a plane's channels
    return tuple(_scale_for(x, "e4m3") for x in (planes, values))


def _scale_for(largest: jax.Array, kind: str) -> jax.Array:
    """Return the scale that maps ``largest`` to the largest number of element type ``kind``; positive for zero."""
    return jnp.where(largest > 0, largest, 1) / LARGEST[kind]


def _lazily(function, *arguments, **static):
    """Call a jitted function with these arguments, or return its result's shape if any argument is a shape."""
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(arguments))
    return jax.eval_shape(partial(function, **static), *arguments) if shapes else function(*arguments, **static)
