"""The scheduler under any requests in any order: nothing leaks, everything finishes, every text is its own."""

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scheduler_bench import LIMITS, Bench

from qwen_jax.engine.pages import pages_for
from qwen_jax.engine.schedule import FULL, SPARSE, SchedulePolicy, default_limits
from qwen_jax.engine.sequence import State

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
    assert bench.admitted == bench.sequences


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, stop and are aborted at any moment, in flight included, in a pool that is often too small."""

    def __init__(self):
        super().__init__()
        self.bench = Bench(capacity=7)

    @rule(length=prompt_lengths, new=output_lengths, alike=alike, salt=st.sampled_from([b"a", b"b"]),
          reusable=st.sampled_from([None, None, 0, 130]))
    def add(self, length, new, alike, salt, reusable):
        self.bench.add(length, new, alike, salt, reusable)

    @rule(steps=st.integers(1, 80))
    def run(self, steps):
        for _ in range(steps):
            self.bench.step()
            self.bench.check_invariants()

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
    bench = Bench(capacity=60, limits=default_limits(max_seq_len=2500), policy=SchedulePolicy())
    for _ in range(60):
        bench.add(chance.choice((1, 30, 64, 65, 300, 2100)), chance.randint(1, 400))
    bench.drain()
    assert {seq.schedule for seq in bench.sequences} >= {FULL, SPARSE}
    assert bench.preemptions > 0
