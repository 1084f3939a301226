"""A replica of the engine as the load balancer sees it, and the requests that were sent to it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qwen_kernels.page import PAGE

from qwen_jax.cluster.routing.policies import PrefixIndex, ReplicaView
from qwen_jax.serving.ipc.engine_client import Answer, EngineClient
from qwen_jax.serving.ipc.messages import RequestOptions

BYTES_PER_TOKEN = 4  # of text, about: prompts are tokenised in the engines, not here
BLOCK_BYTES = PAGE * BYTES_PER_TOKEN
PREFIX_INDEX_BLOCKS = 50_000  # for each replica


@dataclass(frozen=True)
class PendingRequest:
    """A request that a replica has not answered completely.

    Attributes:
      options: the request as it is sent to an engine.
      blocks: keys of the prompt's full blocks.
      deaths: number of engines that died while they had it.
    """

    options: RequestOptions
    blocks: tuple[bytes, ...]
    deaths: int = 0


@dataclass(eq=False)
class Replica:
    """An engine and its state in the load balancer.

    Attributes:
      name: unique name; an engine that replaces a dead one has a new name.
      make_link: function that makes a connection to a new engine of the same kind, which is not yet started.
      link: connection to the engine.
      ready: true once it has the adapters and weights that the others have, so that it may get requests.
      retiring: true if it gets no more requests and ends after its last one.
      on_trial: true if it has weights that the other replicas do not have.
      has_previous: true if a rollback of its engine leads to the previous weights of the other replicas.
      prefix_index: the prompt blocks that were sent to it.
      pending: its open requests.
      supervisor: task that starts the engine again after it has died.
    """

    name: str
    make_link: Callable[[], EngineClient]
    link: EngineClient
    ready: bool = True
    retiring: bool = False
    on_trial: bool = False
    has_previous: bool = False
    prefix_index: PrefixIndex = field(default_factory=lambda: PrefixIndex(PREFIX_INDEX_BLOCKS))
    pending: dict[Answer, PendingRequest] = field(default_factory=dict)
    supervisor: asyncio.Task | None = None

    @property
    def alive(self) -> bool:
        return self.ready and self.link.failure is None and self.link.facts is not None

    def view(self) -> ReplicaView:
        """Return the replica's load as the routing policy sees it: its last report, and what was sent to it since."""
        gauges = self.link.gauges
        waiting = [request.blocks for answer, request in self.pending.items() if not answer.begun]
        queued = min(len(waiting), max(len(self.pending) - gauges.running, 0))
        return ReplicaView(
            self.name, queued_prefill_tokens=sum(map(len, waiting)) * PAGE, queued=queued,
            running=len(self.pending) - queued,
            kv_usage=gauges.pages_used / gauges.pages_total if gauges.pages_total else 0.0,
            accepting=self.alive, prefix=self.prefix_index)


def text_blocks(prompt: Any, adapter: str | None, cache_salt: str = "") -> tuple[bytes, ...]:
    """Return a key for each full block of a prompt: ``BLOCK_BYTES`` of its text, or of its JSON if it is not text.

    A key is 128 bits of BLAKE2 of the block and of the key before it, so it stands for the whole prompt up to there.
    Adapter and salt are part of the first key, because requests in which these differ share no cached prefix.
    """
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    content, key, keys = text.encode("utf-8", "replace"), repr((adapter, cache_salt)).encode(), []
    for start in range(0, len(content) - BLOCK_BYTES + 1, BLOCK_BYTES):
        key = hashlib.blake2b(key + content[start:start + BLOCK_BYTES], digest_size=16).digest()
        keys.append(key)
    return tuple(keys)
