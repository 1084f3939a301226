"""Options of an engine."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.engine.config.load_policy import LoadPolicy
from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY, SchedulePolicy
from qwen_jax.errors import UserError
from qwen_jax.quantization import Calibrated

DEFAULT_SPARSITY = Sparsity()


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine, as its keyword arguments; `resolve` checks them against a model and this machine.

    Attributes:
      tp_size: devices that divide every layer among themselves; any number, or "auto" for the one with which the
        planner predicts the least time per token (docs/planner.md).
      pp_size: stages of layers on devices of their own, a pipeline.
      dp_size: replicas of the model, each on tp_size * pp_size devices, with requests of its own.
      fp8_enabled: e4m3 weights in all layers but the first and the last, and an 8-bit KV cache.
      weights: "int8" rounds all matrices, the embedding and the head to int8, with a scale for each output; "int4"
        rounds the matrices of layers to int4, with a scale for each 32 inputs of an output, and the rest to int8;
        "auto" is "int8" on CPUs whose kernels can be compiled and None elsewhere; None leaves them. With integers CPUs
        answer few requests two or three times as fast (docs/performance.md).
      max_batch_size: sequences that run at once in each replica.
      max_seq_len: tokens of prompt and answer together; by default 4096, or the model's context if that is shorter.
      dtype: element type of weights and KV cache, "bfloat16" or "float32"; None keeps the model's.
      kv_cache_dtype: "e4m3", "int8" (which needs ``calibrated``), or None for ``dtype``. "auto" with ``fp8_enabled``
        takes what calibration chose, without calibration e4m3; "auto" without ``fp8_enabled`` is None.
      kv_cache_bytes: memory of each device for KV pages; by default what ``max_batch_size`` full sequences need, at
        most a share of the free memory.
      limits, policy: bucket shapes, and thresholds of the schedules.
      tuned: limits and policy that `qwen-jax tune` found for this device; `Engine.from_pretrained` looks for them, and
        None keeps it from that. Not used where ``limits`` or ``policy`` are given.
      adapt: learn while serving which compiled decode programs are faster (docs/tuning.md).
      prefix_cache: keep computed pages for prompts that begin alike (same weights, adapter and attention).
      max_adapters: LoRA adapters that may be loaded at once. max_adapter_rank: their largest rank.
      cache_dir: folder of compiled programs; None keeps none, ... is the default folder.
      layers_per_program: most layers of the model that one program runs; by default about 8. A model of no more layers
        runs every step as one program, others as a sequence of programs that equal layers share (docs/performance.md).
        The environment variable QWEN_JAX_LAYERS_PER_PROGRAM changes the default.
      speculation: None; "ngram" to guess tokens from repetitions in the text; or a draft model of the same vocabulary
        (a module, or in `Engine.from_pretrained` also a folder or hub id). Answers stay the same. It switches itself
        off where it does not pay.
      draft_tokens: guesses per row and step; by default 8 from the text, 4 from a draft model.
      strict_compiles: fail a step rather than run after a compilation that came after the warm-up.
      sparsity: settings of the sparse schedule's attention, one for all layers or one for each (None: full attention).
      batch_invariant: a request's tokens do not depend on the other requests, to the last bit (docs/engine.md).
      calibrated: which parts may be 8-bit, and ranges of keys and values, as `qwen-jax calibrate --fp8` finds them.
      load_policy: two plans between which the engine switches by load; one is the plan of the sizes above.
      warmup: what is compiled when the engine is made. "fast": the few programs with which any request can be
        answered; the others are compiled in the background, and taken up between two steps. "full" or True: all.
        False: nothing; call `Engine.warmup` before the first request. The environment variable QWEN_JAX_WARMUP=full
        makes "fast" mean "full".
      progress: show progress bars on stderr.
    """

    tp_size: int | str = 1
    pp_size: int = 1
    dp_size: int = 1
    fp8_enabled: bool = False
    weights: str | None = None
    max_batch_size: int = 64
    max_seq_len: int | None = None
    dtype: Any = None
    kv_cache_dtype: str | None = "auto"
    kv_cache_bytes: int | None = None
    limits: Limits | None = None
    policy: SchedulePolicy = DEFAULT_POLICY
    tuned: Tuned | None = None
    adapt: bool = False
    prefix_cache: bool = True
    max_adapters: int = 0
    max_adapter_rank: int = 16
    cache_dir: str | Path | None | type(...) = ...
    layers_per_program: int | None = None
    speculation: Any = None
    draft_tokens: int | None = None
    strict_compiles: bool = False
    sparsity: Sparsity | Sequence[Sparsity | None] = DEFAULT_SPARSITY
    batch_invariant: bool = False
    calibrated: Calibrated | None = None
    load_policy: LoadPolicy | None = None
    warmup: bool | str = "fast"
    progress: bool = True

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Build a config from keyword arguments. Raises UserError for an option that does not exist."""
        names = [option.name for option in fields(cls)]
        for name in options:
            if name not in names:
                similar = difflib.get_close_matches(name, names, 1)
                raise UserError(f"unknown engine option {name!r}: " + (f"did you mean {similar[0]!r}?" if similar else
                                                                       "see help(EngineConfig)"))
        return cls(**options)
