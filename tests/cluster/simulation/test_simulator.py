"""Tests of the simulator against queueing theory, against steps computed by hand, and on random traces."""

from collections import Counter
from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.cluster.routing.policies import choose
from qwen_jax.cluster.simulation.policies import RoundRobin, least_loaded, random_choice, two_choices
from qwen_jax.cluster.simulation.replica import Job, SimulatedReplica
from qwen_jax.cluster.simulation.simulator import ServiceTimes, imbalance, simulate
from qwen_jax.cluster.simulation.traces import CONTEXT, MAX_OUTPUT, TraceRequest, skewed_trace
from qwen_jax.errors import UserError

ONE_AT_A_TIME = ServiceTimes(base=0, per_prefill_token=1e-6, max_batch=1, chunk_tokens=1 << 40, kv_tokens=1 << 40)
ROUND = ServiceTimes(base=1, per_prefill_token=0.01, per_decode_row=0.1, chunk_tokens=400, decode_steps=8)


def poisson(requests, rate, service, seed=0):
    """Return requests of ``service`` seconds, a number for all or for each, on `ONE_AT_A_TIME`."""
    arrivals = np.random.default_rng(seed).exponential(1 / rate, requests).cumsum()
    tokens = np.broadcast_to(np.maximum(np.asarray(service) * 1e6, 1).astype(int), requests)
    return [TraceRequest(arrival, size, 1) for arrival, size in zip(arrivals.tolist(), tokens.tolist())]


# --- theory


def test_constant_service_waits_as_in_m_d_1():
    result = simulate(poisson(30_000, 0.7, 1), [ONE_AT_A_TIME], random_choice)
    assert result.latency.mean() == pytest.approx(1 + 0.7 / (2 * (1 - 0.7)), rel=0.03)  # Pollaczek-Khinchine
    assert result.utilisation[0] == pytest.approx(0.7, rel=0.02)
    assert result.in_flight[0] == pytest.approx(0.7 * result.latency.mean(), rel=0.02)  # Little


def test_exponential_service_waits_as_in_m_m_1():
    service = np.random.default_rng(1).exponential(1, 30_000)
    latency = simulate(poisson(30_000, 0.6, service), [ONE_AT_A_TIME], random_choice).latency
    assert latency.mean() == pytest.approx(1 / (1 - 0.6), rel=0.04)
    for t in (1, 3, 6):  # the time in the system is exponential too
        assert (latency > t).mean() == pytest.approx(exp(-(1 - 0.6) * t), rel=0.07)
    assert np.percentile(latency, 99) == pytest.approx(log(100) / (1 - 0.6), rel=0.08)


def test_two_choices_wait_as_in_the_supermarket_model():
    """Mitzenmacher's limit for many queues with loads of 0.8: sum of 0.8^(2^i - 2), where random choice has 5."""
    replicas, load, requests = 100, 0.8, 24_000
    trace = poisson(requests, replicas * load, np.random.default_rng(1).exponential(1, requests))
    half = requests // 2  # the first ones find empty queues
    expected = sum(load ** (2**i - 2) for i in range(1, 10))
    latency = simulate(trace, [ONE_AT_A_TIME] * replicas, two_choices, report_seconds=0).latency[half:]
    assert latency.mean() == pytest.approx(expected, rel=0.04)
    stale = simulate(trace, [ONE_AT_A_TIME] * replicas, two_choices, report_seconds=3).latency[half:]
    assert stale.mean() > 1.1 * expected, "old reports cost something"


# --- steps, by hand


def test_a_step_is_shared_by_prompts_and_answers():
    a, b = TraceRequest(0.0, 100, 3), TraceRequest(1.0, 50, 2)
    result = simulate([a, b], [ROUND], random_choice)
    # 0 to 2: A's prompt. To 3.6: B's prompt, A's second token. To 4.8: A's third, B's second.
    assert result.first_token == pytest.approx([2, 2.6]) and result.latency == pytest.approx([4.8, 3.8])
    assert result.busy == pytest.approx([1]) and result.in_flight == pytest.approx([1])  # until B's arrival
    assert result.finished == result.tokens == 0


def test_nothing_interrupts_a_dispatch_of_decode_steps():
    trace = [TraceRequest(0.0, 100, 20), TraceRequest(2.5, 150, 1)]
    for steps, free in ((8, 2 + 8 * 1.1), (1, 2 + 1.1)):
        result = simulate(trace, [replace(ROUND, decode_steps=steps)], random_choice)
        assert result.first_token[1] == pytest.approx(free + 2.6 - 2.5)


def test_a_long_prompt_comes_in_chunks_and_answers_go_on():
    long, short = TraceRequest(0.0, 1000, 1), TraceRequest(0.5, 10, 2)
    result = simulate([long, short], [ROUND], random_choice)
    # 400 until 5, 400 until 10, 200 and the short one's 10 until 13.1.
    assert result.first_token == pytest.approx([13.1, 12.6])
    assert result.latency == pytest.approx([13.1, 13.7])


@pytest.mark.parametrize("times", [replace(ROUND, max_batch=1), replace(ROUND, kv_tokens=150)])
def test_who_does_not_fit_waits(times):
    result = simulate([TraceRequest(0.0, 100, 3), TraceRequest(1.0, 50, 1)], [times], random_choice)
    assert result.latency == pytest.approx([4.2, 4.2 + 1.5 - 1])


def test_a_prefix_is_computed_once_per_replica():
    blocks = tuple(range(4))
    trace = [TraceRequest(10.0 * i, 256 + 44, 1, (*blocks, 100 + i)[:4]) for i in range(1, 4)]
    result = simulate(trace, [ROUND], random_choice)
    assert result.latency == pytest.approx([4, 1.44, 1.44]) and result.cached_share == pytest.approx(512 / 900)
    at_once = [TraceRequest(0.1 * i, 1000, 1, tuple(range(15))) for i in range(1, 4)]
    waited = simulate(at_once, [ROUND], random_choice)
    assert waited.cached_share == pytest.approx(2 * 960 / 3000), "who needs what is being computed waits for it"
    whole = simulate([replace(request, prompt_tokens=256) for request in trace], [ROUND], random_choice)
    assert whole.latency[1] == pytest.approx(1.01), "the last token is computed in any case"
    assert simulate(trace, [replace(ROUND, prefix_blocks=0)], random_choice).cached_share == 0
    assert simulate(trace, [ROUND] * 3, RoundRobin()).cached_share == 0


def test_what_moved_away_is_not_found():
    replica, request = SimulatedReplica(ROUND, 100.0), TraceRequest(0.0, 300, 1, (1, 2, 3, 4))
    replica.put(Job(0, request), 0.0)
    replica.take_last(0.0)
    replica.put(Job(1, request), 0.0)
    assert replica.uncached == 44, "expected, as the router does"
    assert replica.begin_step(0.0) == pytest.approx(4) and replica.computed == 300 and replica.uncached == 0


# --- random traces

requests = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 3000), st.integers(1, 60), st.integers(0, 3)),
                    min_size=1, max_size=60)
policies = st.sampled_from([choose, random_choice, two_choices, least_loaded, RoundRobin])


def trace_of(drawn):
    trace = []
    for index, (arrival, prompt, output, tenant) in enumerate(sorted(drawn)):
        blocks = tuple((tenant if block < 10 else -index, block) for block in range(prompt // 64))
        trace.append(TraceRequest(arrival, prompt, output, blocks))
    return [*trace, TraceRequest(6.0, 1, 1)]


@settings(max_examples=60, deadline=None)
@given(drawn=requests, policy=policies, replicas=st.integers(1, 5), batch=st.integers(1, 4), seed=st.integers(0, 3),
       report=st.sampled_from([0, 0.1, 2.0]), rebalance=st.sampled_from([None, 0.05, 1.0]),
       dying=st.lists(st.floats(0, 8), max_size=4))
def test_every_request_ends_once_and_not_on_a_dead_replica(drawn, policy, replicas, batch, seed, report, rebalance,
                                                           dying):
    trace, ends = trace_of(drawn), Counter()
    deaths = dict(enumerate(dying[:replicas - 1]))
    times = ServiceTimes(max_batch=batch, kv_tokens=5000)

    def run():
        return simulate(trace, [times] * replicas, policy() if policy is RoundRobin else policy, seed=seed,
                        report_seconds=report, rebalance_seconds=rebalance, deaths=deaths)

    def end_step(replica, now, real=SimulatedReplica.end_step):
        first, last = real(replica, now)
        ends.update(job.index for job in last)
        assert replica.alive and 0 <= replica.kv_used <= 5000 and replica.running <= batch
        assert 0 <= len(replica.queue) <= replica.unfinished and replica.uncached >= 0
        assert replica.unfinished or replica.uncached == replica.kv_used == 0
        return first, last

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedReplica, "end_step", end_step)
        result = run()
    assert ends == Counter(range(len(trace)))
    assert (result.first_token > 0).all() and (result.latency >= result.first_token).all()
    for dead, second in deaths.items():
        on_it = result.replica == dead
        assert all(request.arrival + latency <= second
                   for request, latency in zip(np.array(trace, object)[on_it], result.latency[on_it]))
    again = run()
    for field in ("latency", "first_token", "replica", "busy", "in_flight"):
        np.testing.assert_array_equal(getattr(result, field), getattr(again, field))


def test_the_dead_get_nothing_and_what_they_had_starts_again():
    trace = skewed_trace(200, 20, 0)
    result = simulate(trace, [ServiceTimes()] * 4, choose, deaths={0: 0.0, 1: 3.0})
    counts = np.bincount(result.replica, minlength=4)
    assert counts[0] == 0 and 0 < counts[1] < counts[2] and result.busy[0] == 0
    assert result.in_flight[0] == 0
    with pytest.raises(UserError, match="none is left at second 3"):
        simulate(trace, [ServiceTimes()] * 2, choose, deaths={0: 1.0, 1: 3.0})


def test_a_router_knows_what_was_reported_and_what_it_sent_since():
    seen = []

    def policy(views, blocks, rng):
        seen.append([(view.queued, view.running, view.queued_prefill_tokens) for view in views])
        return "0"

    trace = [TraceRequest(at, 128, 2, (index, -index)) for index, at in enumerate((0.0, 0.5, 3.0), 1)]
    simulate(trace, [ROUND], policy, report_seconds=1.0)
    # Reported at 1: the first is in its first step, the second waits. At 2: the same. At 3: both run.
    assert seen == [[(0, 0, 0)], [(1, 0, 128)], [(0, 2, 0)]]
    seen.clear()
    simulate(trace, [ROUND], policy, report_seconds=100.0)
    assert seen == [[(0, 0, 0)], [(1, 0, 128)], [(2, 0, 256)]]


def crowded(rebalance):
    """Simulate requests of five seconds that all go to the first of four replicas."""
    trace = [TraceRequest(index / 20, 500, 20) for index in range(100)]
    return simulate(trace, [ServiceTimes(max_batch=4)] * 4, lambda views, blocks, rng: "0",
                    rebalance_seconds=rebalance)


def test_moves_even_out_queues_and_what_runs_stays():
    with_moves, without = crowded(0.5), crowded(None)
    assert without.moved == 0 and set(without.replica) == {0}
    assert 0 < with_moves.moved and set(with_moves.replica) == {0, 1, 2, 3}
    assert with_moves.latency.max() < 0.7 * without.latency.max()
    assert with_moves.in_flight[0] < 0.8 * without.in_flight[0]
    assert with_moves.cached_share == 0, "a request that had begun would have been computed twice"


def test_nobody_moves_to_where_it_waits_longer():
    trace = [TraceRequest(0.0, 30_000, 1), *(TraceRequest(index / 100, 10, 20) for index in range(1, 20))]
    policy = lambda views, blocks, rng: str(int(views[0].requests == views[1].requests == 0))  # noqa: E731
    result = simulate(trace, [ServiceTimes(max_batch=1)] * 2, policy, report_seconds=100, rebalance_seconds=0.1)
    assert result.moved == 0 and result.latency[0] > result.latency.max() - 1


def test_only_from_the_queue(monkeypatch):
    begun = set()

    def begin_step(replica, now, real=SimulatedReplica.begin_step):
        before = {job.index for job in replica.queue}
        end = real(replica, now)
        begun.update(before - {job.index for job in replica.queue})
        return end

    def take_last(replica, now, real=SimulatedReplica.take_last):
        before = replica.uncached
        job = real(replica, now)
        assert job.index not in begun and replica.uncached == before - 500
        return job

    monkeypatch.setattr(SimulatedReplica, "begin_step", begin_step)
    monkeypatch.setattr(SimulatedReplica, "take_last", take_last)
    assert crowded(0.05).moved and len(begun) == 100


# --- what it is for


def test_on_a_skewed_trace_ours_is_more_even_than_blind_policies_and_faster_than_all():
    even, slowest = {}, {}
    for name, policy in (("ours", choose), ("random", random_choice), ("round robin", RoundRobin),
                         ("two choices", two_choices), ("fewest requests", least_loaded)):
        results = [simulate(skewed_trace(1440, 24, seed), [ServiceTimes()] * 8,
                            policy() if policy is RoundRobin else policy,
                            rebalance_seconds=1.0 if policy is choose else None) for seed in range(3)]
        even[name] = np.mean([imbalance(result.in_flight) for result in results])
        slowest[name] = np.mean([np.percentile(result.latency, 99) for result in results])
    assert min(slowest, key=slowest.get) == "ours"
    assert even["ours"] < 1.15 and min(even["round robin"], even["random"]) > 1.3


def test_a_slow_replica_gets_less():
    slow = ServiceTimes(base=0.008, per_prefill_token=1 / 2500, per_decode_row=0.0004)
    result = simulate(skewed_trace(1000, 8, 0), [slow, *[ServiceTimes()] * 3], choose)
    counts = np.bincount(result.replica)
    assert counts[0] < 0.75 * counts[1:].mean()


def test_a_skewed_trace_is_skewed():
    trace = skewed_trace(5000, 10, 0)
    arrivals, prompts, outputs = (np.array([getattr(request, name) for request in trace])
                                  for name in ("arrival", "prompt_tokens", "output_tokens"))
    assert (np.diff(arrivals) >= 0).all() and 5000 / arrivals[-1] == pytest.approx(10, rel=0.2)
    per_second = np.bincount(arrivals.astype(int))
    assert per_second.var() > 2 * per_second.mean(), "a Poisson process has a variance like its mean"
    assert prompts.max() <= CONTEXT - MAX_OUTPUT and 1 <= outputs.min() and outputs.max() <= MAX_OUTPUT
    assert np.percentile(prompts, 99) > 8 * np.median(prompts)
    assert all(len(request.blocks) == request.prompt_tokens // 64 for request in trace)
    uses = Counter(key for request in trace for key in request.blocks)
    assert uses.most_common(1)[0][1] > 0.1 * 5000 and max(uses[key] for key in uses if key >= 0) == 1


def test_a_shorter_or_faster_trace_has_the_same_requests():
    long, short, other = skewed_trace(200, 10, 5), skewed_trace(100, 80, 5), skewed_trace(100, 80, 6)
    assert [replace(request, arrival=0) for request in long[:100]] == [replace(request, arrival=0) for request in short]
    assert short == skewed_trace(100, 80, 5) and short != other


@pytest.mark.parametrize("arguments, message", [
    (([], [ROUND]), "must not be empty"),
    (([TraceRequest(1.0, 1, 1)], []), "must not be empty"),
    (([TraceRequest(2.0, 1, 1), TraceRequest(1.0, 1, 1)], [ROUND]), "sort the trace"),
    (([TraceRequest(-1.0, 1, 1), TraceRequest(1.0, 1, 1)], [ROUND]), "begin at second 0"),
    (([TraceRequest(0.0, 1, 1)], [ROUND]), "the last arrival must be after second 0"),
    (([TraceRequest(1.0, 1, 0)], [ROUND]), "must be 1 or more"),
    (([TraceRequest(1.0, 100, 100)], [ROUND, replace(ROUND, kv_tokens=199)]), "kv_tokens must be at least 200"),
])
def test_what_cannot_be_simulated_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        simulate(*arguments, random_choice)


@pytest.mark.parametrize("values, message", [
    ({"base": -1}, "base must be 0 or more"), ({"per_prefill_token": 0}, "per_prefill_token must be more than 0"),
    ({"max_batch": 0}, "max_batch"), ({"per_decode_row": float("nan")}, "per_decode_row")])
def test_times_that_cannot_be_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ServiceTimes(**values)


def test_a_trace_that_cannot_be_is_refused():
    for arguments in ((0, 1.0, 0), (10, 0.0, 0)):
        with pytest.raises(UserError, match="of a trace must be"):
            skewed_trace(*arguments)
