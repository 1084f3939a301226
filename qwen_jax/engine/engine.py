"""Python API of the engine: generate, chat, stream, classify, score, embed and manage its weights."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.config import GenerationDefaults, ModelConfig
from qwen_jax.engine.api.outputs import Delta, RequestOutput, Score, normalized
from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.api.stats import EngineStats
from qwen_jax.engine.config import memory, resolve
from qwen_jax.engine.config.engine_config import EngineConfig
from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.core import resharding
from qwen_jax.engine.core.background_compiler import BackgroundCompiler, compile_job
from qwen_jax.engine.core.computation import computation
from qwen_jax.engine.core.engine_core import DISPATCH_SECONDS, EngineCore
from qwen_jax.engine.core.replica import Deployment
from qwen_jax.engine.core.snapshot import engine_stats
from qwen_jax.engine.core.weight_update import Golden, check_policy, replace_in_place, switch, update_weights
from qwen_jax.engine.frontend.input_processor import (
    CLASSIFICATION_PARAMS,
    EMBEDDING_PARAMS,
    InputProcessor,
    Messages,
    Prompt,
    is_single,
)
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.multihost.channel import Follower, Leader, connect
from qwen_jax.engine.multihost.follower import FollowerLoop
from qwen_jax.engine.multihost.leader import LeaderAdapters, LeaderWeights, check_same
from qwen_jax.engine.runner.model_runner import Runner
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.decode_adaptation import DecodeAdaptation
from qwen_jax.engine.scheduling.page_pool import PagePool
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.speculation import DRAFT_MODEL, NGRAM, Speculation
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.errors import UserError
from qwen_jax.model import Qwen2, empty
from qwen_jax.parallel.plan import ParallelPlan
from qwen_jax.quantization import Precision

if TYPE_CHECKING:
    from qwen_jax.checkpoint import Source


class Engine:
    """Inference engine for one model, with programs that are compiled ahead of time for every batch shape.

    Args:
      model: a ``Qwen2`` module, a ``transformers.Qwen2ForCausalLM``, or a checkpoint that `checkpoint.resolve` found.
      tokenizer: a transformers fast tokenizer, or a future of one; without one, prompts are token ids and ``text``
        stays empty.
      generation_config: defaults of the sampling options and the end-of-sequence ids, to which the tokenizer's own is
        added; a transformers model's own by default.
      config, options: an `EngineConfig`, or its fields as keyword arguments.

    Raises UserError for options that cannot work here. One thread at a time may use an engine.
    """

    def __init__(self, model: Any, *, tokenizer: Any = None, generation_config: GenerationDefaults | None = None,
                 config: EngineConfig | None = None, **options: Any) -> None:
        if config is not None and options:
            raise UserError(f"give config or options, not both: {', '.join(options)} would be ignored")
        options = config or EngineConfig.of(options)
        options = replace(options, weights=resolve.chosen_weights(options.weights, options.fp8_enabled))
        self._options = options
        source, dtype, defaults = resolve.source_of(model, options.dtype)
        self.config, self.generation_config = source.config, generation_config or defaults
        draft = resolve.draft_of(options.speculation, dtype)
        self._resolved = resolve.resolve(options, self.config, dtype, draft and draft.config)
        plan = resolve.plan_of(options, self._resolved)
        resolve.check_processes(plan, options.load_policy is not None)
        resolve.check_load_policy(options.load_policy, plan)
        self._processes = connect()
        mode = resolve.warmup_mode(options, self._processes is not None)
        self.deployment = Deployment(plan, self._resolved)
        self._prepared = {plan: self.deployment}
        self._make_replicas(draft, to_load=0 if isinstance(source, Qwen2) else self.deployment.bytes_per_device)
        with self._compiling_first(mode is not None and not self._processes):
            self.weights.read_first(source)
            if self._draft:
                self._draft.read_first(draft)
            self.tokenizer = tokenizer.result() if isinstance(tokenizer, Future) else tokenizer
        self.generation_config = resolve.with_end_of(self.tokenizer, self.generation_config)
        self._vocab_limit = resolve.vocab_limit_of(self.tokenizer, self.config, draft and draft.config)
        self.deployment.limit_vocab(self._vocab_limit)
        self.input_processor = InputProcessor(
            self.tokenizer, self.generation_config, self._vocab_limit, self.config.vocab_size,
            scheduler=self.scheduler, adapters=self.adapters)
        self.core = self._make_core()
        self._compiler: BackgroundCompiler | None = None
        if mode:
            self._warm_up(everything=mode == "full")

    def _make_replicas(self, draft: Qwen2 | None, to_load: int) -> None:
        """Make the replicas, the table of LoRA adapters, and the versions of the weights, of which none is loaded yet.

        to_load: bytes of weights that each device does not hold yet.
        """
        leader = self._processes if isinstance(self._processes, Leader) else None
        weights = partial(LeaderWeights, leader) if leader else VersionedWeights
        adapters = partial(LeaderAdapters, leader) if leader else AdapterTable
        self.weights = weights(self.config, self.deployment.sharding)
        self._draft = draft and VersionedWeights(draft.config, self.deployment.draft_sharding)
        self.adapters = adapters(self.config, self.deployment.sharding.shards, self._options.max_adapters,
                                 self._options.max_adapter_rank, self._resolved.dtype)
        self._arrivals = itertools.count()
        free_bytes = memory.free_per_device(self.plan, to_load)
        if self._processes:
            free_bytes = min(self._processes.agree("free_bytes", free_bytes))
        self.deployment.build(self.weights, self._draft, self.adapters, free_bytes=free_bytes,
                              arrivals=self._arrivals, leader=leader)
        self._follower: FollowerLoop | None = None
        if self._processes:
            check_same(self._processes, self.runner)
        if isinstance(self._processes, Follower):
            self._follower = FollowerLoop(self._processes, self.runner, self.weights, self.adapters)

    @contextlib.contextmanager
    def _compiling_first(self, wanted: bool) -> Iterator[None]:
        """Compile the first programs beside what the ``with`` block loads: they need the shapes of weights alone."""
        if not wanted:
            yield
            return
        with ThreadPoolExecutor(1) as thread:
            compiling = [thread.submit(runner.programs.prepare_smallest) for runner in self.deployment.runners]
            try:
                yield
            except BaseException:
                thread.shutdown(wait=False, cancel_futures=True)
                raise
        for future in compiling:
            future.result()

    def _make_core(self) -> EngineCore:
        speculation = DRAFT_MODEL if self._draft else self._options.speculation
        return EngineCore(
            self.deployment.replicas, self.weights, self.adapters,
            speculation=speculation and Speculation(speculation, self.limits.draft_tokens),
            adaptation=DecodeAdaptation(self.limits.decode_rows, self.limits.decode_steps, DISPATCH_SECONDS)
            if self._options.adapt else None,
            before_step=self._follow_load if self._options.load_policy else None,
            refusal=FollowerLoop.REFUSAL if self._follower else None)

    @classmethod
    def from_pretrained(cls, ref: str | Path, *, dtype: Any = "bfloat16", **options: Any) -> Engine:
        """Make an engine for a Hugging Face folder, a converted checkpoint, a hub id or ``bundled``.

        Options are those of `Engine`. Options that are not given are read from the folder (``qwen-jax calibrate``:
        sparsity, and which parts may be 8-bit) and from the user's cache (``qwen-jax tune``: shapes and thresholds,
        unless QWEN_JAX_TUNED=0).
        """
        from qwen_jax.checkpoint import load_generation_config, load_tokenizer
        from qwen_jax.checkpoint import resolve as find_source

        source = find_source(ref)
        if "generation_config" not in options:
            options["generation_config"] = load_generation_config(source)
        if "tokenizer" not in options:  # which takes seconds to load
            with ThreadPoolExecutor(1) as thread:
                return cls._from_source(source, dtype, {**options, "tokenizer": thread.submit(load_tokenizer, source)})
        return cls._from_source(source, dtype, options)

    @classmethod
    def _from_source(cls, source: Source, dtype: Any, options: dict[str, Any]) -> Engine:
        from qwen_jax.checkpoint import load_model

        if isinstance(options.get("speculation"), str | Path) and options["speculation"] != NGRAM:
            options["speculation"] = load_model(options["speculation"], dtype)
        return cls(source, dtype=dtype, **_measured(options, source.config, source, dtype))

    @classmethod
    def without_weights(cls, ref: str | Path, *, dtype: Any = "bfloat16", **options: Any) -> Engine:
        """Make an engine as `from_pretrained` does, but without loading weights: it knows their shapes alone.

        ``runner.compile`` works: it shows what programs cost, or keeps them on disk before a deployment. ``ref`` may
        also be the name of a preset.
        """
        from qwen_jax.checkpoint import find_config
        from qwen_jax.checkpoint import resolve as find_source

        config, where = find_config(ref)
        source = None if where == "preset" else find_source(ref)
        options = _measured(options, config, source, dtype)
        return cls(empty(config, resolve.check_dtype(dtype)), dtype=dtype, warmup=False, **options)

    @property
    def limits(self) -> Limits:
        """Maximum sizes of requests and batches, and the batch shapes that programs are compiled for."""
        return self._resolved.limits

    @property
    def precision(self) -> Precision:
        """Parts of the model that are 8-bit: which weights, and keys and values of which layers."""
        return self._resolved.precision

    @property
    def sparsity(self) -> tuple[Sparsity | None, ...]:
        """Settings of sparse attention, one for each layer."""
        return self._resolved.sparsity

    @property
    def tuned(self) -> Tuned | None:
        """Shapes and thresholds that `qwen-jax tune` found, if the engine uses them."""
        return self._resolved.tuned

    @property
    def plan(self) -> ParallelPlan:
        """Parallel plan that the engine runs under now."""
        return self.deployment.plan

    @property
    def computation(self) -> dict[str, str]:
        """All that decides its answers beside weights, adapters and requests, by name: options, versions, devices."""
        return computation(self._options, self._resolved, self.plan)

    @property
    def runner(self) -> Runner:
        """Runner of the first replica, which executes the compiled programs."""
        return self.deployment.replicas[0].runner

    @property
    def scheduler(self) -> Scheduler:
        """Scheduler of the first replica, which chooses the requests of each step."""
        return self.deployment.replicas[0].scheduler

    @property
    def pool(self) -> PagePool:
        """Pool of the KV cache's pages in the first replica."""
        return self.scheduler.pool

    def warmup(self) -> None:
        """Compile (or load from disk) every program that is not there yet, and wait until all are.

        Every process of an engine of several processes must call it.
        """
        if self._compiler:
            self._compiler.join()
        self._warm_up(everything=True)

    def _warm_up(self, everything: bool) -> None:
        """Prepare programs and run each once: all of them, or the few that answer any request and the others later."""
        if self._follower:
            self._follower.warmup(self._options.progress)
            return
        for runner in self.deployment.runners:
            runner.warmup(self._options.progress, everything)
        if not everything and self.programs_to_come:
            job = compile_job(self._resolved, self.plan, self.deployment.pages, self.adapters.identity_of_shapes)
            self._compiler = BackgroundCompiler(self.deployment.runners, job)
            weakref.finalize(self, self._compiler.stop)
        if self._options.load_policy:
            self.prepare_plan(self._options.load_policy.latency)
            self.prepare_plan(self._options.load_policy.throughput)

    @property
    def programs_to_come(self) -> int:
        """Number of programs that are still being compiled or loaded in the background."""
        return self.deployment.programs_to_come

    def when_program_arrives(self, call: Callable[[], None]) -> None:
        """Have a function called, on a thread of its own, now and whenever a program has arrived in the background."""
        for runner in self.deployment.runners:
            runner.programs.on_arrival = call
        call()

    # --- several processes

    def follow(self) -> None:
        """Run the same steps as process 0 until it closes its engine or ends; for the other processes (see `join`).

        When a process dies, all of them end with a message and exit code 1.
        """
        if not self._follower:
            raise UserError("follow() is for the processes beside process 0, of which this is none")
        self._follower.run()

    def close(self) -> None:
        """End an engine of several processes, in process 0: no step runs any more, and the others return from `follow`.

        They return too when process 0 ends. With one process, nothing happens.
        """
        if isinstance(self._processes, Leader):
            self._processes.close()
            self.core.close("the engine is closed")

    def _only_here(self) -> None:
        if self.core.refusal:
            raise UserError(self.core.refusal)

    # --- plans

    def prepare_plan(self, plan: ParallelPlan) -> None:
        """Compile (or load from disk) the programs that `reshard` to a parallel plan needs. Requests wait meanwhile."""
        if self._processes:
            raise UserError("an engine of several processes keeps its plan: it cannot prepare or go to another")
        if plan not in self._prepared:
            deployment = Deployment(plan, self._resolved)
            free = memory.free_per_device(plan, deployment.bytes_per_device, only=True)
            deployment.build(self.weights, self._draft, self.adapters, free_bytes=free, arrivals=self._arrivals)
            deployment.limit_vocab(self._vocab_limit)
            self._prepared[plan] = deployment
        for deployment in self._prepared.values():
            resharding.prepare(deployment, self._options.progress)

    def reshard(self, plan: ParallelPlan) -> None:
        """Change to another parallel plan between two steps. Running requests go on: their keys and values move along.

        Nothing is compiled after `prepare_plan`; without it, it is called now. A request without room under the new
        plan waits, and its tokens are computed again. Cached pages that no request uses are dropped.
        """
        if plan == self.plan:
            return
        self.prepare_plan(plan)
        resharding.move(self.core, self.deployment, self._prepared[plan], self._draft)
        self.deployment = self._prepared[plan]
        self.input_processor.scheduler = self.scheduler

    def _follow_load(self) -> None:
        """Change to the parallel plan that the load policy chooses for the present number of requests."""
        load = sum(replica.scheduler.num_sequences for replica in self.deployment.replicas)
        if target := self._options.load_policy.decide(self.plan, load, self.core.clock()):
            self.reshard(target)

    # --- requests

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load a LoRA adapter in PEFT's format, which requests then use as ``name``. Nothing is compiled."""
        self._only_here()
        self.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Unload a LoRA adapter; UserError while requests use it."""
        self._only_here()
        self.adapters.unload(name)

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 params: SamplingParams | Sequence[SamplingParams] | None = None,
                 adapter: str | Sequence[str | None] | None = None) -> list[RequestOutput]:
        """Answer every prompt. Answers are in the order of the prompts, ``n`` of them for each.

        Args:
          prompts: texts or lists of token ids, or a single prompt.
          params, adapter: sampling options, and names of loaded adapters; for all prompts, or a list with one for each.

        Raises UserError for a bad request, before any of them runs.
        """
        prompts = [prompts] if is_single(prompts) else list(prompts)
        params = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise UserError(f"{len(params)} SamplingParams for {len(prompts)} prompts: give one, or one for each")
        names = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(prompts):
            raise UserError(f"{len(names)} adapters for {len(prompts)} prompts: give one, or one for each")
        requests = [request for prompt, own_params, name in zip(prompts, params, names, strict=True)
                    for request in self.input_processor.requests(prompt, own_params, adapter=name)]
        return self._complete(requests)

    def _complete(self, requests: list[Request], product: str | None = None) -> list[RequestOutput]:
        """Run requests to their ends and return their outputs.

        product: name of what they compute, for RuntimeError with the reason where a request ended with an error; None
          returns the outputs of these too.
        """
        self.core.complete(requests)
        outputs = [request.output for request in requests]
        failed = next((output.error for output in outputs if product and output.error), None)
        if failed:
            raise RuntimeError(f"{product} could not be computed: {failed}")
        return outputs

    def chat(self, messages: Messages | Sequence[Messages], params: SamplingParams | None = None,
             adapter: str | Sequence[str | None] | None = None) -> list[RequestOutput]:
        """Answer a conversation, or each conversation of a list, through the checkpoint's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        return self.generate(list(map(self.input_processor.tokens, conversations)), params, adapter)

    def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None,
               adapter: str | None = None) -> Iterator[Delta]:
        """Answer a prompt or a conversation piece by piece. Closing the iterator aborts the request."""
        params = params or SamplingParams()
        if params.n != 1:
            raise UserError(f"stream gives one answer: n must be 1, not {params.n}")
        return self._stream(self.input_processor.requests(prompt, params, adapter=adapter, streams=True)[0])

    def _stream(self, request: Request) -> Iterator[Delta]:
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
        """Return the probability of each label after each prompt: float32 ``[B, len(labels)]``, rows sum to 1.

        A label's weight is the product of its tokens' probabilities after the prompt; no text is generated. If every
        label is a single token, one pass over a prompt is enough; else there is one pass for each label.
        """
        if len(labels) < 2:
            raise UserError("classify needs at least two labels")
        prompts = [self.input_processor.tokens(prompt) for prompt in ([prompts] if is_single(prompts) else prompts)]
        endings = [self.input_processor.tokens(label) for label in labels]
        logits = np.full((len(prompts), len(labels)), np.nan)
        if all(len(ending) == 1 for ending in endings):
            requests = [request for prompt in prompts for request in self.input_processor.requests(
                prompt, CLASSIFICATION_PARAMS, adapter=adapter)]
            for row, output in enumerate(self._complete(requests, "a classification")):
                logits[row] = [output.logprobs[0].get(token, np.nan) for token, in endings]
        rest = np.flatnonzero(np.isnan(logits).any(axis=1))  # a label is not among the likely tokens, or has several
        scores = self.score([prompts[row] for row in rest for _ in endings], endings * len(rest), adapter)
        logits[rest] = np.reshape([score.logprob for score in scores], (len(rest), len(labels)))
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

    def score(self, prompts: Sequence[Prompt], continuations: Sequence[Prompt],
              adapter: str | None = None) -> list[Score]:
        """Return the log-probability of each continuation after its prompt.

        Only the continuations' logits are computed.

        A prompt and its continuation are encoded apart and must fit into ``max_seq_len`` - 1 tokens together.
        """
        if len(prompts) != len(continuations):
            raise UserError(f"{len(prompts)} prompts and {len(continuations)} continuations: give one for each")
        requests = [request for prompt, continuation in zip(prompts, continuations, strict=True)
                    for request in self.input_processor.score_requests(prompt, continuation, adapter)]
        outputs = self._complete(requests, "a score")
        return [Score.from_output(output, request.score_from)
                for request, output in zip(requests, outputs, strict=True)]

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: str = "mean", normalize: bool = True,
              adapter: str | None = None) -> np.ndarray:
        """Return the embedding of each prompt: float32 ``[B, D]``.

        Args:
          prompts: texts or lists of token ids, of at most ``max_seq_len`` - 1 tokens, or a single prompt.
          pooling: "mean" over a prompt's final hidden states, or the "last" of them.
          normalize: scale each embedding to length 1.
        """
        prompts = [prompts] if is_single(prompts) else list(prompts)
        requests = [request for prompt in prompts for request in self.input_processor.requests(
            prompt, EMBEDDING_PARAMS, adapter=adapter, pooling=pooling)]
        vectors = np.stack([output.embedding for output in self._complete(requests, "an embedding")])
        return normalized(vectors) if normalize else vectors

    # --- weights

    @property
    def weight_version(self) -> int:
        """Number of the weights that new requests run with; the first weights have 0."""
        return self.weights.current

    def update_weights(self, source: Any, policy: str = "finish_old", golden: Golden | None = None,
                       in_place: bool = False) -> int:
        """Replace the weights by others of the same architecture, without compiling. Returns the new version's number.

        The weights are loaded and checked (names, shapes, NaN and Inf, checksums) and tried on golden prompts; then new
        requests run with them. The version before stays for `rollback`. No request ever mixes versions.

        Args:
          source: a folder, a hub id, ``bundled``, a ``Qwen2`` module or parameters by canonical path.
          policy: "finish_old" lets requests that have begun end with the old weights; "restart" begins them again,
            except those whose answers are being streamed.
          golden: pairs of a prompt and the beginning of its greedy answer; by default any finite answer will do.
          in_place: replace the parameters one by one, without memory for a second copy. The engine finishes its
            requests first and pauses, golden prompts are not tried, and `rollback` is impossible.

        Raises UserError for weights that cannot be used or do not fit into memory; then the old ones stay.
        """
        self._only_here()
        check_policy(policy)
        if in_place:
            if self._processes:
                raise UserError("in_place=True is not for several processes, of which one could fail half-way")
            if golden is not None or not isinstance(source, str | Path):
                raise UserError("in_place=True takes a checkpoint's folder and no golden prompts")
            return replace_in_place(self.core, source, policy)
        return update_weights(self.core, self.input_processor, source, policy, golden)

    def rollback(self) -> int:
        """Go back to the weights before the last update (policy "finish_old"). Returns their version's number."""
        self._only_here()
        version = self.weights.other()
        switch(self.core, version, "finish_old")
        return version

    # --- counters

    def stats(self) -> EngineStats:
        """Return the engine's counters since it was made: requests, tokens, pages, seconds."""
        return engine_stats(self.core, self.deployment, self._prepared.values(), self._resolved)


def _measured(options: dict[str, Any], config: ModelConfig, source: Source | None, dtype: Any) -> dict[str, Any]:
    """Return ``options`` completed by stored results of calibration (of ``source``) and tuning (for this device)."""
    from qwen_jax.checkpoint import read_calibrated, read_sparsity

    options = dict(options)
    if source and "calibrated" not in options:
        options["calibrated"] = read_calibrated(source, config)
    if source and "sparsity" not in options and (stored := read_sparsity(source, config)):
        options["sparsity"] = stored
    if "tuned" not in options:
        options["tuned"] = resolve.tuned_for(config, dtype, options)
    return options


DeepSeekEngine = Engine  # the name under which the engine was first described
