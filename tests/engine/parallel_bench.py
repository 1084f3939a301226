"""Small models with the heads of released sizes, and engines of them by plan."""

from dataclasses import replace
from functools import cache

import numpy as np

from qwen_jax import Engine, SamplingParams
from qwen_jax.config import PRESETS, ModelConfig
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.model import init

SIZES = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")
LIMITS = Limits(4, 128, ((2, 64),), (), (4,), 4)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, logprobs=5, prompt_logprobs=5, ignore_eos=True)


def shrunk(size: str, **changes) -> ModelConfig:
    """Its heads on narrow layers whose other sizes no degree divides."""
    return replace(PRESETS[f"qwen2.5-{size}"], **{"hidden_size": 64, "head_dim": 16, "intermediate_size": 101,
                                                  "vocab_size": 307, "num_layers": 4, **changes})


@cache
def model_of(size: str):
    return init(shrunk(size), 0)


def engine_of(size: str, **options) -> Engine:
    return Engine(model_of(size), **{"limits": LIMITS, "dtype": "float32", "progress": False, **options})


def prompts(count: int = 4, longest: int = 100, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 307, int(length)).tolist() for length in rng.integers(1, longest, count)]


@cache
def one_device(size: str) -> Engine:
    return engine_of(size)


@cache
def answers_of_one_device(size: str):
    return one_device(size).generate(prompts(), GREEDY)


def largest_difference(outputs, others) -> float:
    """Of the log-probabilities of prompts and answers; infinite where tokens differ."""
    worst = 0.0
    for one, other in zip(outputs, others, strict=True):
        if one.token_ids != other.token_ids:
            return float("inf")
        for mine, theirs in zip([*one.prompt_logprobs[1:], *one.logprobs],
                                [*other.prompt_logprobs[1:], *other.logprobs], strict=True):
            # Which tokens are in the top may differ where two are alike: their values are compared.
            pairs = zip(sorted(mine.values()), sorted(theirs.values()), strict=True)
            worst = max(worst, *(abs(a - b) for a, b in pairs))
    return worst
