"""Export to StableHLO: the forward pass as a program that runs without this package, and its parameters beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from qwen_kernels.attention import causal_attention

from qwen_jax.atomic import new_folder
from qwen_jax.checkpoint import stablehlo_runner
from qwen_jax.checkpoint.conversion import verify
from qwen_jax.checkpoint.hf_layout import layout
from qwen_jax.checkpoint.load import iter_params, placements_for
from qwen_jax.checkpoint.safetensors_io import SINGLE, SafetensorsWriter
from qwen_jax.checkpoint.source import (
    GENERATION_CONFIG,
    Source,
    copy_side_files,
    load_generation_config,
    read_json,
    resolve,
)
from qwen_jax.checkpoint.tensors import as_dtype, progress
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.quantization import product

PLATFORMS = ("cpu", "cuda", "tpu")


def export_stablehlo(src: str | Path | Source, dst: str | Path, dtype: Any = "bfloat16") -> Path:
    """Write a model as a new folder that runs with jax, safetensors and flatbuffers alone.

    Args:
      src: a Hugging Face folder, a converted checkpoint, a hub id, or ``bundled``.
      dst: the folder to create. It appears complete or not at all.
      dtype: element type of the parameters and the computation: bfloat16, float16 or float32.

    The folder holds

    - ``logits.jaxexport``: ``logits(parameters, tokens[B, T]) -> float32 [B, T, V]`` for any B and T, as
      ``jax.export.deserialize`` reads it, lowered for CPUs, NVIDIA GPUs and TPUs;
    - ``parameters.safetensors``: the program's first argument, a dictionary of arrays by parameter path;
    - ``run.py``, which shows how to call the program, and continues token ids greedily;
    - the tokenizer and the generation defaults.

    The program has no cache of keys and values, and its attention holds the scores of all pairs of tokens: it is for
    evaluation, for other runtimes, and for comparison, not for long texts.

    Returns ``dst``. Raises UserError for another dtype, a missing ``flatbuffers`` package, bad input, an existing
    ``dst``, or too little disk space.
    """
    dtype = as_dtype(dtype)
    try:
        import flatbuffers  # noqa: F401  jax.export serialises with it
    except ImportError:
        raise UserError("writing StableHLO needs the package flatbuffers: pip install 'qwen-jax[stablehlo]'") from None
    source = resolve(src)
    config = source.config
    specs = {path: (dtype, entry.shape) for path, entry in layout(config).items()}
    total = sum(prod(shape) * dtype.itemsize for _, shape in specs.values())
    with new_folder(dst, total) as folder:
        verify(source)
        (folder / stablehlo_runner.PROGRAM).write_bytes(_program(config, dtype))
        with progress(total, "exporting") as bar:
            writer = SafetensorsWriter(folder, specs, total)
            for path, parameter in iter_params(source, config, placements_for(config, dtype)):
                writer.write(path, np.asarray(parameter))
                bar.update(parameter.nbytes)
                del parameter  # else it would be alive while the next parameter is read
            writer.close()
        (folder / SINGLE).rename(folder / stablehlo_runner.PARAMETERS)
        shutil.copyfile(stablehlo_runner.__file__, folder / "run.py")
        copy_side_files(source.path, folder)
        defaults = read_json(source.path / GENERATION_CONFIG)
        defaults["eos_token_id"] = list(load_generation_config(source).eos_token_ids)
        (folder / GENERATION_CONFIG).write_text(json.dumps(defaults, indent=2) + "\n")
    return Path(dst)


def _program(config: ModelConfig, dtype: np.dtype) -> bytes:
    """Return the serialised program ``logits(parameters, tokens[B, T])`` for any B and T."""
    from qwen_jax.model.abstract import abstract, build

    def attend(_: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_attention(q, k, v, implementation="reference")  # the others divide T, which has no value here

    def logits(parameters: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        model = build(config, parameters)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return product("btd,vd->btv", model.hidden(tokens, positions, attend), model.head_weight, jnp.float32)

    batch, length = jax.export.symbolic_shape("b, t")
    parameters = {path: jax.ShapeDtypeStruct(spec.shape, dtype) for path, spec in abstract(config).items()}
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    with _no_locations():
        return bytes(jax.export.export(jax.jit(logits), platforms=PLATFORMS)(parameters, tokens).serialize())


@contextmanager
def _no_locations() -> Iterator[None]:
    """Keep source locations, which are paths of this machine, out of the programs that are lowered in the block."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)
