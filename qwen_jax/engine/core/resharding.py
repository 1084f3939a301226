"""Change of the parallel plan between two steps, with requests in flight."""


from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from qwen_jax.engine.core.engine_core import EngineCore
from qwen_jax.engine.core.replica import Deployment, Replica
from qwen_jax.engine.runner import kv_transfer
from qwen_jax.engine.scheduling.page_pool import pages_for
from qwen_jax.engine.scheduling.scheduler import rank
from qwen_jax.engine.scheduling.sequence import Sequence, State
from qwen_jax.engine.weights.weight_store import VersionedWeights


def prepare(deployment: Deployment, progress: bool) -> None:
    """Compile the programs of a plan's replicas, and those that move the contents of pages to and from them."""
    for runner in deployment.runners:
        if not runner.ready:
            runner.compile(progress)
        runner.prepare_transfers()


def move(core: EngineCore, before: Deployment, after: Deployment, draft: VersionedWeights | None) -> None:
    """Move weights, adapters and requests, with their keys and values, to the devices of another plan.

    Both plans have been prepared. When it fails half-way, the engine has stopped.
    """
    core.settle()
    for replica in before.replicas:
        for seq in (*replica.scheduler.running, *replica.scheduler.waiting):
            after.replicas[0].scheduler.check(seq)  # while nothing has changed
    try:
        taken = [_take_out(replica) for replica in before.replicas]
        for runner in before.runners:
            runner.pause()
        core.weights.rearrange(after.sharding)
        if draft is not None:
            draft.rearrange(after.draft_sharding)
        core.adapters.rearrange(after.sharding.shards)
        for runner in after.runners:
            runner.resume()
        core.go_on_with(after.replicas, _put_into(after.replicas, taken))
    except BaseException as error:
        core.fail(error)
        raise


class TakenSequence(NamedTuple):
    """A running sequence on its way to another replica, which keeps its computed keys and values.

    Attributes:
      places: where the contents of its pages are in `TakenReplica.contents`.
      empty_pages: number of pages that it held beyond these.
    """

    seq: Sequence
    places: list[int]
    empty_pages: int


class TakenReplica(NamedTuple):
    """The sequences taken out of one replica of the old plan, with the contents of their pages.

    Attributes:
      running: sequences that go on. contents: of their pages, and of their rows of the token counts, in this order.
      waiting: the other sequences, all of whose tokens are to be computed.
    """

    running: list[TakenSequence]
    waiting: list[Sequence]
    contents: kv_transfer.Contents


def _take_out(replica: Replica) -> TakenReplica:
    """Take all sequences out of a replica, and read the contents of their pages."""
    scheduler = replica.scheduler
    running = [seq for seq in scheduler.running if not seq.wide and seq.num_computed]
    waiting = [seq for seq in (*scheduler.running, *scheduler.waiting) if seq not in running]
    filled = [seq.pages[:pages_for(seq.num_computed)] for seq in running]
    ids = sorted({page for pages in filled for page in pages})
    place = {page: index for index, page in enumerate(ids)}
    contents = kv_transfer.read(replica.runner.transfers, ids, [seq.slot for seq in running])
    taken = [TakenSequence(seq, [place[page] for page in pages], len(seq.pages) - len(pages))
             for seq, pages in zip(running, filled, strict=True)]
    for seq in waiting:
        if seq.state is State.RUNNING:
            seq.discard_computed()
    for seq in (*running, *waiting):
        scheduler.withdraw(seq)
    scheduler.pool.forget_all()
    return TakenReplica(taken, waiting, contents)


def _put_into(replicas: list[Replica], taken: list[TakenReplica]) -> dict[int | str, Replica]:
    """Give taken sequences to replicas of the new plan, by priority and arrival, and write the contents of their pages.

    Returns the replica of each by request id.
    """
    replica_of: dict[int | str, Replica] = {}
    pages: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)  # (target, source): place to page
    slots: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # (target, source): (index, slot)
    waiting = [seq for one in taken for seq in one.waiting]
    running = [(item, source, index) for source, replica in enumerate(taken)
               for index, item in enumerate(replica.running)]
    for item, source, index in sorted(running, key=lambda entry: rank(entry[0].seq)):
        target = _with_room(replicas, item, [pages[number, source] for number in range(len(replicas))])
        if target is None:
            item.seq.discard_computed()
            waiting.append(item.seq)
            continue
        _adopt(replicas[target], item, pages[target, source])
        slots[target, source].append((index, item.seq.slot))
        replica_of[item.seq.request_id] = replicas[target]
    for target, source in sorted(slots):
        indices, new_slots = zip(*slots[target, source], strict=True)
        places, new_pages = zip(*pages[target, source].items(), strict=True)
        kv_transfer.write(replicas[target].runner.transfers, new_pages, new_slots,
                          taken[source].contents.select(places, indices))
    for seq in sorted(waiting, key=rank):
        replica_of[seq.request_id] = min(replicas, key=lambda replica: replica.scheduler.num_sequences)
        replica_of[seq.request_id].scheduler.add(seq)
    return replica_of


def _with_room(replicas: list[Replica], item: TakenSequence, pages: Iterable[dict[int, int]]) -> int | None:
    """Return the index of the replica with the fewest sequences that has room for ``item``; None if none has.

    pages: of each replica, the pages that hold contents of the sequence's old replica already, by place.
    """
    pages = list(pages)
    for index in sorted(range(len(replicas)), key=lambda index: replicas[index].scheduler.num_sequences):
        scheduler = replicas[index].scheduler
        missing = sum(place not in pages[index] for place in item.places)
        if scheduler.free_slots and scheduler.pool.can_allocate(missing + item.empty_pages):
            return index
    return None


def _adopt(replica: Replica, item: TakenSequence, page_of: dict[int, int]) -> None:
    """Add a taken sequence to a replica, with pages for its contents.

    page_of: pages by their place in the contents that the replica has for other sequences; new ones are added.
    """
    scheduler, missing = replica.scheduler, [place for place in item.places if place not in page_of]
    scheduler.pool.share([page_of[place] for place in item.places if place not in missing])
    fresh = scheduler.pool.allocate(len(missing) + item.empty_pages)
    page_of.update(zip(missing, fresh[: len(missing)], strict=True))
    scheduler.adopt(item.seq, [page_of[place] for place in item.places] + fresh[len(missing):])
