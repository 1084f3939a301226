"""One of several engines, as a balancer sees it, and what was asked of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_jax.cluster.routing.policies import PrefixIndex, ReplicaView
from qwen_jax.serving.ipc.engine_client import Answer, EngineLink

BLOCK_BYTES, BYTES_PER_TOKEN = 256, 4  # of text: prompts are tokenised in the engines
REMEMBERED_BLOCKS = 50_000  # of each engine


@dataclass(frozen=True)
class Asked:
    """What was asked, the prompt's blocks, and how many engines have died of it, or with it."""

    options: Mapping[str, Any]
    blocks: tuple[bytes, ...]
    deaths: int = 0


@dataclass(eq=False)
class Member:
    """One engine.

    Attributes:
      make: a link to one like it, not yet started.
      ready: it has what the others have (adapters, and weights that came later) and is to get requests.
      retiring: it ends once its requests have. on_trial: it has weights that the others do not have.
      has_previous: its engine's weights before the current ones are those that the others' were.
      sent: its open requests, by answer.
      keeper: starts it again when it has died.
    """

    name: str
    make: Callable[[], EngineLink]
    link: EngineLink
    ready: bool = True
    retiring: bool = False
    on_trial: bool = False
    has_previous: bool = False
    prefix: PrefixIndex = field(default_factory=lambda: PrefixIndex(REMEMBERED_BLOCKS))
    sent: dict[Answer, Asked] = field(default_factory=dict)
    keeper: asyncio.Task | None = None

    @property
    def alive(self) -> bool:
        return self.ready and self.link.failure is None and self.link.facts is not None

    def view(self) -> ReplicaView:
        gauges = self.link.gauges
        waiting = [asked.blocks for answer, asked in self.sent.items() if not answer.begun]
        queued = min(len(waiting), max(len(self.sent) - gauges.get("running", 0), 0))
        tokens = sum(map(len, waiting)) * BLOCK_BYTES // BYTES_PER_TOKEN
        usage = gauges["pages_used"] / gauges["pages_total"] if gauges.get("pages_total") else 0.0
        return ReplicaView(self.name, tokens, queued, len(self.sent) - queued, usage, self.alive, self.prefix)


def text_blocks(prompt: Any, adapter: str | None) -> tuple[bytes, ...]:
    """Keys of a prompt's full blocks, as `routing.block_hashes` makes them of tokens: here of text, or of what stands
    for it. The adapter decides what may be shared, too."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, sort_keys=True)
    content, before, keys = text.encode("utf-8", "replace"), repr(adapter).encode(), []
    for start in range(0, len(content) - BLOCK_BYTES + 1, BLOCK_BYTES):
        before = hashlib.blake2b(before + content[start:start + BLOCK_BYTES], digest_size=16).digest()
        keys.append(before)
    return tuple(keys)
