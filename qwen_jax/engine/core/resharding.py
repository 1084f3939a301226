"""From one plan to another between two steps, with requests in flight."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from qwen_jax.engine.compiled.compile_counter import planned
from qwen_jax.engine.core.engine_core import EngineCore
from qwen_jax.engine.core.replica import Deployment, Replica
from qwen_jax.engine.runner import kv_transfer
from qwen_jax.engine.scheduling.page_pool import pages_for
from qwen_jax.engine.scheduling.sequence import Sequence, State
from qwen_jax.engine.weights.weight_store import VersionedWeights
from qwen_jax.errors import UserError
from qwen_jax.parallel.plan import ParallelPlan


def prepare(deployment: Deployment, progress: bool) -> None:
    """Compiles all that running by this plan, and moving to and from it, needs."""
    for runner in deployment.runners:
        if not runner.ready:
            runner.compile(progress)
        with planned():
            if not runner.movers:
                runner.movers = [kv_transfer.KVTransfer(stage) for stage in runner.stages]


def move(core: EngineCore, before: Deployment, after: Deployment, draft: VersionedWeights | None) -> None:
    """Weights, adapters, requests and what they have computed, from one plan's devices to another's.

    Both have been prepared. When it fails in between, the loop has stopped.
    """
    core.settle()
    for replica in before.replicas:
        for seq in (*replica.scheduler.running, *replica.scheduler.waiting):
            after.replicas[0].scheduler.check(seq)  # while nothing has changed
    try:
        taken = [_take(replica) for replica in before.replicas]
        for runner in before.runners:
            runner.pause()
        core.weights.rearrange(after.sharding)
        if draft is not None:
            draft.rearrange(after.draft_sharding)
        core.adapters.rearrange(after.sharding.parts)
        for runner in after.runners:
            runner.resume()
        core.replicas, core.homes = after.replicas, _put(taken, after.replicas)
    except BaseException as error:
        core.failure = error
        raise


class Taken(NamedTuple):
    """A replica's sequences.

    Attributes:
      going_on: those whose contents are kept; waiting: the others.
      pages: of each of the first, where its pages are among those in ``contents``, and how many it had beyond these.
    """

    going_on: list[Sequence]
    waiting: list[Sequence]
    pages: list[tuple[list[int], int]]
    contents: kv_transfer.Contents


def _take(replica: Replica) -> Taken:
    scheduler = replica.scheduler
    going_on = [seq for seq in scheduler.running if not seq.wide and seq.num_computed]
    filled = [seq.pages[:pages_for(seq.num_computed)] for seq in going_on]
    ids = sorted({page for pages in filled for page in pages})
    place = {page: at for at, page in enumerate(ids)}
    taken = Taken(going_on, [seq for seq in (*scheduler.running, *scheduler.waiting) if seq not in going_on],
                  [([place[page] for page in pages], len(seq.pages) - len(pages))
                   for seq, pages in zip(going_on, filled, strict=True)],
                  kv_transfer.read(replica.runner, ids, [seq.slot for seq in going_on]))
    for seq in taken.waiting:
        if seq.state is State.RUNNING:
            scheduler.lose_pages(seq)
    for seq in (*going_on, *taken.waiting):
        scheduler.withdraw(seq)
    scheduler.pool.forget_all()
    return taken


def _put(taken: list[Taken], replicas: list[Replica]) -> dict[int | str, Replica]:
    """The sequences into these replicas, the first by rank first; returns where each is now."""
    homes: dict[int | str, Replica] = {}
    new_page: dict[tuple[int, int, int], int] = {}  # of a replica, for an old replica's page
    slots: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # of both, pairs of index and new slot
    everyone = [(seq, index, source, one) for source, one in enumerate(taken) for index, seq in enumerate(one.going_on)]
    for seq, index, source, one in sorted(everyone, key=lambda item: (item[0].priority, item[0].arrival)):
        places, more = one.pages[index]
        for target in sorted(range(len(replicas)), key=lambda at: replicas[at].scheduler.num_sequences):
            scheduler = replicas[target].scheduler
            missing = [place for place in places if (target, source, place) not in new_page]
            if scheduler.free_slots and scheduler.pool.can_allocate(len(missing) + more):
                break
        else:
            scheduler.lose_pages(seq)
            one.waiting.append(seq)
            continue
        scheduler.pool.share([new_page[target, source, place] for place in places if place not in missing])
        fresh = scheduler.pool.allocate(len(missing) + more)
        new_page.update({(target, source, place): page for place, page in zip(missing, fresh, strict=False)})
        scheduler.adopt(seq, [new_page[target, source, place] for place in places] + fresh[len(missing):])
        slots[target, source].append((index, seq.slot))
        homes[seq.request_id] = replicas[target]
    for target, source in sorted(slots):
        pages = [(place, page) for (to, by, place), page in new_page.items() if (to, by) == (target, source)]
        indices, into = zip(*slots[target, source], strict=True)
        kv_transfer.write(replicas[target].runner, [page for _, page in pages], into,
                          taken[source].contents.of([place for place, _ in pages], indices))
    for seq in sorted((seq for one in taken for seq in one.waiting), key=lambda seq: (seq.priority, seq.arrival)):
        homes[seq.request_id] = min(replicas, key=lambda replica: replica.scheduler.num_sequences)
        homes[seq.request_id].scheduler.add(seq)
    return homes


@dataclass
class LoadPolicy:
    """Two plans, and the load that each is for.

    Few requests are answered soonest when all devices work on each of them (tensor parallelism); many are answered
    fastest together when the devices work on different ones (replicas). A plan is left only when the load has been the
    other's for a while, and between the two loads nothing changes: moving costs as much as some steps.

    Attributes:
      latency, throughput: the plans.
      low: requests, waiting and running, up to which ``latency`` is the better one; high: from which ``throughput`` is.
      hold_seconds: for how long the load must have been so.

    Raises UserError for loads that leave no distance, and for a negative time.
    """

    latency: ParallelPlan
    throughput: ParallelPlan
    low: int
    high: int
    hold_seconds: float = 5.0
    _since: float | None = field(default=None, init=False, repr=False)  # the load has been for the other plan

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(f"low={self.low} and high={self.high}: low must be smaller, or the plans would alternate")
        if self.hold_seconds < 0:
            raise UserError(f"hold_seconds must not be negative, and is {self.hold_seconds}")

    def decide(self, plan: ParallelPlan, load: int, now: float) -> ParallelPlan | None:
        """The plan to go to, or None to stay, with ``load`` requests at the time ``now`` in seconds. To be asked often:
        a load that nobody asked about was not seen."""
        if plan == self.throughput:
            other, wanted = self.latency, load <= self.low
        else:
            other, wanted = self.throughput, load >= self.high
        if not wanted:
            self._since = None
            return None
        self._since = now if self._since is None else self._since
        if now - self._since < self.hold_seconds:
            return None
        self._since = None
        return other
