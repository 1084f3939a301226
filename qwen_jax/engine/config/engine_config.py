"""From what a caller asks to what the engine is built with: checks and defaults, each in one place."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.config import GenerationDefaults, ModelConfig
from qwen_jax.engine.config import tuned
from qwen_jax.engine.config.memory import free_memory, platform
from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.scheduling.buckets import DECODE_STEPS, Grid, Limits, default_limits, invariant_limits
from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy, check_positive
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


def differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """What makes another model's weights unfit for programs compiled for `config`, as field names."""
    harmless = ("dtype", "bos_token_id", "eos_token_id", "max_position_embeddings", "dual_chunk_attention")
    return [name for name in vars(config) if name not in harmless and getattr(config, name) != getattr(other, name)]
