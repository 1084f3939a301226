"""A simulated replica: a queue and a table of times in the place of an engine."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, fields

from qwen_kernels.page import PAGE

from qwen_jax.cluster.routing.policies import PrefixIndex, cached_blocks
from qwen_jax.cluster.simulation.traces import TraceRequest
from qwen_jax.errors import UserError


@dataclass(frozen=True)
class ServiceTimes:
    """Speed and capacity of a simulated replica.

    A step takes ``base + per_prefill_token x prompt tokens + per_decode_row x decoding requests`` seconds.

    Attributes:
      base: seconds of a step without tokens.
      per_prefill_token: seconds for a prompt token.
      per_decode_row: seconds for a request that generates a token.
      max_batch: largest number of requests that run at once.
      chunk_tokens: largest number of prompt tokens in a step.
      decode_steps: largest number of decode steps in a dispatch, which nothing interrupts; it is 1 while there is a
        prompt to compute.
      kv_tokens: size of the KV cache. A request holds its prompt and its whole answer there from when it begins.
      prefix_blocks: number of blocks of 64 tokens that the prefix cache holds.
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
            may_be_zero = field.name in ("base", "per_decode_row", "prefix_blocks")
            if not (value > 0 or may_be_zero and value == 0):
                raise UserError(f"{field.name} must be {'0 or more' if may_be_zero else 'more than 0'}, not {value}")


def kv_tokens(request: TraceRequest) -> int:
    """Return the number of tokens, of prompt and answer, that a request holds in the KV cache."""
    return request.prompt_tokens + request.output_tokens


class Job:
    """A request on a simulated replica, and how much of its prompt is computed.

    Attributes:
      index: index of the request in the trace.
      request: the request.
      uncached: number of its prompt tokens that are neither computed nor cached.
      started: true once its first prompt token is computed, or found in the cache.
    """

    __slots__ = ("index", "request", "started", "uncached")

    def __init__(self, index: int, request: TraceRequest) -> None:
        self.index, self.request = index, request
        self.uncached, self.started = 0, False


class SimulatedReplica:
    """A simulated replica: its queue, its running requests, and the engine step in progress.

    Args:
      window: end of the time in which the load is measured, in seconds.

    Attributes:
      queue: requests that have not begun.
      alive: false after `die`.
      stepping: true while a step is in progress.
      unfinished: number of its requests.
      uncached: number of prompt tokens that are neither computed nor cached.
      kv_used: number of tokens in the KV cache.
      computed: number of prompt tokens computed so far.
      busy: seconds of the window with a step in progress.
      in_flight: number of its requests, integrated over the window: requests x seconds.
    """

    def __init__(self, times: ServiceTimes, window: float) -> None:
        self.times, self._window = times, window
        self.queue: deque[Job] = deque()
        self.alive, self.stepping = True, False
        self.unfinished = self.uncached = self.kv_used = self.computed = 0
        self.busy = self.in_flight = 0.0
        self._cache = PrefixIndex(times.prefix_blocks)
        self._expected_cache = PrefixIndex(times.prefix_blocks)  # contents once all its requests are computed
        self._prefilling: deque[Job] = deque()
        self._prefilled: list[Job] = []  # jobs whose prompts the step in progress completes
        self._decoding: list[tuple[int, int, Job]] = []  # a heap, by the decode step that gives the last token
        self._steps_done = self._steps_in_progress = 0  # decode steps
        self._measured_until = 0.0

    @property
    def running(self) -> int:
        return self.unfinished - len(self.queue)

    def put(self, job: Job, now: float) -> None:
        """Add a request at the end of the queue."""
        self._add_requests(now, 1)
        self._set_uncached(job, self._uncached_tokens(job, self._expected_cache))
        self._expected_cache.add(job.request.blocks)
        self.queue.append(job)

    def take_last(self, now: float) -> Job:
        """Remove the request at the end of the queue and return it."""
        self._add_requests(now, -1)
        job = self.queue.pop()
        self._set_uncached(job, 0)
        return job

    def die(self, now: float) -> list[Job]:
        """Kill the replica; return its unfinished requests in the order of arrival."""
        self._add_requests(now, -self.unfinished)
        self.alive = False
        jobs = (*self._prefilled, *self._prefilling, *(job for *_, job in self._decoding), *self.queue)
        return sorted(jobs, key=lambda job: job.index)

    def begin_step(self, now: float) -> float | None:
        """Begin an engine step and return the time of its end, or return None if there is nothing to compute."""
        times = self.times
        while (self.queue and self.running < times.max_batch
               and self.kv_used + kv_tokens(self.queue[0].request) <= times.kv_tokens):
            job = self.queue.popleft()
            self.kv_used += kv_tokens(job.request)
            self._prefilling.append(job)
        rows, left = len(self._decoding), times.chunk_tokens
        if self._prefilling:
            self._steps_in_progress = 1
        elif rows:
            self._steps_in_progress = min(times.decode_steps, self._decoding[0][0] - self._steps_done)
        else:
            return None
        while self._prefilling and left:
            job = self._prefilling[0]
            if not job.started:  # only now, so that it finds what the requests ahead of it have computed
                self._set_uncached(job, self._uncached_tokens(job, self._cache))
                job.started = True
            chunk = min(left, job.uncached)
            left -= chunk
            self._set_uncached(job, job.uncached - chunk)
            if not job.uncached:
                self._prefilled.append(self._prefilling.popleft())
                self._cache.add(job.request.blocks)
        tokens = times.chunk_tokens - left
        self.computed += tokens
        decode_step = times.base + times.per_decode_row * rows
        end = now + times.per_prefill_token * tokens + self._steps_in_progress * decode_step
        self.busy += max(min(end, self._window) - now, 0.0)
        return end

    def end_step(self, now: float) -> tuple[list[Job], list[Job]]:
        """End the step in progress; return the requests whose first token it gave, and those whose last it gave."""
        first, self._prefilled = self._prefilled, []
        self._steps_done += self._steps_in_progress
        for job in first:
            heapq.heappush(self._decoding, (self._steps_done + job.request.output_tokens - 1, job.index, job))
        last = []
        while self._decoding and self._decoding[0][0] <= self._steps_done:
            last.append(heapq.heappop(self._decoding)[2])
            self.kv_used -= kv_tokens(last[-1].request)
        self._add_requests(now, -len(last))
        return first, last

    def _uncached_tokens(self, job: Job, cache: PrefixIndex) -> int:
        """Return how many prompt tokens of a request are not in ``cache`` and have to be computed, at least 1: the
        answer's first token is computed from the prompt's last one."""
        return max(job.request.prompt_tokens - PAGE * cached_blocks(cache, job.request.blocks), 1)

    def _set_uncached(self, job: Job, tokens: int) -> None:
        self.uncached += tokens - job.uncached
        job.uncached = tokens

    def _add_requests(self, now: float, count: int) -> None:
        """Change ``unfinished`` by ``count`` requests, after adding the time until now to ``in_flight``."""
        until = min(now, self._window)
        self.in_flight += self.unfinished * (until - self._measured_until)
        self._measured_until = until
        self.unfinished += count
