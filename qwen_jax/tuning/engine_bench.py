"""Timing of an engine's steps and of whole request traces, under changing shapes of steps in one process."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from qwen_jax.engine.compiled.compile_counter import planned
from qwen_jax.engine.config.memory import platform
from qwen_jax.engine.config.tuned import Tuned, jax_version, path_of, subject, write_json
from qwen_jax.engine.core.counters import Usage
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.runner.padded_batch import dry_run_batch
from qwen_jax.engine.scheduling.buckets import Bucket, Limits, bucket_table, default_limits
from qwen_jax.engine.scheduling.page_pool import PagePool
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.tuning.step_costs import Cost
from qwen_jax.tuning.workloads import Trace

logger = logging.getLogger(__name__)

MAX_STEPS = 32  # most tokens per row and dispatch of the timed programs
REPEATS, MAX_SECONDS = 7, 2.0  # repetitions of a timing, and the time after which no further repetition starts
DECODE_TOKENS = 4  # tokens of the longer decode step, which shows the cost of each token after the first


class EngineBench:
    """Times on one engine single steps, and whole request traces under given tuning choices.

    Every measured cost is written at once to a journal beside the tuned file, and read again after an interruption.

    Args:
      ref: the model.
      dtype, fp8_enabled, max_batch_size, max_seq_len, progress: as for `Engine`.

    Attributes:
      about: device, model shape and element type that are measured (`tuned.subject`).
      path: path of the tuned file.
      costs: measured cost of each bucket, by `cost_key`.
    """

    def __init__(self, ref: str, dtype: str = "bfloat16", fp8_enabled: bool = False, max_batch_size: int = 64,
                 max_seq_len: int | None = None, progress: bool = True) -> None:
        self.engine = Engine.from_pretrained(ref, dtype=dtype, fp8_enabled=fp8_enabled, max_batch_size=max_batch_size,
                                             max_seq_len=max_seq_len, tuned=None, tokenizer=None, prefix_cache=False,
                                             warmup="full", progress=progress)
        self.default = self.engine.limits
        self.max_batch_size, self.max_seq_len = self.default.max_batch_size, self.default.max_seq_len
        self.num_pages = self.engine.pool.num_pages
        self.about = subject(self.engine.config, dtype, fp8_enabled)
        self.path = path_of(self.about)
        self._precision = "f32" if dtype == "float32" else "bf16"
        self._eight_bit = self.engine.precision.eight_bit
        self._journal = self.path.with_suffix(".measured")
        self._key = {"about": self.about, "jax": jax_version(), "pages": self.num_pages,
                     "sizes": [self.max_batch_size, self.max_seq_len]}
        self._salt = 0
        self.costs: dict[Bucket, Cost] = {}
        self._kept = self._read_journal()

    # --- shapes

    def limits(self, tuned: Tuned) -> Limits:
        """Return the limits (sizes and shapes of steps) that the engine has under these tuning choices."""
        return default_limits(self.max_batch_size, self.max_seq_len, platform(), tuned.policy, grid=tuned.grid)

    def table(self, tuned: Tuned) -> tuple[Bucket, ...]:
        """Return the engine's buckets under these tuning choices. UserError where no engine could run them."""
        return bucket_table(self.limits(tuned), tuned.policy, self._precision, self._eight_bit)

    # --- single steps

    def measure(self, bucket: Bucket) -> Cost:
        """Return the measured cost of a bucket's step; compile and time its program unless the cost is known."""
        bucket = cost_key(bucket)
        if bucket not in self.costs:
            stored = self._kept.get(repr(bucket))
            self.costs[bucket] = Cost(**stored) if stored else self._time(bucket)
            if not stored:
                self._kept[repr(bucket)] = asdict(self.costs[bucket])
                write_json(self._journal, self._key | {"costs": self._kept})
        return self.costs[bucket]

    def forget(self) -> None:
        """Remove the journal of measured costs, after a result has been written."""
        self._journal.unlink(missing_ok=True)

    def prepare_measuring(self, buckets: Iterable[Bucket]) -> None:
        """Compile together the programs that `measure` needs for buckets whose cost is not known."""
        self.prepare(timed_program(bucket) for bucket in buckets if repr(cost_key(bucket)) not in self._kept)

    def prepare(self, buckets: Iterable[Bucket]) -> None:
        """Compile the programs of these buckets that have not been compiled."""
        with planned():
            for bucket in dict.fromkeys(buckets):
                for _ in self.engine.runner.executables.prepare(self.engine.runner.steps.keys(bucket)):
                    pass

    def _time(self, bucket: Bucket) -> Cost:
        """Measure a bucket's cost: time steps on a short and a long context, and decode steps of several tokens."""
        decode = bucket.phase == "decode"
        self.prepare([timed_program(bucket)])
        short = self.engine.core.replicas[0].scheduler.policy.sparse_above_tokens if bucket.schedule == SPARSE else (
            64 if decode else 0)
        long = self.max_seq_len - max(bucket.tokens, DECODE_TOKENS)
        short = max(0, min(short, long))
        points = [(short, 1), (short, DECODE_TOKENS), (long, 1)] if decode else [(short, 1), (long, 1)]
        points = list(dict.fromkeys(points))
        times: dict[tuple[int, int], list[float]] = {point: [] for point in points}
        for point in points:
            self._step(timed_program(bucket), *point)
        began = time.perf_counter()
        for _ in range(REPEATS):
            for point in points:
                times[point].append(self._step(timed_program(bucket), *point))
            if time.perf_counter() - began > MAX_SECONDS:
                break
        medians = {point: statistics.median(values) for point, values in times.items()}
        base = medians[short, 1]
        return Cost.through(short=short, long=long, base=base, further=medians.get((short, DECODE_TOKENS), base),
                            far=medians[long, 1], steps=DECODE_TOKENS)

    def _step(self, bucket: Bucket, context: int, steps: int) -> float:
        """Run a step of a bucket with all rows in use, and return its seconds.

        context: tokens of each row before the step. steps: tokens per row that a decode step generates. The pages that
        the step uses belong to no request.
        """
        runner = self.engine.runner
        batch = dry_run_batch(bucket, self.max_batch_size, self.engine.config.vocab_size, bucket.rows)
        batch.start[:], batch.length[:], batch.counts[:] = context, context + bucket.tokens, steps
        batch.prompt_length[:] = context + bucket.tokens
        for row, pages in enumerate(batch.page_table):
            pages[:] = [1 + (row * len(pages) + index) % (self.num_pages - 1) for index in range(len(pages))]
        began = time.perf_counter()
        runner.finish(runner.start(bucket, batch, self.engine.weight_version))
        return time.perf_counter() - began

    def _read_journal(self) -> dict[str, Any]:
        """Read the costs that an interrupted run measured, by bucket; none when there is no journal for this engine."""
        try:
            stored = json.loads(self._journal.read_text())
            costs = stored.pop("costs")
            if json.loads(json.dumps(self._key)) == stored:
                [Cost(**cost) for cost in costs.values()]
                return costs
            logger.warning("%s belongs to another engine: measuring anew", self._journal)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s cannot be read (%s): measuring anew", self._journal, error)
        return {}

    # --- traces

    def run(self, tuned: Tuned, trace: Trace) -> float:
        """Answer all requests of a trace under these tuning choices, and return the seconds without compiling."""
        engine, limits = self.engine, self.limits(tuned)
        table = tuple(map(timed_program, self.table(tuned)))  # the limits bound the tokens of a dispatch
        self.prepare(table)
        for bucket in table:
            engine.core.counters.usage.setdefault(bucket, Usage())
        replica = engine.core.replicas[0]
        own, replica.step_seconds = replica.scheduler, None
        wide_pool = own.wide_pool and PagePool(own.wide_pool.num_pages)
        replica.scheduler = engine.input_processor.scheduler = Scheduler(
            table, limits, PagePool(self.num_pages), tuned.policy, prefix_cache=False, dense_tail=own.dense_tail,
            wide_pool=wide_pool)
        self._salt += 1
        prompts, params = trace.requests(engine.config.vocab_size, self._salt)
        began = time.perf_counter()
        try:
            engine.generate(prompts, params)
            return time.perf_counter() - began
        finally:
            replica.scheduler = engine.input_processor.scheduler = own


def cost_key(bucket: Bucket) -> Bucket:
    """Return the key of a bucket's measured cost: the bucket without its limit of tokens per dispatch."""
    return replace(bucket, steps=1)


def timed_program(bucket: Bucket) -> Bucket:
    """Return the bucket whose program is run to time `bucket`: for decode, one that can generate `MAX_STEPS` tokens."""
    return replace(bucket, steps=MAX_STEPS) if bucket.phase == "decode" and bucket.tokens == 1 else bucket


def host_seconds(bench: EngineBench, tuned: Tuned, trace: Trace) -> float:
    """Answer a trace, and return the seconds per step for which the device waits for the host."""
    counters = bench.engine.core.counters

    def sums() -> tuple[float, int]:
        return counters.host_seconds, sum(usage.steps for usage in counters.usage.values())

    before = sums()
    bench.run(tuned, trace)
    after = sums()
    return (after[0] - before[0]) / max(1, after[1] - before[1])

