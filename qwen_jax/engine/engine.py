"""The engine: the loop that joins scheduler, executables and text."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from qwen_jax.config import GenerationDefaults
from qwen_jax.engine import settings
from qwen_jax.engine.adapters import AdapterTable
from qwen_jax.engine.batch import build_batch, dry_run_batch
from qwen_jax.engine.executables import Executables, default_cache_dir, planned, unplanned_compiles
from qwen_jax.engine.intake import Intake, Messages, Prompt, is_single
from qwen_jax.engine.outputs import BucketStats, Delta, EngineStats, RequestOutput
from qwen_jax.engine.pages import PagePool
from qwen_jax.engine.request import Request
from qwen_jax.engine.sampling_params import SamplingParams
from qwen_jax.engine.schedule import DEFAULT_POLICY, FULL, SPARSE, Bucket, Limits, SchedulePolicy, bucket_table
from qwen_jax.engine.scheduler import PlannedRow, Scheduler, StepPlan
from qwen_jax.engine.sequence import State
from qwen_jax.engine.steps import StepOutput, new_state, run_bucket
from qwen_jax.errors import UserError

logger = logging.getLogger(__name__)
SPARSE_NOTE = "computed with full attention: sparse attention is not implemented yet"


class Engine:
    """Text or tokens in, text out, through executables compiled ahead of time for every bucket.

    Args:
      model: a ``Qwen2`` module or a ``transformers.Qwen2ForCausalLM``.
      tokenizer: a transformers fast tokenizer; without one, prompts are token ids and ``text`` stays empty.
      generation_config: defaults of the sampling options and the end-of-sequence ids; a transformers model's own by
        default.
      tp_size, pp_size, fp8_enabled: 1, 1 and False; other values are refused until they are implemented.
      max_batch_size: sequences that run at once.
      max_seq_len: prompt and answer together, in tokens; by default 4096 or the model's context if that is shorter.
      dtype: element type of weights and KV cache, "bfloat16" or "float32"; None keeps the model's.
      kv_cache_bytes: memory for KV pages; by default what ``max_batch_size`` full sequences need, at most a share of
        the free memory.
      limits, policy: the bucket shapes and the schedule's thresholds, as data.
      prefix_cache: keep computed pages for prompts that begin alike (same weights, adapter and attention).
      max_adapters: LoRA adapters that may be loaded at once (`load_adapter`); max_adapter_rank: their largest rank.
      cache_dir: where executables are kept; None keeps none.
      warmup: compile and run every bucket now; else call ``warmup()`` before the first request.
      progress: show progress bars on stderr.

    Raises UserError for settings that cannot work here. One thread at a time may use an engine.
    """

    def __init__(self, model: Any, *, tokenizer: Any = None, generation_config: Any = None, tp_size: int = 1,
                 pp_size: int = 1, fp8_enabled: bool = False, max_batch_size: int = 64, max_seq_len: int | None = None,
                 dtype: Any = None, kv_cache_bytes: int | None = None, limits: Limits | None = None,
                 policy: SchedulePolicy = DEFAULT_POLICY, prefix_cache: bool = True, max_adapters: int = 0,
                 max_adapter_rank: int = 16, cache_dir: str | Path | None | type(...) = ..., warmup: bool = True,
                 progress: bool = True) -> None:
        settings.check_parallelism(tp_size, pp_size, fp8_enabled)
        self.model, defaults = settings.as_module(model, dtype)
        self.config = self.model.config
        self.tokenizer = tokenizer
        self.generation_config: GenerationDefaults = generation_config or defaults
        self._dtype = self.model.embed.weight.dtype
        self.limits = limits or settings.limits_for(self.config, max_batch_size, max_seq_len, policy)
        self._vocab_limit = np.int32(min(len(tokenizer), self.config.vocab_size) if tokenizer else
                                     self.config.vocab_size)
        self.table = bucket_table(self.limits, policy, "f32" if self._dtype == np.float32 else "bf16")
        num_pages = settings.num_pages(self.config, self.limits, self._dtype, kv_cache_bytes)
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(self.table, self.limits, self.pool, policy, prefix_cache)
        self._slots = self.limits.max_batch_size
        self._new_state = partial(new_state, self.config, num_pages, self._slots, self._dtype)

        graph, params = nnx.split(self.model)
        leaves, self._treedef = jax.tree.flatten(params)
        self._graph, self._leaves = graph, tuple(leaves)
        self._state = None
        directory = default_cache_dir() if cache_dir is ... else cache_dir and Path(cache_dir)
        self.adapters = AdapterTable(self.config, max_adapters, max_adapter_rank, self._dtype)
        self.intake = Intake(tokenizer, self.generation_config, int(self._vocab_limit), self.scheduler, self.adapters)
        identity = [repr(self.config), str(self._dtype), num_pages, self._slots, max_adapters, max_adapter_rank]
        self.executables = Executables(self._lower, _program_of, identity, directory or None)

        self.weight_version = 0
        self._requests: dict[int, Request] = {}
        self._failure: Exception | None = None
        self._progress = progress
        self._usage = {bucket: [0, 0, 0, 0.0] for bucket in self.table}  # steps, rows, tokens, seconds
        self._prepared: dict[Bucket, float] = {}
        self._prompt_tokens = self._generated_tokens = 0
        self._warmup_seconds = 0.0
        self._compiles_at_warmup: int | None = None
        if warmup:
            self.warmup()

    @classmethod
    def from_pretrained(cls, ref: str | Path, *, dtype: Any = "bfloat16", **options: Any) -> Engine:
        """An engine for a Hugging Face folder, a converted checkpoint, a hub id or ``bundled``; options as above."""
        from qwen_jax.checkpoint import load_generation_config, load_model, load_tokenizer, resolve

        source = resolve(ref)
        parallel = [options.get(name, default) for name, default in settings.PARALLELISM]
        settings.check_parallelism(*parallel)  # before gigabytes are read
        for name, load in (("tokenizer", load_tokenizer), ("generation_config", load_generation_config)):
            if name not in options:  # a tokenizer takes seconds to load
                options[name] = load(source)
        return cls(load_model(source, dtype), **options)

    # --- getting ready

    def warmup(self) -> None:
        """Compile (or load from disk) and run every program once; nothing compiles afterwards.

        A new program runs on a full row. One from disk has done so before: it runs on none, which a prefill skips.
        """
        began = time.perf_counter()
        with planned():
            if self._state is None:
                self._state = jax.jit(self._new_state)()
            programs = {_program_of(bucket) for bucket in self.table}
            with tqdm(total=len(programs), desc="warm-up", unit="executable", file=sys.stderr,
                      disable=not self._progress) as bar:
                for bucket, program in self.executables.prepare(self.table):
                    self._prepared[bucket] = program.seconds
                    self._run(bucket, dry_run_batch(bucket, self._slots, rows=0 if program.from_disk else 1))
                    how = "loaded" if program.from_disk else "compiled"
                    bar.set_postfix_str(f"{bucket} {how} in {program.seconds:.1f} s")
                    bar.update()
        self._warmup_seconds = time.perf_counter() - began
        self._compiles_at_warmup = unplanned_compiles()

    def _lower(self, bucket: Bucket) -> jax.stages.Lowered:
        def step(leaves, state, batch, vocab_limit, adapters):
            model = nnx.merge(self._graph, jax.tree.unflatten(self._treedef, leaves))
            return run_bucket(model, bucket, state, batch, vocab_limit, adapters)

        batch = dry_run_batch(bucket, self._slots)
        return jax.jit(step, donate_argnums=1).lower(self._leaves, self._state, batch, self._vocab_limit,
                                                     self.adapters.values)

    def _run(self, bucket: Bucket, batch):
        run = self.executables[bucket].run
        self._state, output = run(self._leaves, self._state, batch, self._vocab_limit, self.adapters.values)
        return jax.device_get(output)

    # --- requests

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Make a PEFT adapter available to requests as ``name``, between two steps and without compiling anything."""
        self.adapters.load(name, folder)

    def unload_adapter(self, name: str) -> None:
        """Free an adapter's slot; refused while requests use it."""
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
                    for r in self.intake.requests(prompt, one, adapter=name)]
        return self._complete(requests)

    def chat(self, messages: Messages | Sequence[Messages], params: SamplingParams | None = None,
             adapter: str | Sequence[str | None] | None = None) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the checkpoint's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        return self.generate([self.intake.tokens(conversation) for conversation in conversations], params, adapter)

    def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None,
               adapter: str | None = None) -> Iterator[Delta]:
        """Answer a prompt or a conversation piece by piece. Closing the iterator aborts the request."""
        params = params or SamplingParams()
        if params.n != 1:
            raise UserError(f"stream gives one answer: n must be 1, not {params.n}")
        return self._stream(self.intake.requests(prompt, params, adapter=adapter)[0])

    def _stream(self, request: Request) -> Iterator[Delta]:
        self.submit([request])
        try:
            while True:
                while request.deltas:
                    yield request.deltas.popleft()
                if request.sequence.state is State.FINISHED:
                    return
                self.step()
        finally:
            self._withdraw([request])

    def classify(self, prompts: Prompt | Sequence[Prompt], labels: Sequence[str | Sequence[int]],
                 adapter: str | None = None) -> np.ndarray:
        """Probability of each label as the continuation of each prompt: float32 ``[B, len(labels)]``, rows sum to 1.

        A label's weight is the product of its tokens' probabilities after the prompt; no text is generated.
        """
        if len(labels) < 2:
            raise UserError("classify needs at least two labels")
        prompts = [prompts] if is_single(prompts) else list(prompts)
        endings = [self.intake.tokens(label) for label in labels]
        params = SamplingParams(max_tokens=1, temperature=0.0)
        requests = []
        for prompt in map(self.intake.tokens, prompts):
            for ending in endings:
                requests += self.intake.requests([*prompt, *ending], params, len(prompt), adapter)
        outputs = self._complete(requests)
        scores = [sum(p[t] for t, p in zip(out.prompt_token_ids, out.prompt_logprobs, strict=True) if p)
                  for out in outputs]
        scores = np.array(scores, np.float64).reshape(len(prompts), len(labels))
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

    # --- the loop

    def step(self) -> bool:
        """Run one step for whatever is queued. Returns whether there was work."""
        if self._failure:
            raise RuntimeError("the engine stopped after a failed step; make a new one") from self._failure
        plan = self.scheduler.plan()
        if plan is None:
            return False
        began = time.perf_counter()
        try:
            output = self._run(plan.bucket, build_batch(plan, self._requests, self._slots))
        except BaseException as error:  # the state was given away to the step: nothing can continue from here
            self._failure = error
            raise
        self._account(plan, time.perf_counter() - began)
        ended = self.scheduler.commit(plan, output.sampled.tokens[: len(plan.rows)].tolist())
        for index, row in enumerate(plan.rows):
            request = self._requests[row.seq.request_id]
            try:
                stop = self._deliver(request, row, output, index)
            except Exception as error:  # what one request's text does to us is that request's affair alone
                logger.exception("request %s failed", row.seq.request_id)
                request.output.error = f"{type(error).__name__}: {error}"
                stop = True
            if stop:
                self.scheduler.finish(row.seq, "error" if request.output.error else "stop")
            if stop or row.seq in ended:
                self._close(request)
        return True

    def _deliver(self, request: Request, row: PlannedRow, output: StepOutput, index: int) -> bool:
        """Hands row `index` of a step's output to its request. Returns whether its answer ends here."""
        if output.prompt is not None and request.score_from is not None:
            request.add_prompt_scores(row.start, *(array[index, : row.count] for array in output.prompt))
        if not row.samples:
            return False
        sampled = output.sampled
        token = int(sampled.tokens[index])
        text, stop = request.add_token(token, sampled.logprobs[index], sampled.top_ids[index],
                                       sampled.top_logprobs[index])
        request.deltas.append(Delta(text, [token]))
        return stop

    def abort(self, request_id: int) -> bool:
        """End a request and free its pages at once; False when it is not there any more."""
        request = self._requests.get(request_id)
        if request is None or not self.scheduler.abort(request_id):
            return False
        self._close(request)
        return True

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue what `intake` made; `step` works on it."""
        if not self._prepared:
            raise UserError("the engine is not warmed up: call warmup() first")
        for request in requests:
            request.adapter = self.adapters.acquire(request.adapter_name)
            sequence = request.sequence
            sequence.salt = repr((self.weight_version, self.adapters.identity(request.adapter),
                                  self.scheduler.attention(sequence))).encode()
            if request.score_from is not None:  # logits are needed from the position before on
                sequence.reusable = request.score_from - 1
            self.scheduler.add(sequence)
            self._requests[request.sequence.request_id] = request
            self._prompt_tokens += len(request.sequence.prompt)

    def _complete(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """Run until all of ``requests`` are finished; whatever interrupts takes them out again."""
        try:
            self.submit(requests)
            while any(request.sequence.state is not State.FINISHED for request in requests):
                self.step()
        finally:
            self._withdraw(requests)
        return [request.output for request in requests]

    def _withdraw(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.abort(request.sequence.request_id)

    def _close(self, request: Request) -> None:
        note = SPARSE_NOTE if request.sequence.schedule == SPARSE else ""
        request.deltas.append(request.close(self.weight_version, note))
        self.adapters.release(request.adapter)
        del self._requests[request.sequence.request_id]

    # --- figures

    def _account(self, plan: StepPlan, seconds: float) -> None:
        usage = self._usage[plan.bucket]
        for index, amount in enumerate((1, len(plan.rows), sum(row.count for row in plan.rows), seconds)):
            usage[index] += amount
        self._generated_tokens += sum(row.samples for row in plan.rows)

    def stats(self) -> EngineStats:
        """Counters since the engine was made."""
        buckets = []
        for bucket in self.table if self._prepared else ():
            program = self.executables[bucket]
            buckets.append(BucketStats(str(bucket), *self._usage[bucket], self._prepared.get(bucket, 0.0),
                                       program.from_disk, program.temp_bytes))
        compiles = 0 if self._compiles_at_warmup is None else unplanned_compiles() - self._compiles_at_warmup
        return EngineStats(
            compiles_after_warmup=compiles, warmup_seconds=self._warmup_seconds,
            executables=len(self.executables.programs), pages_used=self.pool.capacity - self.pool.num_free,
            pages_total=self.pool.capacity, running=len(self.scheduler.running), waiting=len(self.scheduler.waiting),
            prompt_tokens=self._prompt_tokens, generated_tokens=self._generated_tokens,
            prefix_queries=self.scheduler.prefix_queries, prefix_hits=self.scheduler.prefix_hits,
            weight_version=self.weight_version, buckets=tuple(buckets),
        )


DeepSeekEngine = Engine  # the name under which the engine was first described


def _program_of(bucket: Bucket) -> Bucket:
    """Until sparse attention has its own implementation, its buckets run full attention's programs."""
    return replace(bucket, schedule=FULL) if bucket.schedule == SPARSE else bucket
