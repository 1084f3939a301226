"""What a model takes of a device, by its shapes alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import nodes_per_page

from qwen_jax.config import ModelConfig
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.page_pool import pages_for
from qwen_jax.errors import UserError
from qwen_jax.model import abstract
from qwen_jax.parallel.plan import ParallelPlan
from qwen_jax.quantization import Precision

if TYPE_CHECKING:
    pass


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


# Shares of free memory for the KV cache: a GPU is ours alone, a CPU's memory is not.
_KV_SHARE = {"gpu": 0.8, "tpu": 0.8, "cpu": 0.25}

_KV_MOST_ON_CPU = 2 << 30



def platform() -> str:
    """"cpu", "gpu" or "tpu"."""
    name = jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)



def page_bytes(config: ModelConfig, dtype: Any, sparse_width: int = 0, kv_cache: Sequence[str | None] = ()) -> int:
    """Bytes of one page in every layer: keys and values of ``PAGE`` tokens, and what sparse attention selects by.

    sparse_width: pages of a row, 0 without sparse attention. kv_cache: of each layer, its 8-bit type, or None.
    """
    wide = jnp.dtype(dtype).itemsize
    nodes = 2 * nodes_per_page(sparse_width) * wide if sparse_width else 0
    elements = sum(2 * PAGE * (1 if kind else wide) + nodes for kind in kv_cache or (None,) * config.num_layers)
    return elements * config.num_kv_heads * config.head_dim



def num_pages(config: ModelConfig, draft: ModelConfig | None, limits: Limits, dtype: Any, kv_cache_bytes: int | None,
              sparse: bool, precision: Precision, free_bytes: int) -> int:
    """Pages of a replica's pool, the null page included. A page spans the layers of both models.

    config, draft: one device's part of them. kv_cache_bytes: of each device; they hold the pages of `wide_pages` too.
    By default a share of ``free_bytes``, what it has beside the weights.
    """
    one = page_bytes(config, dtype, pages_for(limits.max_seq_len) if sparse else 0, precision.kv_cache)
    one += page_bytes(draft, dtype) if draft else 0
    most = limits.max_batch_size * pages_for(limits.max_seq_len)
    reserved = wide_pages(limits, precision) * page_bytes(config, dtype)
    if kv_cache_bytes is None:
        kv_cache_bytes = max(int(free_bytes * _KV_SHARE[platform()]), pages_for(limits.max_seq_len) * one)
        if platform() == "cpu":
            kv_cache_bytes = min(kv_cache_bytes, max(_KV_MOST_ON_CPU, pages_for(limits.max_seq_len) * one))
    pages = min(most, (kv_cache_bytes - reserved) // one)
    if pages < 1:
        beside = f" beside {reserved} bytes of 16-bit pages for what 8 bits cannot compute" if reserved else ""
        raise UserError(f"kv_cache_bytes={kv_cache_bytes} does not hold one page of {one} bytes{beside}: raise it")
    return pages + 1



def wide_pages(limits: Limits, precision: Precision) -> int:
    """Pages for requests that 8 bits cannot compute, the null page included: one of the longest. 0 without 8 bits."""
    return pages_for(limits.max_seq_len) + 1 if precision.eight_bit else 0



def free_memory() -> int:
    """Bytes that the first device can still give."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:  # what the page cache would give back counts as free
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")



def free_per_device(plan: ParallelPlan, beside: int | None = None) -> int:
    """Bytes that each device of a plan can still give; ``beside`` so many bytes of weights, if these are not there yet
    and nothing else is. The devices of a CPU share its memory."""
    stats = jax.local_devices()[0].memory_stats()
    if beside is not None and stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - beside
    return free_memory() // (plan.devices if platform() == "cpu" else 1)
