"""The prefix cache in the engine: less is computed, and nothing else changes."""
import numpy as np
import pytest
import torch
from oracle import random_qwen2
from test_engine import hf_greedy

from qwen_jax import Engine, SamplingParams
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.errors import UserError

LIMITS = Limits(max_batch_size=4, max_seq_len=512, prefill_shapes=((4, 64), (1, 256)), recompute_shapes=(),
                decode_rows=(4,))
SHARED = np.random.default_rng(0).integers(0, 320, 300).tolist()


@pytest.fixture(scope="module")
def hf():
    return random_qwen2(5)


@pytest.fixture(scope="module")
def engine(hf):
    return Engine(hf, limits=LIMITS, progress=False)


def computed(engine):
    return sum(bucket.tokens for bucket in engine.stats().buckets if bucket.bucket.startswith("prefill"))


def prompts(count, seed):
    rng = np.random.default_rng(seed)
    return [SHARED + rng.integers(0, 320, 20).tolist() for _ in range(count)]


def test_answers_are_those_of_transformers_and_the_prefix_is_computed_once(engine, hf):
    before = computed(engine)
    for some in (prompts(4, 1), prompts(2, 2)):  # within a batch, then from one to the next
        outputs = engine.generate(some, SamplingParams(max_tokens=12, temperature=0.0))
        for prompt, output in zip(some, outputs, strict=True):
            assert output.token_ids == hf_greedy(hf, prompt, 12)
    assert computed(engine) - before == 320 + 5 * (320 - 256)
    assert engine.stats().prefix_hits == 5 * 4 and engine.stats().pages_used == 0


@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.3}, {"presence_penalty": 0.7, "repetition_penalty": 1.1}])
def test_penalties_count_tokens_that_were_not_computed(engine, hf, penalty):
    prompt, = prompts(1, 3)
    params = SamplingParams(max_tokens=24, temperature=0.0, **penalty)
    fresh = Engine(hf, limits=LIMITS, prefix_cache=False, progress=False)
    expected = fresh.generate(prompt, params)[0].token_ids
    assert expected != fresh.generate(prompt, SamplingParams(max_tokens=24, temperature=0.0))[0].token_ids
    for _ in range(2):  # the second time all full pages of the prompt are there
        assert engine.generate(prompt, params)[0].token_ids == expected
    again = prompt + expected[:-1]  # and pages of the answer
    assert engine.generate(again, params)[0].token_ids == fresh.generate(again, params)[0].token_ids
    assert fresh.stats().prefix_queries == fresh.stats().prefix_hits == 0


def test_classify_prefills_a_shared_beginning_once(engine, hf):
    rng = np.random.default_rng(4)
    instruction = rng.integers(0, 320, 192).tolist()
    some, labels = [instruction + rng.integers(0, 320, 16).tolist() for _ in range(6)], [[7, 8], [9]]
    before = computed(engine)
    found = engine.classify(some, labels)
    assert computed(engine) - before <= 210 + 11 * (210 - 192)
    fresh = Engine(hf, limits=LIMITS, prefix_cache=False, progress=False)
    np.testing.assert_allclose(found, fresh.classify(some, labels), atol=1e-5)


def test_log_probabilities_of_a_prompt_are_computed_though_its_pages_are_there(engine):
    prompt, = prompts(1, 1)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    first, second = (engine.generate(prompt, params)[0].prompt_logprobs for _ in range(2))
    assert first[0] is None and len(first) == 320 and all(len(scores) == 1 for scores in first[1:])
    assert [list(a) for a in first[1:]] == [list(b) for b in second[1:]] == [[token] for token in prompt[1:]]


def test_embeddings_are_those_of_transformers_whatever_is_cached(engine, hf):
    """The mean over all tokens needs the cached ones too, in several chunks; the last one does not."""
    some = prompts(3, 6)
    some[1] = some[1][:70]
    engine.generate(some, SamplingParams(max_tokens=1, temperature=0.0))
    with torch.no_grad():
        hidden = [hf.model(torch.tensor([prompt])).last_hidden_state[0].numpy() for prompt in some]
    for pooling, wanted in (("mean", [one.mean(0) for one in hidden]), ("last", [one[-1] for one in hidden])):
        before = computed(engine)
        np.testing.assert_allclose(engine.embed(some, pooling, normalize=False), wanted, rtol=1e-3, atol=1e-3)
        assert (computed(engine) - before == sum(map(len, some))) == (pooling == "mean")
        lengths = np.linalg.norm(engine.embed(some, pooling), axis=1)
        np.testing.assert_allclose(lengths, 1, rtol=1e-5)
    assert engine.embed(some[1]).shape == (1, 64) and engine.stats().pages_used == 0
    with pytest.raises(UserError, match="pooling must be mean or last"):
        engine.embed(some, "first")
