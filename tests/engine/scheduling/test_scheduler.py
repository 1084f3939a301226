"""Plans, refusals and freed pages of the scheduler, case by case."""

import random
from dataclasses import replace

import pytest
from scheduler_bench import LIMITS, POLICY, Bench, alone

from qwen_jax.engine.runner.program_table import by_usefulness
from qwen_jax.engine.scheduling.buckets import bucket_table, default_limits
from qwen_jax.engine.scheduling.schedule_policy import FULL, RECOMPUTE, SPARSE, SchedulePolicy
from qwen_jax.engine.scheduling.scheduler import RANK_EVERY
from qwen_jax.engine.scheduling.sequence import Sequence, State
from qwen_jax.errors import UserError

# --- what a step contains


def test_one_request_prefills_in_chunks_and_then_decodes():
    bench = Bench(capacity=5)
    seq = bench.add(length=150, max_new_tokens=3)
    steps = [bench.step() for _ in range(4)]
    assert [(str(plan.bucket), plan.rows[0].start, plan.rows[0].count, plan.rows[0].samples) for plan in steps] == [
        ("prefill/full_attention 1x128", 0, 128, False), ("prefill/full_attention 1x64", 128, 22, True),
        ("decode/full_attention 2x1", 150, 1, True), ("decode/full_attention 2x1", 151, 1, True)]
    assert seq.finish_reason == "length" and seq.output == alone(seq.prompt, 3)
    assert bench.step() is None


def test_steps_take_the_programs_that_are_there_and_the_others_as_they_come():
    """Whatever the order of arrival after the smallest; a long sequence that came before sparse attention stays full.
    """
    table = bucket_table(LIMITS, POLICY)
    order = by_usefulness(table)
    assert [str(bucket) for bucket in order[:2]] == ["prefill/full_attention 1x64", "decode/full_attention 2x1"]
    assert set(order) == set(table) and order[-1].schedule == SPARSE
    for seed in range(5):
        rest = order[2:]
        random.Random(seed).shuffle(rest)
        available = set(order[:2])
        bench = Bench(capacity=40, available=available)
        early = bench.add(200)
        for length in (60, 64, 100, 3, 160):
            bench.add(length)
        while rest:
            for _ in range(2):
                bench.step()
            available.add(rest.pop())
        late = [bench.add(length) for length in (200, 30, 40, 50)]
        bench.drain()
        assert early.schedule in (FULL, RECOMPUTE) and late[0].schedule == SPARSE


def test_a_one_token_prompt_is_prefilled_not_decoded():
    bench = Bench(capacity=5)
    bench.add(length=1)
    assert bench.step().bucket.phase == "prefill"
    bench.drain()


def test_a_large_batch_is_recompute_and_decodes_as_full_attention():
    bench = Bench(capacity=30)
    for length in (60, 60, 100, 60, 60):
        bench.add(length)
    first = bench.step()
    assert str(first.bucket) == "prefill/recompute 6x64" and first.bucket.micro_rows == 2 and len(first.rows) == 5
    assert bench.step().bucket.schedule == FULL  # decode
    rest = bench.step()  # what is left of the longer prompt does not need a batch of six
    assert str(rest.bucket) == "prefill/full_attention 1x64" and rest.rows[0].seq.schedule == RECOMPUTE
    bench.drain()
    assert {seq.schedule for seq in bench.sequences} == {RECOMPUTE}


def test_a_batch_at_the_threshold_is_not_recompute():
    bench = Bench(capacity=30)
    for _ in range(3):
        bench.add(60)
    assert str(bench.step().bucket) == "prefill/full_attention 3x64"


def test_default_limits_make_a_wave_of_40_requests_recompute():
    bench = Bench(capacity=200, limits=default_limits(), policy=SchedulePolicy())
    for _ in range(40):
        bench.add(50, 2)
    plan = bench.step()
    assert str(plan.bucket) == "prefill/recompute 64x64" and len(plan.rows) == 40
    bench.drain()


def test_long_and_short_prompts_never_share_a_step():
    bench = Bench(capacity=30)
    bench.add(60), bench.add(200), bench.add(60)
    while bench.scheduler.has_work:
        plan = bench.step()
        assert len({row.seq.schedule for row in plan.rows}) == 1
    assert [seq.schedule for seq in bench.sequences] == [FULL, SPARSE, FULL]
    bench.check_text()


def test_the_decode_bucket_is_the_smallest_that_fits():
    bench = Bench(capacity=30)
    for _ in range(3):
        bench.add(10, 9)
    bench.step()
    plan = bench.step()
    assert (plan.bucket.rows, len(plan.rows)) == (4, 3)
    bench.scheduler.abort(0)
    plan = bench.step()
    assert (plan.bucket.rows, len(plan.rows)) == (2, 2)


# --- ends

def test_the_context_limit_ends_a_sequence():
    bench = Bench(capacity=5)
    seq = bench.add(length=295, max_new_tokens=100)
    bench.drain()
    assert seq.finish_reason == "length" and seq.num_tokens == 300


def test_stop_frees_at_once_and_wins_over_length():
    bench = Bench(capacity=5)
    first, second = bench.add(10, 5), bench.add(10, 1)
    bench.step()
    bench.scheduler.finish(first, "stop")
    bench.step()
    assert second.finish_reason == "length"
    bench.scheduler.finish(second, "stop")  # its only token was the stop token
    bench.scheduler.finish(second, "abort")
    assert (first.finish_reason, second.finish_reason) == ("stop", "stop")
    bench.check_invariants()
    assert bench.pool.num_free == 5 and not bench.scheduler.has_work


def test_commit_returns_what_ended_by_length():
    bench = Bench(capacity=5)
    first, second = bench.add(10, 1), bench.add(10, 2)
    plan = bench.scheduler.plan()
    rows = len(plan.rows)
    assert bench.scheduler.commit(plan, [[5]] * rows) == [first]
    while bench.scheduler.has_work:
        plan = bench.scheduler.plan()
        ended = bench.scheduler.commit(plan, [[5]] * len(plan.rows))
    assert ended == [second]


def test_abort_in_flight_frees_within_the_call_and_the_commit_skips_it():
    bench = Bench(capacity=5)
    gone, stays = bench.add(10), bench.add(10)

    def abort(plan):
        assert bench.scheduler.abort(0)
        bench.check_invariants()

    bench.step(between=abort)
    assert gone.output == [] and gone.finish_reason == "abort" and not bench.scheduler.abort(0)
    bench.drain()
    assert len(stays.output) == 4


def test_abort_of_an_unknown_request_says_so():
    assert Bench(capacity=5).scheduler.abort("unknown") is False


# --- refusals

@pytest.mark.parametrize("length, max_new_tokens, capacity, message", [
    (0, 1, 5, "prompt is empty"),
    (10, 0, 5, "max_tokens must be at least 1"),
    (300, 1, 5, "300 tokens and max_seq_len=300"),
    (64, 2, 1, "needs? 2 pages.* has 1"),
    (10, 10_000, 4, "5 pages"),
])
def test_requests_that_could_not_finish_are_refused(length, max_new_tokens, capacity, message):
    bench = Bench(capacity)
    with pytest.raises(UserError, match=message):
        bench.add(length, max_new_tokens)
    assert not bench.scheduler.has_work


def test_check_refuses_without_queueing_and_accepts_without_queueing():
    scheduler = Bench(capacity=1).scheduler
    with pytest.raises(UserError, match="2 pages"):
        scheduler.check(Sequence(0, [1] * 64, 2))
    scheduler.check(Sequence(0, [1] * 64, 1))
    assert not scheduler.has_work and not scheduler.waiting


def test_the_largest_requests_that_fit_are_accepted():
    for length, max_new_tokens, capacity in ((64, 1, 1), (63, 2, 1), (299, 1, 5), (10, 10_000, 5)):
        bench = Bench(capacity)
        bench.add(length, max_new_tokens)
        bench.drain()


def test_a_request_id_in_use_is_refused_and_free_again_afterwards():
    bench = Bench(capacity=5)
    bench.add(10)
    with pytest.raises(UserError, match="request 0 is already"):
        bench.scheduler.add(Sequence(0, [1], 1))
    bench.drain()
    bench.scheduler.add(Sequence(0, [1], 1))


def test_a_plan_that_was_overtaken_or_came_back_incomplete_is_an_error():
    bench = Bench(capacity=5)
    bench.add(10)
    plan = bench.scheduler.plan()
    with pytest.raises(ValueError, match="tokens of 2 rows for 1 rows"):
        bench.scheduler.commit(plan, [[1], [2]])
    for tokens in [], [1, 2]:
        with pytest.raises(ValueError, match=f"{len(tokens)} tokens came back"):
            bench.scheduler.commit(plan, [tokens])
    bench.scheduler.commit(plan, [[1]])
    with pytest.raises(ValueError, match="stale"):
        bench.scheduler.commit(plan, [[1]])


def test_a_step_that_failed_can_be_planned_again():
    bench = Bench(capacity=5)
    bench.add(10)
    assert bench.scheduler.plan() == bench.scheduler.plan()
    bench.drain()


# --- preemption and fairness

def test_the_latest_is_preempted_and_resumes_with_its_own_text():
    bench = Bench(capacity=3)
    first, second = bench.add(60, 80), bench.add(60, 60)  # one page each at first, then three and two
    while not bench.preemptions:
        bench.step()
    assert first.state is State.RUNNING and second.state is State.WAITING
    assert second.num_computed == 0 and second.output and second.prefill_end == second.num_tokens
    bench.drain()
    assert len(second.output) == 60


def test_a_row_of_the_step_is_never_the_one_preempted_for_it():
    bench = Bench(capacity=4, limits=replace(LIMITS, decode_rows=(2,)))
    for length, new in ((63, 9), (10, 9), (64, 9)):
        bench.add(length, new)
    for _ in range(2):
        bench.step()  # prefill; then the first two decode
    first, _, third = bench.sequences
    assert [row.seq for row in bench.step().rows] == [first]  # both outgrow their page, and one page is left:
    assert third.state is State.WAITING  # the third has waited longer for its turn, but the first arrived earlier
    bench.drain()


def test_a_preempted_request_keeps_its_schedule():
    bench = Bench(capacity=7)
    for _ in range(4):
        bench.add(60, 60)  # recompute together; when all have grown to two pages, one is missing
    bench.drain()
    assert bench.preemptions > 0
    assert [seq.schedule for seq in bench.sequences] == [RECOMPUTE] * 4


def test_preempted_requests_return_in_their_order_and_before_newcomers():
    bench = Bench(capacity=4)
    for _ in range(4):
        bench.add(60, 150)  # one page each, then three or four
    while bench.preemptions < 2:
        bench.step()
        bench.check_invariants()
    bench.add(10)
    bench.drain()


@pytest.mark.parametrize("together", [False, True])
def test_no_sequence_is_admitted_into_certain_preemption(together):
    bench = Bench(capacity=4)
    bench.add(60, 80)  # will need 3 pages
    if not together:
        bench.step()
    bench.add(130, 4)  # would fit into the 3 pages that are left, of which the first is about to take one
    bench.drain()
    assert bench.preemptions == 0


def test_a_full_pool_is_used_to_the_last_page_by_requests_that_cannot_grow():
    bench = Bench(capacity=3)
    for _ in range(3):
        bench.add(50, 5)
    assert len(bench.step().rows) == 3


def test_prefill_and_decode_alternate_under_an_endless_stream_of_requests():
    bench = Bench(capacity=40)
    old = bench.add(10, 40)
    bench.step()
    while old.state is not State.FINISHED:
        while len(bench.scheduler.waiting) < 4:
            bench.add(60, 2)
        bench.step()
    # One decode step in two, and never more than one missed in a row while others rotate through its bucket.
    steps = "".join(phase[0] for phase in bench.phases)
    assert "ppp" not in steps and len(steps) <= 2 * 2 * 40
    bench.drain()


def test_a_long_decode_does_not_hold_up_a_newcomer():
    bench = Bench(capacity=40)
    for _ in range(4):
        bench.add(10, 200)
    bench.step(), bench.step()
    late = bench.add(60)
    plans = [bench.step(), bench.step()]
    assert late in [row.seq for plan in plans for row in plan.rows if plan.bucket.phase == "prefill"]


@pytest.mark.parametrize("lengths", [(10,) * 6, (10, 200, 10, 200, 200, 10), (200, 10, 10, 10, 10, 10)])
def test_rows_beyond_the_bucket_and_groups_of_attention_take_turns(lengths):
    bench = Bench(capacity=40)
    sequences = [bench.add(length, 60) for length in lengths]
    while any(not seq.output for seq in sequences):
        bench.step()
    start = {seq: len(seq.output) for seq in sequences}
    for _ in range(24):
        assert bench.step().bucket.phase == "decode"
    gained = [len(seq.output) - start[seq] for seq in sequences]
    assert min(gained) >= 8, gained  # at most three kinds of step here: two attentions, or one bucket and a half
    bench.drain()


def test_a_short_prompt_does_not_wait_for_a_long_one():
    """The wait is at most the chunk that runs, a decode step, and one chunk that goes by rank."""
    bench = Bench(capacity=60, limits=default_limits(max_seq_len=2500), policy=SchedulePolicy())
    long = bench.add(2400, 1)
    bench.step()
    while long.in_prefill:
        short, before = bench.add(30, 2), len(bench.phases)
        while not short.output:
            bench.step()
        assert bench.phases[before:].count("prefill") <= 2
    bench.drain()


def test_a_long_prompt_gets_its_share_under_an_endless_stream_of_short_ones():
    bench = Bench(capacity=60, limits=default_limits(max_seq_len=2500), policy=SchedulePolicy())
    long = bench.add(2400, 1)
    prefills = 0
    while not long.output:
        while len(bench.scheduler.waiting) < 8:
            bench.add(60, 1)
        prefills += bench.step().bucket.phase == "prefill"
    assert prefills <= RANK_EVERY * 10 + 1
    bench.drain()


def test_memory_is_not_overtaken():
    bench = Bench(capacity=6)
    first = bench.add(60, 100)
    bench.step()
    bench.add(290, 1)  # five pages: those that are left, but one is promised to the first
    small = bench.add(10, 1)
    while not small.output:
        bench.step()
    assert first.state is State.FINISHED
    bench.drain()


# --- priorities and deadlines


def test_the_urgent_go_first_and_give_way_last():
    bench = Bench(capacity=4)
    low, urgent = bench.add(60, 100, priority=1), bench.add(60, 100, priority=-1)
    normal = bench.add(60, 100)
    first = bench.step()
    assert [row.seq for row in first.rows][0] is urgent
    while not bench.scheduler.preemptions:
        bench.step()
    assert low.state is State.WAITING and urgent.state is State.RUNNING
    bench.drain()
    assert urgent.finish_reason == normal.finish_reason == low.finish_reason == "length"


def test_deadlines_are_found_once_and_in_time():
    bench = Bench(capacity=30)
    late, later = bench.add(10, 9, deadline=2.0), bench.add(10, 9, deadline=3.0)
    done = bench.add(10, 1, deadline=1.0)
    bench.step()
    assert done.state is State.FINISHED
    assert bench.scheduler.expired(1.5) == []
    assert bench.scheduler.expired(2.0) == [late] and bench.scheduler.expired(2.0) == []
    assert bench.scheduler.expired(9.0) == [later]
    bench.drain()


# --- the prefix cache


def test_a_prefix_that_many_share_is_computed_once():
    bench = Bench(capacity=40)
    for _ in range(5):
        bench.add(length=140, max_new_tokens=2, alike=128)
    first = bench.step()
    assert len(first.rows) == 1, "the others wait for the pages that the first is about to fill"
    bench.drain()
    assert bench.computed == 140 + 4 * 12 + 5 * 1
    assert (bench.scheduler.prefix_queries, bench.scheduler.prefix_hits) == (5 * 2, 4 * 2)


def test_without_the_cache_everything_is_computed():
    bench = Bench(capacity=40, prefix_cache=False)
    for _ in range(3):
        bench.add(length=140, max_new_tokens=1, alike=128)
    bench.drain()
    assert bench.computed == 3 * 140 and bench.scheduler.prefix_queries == 0


def test_a_finished_answer_is_found_by_the_next_turn():
    """The pages of an answer are kept too: a conversation goes on where it was."""
    bench = Bench(capacity=40)
    seq = bench.add(length=100, max_new_tokens=40)
    bench.drain()
    computed = bench.computed
    longer = Sequence("next", seq.prompt + seq.output + [5], 1)
    bench.sequences.append(longer)
    bench.scheduler.add(longer)
    bench.drain()
    assert bench.computed - computed == 141 - 128


@pytest.mark.parametrize("difference", [{"salt": b"x"}, {"reusable": 63}, {"alike": 63}])
def test_pages_that_must_not_be_shared(difference):
    bench = Bench(capacity=40)
    bench.add(length=140, max_new_tokens=1, alike=128)
    bench.drain()
    bench.add(**{"length": 140, "max_new_tokens": 1, "alike": 128} | difference)
    bench.drain()
    assert bench.computed == 2 * 140


def test_one_token_at_least_is_computed():
    bench = Bench(capacity=40)
    for _ in range(2):
        bench.add(length=128, max_new_tokens=1, alike=128)
        bench.drain()
    assert bench.computed == 128 + 64


def test_a_sequence_that_waits_for_pages_goes_on_when_the_leader_is_aborted():
    bench = Bench(capacity=40)
    leader, follower = bench.add(length=290, alike=256), bench.add(length=290, alike=256)
    bench.step()
    assert follower.state is State.WAITING
    bench.scheduler.abort(leader.request_id)
    assert bench.step().rows[0].seq is follower
    bench.drain()


def test_pages_that_were_kept_give_way_to_new_ones():
    bench = Bench(capacity=5)
    bench.add(length=200, max_new_tokens=1)
    bench.drain()
    assert bench.pool.num_free == 5
    bench.add(length=290, max_new_tokens=1)  # needs all five
    bench.drain()
    bench.add(length=200, max_new_tokens=1)
    bench.drain()
    assert bench.scheduler.prefix_hits == 0
