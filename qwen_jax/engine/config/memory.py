"""Device memory: bytes of weights and pages by their shapes, number of pages that fit, and bytes that are free."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
from qwen_kernels.cpu import GROUP
from qwen_kernels.page import PAGE

from qwen_jax.config import ModelConfig
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.page_pool import pages_for
from qwen_jax.errors import UserError
from qwen_jax.model import abstract
from qwen_jax.parallel.page_bytes import kv_page_bytes, summary_page_bytes
from qwen_jax.parallel.plan import ParallelPlan
from qwen_jax.quantization import INT4, Precision

# Share of free memory that the KV cache takes by default: a GPU belongs to the engine alone, a CPU's memory does not.
_KV_SHARE = {"gpu": 0.8, "tpu": 0.8, "cpu": 0.25}
_MAX_KV_BYTES_ON_CPU = 2 << 30


def weight_bytes(config: ModelConfig, dtype: Any, precision: Precision) -> int:
    """Return the bytes of a model's parameters, with the scales of 8-bit ones."""
    return sum(_bytes_by_path(abstract(config, dtype), precision).values())


def weight_bytes_per_step(config: ModelConfig, specs: Mapping[str, Any], precision: Precision) -> int:
    """Return the bytes of the parameters that one step reads: all except an untied embedding (only a few rows).

    specs: result of ``model.abstract``, which takes a second for a large model.
    """
    by_path = _bytes_by_path(specs, precision)
    return sum(by_path.values()) - (0 if config.tie_word_embeddings else by_path["embed.weight"])


def _bytes_by_path(specs: Mapping[str, Any], precision: Precision) -> dict[str, int]:
    by_path = {}
    for path, spec in specs.items():
        inputs, size = precision.inputs(path), prod(spec.shape)
        if inputs is None:
            by_path[path] = size * spec.dtype.itemsize
        elif precision.weight_dtype(path) == INT4:
            by_path[path] = size // 2 + 2 * size // GROUP
        else:
            by_path[path] = size + 4 * prod(spec.shape[:-inputs])
    return by_path


def kv_bytes_per_token(config: ModelConfig, dtype: Any, precision: Precision) -> float:
    """Return the bytes of one token's keys and values in all layers (scales belong to layers, not to tokens)."""
    return page_bytes(config, dtype, kv_cache=precision.kv_cache) / PAGE


def memory_report(config: ModelConfig, dtype: Any, precision: Precision, device_bytes: int) -> dict[str, int]:
    """Return by name the bytes of weights and of a token's keys and values, and the tokens that fit on a device.

    Temporaries of steps are not counted (``qwen-jax info --buckets`` shows them); a twentieth of the device is left for
    them and for the runtime.
    """
    weights, per_token = weight_bytes(config, dtype, precision), kv_bytes_per_token(config, dtype, precision)
    room = device_bytes - device_bytes // 20 - weights
    return {"weight_bytes": weights, "kv_bytes_per_token": round(per_token),
            "device_bytes": device_bytes, "context_tokens_that_fit": max(0, int(room // per_token))}


def platform() -> str:
    """Return the kind of device that JAX computes on: "cpu", "gpu" or "tpu"."""
    name = jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def page_bytes(config: ModelConfig, dtype: Any, sparse_width: int = 0, kv_cache: Sequence[str | None] = ()) -> int:
    """Return the bytes of a KV page in all layers: keys and values of ``PAGE`` tokens, summaries for sparse attention.

    sparse_width: pages of a row, 0 without sparse attention. kv_cache: 8-bit type of each layer's pages, or None.
    """
    return (kv_page_bytes(config, dtype, kv_cache or (None,) * config.num_layers)
            + summary_page_bytes(config, dtype, config.num_layers, sparse_width))


def num_pages(config: ModelConfig, draft: ModelConfig | None, limits: Limits, dtype: Any, kv_cache_bytes: int | None,
              sparse: bool, precision: Precision, free_bytes: int) -> int:
    """Return the number of KV pages that a replica gets, one for padding (the null page) included.

    Args:
      config, draft: one device's part of the model and of the draft model. A page spans the layers of both.
      kv_cache_bytes: memory of each device for pages, those of `wide_pages` included; None for a share of
        ``free_bytes``.
      sparse: whether there are buckets of the sparse schedule.
      free_bytes: memory of each device that the weights leave free.

    Raises UserError when not one page fits.
    """
    size = page_bytes(config, dtype, pages_for(limits.max_seq_len) if sparse else 0, precision.kv_cache)
    size += page_bytes(draft, dtype) if draft else 0
    per_sequence = pages_for(limits.max_seq_len)
    reserved = wide_pages(limits, precision) * page_bytes(config, dtype)
    if kv_cache_bytes is None:
        kv_cache_bytes = max(int(free_bytes * _KV_SHARE[platform()]), per_sequence * size)
        if platform() == "cpu":
            kv_cache_bytes = min(kv_cache_bytes, max(_MAX_KV_BYTES_ON_CPU, per_sequence * size))
    pages = min(limits.max_batch_size * per_sequence, (kv_cache_bytes - reserved) // size)
    if pages < 1:
        beside = f" beside {reserved} bytes of 16-bit pages for what 8 bits cannot compute" if reserved else ""
        raise UserError(f"kv_cache_bytes={kv_cache_bytes} does not hold one page of {size} bytes{beside}: raise it")
    return pages + 1


def wide_pages(limits: Limits, precision: Precision) -> int:
    """Return the number of 16-bit KV pages beside 8-bit ones, with one for padding; 0 if nothing is 8-bit.

    They hold one sequence of the maximum length that 8 bits cannot compute.
    """
    return pages_for(limits.max_seq_len) + 1 if precision.eight_bit else 0


def free_memory() -> int:
    """Return the bytes of memory that are free on the first device."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:  # memory of the page cache counts as free
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_per_device(plan: ParallelPlan, to_load: int = 0, only: bool = False) -> int:
    """Return the bytes of memory that are free on each device of a plan. The devices of a CPU share its memory.

    to_load: bytes of weights that are yet to be loaded onto each device. only: whether these will then be all that the
    devices hold.
    """
    stats = jax.local_devices()[0].memory_stats()
    if only and stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - to_load
    free = free_memory() // (plan.devices if platform() == "cpu" else 1)
    return max(0, free - to_load)
