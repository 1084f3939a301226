"""The model for training: the parameters of all layers stacked, and one traced layer scanned over them.

Scanning compiles one layer instead of all, and lets `recompute` save memory (on XLA:CPU `jax.checkpoint` saves nothing
in unrolled layers). The mathematics is the model's own: each step of the scan is its `Layer`.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.model import Qwen2, abstract, build, build_layer
from qwen_jax.model.lora import adapt_site
from qwen_jax.model.rope import rope_tables
from qwen_jax.parallel.mesh import spec_of
from qwen_jax.quantization import INPUTS, QuantizedTensor, TrainedInFP8

LAYERS = "layers."


# A parameter of all layers is an array [L, ...]. Where only some layers are 8-bit it is a tuple with a stack for
# each run of layers of one kind.
Stacked = Mapping[str, jax.Array | tuple[jax.Array | QuantizedTensor, ...]]


def stack(params: dict[str, jax.Array | QuantizedTensor], consume: bool = False
          ) -> dict[str, jax.Array | tuple[jax.Array | QuantizedTensor, ...]]:
    """Stack canonical parameters: ``layers.{i}.{name}`` of all layers become ``layers.{name}``.

    consume: take each layer's parameters out of ``params`` once they are stacked, so that their memory is free.
    """
    names = {path.split(".", 2)[2] for path in params if path.startswith(LAYERS)}
    count = sum(path.endswith("attention.wo") for path in params)
    stacked = {path: value for path, value in params.items() if not path.startswith(LAYERS)}
    for name in sorted(names):
        runs = tuple(jax.tree.map(lambda *layers: jnp.stack(layers), *run) for _, run in groupby(
            (params[f"{LAYERS}{i}.{name}"] for i in range(count)), lambda value: isinstance(value, QuantizedTensor)))
        stacked[LAYERS + name] = runs if len(runs) > 1 else runs[0]
        if consume:
            jax.block_until_ready(runs)  # else the next name is stacked while these are still needed
            for i in range(count):
                del params[f"{LAYERS}{i}.{name}"]
    return stacked


def unstack(stacked: Stacked) -> dict[str, jax.Array | QuantizedTensor]:
    """Split stacked parameters into the canonical parameters of every layer: the inverse of `stack`."""
    params = {path: value for path, value in stacked.items() if not path.startswith(LAYERS)}
    for path, value in stacked.items():
        if path.startswith(LAYERS):
            runs = value if isinstance(value, tuple) else (value,)
            layers = (jax.tree.map(lambda x: x[i], run) for run in runs for i in range(run.shape[0]))  # noqa: B023
            params |= {f"{LAYERS}{i}.{path.removeprefix(LAYERS)}": layer for i, layer in enumerate(layers)}
    return params


def stacked_specs(config: ModelConfig, mesh: Mesh) -> dict[str, PartitionSpec]:
    """Return for each stacked parameter how it is split over a mesh."""
    specs = {}
    for path, param in abstract(config).items():
        if path.startswith(f"{LAYERS}0."):
            specs[LAYERS + path.split(".", 2)[2]] = PartitionSpec(None, *spec_of(param.axes, param.shape, mesh))
        elif not path.startswith(LAYERS):
            specs[path] = spec_of(param.axes, param.shape, mesh)
    return specs


def hidden(config: ModelConfig, stacked: Stacked, tokens: jax.Array, positions: jax.Array, attend, *,
           adapter: Mapping[str, jax.Array] | None = None, scale: float = 1.0, recompute: bool = False,
           compute_dtype="float32", fp8: Sequence[bool] = ()) -> tuple[jax.Array, Qwen2]:
    """Compute the final normalised hidden states ``[B, T, D]`` of ``tokens[B, T]``; return them and the model.

    The result is that of ``Qwen2.hidden``. attend: ``(q, k, v) -> [B, T, K, G, H]``, the same in every layer. adapter:
    a LoRA adapter (``{target}.a`` ``[L, r, I]``, ``{target}.b`` ``[L, O, r]``), multiplied by `scale`. recompute: keep
    only each layer's input for the backward pass and compute the layer again there. compute_dtype: dtype to which
    parameters are cast, layer by layer. fp8: for each layer, whether its matrices multiply in 8 bits, forward and
    backward; by default none does.
    """
    def cast(params):
        return {name: value if isinstance(value, QuantizedTensor) else value.astype(compute_dtype)
                for name, value in params.items()}

    model = build(config, cast(unstack(stacked)))  # used for embedding, norm and head: unused layers are not compiled
    cos, sin = rope_tables(config.rope, config.head_dim, positions)

    def layer_in(fp8: bool):
        def run(x, item):
            params, factors = map(cast, item)
            if fp8:
                params = {name: value if isinstance(value, QuantizedTensor) or name not in INPUTS
                          else TrainedInFP8(value) for name, value in params.items()}
            layer = build_layer(config, params)

            def adapt(site, x, y):
                return adapt_site(config, factors, scale, site=site, x=x, y=y)

            return layer(x, cos, sin, attend, adapt), None

        # prevent_cse is not needed in a scan: its forward and backward loops share no computation.
        return jax.checkpoint(run, prevent_cse=False) if recompute else run

    layers = {path.removeprefix(LAYERS): value for path, value in stacked.items() if path.startswith(LAYERS)}
    x = jnp.take(model.embed.weight[...], tokens, axis=0)
    for in_fp8, part in _runs(fp8 or (False,) * config.num_layers):
        x, _ = jax.lax.scan(layer_in(in_fp8), x, (part(layers), part(dict(adapter or {}))))
    return model.norm(x), model


def _runs(flags: Sequence[bool]) -> Iterator[tuple[bool, Callable]]:
    """Yield for each run of consecutive layers with equal flags the flag and a function that selects these layers.

    The function takes stacked parameters of all layers.
    """
    start = 0
    for index, (flag, run) in enumerate(groupby(flags)):
        stop = start + len(list(run))

        def part(params, start=start, stop=stop, index=index):
            return {name: value[index] if isinstance(value, tuple) else value if stop - start == len(flags)
                    else value[start:stop] for name, value in params.items()}

        yield flag, part
        start = stop
