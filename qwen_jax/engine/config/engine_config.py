"""From what a caller asks to what the engine is built with: checks and defaults, each in one place."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import Sparsity, nodes_per_page

from qwen_jax.config import GenerationDefaults, ModelConfig
from qwen_jax.engine.config import tuned
from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.scheduling.buckets import (
    DECODE_STEPS,
    Grid,
    Limits,
    SchedulePolicy,
    check_positive,
    default_limits,
    invariant_limits,
)
from qwen_jax.engine.scheduling.page_pool import pages_for
from qwen_jax.errors import UserError
from qwen_jax.model import Qwen2, build, params_of
from qwen_jax.parallel.hardware import hardware_of
from qwen_jax.parallel.plan import ParallelPlan, make_plan
from qwen_jax.parallel.planner import Request, best_tensor
from qwen_jax.quantization import Calibrated, FP8Tensor, Precision, default_precision

if TYPE_CHECKING:
    from qwen_jax.checkpoint import Source

logger = logging.getLogger(__name__)

DEFAULT_MAX_SEQ_LEN = 4096
# Shares of free memory for the KV cache: a GPU is ours alone, a CPU's memory is not.
_KV_SHARE = {"gpu": 0.8, "tpu": 0.8, "cpu": 0.25}
_KV_MOST_ON_CPU = 2 << 30
# On a CPU a token of a larger model takes so long that a dispatch costs nothing beside it; a loop costs a tenth.
_ONE_TOKEN_ABOVE = 100_000_000


def plan_of(config: ModelConfig, tp_size: int | str, pp_size: int, dp_size: int, limits: Limits, dtype: Any,
            precision: Precision) -> ParallelPlan:
    """The plan that an engine's arguments ask for; UserError for what this machine or this model cannot have."""
    if tp_size == "auto":
        check_positive(pp_size=pp_size, dp_size=dp_size)
        device = jax.local_devices()[0]
        memory = (device.memory_stats() or {}).get("bytes_limit") or free_memory()
        request = Request(config, hardware_of(device.device_kind), len(jax.devices()), limits.max_batch_size * dp_size,
                          limits.max_seq_len, str(jnp.dtype(dtype)), precision, memory)
        return best_tensor(request, dp_size, pp_size)
    sizes = {"tp_size": tp_size, "pp_size": pp_size, "dp_size": dp_size}
    check_positive(**sizes)
    needed, devices = prod(sizes.values()), len(jax.devices())
    if needed > devices:
        asked = " and ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise UserError(f"{asked} need {needed} devices and there {'is' if devices == 1 else 'are'} {devices}: lower "
                        "them")
    return make_plan(config, dp_size, pp_size, tp_size)


def check_processes(plan: ParallelPlan, other_plans: bool) -> None:
    """UserError for a plan that several processes cannot carry out together, or when it is not to be the only one."""
    processes, devices = jax.process_count(), len(jax.devices())
    if processes == 1:
        return
    if plan.data > 1 or len(plan.stages) > 1:
        raise UserError(f"an engine of {processes} processes is one replica of one stage: divide the model by tp_size "
                        "alone, and make replicas engines of their own")
    if other_plans:
        raise UserError(f"an engine of {processes} processes keeps its plan: it takes no load_policy")
    if plan.devices != devices:
        raise UserError(f"tp_size={plan.tensor} leaves devices of the {processes} processes without work: use all "
                        f"{devices}, or fewer processes")


def source_of(model: Any, dtype: Any) -> tuple[Qwen2 | Source, jnp.dtype, GenerationDefaults]:
    """Where an engine's weights come from, the element type it computes in, and the model's generation defaults."""
    if isinstance(model, tuple) and hasattr(model, "config"):  # a Source: nothing is read yet
        return model, check_dtype(dtype or model.config.dtype), GenerationDefaults.from_hf({}, model.config)
    module, defaults = as_module(model, dtype)
    return module, module.dtype, defaults


def as_module(model: Any, dtype: Any) -> tuple[Qwen2, GenerationDefaults]:
    """The NNX module of ``model`` in ``dtype``, and its generation defaults."""
    if dtype is not None:
        check_dtype(dtype)
    if isinstance(model, Qwen2):
        config, params = model.config, params_of(model)
        wanted = jnp.dtype(dtype or model.dtype)
        if any(value.dtype != wanted for value in params.values() if not isinstance(value, FP8Tensor)):
            model = build(config, {path: value if isinstance(value, FP8Tensor) else value.astype(wanted)
                                   for path, value in params.items()})
        return model, GenerationDefaults.from_hf({}, config)
    if type(model).__module__.partition(".")[0] in ("transformers", "peft"):
        from qwen_jax.checkpoint import from_transformers

        config, params = from_transformers(model, dtype)
        generation = getattr(model, "generation_config", None)
        return build(config, params), GenerationDefaults.from_hf(generation.to_dict() if generation else {}, config)
    raise UserError(f"model must be a qwen_jax Qwen2 or a transformers Qwen2ForCausalLM, not {type(model).__name__}; "
                    "for a path or a hub id use Engine.from_pretrained")


def invariant_policy(policy: SchedulePolicy, max_batch_size: int) -> SchedulePolicy:
    """No recompute, which would be another shape for large batches."""
    check_positive(max_batch_size=max_batch_size)
    return replace(policy, recompute_above_rows=max(policy.recompute_above_rows, max_batch_size))


def check_dtype(dtype: Any) -> jnp.dtype:
    """``dtype``, which must be one that engines compute with."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise UserError(f"dtype must be bfloat16 or float32, not {dtype}")
    return jnp.dtype(dtype)


def limits_for(config: ModelConfig, max_batch_size: int, max_seq_len: int | None, policy: SchedulePolicy,
               invariant: bool = False, draft_tokens: int = 0, grid: Grid | None = None) -> Limits:
    """Default shapes for this platform, or those of ``grid``, within the model's context."""
    longest = config.max_context
    if max_seq_len is None:
        max_seq_len = min(DEFAULT_MAX_SEQ_LEN, longest)
    elif max_seq_len > longest:
        raise UserError(f"max_seq_len={max_seq_len} exceeds the model's context of {longest} tokens: lower it, or "
                        "extend the context with YaRN in config.json")
    slow = platform() == "cpu" and config.num_parameters > _ONE_TOKEN_ABOVE
    steps = grid.decode_steps if grid else 1 if slow else DECODE_STEPS
    if invariant:
        return invariant_limits(max_batch_size, max_seq_len, steps)
    return default_limits(max_batch_size, max_seq_len, platform(), policy, draft_tokens, steps, grid)


def tuned_for(config: ModelConfig, dtype: Any, options: dict[str, Any]) -> Tuned | None:
    """What `qwen-jax tune` found for an engine with these options; None where they decide that themselves, or ask for
    what it does not measure."""
    decided = ("limits", "policy", "batch_invariant", "speculation", "load_policy")
    several = any(options.get(name, 1) != 1 for name in ("tp_size", "pp_size", "dp_size"))
    if several or jax.process_count() > 1 or any(options.get(name) for name in decided):
        return None
    return tuned.find(config, dtype or config.dtype, options.get("fp8_enabled", False))


def platform() -> str:
    """"cpu", "gpu" or "tpu"."""
    name = jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


@functools.cache
def say_without_fp8() -> None:
    """Says once that 8-bit weights make nothing faster on this device."""
    logger.warning("this device does not multiply 8-bit floats: fp8_enabled saves memory, and products are computed in "
                   "bfloat16 from operands rounded to 8 bits")


def precision_of(config: ModelConfig, fp8_enabled: bool, kv_cache_dtype: str | None,
                 calibrated: Calibrated | None = None) -> Precision:
    """What is 8-bit: with ``fp8_enabled`` weights, and in "auto" pages too, as calibration found it or by default."""
    auto = kv_cache_dtype == "auto"
    if auto:
        kv_cache_dtype = "e4m3" if fp8_enabled else None
    precision = default_precision(config, fp8_enabled, kv_cache_dtype)
    if calibrated and fp8_enabled:
        found = calibrated.precision
        return replace(found, kv_cache=found.kv_cache if auto else precision.kv_cache)
    return precision


def page_bytes(config: ModelConfig, dtype: Any, sparse_width: int = 0, kv_cache: Sequence[str | None] = ()) -> int:
    """Bytes of one page in every layer: keys and values of ``PAGE`` tokens, and what sparse attention selects by.

    sparse_width: pages of a row, 0 without sparse attention. kv_cache: of each layer, its 8-bit type, or None.
    """
    wide = jnp.dtype(dtype).itemsize
    nodes = 2 * nodes_per_page(sparse_width) * wide if sparse_width else 0
    elements = sum(2 * PAGE * (1 if kind else wide) + nodes for kind in kv_cache or (None,) * config.num_layers)
    return elements * config.num_kv_heads * config.head_dim


def sparsity_of(option: Any, config: ModelConfig) -> tuple[Sparsity | None, ...]:
    """The sparsity of every layer, from one for all or a sequence with one for each."""
    per_layer = (option,) * config.num_layers if isinstance(option, Sparsity) else tuple(option)
    if len(per_layer) != config.num_layers or not all(isinstance(one, Sparsity | None) for one in per_layer):
        raise UserError(f"sparsity must be a Sparsity, or one (or None) for each of the {config.num_layers} layers")
    return per_layer


def draft_of(speculation: Any, config: ModelConfig, vocab_limit: int, dtype: Any) -> Qwen2 | None:
    """The draft model in ``dtype``, or None for speculation by lookup or none; UserError for one that does not fit."""
    if speculation is None or isinstance(speculation, str):
        return None
    draft, _ = as_module(speculation, dtype)
    if min(draft.config.vocab_size, config.vocab_size) < vocab_limit:
        raise UserError(f"the draft model has {draft.config.vocab_size} token ids and the model uses {vocab_limit}: "
                        "take one with the same vocabulary")
    return draft


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


def differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """What makes another model's weights unfit for programs compiled for `config`, as field names."""
    harmless = ("dtype", "bos_token_id", "eos_token_id", "max_position_embeddings", "dual_chunk_attention")
    return [name for name in vars(config) if name not in harmless and getattr(config, name) != getattr(other, name)]


def check_token_ids(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """``tokens`` as a list of int; UserError for what is not a token id."""
    checked = []
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise UserError(f"a prompt is a text or a list of token ids; it contains {token!r}")
        if not 0 <= token < vocab_size:
            raise UserError(f"token id {token} is not in the vocabulary (0..{vocab_size - 1})")
        checked.append(int(token))
    return checked
