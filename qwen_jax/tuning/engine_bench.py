"""An engine whose programs and shapes can be changed between two runs, to time them side by side in one process."""

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
from qwen_jax.engine.runner.model_runner import Key
from qwen_jax.engine.runner.padded_batch import dry_run_batch
from qwen_jax.engine.scheduling.buckets import Bucket, Limits, bucket_table, default_limits
from qwen_jax.engine.scheduling.page_pool import PagePool
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.tuning.step_costs import Cost
from qwen_jax.tuning.workloads import Trace

logger = logging.getLogger(__name__)

MOST_STEPS = 32  # tokens per row and dispatch that measured programs can generate
REPEATS, MOST_SECONDS = 7, 2.0  # of a measured point, and after how long fewer do
FURTHER = 4  # tokens of the decode step that shows what a further token costs


class Lab:
    """Times steps and traces on one engine.

    What was measured is kept in a journal beside the tuned file at once, and found there after an interruption.

    Args:
      ref: the model. dtype, fp8_enabled, max_batch_size, max_seq_len: as of `Engine`.

    Attributes:
      about: what is measured (`tuned.subject`); path: of the tuned file.
      costs: by bucket, as `plain` has it.
    """

    def __init__(self, ref: str, dtype: str = "bfloat16", fp8_enabled: bool = False, max_batch_size: int = 64,
                 max_seq_len: int | None = None, progress: bool = True) -> None:
        self.engine = Engine.from_pretrained(ref, dtype=dtype, fp8_enabled=fp8_enabled, max_batch_size=max_batch_size,
                                             max_seq_len=max_seq_len, tuned=None, tokenizer=None, prefix_cache=False,
                                             progress=progress)
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
        return default_limits(self.max_batch_size, self.max_seq_len, platform(), tuned.policy, grid=tuned.grid)

    def table(self, tuned: Tuned) -> tuple[Bucket, ...]:
        """UserError for one that cannot be."""
        return bucket_table(self.limits(tuned), tuned.policy, self._precision, self._eight_bit)

    # --- single steps

    def measure(self, bucket: Bucket) -> Cost:
        """Times a bucket's program, compiling it first, unless that has been done."""
        bucket = plain(bucket)
        if bucket not in self.costs:
            known = self._kept.get(repr(bucket))
            self.costs[bucket] = Cost(**known) if known else self._time(bucket)
            if not known:
                self._kept[repr(bucket)] = asdict(self.costs[bucket])
                write_json(self._journal, self._key | {"costs": self._kept})
        return self.costs[bucket]

    def forget(self) -> None:
        """Removes the journal: a result has been written."""
        self._journal.unlink(missing_ok=True)

    def prepare_measuring(self, buckets: Iterable[Bucket]) -> None:
        """Compile together what `measure` will need for these, and has not measured."""
        self.prepare(program(bucket) for bucket in buckets if repr(plain(bucket)) not in self._kept)

    def prepare(self, buckets: Iterable[Bucket]) -> None:
        """Compile what has not been."""
        with planned():
            for _ in self.engine.runner.executables.prepare(Key(bucket, 0) for bucket in dict.fromkeys(buckets)):
                pass

    def _time(self, bucket: Bucket) -> Cost:
        decode = bucket.phase == "decode"
        self.prepare([program(bucket)])
        short = self.engine.core.replicas[0].scheduler.policy.sparse_above_tokens if bucket.schedule == SPARSE else (
            64 if decode else 0)
        long = self.max_seq_len - max(bucket.tokens, FURTHER)
        short = max(0, min(short, long))
        points = [(short, 1), (short, FURTHER), (long, 1)] if decode else [(short, 1), (long, 1)]
        points = list(dict.fromkeys(points))
        times: dict[tuple[int, int], list[float]] = {point: [] for point in points}
        for point in points:
            self._step(program(bucket), *point)
        began = time.perf_counter()
        for _ in range(REPEATS):
            for point in points:
                times[point].append(self._step(program(bucket), *point))
            if time.perf_counter() - began > MOST_SECONDS:
                break
        medians = {point: statistics.median(values) for point, values in times.items()}
        base = medians[short, 1]
        return Cost.through(short, long, base, medians.get((short, FURTHER), base), medians[long, 1], FURTHER)

    def _step(self, bucket: Bucket, context: int, steps: int) -> float:
        """Seconds of one full step; its pages are nobody's."""
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
        try:
            stored = json.loads(self._journal.read_text())
            costs = stored.pop("costs")
            if json.loads(json.dumps(self._key)) == stored:
                [Cost(**cost) for cost in costs.values()]
                return costs
            logger.warning("%s is of another engine: measuring anew", self._journal)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s cannot be read (%s): measuring anew", self._journal, error)
        return {}

    # --- traces

    def run(self, tuned: Tuned, trace: Trace) -> float:
        """Seconds in which the engine answers a trace with these shapes. Compiling is not part of it."""
        engine, limits = self.engine, self.limits(tuned)
        table = tuple(map(program, self.table(tuned)))  # the limits say how many tokens a dispatch takes
        self.prepare(table)
        for bucket in table:
            engine.core.counters.usage.setdefault(bucket, Usage())
            engine.runner.prepare_seconds.setdefault(bucket, 0.0)
        replica = engine.core.replicas[0]
        kept, replica.step_seconds = replica.scheduler, None
        wide = kept.wide_pool and PagePool(kept.wide_pool.num_pages)
        replica.scheduler = engine.input_processor.scheduler = Scheduler(
            table, limits, PagePool(self.num_pages), tuned.policy, False, dense_tail=kept.dense_tail, wide_pool=wide)
        self._salt += 1
        prompts, params = trace.requests(engine.config.vocab_size, self._salt)
        began = time.perf_counter()
        try:
            engine.generate(prompts, params)
            return time.perf_counter() - began
        finally:
            replica.scheduler = engine.input_processor.scheduler = kept


def plain(bucket: Bucket) -> Bucket:
    """How costs are looked up: what a dispatch could generate at most does not change what it costs."""
    return replace(bucket, steps=1)


def program(bucket: Bucket) -> Bucket:
    """With which a bucket is measured."""
    return replace(bucket, steps=MOST_STEPS) if bucket.phase == "decode" and bucket.tokens == 1 else bucket


def host_seconds(lab: Lab, tuned: Tuned, trace: Trace) -> float:
    """Of the host, per step, in a trace."""
    figures = lab.engine.core.counters

    def sums() -> tuple[float, int]:
        return figures.host_seconds, sum(usage.steps for usage in figures.usage.values())

    before = sums()
    lab.run(tuned, trace)
    after = sums()
    return (after[0] - before[0]) / max(1, after[1] - before[1])

