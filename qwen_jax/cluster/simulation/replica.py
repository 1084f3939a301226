"""A replica that is a queue and a table of times: what `simulator` has in the place of an engine."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, fields

from qwen_jax.cluster.routing.policies import BLOCK, PrefixIndex, cached_blocks
from qwen_jax.cluster.simulation.traces import Request
from qwen_jax.errors import UserError


@dataclass(frozen=True)
class ServiceTimes:
    """How long a replica takes, and what fits into it.

    A step takes ``base + per_prefill_token x prompt tokens + per_decode_row x rows that decode`` seconds.

    Attributes:
      max_batch: requests that run at once.
      chunk_tokens: most prompt tokens of a step.
      decode_steps: most decode steps of a dispatch, which nothing interrupts; 1 where there is a prompt to compute.
      kv_tokens: size of the KV cache. A request has its prompt and its whole answer there from when it begins.
      prefix_blocks: blocks of 64 tokens that the prefix cache remembers.
    """

    base: float = 0.004
    per_prefill_token: float = 1 / 5000
    per_decode_row: float = 0.0002
    max_batch: int = 32
    chunk_tokens: int = 512
    decode_steps: int = 8
    kv_tokens: int = 1 << 17
    prefix_blocks: int = 1 << 11

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            may_be_0 = field.name in ("base", "per_decode_row", "prefix_blocks")
            if not (value > 0 or may_be_0 and value == 0):
                raise UserError(f"{field.name} must be {'0 or more' if may_be_0 else 'more than 0'}, not {value}")


def kv_tokens(request: Request) -> int:
    """What a request takes of a KV cache."""
    return request.prompt_tokens + request.output_tokens


class Job:
    """A request on a replica."""

    __slots__ = ("index", "request", "started", "uncached")

    def __init__(self, index: int, request: Request) -> None:
        self.index, self.request = index, request
        self.uncached = 0  # prompt tokens that are neither computed nor cached
        self.started = False  # to be computed


class Replica:
    """A queue, the requests that run, and the step in progress.

    window: until when the load is counted, in seconds.
    """

    def __init__(self, times: ServiceTimes, window: float) -> None:
        self.times, self._window = times, window
        self.queue: deque[Job] = deque()
        self.alive, self.stepping = True, False
        self.unfinished = self.uncached = self.kv_used = self.computed = 0  # requests; tokens; tokens; tokens so far
        self.busy = self.in_flight = 0.0  # seconds with a step; seconds times requests
        self._cache = PrefixIndex(times.prefix_blocks)
        self._expected = PrefixIndex(times.prefix_blocks)  # once all that was put here is computed
        self._prefilling: deque[Job] = deque()
        self._prefilled: list[Job] = []  # by the step in progress
        self._decoding: list[tuple[int, int, Job]] = []  # a heap, by the decode step that gives the last token
        self._steps = self._burst = 0  # decode steps: all that are done, and those in progress
        self._counted = 0.0

    @property
    def running(self) -> int:
        return self.unfinished - len(self.queue)

    def put(self, job: Job, now: float) -> None:
        """At the end of the queue."""
        self._change(now, 1)
        self._set_uncached(job, self._needs(job, self._expected))
        self._expected.add(job.request.blocks)
        self.queue.append(job)

    def take_last(self, now: float) -> Job:
        """Off the end of the queue."""
        self._change(now, -1)
        job = self.queue.pop()
        self._set_uncached(job, 0)
        return job

    def die(self, now: float) -> list[Job]:
        """All that it had, in the order of arrival."""
        self._change(now, -self.unfinished)
        self.alive = False
        jobs = (*self._prefilled, *self._prefilling, *(job for *_, job in self._decoding), *self.queue)
        return sorted(jobs, key=lambda job: job.index)

    def begin_step(self, now: float) -> float | None:
        """When the step ends that begins now, or None where there is nothing to do."""
        times = self.times
        while (self.queue and self.running < times.max_batch
               and self.kv_used + kv_tokens(self.queue[0].request) <= times.kv_tokens):
            job = self.queue.popleft()
            self.kv_used += kv_tokens(job.request)
            self._prefilling.append(job)
        rows, left = len(self._decoding), times.chunk_tokens
        if self._prefilling:
            self._burst = 1
        elif rows:
            self._burst = min(times.decode_steps, self._decoding[0][0] - self._steps)
        else:
            return None
        while self._prefilling and left:
            job = self._prefilling[0]
            if not job.started:  # not before: what those ahead of it compute is found, as in the engine
                self._set_uncached(job, self._needs(job, self._cache))
                job.started = True
            some = min(left, job.uncached)
            left -= some
            self._set_uncached(job, job.uncached - some)
            if not job.uncached:
                self._prefilled.append(self._prefilling.popleft())
                self._cache.add(job.request.blocks)
        tokens = times.chunk_tokens - left
        self.computed += tokens
        end = now + times.per_prefill_token * tokens + self._burst * (times.base + times.per_decode_row * rows)
        self.busy += max(min(end, self._window) - now, 0.0)
        return end

    def end_step(self, now: float) -> tuple[list[Job], list[Job]]:
        """The requests that now have their first token, and those that have their last one."""
        first, self._prefilled = self._prefilled, []
        self._steps += self._burst
        for job in first:
            heapq.heappush(self._decoding, (self._steps + job.request.output_tokens - 1, job.index, job))
        last = []
        while self._decoding and self._decoding[0][0] <= self._steps:
            last.append(heapq.heappop(self._decoding)[2])
            self.kv_used -= kv_tokens(last[-1].request)
        self._change(now, -len(last))
        return first, last

    def _needs(self, job: Job, cache: PrefixIndex) -> int:
        """At least one token: the answer's first one is computed from the prompt's last one."""
        return max(job.request.prompt_tokens - BLOCK * cached_blocks(cache, job.request.blocks), 1)

    def _set_uncached(self, job: Job, tokens: int) -> None:
        self.uncached += tokens - job.uncached
        job.uncached = tokens

    def _change(self, now: float, requests: int) -> None:
        until = min(now, self._window)
        self.in_flight += self.unfinished * (until - self._counted)
        self._counted = until
        self.unfinished += requests
