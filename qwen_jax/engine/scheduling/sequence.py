"""Sequences, with their tokens and their state in the scheduler, and the plan of a step that computes some of them."""

import enum
from dataclasses import dataclass, field
from typing import Any

from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.page_pool import PAGE, chain

UNLIMITED = 1 << 30


class State(enum.Enum):
    """Place of a sequence in the scheduler: waiting, running or finished."""

    WAITING = "waiting"  # holds no pages and no slot
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)  # two sequences are never equal: identity is what `remove` and `in` must compare
class Sequence:
    """A request in the scheduler: its tokens, how many of them are computed, and the pages that hold them.

    The engine fills the fields up to `reusable`; the scheduler writes those after it.
    """

    request_id: str | int  # unique among the unfinished requests
    prompt: list[int]  # token ids, at least one
    max_new_tokens: int  # maximum length of the answer
    params: Any = None  # sampling options, opaque here
    priority: int = 0  # sequences with a lower number run first
    deadline: float | None = None  # seconds of the engine's clock at which it is aborted
    version: int = 0  # version of the weights that it runs with
    min_new_tokens: int = 0  # minimum length of the answer. No dispatch samples tokens on both sides of it.
    burst: int = UNLIMITED  # maximum tokens that one dispatch may sample
    cache_salt: str = ""  # of the client: part of ``salt``
    salt: bytes = b""  # stands for weights, adapter, attention, client: only sequences of the same salt share pages
    answered: bool = True  # whether tokens are wanted after the prompt, which then has to leave room for one
    reusable: int | None = None  # tokens that the prefix cache may provide; None for all but the last
    output: list[int] = field(default_factory=list)  # token ids sampled so far
    arrival: int = -1  # number given by `Scheduler.add`, ascending
    schedule: str | None = None  # chosen at the first admission and changed only by `Scheduler.fall_back`
    dense: bool = False  # whether it is in full attention although it is long (`Scheduler.settle_attention`)
    wide: bool = False  # whether it is computed in 16 bits because 8-bit steps failed for it
    pages: list[int] = field(default_factory=list)  # position p lives in pages[p // PAGE] at offset p % PAGE
    slot: int | None = None  # row of the token counts on the device while running, 0 .. max_batch_size - 1
    num_computed: int = 0  # tokens whose keys and values are in `pages`
    num_reused: int = 0  # computed tokens that the prefix cache had at the last admission
    num_kept: int = 0  # pages offered to the prefix cache so far
    keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of the first full pages of `tokens`
    prefill_end: int = field(init=False)  # tokens that the prefill must cover; after a preemption all known ones
    last_step: int = -1  # number of the last step that it took part in, for fair rotation
    state: State = State.WAITING
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"

    def __post_init__(self):
        self.prefill_end = self.num_tokens

    @property
    def tokens(self) -> list[int]:
        """All known tokens: the prompt and the answer so far (a new list)."""
        return self.prompt + self.output

    @property
    def num_tokens(self) -> int:
        """Number of known tokens: the prompt and the answer so far."""
        return len(self.prompt) + len(self.output)

    @property
    def last_token(self) -> int:
        """Last known token of the prompt and answer, which a decode step takes as its input."""
        return self.output[-1] if self.output else self.prompt[-1]

    @property
    def in_prefill(self) -> bool:
        """True while known tokens have to be computed before the next token can be sampled.

        A decoding sequence has exactly one token that is not computed, but so has a one-token prompt: hence the
        explicit `prefill_end`.
        """
        return self.num_computed < self.prefill_end

    def max_samples(self, limit: int, max_seq_len: int) -> int:
        """Return how many tokens one dispatch may sample for this sequence.

        At most `limit`; fewer where the answer ends before, or reaches its minimum length.
        """
        before_minimum = self.min_new_tokens - len(self.output)
        return min(limit, self.burst, self.max_new_tokens - len(self.output), max_seq_len - self.num_tokens,
                   before_minimum if before_minimum > 0 else UNLIMITED)

    def page_keys(self, count: int) -> list[bytes]:
        """Return the prefix-cache keys of the sequence's first `count` pages, all of whose tokens are known."""
        if len(self.keys) < count:
            tokens = self.tokens
            while len(self.keys) < count:
                start = len(self.keys) * PAGE
                self.keys.append(chain(self.keys[-1] if self.keys else self.salt, tokens[start:start + PAGE]))
        return self.keys[:count]

    def discard_computed(self) -> None:
        """Mark every known token, sampled ones included, as not computed."""
        self.num_computed = self.num_reused = self.num_kept = 0
        self.prefill_end = self.num_tokens


DRAWN = -1  # a draft that the draft model makes inside the step



@dataclass(frozen=True)
class PlannedRow:
    """Work of a step for one sequence: positions start .. start + count - 1, whose pages are already there.

    In a prefill these are known tokens, of which the last one may yield the next. In a decode step, position `start` is
    the last known token and each position yields a token: one after another, or all at once where `drafts` guess them.

    Attributes:
      samples: whether the row yields tokens: one, or in a decode step up to `count`.
      drafts: count - 1 guessed tokens after the last known one.
    """

    seq: Sequence
    start: int
    count: int
    samples: bool
    drafts: tuple[int, ...] = ()



@dataclass(frozen=True)
class StepPlan:
    """A step to run: its bucket and each sequence's work. Row i of the batch is rows[i]; other rows are padding."""

    bucket: Bucket
    rows: list[PlannedRow]

    @property
    def version(self) -> int:
        """Version of the weights that the step runs with."""
        return self.rows[0].seq.version
