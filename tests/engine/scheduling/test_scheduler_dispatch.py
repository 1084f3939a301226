"""Contents of one dispatch: several tokens, drafts, one version of the weights, no dependence on other sequences."""

from dataclasses import replace

import pytest
from scheduler_bench import LIMITS, Bench, alone

from qwen_jax.engine.scheduling.buckets import Limits, default_limits
from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy
from qwen_jax.engine.scheduling.sequence import State

# --- several tokens per dispatch


STEPS_LIMITS = replace(LIMITS, decode_steps=8)


def test_a_dispatch_samples_several_tokens_while_no_other_sequence_could_begin():
    bench = Bench(capacity=30, limits=STEPS_LIMITS)
    first = bench.add(10, 20)
    bench.step(steps=8)
    assert bench.step(steps=8).rows[0].count == 8 and len(first.output) == 9
    late = bench.add(10, 20)
    assert bench.step(steps=8).rows[0].seq is late
    assert {row.count for row in bench.step(steps=8).rows} == {8}
    while bench.step(steps=8):
        pass
    bench.check_text()
    assert first.finish_reason == "length" and len(first.output) == 20


def test_a_dispatch_is_short_while_a_sequence_waits():
    bench = Bench(capacity=60, limits=replace(default_limits(max_seq_len=2500), decode_steps=8),
                  policy=SchedulePolicy())
    bench.add(10, 200), bench.step(), bench.add(2400, 1)
    plans = [bench.step(steps=8) for _ in range(6)]
    assert {row.count for plan in plans if plan.bucket.phase == "decode" for row in plan.rows} == {1}


@pytest.mark.parametrize("options, counts", [
    ({"burst": 1}, [1, 1, 1]), ({"min_new_tokens": 4}, [3, 8, 4]), ({}, [8, 7]), ({"max_new_tokens": 12}, [8, 3])])
def test_limits_that_shorten_a_row(options, counts):
    bench = Bench(capacity=30, limits=STEPS_LIMITS)
    bench.add(**{"length": 284, "max_new_tokens": 17} | options)
    while (plan := bench.step(steps=8)).bucket.phase == "prefill":
        pass
    assert [plan.rows[0].count, *(bench.step(steps=8).rows[0].count for _ in counts[1:])] == counts


def test_a_row_that_samples_one_token_does_not_wait_for_others():
    bench = Bench(capacity=30, limits=STEPS_LIMITS)
    free, held = bench.add(10, 30), bench.add(10, 30, burst=1)
    while not (free.output and held.output):
        bench.step(steps=8)
    assert [row.count for row in bench.step(steps=8).rows] == [1, 1]
    bench.drain()


def test_a_dispatch_never_preempts_for_more_than_one_token_each():
    bench = Bench(capacity=2, limits=STEPS_LIMITS)
    both = bench.add(60, 5), bench.add(60, 20)  # a page each; for eight tokens the second would need another one
    while not all(seq.output for seq in both):
        bench.step()
    assert [row.count for row in bench.step(steps=8).rows] == [3, 4]
    bench.check_invariants()
    assert bench.scheduler.preemptions == 0
    bench.drain()


# --- drafts


DRAFT_LIMITS = replace(LIMITS, draft_tokens=4, draft_rows=2)


def right_drafts(seq, most=4):
    return alone(seq.prompt, seq.max_new_tokens)[len(seq.output):][:most]


def test_right_drafts_are_taken_and_wrong_ones_cost_no_text():
    bench = Bench(capacity=30, limits=DRAFT_LIMITS)
    seq = bench.add(10, 20)
    bench.step()
    plan = bench.step(propose=right_drafts)
    assert str(plan.bucket) == "decode/full_attention 2x5" and len(seq.output) == 6
    bench.step(propose=lambda seq: [*right_drafts(seq, 2), 5000, 5000])
    assert len(seq.output) == 9
    assert bench.step(propose=lambda seq: []).bucket.tokens == 1
    while bench.scheduler.has_work:
        bench.step(propose=right_drafts)
    bench.check_text()
    bench.check_invariants()


def test_no_drafts_for_more_rows_than_buckets_take():
    bench = Bench(capacity=30, limits=DRAFT_LIMITS)
    for _ in range(3):
        bench.add(10, 20)
    bench.step()
    assert bench.step(propose=right_drafts).bucket.tokens == 1


# --- versions of the weights


def test_a_step_runs_one_version_and_both_go_on():
    bench = Bench(capacity=30)
    old = bench.add(10, 9)
    bench.step()
    new = bench.add(10, 9, version=1)
    versions = [plan.version for plan in iter(bench.step, None)]
    assert versions.count(0) >= 8 and versions.count(1) >= 8 and old.output and new.output
    bench.check_text()


def test_a_restarted_sequence_forgets_its_answer_but_not_its_place():
    bench = Bench(capacity=30)
    seq = bench.add(70, 9)
    for _ in range(5):
        bench.step()
    assert seq.output
    bench.scheduler.restart(seq)
    bench.check_invariants()
    assert seq.output == [] and seq.state is State.WAITING and bench.scheduler.waiting[0] is seq
    bench.drain()


# --- independence of the others


def test_invariant_sequences_compute_the_same_chunks_beside_any_others():
    limits = Limits(6, 900, ((1, 256),), (), (6,))
    policy = SchedulePolicy(recompute_above_rows=6)

    def chunks(others, capacity):
        bench = Bench(capacity, limits, policy, invariant=True)
        seq = bench.add(700, 100, alike=640)
        for length in others:
            bench.add(length, 200, alike=640)
        found = []
        while plan := bench.step():
            found += [(plan.bucket, row.start, row.count) for row in plan.rows if row.seq is seq]
        assert bench.scheduler.preemptions == 0
        return found

    with_others = chunks([650, 700, 60, 300], capacity=30)
    assert chunks([], capacity=30) == with_others
    bench = Bench(5, limits, policy, invariant=True)  # two, three, three and four pages
    for length in (3, 30, 64, 100):
        bench.add(length, 120)
    bench.drain()
    assert bench.preemptions == 0
    bench = Bench(30, limits, policy, invariant=True)
    for _ in range(2):
        seq = bench.add(700, 1, alike=640)
        bench.drain()
    assert seq.num_reused == 512, "ten pages are there, and two whole chunks of four pages"
