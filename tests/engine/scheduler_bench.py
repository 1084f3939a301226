"""The scheduler, driven by a stand-in for the device: a paged cache that stores tokens instead of K and V.

What a sequence "samples" is a hash of everything it can read through its pages, so that a missing chunk or a page
shared by two sequences changes the text; each request alone, without any scheduler, is the oracle.
"""

from qwen_jax.engine.scheduling.buckets import Bucket, Limits, bucket_table
from qwen_jax.engine.scheduling.page_pool import NULL_PAGE, PAGE, PagePool, pages_for
from qwen_jax.engine.scheduling.schedule_policy import FULL, RECOMPUTE, SPARSE, SchedulePolicy, attention_of
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.sequence import Sequence, State

POLICY = SchedulePolicy(sparse_above_tokens=150, recompute_above_rows=3)
# Fewer decode rows than sequences: they must take turns.
LIMITS = Limits(max_batch_size=6, max_seq_len=300, prefill_shapes=((1, 64), (3, 64), (1, 128)),
                recompute_shapes=((6, 64, 2),), decode_rows=(2, 4))


def sample(tokens: list[int]) -> int:
    return hash(tuple(tokens)) % 1000


def alone(prompt: list[int], max_new_tokens: int, max_seq_len: int = LIMITS.max_seq_len) -> list[int]:
    """Return the answer of a request that runs alone."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_new_tokens, max_seq_len):
        tokens.append(sample(tokens))
    return tokens[len(prompt):]


class Bench:
    """A scheduler and its pretended device; every step is checked against the rules of a plan."""

    def __init__(self, capacity: int, limits: Limits = LIMITS, policy: SchedulePolicy = POLICY, prefix_cache=True,
                 invariant=False, available: set[Bucket] | None = None):
        self.pool = PagePool(capacity + 1)
        self.limits, self.policy = limits, policy
        self.table = bucket_table(limits, policy)
        self.scheduler = Scheduler(self.table, limits, self.pool, policy, prefix_cache=prefix_cache,
                                   invariant=invariant, available=available)
        self.available = available
        self.cache = [[None] * PAGE for _ in range(self.pool.num_pages)]
        self.sequences: list[Sequence] = []
        self.schedules: dict[Sequence, str] = {}
        self.admitted: list[Sequence] = []
        self.phases: list[str] = []
        self.preemptions = 0
        self.computed = 0  # positions

    def add(self, length: int, max_new_tokens: int = 4, alike: int = 0, salt: bytes = b"",
            reusable: int | None = None, **options) -> Sequence:
        """The first `alike` tokens are those of every other prompt that asks for it."""
        n = len(self.sequences)
        prompt = [i % 1000 if i < alike else (n * 7919 + i) % 1000 for i in range(length)]
        seq = Sequence(n, prompt, max_new_tokens, salt=salt, reusable=reusable, **options)
        self.scheduler.settle_attention(seq)
        self.scheduler.add(seq)
        self.sequences.append(seq)
        return seq

    def step(self, between=lambda plan: None, steps: int = 1, propose=None):
        """Plans, runs and commits one step; `between` is called while the step is in flight."""
        before = list(self.scheduler.running)
        plan = self.scheduler.plan(steps, propose)
        assert (plan is None) == (not self.scheduler.has_work)
        if plan is None:
            return None
        self.preemptions += sum(seq.state is State.WAITING for seq in before)
        self.check_plan(plan)
        sampled = [self.run(row) for row in plan.rows]
        between(plan)
        ended = self.scheduler.commit(plan, sampled)
        assert all(seq.finish_reason == "length" for seq in ended)
        return plan

    def check_plan(self, plan):
        bucket = plan.bucket
        assert bucket in self.table
        complete = self.available is None or len(self.available) == len(self.table)
        assert complete or bucket in self.available
        assert 1 <= len(plan.rows) <= bucket.rows
        assert len({row.seq for row in plan.rows}) == len(plan.rows)
        for seq, start, count, samples in ((row.seq, row.start, row.count, row.samples) for row in plan.rows):
            assert seq.state is State.RUNNING and 1 <= count <= bucket.tokens * bucket.steps
            known = start + count if bucket.phase == "prefill" else start + 1
            assert start == seq.num_computed and known <= seq.num_tokens
            assert pages_for(start + count) <= len(seq.pages) <= bucket.pages
            assert samples == (known == seq.num_tokens), "sample once, where all known tokens are computed"
            assert bucket.phase == ("prefill" if seq.in_prefill else "decode")
            if bucket.phase == "prefill":
                assert start % PAGE == 0, "chunks start at page boundaries"
            assert attention_of(seq.schedule) == attention_of(bucket.schedule) and seq.version == plan.version
            assert self.schedules.setdefault(seq, seq.schedule) == seq.schedule, "a schedule is for life"
            if seq not in self.admitted:
                self.admitted.append(seq)
                if not complete or seq.dense:
                    continue
                expected = (SPARSE if len(seq.prompt) > self.policy.sparse_above_tokens else
                            RECOMPUTE if len(plan.rows) > self.policy.recompute_above_rows else FULL)
                assert seq.schedule == bucket.schedule == expected
        assert (bucket.schedule == RECOMPUTE) <= (len(plan.rows) > self.policy.recompute_above_rows)
        self.phases.append(bucket.phase)

    def run(self, row) -> list[int]:
        seq = row.seq
        for page in seq.pages[row.start // PAGE:pages_for(row.start + row.count)]:
            assert not [other for other in self.sequences if other is not seq and page in other.pages], "read-only"

        def compute(position, token):
            self.computed += 1
            self.cache[seq.pages[position // PAGE]][position % PAGE] = token

        def read(end):
            return sample([token for page in seq.pages for token in self.cache[page]][:end])

        known, end = seq.prompt + seq.output, row.start + row.count
        if row.drafts:
            for position, token in enumerate((known[-1], *row.drafts), row.start):
                compute(position, token)
            tokens = [read(row.start + 1)]
            for draft in row.drafts:
                if draft != tokens[-1]:
                    break
                tokens.append(read(row.start + len(tokens) + 1))
            return tokens
        if not seq.in_prefill:
            for position in range(row.start, end):
                compute(position, known[position])
                known.append(read(position + 1))
            return known[seq.num_tokens:]
        for position in range(row.start, end):
            compute(position, known[position])
        return [read(end)] if row.samples else []

    def check_invariants(self):
        scheduler, running = self.scheduler, self.scheduler.running
        held = {}  # page -> its place in the first sequence that has it
        for seq in self.sequences:
            assert len(set(seq.pages)) == len(seq.pages)
            for index, page in enumerate(seq.pages):
                other, place = held.setdefault(page, (seq, index))
                end = (index + 1) * PAGE
                assert other is seq or (place == index and other.tokens[:end] == seq.tokens[:end] and end <= min(
                    other.num_computed, seq.num_computed) and other.salt == seq.salt), "shared, but not alike and full"
        assert NULL_PAGE not in held
        assert self.pool.num_free == self.pool.capacity - len(held), "pages have leaked"
        slots = [seq.slot for seq in running]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(self.limits.max_batch_size))
        for seq in self.sequences:
            assert (seq in running) == (seq.state is State.RUNNING)
            assert (seq in scheduler.waiting) == (seq.state is State.WAITING)
            assert (seq.finish_reason is not None) == (seq.state is State.FINISHED)
            if seq.state is not State.RUNNING:
                assert seq.pages == [] and seq.slot is None
        for line in running, scheduler.waiting:
            ranks = [(seq.priority, seq.arrival) for seq in line]
            assert ranks == sorted(ranks)
        assert scheduler.has_work == bool(running or scheduler.waiting)

    def check_text(self):
        for seq in self.sequences:
            expected = alone(seq.prompt, seq.max_new_tokens, self.limits.max_seq_len)
            assert seq.output == expected[:len(seq.output)]
            assert seq.finish_reason in ("stop", "abort", None) or seq.output == expected

    def drain(self, at_most: int = 20_000):
        steps = 0
        while self.scheduler.has_work:
            self.step()
            steps += 1
            assert steps <= at_most, "no progress"
        self.check_invariants()
        self.check_text()
        assert self.pool.num_free == self.pool.capacity
