"""One request's tokens and where it stands."""

import enum
from dataclasses import dataclass, field
from typing import Any

from qwen_jax.engine.scheduling.page_pool import PAGE, chain

MOST = 1 << 30


class State(enum.Enum):
    WAITING = "waiting"  # holds no pages and no slot
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)  # two sequences are never equal: identity is what `remove` and `in` must compare
class Sequence:
    """The engine fills the fields up to `burst`, `salt` and `reusable`; the scheduler writes the others."""

    request_id: str | int
    prompt: list[int]
    max_new_tokens: int
    params: Any = None  # sampling options, opaque here
    priority: int = 0  # the lowest runs first
    deadline: float | None = None  # when it is aborted, in seconds of the engine's clock
    version: int = 0  # of the weights it runs with: one for life
    min_new_tokens: int = 0  # no dispatch samples tokens on both sides of it
    burst: int = MOST  # tokens that one dispatch may sample
    output: list[int] = field(default_factory=list)
    arrival: int = -1  # order of `Scheduler.add`
    schedule: str | None = None  # set at first admission and never changed, except by a fall back
    wide: bool = False  # computed in 16 bits, because 8 did not do
    pages: list[int] = field(default_factory=list)  # position p lives in pages[p // PAGE] at offset p % PAGE
    slot: int | None = None  # row of the per-sequence device state while running, 0 .. max_batch_size - 1
    num_computed: int = 0  # tokens whose K and V are in `pages`
    num_reused: int = 0  # of them, those that were there at the last admission
    num_kept: int = 0  # pages offered to the prefix cache so far
    salt: bytes = b""  # what besides the tokens decides K and V: only sequences of the same salt share pages
    reusable: int | None = None  # tokens that may be reused; None for all (one is always computed)
    keys: list[bytes] = field(default_factory=list)  # of the first full pages of `tokens`
    prefill_end: int = field(init=False)  # tokens the prefill must cover; grows when a preempted one starts again
    last_step: int = -1  # the step this sequence took part in last, for fair rotation
    state: State = State.WAITING
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "error"

    def __post_init__(self):
        self.prefill_end = self.num_tokens

    @property
    def tokens(self) -> list[int]:
        """All known tokens: the prompt and what was sampled so far (a new list)."""
        return self.prompt + self.output

    def page_keys(self, count: int) -> list[bytes]:
        """Keys of the first `count` pages, which known tokens fill."""
        if len(self.keys) < count:
            tokens = self.tokens
            while len(self.keys) < count:
                here = len(self.keys) * PAGE
                self.keys.append(chain(self.keys[-1] if self.keys else self.salt, tokens[here:here + PAGE]))
        return self.keys[:count]

    @property
    def last_token(self) -> int:
        """The token a decode step feeds in."""
        return self.output[-1] if self.output else self.prompt[-1]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    def room(self, most: int, max_seq_len: int) -> int:
        """How many tokens one dispatch may sample, at most `most`."""
        before_minimum = self.min_new_tokens - len(self.output)
        return min(most, self.burst, self.max_new_tokens - len(self.output), max_seq_len - self.num_tokens,
                   before_minimum if before_minimum > 0 else MOST)

    @property
    def in_prefill(self) -> bool:
        """Known tokens have yet to be computed before the next one can be sampled. (A decoding sequence has exactly
        one token that is not computed, but so has a one-token prompt: hence the explicit end.)"""
        return self.num_computed < self.prefill_end
