"""Resolution of an engine's options for one model on this machine: checks, and defaults filled in."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from qwen_kernels.cpu import GROUP, product_targets
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.config import GenerationDefaults, ModelConfig
from qwen_jax.engine.config import memory, tuned
from qwen_jax.engine.config.cache_dir import default_cache_dir
from qwen_jax.engine.config.engine_config import EngineConfig
from qwen_jax.engine.config.load_policy import LoadPolicy
from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.scheduling.buckets import (
    DECODE_STEPS,
    Bucket,
    Grid,
    Limits,
    bucket_table,
    default_grid,
    default_limits,
    invariant_limits,
)
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY, SchedulePolicy, check_positive
from qwen_jax.engine.scheduling.speculation import NGRAM
from qwen_jax.errors import UserError
from qwen_jax.model import Qwen2, build, params_of
from qwen_jax.parallel.hardware import hardware_of
from qwen_jax.parallel.plan import ParallelPlan, make_plan
from qwen_jax.parallel.planner import PlanRequest, best_tensor
from qwen_jax.quantization import Calibrated, Precision, QuantizedTensor, Ranges, default_precision, multiplies_fp8
from qwen_jax.xla_flags import check_safe_flags

if TYPE_CHECKING:
    from qwen_jax.checkpoint import Source

logger = logging.getLogger(__name__)

DEFAULT_MAX_SEQ_LEN = 4096
NGRAM_TOKENS, DRAFT_MODEL_TOKENS = 8, 4  # guesses per row and step, by default
# On a CPU a token of a larger model takes long: a dispatch costs little beside it, a loop costs a tenth.
_ONE_TOKEN_ABOVE = 100_000_000


@dataclass(frozen=True)
class ResolvedConfig:
    """Options of an engine with every default filled in, for one model; all its parallel plans share them.

    Attributes:
      model: configuration of the model. draft: that of the draft model, if there is one.
      dtype: element type of weights and 16-bit pages. precision: which parts are 8-bit. ranges: of keys and values.
      table, limits, policy: buckets, shapes and schedule thresholds of every replica. tuned: their file, if any.
      sparsity: settings of every layer's sparse attention.
      kv_cache_bytes: memory of each device for KV pages; None for a share of what is free.
      cache_dir: folder of compiled programs, if any. layers_per_program: most layers that one of them runs.
    """

    model: ModelConfig
    dtype: Any
    precision: Precision
    table: tuple[Bucket, ...]
    limits: Limits
    policy: SchedulePolicy
    sparsity: tuple[Sparsity | None, ...]
    ranges: tuple[Ranges, ...] | None = None
    tuned: Tuned | None = None
    kv_cache_bytes: int | None = None
    prefix_cache: bool = True
    batch_invariant: bool = False
    draft: ModelConfig | None = None
    cache_dir: Path | None = None
    strict_compiles: bool = False
    layers_per_program: int | None = None


def resolve(options: EngineConfig, model: ModelConfig, dtype: Any, draft: ModelConfig | None) -> ResolvedConfig:
    """Fill in every default of ``options`` for a model. Raises UserError for options that do not go together.

    Args:
      dtype: element type that the engine computes in.
      draft: configuration of the draft model, if ``options.speculation`` is one.
    """
    if options.adapt and (options.dp_size != 1 or options.load_policy is not None):
        raise UserError("adapt=True is for one replica: give neither dp_size nor load_policy with it")
    untouched = options.limits is None and options.policy is DEFAULT_POLICY and not options.batch_invariant
    measured = options.tuned if untouched else None
    policy = measured.policy if measured else options.policy
    if options.batch_invariant:
        if options.limits is not None or options.speculation is not None:
            raise UserError("batch_invariant decides the shapes: give neither limits nor speculation with it")
        policy = invariant_policy(policy, options.max_batch_size)
    limits = _limits(options, model, policy, measured and measured.grid)
    precision = precision_of(model, options.fp8_enabled, options.kv_cache_dtype, options.calibrated, options.weights)
    if options.fp8_enabled and not multiplies_fp8():
        _warn_without_fp8()
    cache_dir = default_cache_dir() if options.cache_dir is ... else options.cache_dir
    return ResolvedConfig(
        model=model, dtype=dtype, precision=precision, ranges=options.calibrated and options.calibrated.ranges,
        table=bucket_table(limits, policy, "f32" if dtype == np.float32 else "bf16", precision.eight_bit),
        limits=limits, policy=policy, tuned=measured, sparsity=sparsity_of(options.sparsity, model),
        kv_cache_bytes=options.kv_cache_bytes, prefix_cache=options.prefix_cache,
        batch_invariant=options.batch_invariant, draft=draft, cache_dir=Path(cache_dir) if cache_dir else None,
        strict_compiles=options.strict_compiles, layers_per_program=_layers_per_program(options))


def warmup_mode(options: EngineConfig, processes: bool) -> str | None:
    """Return how an engine warms up when it is made: "fast", "full" or None for not at all.

    processes: whether it has several processes, which compile everything before the first step.
    """
    mode = {True: "full", False: None}.get(options.warmup, options.warmup)
    if mode not in ("fast", "full", None):
        raise UserError(f"warmup must be 'fast', 'full', True or False, not {options.warmup!r}")
    forced = processes or options.load_policy is not None or os.environ.get("QWEN_JAX_WARMUP") == "full"
    return "full" if mode == "fast" and forced else mode


def _layers_per_program(options: EngineConfig) -> int | None:
    """Return the most layers that a program may run, from the option or else the environment; None for neither."""
    layers = options.layers_per_program
    if layers is None and (variable := os.environ.get("QWEN_JAX_LAYERS_PER_PROGRAM")):
        layers = int(variable) if variable.isdecimal() else variable
    if layers is not None:
        check_positive(layers_per_program=layers)
    return layers


def _limits(options: EngineConfig, model: ModelConfig, policy: SchedulePolicy, grid: Grid | None) -> Limits:
    speculation, draft_tokens = options.speculation, options.draft_tokens
    if speculation is not None and draft_tokens is None:
        default = NGRAM_TOKENS if speculation == NGRAM else DRAFT_MODEL_TOKENS
        draft_tokens = options.limits.draft_tokens if options.limits else default
    limits = options.limits or limits_for(options, model, policy, draft_tokens or 0, grid)
    if (limits.draft_tokens or None) != draft_tokens or (draft_tokens is None) != (speculation is None):
        raise UserError(f"draft_tokens={draft_tokens} with limits for {limits.draft_tokens} and "
                        f"speculation={speculation!r}: these do not go together")
    return limits


def plan_of(options: EngineConfig, resolved: ResolvedConfig) -> ParallelPlan:
    """Return an engine's parallel plan, from its ``tp_size``, ``pp_size`` and ``dp_size``.

    Raises UserError for sizes that this machine or this model cannot have.
    """
    tp_size, pp_size, dp_size = options.tp_size, options.pp_size, options.dp_size
    if tp_size == "auto":
        check_positive(pp_size=pp_size, dp_size=dp_size)
        device = jax.local_devices()[0]
        device_bytes = (device.memory_stats() or {}).get("bytes_limit") or memory.free_memory()
        limits = resolved.limits
        request = PlanRequest(resolved.model, hardware_of(device.device_kind), len(jax.devices()),
                              batch=limits.max_batch_size * dp_size, seq_len=limits.max_seq_len,
                              dtype=str(jnp.dtype(resolved.dtype)), precision=resolved.precision, memory=device_bytes)
        return best_tensor(request, dp_size, pp_size)
    sizes = {"tp_size": tp_size, "pp_size": pp_size, "dp_size": dp_size}
    check_positive(**sizes)
    needed, devices = prod(sizes.values()), len(jax.devices())
    if needed > devices:
        asked = " and ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        raise UserError(f"{asked} need {needed} devices and there {'is' if devices == 1 else 'are'} {devices}: lower "
                        "them")
    return make_plan(resolved.model, dp_size, pp_size, tp_size)


def check_processes(plan: ParallelPlan, other_plans: bool) -> None:
    """Raise UserError for a plan that several processes cannot carry out together.

    other_plans: whether the engine may go to other plans later, which several processes cannot.
    """
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


def check_load_policy(policy: LoadPolicy | None, plan: ParallelPlan) -> None:
    """Raise UserError when an engine's first plan is neither of the two in its load policy."""
    if policy and plan not in (policy.latency, policy.throughput):
        raise UserError(f"the engine begins with {plan}, which is neither of its load_policy's plans")


def source_of(model: Any, dtype: Any) -> tuple[Qwen2 | Source, jnp.dtype, GenerationDefaults]:
    """Return the source of an engine's weights, the element type it computes in, and its generation defaults."""
    check_safe_flags()
    if isinstance(model, tuple) and hasattr(model, "config"):  # a Source: nothing is read yet
        return model, check_dtype(dtype or model.config.dtype), GenerationDefaults.from_hf({}, model.config)
    module, defaults = as_module(model, dtype)
    return module, module.dtype, defaults


def as_module(model: Any, dtype: Any) -> tuple[Qwen2, GenerationDefaults]:
    """Return the NNX module of ``model`` in ``dtype``, and its generation defaults."""
    if dtype is not None:
        check_dtype(dtype)
    if isinstance(model, Qwen2):
        config, params = model.config, params_of(model)
        wanted = jnp.dtype(dtype or model.dtype)
        if any(value.dtype != wanted for value in params.values() if not isinstance(value, QuantizedTensor)):
            model = build(config, {path: value if isinstance(value, QuantizedTensor) else value.astype(wanted)
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
    """Return ``policy`` without prefills in micro-batches, which would give large batches other shapes."""
    check_positive(max_batch_size=max_batch_size)
    return replace(policy, recompute_above_rows=max(policy.recompute_above_rows, max_batch_size))


def check_dtype(dtype: Any) -> jnp.dtype:
    """Return ``dtype`` as a NumPy type. Raises UserError for a type that engines do not compute with."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise UserError(f"dtype must be bfloat16 or float32, not {dtype}")
    return jnp.dtype(dtype)


def limits_for(options: EngineConfig, model: ModelConfig, policy: SchedulePolicy, draft_tokens: int, grid: Grid | None
               ) -> Limits:
    """Return an engine's limits, with the bucket shapes of ``grid`` or the default ones for this platform."""
    longest, max_seq_len = model.max_context, options.max_seq_len
    if max_seq_len is None:
        max_seq_len = min(DEFAULT_MAX_SEQ_LEN, longest)
    elif max_seq_len > longest:
        raise UserError(f"max_seq_len={max_seq_len} exceeds the model's context of {longest} tokens: lower it, or "
                        "extend the context with YaRN in config.json")
    platform = memory.platform()
    slow = platform == "cpu" and model.num_parameters > _ONE_TOKEN_ABOVE
    steps = grid.decode_steps if grid else 1 if slow else DECODE_STEPS
    if options.batch_invariant:
        return invariant_limits(options.max_batch_size, max_seq_len, steps)
    if grid is None and platform == "cpu" and options.weights and product_targets():
        # XLA:CPU multiplies two rows of 16 bits faster than one; the products of integers are fastest with one.
        grid = default_grid(platform)
        grid = replace(grid, decode_rows=(1, *grid.decode_rows))
    return default_limits(options.max_batch_size, max_seq_len, platform, policy, draft_tokens, decode_steps=steps,
                          grid=grid)


def tuned_for(config: ModelConfig, dtype: Any, options: dict[str, Any]) -> Tuned | None:
    """Return the shapes and thresholds that `qwen-jax tune` found for an engine with these options.

    None where the options themselves decide shapes or thresholds, or ask for what `qwen-jax tune` does not measure.
    """
    decided = ("limits", "policy", "batch_invariant", "speculation", "load_policy")
    several = any(options.get(name, 1) != 1 for name in ("tp_size", "pp_size", "dp_size"))
    weights = chosen_weights(options.get("weights"), options.get("fp8_enabled", False))
    if several or weights or jax.process_count() > 1 or any(options.get(name) for name in decided):
        return None
    return tuned.find(config, dtype or config.dtype, options.get("fp8_enabled", False))


@functools.cache
def _warn_without_fp8() -> None:
    """Warn once per process that 8-bit weights make nothing faster on this device."""
    logger.warning("this device does not multiply 8-bit floats: fp8_enabled saves memory, and products are computed in "
                   "bfloat16 from operands rounded to 8 bits")


def chosen_weights(weights: str | None, fp8_enabled: bool) -> str | None:
    """Return the type that weights are rounded to on this machine: of "auto", what is fastest at next to no loss.

    That is int8 on CPUs for which the kernels can be compiled, and the model's own type elsewhere. With ``fp8_enabled``
    it is e4m3, and not chosen here.
    """
    if weights != "auto":
        return weights
    return "int8" if not fp8_enabled and memory.platform() == "cpu" and product_targets() else None


def precision_of(config: ModelConfig, fp8_enabled: bool, kv_cache_dtype: str | None,
                 calibrated: Calibrated | None = None, weights: str | None = None) -> Precision:
    """Return which parts of a model are 8-bit, as calibration found it or by default.

    With ``fp8_enabled`` weights are, and with "auto" for ``kv_cache_dtype`` KV pages too. With "int8" or "int4"
    for ``weights`` all of them are integers. Raises UserError for other weights, for both, and for a model whose
    matrices do not consist of whole groups of int4.
    """
    if weights not in (None, "int8", "int4"):
        raise UserError(f"weights must be 'auto', 'int8', 'int4' or None, not {weights!r}"
                        + (": e4m3 is fp8_enabled=True" if weights == "e4m3" else ""))
    if weights and fp8_enabled:
        raise UserError(f"fp8_enabled=True and weights={weights!r} are two ways to store the same matrices: choose one")
    sizes = {name: getattr(config, name) for name in ("hidden_size", "intermediate_size", "head_dim")}
    if weights == "int4" and any(size % GROUP for size in sizes.values()):
        raise UserError(f"int4 weights need sizes that are multiples of {GROUP}, and this model has "
                        + ", ".join(f"{name} {size}" for name, size in sizes.items()) + ": use weights='int8'")
    auto = kv_cache_dtype == "auto"
    if auto:
        kv_cache_dtype = "e4m3" if fp8_enabled else None
    precision = default_precision(config, fp8_enabled, kv_cache_dtype)
    if weights:
        return replace(precision, weights=(True,) * config.num_layers, tables=True, format=weights)
    if calibrated and fp8_enabled:
        found = calibrated.precision
        return replace(found, kv_cache=found.kv_cache if auto else precision.kv_cache)
    return precision


def sparsity_of(option: Any, config: ModelConfig) -> tuple[Sparsity | None, ...]:
    """Return the sparse attention settings of every layer, from one for all layers or a sequence of them."""
    per_layer = (option,) * config.num_layers if isinstance(option, Sparsity) else tuple(option)
    if len(per_layer) != config.num_layers or not all(isinstance(layer, Sparsity | None) for layer in per_layer):
        raise UserError(f"sparsity must be a Sparsity, or one (or None) for each of the {config.num_layers} layers")
    return per_layer


def draft_of(speculation: Any, dtype: Any) -> Qwen2 | None:
    """Return the draft model in ``dtype``; None when guesses come from the text, or without speculation."""
    return None if speculation is None or isinstance(speculation, str) else as_module(speculation, dtype)[0]


def vocab_limit_of(tokenizer: Any, model: ModelConfig, draft: ModelConfig | None) -> int:
    """Return the number of token ids that exist. Raises UserError for a draft model that has not all of them."""
    limit = min(len(tokenizer), model.vocab_size) if tokenizer else model.vocab_size
    if draft and draft.vocab_size < limit:
        raise UserError(f"the draft model has {draft.vocab_size} token ids and the model uses {limit}: take one with "
                        "the same vocabulary")
    return limit


def with_end_of(tokenizer: Any, defaults: GenerationDefaults) -> GenerationDefaults:
    """Return generation defaults whose end-of-sequence ids include the tokenizer's own."""
    end = getattr(tokenizer, "eos_token_id", None)
    return defaults if end is None or end in defaults.eos_token_ids else replace(
        defaults, eos_token_ids=(*defaults.eos_token_ids, end))


def differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """Return the names of the fields in which another model differs so that its weights do not fit the programs."""
    harmless = ("dtype", "bos_token_id", "eos_token_id", "max_position_embeddings", "dual_chunk_attention")
    return [name for name in vars(config) if name not in harmless and getattr(config, name) != getattr(other, name)]
