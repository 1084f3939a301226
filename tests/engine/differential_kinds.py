"""Kinds of engines that random requests are run on, and what each of them has to show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from differential_engines import TOLERANCE, Comparison, left_behind, run_alone, run_together
from qwen_kernels.sparse_attention import Sparsity
from random_requests import ADAPTERS, CONFIG, Case, Cases, byte_tokenizer, near_model, peaked_model, save_adapters

from qwen_jax import Engine
from qwen_jax.engine.api.stats import EngineStats
from qwen_jax.engine.config import memory, resolve
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.page_pool import pages_for
from qwen_jax.engine.scheduling.schedule_policy import RECOMPUTE, SPARSE, SchedulePolicy
from qwen_jax.engine.scheduling.speculation import NGRAM, Speculation

LONGEST, SLOTS = 320, 6
LIMITS = Limits(SLOTS, LONGEST, prefill_shapes=((4, 64), (1, 128)), recompute_shapes=(), decode_rows=(2, 6),
                decode_steps=4)
ONE_SHAPE = replace(LIMITS, prefill_shapes=((2, 64),), decode_rows=(6,))
MICRO_BATCHES = replace(LIMITS, prefill_shapes=((2, 64),), recompute_shapes=((6, 64, 2),))
GUESSING = replace(ONE_SHAPE, draft_tokens=4)
# Whole prompts in one step, one sequence, one token at a time.
ALONE = Limits(1, LONGEST, prefill_shapes=((1, LONGEST),), recompute_shapes=(), decode_rows=(2,))
SPARSITY = {"policy": SchedulePolicy(sparse_above_tokens=100), "sparsity": Sparsity(budget=0.5, local=1, dense_tail=40)}
EIGHT_BIT = {"fp8_enabled": True}


@dataclass(frozen=True)
class Kind:
    """A kind of engine, which answers in company what another engine answers one at a time.

    Attributes:
      options: of the engine. alone: of the engine that answers one at a time, beside its limits.
      shows: names of figures (`Result.figures`) that must not be 0, beside those of every kind.
      few_pages: whether the cache holds one sequence of the maximum length and no more, so that some are preempted.
    """

    name: str
    options: dict[str, Any]
    shows: tuple[str, ...] = ()
    alone: dict[str, Any] = field(default_factory=dict)
    few_pages: bool = False
    tolerance: float = TOLERANCE

    def engine(self, adapters: Path) -> Engine:
        """Return the engine that answers in company, with the adapters of a folder loaded."""
        pages = {"kv_cache_bytes": _few_bytes(self.options)} if self.few_pages else {}
        return engine_of(self.options | pages, adapters)

    def engine_alone(self, adapters: Path) -> Engine:
        """Return the engine that answers one at a time."""
        return engine_of({"limits": ALONE, "prefix_cache": False} | self.alone, adapters)


KINDS = (
    Kind("batched", {"limits": LIMITS}),
    Kind("pieces", {"limits": LIMITS, "layers_per_program": 1}),
    Kind("preempted", {"limits": LIMITS}, few_pages=True),
    Kind("n-gram", {"limits": GUESSING, "speculation": NGRAM}, ("accepted",), few_pages=True),
    Kind("draft model", {"limits": GUESSING, "speculation": near_model}, ("accepted",), few_pages=True),
    Kind("recompute", {"limits": MICRO_BATCHES, "policy": SchedulePolicy(recompute_above_rows=2), "adapt": True},
         ("recompute",)),
    Kind("replicas", {"limits": LIMITS, "dp_size": 2}, few_pages=True),
    Kind("invariant", {"max_batch_size": SLOTS, "max_seq_len": LONGEST, "batch_invariant": True}),
    Kind("sparse", {"limits": LIMITS, **SPARSITY}, ("sparse", "pages left out"), alone=SPARSITY, few_pages=True),
    Kind("8-bit", {"limits": LIMITS, **EIGHT_BIT}, ("16-bit fallbacks",), alone=EIGHT_BIT, few_pages=True),
)


@dataclass(frozen=True)
class Result:
    """Result of a kind: its cases, the comparison of their answers, the engine's counters and what it still holds."""

    kind: Kind
    cases: list[Case]
    comparison: Comparison
    stats: EngineStats
    left: list[str]

    @property
    def figures(self) -> dict[str, int]:
        """Numbers of what happened in the engine, by name."""
        stats, answers, trips = self.stats, self.comparison.answers, sum(self.stats.guard_trips.values())
        prefills, decodes = ([bucket for bucket in stats.buckets if bucket.bucket.startswith(phase)]
                             for phase in ("prefill", "decode"))
        return {
            "rows that decoded beside others": sum(bucket.rows - bucket.steps for bucket in decodes),
            "further chunks": max(0, sum(bucket.rows for bucket in prefills) - answers - stats.preemptions - trips),
            "preemptions": stats.preemptions, "prefix hits": stats.prefix_hits, "drafted": stats.drafted_tokens,
            "accepted": stats.accepted_tokens, "recompute": stats.schedules.get(RECOMPUTE, 0),
            "sparse": stats.schedules.get(SPARSE, 0),
            "pages left out": stats.sparse_pages_visible - stats.sparse_pages_read, "16-bit fallbacks": trips,
        }

    @property
    def columns(self) -> dict[str, object]:
        """Cells of the kind's row in a table, by column."""
        comparison = self.comparison
        return {"engine": self.kind.name, "requests": len(self.cases), "answers": comparison.answers,
                "differences": len(comparison.differences), "ties": len(comparison.ties),
                "largest": f"{comparison.largest:.0e}", **self.figures, "left": ", ".join(self.left) or 0}

    @property
    def sorts(self) -> Counter[str]:
        """Number of cases of each sort."""
        return Counter(sort for case in self.cases for sort in case.sorts)

    @property
    def problems(self) -> list[str]:
        """Sentences about what is not as it should be."""
        shows = "rows that decoded beside others", "further chunks", "prefix hits", *self.kind.shows
        shows += ("preemptions",) if self.kind.few_pages else ()
        idle = [f"no {name}: the kind shows nothing" for name in shows if not self.figures[name]]
        return [*self.comparison.differences, *idle, *(f"left behind: {thing}" for thing in self.left)]


def _few_bytes(options: dict[str, Any]) -> int:
    """Return the memory of an engine's cache for one sequence of the maximum length."""
    precision = resolve.precision_of(CONFIG, options.get("fp8_enabled", False), "auto")
    pages, page = pages_for(LONGEST), memory.page_bytes(CONFIG, "float32")
    size = memory.page_bytes(CONFIG, "float32", pages if "sparsity" in options else 0, precision.kv_cache)
    if callable(options.get("speculation")):
        size += page  # the draft model's
    return pages * size + memory.wide_pages(LIMITS, precision) * page


@cache
def _engine(items: tuple[tuple[str, Any], ...]) -> Engine:
    options = dict(items)
    if callable(options.get("speculation")):
        options["speculation"] = options["speculation"]()
    return Engine(peaked_model(), tokenizer=byte_tokenizer(), progress=False, dtype="float32", max_adapter_rank=4,
                  max_adapters=len(ADAPTERS), **options)


def engine_of(options: dict[str, Any], adapters: Path) -> Engine:
    """Return the engine with these options, the adapters of a folder loaded; the same one for equal options."""
    if not (adapters / ADAPTERS[0]).exists():
        save_adapters(adapters)
    engine = _engine(tuple(options.items()))
    for name in set(ADAPTERS) - set(engine.adapters.names):
        engine.load_adapter(name, adapters / name)
    return engine


def check(kind: Kind, adapters: Path, count: int, seed: int = 0, on_end: Callable[[], object] = lambda: None) -> Result:
    """Answer random requests one at a time and all at once, and compare.

    adapters: folder of the saved adapters. on_end: called twice for each request.
    """
    engine, alone = kind.engine(adapters), kind.engine_alone(adapters)
    cases = Cases(f"{kind.name} {seed}", LONGEST, 0.08 if kind.few_pages else 0.02).draw(count)
    expected = []
    for case in cases:
        expected.append(run_alone(alone, case))
        on_end()
    answers = run_together(engine, cases, seed, on_end)
    comparison = Comparison(kind.tolerance)
    for case, one, other in zip(cases, expected, answers, strict=True):
        comparison.add(alone, case, one, other)
    return Result(kind, cases, comparison, engine.stats(), left_behind(engine))


def always_guess() -> None:
    """Keep speculation from switching itself off where guesses do not pay: what is tested is their check."""
    Speculation._cost = lambda self: 0.0
