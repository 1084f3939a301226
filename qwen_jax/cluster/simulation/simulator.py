"""A cluster under a virtual clock: the router's own policies over replicas that are queues and tables of times.

Simulated are continuous batching with chunked prefill, each replica's prefix cache, a router that knows of a replica
what it last reported and what was sent there since, moves of queued requests, and deaths. Left out are the network,
preemption, and whatever replicas of one machine do to each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from random import Random

import numpy as np

from qwen_jax.cluster.routing.policies import PrefixIndex, ReplicaView, sent, worth_moving
from qwen_jax.cluster.routing.rebalance import rebalance_load
from qwen_jax.cluster.simulation.replica import Job, Replica, ServiceTimes, kv_tokens
from qwen_jax.cluster.simulation.traces import Request
from qwen_jax.errors import UserError


@dataclass(frozen=True)
class Result:
    """What became of N requests on R replicas.

    Loads are those of the window from second 0 to the last arrival: that replicas then run empty one by one says
    nothing about how even the load was.

    Attributes:
      latency, first_token: float [N], seconds from arrival to the last and to the first token.
      replica: int [N], the one that answered.
      busy: float [R], seconds of the window in which a replica was computing. It hides much: requests share steps, so
        twice as many keep a replica busy for less than twice as long, and none for longer than the window.
      in_flight: float [R], requests queued or running on a replica, averaged over the window.
      finished, tokens: requests that ended in the window, and their tokens of prompt and answer.
      moved: how often a request moved from one queue to another.
      cached_share: of all prompt tokens, those that a prefix cache had.
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
    """The largest load to the mean load: 1 is even."""
    return float(load.max() / load.mean()) if load.any() else 1.0


def simulate(trace: Sequence[Request], replicas: Sequence[ServiceTimes], policy: Callable, *, seed: int = 0,
             report_seconds: float = 0.1, rebalance_seconds: float | None = None,
             deaths: Mapping[int, float] | None = None) -> Result:
    """The trace through a policy, until its last request has ended. The same arguments give the same result.

    Args:
      trace: in order of arrival.
      policy: of `qwen_jax.cluster.routing.policies`; a new `RoundRobin` for each simulation.
      report_seconds: how often the router hears from the replicas; 0 for a router that always knows.
      rebalance_seconds: how often `rebalance_load` looks at the queues; None for never. Who came last moves, where
        that is `worth_moving`.
      deaths: replica -> second at which it dies. What it had starts again elsewhere.

    Raises UserError for a trace that cannot be, a request that no replica can hold, and when no replica is left.
    """
    _check(trace, replicas)
    return _Simulation(trace, replicas, policy, seed, report_seconds, rebalance_seconds, deaths or {}).run()


def _check(trace: Sequence[Request], replicas: Sequence[ServiceTimes]) -> None:
    if not trace or not replicas:
        raise UserError("a simulation needs a request and a replica")
    if any(later.arrival < earlier.arrival for earlier, later in zip(trace, trace[1:])) or trace[0].arrival < 0:
        raise UserError("requests must be in order of arrival, from second 0: sort the trace")
    if trace[-1].arrival == 0:
        raise UserError("all requests arrive at second 0, which leaves no time to measure loads: let the last be later")
    if min(min(request.prompt_tokens, request.output_tokens) for request in trace) < 1:
        raise UserError("a request has no prompt or no answer: both have at least one token")
    largest, room = max(map(kv_tokens, trace)), min(times.kv_tokens for times in replicas)
    if largest > room:
        raise UserError(f"a request of {largest} tokens does not fit into a KV cache of {room}: raise kv_tokens")


class _Simulation:
    def __init__(self, trace: Sequence[Request], replicas: Sequence[ServiceTimes], policy: Callable, seed: int,
                 report_seconds: float, rebalance_seconds: float | None, deaths: Mapping[int, float]) -> None:
        self._trace, self._policy, self._rng = trace, policy, Random(seed)
        self._report_seconds, self._rebalance_seconds = report_seconds, rebalance_seconds
        self._window = trace[-1].arrival
        self._replicas = [Replica(times, self._window) for times in replicas]
        self._indexes = [PrefixIndex(times.prefix_blocks) for times in replicas]
        self._views = [ReplicaView(str(number), prefix=index, prefill_tokens_per_second=1 / times.per_prefill_token)
                       for number, (times, index) in enumerate(zip(replicas, self._indexes))]
        self._unreported: set[int] = set()  # replicas that have changed since their last report
        self._first, self._last = np.full((2, len(trace)), np.nan)
        self._answered_by = np.full(len(trace), -1)
        self._unfinished, self._moved = len(trace), 0
        self._events: list[tuple[float, int, Callable, tuple]] = []
        self._order = count()
        for number, second in deaths.items():
            self._at(second, self._die, number)
        if report_seconds:
            self._at(report_seconds, self._report)
        if rebalance_seconds:
            self._at(rebalance_seconds, self._rebalance)

    def run(self) -> Result:
        for index, request in enumerate(self._trace):
            self._run_until(request.arrival)
            self._route(request.arrival, Job(index, request))
        self._run_until(np.inf)
        arrivals = np.array([request.arrival for request in self._trace])
        within = [request for request, last in zip(self._trace, self._last) if last <= self._window]
        return Result(
            self._window, self._last - arrivals, self._first - arrivals, self._answered_by,
            busy=np.array([replica.busy for replica in self._replicas]),
            in_flight=np.array([replica.in_flight for replica in self._replicas]) / self._window,
            finished=len(within), tokens=sum(map(kv_tokens, within)), moved=self._moved,
            cached_share=1 - (sum(replica.computed for replica in self._replicas)
                              / sum(request.prompt_tokens for request in self._trace)))

    def _run_until(self, when: float) -> None:
        while self._unfinished and self._events and self._events[0][0] <= when:
            now, _, call, arguments = heapq.heappop(self._events)
            call(now, *arguments)

    def _at(self, when: float, call: Callable, *arguments) -> None:
        heapq.heappush(self._events, (when, next(self._order), call, arguments))

    # --- requests

    def _route(self, now: float, job: Job) -> None:
        if not self._report_seconds:
            self._refresh()
        name = self._policy(self._views, job.request.blocks, self._rng)
        if name is None:
            raise UserError(f"no replica is left at second {now:g}: let one live")
        number = int(name)
        self._views[number] = sent(self._views[number], job.request.blocks)
        self._put(now, number, job)

    def _put(self, now: float, number: int, job: Job) -> None:
        self._indexes[number].add(job.request.blocks)
        self._replicas[number].put(job, now)
        self._step(now, number)

    def _step(self, now: float, number: int) -> None:
        """The next one, where none is in progress."""
        replica = self._replicas[number]
        self._unreported.add(number)
        if not replica.stepping and (end := replica.begin_step(now)) is not None:
            replica.stepping = True
            self._at(end, self._end_step, number)

    def _end_step(self, now: float, number: int) -> None:
        replica = self._replicas[number]
        if not replica.alive:
            return
        first, last = replica.end_step(now)
        replica.stepping = False
        for job in first:
            self._first[job.index] = now
        for job in last:
            self._last[job.index], self._answered_by[job.index] = now, number
        self._unfinished -= len(last)
        self._step(now, number)

    # --- from time to time

    def _report(self, now: float) -> None:
        self._refresh()
        self._at(now + self._report_seconds, self._report)

    def _refresh(self) -> None:
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
        self._at(now + self._rebalance_seconds, self._rebalance)

    def _die(self, now: float, number: int) -> None:
        """The router knows at once: its connections break."""
        self._views[number] = replace(self._views[number], accepting=False)
        self._unreported.add(number)
        for job in self._replicas[number].die(now):
            self._route(now, Job(job.index, job.request))
