"""Snapshot of an engine's counters, and how the snapshots of several engines become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

Merge = Callable[[Sequence[Any]], Any]  # the engines' values of a field to the value that stands for all of them


def _first(values: Sequence[Any]) -> Any:
    return values[0]


def _total_by_key(counts: Sequence[Mapping[Any, int]]) -> dict[Any, int]:
    total: dict[Any, int] = {}
    for count in counts:
        for key, value in count.items():
            total[key] = total.get(key, 0) + value
    return dict(sorted(total.items()))


def _names(lists: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted({name for names in lists for name in names}))


def _by_bucket(tables: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[dict[str, Any], ...]:
    """Merge the `BucketStats` of several engines (as mappings) into one for each bucket name."""
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for table in tables:
        for bucket in table:
            rows.setdefault(bucket["bucket"], []).append(bucket)
    return tuple(_merged(BucketStats, same) for same in rows.values())


def _stat(merge: Merge, **options: Any) -> Any:
    """Declare a dataclass field whose values in several engines are combined into one by ``merge``."""
    return field(metadata={"merge": merge}, **options)


@dataclass(frozen=True)
class BucketStats:
    """Counters of one bucket, a batch shape with a compiled program of its own.

    Attributes:
      bucket: its name.
      steps: how often its program ran. rows: rows of these steps, without padding.
      tokens: computed positions, without padding.
      seconds: wall time of its steps.
      prepare_seconds: time to compile or load its program. from_disk: whether it was loaded.
      temp_bytes: XLA's temporary buffers.
    """

    bucket: str = _stat(_first)
    steps: int = _stat(sum)
    rows: int = _stat(sum)
    tokens: int = _stat(sum)
    seconds: float = _stat(sum)
    prepare_seconds: float = _stat(max)
    from_disk: bool = _stat(all)
    temp_bytes: int = _stat(max)


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine's counters.

    Attributes:
      compiles_after_warmup: XLA compilations since the warm-up; there should be none.
      warmup_seconds: time from the beginning of the warm-up until the first request could be answered.
      executables: number of compiled programs. programs_to_come: of those that are still being compiled or loaded.
      pages_used, pages_total: pages of the KV cache that requests hold, and all of them.
      running, waiting: requests that hold pages, and requests in the queue.
      prompt_tokens: tokens of prompts, found in the prefix cache or computed. generated_tokens: tokens of answers.
      finished: number of answered requests by finish_reason. schedules: the same by schedule.
      preemptions: requests that gave their pages back and began again.
      prefix_queries, prefix_hits: pages looked up in the prefix cache for admitted requests, and those found.
      weight_version: number of the weights that new requests run with. Each engine numbers its own.
      drafted_tokens, accepted_tokens: guessed tokens (speculation), and those that became part of an answer.
      sparse_pages_read, sparse_pages_visible: pages that steps of the sparse schedule read, and those that full
        attention would have read there. sparse_density: their ratio, 1 before the first such step.
      guard_trips: by layer, rows whose 8-bit numbers were unusable and that were computed again in 16 bits, or ended
        with an error when those were unusable too. The number of layers stands for what comes after the last one.
      unused_slots: number of tokens that would still fit into the pages that requests hold.
      model_flops, bytes_read: operations and memory traffic that the answers needed (see `Counters`), calculated, not
        measured on devices.
      device_seconds: wall time from the start of each step until its result was there. host_seconds: wall time that
        the device waited for between steps while there was work.
      buckets: the same for each bucket.
      tuned: file that shapes and thresholds were read from, if any.
      adaptation: report of `DecodeAdaptation`, if it runs.
      adapters: names of the loaded LoRA adapters.
    """

    compiles_after_warmup: int = _stat(sum)
    warmup_seconds: float = _stat(max)
    executables: int = _stat(sum)
    programs_to_come: int = _stat(sum)
    pages_used: int = _stat(sum)
    pages_total: int = _stat(sum)
    running: int = _stat(sum)
    waiting: int = _stat(sum)
    prompt_tokens: int = _stat(sum)
    generated_tokens: int = _stat(sum)
    finished: dict[str, int] = _stat(_total_by_key)
    preemptions: int = _stat(sum)
    prefix_queries: int = _stat(sum)
    prefix_hits: int = _stat(sum)
    weight_version: int = _stat(_first)
    drafted_tokens: int = _stat(sum)
    accepted_tokens: int = _stat(sum)
    sparse_pages_read: int = _stat(sum)
    sparse_pages_visible: int = _stat(sum)
    guard_trips: dict[int, int] = _stat(_total_by_key)
    schedules: dict[str, int] = _stat(_total_by_key)
    unused_slots: int = _stat(sum)
    model_flops: int = _stat(sum)
    bytes_read: int = _stat(sum)
    device_seconds: float = _stat(sum)
    host_seconds: float = _stat(sum)
    buckets: tuple[BucketStats, ...] = _stat(_by_bucket)
    tuned: str | None = _stat(_first, default=None)
    adaptation: dict[str, dict[str, float]] = _stat(_first, default_factory=dict)
    adapters: tuple[str, ...] = _stat(_names, default=())

    @property
    def sparse_density(self) -> float:
        """Pages that sparse attention read, as a share of the pages that full attention would have read."""
        return _density(self.sparse_pages_read, self.sparse_pages_visible)


def stats_as_dict(stats: EngineStats) -> dict[str, Any]:
    """Return the counters of an engine, and ``sparse_density``, as a dict of plain values for JSON."""
    return {**asdict(stats), "sparse_density": stats.sparse_density}


def merge_stats(engines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine the `stats_as_dict` of one or more engines into one, each field by its own rule (most are summed)."""
    merged = _merged(EngineStats, engines)
    return {**merged, "sparse_density": _density(merged["sparse_pages_read"], merged["sparse_pages_visible"])}


def _merged(kind: type, each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {stat.name: stat.metadata["merge"]([values[stat.name] for values in each]) for stat in fields(kind)}


def _density(read: int, visible: int) -> float:
    return read / visible if visible else 1.0
