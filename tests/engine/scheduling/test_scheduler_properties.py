"""The scheduler under any requests in any order: no page leaks, every request finishes, every text is right."""

import random
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scheduler_bench import LIMITS, Bench, alone

from qwen_jax.engine.scheduling.buckets import default_limits
from qwen_jax.engine.scheduling.page_pool import pages_for
from qwen_jax.engine.scheduling.schedule_policy import FULL, SPARSE, SchedulePolicy
from qwen_jax.engine.scheduling.sequence import State

# Mostly short prompts with long answers: those outgrow the pool.
prompt_lengths = st.one_of(st.integers(1, 70), st.integers(1, 299))
output_lengths = st.one_of(st.integers(1, 10), st.integers(100, 290))
alike = st.sampled_from([0, 0, 64, 100, 200, 299])  # tokens that prompts have in common
requests = st.lists(st.tuples(prompt_lengths, output_lengths, alike), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests=requests, spare=st.integers(0, 6))
def test_everything_finishes_in_every_pool_that_admits_it(requests, spare):
    needed = max(pages_for(min(length + new, LIMITS.max_seq_len) - 1) for length, new, _ in requests)
    bench = Bench(needed + spare)
    for length, new, alike in requests:
        bench.add(length, new, alike)
    bench.drain()
    assert set(bench.admitted) == set(bench.sequences)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, stop and are aborted at any moment, in flight included, in a pool that is often too small."""

    def __init__(self):
        super().__init__()
        self.bench = Bench(capacity=7, limits=replace(LIMITS, decode_steps=8, draft_tokens=4, draft_rows=4))

    @rule(length=prompt_lengths, new=output_lengths, alike=alike, version=st.integers(0, 1),
          reusable=st.sampled_from([None, None, 0, 130]), priority=st.integers(-1, 1), deadline=st.floats(0, 1),
          minimum=st.integers(0, 9))
    def add(self, length, new, alike, version, reusable, priority, deadline, minimum):
        self.bench.add(length, new, alike, bytes([version]), reusable, version=version, priority=priority,
                       deadline=deadline, min_new_tokens=minimum)

    @rule(steps=st.integers(1, 80), burst=st.integers(1, 20), right=st.none() | st.integers(0, 4))
    def run(self, steps, burst, right):
        def propose(seq):
            drafts = alone(seq.prompt, seq.max_new_tokens)[len(seq.output):][:4]
            return [*drafts[:right], *(token + 1 for token in drafts[right:])]

        for _ in range(steps):
            self.bench.step(steps=burst, propose=None if right is None else propose)
            self.bench.check_invariants()

    @rule(now=st.floats(0, 1))
    def expire(self, now):
        for seq in self.bench.scheduler.expired(now):
            self.bench.scheduler.finish(seq, "abort")

    @precondition(lambda self: self.bench.scheduler.has_work)
    @rule(data=st.data())
    def restart(self, data):
        self.bench.scheduler.restart(data.draw(st.sampled_from(
            [seq for seq in self.bench.sequences if seq.state is not State.FINISHED])))

    @precondition(lambda self: self.bench.scheduler.has_work)
    @rule(data=st.data(), in_flight=st.booleans())
    def abort(self, data, in_flight):
        unfinished = [seq.request_id for seq in self.bench.sequences if seq.state is not State.FINISHED]
        target = data.draw(st.sampled_from(unfinished))

        def abort(plan=None):
            assert self.bench.scheduler.abort(target)
            self.bench.check_invariants()

        self.bench.step(between=abort) if in_flight else abort()

    @precondition(lambda self: any(seq.output for seq in self.bench.scheduler.running))
    @rule(data=st.data())
    def stop(self, data):
        seq = data.draw(st.sampled_from([seq for seq in self.bench.scheduler.running if seq.output]))
        self.bench.scheduler.finish(seq, "stop")

    @invariant()
    def consistent(self):
        self.bench.check_invariants()

    def teardown(self):
        self.bench.drain()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=40, stateful_step_count=30, deadline=None,
                                  suppress_health_check=[HealthCheck.too_slow])


def test_the_default_engine_under_a_mixed_load():
    chance = random.Random(0)
    bench = Bench(capacity=60, limits=default_limits(max_seq_len=2500),
                  policy=SchedulePolicy(sparse_above_tokens=2048))
    for _ in range(60):
        bench.add(chance.choice((1, 30, 64, 65, 300, 2100)), chance.randint(1, 400))
    bench.drain()
    assert {seq.schedule for seq in bench.sequences} >= {FULL, SPARSE}
    assert bench.preemptions > 0
