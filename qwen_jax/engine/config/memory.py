"""What a model takes of a device, by its shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from qwen_kernels.attention import PAGE

from qwen_jax.config import ModelConfig
from qwen_jax.engine.config.engine_config import page_bytes
from qwen_jax.model import abstract
from qwen_jax.quantization import Precision


def weight_bytes(config: ModelConfig, dtype: Any, precision: Precision) -> int:
    """Bytes of the parameters, scales of 8-bit ones included."""
    return sum(_bytes_by_path(abstract(config, dtype), precision).values())


def weight_bytes_per_step(config: ModelConfig, specs: Mapping[str, Any], precision: Precision) -> int:
    """Of them, those that a step reads: all, but of an embedding that is not the head too a few rows.

    specs: what ``model.abstract`` gives, which takes a second for a large model.
    """
    each = _bytes_by_path(specs, precision)
    return sum(each.values()) - (0 if config.tie_word_embeddings else each["embed.weight"])


def _bytes_by_path(specs: Mapping[str, Any], precision: Precision) -> dict[str, int]:
    found = {}
    for path, spec in specs.items():
        inputs = precision.inputs(path)
        found[path] = (prod(spec.shape) * spec.dtype.itemsize if inputs is None
                       else prod(spec.shape) + 4 * prod(spec.shape[:-inputs]))
    return found


def kv_bytes_per_token(config: ModelConfig, dtype: Any, precision: Precision) -> float:
    """Bytes of one token's keys and values in every layer. Their scales belong to the layer, not to tokens."""
    return page_bytes(config, dtype, kv_cache=precision.kv_cache) / PAGE


def memory_report(config: ModelConfig, dtype: Any, precision: Precision, device_bytes: int) -> dict[str, int]:
    """Weights, keys and values, and how many tokens of context a device has room for beside the weights.

    Temporaries of steps are not counted (``qwen-jax info --buckets`` shows them); a twentieth of the device is left for
    them and for the runtime.
    """
    weights, per_token = weight_bytes(config, dtype, precision), kv_bytes_per_token(config, dtype, precision)
    room = device_bytes - device_bytes // 20 - weights
    return {"weight_bytes": weights, "kv_bytes_per_token": round(per_token),
            "device_bytes": device_bytes, "context_tokens_that_fit": max(0, int(room // per_token))}
