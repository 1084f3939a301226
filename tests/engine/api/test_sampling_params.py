"""SamplingParams: accepted values, refusals and their sentences, values of unset options."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from qwen_jax.engine.api.sampling_params import NEUTRAL, SamplingParams
from qwen_jax.errors import UserError

BAD = [
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 1e39),  # infinite in float32
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("top_k", -2),
    ("top_k", 1.5),
    ("min_p", -0.1),
    ("min_p", 1.01),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("max_tokens", 0),
    ("max_tokens", 2.0),
    ("min_tokens", -1),
    ("logprobs", 21),
    ("logprobs", -1),
    ("prompt_logprobs", 21),
    ("n", 0),
    ("n", None),
    ("seed", 2**64),
    ("seed", 0.5),
    ("ignore_eos", 1),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", ["x"] * 17),
    ("stop", "x" * 1025),
    ("stop_token_ids", 3),
    ("stop_token_ids", "3"),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", list(range(17))),
    ("logit_bias", [1, 2]),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"x": 1.0}),
    ("logit_bias", {1: 101}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", dict.fromkeys(range(301), 1.0)),
]


@pytest.mark.parametrize("name, value", BAD)
def test_bad_value_is_refused_in_one_line_naming_the_field(name, value):
    with pytest.raises(UserError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)


def test_contradictions_are_refused():
    with pytest.raises(UserError, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(UserError, match="min_tokens"):  # only known once max_tokens has its default
        SamplingParams(min_tokens=257).resolved()


@pytest.mark.parametrize("top_p", [0, 1e-50])
def test_no_share_at_all_is_the_most_likely_token(top_p):
    (_, share, *_), (count, *_) = SamplingParams(top_p=top_p, top_k=40).resolved().scalars
    assert (share, count) == (1, 1)


def test_limits_of_the_ranges_are_accepted():
    SamplingParams(
        temperature=0, top_p=1, top_k=-1, min_p=1, presence_penalty=-2, frequency_penalty=2, max_tokens=1, min_tokens=1,
        logprobs=0, prompt_logprobs=20, seed=-(2**63), logit_bias=dict.fromkeys(range(300), -100),
        stop=["x" * 1024] * 16, stop_token_ids=range(16),
    )  # fmt: skip


def test_values_are_normalised():
    params = SamplingParams(
        stop="end", stop_token_ids=np.array([3, 3, 4]), logit_bias={"7": 2, np.int64(8): 1}, top_k=np.int32(5)
    )
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {7: 2.0, 8: 1.0}
    assert type(params.top_k) is int
    assert params == SamplingParams(stop=["end"], stop_token_ids=[3, 4], logit_bias={8: 1, 7: 2}, top_k=5)


def test_unset_takes_the_checkpoint_then_neutral_and_explicit_wins():
    instruct = SimpleNamespace(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, do_sample=True)
    filled = SamplingParams().resolved(instruct)
    assert (filled.temperature, filled.top_p, filled.top_k, filled.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert filled.max_tokens == 256 and filled.min_p == 0 and filled.n == 1
    assert filled.seed is None and filled.logprobs is None and filled.prompt_logprobs is None

    explicit = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0).resolved(instruct)
    assert (explicit.temperature, explicit.top_p, explicit.top_k, explicit.repetition_penalty) == (0, 1, 0, 1)

    partly = SamplingParams().resolved(SimpleNamespace(temperature=None, top_k=7))
    assert (partly.temperature, partly.top_k, partly.top_p) == (1.0, 7, 1.0)

    plain = SamplingParams().resolved()
    assert {name: getattr(plain, name) for name in NEUTRAL} == NEUTRAL
    assert plain.resolved(instruct) == plain


def test_do_sample_false_is_greedy_unless_a_temperature_was_asked_for():
    greedy = SimpleNamespace(do_sample=False, temperature=0.7)
    assert SamplingParams().resolved(greedy).temperature == 0
    assert SamplingParams(temperature=0.5).resolved(greedy).temperature == 0.5


def test_a_bad_generation_config_is_refused_too():
    with pytest.raises(UserError, match="top_p"):
        SamplingParams().resolved(SimpleNamespace(top_p=3.0))


def test_token_ids_are_checked_against_the_vocabulary():
    params = SamplingParams(logit_bias={99: 1.0}, stop_token_ids=[50])
    assert params.check(100) is params
    with pytest.raises(UserError, match="logit_bias: token id 99"):
        params.check(99)
    with pytest.raises(UserError, match="stop_token_ids: token id 50"):
        SamplingParams(stop_token_ids=[50]).check(50)


def test_uses_counts():
    assert not SamplingParams().resolved().uses_counts
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 1.5}).resolved().uses_counts


def test_64_bit_seeds_fold_to_32_bits_and_stay_apart():
    seeds = [0, 1, -1, -2, 2**32, 2**33, -(2**63), 2**64 - 3]
    packed = [SamplingParams(seed=seed).resolved().scalars[1][1] for seed in seeds]
    assert all(0 <= seed < 2**32 for seed in packed)
    assert len(set(packed)) == len(seeds)
