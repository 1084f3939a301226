"""Which sequences run in the next step, in which bucket.

Sequences have a rank: priority, then order of arrival. Steps alternate between prefill and decode while both have work.
A step runs sequences of one group: one attention, one version of the weights, one precision. Among prefills, whoever
has the least left goes first, so that a short prompt does not wait for a long one; every fourth prefill step goes by
rank, so that a long one does not wait for ever. When pages run out, the last by rank gives its pages back and starts
again later; the first by rank is never preempted, so every sequence finishes. Memory is never overtaken: a sequence is
not admitted into pages that one before it waits for.

Full pages are offered to the pool's prefix cache once computed, and admission starts after the pages found there. A
sequence whose next page another one is about to compute waits for it, so a prefix that many share is computed once.
"""

import bisect
import heapq
import itertools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sized
from operator import attrgetter

from qwen_jax.engine.scheduling.buckets import Bucket, Limits, pick_prefill
from qwen_jax.engine.scheduling.page_pool import PAGE, PagePool, pages_for
from qwen_jax.engine.scheduling.schedule_policy import (
    DEFAULT_POLICY,
    FULL,
    SPARSE,
    SchedulePolicy,
    attention_of,
    dynamic_schedule,
)
from qwen_jax.engine.scheduling.sequence import MOST, Sequence, State
from qwen_jax.engine.scheduling.step_plan import PlannedRow, StepPlan
from qwen_jax.errors import UserError

RANK_EVERY = 4  # prefill steps, of which one goes by rank
_rank = attrgetter("priority", "arrival")  # the lowest is admitted first and preempted last


class Scheduler:
    """Call `plan`, run it, `commit` what was sampled; `add`, `abort` and `finish` come in between, not during.

    invariant: what a sequence computes must not depend on the others: prefills reuse and restart at multiples of the
      largest chunk, answers are not reused, and nobody is admitted who might be preempted.
    dense_tail: last tokens of a prompt whose pages sparse attention computes otherwise than the rest, and so are not
      shared; neither are its answers'.
    wide_pool: pages of sequences that fell back from 8-bit to 16-bit steps (`fall_back`); None where all are 16-bit.
    arrivals: numbers in ascending order, shared by the schedulers of several replicas.
    """

    def __init__(self, table: tuple[Bucket, ...], limits: Limits, pool: PagePool,
                 policy: SchedulePolicy = DEFAULT_POLICY, prefix_cache: bool = True, invariant: bool = False,
                 dense_tail: int = 0, wide_pool: PagePool | None = None, arrivals: Iterator[int] | None = None):
        self.limits, self.pool, self.policy, self.prefix_cache = limits, pool, policy, prefix_cache
        self.invariant, self.dense_tail, self.wide_pool = invariant, dense_tail, wide_pool
        self.prefix_queries = self.prefix_hits = 0  # pages looked up at admissions, and found
        self.preemptions = 0
        self.paused = False  # nobody is admitted but those that were preempted in the middle of their answer
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self._sequences: dict[str | int, Sequence] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap
        self._free_slots = list(range(limits.max_batch_size))  # a heap: low slots first
        self._computing: dict[bytes, Sequence] = {}  # keys of pages that running sequences have yet to prefill
        self._table = table
        self._chunk = max(bucket.tokens for bucket in table)
        self._arrivals = itertools.count() if arrivals is None else arrivals
        self._steps = self._prefills = 0
        self._last_phase = "decode"

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def crowd(self) -> tuple[int, bool]:
        """How many sequences decode, and whether others wait for a prefill."""
        decoding = sum(not seq.in_prefill for seq in self.running)
        return decoding, bool(self.waiting) or decoding < len(self.running)

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
        if seq.arrival < 0:
            seq.arrival = next(self._arrivals)
        self._sequences[seq.request_id] = seq
        bisect.insort(self.waiting, seq, key=_rank)
        if seq.deadline is not None:
            heapq.heappush(self._deadlines, (seq.deadline, seq.arrival, seq))

    def withdraw(self, seq: Sequence) -> None:
        """Takes a sequence out without ending it: another scheduler will `add` or `adopt` it. It keeps nothing here."""
        if seq.state is State.RUNNING:
            self._release(seq)
            seq.state = State.WAITING
        else:
            self.waiting.remove(seq)
        del self._sequences[seq.request_id]

    def adopt(self, seq: Sequence, pages: list[int]) -> None:
        """Goes on with a sequence of another scheduler, whose contents will be in ``pages`` of this one's pool, which
        are allocated or shared for it. There must be a free slot."""
        self._sequences[seq.request_id] = seq
        bisect.insort(self.running, seq, key=_rank)
        seq.state, seq.pages, seq.slot = State.RUNNING, pages, heapq.heappop(self._free_slots)
        for index, key in enumerate(seq.keys[:seq.num_kept]):
            self.pool.keep(key, pages[index], seq.keys[index - 1] if index else seq.salt)
        if seq.deadline is not None:
            heapq.heappush(self._deadlines, (seq.deadline, seq.arrival, seq))

    def lose_pages(self, seq: Sequence) -> None:
        """Of a withdrawn sequence: all its known tokens are to be prefilled again."""
        seq.num_computed = seq.num_reused = seq.num_kept = 0
        seq.prefill_end = seq.num_tokens

    @property
    def num_sequences(self) -> int:
        """Waiting and running."""
        return len(self._sequences)

    @property
    def unused_slots(self) -> int:
        """Tokens for which running sequences hold pages without having computed them."""
        return sum(len(seq.pages) * PAGE - seq.num_computed for seq in self.running)

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def expired(self, now: float) -> list[Sequence]:
        """Unfinished sequences whose deadline has come; each is returned once."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            seq = heapq.heappop(self._deadlines)[2]
            if seq.state is not State.FINISHED:
                late.append(seq)
        return late

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

    def restart(self, seq: Sequence) -> None:
        """Back into the line as if it had just come, but with its rank: its answer so far is dropped."""
        if seq.state is State.RUNNING:
            self._preempt(seq)
        seq.output.clear()
        seq.keys.clear()
        seq.prefill_end = seq.num_tokens

    def fall_back(self, seq: Sequence) -> None:
        """Back into the line, to be computed in 16 bits from its first token; what was sampled so far stays.

        The pages it used, and what others computed after them, are not found by anybody any more.
        """
        if self.wide_pool is None or seq.wide:
            raise ValueError(f"request {seq.request_id!r} has nothing to fall back to")
        self.pool.forget(seq.pages)
        self._preempt(seq)
        seq.wide, seq.schedule = True, FULL

    def plan(self, steps: int = 1, propose: Callable[[Sequence], Sized[int]] | None = None, rows: int = MOST
             ) -> StepPlan | None:
        """The next step; None only when there is no work, or none but for those kept out by `paused`. Its sequences own
        pages and slots when this returns.

        steps: tokens per row that a decode step may sample, within what its bucket can; one while anybody could be
          prefilled instead.
        propose: drafts of the tokens after the last one of a sequence, `DRAWN` for those that the step makes.
        rows: that a decode step may have; those left over take the next one.
        """
        phases = [self._plan_prefill, lambda: self._plan_decode(steps, propose, rows)]
        if self._last_phase == "prefill":
            phases.reverse()
        for plan_phase in phases:
            if plan := plan_phase():
                self._last_phase = plan.bucket.phase
                return plan
        return None

    def commit(self, plan: StepPlan, sampled: Sized[Sized[int] | None]) -> list[Sequence]:
        """Records that `plan` ran; `sampled[i]` are the tokens of row i: those that count, one at least where the row
        samples (ignored elsewhere). None: what the row computed is of no use, and the caller sees to the sequence.

        Returns the sequences that this ended, by length. Rows aborted since `plan` are skipped.
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
        """The next in turn, and in its bucket as many others of its group as pay off."""
        line = [(seq, []) for seq in self.running if seq.in_prefill] + self._admissible()
        if not line:
            return None

        def left(item: tuple[Sequence, list[int]]) -> int:
            seq, found = item
            return seq.prefill_end - max(seq.num_computed, len(found) * PAGE)

        by_rank = self._prefills % RANK_EVERY == RANK_EVERY - 1
        line.sort(key=lambda item: (item[0].priority, 0 if by_rank else left(item), item[0].arrival))
        line = [item for item in line if self.group(item[0]) == self.group(line[0][0])]
        wide = line[0][0].wide
        schedule = FULL if wide else dynamic_schedule(len(line), len(line[0][0].prompt), self.policy)
        bucket = pick_prefill(self._buckets("prefill", schedule, wide), list(map(left, line)),
                              self.limits.step_overhead_tokens)
        chosen = line[:bucket.rows]
        for _, found in chosen:  # all before the first allocation, which could evict them
            self.pool.share(found)
        rows = []
        for seq, found in chosen:
            if seq.state is State.WAITING:
                self._admit(seq, found, len(chosen))
            start, count = seq.num_computed, min(seq.prefill_end - seq.num_computed, bucket.tokens)
            rows.append(PlannedRow(seq, start, count, samples=start + count == seq.prefill_end))
        self._prefills += 1
        return StepPlan(bucket, rows)

    def _admissible(self) -> list[tuple[Sequence, list[int]]]:
        """The waiting sequences that could start now, all of them together, each with the kept pages it would start
        after.

        Stops at the first that pages or slots do not suffice for, so nobody takes what it waits for. Admission never
        preempts. It leaves a page for each sequence before that may still grow: otherwise a long prompt would be
        prefilled only to be preempted a few steps later.
        """
        admissible, reused, claimed = [], set(), set()
        if not self.waiting:
            return admissible
        free = {wide: pool.num_free - sum(self._growth(seq) for seq in self.running if seq.wide == wide)
                for wide, pool in ((False, self.pool), (True, self.wide_pool)) if pool}
        slots = len(self._free_slots)
        full = set()  # pools that somebody before waits for
        for seq in self.waiting:
            if self.paused and not seq.output or seq.wide in full:
                continue
            keys = self._reusable_keys(seq)
            found = self.pool.match(keys)
            if self.invariant:
                found = found[:len(found) * PAGE // self._chunk * self._chunk // PAGE]
            missing = keys[len(found):]
            pages, idle = pages_for(seq.prefill_end), {page for page in found if self.pool.is_idle(page)} - reused
            cost = pages - len(found) + len(idle)
            growth = self._growth(seq, pages)
            if not slots:
                break
            if cost + (growth if self.invariant else 0) > free[seq.wide]:
                full.add(seq.wide)
                continue
            if not (missing and (missing[0] in self._computing or missing[0] in claimed)):
                admissible.append((seq, found))
            reused |= idle
            claimed.update(missing)
            free[seq.wide] -= cost + growth
            slots -= 1
        return admissible

    def _admit(self, seq: Sequence, found: list[int], batch_size: int) -> None:
        """`found`: kept pages, shared already."""
        self.waiting.remove(seq)
        bisect.insort(self.running, seq, key=_rank)
        seq.state = State.RUNNING
        seq.slot = heapq.heappop(self._free_slots)
        seq.pages = found + self._pool(seq).allocate(pages_for(seq.prefill_end) - len(found))
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
        if not self.prefix_cache or seq.wide:
            return []
        most = seq.prefill_end - 1 if seq.reusable is None else min(seq.prefill_end - 1, seq.reusable)
        return seq.page_keys(min(most // PAGE, self._shareable(seq)))

    def _shareable(self, seq: Sequence) -> int:
        """Pages whose contents the tokens alone decide, not the way they came to be there."""
        if self.attention(seq) == SPARSE:
            return max(0, len(seq.prompt) - self.dense_tail) // PAGE
        # What decode steps compute is not to the last bit what a prefill would have.
        return len(seq.prompt) // PAGE if self.invariant else seq.num_tokens // PAGE

    def _keep_full_pages(self, seq: Sequence) -> None:
        """Offers the pages that this step filled to the cache; those who waited for them find them there."""
        full = min(seq.num_computed // PAGE, self._shareable(seq)) if self.prefix_cache and not seq.wide else 0
        if full > seq.num_kept:
            keys = seq.page_keys(full)
            for index in range(seq.num_kept, full):
                self.pool.keep(keys[index], seq.pages[index], keys[index - 1] if index else seq.salt)
                self._forget(seq, keys[index])
            seq.num_kept = full

    def _forget(self, seq: Sequence, key: bytes) -> None:
        if self._computing.get(key) is seq:
            del self._computing[key]

    # --- decode

    def _plan_decode(self, steps: int, propose: Callable[[Sequence], Sized[int]] | None, most: int
                     ) -> StepPlan | None:
        """The rows that have waited longest, all of one group."""
        decoding = [seq for seq in self.running if not seq.in_prefill]
        if not decoding:
            return None
        steps = min(steps, self.limits.decode_steps)
        if steps > 1 and (len(decoding) < len(self.running) or self._admissible()):
            steps = 1
        # A second group is tried only when growing has preempted every row of the first.
        groups: dict[tuple[str, int, bool], list[Sequence]] = {}
        for seq in sorted(decoding, key=attrgetter("last_step")):  # and of those alike, the first by rank
            groups.setdefault(self.group(seq), []).append(seq)
        for group, members in groups.items():
            attention, _, wide = group
            buckets = sorted(self._buckets("decode", attention, wide), key=attrgetter("rows", "tokens"))
            chosen = members[:min(most, buckets[-1].rows)]
            chosen.sort(key=_rank)  # a row can then only preempt rows that are not planned yet
            drafts = self._drafts(chosen, buckets, propose) if propose else {}
            steps = min(steps, *(seq.burst for seq in chosen))  # or whoever samples one would wait for the others
            rows = []
            for seq in chosen:
                guessed = drafts.get(seq, ())
                count = self._grow(seq, seq.room(len(guessed) + 1 if drafts else steps, self.limits.max_seq_len))
                if count:
                    rows.append(PlannedRow(seq, seq.num_computed, count, True, tuple(guessed[:count - 1])))
            if rows:
                return StepPlan(next(bucket for bucket in buckets if bucket.rows >= len(rows)
                                     and (bucket.tokens > 1) == bool(drafts)), rows)
        return None

    def _drafts(self, chosen: list[Sequence], buckets: list[Bucket], propose) -> dict[Sequence, Sized[int]]:
        """Drafts of those rows that have some; none for anybody where no bucket takes so many rows."""
        widths = [bucket.tokens for bucket in buckets if bucket.rows >= len(chosen) and bucket.tokens > 1]
        if not widths:
            return {}
        found = {seq: list(propose(seq))[:widths[0] - 1] for seq in chosen}
        return {seq: drafts for seq, drafts in found.items() if drafts}

    def _grow(self, seq: Sequence, count: int) -> int:
        """Gives `seq` room for up to `count` more tokens and says for how many; 0 when it is preempted itself.

        For the first it preempts those after it by rank, for the others it does not.
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

    def _preempt(self, seq: Sequence) -> None:
        """Back into the line; all its known tokens are prefilled again, the sampled ones included."""
        self._release(seq)
        seq.num_computed = seq.num_reused = 0
        seq.prefill_end = seq.num_tokens
        seq.state = State.WAITING
        bisect.insort(self.waiting, seq, key=_rank)

    # --- shared

    def _release(self, seq: Sequence) -> None:
        self.running.remove(seq)
        for key in seq.keys[seq.num_kept:]:
            self._forget(seq, key)
        self._pool(seq).free(seq.pages)
        heapq.heappush(self._free_slots, seq.slot)
        seq.pages, seq.slot = [], None

    def _most_computed(self, seq: Sequence) -> int:
        """Tokens that can ever be in the cache for `seq`: all but the last one sampled."""
        return min(len(seq.prompt) + seq.max_new_tokens, self.limits.max_seq_len) - 1

    def _growth(self, seq: Sequence, pages: int | None = None) -> int:
        """Pages that admission leaves for `seq`, which has or would have `pages`, to grow into."""
        more = pages_for(self._most_computed(seq)) - (len(seq.pages) if pages is None else pages)
        return more if self.invariant else min(more, 1)

    def group(self, seq: Sequence) -> tuple[str, int, bool]:
        """What the sequences of one step have in common: the attention, the version of the weights, the precision."""
        return self.attention(seq), seq.version, seq.wide

    def attention(self, seq: Sequence) -> str:
        """The attention that computes this sequence, all its life."""
        return attention_of(seq.schedule or dynamic_schedule(1, len(seq.prompt), self.policy))

    def _pool(self, seq: Sequence) -> PagePool:
        return self.wide_pool if seq.wide else self.pool

    def _buckets(self, phase: str, schedule: str, wide: bool) -> tuple[Bucket, ...]:
        usual = self._table[0].precision
        return tuple(bucket for bucket in self._table
                     if (bucket.phase, bucket.schedule) == (phase, schedule) and (bucket.precision != usual) == wide)
