"""The sampler against a float64 reference that really sorts, and against transformers' logits processors.

The random number of a row is a function of (seed, step), so the reference predicts the very token: first id whose
cumulative probability exceeds the row's number. Cases that float32 cannot decide are left out of the comparison.
"""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.compiled import sampler, topk_topp
from qwen_jax.engine.compiled.sampler import IN_PROMPT, MAX_BIAS
from qwen_jax.engine.runner.padded_batch import pack_rows
from qwen_jax.errors import UserError

sample = jax.jit(sampler.sample)
uniforms = jax.jit(topk_topp.uniforms)

ROWS, VOCAB = 32, 300  # more ids than the 64 candidates and than one block; not a multiple of the block
CLOSE = 2e-5  # cumulative probabilities closer than this are the same to float32


def run(logits, requests, counts=None, limit=None):
    """Sample a token per row. requests: (params, step, banned) per row, resolved here; row r uses slot r."""
    rows = pack_rows([(params.resolved(), step, banned) for params, step, banned in requests], len(logits))
    counts = np.zeros(logits.shape, np.int32) if counts is None else counts
    slots = np.arange(len(logits), dtype=np.int32)
    limit = np.int32(logits.shape[1] if limit is None else limit)
    return jax.tree.map(np.asarray, sample(np.float32(logits), rows, counts, slots, limit))


def reference_scores(logits, params, count, banned=()):
    """Return float64 logits [V] after penalties and bias. count: i32[V] as the engine keeps it."""
    scores = np.float64(logits).copy()
    generated = count & (IN_PROMPT - 1)
    scores = np.where(count != 0, np.where(scores > 0, scores / params.repetition_penalty,
                                           scores * params.repetition_penalty), scores)  # fmt: skip
    scores -= params.frequency_penalty * generated + params.presence_penalty * (generated > 0)
    for token, value in params.logit_bias.items():
        scores[token] += value
    scores[list(banned)] = -np.inf
    return scores


def reference_probabilities(scores, params, close=CLOSE):
    """Return float64 [V] after temperature, top-k, top-p, min-p, by sorting; None when a cut is too close to call."""
    weights = np.exp((scores - scores.max()) / params.temperature)
    probabilities = weights / weights.sum()
    if 0 < params.top_k < len(scores):
        kth = np.sort(scores)[-params.top_k]
        probabilities = np.where(scores >= kth, probabilities, 0)
        probabilities /= probabilities.sum()
    if params.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        cumulative = np.cumsum(probabilities[order])
        if np.abs(cumulative - params.top_p).min() < close:
            return None
        last = probabilities[order[np.searchsorted(cumulative, params.top_p)]]
        probabilities = np.where(probabilities >= last, probabilities, 0)
    relative = probabilities / probabilities.max()
    if params.min_p > 0:
        if np.abs(relative / params.min_p - 1).min() < close and params.min_p < 1:
            return None
        probabilities = np.where(relative >= params.min_p, probabilities, 0)
    return probabilities / probabilities.sum()


def assert_draws(tokens, numbers, probabilities):
    """Check that tokens[r] is where numbers[r] falls in the cumulative probabilities, and not of probability 0."""
    cumulative = np.cumsum(probabilities)
    expected = np.minimum(np.searchsorted(cumulative, numbers, side="right"), len(probabilities) - 1)
    clear = np.abs(cumulative[None, :] - numbers[:, None]).min(axis=1) > CLOSE
    np.testing.assert_array_equal(tokens[clear], expected[clear])
    assert (probabilities[tokens] > 0).all()
    return clear.mean()


def option(neutral, values):
    return st.one_of(st.just(neutral), values)


@st.composite
def cases(draw_value):
    seed = draw_value(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    spread = draw_value(st.sampled_from([0.3, 1.0, 3.0, 10.0]))
    logits = rng.normal(0, spread, VOCAB).astype(np.float32)
    if draw_value(st.booleans()):
        logits = np.round(logits * 2) / 2  # many exact ties
    count = rng.integers(0, 4, VOCAB) * (rng.random(VOCAB) < 0.3) + IN_PROMPT * (rng.random(VOCAB) < 0.3)
    params = SamplingParams(
        temperature=draw_value(st.sampled_from([0.1, 0.7, 1.0, 1.3, 5.0])),
        top_k=draw_value(option(0, st.sampled_from([1, 2, 20, 63, 64, 65, 120, 299, 300, 1000]))),
        top_p=draw_value(option(1.0, st.floats(0.01, 0.999))),
        min_p=draw_value(option(0.0, st.floats(0.001, 1.0))),
        repetition_penalty=draw_value(option(1.0, st.sampled_from([0.5, 1.05, 1.5]))),
        presence_penalty=draw_value(option(0.0, st.sampled_from([-1.0, 0.5]))),
        frequency_penalty=draw_value(option(0.0, st.sampled_from([-0.25, 0.5]))),
        logit_bias=draw_value(option({}, st.just({0: 5.0, 7: -100.0, VOCAB - 1: 3.0}))),
        seed=seed,
    ).resolved()
    return logits, count.astype(np.int32), params


@settings(max_examples=150, deadline=None)
@given(cases())
def test_tokens_are_those_of_the_sorting_reference(case):
    logits, count, params = case
    probabilities = reference_probabilities(reference_scores(logits, params, count), params)
    if probabilities is None:
        return
    tokens = run(np.tile(logits, (ROWS, 1)), [(params, step, ()) for step in range(ROWS)],
                 np.tile(count, (ROWS, 1))).tokens  # fmt: skip
    seed = np.full(ROWS, pack_rows([(params, 0, ())], 1).seed[0])
    assert_draws(tokens, np.float64(uniforms(seed, np.arange(ROWS, dtype=np.int32))), probabilities)


@pytest.mark.parametrize("name, values", [("top_k", range(1, 512)), ("top_p", np.linspace(0.002, 0.999, 511))])
def test_exactly_the_right_ids_are_kept_for_every_k_and_p(name, values):
    logits = np.random.default_rng(7).normal(0, 1, 600).astype(np.float32)
    params = [SamplingParams(**{name: value}).resolved() for value in values]
    rows = pack_rows([(p, 0, ()) for p in params], len(params))
    weights = np.tile(np.exp(logits - logits.max()), (len(params), 1))
    kept = np.asarray(jax.jit(topk_topp._truncated)(weights, rows, np.ones(len(params), bool))) > 0
    compared = 0
    for row, p in zip(kept, params, strict=True):
        expected = reference_probabilities(np.float64(logits), p, close=1e-6)
        if expected is not None:
            np.testing.assert_array_equal(row, expected > 0)
            compared += 1
    assert compared > 0.9 * len(params)


@pytest.mark.parametrize("options", [dict(top_k=66), dict(top_p=0.66), dict(top_k=70, top_p=0.999)])
def test_ties_with_the_last_candidate_are_kept_and_the_next_smaller_float_is_not(options):
    below = np.nextafter(np.float32(0.5), np.float32(0))
    weights = np.float32([1.0] + [0.5] * 70 + [below] * 30 + [0.001] * 60)  # the 64 candidates end within the ties
    weights = np.random.default_rng(1).permutation(weights)[None]
    rows = pack_rows([(SamplingParams(**options).resolved(), 0, ())], 1)
    kept = jax.jit(topk_topp._truncated)(weights, rows, np.array([True])) > 0
    np.testing.assert_array_equal(kept, weights >= 0.5)


def test_the_most_likely_id_survives_an_exponential_that_rounds_below_one():
    rows = pack_rows([(SamplingParams(min_p=1.0).resolved(), 0, ())], 1)
    weights = np.float32([[0.2, np.nextafter(np.float32(1), np.float32(0)), 0.9]])
    kept = jax.jit(topk_topp._truncated)(weights, rows, np.array([True])) > 0
    np.testing.assert_array_equal(kept, [[False, True, False]])


@pytest.mark.parametrize("options", [dict(top_k=1000), dict(top_p=0.95), dict(top_k=3000, top_p=0.9), dict(min_p=0.02)])
def test_wide_distributions_where_the_threshold_is_not_among_the_candidates(options):
    vocab = 20_000
    logits = np.random.default_rng(3).normal(0, 1.5, vocab).astype(np.float32)
    params = SamplingParams(seed=5, **options).resolved()
    probabilities = reference_probabilities(np.float64(logits), params, close=0)
    kept = (probabilities > 0).sum()
    assert 64 < kept < 0.8 * vocab
    weights = np.exp(np.tile(logits, (2, 1)) - logits.max())
    rows = pack_rows([(params, 0, ())] * 2, 2)
    out = np.asarray(jax.jit(topk_topp._truncated)(weights, rows, jnp.array([True, False])))
    assert abs(int((out[0] > 0).sum()) - kept) <= (1 if "top_p" in options else 0)  # top-p: float32 sums of 20,000
    np.testing.assert_array_equal(out[1], weights[1])  # a row that is not active is left alone


@pytest.mark.parametrize(
    "options",
    [dict(top_k=7), dict(top_p=0.8), dict(min_p=0.05), dict(top_k=100, top_p=0.9), dict(repetition_penalty=1.3),
     dict(temperature=0.6, top_k=20, top_p=0.8, min_p=0.01, repetition_penalty=1.05)],
)  # fmt: skip
def test_transformers_processors_give_the_same_distribution(options):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    rng = np.random.default_rng(11)
    logits = rng.normal(0, 2, VOCAB).astype(np.float32)
    prompt, output = [3, 5, 5, 200], [8, 8, 3]
    params = SamplingParams(seed=1, **options).resolved()
    scores, ids = torch.tensor(logits, dtype=torch.float64)[None], torch.tensor([prompt + output])
    chain = [hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
             hf.TemperatureLogitsWarper(params.temperature)]  # fmt: skip
    chain += [hf.TopKLogitsWarper(params.top_k)] if params.top_k else []
    chain += [hf.TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    chain += [hf.MinPLogitsWarper(params.min_p)] if params.min_p else []
    for process in chain:
        scores = process(ids, scores)
    probabilities = torch.softmax(scores, -1)[0].numpy()

    count = np.zeros(VOCAB, np.int32)
    np.add.at(count, output, 1)
    count[prompt] |= IN_PROMPT
    np.testing.assert_allclose(
        reference_probabilities(reference_scores(logits, params, count), params), probabilities, atol=1e-12
    )
    size = 512
    requests = [(params, step, ()) for step in range(size)]
    tokens = run(np.tile(logits, (size, 1)), requests, np.tile(count, (size, 1))).tokens
    numbers = np.float64(uniforms(np.full(size, 1, np.uint32), np.arange(size, dtype=np.int32)))
    assert assert_draws(tokens, numbers, probabilities) > 0.9


def test_frequencies_of_many_seeds_fit_the_distribution():
    stats = pytest.importorskip("scipy.stats")
    size, vocab = 4000, 40
    logits = np.random.default_rng(0).normal(0, 1, vocab).astype(np.float32)
    params = [SamplingParams(seed=seed, top_p=0.9, temperature=1.2) for seed in range(size)]
    tokens = run(np.tile(logits, (size, 1)), [(p, 17, ()) for p in params]).tokens
    probabilities = reference_probabilities(np.float64(logits), params[0].resolved())
    drawn = np.bincount(tokens, minlength=vocab)
    assert (drawn[probabilities == 0] == 0).all()
    kept = probabilities > 0
    assert stats.chisquare(drawn[kept], probabilities[kept] * size).pvalue > 1e-3


def test_random_numbers_are_uniform_over_steps_and_over_seeds():
    stats = pytest.importorskip("scipy.stats")
    many = np.arange(5000)
    by_seed = uniforms(many.astype(np.uint32), np.zeros(5000, np.int32))
    by_step = uniforms(np.full(5000, 7, np.uint32), many.astype(np.int32))
    for numbers in (by_seed, by_step):
        assert stats.kstest(np.asarray(numbers), "uniform").pvalue > 1e-3
    assert len(np.unique(by_step)) > 4900 and not np.array_equal(by_seed, by_step)


MIXED = [
    dict(temperature=0.0),
    dict(),
    dict(top_k=5),
    dict(top_k=150),
    dict(top_p=0.3),
    dict(top_p=0.99, temperature=3.0),
    dict(min_p=0.2),
    dict(repetition_penalty=1.4),
    dict(presence_penalty=1.0, frequency_penalty=0.3),
    dict(logit_bias={4: 50.0}),
    dict(logprobs=5),
    dict(temperature=0.0, repetition_penalty=0.5, logit_bias={9: 4.0}, logprobs=0),
    dict(top_k=100, top_p=0.95, min_p=0.001, temperature=0.8, frequency_penalty=-0.1),
]


def test_a_row_gets_the_same_result_alone_and_beside_any_neighbour():
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 1.5, (ROWS, VOCAB)).astype(np.float32)
    counts = rng.integers(0, 3, (ROWS, VOCAB)).astype(np.int32)
    requests = [(SamplingParams(seed=100 + r, **MIXED[r % len(MIXED)]), r, ()) for r in range(ROWS)]
    together = run(logits, requests, counts)
    for r in range(len(MIXED)):
        swapped = np.roll(np.arange(ROWS), 3)[[r]][0]  # another place in the batch, neutral neighbours
        alone = [(SamplingParams(temperature=0), 0, ())] * ROWS
        alone[swapped] = requests[r]
        lone_logits, lone_counts = np.zeros_like(logits), np.zeros_like(counts)
        lone_logits[swapped], lone_counts[swapped] = logits[r], counts[r]
        result = run(lone_logits, alone, lone_counts)
        for got, expected in zip(result, together, strict=True):
            np.testing.assert_array_equal(got[swapped], expected[r])
    smaller = run(logits[:8], requests[:8], counts[:8])  # another row bucket
    np.testing.assert_array_equal(smaller.tokens, together.tokens[:8])


def test_a_threshold_does_not_move_while_a_neighbour_needs_more_passes():
    """More passes would decide by chance about ids that float32 sums leave undecided."""
    targets = jnp.arange(1, VOCAB, 10)
    values = jnp.tile(jnp.linspace(0.1, 1, VOCAB), (len(targets), 1))
    values = values.at[-1].set(0.5)  # all tie: its gap stays too wide for as many passes as there can be

    def thresholds(values, targets):
        return topk_topp._bisected(
            lambda t: jnp.sum(values >= t, axis=1), target=targets, total=jnp.full_like(targets, VOCAB),
            high=values.max(axis=1), at_most_one=lambda gap, _: gap <= 40, wanted=jnp.ones_like(targets, bool),
        )  # fmt: skip

    np.testing.assert_array_equal(thresholds(values, targets)[:-1], thresholds(values[:-1], targets[:-1]))


def test_the_same_seed_repeats_and_seed_or_step_changes():
    logits = np.zeros((ROWS, VOCAB))
    same = [(SamplingParams(seed=9), 4, ())] * ROWS
    tokens = run(logits, same).tokens
    assert len(set(tokens)) == 1
    np.testing.assert_array_equal(tokens, run(logits, same).tokens)
    assert len(set(run(logits, [(SamplingParams(seed=9), step, ()) for step in range(ROWS)]).tokens)) > 20
    assert len(set(run(logits, [(SamplingParams(seed=s), 4, ()) for s in range(ROWS)]).tokens)) > 20


def test_ids_at_or_above_the_limit_do_not_exist():
    limit = 260
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1, (ROWS, VOCAB)).astype(np.float32)
    logits[:, limit:] += 100

    def requests(**more):
        return [(SamplingParams(seed=r, logprobs=20, **MIXED[r % 7], **more), r, ()) for r in range(ROWS)]

    out = run(logits, requests(logit_bias={270: 100.0}), limit=limit)
    cut = run(logits[:, :limit], requests())
    np.testing.assert_array_equal(out.tokens, cut.tokens)
    np.testing.assert_array_equal(out.top_ids, cut.top_ids)
    np.testing.assert_allclose(out.top_logprobs, cut.top_logprobs, atol=1e-5)
    assert out.tokens.max() < limit and out.top_ids.max() < limit


def test_greedy_is_the_first_highest_after_penalties_and_bias():
    rng = np.random.default_rng(5)
    logits = np.round(rng.normal(0, 3, (ROWS, VOCAB)))
    counts = rng.integers(0, 3, (ROWS, VOCAB)).astype(np.int32)
    params = SamplingParams(temperature=0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25,
                            logit_bias={1: 2.0}).resolved()  # fmt: skip
    tokens = run(logits, [(params, 0, (2, 3))] * ROWS, counts).tokens
    expected = [reference_scores(x, params, c, (2, 3)).argmax() for x, c in zip(logits, counts, strict=True)]
    np.testing.assert_array_equal(tokens, expected)
    almost = run(logits, [(SamplingParams(temperature=1e-6, seed=r), 0, ()) for r in range(ROWS)]).tokens
    np.testing.assert_array_equal(almost, logits.argmax(1))
    cold = run(logits + rng.random(logits.shape), [(SamplingParams(temperature=1e-4, seed=1), 0, ())] * ROWS).tokens
    assert (np.take_along_axis(logits, cold[:, None], 1)[:, 0] >= logits.max(1) - 1).all()


def test_banned_ids_never_appear_and_fit_beside_a_full_bias():
    bias = {token: 1.0 for token in range(300)}
    banned = tuple(range(100, 120))
    logits = np.zeros((ROWS, VOCAB))
    logits[:, 100:120] = 50
    params = [SamplingParams(logit_bias=bias, seed=r, temperature=r % 2) for r in range(ROWS)]
    tokens = run(logits, [(p, 0, banned) for p in params]).tokens
    assert not set(tokens) & set(banned)
    assert len(bias) + len(banned) == MAX_BIAS
    with pytest.raises(UserError, match="logit_bias"):
        pack_rows([(params[0].resolved(), 0, tuple(range(21)))], 1)


def test_logprobs_are_the_models_own_and_only_where_asked():
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(6).normal(0, 4, (ROWS, VOCAB)).astype(np.float32)
    heavy = dict(temperature=0.5, repetition_penalty=2.0, logit_bias={3: 5.0}, top_k=5)
    requests = [(SamplingParams(seed=r, logprobs=3 if r % 2 else None, **heavy), 0, ()) for r in range(ROWS)]
    out = run(logits, requests, counts=np.ones((ROWS, VOCAB), np.int32))
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    values, ids = expected.topk(20)
    odd = np.arange(ROWS) % 2 == 1
    np.testing.assert_array_equal(out.top_ids[odd], ids.numpy()[odd])
    np.testing.assert_allclose(out.top_logprobs[odd], values.numpy()[odd], atol=1e-5)
    np.testing.assert_allclose(out.logprobs[odd], expected.numpy()[np.arange(ROWS), out.tokens][odd], atol=1e-5)
    assert (out.logprobs[~odd] == 0).all() and (out.top_ids[~odd] == -1).all()
    assert np.isneginf(out.top_logprobs[~odd]).all()


def test_logprobs_of_a_vocabulary_smaller_than_twenty():
    out = run(np.zeros((4, 7)), [(SamplingParams(temperature=0, logprobs=20), 0, ())] * 4)
    assert sorted(out.top_ids[0, :7]) == list(range(7)) and (out.top_ids[:, 7:] == -1).all()
    np.testing.assert_allclose(out.top_logprobs[:, :7], -np.log(7), rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.0, 1e-30, 1e-3, 0.1, 1.0]), min_size=300, max_size=300),
       st.sampled_from([0.0, 1e-7, 0.5, 1 - 2**-24, 1.0]))  # fmt: skip
def test_an_id_without_probability_is_never_returned(weights, u):
    weights = np.float32(weights)
    if not weights.any():
        return
    token = int(jax.jit(topk_topp.inverse_cdf)(weights[None], np.float32([u]))[0])
    assert weights[token] > 0


def test_a_cumulative_sum_that_rounding_raised_at_an_empty_id_does_not_draw_it():
    """Sums made in parallel are not the running sum bit for bit, so they may rise where the weight is 0."""
    weights, cumulative = np.float32([[0.5, 0.0, 0.5]]), np.float32([[0.5, 0.5 + 2**-20, 1.0]])
    assert int(topk_topp._first_above(cumulative, weights, np.float32([0.5]))[0]) == 2


def test_the_last_numbers_below_one_stay_inside_the_support():
    """At u -> 1 rounding may leave no cumulative sum above the target; many ids, and the last ones, have weight 0."""
    rng = np.random.default_rng(8)
    weights = rng.random((64, 4000), np.float32)
    weights[:, 40:] = np.where(rng.random((64, 3960)) < 0.5, 0, weights[:, 40:])
    weights[:, 3001:] = 0
    for u in (1.0, 1 - 2**-24, 1 - 2**-23, 0.0):
        tokens = np.asarray(jax.jit(topk_topp.inverse_cdf)(weights, np.full(64, u, np.float32)))
        assert (weights[np.arange(64), tokens] > 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_some_valid_id_and_spare_the_neighbours(bad):
    logits = np.random.default_rng(9).normal(0, 1, (ROWS, VOCAB)).astype(np.float32)
    requests = [(SamplingParams(seed=r, logprobs=1, **MIXED[r % 10]), r, ()) for r in range(ROWS)]
    good = run(logits, requests, limit=280)
    broken = logits.copy()
    broken[::2] = bad
    broken[1::4, 5] = bad
    out = run(broken, requests, limit=280)
    assert (out.tokens >= 0).all() and (out.tokens < 280).all()
    np.testing.assert_array_equal(out.tokens[3::4], good.tokens[3::4])
    np.testing.assert_array_equal(out.logprobs[3::4], good.logprobs[3::4])


def test_every_option_runs_in_one_executable():
    once = jax.jit(lambda *args: sampler.sample(*args))  # a function of its own: jit shares caches by function
    logits, counts = np.zeros((4, VOCAB), np.float32), np.zeros((4, VOCAB), np.int32)
    slots, limit = np.arange(4, dtype=np.int32), np.int32(VOCAB)
    once(logits, pack_rows((), 4), counts, slots, limit)
    for options in MIXED:
        once(logits, pack_rows([(SamplingParams(seed=1, **options).resolved(), 3, (1,))], 4), counts, slots, limit)
    assert once._cache_size() == 1


def test_the_compiled_program_does_not_sort_the_vocabulary():
    vocab = 151_936

    def step(logits, rows, counts, slots, limit):
        out = sampler.sample(logits, rows, counts, slots, limit)
        return out.tokens, out.top_ids[:, :5], out.top_logprobs[:, 2]  # a slice of top-k once brought the sort back

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pack_rows((), 8))
    args = (
        jax.ShapeDtypeStruct((8, vocab), jnp.float32), shapes, jax.ShapeDtypeStruct((16, vocab), jnp.int32),
        jax.ShapeDtypeStruct((8,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32),
    )  # fmt: skip
    text = jax.jit(step).lower(*args).compile().as_text()
    assert f"f32[8,{vocab}]" in text
    assert not re.findall(r"\bsort\(", text)


def test_counts_follow_a_counter_through_chunks_preemption_and_slot_reuse():
    rng = np.random.default_rng(10)
    slots_n, vocab, rows, width = 5, 50, 3, 8
    count_prompt, count_output = jax.jit(sampler.count_prompt), jax.jit(sampler.count_output)
    counts = jnp.asarray(rng.integers(0, 9, (slots_n, vocab)), jnp.int32)  # left by earlier requests
    untouched = np.asarray(counts)[[0, 3]]
    slots = np.int32([4, 1, 2])
    prompts, outputs = [set() for _ in range(rows)], [Counter() for _ in range(rows)]
    for chunk in range(3):
        tokens = rng.integers(0, vocab, (rows, width)).astype(np.int32)
        valid = np.arange(width) < np.array([[width], [3], [width if chunk < 2 else 0]])
        is_output = np.tile(chunk * width + np.arange(width) >= 18, (rows, 1))  # prefilled again after preemption
        for r in range(rows):
            for t in range(width):
                if valid[r, t] and is_output[r, t]:
                    outputs[r][int(tokens[r, t])] += 1
                elif valid[r, t]:
                    prompts[r].add(int(tokens[r, t]))
        counts = sampler.clear_counts(counts, slots, np.full(rows, chunk == 0))
        counts = count_prompt(counts, slots, tokens, valid, is_output)
    for step in range(6):
        tokens, valid = np.int32([7, step % 2, 9]), np.array([True, True, step < 3])
        for r in range(rows):
            outputs[r].update([int(tokens[r])] if valid[r] else [])
        counts = count_output(counts, slots, tokens, valid)
    everywhere = np.ones((rows, 1), bool)
    counts = count_prompt(counts, slots, np.full((rows, 1), 7, np.int32), everywhere, ~everywhere)
    for seen in prompts:
        seen.add(7)  # also generated above: the mark must not wipe out the count
    counts = np.asarray(counts)
    np.testing.assert_array_equal(counts[[0, 3]], untouched)
    for r in range(rows):
        row = counts[slots[r]]
        assert set(np.flatnonzero(row & IN_PROMPT)) == prompts[r]
        assert {i: int(c) for i, c in enumerate(row & (IN_PROMPT - 1)) if c} == dict(outputs[r])


def test_padding_rows_change_no_counts():
    counts = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
    slots, none = np.zeros(3, np.int32), np.zeros(3, bool)
    tokens = np.zeros((3, 4), np.int32)
    after = sampler.clear_counts(counts, slots, none)
    after = sampler.count_prompt(after, slots, tokens, tokens > 0, tokens > 0)
    after = sampler.count_output(after, slots, tokens[:, 0], none)
    np.testing.assert_array_equal(after, counts)


def test_packed_rows_hold_each_option_in_its_place():
    params = SamplingParams(
        temperature=0.25, top_k=-1, top_p=0.5, min_p=0.125, repetition_penalty=1.5, presence_penalty=-1.0,
        frequency_penalty=2.0, seed=2**32 - 1, logprobs=0, logit_bias={5: -2.0},
    ).resolved()  # fmt: skip
    rows = pack_rows([(params, 12, (8, 9))], 4)
    first = [np.asarray(field[0]).tolist() for field in rows[:10]]
    assert first == [0.25, 0, 0.5, 0.125, 1.5, -1.0, 2.0, 2**32 - 1, 12, 0]
    assert rows.bias_ids[0, :4].tolist() == [5, 8, 9, -1]
    assert rows.bias_values[0, :4].tolist() == [-2.0, -np.inf, -np.inf, 0.0]
    for field, neutral in zip(rows, pack_rows((), 3), strict=True):
        np.testing.assert_array_equal(field[1:], neutral)
        assert field.dtype == neutral.dtype
