"""Counters of an engine's work, updated after every step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.engine.api.outputs import RequestOutput
from qwen_jax.engine.compiled.state import StepOutput
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.schedule_policy import SPARSE
from qwen_jax.engine.scheduling.sequence import StepPlan


@dataclass
class Usage:
    """Totals of the steps that ran in one bucket; fields as in `BucketStats`."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Counters:
    """Totals of an engine's work since it was made. Seconds are wall time.

    Attributes:
      usage: work of each bucket.
      device_seconds: from the start of each step until its result was there.
      host_seconds: beside that, time that devices waited for while there was work.
      prompt_tokens, generated_tokens: tokens of submitted prompts, and sampled tokens.
      computed_tokens: positions that went through the network.
      attended_tokens: sum over these of the positions that full attention attends to.
      read_tokens: positions whose keys and values were read from memory.
      weight_reads: number of times that all weights were read.
      attended_pages, visible_pages: pages that steps of the sparse schedule read, and those that full attention would
        have read there.
      finished, schedules: number of closed requests by finish reason and by schedule.
      trips: rows whose 8-bit numbers were unusable, by layer.
    """

    usage: dict[Bucket, Usage]
    device_seconds: float = 0.0
    host_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    computed_tokens: int = 0
    attended_tokens: int = 0
    read_tokens: int = 0
    weight_reads: int = 0
    attended_pages: int = 0
    visible_pages: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    schedules: Counter[str] = field(default_factory=Counter)
    trips: Counter[int] = field(default_factory=Counter)

    def record(self, plan: StepPlan, output: StepOutput, device: float, host: float) -> None:
        """Add a finished step, which took ``device`` seconds on the devices and ``host`` seconds beside them."""
        bucket, rows, usage = plan.bucket, plan.rows, self.usage[plan.bucket]
        decode = bucket.phase == "decode"
        sampled = int(output.counts[: len(rows)][output.trips[: len(rows)] == 0].sum())
        one_by_one = decode and bucket.tokens == 1
        self.weight_reads += max(row.count for row in rows) if one_by_one else -(-len(rows) // bucket.micro_rows)
        for row in rows:
            attended = row.count * row.start + row.count * (row.count + 1) // 2
            self.computed_tokens += row.count
            self.attended_tokens += attended
            self.read_tokens += attended if one_by_one else row.start + row.count
        usage.steps += 1
        usage.rows += len(rows)
        usage.tokens += sampled if decode else sum(row.count for row in rows)
        usage.seconds += device
        self.device_seconds += device
        self.host_seconds += host
        self.generated_tokens += sampled
        if bucket.schedule == SPARSE:
            attended, everything = output.page_counts[: len(rows)].sum(axis=0, dtype=np.int64)
            self.attended_pages += int(attended)
            self.visible_pages += int(everything)

    def closed(self, output: RequestOutput) -> None:
        """Count a request that has ended, by its finish reason and its schedule."""
        self.finished[output.finish_reason] += 1
        if output.schedule:
            self.schedules[output.schedule] += 1

    def model_flops(self, config: ModelConfig) -> int:
        """Return the operations that the answers needed: two for each weight and token, and those of attention.

        Padding and recomputation do not count (model FLOPs, as in PaLM, Chowdhery et al. 2022, appendix B).
        """
        tables = (2 - config.tie_word_embeddings) * config.vocab_size * config.hidden_size
        products = 2 * (config.num_parameters - tables) * self.computed_tokens
        head = 2 * config.vocab_size * config.hidden_size * self.generated_tokens
        attention = 4 * config.num_layers * config.num_heads * config.head_dim * self.attended_tokens
        return products + head + attention

    def bytes_read(self, weight_bytes: int, kv_bytes_per_token: float) -> int:
        """Return the bytes of weights and of cached keys and values that steps had to read from memory."""
        return int(self.weight_reads * weight_bytes + self.read_tokens * kv_bytes_per_token)
