"""Description of the model's parameters as data (names, shapes, dtypes, logical axes), and models built from arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.model.qwen2 import Layer, Qwen2


class ParamSpec(NamedTuple):
    """Shape and dtype of a parameter, and the logical name of each of its axes."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]


def _create(config: ModelConfig, dtype, seed: int | None = None, **part) -> Qwen2:
    return Qwen2(config, rngs=None if seed is None else nnx.Rngs(seed), dtype=dtype, **part)


def _create_layer(config: ModelConfig) -> Layer:
    return Layer(config, None, jnp.float32)


def _split(create: Callable):
    """Return graph, parameter shapes and other state of the module that ``create`` makes, without allocating it."""
    return nnx.split(nnx.eval_shape(create), nnx.Param, ...)


def _dotted(path) -> str:
    return ".".join(str(part) for part in path)


def abstract(config: ModelConfig, dtype="bfloat16") -> dict[str, ParamSpec]:
    """Describe all parameters of the model by dotted path, e.g. ``layers.0.attention.wqkv``. Allocates nothing."""
    _, params, _ = _split(partial(_create, config, jnp.dtype(dtype)))
    return {_dotted(path): ParamSpec(tuple(leaf.shape), jnp.dtype(leaf.dtype), leaf.get_metadata()["axes"])
            for path, leaf in nnx.to_flat_state(params)}


def build(config: ModelConfig, params: Mapping[str, jax.Array], **part: Any) -> Qwen2:
    """Make a `Qwen2` whose parameters are ``params`` (canonical path to array), without copying them.

    For a part of a network, ``config`` is that of the part, whose layers count from 0, and the keyword arguments are
    those of `Qwen2`: partition, first, last, layers. Raises KeyError for missing or extra paths.
    """
    return _fill(partial(_create, config, jnp.float32, **part), params)


def _fill(create: Callable, params: Mapping[str, jax.Array]):
    """Make the module that ``create`` would make, with ``params`` as its parameters."""
    graph, state, rest = _split(create)
    flat = nnx.to_flat_state(state)
    expected = {_dotted(path) for path, _ in flat}
    if expected != set(params):
        raise KeyError(f"params must have the model's paths; missing or extra: {sorted(expected ^ set(params))[:8]}")
    leaves = [(path, leaf.replace(params[_dotted(path)])) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(leaves), rest)


def build_layer(config: ModelConfig, params: Mapping[str, jax.Array]) -> Layer:
    """Make a transformer layer of ``params``, named as within it (``attention.wqkv``). KeyError if names differ."""
    return _fill(partial(_create_layer, config), params)


def params_of(model: Qwen2) -> dict[str, jax.Array]:
    """Return the model's parameters by canonical path (``layers.0.attention.wqkv``); the inverse of ``build``."""
    return {_dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def empty(config: ModelConfig, dtype="bfloat16") -> Qwen2:
    """Make a model whose parameters are shapes and dtypes instead of arrays."""
    return nnx.eval_shape(partial(_create, config, jnp.dtype(dtype)))


def init(config: ModelConfig, seed: int = 0, dtype="float32") -> Qwen2:
    """Make a model with random weights (normal, 1/sqrt(fan-in); biases zero) in one compiled call."""
    graph, _, rest = _split(partial(_create, config, jnp.dtype(dtype)))

    @jax.jit
    def create():
        return nnx.state(_create(config, jnp.dtype(dtype), seed), nnx.Param)

    return nnx.merge(graph, create(), rest)
