"""The scheduler: chooses the sequences of the next step and the bucket that it runs in.

Sequences have a rank: priority, then order of arrival. Steps alternate between prefill and decode while both have work.
A step runs sequences of one group: one attention, one version of the weights, one precision. The prefill with the
fewest tokens left goes first, so that a short prompt does not wait for a long one; every fourth prefill step goes by
rank, so that a long one does not wait for ever. When pages run out, the last sequence by rank gives its pages back and
starts again later; the first by rank is never preempted, so every sequence finishes. Memory is never overtaken: a
sequence is not admitted into pages that one before it waits for.

Full pages are offered to the pool's prefix cache once computed, and admission starts after the pages found there. A
sequence whose next page is about to be computed by another one waits for it, so a prefix that many share is computed
once.
"""

import bisect
import heapq
import itertools
from collections.abc import Callable, Collection, Iterator
from operator import attrgetter
from typing import NamedTuple

from qwen_jax.engine.scheduling.buckets import Bucket, Limits, pick_prefill
from qwen_jax.engine.scheduling.page_pool import PAGE, PagePool, pages_for
from qwen_jax.engine.scheduling.schedule_policy import (
    DEFAULT_POLICY,
    FULL,
    RECOMPUTE,
    SPARSE,
    SchedulePolicy,
    attention_of,
    dynamic_schedule,
)
from qwen_jax.engine.scheduling.sequence import UNLIMITED, PlannedRow, Sequence, State, StepPlan
from qwen_jax.errors import PromptTooLong, UserError

ALL_ROWS = UNLIMITED  # rows of a decode step: as many as its bucket has
RANK_EVERY = 4  # of this many prefill steps, one goes by rank
rank = attrgetter("priority", "arrival")  # the lowest is admitted first and preempted last
Propose = Callable[[Sequence], list[int]]  # drafts of the tokens after the last one of a sequence


class _PrefillCandidate(NamedTuple):
    """A sequence that could be in the next prefill, and the pages of the prefix cache that it would start after."""

    seq: Sequence
    kept: list[int]

    @property
    def remaining(self) -> int:
        """Number of the sequence's tokens that are still to prefill."""
        return self.seq.prefill_end - max(self.seq.num_computed, len(self.kept) * PAGE)


class Scheduler:
    """Queue of one replica's sequences, which plans the replica's steps.

    Call `plan`, run the step, `commit` what was sampled; `add`, `abort` and `finish` come in between, not during.

    Args:
      table: every bucket that a step may have.
      limits: sizes of the engine.
      pool: pages of the KV cache.
      policy: thresholds of the schedules.
      prefix_cache: keep computed pages for prompts that begin alike.
      invariant: what a sequence computes must not depend on the others: prefills reuse and restart at multiples of the
        largest chunk, answers are not reused, and no sequence is admitted that might be preempted.
      dense_tail: number of last tokens of a prompt whose pages sparse attention computes otherwise than the rest. They
        are not shared, and neither are the pages of answers.
      wide_pool: 16-bit pages for sequences that fell back from 8-bit steps (`fall_back`); None where all are 16-bit.
      arrivals: numbers in ascending order, shared by the schedulers of several replicas.
      available: the buckets of the table that can run at present, which may become more; None for all.

    Attributes:
      waiting, running: the unfinished sequences, by rank.
      paused: admit no sequence, except those that were preempted in the middle of their answer.
      prefix_queries, prefix_hits: pages looked up in the prefix cache at admissions, and those found.
      preemptions: number of sequences that had to give their pages back.
    """

    def __init__(self, table: tuple[Bucket, ...], limits: Limits, pool: PagePool,
                 policy: SchedulePolicy = DEFAULT_POLICY, *, prefix_cache: bool = True, invariant: bool = False,
                 dense_tail: int = 0, wide_pool: PagePool | None = None, arrivals: Iterator[int] | None = None,
                 available: Collection[Bucket] | None = None):
        self.limits, self.pool, self.policy, self.prefix_cache = limits, pool, policy, prefix_cache
        self.invariant, self.dense_tail, self.wide_pool = invariant, dense_tail, wide_pool
        self.prefix_queries = self.prefix_hits = 0
        self.preemptions = 0
        self.paused = False
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._sequences: dict[str | int, Sequence] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap
        self._free_slots = list(range(limits.max_batch_size))  # a heap: low slots first
        self._computing: dict[bytes, Sequence] = {}  # keys of pages that running sequences have yet to prefill
        self._table, self._available = table, table if available is None else available
        self._known = 0  # number of available buckets that `_buckets_of` was made of
        self._buckets_of: dict[tuple[str, str, bool], tuple[Bucket, ...]] = {}
        self._chunk = max(bucket.tokens for bucket in table)
        self._arrivals = itertools.count() if arrivals is None else arrivals
        self._steps = self._prefills = 0
        self._last_phase = "decode"

    # --- what is queued

    @property
    def has_work(self) -> bool:
        """True while a sequence is unfinished."""
        return bool(self._sequences)

    @property
    def num_sequences(self) -> int:
        """Number of unfinished sequences, waiting and running."""
        return len(self._sequences)

    @property
    def unfilled_tokens(self) -> int:
        """Number of token places, in the pages of running sequences, whose keys and values are not computed."""
        return sum(len(seq.pages) * PAGE - seq.num_computed for seq in self.running)

    @property
    def free_slots(self) -> int:
        """Number of further sequences that could run at once if there were pages for them."""
        return len(self._free_slots)

    def decode_load(self) -> tuple[int, bool]:
        """Return the number of decoding sequences, and whether others wait for a prefill."""
        decoding = sum(not seq.in_prefill for seq in self.running)
        return decoding, bool(self.waiting) or decoding < len(self.running)

    def expired(self, now: float) -> list[Sequence]:
        """Return the unfinished sequences whose deadline has come, each of them by one call only."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heapq.heappop(self._deadlines)[2]
            if seq.state is not State.FINISHED:
                late.append(seq)
        return late

    # --- sequences come and go

    def check(self, seq: Sequence) -> None:
        """Raise UserError if the request is malformed or could not finish even with the whole cache to itself."""
        if seq.request_id in self._sequences:
            raise UserError(f"request {seq.request_id!r} is already queued or running: use another id")
        if not seq.prompt:
            raise UserError("the prompt is empty: give at least one token")
        if seq.max_new_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, not {seq.max_new_tokens}")
        self.check_length(len(seq.prompt), seq.answered)
        needed = pages_for(self._max_computed(seq))
        if needed > self.pool.capacity:
            raise UserError(f"the request may need {needed} pages of KV cache and the engine has {self.pool.capacity}: "
                            "shorten the prompt, lower max_tokens or give the engine more memory")

    def check_length(self, tokens: int, answered: bool) -> None:
        """Raise PromptTooLong for a prompt of this many tokens if it, or its answer, has no room."""
        if tokens + answered > self.limits.max_seq_len:
            raise PromptTooLong(f"the prompt has {tokens} tokens and max_seq_len={self.limits.max_seq_len} leaves no "
                                f"room for {'an answer' if answered else 'them'}: shorten the prompt or raise "
                                "max_seq_len")

    def room_after(self, tokens: int) -> int:
        """Return the most tokens that an answer to a prompt of this many tokens can have, at least 1."""
        return max(1, min(self.limits.max_seq_len, self.pool.capacity * PAGE + 1) - tokens)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; UserError for one that `check` refuses."""
        self.check(seq)
        if seq.arrival < 0:
            seq.arrival = next(self._arrivals)
        self._register(seq)
        bisect.insort(self.waiting, seq, key=rank)

    def settle_attention(self, seq: Sequence) -> None:
        """Let a new long sequence be computed in full attention if the programs of sparse attention are not there yet.
        """
        if seq.schedule is None and len(seq.prompt) > self.policy.sparse_above_tokens:
            seq.dense = not all(self._buckets(phase, SPARSE, False) for phase in ("prefill", "decode"))

    def adopt(self, seq: Sequence, pages: list[int]) -> None:
        """Take over a running sequence of another scheduler, in `pages` of this one's pool.

        The pages are allocated or shared for it; the caller copies its keys and values there. There must be a free
        slot.
        """
        self._register(seq)
        bisect.insort(self.running, seq, key=rank)
        seq.state, seq.pages, seq.slot = State.RUNNING, pages, heapq.heappop(self._free_slots)
        for index, key in enumerate(seq.keys[:seq.num_kept]):
            self.pool.keep(key, pages[index], seq.keys[index - 1] if index else seq.salt)

    def withdraw(self, seq: Sequence) -> None:
        """Remove a sequence, and free what it holds, without ending it: another scheduler will `add` or `adopt` it."""
        if seq.state is State.RUNNING:
            self._release(seq)
            seq.state = State.WAITING
        else:
            self.waiting.remove(seq)
        del self._sequences[seq.request_id]

    def abort(self, request_id: str | int) -> bool:
        """End a request and free what it holds. Return False if there is no such request any more."""
        seq = self._sequences.get(request_id)
        if seq is not None:
            self.finish(seq, "abort")
        return seq is not None

    def finish(self, seq: Sequence, reason: str) -> None:
        """End a sequence for a reason ("stop", "length", "abort" or "error"), and free what it holds.

        A sequence that just ended by length may still be found to have ended by "stop" (its last token was the stop
        token) or "error": only the reason changes.
        """
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

    def restart(self, seq: Sequence) -> None:
        """Drop the answer of a sequence so far, and queue it again from its prompt, at its old rank."""
        if seq.state is State.RUNNING:
            self._preempt(seq)
        seq.output.clear()
        seq.keys.clear()
        seq.prefill_end = seq.num_tokens

    def fall_back(self, seq: Sequence) -> None:
        """Queue a sequence of an 8-bit engine again, to be computed in 16 bits from its first token on.

        Its answer so far stays. The pages that it used, and pages that others computed after them, leave the prefix
        cache.
        """
        if self.wide_pool is None or seq.wide:
            raise ValueError(f"request {seq.request_id!r} has nothing to fall back to")
        self.pool.forget(seq.pages)
        self._preempt(seq)
        seq.wide, seq.schedule = True, FULL

    # --- steps

    def plan(self, steps: int = 1, propose: Propose | None = None, max_rows: int = ALL_ROWS) -> StepPlan | None:
        """Plan the next step, with pages and slots allocated for its sequences; return None when no sequence can run.

        steps: tokens per row that a decode step may sample, within what its bucket can; one while a sequence could be
          prefilled instead.
        propose: function that returns drafts (guessed next tokens) for a sequence; `DRAWN` is one that the step makes.
        max_rows: rows that a decode step may have; sequences left over take the next one.
        """
        phases = [self._plan_prefill, lambda: self._plan_decode(steps, propose, max_rows)]
        if self._last_phase == "prefill":
            phases.reverse()
        for plan_phase in phases:
            if plan := plan_phase():
                self._last_phase = plan.bucket.phase
                return plan
        return None

    def commit(self, plan: StepPlan, sampled: list[list[int] | None]) -> list[Sequence]:
        """Record the tokens that a planned step sampled, and return the sequences that these ended by length.

        sampled: the tokens of each row that count, at least one where the row samples (ignored elsewhere); None for a
          row whose results are of no use, whose sequence the caller takes care of. Rows aborted since `plan` are
          skipped.
        """
        if len(sampled) != len(plan.rows):
            raise ValueError(f"sampled tokens of {len(sampled)} rows for {len(plan.rows)} rows")
        results = zip(plan.rows, sampled, strict=True)
        live = [(row, tokens) for row, tokens in results
                if row.seq.state is not State.FINISHED and tokens is not None]
        for row, tokens in live:
            if row.seq.state is State.WAITING or row.start != row.seq.num_computed:
                raise ValueError(f"the plan is stale: request {row.seq.request_id!r} has moved on since")
            if row.samples and not 1 <= len(tokens) <= (row.count if plan.bucket.phase == "decode" else 1):
                raise ValueError(f"request {row.seq.request_id!r} computed {row.count} positions in this "
                                 f"{plan.bucket.phase} step, and {len(tokens)} tokens came back")
        self._steps += 1
        ended = []
        for row, tokens in live:
            seq = row.seq
            seq.num_computed += len(tokens) if plan.bucket.phase == "decode" else row.count
            seq.last_step = self._steps
            if row.samples:
                seq.output.extend(tokens)
            self._keep_full_pages(seq)
            if row.samples and (len(seq.output) >= seq.max_new_tokens or seq.num_tokens >= self.limits.max_seq_len):
                self.finish(seq, "length")
                ended.append(seq)
        return ended

    # --- prefill

    def _plan_prefill(self) -> StepPlan | None:
        """Plan a prefill of the next sequence in turn, or return None when none is left to prefill.

        Others of its group (same attention, weights and precision) join it as far as that pays off.
        """
        line = [_PrefillCandidate(seq, []) for seq in self.running if seq.in_prefill] + self._admissible()
        line = [item for item in line if self._buckets("prefill", self.attention(item.seq), item.seq.wide)]
        if not line:
            return None
        by_rank = self._prefills % RANK_EVERY == RANK_EVERY - 1
        line.sort(key=lambda item: (item.seq.priority, 0 if by_rank else item.remaining, item.seq.arrival))
        first = line[0].seq
        line = [item for item in line if self._group(item.seq) == self._group(first)]
        schedule = self._schedule(first, len(line))
        bucket = pick_prefill(self._buckets("prefill", schedule, first.wide), [item.remaining for item in line],
                              self.limits.step_overhead_tokens)
        chosen = line[:bucket.rows]
        for item in chosen:  # all before the first allocation, which could evict them
            self.pool.share(item.kept)
        rows = []
        for seq, kept in chosen:
            if seq.state is State.WAITING:
                self._admit(seq, kept, len(chosen))
            start, count = seq.num_computed, min(seq.prefill_end - seq.num_computed, bucket.tokens)
            rows.append(PlannedRow(seq, start, count, samples=start + count == seq.prefill_end))
        self._prefills += 1
        return StepPlan(bucket, rows)

    def _admissible(self) -> list[_PrefillCandidate]:
        """Return the waiting sequences whose prefill could start now, for all of them together.

        Ends at the first for which pages or slots do not suffice, so that no other takes what it waits for. Admission
        never preempts. It leaves a page for each earlier sequence that may still grow: otherwise a long prompt would be
        prefilled only to be preempted a few steps later.
        """
        admissible, reused, claimed = [], set(), set()
        if not self.waiting:
            return admissible
        free = {wide: pool.num_free - sum(self._reserve(seq) for seq in self.running if seq.wide == wide)
                for wide, pool in ((False, self.pool), (True, self.wide_pool)) if pool}
        slots = len(self._free_slots)
        exhausted = set()  # pools that an earlier sequence waits for
        for seq in self.waiting:
            if self.paused and not seq.output or seq.wide in exhausted:
                continue
            keys = self._reusable_keys(seq)
            kept = self.pool.match(keys)
            if self.invariant:
                kept = kept[:len(kept) * PAGE // self._chunk * self._chunk // PAGE]
            missing = keys[len(kept):]
            pages, idle = pages_for(seq.prefill_end), {page for page in kept if self.pool.is_idle(page)} - reused
            cost = pages - len(kept) + len(idle)
            reserve = self._reserve(seq, pages)
            if not slots:
                break
            if cost + (reserve if self.invariant else 0) > free[seq.wide]:
                exhausted.add(seq.wide)
                continue
            if not (missing and (missing[0] in self._computing or missing[0] in claimed)):
                admissible.append(_PrefillCandidate(seq, kept))
            reused |= idle
            claimed.update(missing)
            free[seq.wide] -= cost + reserve
            slots -= 1
        return admissible

    def _admit(self, seq: Sequence, kept: list[int], batch_size: int) -> None:
        """Give a waiting sequence a slot and pages to run; the cached pages `kept` are shared for it already."""
        self.waiting.remove(seq)
        bisect.insort(self.running, seq, key=rank)
        seq.state = State.RUNNING
        seq.slot = heapq.heappop(self._free_slots)
        seq.pages = kept + self._pool(seq).allocate(pages_for(seq.prefill_end) - len(kept))
        seq.num_kept = len(kept)
        seq.num_computed = seq.num_reused = len(kept) * PAGE
        if seq.schedule is None:
            seq.schedule = self._schedule(seq, batch_size)
        keys = self._reusable_keys(seq)
        self.prefix_queries += len(keys)
        self.prefix_hits += len(kept)
        for key in keys[len(kept):]:
            self._computing.setdefault(key, seq)

    # --- the prefix cache

    def _reusable_keys(self, seq: Sequence) -> list[bytes]:
        """Return the keys of a sequence's pages that it could take from the prefix cache instead of computing them."""
        if not self.prefix_cache or seq.wide:
            return []
        tokens = seq.prefill_end - 1  # at least one token is computed
        if seq.reusable is not None:
            tokens = min(tokens, seq.reusable)
        return seq.page_keys(min(tokens // PAGE, self._shareable(seq)))

    def _shareable(self, seq: Sequence) -> int:
        """Return how many of a sequence's first pages depend on their tokens alone, not on how they were computed."""
        if self.attention(seq) == SPARSE:
            return max(0, len(seq.prompt) - self.dense_tail) // PAGE
        # Decode steps do not compute to the last bit what a prefill would have.
        return len(seq.prompt) // PAGE if self.invariant else seq.num_tokens // PAGE

    def _keep_full_pages(self, seq: Sequence) -> None:
        """Add the pages of a sequence that a step filled to the prefix cache, where others that wait find them."""
        full = min(seq.num_computed // PAGE, self._shareable(seq)) if self.prefix_cache and not seq.wide else 0
        if full > seq.num_kept:
            keys = seq.page_keys(full)
            for index in range(seq.num_kept, full):
                self.pool.keep(keys[index], seq.pages[index], keys[index - 1] if index else seq.salt)
                self._end_computing(seq, keys[index])
            seq.num_kept = full

    def _end_computing(self, seq: Sequence, key: bytes) -> None:
        if self._computing.get(key) is seq:
            del self._computing[key]

    # --- decode

    def _plan_decode(self, steps: int, propose: Propose | None, max_rows: int) -> StepPlan | None:
        """Plan a decode step of the sequences that have waited longest, or return None when none decodes.

        They are of one group: same attention, weights and precision.
        """
        decoding = [seq for seq in self.running if not seq.in_prefill]
        if not decoding:
            return None
        steps = min(steps, self.limits.decode_steps)
        if steps > 1 and (len(decoding) < len(self.running) or self._admissible()):
            steps = 1
        # A second group is tried only when growing has preempted every row of the first.
        groups: dict[tuple[str, int, bool], list[Sequence]] = {}
        for seq in sorted(decoding, key=attrgetter("last_step")):  # a stable sort: equals stay in the order of rank
            groups.setdefault(self._group(seq), []).append(seq)
        for (attention, _, wide), members in groups.items():
            buckets = sorted(self._buckets("decode", attention, wide), key=attrgetter("rows", "tokens"))
            most = max((bucket.rows for bucket in buckets if bucket.tokens == 1), default=0)
            chosen = members[:min(max_rows, most)]
            if not chosen:
                continue
            chosen.sort(key=rank)  # a row can then only preempt rows that are not planned yet
            drafts = self._drafts(chosen, buckets, propose) if propose else {}
            steps = min(steps, *(seq.burst for seq in chosen))  # a row that samples one token would wait for the others
            rows = []
            for seq in chosen:
                guesses = drafts.get(seq, ())
                limit = len(guesses) + 1 if drafts else steps
                count = self._grow(seq, seq.max_samples(limit, self.limits.max_seq_len))
                if count:
                    rows.append(PlannedRow(seq, seq.num_computed, count, True, tuple(guesses[:count - 1])))
            if rows:
                return StepPlan(next(bucket for bucket in buckets if bucket.rows >= len(rows)
                                     and (bucket.tokens > 1) == bool(drafts)), rows)
        return None

    def _drafts(self, chosen: list[Sequence], buckets: list[Bucket], propose: Propose) -> dict[Sequence, list[int]]:
        """Return the guessed next tokens of sequences that have some; none where no bucket takes this many rows."""
        widths = [bucket.tokens for bucket in buckets if bucket.rows >= len(chosen) and bucket.tokens > 1]
        if not widths:
            return {}
        proposed = {seq: list(propose(seq))[:widths[0] - 1] for seq in chosen}
        return {seq: drafts for seq, drafts in proposed.items() if drafts}

    def _grow(self, seq: Sequence, count: int) -> int:
        """Allocate pages for up to `count` more tokens and return for how many; 0 when `seq` itself is preempted.

        For the first token it preempts sequences after it by rank, for the others it does not.
        """
        if seq.state is not State.RUNNING:  # preempted by an earlier row
            return 0
        if seq.num_computed + count <= len(seq.pages) * PAGE:
            return count
        pool = self._pool(seq)
        while not pool.can_allocate(pages_for(seq.num_computed + 1) - len(seq.pages)):
            victim = next(other for other in reversed(self.running) if other.wide == seq.wide)
            self._preempt(victim)
            self.preemptions += 1
            if victim is seq:
                return 0
        count = min(count, (len(seq.pages) + pool.num_free) * PAGE - seq.num_computed)
        missing = pages_for(seq.num_computed + count) - len(seq.pages)
        if missing > 0:
            seq.pages += pool.allocate(missing)
        return count

    # --- shared

    def attention(self, seq: Sequence) -> str:
        """Return the attention, full or sparse, that computes a sequence all its life (`FULL` or `SPARSE`)."""
        return attention_of(seq.schedule or self._schedule(seq, 1))

    def _schedule(self, seq: Sequence, batch_size: int) -> str:
        """Return the schedule of a sequence in a prefill of ``batch_size`` sequences."""
        if seq.wide:
            return FULL
        schedule = dynamic_schedule(batch_size, 1 if seq.dense else len(seq.prompt), self.policy)
        return FULL if schedule == RECOMPUTE and not self._buckets("prefill", RECOMPUTE, False) else schedule

    def _register(self, seq: Sequence) -> None:
        self._sequences[seq.request_id] = seq
        if seq.deadline is not None:
            heapq.heappush(self._deadlines, (seq.deadline, seq.arrival, seq))

    def _preempt(self, seq: Sequence) -> None:
        """Free what a running sequence holds and queue it again, to prefill all its known tokens, sampled ones too."""
        self._release(seq)
        seq.discard_computed()
        seq.state = State.WAITING
        bisect.insort(self.waiting, seq, key=rank)

    def _release(self, seq: Sequence) -> None:
        """Free the pages and the slot of a running sequence."""
        self.running.remove(seq)
        for key in seq.keys[seq.num_kept:]:
            self._end_computing(seq, key)
        self._pool(seq).free(seq.pages)
        heapq.heappush(self._free_slots, seq.slot)
        seq.pages, seq.slot = [], None

    def _max_computed(self, seq: Sequence) -> int:
        """Return how many tokens of `seq` can ever be in the KV cache at most: all but the last one sampled."""
        return max(min(len(seq.prompt) + seq.max_new_tokens, self.limits.max_seq_len) - 1, len(seq.prompt))

    def _reserve(self, seq: Sequence, pages: int | None = None) -> int:
        """Return how many pages admission leaves free for `seq`, which has or would have `pages`, to grow into."""
        growth = pages_for(self._max_computed(seq)) - (len(seq.pages) if pages is None else pages)
        return growth if self.invariant else min(growth, 1)

    def _group(self, seq: Sequence) -> tuple[str, int, bool]:
        """Return what the sequences of one step have in common: attention, version of the weights, 16-bit fallback."""
        return self.attention(seq), seq.version, seq.wide

    def _pool(self, seq: Sequence) -> PagePool:
        return self.wide_pool if seq.wide else self.pool

    def _buckets(self, phase: str, schedule: str, wide: bool) -> tuple[Bucket, ...]:
        """Return the buckets of a phase and a schedule that can run; with `wide`, those of the 16-bit fallback."""
        if len(self._available) != self._known:
            self._known = len(self._available)
            self._buckets_of.clear()
        key = phase, schedule, wide
        if key not in self._buckets_of:
            usual = self._table[0].precision
            self._buckets_of[key] = tuple(
                bucket for bucket in self._table if (bucket.phase, bucket.schedule) == (phase, schedule)
                and (bucket.precision != usual) == wide and bucket in self._available)
        return self._buckets_of[key]
