"""The sparse schedule in the engine: really sparse, and the same tokens however a prompt is cut, cached or batched."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import random_qwen2
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import Sparsity, new_summaries, sparse_attention, update_summaries

from qwen_jax import Engine, SamplingParams
from qwen_jax.checkpoint import from_transformers
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy
from qwen_jax.engine.scheduling.speculation import Speculation
from qwen_jax.errors import UserError
from qwen_jax.model import build

POLICY = SchedulePolicy(sparse_above_tokens=256)
SPARSITY = Sparsity(budget=0.8, dense_tail=40, dense_heads=(1,))
PARAMS = SamplingParams(max_tokens=10, temperature=0.0, prompt_logprobs=0)


@pytest.fixture(scope="module")
def hf():
    return random_qwen2(max_position_embeddings=2048)


def engine(hf, chunks=((2, 4 * PAGE),), sparsity=SPARSITY, policy=POLICY, **options):
    limits = Limits(max_batch_size=2, max_seq_len=1280, prefill_shapes=chunks, recompute_shapes=(), decode_rows=(2,))
    return Engine(hf, limits=limits, policy=policy, sparsity=sparsity, progress=False, **options)


@pytest.fixture(scope="module")
def usual(hf):
    return engine(hf)


@pytest.fixture(scope="module")
def full(hf):
    return engine(hf, policy=SchedulePolicy())


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 320, length).tolist() for length in lengths]


def logprobs(output):
    return np.array([list(one.values())[0] for one in output.prompt_logprobs[1:]])


def test_prompt_is_scored_as_the_reference_says(hf, usual, full):
    """One pass over the whole prompt, with a mask over full attention."""
    prompt, = prompts(1100)
    config, params = from_transformers(hf, "float32")
    model = build(config, params)
    padded = -(-len(prompt) // PAGE) * PAGE
    length, table = jnp.array([len(prompt)]), jnp.arange(1, padded // PAGE + 1)[None]

    def attend(_, q, k, v):
        k_pages, v_pages = (jnp.concatenate([jnp.zeros((1, *x.shape[2:3], PAGE, x.shape[3])),
                                             x[0].reshape(-1, PAGE, *x.shape[2:]).swapaxes(1, 2)]) for x in (k, v))
        zero = jnp.zeros(1, jnp.int32)
        summaries = update_summaries(new_summaries(k_pages, 20), k_pages, table, zero, length, padded)
        return sparse_attention(q, k_pages, v_pages, summaries, table, zero, length, length, sparsity=SPARSITY,
                                implementation="reference")[0]

    tokens = jnp.array([prompt + [0] * (padded - len(prompt))])
    logits = model.logits(model.hidden(tokens, jnp.arange(padded)[None], attend))[0]
    want = nnx.log_softmax(logits)[jnp.arange(len(prompt) - 1), jnp.array(prompt[1:])]
    output, = usual.generate([prompt], PARAMS)
    assert output.schedule == "sparse_attention"
    np.testing.assert_allclose(logprobs(output), want, atol=2e-4)
    difference = np.abs(logprobs(full.generate([prompt], PARAMS)[0]) - want).max()
    assert difference > 1e-3, "full attention must differ, or the test shows nothing"


def test_density_is_reported(usual):
    before = usual.stats().compiles_after_warmup
    short, long = usual.generate(prompts(100, 1100), PARAMS)
    assert usual.stats().compiles_after_warmup == before
    assert (short.schedule, short.density) == ("full_attention", 1.0)
    assert (long.schedule, 0.5 < long.density < 0.9) == ("sparse_attention", True), "one of two heads is dense"
    assert 0.5 < usual.stats().sparse_density < 0.9


def test_a_budget_for_everything_is_full_attention(hf, full):
    """In one layer by its budget, in the other because it is not sparse at all."""
    sparse = engine(hf, sparsity=[Sparsity(budget=10), None])
    got, want = (one.generate(prompts(900), PARAMS)[0] for one in (sparse, full))
    assert (got.schedule, want.schedule, got.density) == ("sparse_attention", "full_attention", 1)
    assert got.token_ids == want.token_ids
    np.testing.assert_allclose(logprobs(got), logprobs(want), atol=1e-4)


def test_chunks_neighbours_and_the_prefix_cache_change_nothing(hf, usual):
    first, second = prompts(700, 650, seed=1)
    second[:400] = first[:400]
    single = engine(hf, chunks=((1, PAGE),), prefix_cache=False)
    alone = [single.generate([one], PARAMS)[0] for one in (first, second)]
    together = usual.generate([first, second], PARAMS)
    again = usual.generate([second], SamplingParams(max_tokens=10, temperature=0.0))[0]
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(logprobs(one), logprobs(other), atol=1e-4)
    assert again.token_ids == alone[1].token_ids
    assert usual.stats().prefix_hits > 0


def test_pages_of_a_dense_tail_are_not_shared(usual):
    """The end of a short prompt was attended to densely; a longer prompt that begins with it must not inherit that."""
    short, long = prompts(10 * PAGE, 1200, seed=2)
    long[:len(short)] = short
    usual.generate([short], PARAMS)
    before = usual.stats().prefix_hits
    usual.generate([long], SamplingParams(max_tokens=2, temperature=0.0))
    assert usual.stats().prefix_hits - before == (len(short) - SPARSITY.dense_tail) // PAGE == 9


def test_speculation_and_many_steps_change_nothing(hf, usual, monkeypatch):
    monkeypatch.setattr(Speculation, "_cost", lambda self: 0.0)  # always: whether it pays is a matter of time
    prompt = [1, 2, 3, 4, 5, 6, 7, 8] * 60
    params = SamplingParams(max_tokens=96, temperature=0.0, ignore_eos=True)
    plain = usual.generate([prompt], params)[0]
    limits = Limits(max_batch_size=2, max_seq_len=1280, prefill_shapes=((1, 4 * PAGE),), recompute_shapes=(),
                    decode_rows=(2,), decode_steps=4, draft_tokens=4)
    guessing = Engine(hf, limits=limits, policy=POLICY, sparsity=SPARSITY, speculation="ngram", draft_tokens=4,
                      progress=False)
    assert guessing.generate([prompt], params)[0].token_ids == plain.token_ids
    assert guessing.stats().accepted_tokens > 0


def test_bad_sparsity_is_refused(hf):
    with pytest.raises(UserError, match="one .or None. for each of the 2 layers"):
        engine(hf, sparsity=[Sparsity()])
