"""The engine: what a caller sees of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.config import GenerationDefaults
from qwen_jax.engine.api.outputs import Delta, RequestOutput, Score, unit
from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.api.stats import BucketStats, EngineStats
from qwen_jax.engine.config import engine_config
from qwen_jax.engine.config.cache_dir import default_cache_dir
from qwen_jax.engine.config.memory import kv_bytes_per_token, weight_bytes_per_step
from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.core import resharding
from qwen_jax.engine.core.engine_core import DISPATCH_SECONDS, EngineCore
from qwen_jax.engine.core.replica import Blueprint, Deployment
from qwen_jax.engine.core.resharding import LoadPolicy
from qwen_jax.engine.core.weight_update import (
    Golden,
    check_golden,
    check_policy,
    golden_requests,
    replace_in_place,
    switch,
)
from qwen_jax.engine.frontend.input_processor import EMBEDDING, FIRST_TOKEN, InputProcessor, Messages, Prompt, is_single
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.multihost.channel import Follower, Leader, connect
from qwen_jax.engine.multihost.follower import FollowerLoop
from qwen_jax.engine.multihost.leader import LeaderAdapters, LeaderWeights, check_same
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.scheduling.buckets import Limits, bucket_table
from qwen_jax.engine.scheduling.decode_adaptation import Adaptation
from qwen_jax.engine.scheduling.page_pool import PagePool
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY, SchedulePolicy
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.speculation import DRAFT_MODEL, NGRAM, Speculation
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.errors import UserError
from qwen_jax.model import empty
from qwen_jax.parallel.plan import ParallelPlan
from qwen_jax.quantization import Calibrated, multiplies_fp8

DEFAULT_SPARSITY = Sparsity()


class Engine:
    """Text or tokens in, text out, through executables compiled ahead of time for every bucket.

    Args:
      model: a ``Qwen2`` module, a ``transformers.Qwen2ForCausalLM``, or a checkpoint that `checkpoint.resolve` found.
      tokenizer: a transformers fast tokenizer; without one, prompts are token ids and ``text`` stays empty.
      generation_config: defaults of the sampling options and the end-of-sequence ids; a transformers model's own by
        default.
      tp_size: devices that divide every layer among themselves; any number, or "auto" for the one with which the
        planner predicts the least time per token (docs/planner.md).
      pp_size: stages of layers on devices of their own, a pipeline.
      dp_size: replicas of the model, on tp_size * pp_size devices each, with requests of their own.
      fp8_enabled: e4m3 weights in all layers but the first and the last, and an 8-bit KV cache.
      max_batch_size: sequences that run at once in each replica.
      max_seq_len: prompt and answer together, in tokens; by default 4096 or the model's context if that is shorter.
      dtype: element type of weights and KV cache, "bfloat16" or "float32"; None keeps the model's.
      kv_cache_dtype: "e4m3", "int8" (which needs ``calibrated``), or None for ``dtype``; "auto" is with
        ``fp8_enabled`` what calibration chose, without it e4m3; else None.
      kv_cache_bytes: memory of each device for KV pages; by default what ``max_batch_size`` full sequences need, at
        most a share of the free memory.
      limits, policy: the bucket shapes and the schedule's thresholds, as data.
      tuned: both, as `qwen-jax tune` found them for this device; `from_pretrained` looks for them by itself, and None
        keeps it from that. With ``limits`` or ``policy`` it is not used.
      adapt: learn while it works which compiled decode programs are the faster ones (docs/tuning.md).
      prefix_cache: keep computed pages for prompts that begin alike (same weights, adapter and attention).
      max_adapters: LoRA adapters that may be loaded at once (`load_adapter`); max_adapter_rank: their largest rank.
      cache_dir: where executables are kept; None keeps none.
      speculation: None; "ngram" to guess tokens from where the text repeats itself; or a draft model, a smaller one of
        the same vocabulary (as `model`; in `from_pretrained` also a folder or hub id). Answers stay the same. It
        switches itself off where it loses.
      draft_tokens: guesses per row and step; by default 8 from the text, 4 from a draft model.
      strict_compiles: fail a step rather than run after a compilation that came after the warm-up.
      sparsity: of the sparse schedule's attention, for all layers or for each (None attends to everything).
      batch_invariant: a request's tokens do not depend on what runs beside it, to the last bit (see docs/engine.md).
      calibrated: what may be 8-bit and the ranges of keys and values, as `qwen-jax calibrate --fp8` finds them.
      load_policy: two plans, between which the engine goes by itself; one of them is that of the sizes above.
      warmup: compile and run every bucket now; else call ``warmup()`` before the first request.
      progress: show progress bars on stderr.

    Raises UserError for settings that cannot work here. One thread at a time may use an engine.
    """

    def __init__(self, model: Any, *, tokenizer: Any = None, generation_config: Any = None, tp_size: int | str = 1,
                 pp_size: int = 1, dp_size: int = 1, fp8_enabled: bool = False, max_batch_size: int = 64,
                 max_seq_len: int | None = None, dtype: Any = None, kv_cache_dtype: str | None = "auto",
                 kv_cache_bytes: int | None = None, limits: Limits | None = None,
                 policy: SchedulePolicy = DEFAULT_POLICY, prefix_cache: bool = True, max_adapters: int = 0,
                 max_adapter_rank: int = 16, cache_dir: str | Path | None | type(...) = ...,
                 speculation: Any = None, draft_tokens: int | None = None, strict_compiles: bool = False,
                 sparsity: Sparsity | Sequence[Sparsity | None] = DEFAULT_SPARSITY, batch_invariant: bool = False,
                 calibrated: Calibrated | None = None, load_policy: LoadPolicy | None = None,
                 tuned: Tuned | None = None, adapt: bool = False, warmup: bool = True, progress: bool = True) -> None:
        source, dtype, defaults = engine_config.source_of(model, dtype)
        self.config = source.config
        self.tokenizer = tokenizer
        self.generation_config: GenerationDefaults = generation_config or defaults
        if batch_invariant:
            if limits is not None or speculation is not None:
                raise UserError("batch_invariant decides the shapes: give neither limits nor speculation with it")
            policy = engine_config.invariant_policy(policy, max_batch_size)
        if adapt and (dp_size > 1 or load_policy is not None):
            raise UserError("adapt=True is for one replica: give neither dp_size nor load_policy with it")
        self.tuned = tuned if limits is None and policy is DEFAULT_POLICY else None
        if self.tuned:
            policy = self.tuned.policy
        if speculation is not None and draft_tokens is None:
            draft_tokens = limits.draft_tokens if limits else 8 if speculation == NGRAM else 4
        self.limits = limits or engine_config.limits_for(self.config, max_batch_size, max_seq_len, policy,
                                                         batch_invariant, draft_tokens or 0,
                                                         self.tuned and self.tuned.grid)
        if (self.limits.draft_tokens or None) != draft_tokens or (draft_tokens is None) != (speculation is None):
            raise UserError(f"draft_tokens={draft_tokens} with limits for {self.limits.draft_tokens} and "
                            f"speculation={speculation!r}: these do not go together")
        vocab_limit = min(len(tokenizer), self.config.vocab_size) if tokenizer else self.config.vocab_size
        self.precision = engine_config.precision_of(self.config, fp8_enabled, kv_cache_dtype, calibrated)
        if fp8_enabled and not multiplies_fp8():
            engine_config.say_without_fp8()
        eight_bit = self.precision.eight_bit
        table = bucket_table(self.limits, policy, "f32" if dtype == np.float32 else "bf16", eight_bit)
        draft = engine_config.draft_of(speculation, self.config, vocab_limit, dtype)
        self.sparsity = engine_config.sparsity_of(sparsity, self.config)
        directory = default_cache_dir() if cache_dir is ... else cache_dir and Path(cache_dir)
        self._blueprint = Blueprint(
            self.config, dtype, self.precision, calibrated and calibrated.ranges, table, self.limits, policy,
            self.sparsity, vocab_limit, kv_cache_bytes, prefix_cache, batch_invariant, draft and draft.config,
            directory or None, strict_compiles)
        plan = engine_config.plan_of(self.config, tp_size, pp_size, dp_size, self.limits, dtype, self.precision)
        engine_config.check_processes(plan, load_policy is not None)
        self.deployment = Deployment(plan, self._blueprint)
        self._processes = connect()
        leader = self._processes if isinstance(self._processes, Leader) else None
        kind = partial(LeaderWeights, leader) if leader else VersionedWeights
        self.weights = kind(source, self.deployment.sharding)
        self._draft = draft and VersionedWeights(draft, self.deployment.draft_sharding)
        self.adapters = (partial(LeaderAdapters, leader) if leader else AdapterTable)(
            self.config, self.deployment.sharding.parts, max_adapters, max_adapter_rank, dtype)
        self._arrivals = itertools.count()
        free_bytes = engine_config.free_per_device(self.plan)
        if self._processes:
            free_bytes = min(self._processes.agree("free_bytes", free_bytes))
        self.deployment.build(self.weights, self._draft, self.adapters, free_bytes, self._arrivals, leader)
        self._prepared = {self.plan: self.deployment}
        self.input_processor = InputProcessor(tokenizer, self.generation_config, vocab_limit, self.config.vocab_size,
                                              self.scheduler, self.adapters)
        kind = DRAFT_MODEL if draft else speculation
        self.core = EngineCore(self.deployment.replicas, self.weights, self.adapters,
                         kind and Speculation(kind, self.limits.draft_tokens),
                         Adaptation.of(self.limits, DISPATCH_SECONDS) if adapt else None)
        self._following: FollowerLoop | None = None
        if self._processes:
            check_same(self._processes, self.runner)
        if isinstance(self._processes, Follower):
            self._following = FollowerLoop(self._processes, self.runner, self.weights, self.adapters)
            self.core.refuses = FollowerLoop.REFUSAL
        self._progress = progress
        self._load_policy = load_policy
        if load_policy:
            if self.plan not in (load_policy.latency, load_policy.throughput):
                raise UserError(f"the engine begins with {self.plan}, which is neither of its load_policy's plans")
            self.core.before_step = self._follow_load
        if warmup:
            self.warmup()

    @classmethod
    def from_pretrained(cls, ref: str | Path, *, dtype: Any = "bfloat16", **options: Any) -> Engine:
        """An engine for a Hugging Face folder, a converted checkpoint, a hub id or ``bundled``; options as above.

        How sparse attention is, and what may be 8-bit, the folder may say (``qwen-jax calibrate``); shapes and
        thresholds, the user's cache (``qwen-jax tune``), unless an option or QWEN_JAX_TUNED=0 speaks against it.
        """
        from qwen_jax.checkpoint import (
            load_generation_config,
            load_model,
            load_tokenizer,
            read_calibrated,
            read_sparsity,
            resolve,
        )

        source = resolve(ref)
        if "calibrated" not in options:
            options["calibrated"] = read_calibrated(source.path, source.config)
        for name, load in (("tokenizer", load_tokenizer), ("generation_config", load_generation_config)):
            if name not in options:  # a tokenizer takes seconds to load
                options[name] = load(source)
        if isinstance(options.get("speculation"), str | Path) and options["speculation"] != NGRAM:
            options["speculation"] = load_model(options["speculation"], dtype)
        if "sparsity" not in options and (stored := read_sparsity(source.path, source.config)):
            options["sparsity"] = stored
        if "tuned" not in options:
            options["tuned"] = engine_config.tuned_for(source.config, dtype, options)
        return cls(source, dtype=dtype, **options)

    @classmethod
    def without_weights(cls, ref: str | Path, *, dtype: Any = "bfloat16", **options: Any) -> Engine:
        """What `from_pretrained` makes, with the shapes of the weights in their place: ``runner.compile`` works, to see
        what programs cost, or to have them on disk before a deployment. ``ref`` may also be a preset's name."""
        from qwen_jax.checkpoint import find_config, read_calibrated, read_sparsity, resolve

        config, where = find_config(ref)
        folder = None if where == "preset" else resolve(ref).path
        if folder and "sparsity" not in options and (stored := read_sparsity(folder, config)):
            options["sparsity"] = stored
        if folder and "calibrated" not in options:
            options["calibrated"] = read_calibrated(folder, config)
        if "tuned" not in options:
            options["tuned"] = engine_config.tuned_for(config, dtype, options)
        return cls(empty(config, engine_config.check_dtype(dtype)), dtype=dtype, warmup=False, **options)

    @property
    def plan(self) -> ParallelPlan:
        """Which devices do what."""
        return self.deployment.plan

    @property
    def runner(self) -> Runner:
        """Of the first replica."""
        return self.deployment.replicas[0].runner

    @property
    def scheduler(self) -> Scheduler:
        """Of the first replica."""
        return self.deployment.replicas[0].scheduler

    @property
    def pool(self) -> PagePool:
        """Of the first replica."""
        return self.scheduler.pool

    def warmup(self) -> None:
        """Compile (or load from disk) and run every program once; nothing compiles afterwards. Where there are several
        processes, all of them have to call this."""
        if self._following:
            self._following.warmup(self._progress)
            return
        for runner in self.deployment.runners:
            runner.warmup(self._progress)
        if self._load_policy:
            self.prepare_plan(self._load_policy.latency)
            self.prepare_plan(self._load_policy.throughput)

    # --- several processes

    def follow(self) -> None:
        """In a process other than 0 (see `join`): do what process 0 does, until it closes its engine or ends. When one
        of the processes dies, all end with a message and exit code 1."""
        if not self._following:
            raise UserError("follow() is for the processes beside process 0, of which this is none")
        self._following.run()

    def close(self) -> None:
        """In process 0: lets the others return from `follow`; no step runs afterwards. They also return when this
        process ends, and where there is one process, this has nothing to do."""
        if isinstance(self._processes, Leader):
            self._processes.close()
            self.core.refuses = "the engine is closed"

    def _only_here(self) -> None:
        if self.core.refuses:
            raise UserError(self.core.refuses)

    # --- plans

    def prepare_plan(self, plan: ParallelPlan) -> None:
        """Compile (or load from disk) what `reshard` to a plan needs: programs, and what moves pages between it and the
        others. Requests wait meanwhile."""
        if self._processes:
            raise UserError("an engine of several processes keeps its plan: it cannot prepare or go to another")
        if plan not in self._prepared:
            deployment = Deployment(plan, self._blueprint)
            free = engine_config.free_per_device(plan, beside=deployment.bytes_per_device)
            deployment.build(self.weights, self._draft, self.adapters, free, self._arrivals)
            self._prepared[plan] = deployment
        for deployment in self._prepared.values():
            resharding.prepare(deployment, self._progress)

    def reshard(self, plan: ParallelPlan) -> None:
        """Go on by another plan, between two steps and with requests in flight, whose keys and values move along.

        Nothing is compiled where `prepare_plan` has been called; else it is called now. A request for which there is
        no room any more waits, and its tokens are computed again. Kept pages that no request uses are dropped.
        """
        if plan == self.plan:
            return
        self.prepare_plan(plan)
        resharding.move(self.core, self.deployment, self._prepared[plan], self._draft)
        self.deployment = self._prepared[plan]
        self.input_processor.scheduler = self.scheduler

    def _follow_load(self) -> None:
        load = sum(replica.scheduler.num_sequences for replica in self.deployment.replicas)
        if target := self._load_policy.decide(self.plan, load, self.core.clock()):
            self.reshard(target)

    # --- requests

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Make a PEFT adapter available to requests as ``name``, between two steps and without compiling anything."""
        self._only_here()
        self.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Free an adapter's slot; refused while requests use it."""
        self._only_here()
        self.adapters.unload(name)

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 params: SamplingParams | Sequence[SamplingParams] | None = None,
                 adapter: str | Sequence[str | None] | None = None) -> list[RequestOutput]:
        """Answer every prompt. Answers are in the order of the prompts, ``n`` of them for each.

        ``prompts``: texts or lists of token ids, or a single one. ``params`` and ``adapter`` (the name of a loaded
        adapter, or None): for all, or one for each.
        Every request is checked before any runs. Raises UserError for a bad one.
        """
        prompts = [prompts] if is_single(prompts) else list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"{len(each)} SamplingParams for {len(prompts)} prompts: give one, or one for each prompt")
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(prompts):
            raise UserError(f"{len(names)} adapters for {len(prompts)} prompts: give one, or one for each prompt")
        requests = [r for prompt, one, name in zip(prompts, each, names, strict=True)
                    for r in self.input_processor.requests(prompt, one, adapter=name)]
        self.core.complete(requests)
        return [request.output for request in requests]

    def chat(self, messages: Messages | Sequence[Messages], params: SamplingParams | None = None,
             adapter: str | Sequence[str | None] | None = None) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the checkpoint's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        return self.generate(list(map(self.input_processor.tokens, conversations)), params, adapter)

    def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None,
               adapter: str | None = None) -> Iterator[Delta]:
        """Answer a prompt or a conversation piece by piece. Closing the iterator aborts the request."""
        params = params or SamplingParams()
        if params.n != 1:
            raise UserError(f"stream gives one answer: n must be 1, not {params.n}")
        return self._stream(self.input_processor.requests(prompt, params, adapter=adapter)[0])

    def _stream(self, request: Request) -> Iterator[Delta]:
        request.streams = True
        self.core.submit([request])
        try:
            while True:
                while request.deltas:
                    yield request.deltas.popleft()
                if request.closed:
                    return
                self.core.step()
        finally:
            self.core.abort(request.sequence.request_id)

    def classify(self, prompts: Prompt | Sequence[Prompt], labels: Sequence[str | Sequence[int]],
                 adapter: str | None = None) -> np.ndarray:
        """Probability of each label as the continuation of each prompt: float32 ``[B, len(labels)]``, rows sum to 1.

        A label's weight is the product of its tokens' probabilities after the prompt; no text is generated. Labels of
        one token each take one pass over a prompt for all of them, others one for each.
        """
        if len(labels) < 2:
            raise UserError("classify needs at least two labels")
        prompts = [self.input_processor.tokens(prompt) for prompt in ([prompts] if is_single(prompts) else prompts)]
        endings = [self.input_processor.tokens(label) for label in labels]
        logits = np.full((len(prompts), len(labels)), np.nan)
        if all(len(ending) == 1 for ending in endings):
            for row, output in enumerate(self.generate(prompts, FIRST_TOKEN, adapter)):
                likely = output.logprobs[0] if output.logprobs else {}
                logits[row] = [likely.get(token, np.nan) for token, in endings]
        rest = np.flatnonzero(np.isnan(logits).any(axis=1))  # a label is not among the likely tokens, or has several
        scores = self.score([prompts[row] for row in rest for _ in endings], endings * len(rest), adapter)
        logits[rest] = np.reshape([score.logprob for score in scores], (len(rest), len(labels)))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[Prompt],
              adapter: str | None = None) -> list[Score]:
        """Log-probability of each continuation after its prompt. Only the continuations' logits are computed.

        A prompt and its continuation are encoded apart and must fit into ``max_seq_len`` - 1 tokens together.
        """
        if len(prompts) != len(continuations):
            raise UserError(f"{len(prompts)} prompts and {len(continuations)} continuations: give one for each")
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        requests = []
        tokens = self.input_processor.tokens
        for prompt, continuation in zip(map(tokens, prompts), map(tokens, continuations), strict=True):
            if not prompt or not continuation:
                raise UserError("a score needs at least one token of prompt and one of continuation")
            requests += self.input_processor.requests([*prompt, *continuation], params, len(prompt), adapter)
        self.core.complete(requests)
        return [Score.of(request.output, request.score_from) for request in requests]

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: str = "mean", normalize: bool = True,
              adapter: str | None = None) -> np.ndarray:
        """Embeddings of prompts, float32 ``[B, D]``: of the final hidden states the "mean" over a prompt's tokens, or
        the "last". normalize: to length 1. A prompt may have ``max_seq_len`` - 1 tokens."""
        prompts = [prompts] if is_single(prompts) else list(prompts)
        requests = [request for prompt in prompts
                    for request in self.input_processor.requests(prompt, EMBEDDING, adapter=adapter, pooling=pooling)]
        self.core.complete(requests)
        for request in requests:
            if request.output.error:
                raise RuntimeError(f"an embedding could not be computed: {request.output.error}")
        vectors = np.stack([request.output.embedding for request in requests])
        return unit(vectors) if normalize else vectors

    # --- weights

    @property
    def weight_version(self) -> int:
        """Number of the weights that new requests run with; the first has 0."""
        return self.weights.current

    def update_weights(self, source: Any, policy: str = "finish_old", golden: Golden | None = None,
                       in_place: bool = False) -> int:
        """Other weights of the same architecture, without compiling anything. Returns their version's number.

        They are loaded and checked (names, shapes, NaN and Inf, checksums), tried on golden prompts, and then new
        requests run with them. The version before stays for `rollback`. No request ever mixes versions.

        Args:
          source: a folder, a hub id, ``bundled``, a ``Qwen2`` module or parameters by canonical path.
          policy: "finish_old" lets requests that have begun end with the old weights; "restart" begins them again,
            except those whose answers are being streamed.
          golden: pairs of a prompt and the beginning of its greedy answer; by default any finite answer will do.
          in_place: needs no memory for a second copy. The engine runs dry and pauses meanwhile, golden prompts are not
            tried, and there is no way back.

        Raises UserError, and the old weights stay, when they cannot be used or do not fit into memory.
        """
        self._only_here()
        check_policy(policy)
        if in_place:
            if self._processes:
                raise UserError("in_place=True is not for several processes, of which one could fail half-way")
            if golden is not None or not isinstance(source, str | Path):
                raise UserError("in_place=True takes a checkpoint's folder and no golden prompts")
            return replace_in_place(self.core, source, policy)
        weights, tried = self.weights, golden_requests(self.input_processor, golden)
        version = weights.add(weights.load(source))
        try:
            self.core.complete([request for request, _ in tried], version)
            check_golden(tried)
        except BaseException:
            weights.forget(version)
            raise
        switch(self.core, version, policy)
        return version

    def rollback(self) -> int:
        """Back to the weights before the last update, as with "finish_old"; returns their version's number."""
        self._only_here()
        version = self.weights.other()
        switch(self.core, version, "finish_old")
        return version

    # --- figures

    def stats(self) -> EngineStats:
        """Counters since the engine was made."""
        figures, runner, runners = self.core.counters, self.runner, self.deployment.runners
        schedulers = [replica.scheduler for one in self._prepared.values() for replica in one.replicas]
        speculation, sharding = self.core.speculation, self.deployment.sharding
        buckets = []
        for bucket, usage in figures.usage.items() if runner.ready else ():
            programs = runner.programs(bucket)
            buckets.append(BucketStats(str(bucket), usage.steps, usage.rows, usage.tokens, usage.seconds,
                                       runner.prepare_seconds[bucket], all(one.from_disk for one in programs),
                                       max(one.temp_bytes for one in programs)))

        def total(name: str) -> int:
            return sum(getattr(scheduler, name) for scheduler in schedulers)

        return EngineStats(
            compiles_after_warmup=runner.compiles_after_warmup,
            warmup_seconds=sum(runner.warmup_seconds for runner in runners),
            executables=sum(len(runner.executables.programs) for runner in runners),
            pages_used=sum(one.pool.capacity - one.pool.num_free for one in schedulers),
            pages_total=sum(one.scheduler.pool.capacity for one in self.deployment.replicas),
            running=sum(len(one.running) for one in schedulers), waiting=sum(len(one.waiting) for one in schedulers),
            prompt_tokens=figures.prompt_tokens, generated_tokens=figures.generated_tokens,
            finished=dict(figures.finished), preemptions=total("preemptions"), prefix_queries=total("prefix_queries"),
            prefix_hits=total("prefix_hits"), weight_version=self.weight_version,
            drafted_tokens=speculation.drafted if speculation else 0,
            accepted_tokens=speculation.accepted if speculation else 0,
            sparse_density=figures.attended_pages / figures.visible_pages if figures.visible_pages else 1.0,
            guard_trips=dict(sorted(figures.trips.items())), schedules=dict(figures.schedules),
            unused_slots=sum(one.unused_slots for one in schedulers),
            model_flops=figures.model_flops(self.config),
            bytes_read=figures.bytes_read(weight_bytes_per_step(self.config, sharding.specs, self.precision),
                                          kv_bytes_per_token(self.config, sharding.dtype, self.precision)),
            device_seconds=figures.device_seconds, host_seconds=figures.host_seconds, buckets=tuple(buckets),
            tuned=str(self.tuned.path or "as given") if self.tuned else None,
            adaptation=self.core.adaptation.report() if self.core.adaptation else {},
        )


DeepSeekEngine = Engine  # the name under which the engine was first described
