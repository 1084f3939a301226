"""Tests of canaries: which users get them, and what takes them back and how soon."""
import math
import statistics
from random import Random

import pytest

from qwen_jax.cluster.canary.policy import PROMOTED, RUNNING, TAKEN_BACK, Canary, CanaryOptions, Limit, SequentialTest
from qwen_jax.cluster.simulation.canary import Version, simulate
from qwen_jax.errors import UserError


def test_who_gets_it_stays_and_grows_with_the_share():
    keys = [f"user {number}" for number in range(20_000)]
    shares = (0.1, 0.25, 1.0)
    got = []
    for step, share in enumerate(shares):
        canary = Canary("v2", CanaryOptions(weights=shares), step=step)
        got.append({key for key in keys if canary.gets(key)})
        assert abs(len(got[-1]) / len(keys) - share) < 4 * math.sqrt(share * (1 - share) / len(keys)) + 1e-9
    assert got[0] < got[1] < got[2] == set(keys)
    other = {key for key in keys if Canary("v3").gets(key)}
    assert abs(len(other & got[0]) / len(keys) - 0.01) < 0.004  # another version asks others
    assert not any(Canary("v2", state=TAKEN_BACK).gets(key) for key in keys)
    assert all(Canary("v2", state=PROMOTED).gets(key) for key in keys)


def test_the_test_is_walds():
    """The test errs as rarely as it promises, and is as long as theory says (A. Wald, 1945, without overshoot)."""
    limit, false_alarm, missed = Limit(0.05, 0.15), 0.05, 0.1

    def run(probability, seed):
        test, rng = SequentialTest(limit, false_alarm, missed), Random(seed)
        while test.verdict is None:
            test.add(rng.random() < probability)
        return test

    fine, bad = ([run(probability, seed) for seed in range(2000)] for probability in (limit.fine, limit.bad))
    assert sum(test.verdict == "bad" for test in fine) / 2000 <= false_alarm * 1.1
    assert sum(test.verdict == "fine" for test in bad) / 2000 <= missed * 1.1
    yes, no = math.log(limit.bad / limit.fine), math.log((1 - limit.bad) / (1 - limit.fine))
    step = limit.bad * yes + (1 - limit.bad) * no
    length = (1 - missed) * math.log((1 - missed) / false_alarm) + missed * math.log(missed / (1 - false_alarm))
    length /= step
    assert length < statistics.mean(test.seen for test in bad) < 1.3 * length


def test_bad_versions_are_taken_back_within_300_of_their_requests():
    for version, why in ((Version(disagreed=0.1), "otherwise"), (Version(failed=0.1), "failed"),
                         (Version(slower=3.0), "longer")):
        trials = [simulate(version, seed) for seed in range(30)]
        assert all(trial.state == TAKEN_BACK and why in trial.why for trial in trials), version
        assert max(trial.total for trial in trials) <= 300, version


def test_the_same_version_is_promoted_step_by_step():
    trials = [simulate(Version(), seed) for seed in range(40)]
    assert [trial.state for trial in trials].count(TAKEN_BACK) == 0
    assert all(trial.state == PROMOTED and trial.total >= 4 * 300 for trial in trials)


def test_a_version_that_turns_bad_later_is_taken_back_as_soon():
    canary, rng = Canary("v2", CanaryOptions(weights=(1.0,), requests=10**6)), Random(0)
    for _ in range(3000):
        canary.new_answered(0.1, False, rng.random() < 0.005)
    assert canary.state == RUNNING
    for _ in range(150):
        canary.new_answered(0.1, False, rng.random() < 0.2)
    assert canary.state == TAKEN_BACK
    before = canary.total
    canary.new_answered(0.1, True)  # it is over
    assert canary.total == before


def test_nothing_is_slow_before_there_is_something_to_compare_with():
    canary = Canary("v2", CanaryOptions(weights=(1.0,), requests=50))
    for _ in range(50):
        canary.new_answered(100.0, False)
    assert canary.tests["slow"].seen == 0 and canary.state in (RUNNING, PROMOTED)


@pytest.mark.parametrize("options", [{"weights": ()}, {"weights": (0.5, 0.2)}, {"weights": (0.0, 1.0)},
                                     {"weights": (0.5, 1.5)}, {"requests": 0}, {"shadowed": 2}, {"false_alarm": 0}])
def test_options_that_cannot_be(options):
    with pytest.raises(UserError):
        CanaryOptions(**options)
    with pytest.raises(UserError):
        Limit(0.2, 0.1)
