"""The model as data: names, shapes, dtypes and logical axes, from which everything else derives."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.model.partition import WHOLE, Partition
from qwen_jax.model.qwen2 import Layer, Qwen2


class ParamSpec(NamedTuple):
    """One parameter: its shape, dtype, and the logical name of each axis."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]


def _create(config: ModelConfig, dtype, seed: int = 0, **part) -> Qwen2:
    return Qwen2(config, rngs=nnx.Rngs(seed), dtype=dtype, **part)


def _create_layer(config: ModelConfig) -> Layer:
    return Layer(config, nnx.Rngs(0), jnp.float32)


def _abstract_split(config: ModelConfig, dtype, **part):
    return nnx.split(nnx.eval_shape(partial(_create, config, dtype, **part)), nnx.Param, ...)


def _dotted(path) -> str:
    return ".".join(str(part) for part in path)


def abstract(config: ModelConfig, dtype="bfloat16") -> dict[str, ParamSpec]:
    """Every parameter of the model by dotted path, e.g. ``layers.0.attention.wqkv``. Allocates nothing."""
    _, params, _ = _abstract_split(config, jnp.dtype(dtype))
    return {_dotted(path): ParamSpec(tuple(leaf.shape), jnp.dtype(leaf.dtype), leaf.get_metadata()["axes"])
            for path, leaf in nnx.to_flat_state(params)}


def build(config: ModelConfig, params: Mapping[str, jax.Array], partition: Partition = WHOLE, first: bool = True,
          last: bool = True) -> Qwen2:
    """The module around ``params`` (canonical path to array), without a copy. KeyError for missing or extra paths.

    For a part of a network ``config`` is the part's own; the others are as in `Qwen2`, and a stage's layers count from
    0.
    """
    return _fill(*_abstract_split(config, jnp.float32, partition=partition, first=first, last=last), params)


def _fill(graph, state, rest, params: Mapping[str, jax.Array]):
    flat = nnx.to_flat_state(state)
    expected = {_dotted(path) for path, _ in flat}
    if expected != set(params):
        raise KeyError(f"parameters differ from the model's: {sorted(expected ^ set(params))[:8]}")
    leaves = [(path, leaf.replace(params[_dotted(path)])) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(leaves), rest)


def build_layer(config: ModelConfig, params: Mapping[str, jax.Array]) -> Layer:
    """One layer around its parameters, named as within a layer (``attention.wqkv``). KeyError when names differ."""
    graph, state, rest = nnx.split(nnx.eval_shape(partial(_create_layer, config)), nnx.Param, ...)
    return _fill(graph, state, rest, params)


def params_of(model: Qwen2) -> dict[str, jax.Array]:
    """The model's arrays by canonical path; the inverse of ``build``."""
    return {_dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def empty(config: ModelConfig, dtype="bfloat16") -> Qwen2:
    """A model with shapes where others have arrays."""
    return nnx.eval_shape(partial(_create, config, jnp.dtype(dtype)))


def init(config: ModelConfig, seed: int = 0, dtype="float32") -> Qwen2:
    """A model with random weights (normal, 1/sqrt(fan-in); biases zero), made in one compiled call."""
    graph, params, rest = _abstract_split(config, jnp.dtype(dtype))

    @jax.jit
    def create():
        return nnx.state(_create(config, jnp.dtype(dtype), seed), nnx.Param)

    return nnx.merge(graph, create(), rest)
