"""The recompute schedule: the same answers, in bounded memory, inside one executable."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from oracle import random_qwen2

from qwen_jax import Engine, SamplingParams
from qwen_jax.config import ModelConfig
from qwen_jax.engine.compiled.state import Models, new_state
from qwen_jax.engine.compiled.steps import run_bucket
from qwen_jax.engine.runner.padded_batch import dry_run_batch
from qwen_jax.engine.scheduling.buckets import Bucket, Limits
from qwen_jax.engine.scheduling.schedule_policy import FULL, RECOMPUTE, SchedulePolicy
from qwen_jax.model import Qwen2

PAGES = 4


def temporary_bytes(config: ModelConfig, bucket: Bucket, slots: int = 128) -> int:
    """XLA's temporary buffers of a bucket's program; weights and pages are never allocated."""
    graph, params = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0), dtype="bfloat16")))
    leaves, tree = jax.tree.flatten(params)

    def step(leaves, state, batch, vocab_limit):
        models = Models(nnx.merge(graph, jax.tree.unflatten(tree, leaves)), vocab_limit)
        return run_bucket(models, bucket, state, batch)

    state = jax.eval_shape(lambda: new_state(config, slots * PAGES + 1, slots, "bfloat16"))
    batch = dry_run_batch(bucket, slots, config.vocab_size)
    lowered = jax.jit(step, donate_argnums=1).lower(leaves, state, batch, np.int32(100))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_temporary_memory_is_that_of_the_small_batch():
    """bf16 weights are large beside the activations here: a float32 copy of them, made before the loop, would show."""
    config = dataclasses.replace(ModelConfig.preset("qwen2.5-0.5b"), num_layers=2, vocab_size=2048)
    small = temporary_bytes(config, Bucket("prefill", FULL, 8, 64, PAGES))
    bounded = temporary_bytes(config, Bucket("prefill", RECOMPUTE, 32, 64, PAGES, micro_rows=8))
    whole = temporary_bytes(config, Bucket("prefill", FULL, 32, 64, PAGES))
    assert bounded <= 1.3 * small
    assert whole > 2 * small, "without micro-batches memory must grow, or the test shows nothing"


@pytest.fixture(scope="module")
def hf():
    return random_qwen2()


def test_answers_are_those_of_full_attention(hf):
    """Eight prompts over a threshold of four: recompute in micro-batches of two, against one prompt at a time."""
    policy = SchedulePolicy(recompute_above_rows=4)
    limits = Limits(max_batch_size=8, max_seq_len=256, prefill_shapes=((4, 64),), recompute_shapes=((8, 64, 2),),
                    decode_rows=(8,))
    engine = Engine(hf, limits=limits, policy=policy, progress=False)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 320, n).tolist() for n in (5, 64, 100, 1, 150, 63, 65)]
    params = SamplingParams(max_tokens=12, temperature=0.0, repetition_penalty=1.2, logprobs=1, prompt_logprobs=1)
    alone = [engine.generate(prompt, params)[0] for prompt in prompts]
    together = engine.generate(prompts, params)
    assert {o.schedule for o in alone} == {FULL} and {o.schedule for o in together} == {RECOMPUTE}
    used = {b.bucket: b.steps for b in engine.stats().buckets}
    assert used["prefill/recompute 8x64"] > 0
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        for a, b in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            assert a.keys() == b.keys() and all(abs(a[token] - b[token]) < 1e-4 for token in a)

