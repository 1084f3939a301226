"""batch_invariant=True: to the last bit, a request's answer does not depend on what runs beside it."""
import dataclasses

import numpy as np
import pytest
from test_engine_adapters import CONFIG

from qwen_jax import Engine, SamplingParams, UserError
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.model import init

MODEL = init(dataclasses.replace(CONFIG, max_position_embeddings=1024), 0, "bfloat16")  # where rounding shows
PROMPTS = [np.random.default_rng(n).integers(0, 320, n).tolist() for n in (3, 30, 64, 100, 140, 190)]
ASKED = SamplingParams(max_tokens=40, temperature=0.9, seed=1, logprobs=3, prompt_logprobs=1)


def exact(output):
    return output.token_ids, output.logprobs, output.prompt_logprobs


def test_alone_and_in_any_company_the_same_bits():
    engine = Engine(MODEL, max_batch_size=6, max_seq_len=256, batch_invariant=True, progress=False)
    assert len(engine.runner.table) == 2, "one shape for each phase"
    alone = {}
    for index, prompt in enumerate(PROMPTS):
        params = dataclasses.replace(ASKED, seed=index)
        alone[index] = exact(engine.generate(prompt, params)[0])
    rng = np.random.default_rng(0)
    for _ in range(4):
        order = rng.permutation(len(PROMPTS)).tolist()
        company = [rng.integers(0, 320, 50).tolist() for _ in range(3)]
        params = [dataclasses.replace(ASKED, seed=index) for index in order]
        others = [SamplingParams(max_tokens=int(rng.integers(1, 60)), temperature=1.0, top_k=5, seed=9,
                                 repetition_penalty=1.3) for _ in company]
        outputs = engine.generate([PROMPTS[index] for index in order] + company, params + others)
        for index, output in zip(order, outputs):
            assert exact(output) == alone[index]
    assert engine.scheduler.preemptions == 0 and engine.stats().prefix_hits == 0, "scored prompts share nothing"


def test_a_prefix_from_the_cache_gives_the_same_bits():
    engine = Engine(MODEL, max_batch_size=4, max_seq_len=640, batch_invariant=True, progress=False)
    prompt = np.random.default_rng(7).integers(0, 320, 600).tolist()
    params = SamplingParams(max_tokens=20, temperature=0.0, logprobs=3)
    first, second = (exact(engine.generate(prompt, params)[0]) for _ in range(2))
    assert first == second and engine.stats().prefix_hits == 8, "two whole chunks of four pages"


def test_memory_that_would_lead_to_preemption_is_waited_for():
    page = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 64 * 2
    engine = Engine(MODEL, max_batch_size=4, max_seq_len=256, batch_invariant=True, kv_cache_bytes=5 * page,
                    progress=False)
    params = SamplingParams(max_tokens=120, temperature=0.0, logprobs=0)
    alone = [exact(engine.generate(prompt, params)[0]) for prompt in PROMPTS[:4]]
    assert [exact(output) for output in engine.generate(PROMPTS[:4], params)] == alone
    assert engine.scheduler.preemptions == 0


def test_the_shapes_are_its_own():
    with pytest.raises(UserError, match="neither limits nor speculation"):
        Engine(MODEL, batch_invariant=True, warmup=False,
               limits=Limits(2, 128, ((2, 64),), (), (2,)))
