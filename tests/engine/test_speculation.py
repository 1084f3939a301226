"""Speculation changes how fast an answer comes, and nothing else."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine_adapters import CONFIG, LIMITS

from qwen_jax import Engine, SamplingParams, UserError
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.schedule_policy import FULL
from qwen_jax.engine.scheduling.sequence import DRAWN, PlannedRow, Sequence, StepPlan
from qwen_jax.engine.scheduling.speculation import (
    ASSUMED_COST,
    DRAFT_MODEL,
    LOOKUPS,
    NGRAM,
    RETRY_TOKENS,
    NgramIndex,
    Speculation,
)
from qwen_jax.model import build, init, params_of

SPECULATING = replace(LIMITS, draft_tokens=4)
PHRASE = [7, 11, 200, 45, 9, 31, 5, 77]
PROMPTS = [PHRASE * 5, [3, *PHRASE, 90, *PHRASE[:3]], list(range(5, 60)), [1]]
OPTIONS = [
    dict(temperature=0.0), dict(temperature=0.0, logprobs=2), dict(temperature=0.3, top_p=0.9), dict(temperature=0.8),
    dict(temperature=0.0, repetition_penalty=1.2), dict(temperature=0.7, presence_penalty=1.0, top_k=20),
    dict(temperature=0.0, min_tokens=11, stop_token_ids=(int(PHRASE[2]),)),
]


@pytest.fixture(scope="module")
def model():
    """Peaked enough that its text repeats itself, and that a slightly different model often agrees."""
    params = {path: value * (4 if path.startswith("embed") else 1)
              for path, value in params_of(init(CONFIG, 3, "float32")).items()}
    return build(CONFIG, params)


@pytest.fixture(scope="module")
def plain(model):
    return Engine(model, limits=LIMITS, progress=False)


@pytest.fixture(scope="module")
def drafts(model):
    """The model itself, one that is nearly the same, and one that knows nothing of it and has another shape."""
    rng = np.random.default_rng(0)
    near = {path: value + 0.005 * rng.normal(size=value.shape).astype(np.float32)
            for path, value in params_of(model).items()}
    other = replace(CONFIG, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=384)
    return {"itself": model, "near": build(CONFIG, near), "stranger": init(other, 8, "float32")}


@pytest.fixture
def always(monkeypatch):
    """Never off: even the worst guesses are checked."""
    monkeypatch.setattr(Speculation, "_cost", lambda self: 0.0)


def check(engine, plain):
    params = [SamplingParams(max_tokens=40, seed=i, **options) for i, options in enumerate(OPTIONS)]
    for some in (PROMPTS, PROMPTS[:1]):
        for one in params:
            for ours, theirs in zip(engine.generate(some, one), plain.generate(some, one), strict=True):
                assert ours.token_ids == theirs.token_ids and ours.finish_reason == theirs.finish_reason
                for a, b in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
                    assert a.keys() == b.keys() and all(abs(a[token] - b[token]) < 1e-4 for token in a)
    mixed = [PROMPTS[i % 4] for i in range(len(params))]
    assert [o.token_ids for o in engine.generate(mixed, params)] == [o.token_ids for o in plain.generate(mixed, params)]
    stats = engine.stats()
    assert stats.compiles_after_warmup == 0 and stats.pages_used == 0
    return stats.accepted_tokens / max(stats.drafted_tokens, 1), stats.drafted_tokens


def test_lookup_gives_the_same_answers_in_fewer_steps(model, plain, always):
    engine = Engine(model, limits=SPECULATING, speculation=NGRAM, progress=False)
    acceptance, drafted = check(engine, plain)
    assert acceptance > 0.3 and drafted > 100
    before = engine.stats().buckets
    out, = engine.generate(PROMPTS[0], SamplingParams(max_tokens=100, temperature=0.0))
    steps = sum(b.steps for b in engine.stats().buckets) - sum(b.steps for b in before)
    assert len(out.token_ids) == 100 and steps < 80


@pytest.mark.parametrize("name, least, most", [("itself", 0.95, 1.0), ("near", 0.3, 0.99), ("stranger", 0.0, 0.3)])
def test_a_draft_model_gives_the_same_answers(model, plain, drafts, always, name, least, most):
    engine = Engine(model, limits=SPECULATING, speculation=drafts[name], progress=False)
    acceptance, drafted = check(engine, plain)
    assert least <= acceptance <= most and drafted > 100, (acceptance, drafted)


def test_draws_follow_the_same_distribution_and_guesses_agree_often(model, drafts, always):
    """Both draw with the same random number: where distributions are alike, so are most draws."""
    engine = Engine(model, limits=SPECULATING, speculation=drafts["near"], progress=False)
    engine.generate(PROMPTS, SamplingParams(max_tokens=100, temperature=1.0, seed=1))
    stats = engine.stats()
    assert stats.accepted_tokens > 0.2 * stats.drafted_tokens


@pytest.mark.parametrize("options, message", [
    (dict(speculation="guesswork"), "unknown speculation 'guesswork'"),
    (dict(speculation=NGRAM, limits=LIMITS), "do not go together"),
    (dict(draft_tokens=3), "do not go together"),
    (dict(speculation=NGRAM, draft_tokens=0), "do not go together"),
    (dict(speculation=NGRAM, batch_invariant=True), "neither limits nor speculation"),
    (dict(speculation=init(replace(CONFIG, vocab_size=64), 0, "float32")), "64 token ids and the model uses 320"),
])
def test_what_does_not_fit_is_refused(model, options, message):
    with pytest.raises(UserError, match=message):
        Engine(model, warmup=False, progress=False, **options)


# --- who guesses, and when


@given(tokens=st.lists(st.integers(0, 3), max_size=60), cut=st.integers(0, 60), most=st.integers(1, 6))
def test_the_index_finds_what_a_search_finds(tokens, cut, most):
    index = NgramIndex()
    index.extend(tokens[:cut])
    index.extend(tokens[cut:])
    expected = []
    for size in LOOKUPS:
        places = [end for end in range(size, len(tokens)) if tokens[end - size:end] == tokens[len(tokens) - size:]]
        if len(tokens) >= size and places:
            text = list(tokens)
            for step in range(most):
                text.append(text[places[-1] + step])
            expected = text[len(tokens):]
            break
    assert index.guess(most) == expected


def step(seq, emitted, tokens=5):
    bucket = Bucket("decode", FULL, 4, tokens, 4, steps=8 if tokens == 1 else 1)
    drafts = (DRAWN,) * (tokens - 1)
    return StepPlan(bucket, [PlannedRow(seq, seq.num_computed, max(tokens, emitted), True, drafts)])


def test_a_row_that_does_not_gain_stops_and_tries_again_later():
    speculation, seq = Speculation(DRAFT_MODEL, 4), Sequence(0, [1, 2, 3], 1000)
    speculation.record(step(seq, 1, tokens=1), [1], 1.0)
    speculation.record(StepPlan(Bucket("prefill", FULL, 1, 64, 4), [PlannedRow(seq, 0, 3, True)]), [1], 1.0)
    for _ in range(60):
        if not speculation.propose(seq):
            break
        speculation.record(step(seq, 2), [2], 2.5)  # two tokens in the time of two and a half
    assert speculation.propose(seq) == []
    seq.output += [1] * RETRY_TOKENS
    assert speculation.propose(seq) == [DRAWN] * 4


def test_a_row_that_gains_goes_on():
    speculation, seq = Speculation(DRAFT_MODEL, 4), Sequence(0, [1, 2, 3], 1000)
    for _ in range(60):
        assert speculation.propose(seq) == [DRAWN] * 4
        speculation.record(step(seq, 3), [3], 2.5)
    assert 2 > ASSUMED_COST and (speculation.drafted, speculation.accepted) == (240, 120)


def test_the_draft_model_does_not_guess_for_a_row_it_has_not_followed():
    speculation, seq = Speculation(DRAFT_MODEL, 4), Sequence(0, [1, 2, 3], 1000)
    speculation.record(step(seq, 3, tokens=1), [3], 1.0)
    assert speculation.propose(seq) == []
    speculation.record(StepPlan(Bucket("prefill", FULL, 1, 64, 4), [PlannedRow(seq, 0, 3, True)]), [1], 1.0)
    assert speculation.propose(seq) == [DRAWN] * 4


@pytest.mark.parametrize("change", [dict(burst=1), dict(params=SimpleNamespace(uses_counts=True))])
def test_who_never_guesses(change):
    seq = Sequence(0, PHRASE * 4, 1000, **change)
    assert Speculation(NGRAM, 4).propose(seq) == []


def test_a_text_that_begins_again_is_read_again():
    speculation, seq = Speculation(NGRAM, 4), Sequence(0, PHRASE * 2, 1000)
    seq.output += [*PHRASE[:4], 1, 2, 3, 4, *PHRASE[:4]]
    assert speculation.propose(seq) == [1, 2, 3, 4]
    seq.output.clear()
    assert speculation.propose(seq) == PHRASE[:4]
