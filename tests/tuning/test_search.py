"""Search and race without an engine: the costs are made up, so the best choice is known."""

import math
import time
from dataclasses import dataclass, replace

import pytest

from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.scheduling.buckets import bucket_table, default_grid, default_limits
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY, FULL, SPARSE
from qwen_jax.tuning.engine_bench import cost_key
from qwen_jax.tuning.scheduler_simulation import simulate
from qwen_jax.tuning.search import Space, best_tile, score, search, simplified, sparse_threshold
from qwen_jax.tuning.step_costs import Cost
from qwen_jax.tuning.successive_halving import MAX_ROUNDS, race
from qwen_jax.tuning.workloads import LOADS, Trace, trace, traces

pytest.importorskip("optuna")
DEFAULT = Tuned(DEFAULT_POLICY, default_grid("cpu"))


@dataclass
class PaperBench:
    """An `EngineBench` without an engine."""

    max_batch_size: int = 16
    max_seq_len: int = 512
    num_pages: int = 400

    def limits(self, tuned):
        return default_limits(self.max_batch_size, self.max_seq_len, "cpu", tuned.policy, grid=tuned.grid)

    def table(self, tuned):
        return bucket_table(self.limits(tuned), tuned.policy)


def space(bench, cost, rows=(2, 4, 8, 12, 16), default=DEFAULT, which=("chat", "mixed")):
    """Return a search space with every default bucket and these decode rows, at the costs ``cost(bucket)``."""
    table = [cost_key(b) for b in bench.table(default)]
    model = next(b for b in table if (b.phase, b.schedule) == ("decode", FULL))
    table += [replace(model, rows=n, micro_rows=n) for n in rows]
    found = Space(bench, default, [trace(name, 0, bench.max_seq_len) for name in which])
    found.costs = {b: cost(b) for b in table}
    return found


def linear(bucket):
    ms = bucket.rows * bucket.tokens / 1e5 + 1e-3
    return Cost(ms, ms - 1e-3, 0, 64)


def test_a_cost_goes_through_its_three_points():
    cost = Cost.through(short=64, long=1064, base=0.010, further=0.016, far=0.015, steps=4)
    assert cost.seconds(1, 64) == pytest.approx(0.010) and cost.seconds(4, 0) == pytest.approx(0.016)
    assert cost.seconds(1, 1064) == pytest.approx(0.015) and cost.seconds(1, 564, 0.5) == pytest.approx(0.00625)
    assert Cost.through(short=64, long=64, base=1, further=0.5, far=0.5, steps=4) == Cost(1, 0, 0, 64), "noise"


def test_traces_are_the_seeds_alone_and_fit():
    assert traces(3, 512) == traces(3, 512) != traces(4, 512)
    for one in traces(0, 512):
        assert len(one.prompts) == LOADS[one.name].requests
        assert all(p >= 1 and a >= 1 and p + a <= 512 for p, a in zip(one.prompts, one.answers))
    assert len(trace("mixed", 0, 512, 0.25).prompts) == 8
    prompts, params = trace("chat", 0, 512).requests(900, 1)
    assert [len(p) for p in prompts] == list(trace("chat", 0, 512).prompts)
    assert [p.max_tokens for p in params] == list(trace("chat", 0, 512).answers)
    assert trace("chat", 0, 512).requests(900, 2)[0] != prompts


def test_a_simulated_trace_takes_what_its_steps_cost():
    bench = PaperBench()
    limits, table = bench.limits(DEFAULT), bench.table(DEFAULT)
    costs = {b: Cost(1.0 if b.phase == "prefill" else 0.01, 0.01, 0, 0) for b in table}
    # A prefill of one chunk samples the first token; then nine more, in dispatches of 5 (they fit 50 ms): 1, 5, 3.
    work = Trace("one", (60,), (10,))
    for host, expected in ((0.0, 1 + 9 * 0.01), (1.0, 1.09 + 4)):
        assert simulate(work, table, limits, DEFAULT.policy, num_pages=400, costs=costs,
                        step_seconds=host) == pytest.approx(expected)


def test_the_search_avoids_a_bucket_that_is_dear():
    where = space(PaperBench(), lambda b: Cost(10 * linear(b).base, 10 * linear(b).token, 0, 64)
                  if b.phase == "decode" and b.rows == 16 else linear(b))
    best = search(where, DEFAULT, 60, time.monotonic() + 60)[0]
    assert best.grid.decode_rows[-1] < 16 and where.score(best) < 0.8
    assert best.policy == DEFAULT_POLICY


def test_where_nothing_gains_everything_stays():
    where = space(PaperBench(), lambda b: Cost(0.01, 0.01, 0, 64), rows=())
    where.traces = [Trace("one", (60,), (10,))]
    assert search(where, DEFAULT, 20, time.monotonic() + 60)[0] == DEFAULT


def test_no_time_leaves_the_start():
    assert search(space(PaperBench(), linear), DEFAULT, 50, -math.inf) == [DEFAULT]


def test_what_gains_nothing_is_taken_back():
    where = space(PaperBench(), linear)
    idle = Tuned(DEFAULT_POLICY, replace(DEFAULT.grid, decode_rows=(2, 8, 16), step_overhead_tokens=64, decode_steps=8,
                                         sparse_decode_rows=(2,)))
    assert simplified(where, idle).grid.sparse_decode_rows == DEFAULT.grid.sparse_decode_rows


def test_a_trace_that_loses_is_not_made_up_for_by_others():
    assert score([0.5, 1.2]) > score([0.9, 0.9]) and score([0.5, 1.0]) < score([0.9, 0.9])


def test_the_tile_that_is_fastest_on_these_traces():
    where = space(PaperBench(), linear)
    some = [b for b in where.costs if b.phase == "decode"][:2]
    measured = {pages: {b: Cost(factor * where.costs[b].base, factor * where.costs[b].token, 0, 64) for b in some}
                for pages, factor in ((0, 1), (2, 0.5), (4, 0.8), (16, 3))}
    assert best_tile(where, "decode", measured) == 2
    assert best_tile(where, "decode", {0: measured[0], 16: measured[16]}) == 0


@pytest.mark.parametrize("slope, expected", [(1e-7, 9984), (1e-5, 8192), (9e-7, 8704)])
def test_sparse_begins_where_it_really_is_faster(slope, expected):
    """Full attention costs more with every token of context, sparse attention does not."""
    bench = PaperBench(max_batch_size=2, max_seq_len=10144, num_pages=500)

    def cost(bucket):
        if bucket.schedule == SPARSE:
            return Cost(0.012, 0.012, 0, 2048)
        return Cost(0.005, 0.005, slope, 64)

    where = space(bench, cost, rows=())
    found, seconds = sparse_threshold(where, DEFAULT)
    assert found == expected and found >= DEFAULT_POLICY.sparse_above_tokens
    assert all(full <= sparse for length, (full, sparse) in seconds.items() if length <= found)


def test_short_engines_have_no_sparse_threshold_to_find():
    assert sparse_threshold(space(PaperBench(), linear), DEFAULT) == (DEFAULT_POLICY.sparse_above_tokens, {})


# --- the race


def run_of(costs, log=None):
    def run(choice, trace, number):
        if log is not None:
            log.append((choice, trace))
        return costs[choice][trace]
    return run


def test_the_fastest_that_never_loses_wins():
    costs = {"default": (1, 1), "fast but": (0.3, 1.1), "good": (0.7, 0.9), "fair": (0.8, 0.95), "bad": (2, 2)}
    log = []
    winner, timings = race("default", ["bad", "fast but", "fair", "good"], (0, 1), run_of(costs, log), math.inf)
    assert winner == "good" and timings["good"].rounds == MAX_ROUNDS
    assert timings["good"].ratio(0) == pytest.approx(1 / 0.7) and timings["bad"].rounds == 1
    assert log[0][0] == log[5][0] == "default" != log[10][0], "the order alternates"


def test_when_the_best_loses_somewhere_the_next_is_asked():
    costs = {"default": (1, 1), "a": (0.2, 1.02), "b": (0.9, 0.99)}
    assert race("default", ["a", "b"], (0, 1), run_of(costs), math.inf)[0] == "b"
    costs["b"] = (0.9, 1.03)
    assert race("default", ["a", "b"], (0, 1), run_of(costs), math.inf)[0] is None


def test_noise_that_hides_a_loss_is_no_gain():
    noisy = [1.0, 1.0, 1.0, 0.8, 0.8, 0.8, 1.0, 1.0, 1.0]

    def run(choice, trace, number):
        return 1.0 if choice == "default" else 0.8 if trace == 0 else 1 / noisy[number]

    assert race("default", ["a"], (0, 1), run, math.inf)[0] is None
    noisy = [1.0] * 9
    assert race("default", ["a"], (0, 1), run, math.inf)[0] == "a"
    assert race("default", ["a"], (1,), run, math.inf)[0] is None, "nothing gained"


def test_no_time_no_winner():
    costs = {"default": (1,), "a": (0.5,)}
    assert race("default", ["a"], (0,), run_of(costs), -1, clock=lambda: 0.0)[0] is None
    ticks = iter(range(100))
    assert race("default", ["a"], (0,), run_of(costs), 4, clock=lambda: next(ticks))[0] == "a", "five rounds are enough"
