"""Which sequences run in the next step, in which bucket.

First come, first served: running sequences always arrived before every waiting one. Steps alternate between prefill
and decode while both have work. When pages run out, the sequence that arrived last gives its pages back and starts
again later; the one that arrived first is never preempted, so every sequence finishes.

Full pages are offered to the pool's prefix cache once computed, and admission starts after the pages found there. A
sequence whose next page another one is about to compute waits for it, so a prefix that many share is computed once.
"""

import heapq
from collections import deque
from dataclasses import dataclass

from qwen_jax.engine.pages import PAGE, PagePool, pages_for
from qwen_jax.engine.schedule import (
    DEFAULT_POLICY,
    Bucket,
    Limits,
    SchedulePolicy,
    attention_of,
    dynamic_schedule,
    pick_prefill,
)
from qwen_jax.engine.sequence import Sequence, State
from qwen_jax.errors import UserError


@dataclass(frozen=True)
class PlannedRow:
    """Computes positions start .. start + count - 1 of `seq`, whose pages are already there."""

    seq: Sequence
    start: int
    count: int
    samples: bool  # the last position yields the sequence's next token


@dataclass(frozen=True)
class StepPlan:
    """One run of one executable. Row i of the batch is rows[i]; the bucket's other rows are padding."""

    bucket: Bucket
    rows: list[PlannedRow]


class Scheduler:
    """Call `plan`, run it, `commit` what was sampled; `add`, `abort` and `finish` come in between, not during."""

    def __init__(self, table: tuple[Bucket, ...], limits: Limits, pool: PagePool,
                 policy: SchedulePolicy = DEFAULT_POLICY, prefix_cache: bool = True):
        self.limits, self.pool, self.policy, self.prefix_cache = limits, pool, policy, prefix_cache
        self.prefix_queries = self.prefix_hits = 0  # pages looked up at admissions, and found
        self.waiting: deque[Sequence] = deque()  # by arrival; preempted sequences are at the front
        self.running: list[Sequence] = []  # by arrival
        self._sequences: dict[str | int, Sequence] = {}
        self._free_slots = list(range(limits.max_batch_size))  # a heap: low slots first
        self._computing: dict[bytes, Sequence] = {}  # keys of pages that running sequences have yet to prefill
        self._table = table
        self._arrivals = 0
        self._steps = 0
        self._last_phase = "decode"

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def check(self, seq: Sequence) -> None:
        """UserError if the request is malformed or could not finish even with the whole cache to itself."""
        length, longest = len(seq.prompt), self.limits.max_seq_len
        if seq.request_id in self._sequences:
            raise UserError(f"request {seq.request_id!r} is already queued or running: use another id")
        if not length:
            raise UserError("the prompt is empty: give at least one token")
        if seq.max_new_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {seq.max_new_tokens}")
        if length + 1 > longest:
            raise UserError(f"the prompt has {length} tokens and max_seq_len={longest} leaves no room for an answer: "
                            "shorten the prompt or raise max_seq_len")
        needed = pages_for(self._most_computed(seq))
        if needed > self.pool.capacity:
            raise UserError(f"the request may need {needed} pages of KV cache and the engine has {self.pool.capacity}: "
                            "shorten the prompt, lower max_tokens or give the engine more memory")

    def add(self, seq: Sequence) -> None:
        """Queues a request that passes `check`."""
        self.check(seq)
        seq.arrival = self._arrivals
        self._arrivals += 1
        self._sequences[seq.request_id] = seq
        self.waiting.append(seq)

    def abort(self, request_id: str | int) -> bool:
        """Ends a request and frees what it holds; False if there is no such request any more."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self.finish(seq, "abort")
        return seq is not None

    def finish(self, seq: Sequence, reason: str) -> None:
        """Ends `seq` and frees what it holds. A sequence that just ended by length may still be said to have ended by
        "stop" (its last token was the stop token) or "error": only the reason changes."""
        if seq.state is State.FINISHED:
            if seq.finish_reason == "length" and reason in ("stop", "error"):
                seq.finish_reason = reason
            return
        if seq.state is State.WAITING:
            self.waiting.remove(seq)
        else:
            self._release(seq)
        del self._sequences[seq.request_id]
        seq.state, seq.finish_reason = State.FINISHED, reason

    def plan(self) -> StepPlan | None:
        """The next step; None only when there is no work. Its sequences own pages and slots when this returns."""
        phases = [self._plan_prefill, self._plan_decode]
        if self._last_phase == "prefill":
            phases.reverse()
        for plan_phase in phases:
            if plan := plan_phase():
                self._last_phase = plan.bucket.phase
                return plan
        return None

    def commit(self, plan: StepPlan, sampled: list[int | None]) -> list[Sequence]:
        """Records that `plan` ran; `sampled[i]` is row i's token (ignored where the row does not sample).

        Returns the sequences that this ended, by length. Rows aborted since `plan` are skipped.
        """
        if len(sampled) != len(plan.rows):
            raise ValueError(f"{len(sampled)} sampled tokens for {len(plan.rows)} rows")
        results = zip(plan.rows, sampled, strict=True)
        live = [(row, token) for row, token in results if row.seq.state is not State.FINISHED]
        for row, token in live:
            if row.seq.state is State.WAITING or row.start != row.seq.num_computed:
                raise ValueError(f"the plan is stale: request {row.seq.request_id!r} has moved on since")
            if row.samples and token is None:
                raise ValueError(f"request {row.seq.request_id!r} samples in this step, but its token is missing")
        self._steps += 1
        ended = []
        for row, token in live:
            seq = row.seq
            seq.num_computed += row.count
            seq.last_step = self._steps
            self._keep_full_pages(seq)
            if row.samples:
                seq.output.append(token)
                if len(seq.output) >= seq.max_new_tokens or seq.num_tokens >= self.limits.max_seq_len:
                    self.finish(seq, "length")
                    ended.append(seq)
        return ended

    # --- prefill

    def _plan_prefill(self) -> StepPlan | None:
        """The head of the line, and in its bucket as many others of the same attention as pay off."""
        started = [seq for seq in self.running if seq.in_prefill]
        if not started and not self.waiting:
            return None
        # Those in prefill all have the head's attention, because nobody of another is admitted meanwhile.
        line = [(seq, []) for seq in started]
        line += self._admissible(self.attention(started[0] if started else self.waiting[0]))
        if not line:
            return None
        schedule = dynamic_schedule(len(line), len(line[0][0].prompt), self.policy)
        bucket = pick_prefill(self._buckets("prefill", schedule), [
            seq.prefill_end - max(seq.num_computed, len(found) * PAGE) for seq, found in line])
        chosen = line[:bucket.rows]
        for _, found in chosen:  # all before the first allocation, which could evict them
            self.pool.share(found)
        rows = []
        for seq, found in chosen:
            if seq.state is State.WAITING:
                self._admit(seq, found, len(chosen))
            start, count = seq.num_computed, min(seq.prefill_end - seq.num_computed, bucket.tokens)
            rows.append(PlannedRow(seq, start, count, samples=start + count == seq.prefill_end))
        return StepPlan(bucket, rows)

    def _admissible(self, attention: str) -> list[tuple[Sequence, list[int]]]:
        """The waiting sequences that could start now, each with the kept pages it would start after.

        Stops at the first that cannot, so nobody is overtaken. Admission never preempts. It leaves a page for each
        sequence ahead that may still grow: otherwise a long prompt would be prefilled only to be preempted a few steps
        later.
        """
        admissible, reused, claimed = [], set(), set()
        free = self.pool.num_free - sum(map(self._may_grow, self.running))
        for seq in self.waiting:
            keys = self._reusable_keys(seq)
            found = self.pool.match(keys)
            missing = keys[len(found):]
            if missing and (missing[0] in self._computing or missing[0] in claimed):
                break
            pages, idle = pages_for(seq.prefill_end), {page for page in found if self.pool.is_idle(page)} - reused
            cost = pages - len(found) + len(idle)
            if len(admissible) == len(self._free_slots) or cost > free or self.attention(seq) != attention:
                break
            admissible.append((seq, found))
            reused |= idle
            claimed.update(missing)
            free -= cost + (pages_for(self._most_computed(seq)) > pages)
        return admissible

    def _admit(self, seq: Sequence, found: list[int], batch_size: int) -> None:
        """`found`: kept pages, shared already."""
        self.waiting.remove(seq)  # the first: the line keeps the order of arrival
        self.running.append(seq)
        seq.state = State.RUNNING
        seq.slot = heapq.heappop(self._free_slots)
        seq.pages = found + self.pool.allocate(pages_for(seq.prefill_end) - len(found))
        seq.num_kept = len(found)
        seq.num_computed = seq.num_reused = len(found) * PAGE
        if seq.schedule is None:
            seq.schedule = dynamic_schedule(batch_size, len(seq.prompt), self.policy)
        keys = self._reusable_keys(seq)
        self.prefix_queries += len(keys)
        self.prefix_hits += len(found)
        for key in keys[len(found):]:
            self._computing.setdefault(key, seq)

    # --- the prefix cache

    def _reusable_keys(self, seq: Sequence) -> list[bytes]:
        """Keys of the pages that `seq` could find instead of computing: one token at least is computed."""
        if not self.prefix_cache:
            return []
        most = seq.prefill_end - 1 if seq.reusable is None else min(seq.prefill_end - 1, seq.reusable)
        return seq.page_keys(most // PAGE)

    def _keep_full_pages(self, seq: Sequence) -> None:
        """Offers the pages that this step filled to the cache; those who waited for them find them there."""
        full = seq.num_computed // PAGE if self.prefix_cache else 0
        if full > seq.num_kept:
            keys = seq.page_keys(full)
            for index in range(seq.num_kept, full):
                self.pool.keep(keys[index], seq.pages[index])
                self._forget(seq, keys[index])
            seq.num_kept = full

    def _forget(self, seq: Sequence, key: bytes) -> None:
        if self._computing.get(key) is seq:
            del self._computing[key]

    # --- decode

    def _plan_decode(self) -> StepPlan | None:
        """One token for the rows that have waited longest, all of one attention."""
        decoding = [seq for seq in self.running if not seq.in_prefill]
        decoding.sort(key=lambda seq: (seq.last_step, seq.arrival))
        # A second attention is tried only when growing has preempted every row of the first.
        for attention in dict.fromkeys(map(self.attention, decoding)):
            buckets = sorted(self._buckets("decode", attention), key=lambda bucket: bucket.rows)
            chosen = [seq for seq in decoding if self.attention(seq) == attention][:buckets[-1].rows]
            # Earliest first: a row can then only preempt rows that are not planned yet.
            chosen.sort(key=lambda seq: seq.arrival)
            rows = [PlannedRow(seq, seq.num_computed, 1, samples=True) for seq in chosen if self._grow(seq)]
            if rows:
                return StepPlan(next(bucket for bucket in buckets if bucket.rows >= len(rows)), rows)
        return None

    def _grow(self, seq: Sequence) -> bool:
        """Gives `seq` room for one more token, preempting later arrivals; False when it is preempted itself."""
        if seq.state is not State.RUNNING:  # preempted by an earlier row
            return False
        missing = pages_for(seq.num_computed + 1) - len(seq.pages)
        while not self.pool.can_allocate(missing):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        if missing:
            seq.pages += self.pool.allocate(missing)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the front of the line; all its known tokens are prefilled again, the sampled ones included."""
        self._release(seq)
        seq.num_computed = seq.num_reused = 0
        seq.prefill_end = seq.num_tokens
        seq.state = State.WAITING
        self.waiting.appendleft(seq)  # the latest arrival running is still earlier than any waiting

    # --- shared

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        for key in seq.keys[seq.num_kept:]:
            self._forget(seq, key)
        self.pool.free(seq.pages)
        heapq.heappush(self._free_slots, seq.slot)
        seq.pages, seq.slot = [], None

    def _most_computed(self, seq: Sequence) -> int:
        """Tokens that can ever be in the cache for `seq`: all but the last one sampled."""
        return min(len(seq.prompt) + seq.max_new_tokens, self.limits.max_seq_len) - 1

    def _may_grow(self, seq: Sequence) -> bool:
        return pages_for(self._most_computed(seq)) > len(seq.pages)

    def attention(self, seq: Sequence) -> str:
        """The attention that computes this sequence, all its life."""
        return attention_of(seq.schedule or dynamic_schedule(1, len(seq.prompt), self.policy))

    def _buckets(self, phase: str, schedule: str) -> tuple[Bucket, ...]:
        return tuple(bucket for bucket in self._table if (bucket.phase, bucket.schedule) == (phase, schedule))
