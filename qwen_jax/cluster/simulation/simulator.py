"""A simulated cluster under a virtual clock: real routing policies over replicas that are queues and tables of times.

The simulator models continuous batching with chunked prefill, each replica's prefix cache, a router that knows what a
replica last reported and what was sent there since, moves of queued requests, and deaths. It leaves out the network,
preemption, and the influence of replicas of one machine on each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from random import Random

import numpy as np

from qwen_jax.cluster.routing.policies import PrefixIndex, ReplicaView, uncached_tokens, worth_moving
from qwen_jax.cluster.routing.rebalance import rebalance_load
from qwen_jax.cluster.simulation.replica import Job, ServiceTimes, SimulatedReplica, kv_tokens
from qwen_jax.cluster.simulation.traces import TraceRequest
from qwen_jax.errors import UserError


@dataclass(frozen=True)
class Result:
    """Latencies and loads of N simulated requests on R replicas.

    Loads are measured in the window from second 0 to the last arrival: the time in which replicas then run empty says
    nothing about how even the load was.

    Attributes:
      window: length of the window in seconds.
      latency: float [N], seconds from arrival to the last token.
      first_token: float [N], seconds from arrival to the first token.
      replica: int [N], index of the replica that answered.
      busy: float [R], seconds of the window in which a replica was computing. It hides much: requests share steps, so
        twice as many keep a replica busy for less than twice as long, and none for longer than the window.
      in_flight: float [R], number of requests queued or running on a replica, averaged over the window.
      finished: number of requests that ended in the window.
      tokens: number of tokens, of prompts and answers, of the requests that ended in the window.
      moved: number of moves of requests from a queue to another.
      cached_share: share of all prompt tokens that a prefix cache had.
    """

    window: float
    latency: np.ndarray
    first_token: np.ndarray
    replica: np.ndarray
    busy: np.ndarray
    in_flight: np.ndarray
    finished: int
    tokens: int
    moved: int
    cached_share: float

    @property
    def requests_per_second(self) -> float:
        return self.finished / self.window

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.window

    @property
    def utilisation(self) -> np.ndarray:
        """Share of the window in which each replica was computing: float [R]."""
        return self.busy / self.window


def imbalance(load: np.ndarray) -> float:
    """Return the ratio of the most loaded replica's load to the replicas' mean load: 1 is even."""
    return float(load.max() / load.mean()) if load.any() else 1.0


def with_request(view: ReplicaView, blocks: Sequence[Hashable]) -> ReplicaView:
    """Return a router's view of a replica with another request in the queue.

    Call this before adding the request's blocks to the replica's index.
    """
    return replace(view, queued=view.queued + 1,
                   queued_prefill_tokens=view.queued_prefill_tokens + uncached_tokens(view, blocks))


def simulate(trace: Sequence[TraceRequest], replicas: Sequence[ServiceTimes], policy: Callable, *, seed: int = 0,
             report_seconds: float = 0.1, rebalance_seconds: float | None = None,
             deaths: Mapping[int, float] | None = None) -> Result:
    """Simulate how replicas serve a trace of requests, until the last has ended. Equal arguments give equal results.

    Args:
      trace: requests in order of arrival.
      replicas: speed and sizes of each replica.
      policy: `choose` or a policy of `qwen_jax.cluster.simulation.policies`; a new `RoundRobin` for each simulation.
      report_seconds: time between reports of the replicas to the router; 0 for a router that always knows.
      rebalance_seconds: time between looks of `rebalance_load` at the queues; None for never. The last request of a
        queue moves, if that is `worth_moving`.
      deaths: second at which a replica dies, by its index. Its requests start again elsewhere.

    Raises:
      UserError: an invalid trace, a request that no replica can hold, or no replica left.
    """
    _check(trace, replicas)
    return _Simulation(trace, replicas, policy, seed=seed, report_seconds=report_seconds,
                       rebalance_seconds=rebalance_seconds, deaths=deaths or {}).run()


def _check(trace: Sequence[TraceRequest], replicas: Sequence[ServiceTimes]) -> None:
    if not trace or not replicas:
        raise UserError("trace and replicas must not be empty: a simulation needs a request and a replica")
    if any(later.arrival < earlier.arrival for earlier, later in zip(trace, trace[1:])) or trace[0].arrival < 0:
        raise UserError("arrivals must begin at second 0 or later and must not fall: sort the trace")
    if trace[-1].arrival == 0:
        raise UserError("the last arrival must be after second 0, because loads are measured until then")
    if min(min(request.prompt_tokens, request.output_tokens) for request in trace) < 1:
        raise UserError("prompt_tokens and output_tokens of a request must be 1 or more")
    largest, capacity = max(map(kv_tokens, trace)), min(times.kv_tokens for times in replicas)
    if largest > capacity:
        raise UserError(f"kv_tokens must be at least {largest}, the tokens of the largest request, not {capacity}")


class _Simulation:
    """State of a simulation: replicas, the router's view of them, and a heap of future events."""

    def __init__(self, trace: Sequence[TraceRequest], replicas: Sequence[ServiceTimes], policy: Callable, *, seed: int,
                 report_seconds: float, rebalance_seconds: float | None, deaths: Mapping[int, float]) -> None:
        self._trace, self._policy, self._rng = trace, policy, Random(seed)
        self._report_seconds, self._rebalance_seconds = report_seconds, rebalance_seconds
        self._window = trace[-1].arrival
        self._replicas = [SimulatedReplica(times, self._window) for times in replicas]
        self._indexes = [PrefixIndex(times.prefix_blocks) for times in replicas]
        self._views = [ReplicaView(str(number), prefix=index, prefill_tokens_per_second=1 / times.per_prefill_token)
                       for number, (times, index) in enumerate(zip(replicas, self._indexes))]
        self._unreported: set[int] = set()  # indices of replicas that have changed since their last report
        self._first_token_at, self._last_token_at = np.full((2, len(trace)), np.nan)
        self._answered_by = np.full(len(trace), -1)
        self._unfinished, self._moved = len(trace), 0
        self._events: list[tuple[float, int, Callable, tuple]] = []
        self._order = count()
        for number, second in deaths.items():
            self._schedule(second, self._die, number)
        if report_seconds:
            self._schedule(report_seconds, self._report)
        if rebalance_seconds:
            self._schedule(rebalance_seconds, self._rebalance)

    def run(self) -> Result:
        for index, request in enumerate(self._trace):
            self._run_until(request.arrival)
            self._route(request.arrival, Job(index, request))
        self._run_until(np.inf)
        arrivals = np.array([request.arrival for request in self._trace])
        finished = [request for request, last in zip(self._trace, self._last_token_at) if last <= self._window]
        return Result(
            window=self._window, latency=self._last_token_at - arrivals, first_token=self._first_token_at - arrivals,
            replica=self._answered_by,
            busy=np.array([replica.busy for replica in self._replicas]),
            in_flight=np.array([replica.in_flight for replica in self._replicas]) / self._window,
            finished=len(finished), tokens=sum(map(kv_tokens, finished)), moved=self._moved,
            cached_share=1 - (sum(replica.computed for replica in self._replicas)
                              / sum(request.prompt_tokens for request in self._trace)))

    def _run_until(self, when: float) -> None:
        while self._unfinished and self._events and self._events[0][0] <= when:
            now, _, call, arguments = heapq.heappop(self._events)
            call(now, *arguments)

    def _schedule(self, when: float, call: Callable, *arguments) -> None:
        heapq.heappush(self._events, (when, next(self._order), call, arguments))

    # --- requests

    def _route(self, now: float, job: Job) -> None:
        if not self._report_seconds:
            self._refresh()
        name = self._policy(self._views, job.request.blocks, self._rng)
        if name is None:
            raise UserError(f"deaths must leave a replica alive; none is left at second {now:g}")
        number = int(name)
        self._views[number] = with_request(self._views[number], job.request.blocks)
        self._put(now, number, job)

    def _put(self, now: float, number: int, job: Job) -> None:
        self._indexes[number].add(job.request.blocks)
        self._replicas[number].put(job, now)
        self._step(now, number)

    def _step(self, now: float, number: int) -> None:
        """Begin the next engine step of a replica, if none is in progress and there is something to compute."""
        replica = self._replicas[number]
        self._unreported.add(number)
        if not replica.stepping and (end := replica.begin_step(now)) is not None:
            replica.stepping = True
            self._schedule(end, self._end_step, number)

    def _end_step(self, now: float, number: int) -> None:
        replica = self._replicas[number]
        if not replica.alive:
            return
        first, last = replica.end_step(now)
        replica.stepping = False
        for job in first:
            self._first_token_at[job.index] = now
        for job in last:
            self._last_token_at[job.index], self._answered_by[job.index] = now, number
        self._unfinished -= len(last)
        self._step(now, number)

    # --- reports, moves and deaths

    def _report(self, now: float) -> None:
        self._refresh()
        self._schedule(now + self._report_seconds, self._report)

    def _refresh(self) -> None:
        """Update the router's views of all replicas that have changed."""
        for number in self._unreported:
            replica = self._replicas[number]
            self._views[number] = replace(
                self._views[number], queued_prefill_tokens=replica.uncached, queued=len(replica.queue),
                running=replica.running, kv_usage=replica.kv_used / replica.times.kv_tokens, accepting=replica.alive)
        self._unreported.clear()

    def _rebalance(self, now: float) -> None:
        alive = [number for number, replica in enumerate(self._replicas) if replica.alive]
        for move in rebalance_load([len(self._replicas[number].queue) for number in alive]):
            source, target = alive[move.source], alive[move.target]
            for _ in range(move.count):
                self._refresh()
                queue = self._replicas[source].queue
                if queue and worth_moving(self._views[source], self._views[target], queue[-1].request.blocks):
                    self._put(now, target, self._replicas[source].take_last(now))
                    self._unreported.add(source)
                    self._moved += 1
        self._schedule(now + self._rebalance_seconds, self._rebalance)

    def _die(self, now: float, number: int) -> None:
        """End a replica and route its requests again. The router knows at once, because its connections break."""
        self._views[number] = replace(self._views[number], accepting=False)
        self._unreported.add(number)
        for job in self._replicas[number].die(now):
            self._route(now, Job(job.index, job.request))
