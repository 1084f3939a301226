"""The model as training runs it: the parameters of all layers stacked, one traced layer scanned over them.

Scanning compiles one layer instead of all, and is what lets `recompute` save memory (on XLA:CPU `jax.checkpoint` saves
nothing in unrolled layers). The mathematics is the model's own: each step of the scan is its `Layer`.
"""
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.model import Qwen2, abstract, build, build_layer
from qwen_jax.model.lora import adapt_site
from qwen_jax.model.rope import rope_tables
from qwen_jax.parallel.mesh import spec_of

LAYERS = "layers."


def stack(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Canonical parameters with ``layers.{i}.{name}`` joined to ``layers.{name}`` ``[L, ...]``."""
    names = {path.split(".", 2)[2] for path in params if path.startswith(LAYERS)}
    count = sum(path.endswith("attention.wo") for path in params)
    stacked = {path: value for path, value in params.items() if not path.startswith(LAYERS)}
    return stacked | {LAYERS + name: jnp.stack([params[f"{LAYERS}{i}.{name}"] for i in range(count)])
                      for name in sorted(names)}


def unstack(stacked: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The inverse of `stack`."""
    params = {path: value for path, value in stacked.items() if not path.startswith(LAYERS)}
    for path, value in stacked.items():
        if path.startswith(LAYERS):
            params |= {f"{LAYERS}{i}.{path.removeprefix(LAYERS)}": value[i] for i in range(len(value))}
    return params


def stacked_specs(config: ModelConfig, mesh: Mesh) -> dict[str, PartitionSpec]:
    """How stacked parameters are split over a mesh."""
    specs = {}
    for path, param in abstract(config).items():
        if path.startswith(f"{LAYERS}0."):
            specs[LAYERS + path.split(".", 2)[2]] = PartitionSpec(None, *spec_of(param.axes, param.shape, mesh))
        elif not path.startswith(LAYERS):
            specs[path] = spec_of(param.axes, param.shape, mesh)
    return specs


def hidden(config: ModelConfig, stacked: Mapping[str, jax.Array], tokens: jax.Array, positions: jax.Array, attend, *,
           adapter: Mapping[str, jax.Array] | None = None, scale: float = 1.0, recompute: bool = False,
           compute_dtype="float32") -> tuple[jax.Array, Qwen2]:
    """Final normalised hidden states ``[B, T, D]`` of ``tokens[B, T]`` as ``Qwen2.hidden`` computes them; the model.

    attend: ``(q, k, v) -> [B, T, K, G, H]``, the same in every layer. adapter: a LoRA adapter (``{target}.a``
    ``[L, r, I]``, ``{target}.b`` ``[L, O, r]``) and its scale. recompute: keep only each layer's input for the backward
    pass and compute the layer again there. compute_dtype: what parameters are cast to, each layer's where it is used.
    """
    def cast(params):
        return {name: value.astype(compute_dtype) for name, value in params.items()}

    model = build(config, cast(unstack(stacked)))  # for its two ends: unused layers cost nothing once compiled
    cos, sin = rope_tables(config.rope, config.head_dim, positions)

    def body(x, item):
        params, factors = map(cast, item)
        layer = build_layer(config, params)
        return layer(x, cos, sin, attend, lambda site, x, y: adapt_site(config, factors, scale, site, x, y)), None

    layers = {path.removeprefix(LAYERS): value for path, value in stacked.items() if path.startswith(LAYERS)}
    if recompute:
        body = jax.checkpoint(body, prevent_cse=False)  # inside a scan nothing can be shared with the forward pass
    x = jnp.take(model.embed.weight[...], tokens, axis=0)
    x, _ = jax.lax.scan(body, x, (layers, dict(adapter or {})))
    return model.norm(x), model
