"""What an engine has done, as callers see it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BucketStats:
    """What one bucket did. ``tokens`` are computed positions without padding; ``seconds`` are wall time in its steps.

    ``prepare_seconds`` is the time to compile or load its program.
    """

    bucket: str
    steps: int
    rows: int
    tokens: int
    seconds: float
    prepare_seconds: float
    from_disk: bool
    temp_bytes: int



@dataclass(frozen=True)
class EngineStats:
    """A snapshot of the engine's counters.

    ``prefix_queries`` and ``prefix_hits`` are pages that admitted requests could have shared, and those they found.
    ``device_seconds`` is wall time from the start of a step until its result was there, ``host_seconds`` what the
    device waited for between steps while there was work. ``finished`` counts requests by finish_reason,
    ``accepted_tokens`` those of the ``drafted_tokens`` (speculation) that became part of an answer.
    ``sparse_density`` is the share of pages that steps of the sparse schedule read, 1 before the first.
    ``guard_trips`` counts, by layer, rows whose 8-bit numbers were of no use and that were computed again in 16 bits,
    or ended with an error when those were not either; the number of layers stands for what comes after the last one.
    ``unused_slots`` are tokens for which held pages have room and hold none. ``schedules`` counts requests that ended.
    ``tuned`` is the file that shapes and thresholds were read from, ``adaptation`` what `Adaptation.report` says.
    ``model_flops`` and ``bytes_read`` are what answers needed (`Counters`), not what devices measured.
    """

    compiles_after_warmup: int
    warmup_seconds: float
    executables: int
    pages_used: int
    pages_total: int
    running: int
    waiting: int
    prompt_tokens: int
    generated_tokens: int
    finished: dict[str, int]
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    weight_version: int
    drafted_tokens: int
    accepted_tokens: int
    sparse_density: float
    guard_trips: dict[int, int]
    schedules: dict[str, int]
    unused_slots: int
    model_flops: int
    bytes_read: int
    device_seconds: float
    host_seconds: float
    buckets: tuple[BucketStats, ...]
    tuned: str | None = None
    adaptation: dict[str, dict[str, float]] = field(default_factory=dict)
