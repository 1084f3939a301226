"""The routing policy `choose`, which picks a replica for a request from what the router knows of each replica.

Every policy is called as ``policy(views, prompt_blocks, rng)`` and returns a replica's name, or None when no replica
accepts requests. The policies that `choose` is compared with are in `qwen_jax.cluster.simulation.policies`.

  views: one `ReplicaView` for each replica.
  prompt_blocks: keys of the prompt's full blocks, in order (`text_blocks` in `routing/replica.py`).
  rng: a ``random.Random``; the same seed routes the same way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, replace
from random import Random

from qwen_kernels.page import PAGE

from qwen_jax.errors import UserError

# Prompt tokens that a request counts for beside its prompt: a router cannot know how long an answer becomes. A larger
# value makes the load more even and the first tokens later. In the simulator the most loaded of eight replicas has
# 1.20 x the mean with 0, 1.11 with 400 and 1.07 with 1,500, and the p99 first token comes after 5.1, 5.0 and 5.9 s; p99
# latency changes by 2 %.
DECODE_TOKENS = 1500


class PrefixIndex:
    """A router's estimate of a replica's prefix cache: keys of the last ``capacity`` prompt blocks sent there.

    A router does not see inside a replica. The least recently used keys are dropped first, in the order in which the
    prefix cache itself evicts: the end of a prompt first.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 0:
            raise UserError(f"capacity of a prefix index must be 0 blocks or more, not {capacity}")
        self.capacity = capacity
        self._keys: OrderedDict[Hashable, None] = OrderedDict()

    def add(self, blocks: Sequence[Hashable]) -> None:
        """Add a prompt's blocks as the most recently used. Of these, the last block of the prompt is dropped first."""
        for key in reversed(blocks[:self.capacity]):
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self.capacity:
            self._keys.popitem(last=False)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)


@dataclass(frozen=True)
class ReplicaView:
    """A router's knowledge of a replica: its last report, and the requests that were sent there since.

    Attributes:
      name: the replica's name, which policies return.
      queued_prefill_tokens: prompt tokens of all its requests that are neither computed nor cached yet.
      queued: number of its requests that have not begun.
      running: number of its requests that have begun.
      kv_usage: share of the KV cache that running requests hold, 0 to 1.
      accepting: true if it is alive and takes new requests.
      prefix: keys of the blocks that its prefix cache probably holds; a `PrefixIndex` or a set.
      prefill_tokens_per_second: speed at which it computes prompts when it does nothing else.
    """

    name: str
    queued_prefill_tokens: int = 0
    queued: int = 0
    running: int = 0
    kv_usage: float = 0.0
    accepting: bool = True
    prefix: Container[Hashable] = frozenset()
    prefill_tokens_per_second: float = 5000.0

    @property
    def requests(self) -> int:
        return self.queued + self.running


def cached_blocks(prefix: Container[Hashable], blocks: Sequence[Hashable]) -> int:
    """Return how many of a prompt's ``blocks``, counted from its beginning, are in ``prefix`` without a gap."""
    for number, key in enumerate(blocks):
        if key not in prefix:
            return number
    return len(blocks)


def uncached_tokens(view: ReplicaView, blocks: Sequence[Hashable]) -> int:
    """Return the number of tokens in a prompt's full blocks that the replica would have to compute.

    Tokens after the last full block are left out: they cost the same on every replica.
    """
    return PAGE * (len(blocks) - cached_blocks(view.prefix, blocks))


def expected_wait(view: ReplicaView, prompt_blocks: Sequence[Hashable]) -> float:
    """Estimate the seconds for which a request would wait at a replica:

        (queued_prefill_tokens + uncached_tokens + DECODE_TOKENS x requests) / prefill_tokens_per_second
        ------------------------------------------------------------------------------------------------
                                          1 - kv_usage^4

    Tokens are counted and not requests, because a request waits for the prompts before it and their lengths differ by
    a factor of 1,000. The request's own uncached tokens draw it to the replica that has its prefix, unless the queue
    there takes longer than the prefix saves. Answers, whose lengths are unknown, count as a constant per request. A KV
    cache costs nothing until it is nearly full (x 1.07 at a half, x 2.9 at 90 %, at most x 1,000): then a request waits
    for others to end, or the engine preempts requests and computes them again.
    """
    tokens = view.queued_prefill_tokens + uncached_tokens(view, prompt_blocks) + DECODE_TOKENS * view.requests
    return tokens / view.prefill_tokens_per_second / max(1 - view.kv_usage**4, 1e-3)


def choose(views: Sequence[ReplicaView], prompt_blocks: Sequence[Hashable], rng: Random) -> str | None:
    """Return the name of the replica with the least `expected_wait` of four: two random replicas, and two random ones
    of those that hold the longest beginning of the prompt.

    The best of all replicas would be worse: several routers with equally old reports would all send to the same
    replica, and the best of two random ones is nearly as good (M. Mitzenmacher, The power of two choices in randomized
    load balancing, 2001). Holders of the prefix are added because two random replicas of many rarely hold it; two of
    them, because a prefix that many requests share is held by many replicas.
    """
    candidates = pick_two(accepting(views), rng) + pick_two(_prefix_holders(views, prompt_blocks), rng)
    return min(candidates, key=lambda view: expected_wait(view, prompt_blocks)).name if candidates else None


def worth_moving(source: ReplicaView, target: ReplicaView, blocks: Sequence[Hashable]) -> bool:
    """Return true if the last request in the queue of ``source``, with these blocks, would wait less at ``target``.

    `rebalance_load` counts requests and knows neither their lengths nor their prefixes, so some of the moves that it
    proposes would make a request wait longer. This function rejects those.
    """
    before = replace(source, queued=source.queued - 1)  # the request's own tokens are already in the source's count
    return expected_wait(target, blocks) < expected_wait(before, ())


def accepting(views: Sequence[ReplicaView]) -> list[ReplicaView]:
    return [view for view in views if view.accepting]


def pick_two(views: list[ReplicaView], rng: Random) -> list[ReplicaView]:
    """Return the views of two different random replicas, or all views if there are fewer."""
    return rng.sample(views, min(2, len(views)))


def _prefix_holders(views: Sequence[ReplicaView], blocks: Sequence[Hashable]) -> list[ReplicaView]:
    """Return the replicas that have cached the longest beginning of a prompt; an empty list if none has any of it."""
    longest, holders = 1, []
    for view in views:
        # An index never drops a key before the keys after it, so two look-ups tell if a replica has as much, or more.
        if view.accepting and len(blocks) >= longest and blocks[longest - 1] in view.prefix:
            if len(blocks) > longest and blocks[longest] in view.prefix:
                longest, holders = cached_blocks(view.prefix, blocks), []
            holders.append(view)
    return holders
