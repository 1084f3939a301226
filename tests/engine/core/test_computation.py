"""What decides an engine's answers beside weights, adapters and requests: every option, except those that only decide
how an engine starts."""
from dataclasses import fields, replace

import jax.numpy as jnp
import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.engine.config.engine_config import EngineConfig
from qwen_jax.engine.config.resolve import ResolvedConfig, resolve
from qwen_jax.engine.core import computation as module
from qwen_jax.engine.core.computation import WITHOUT_INFLUENCE, computation
from qwen_jax.parallel.plan import make_plan
from qwen_jax.quantization import Ranges

MODEL = ModelConfig.preset("qwen2.5-0.5b")
OPTIONS = EngineConfig(max_batch_size=2, max_seq_len=128)
RESOLVED = resolve(OPTIONS, MODEL, jnp.dtype("bfloat16"), None)
PLAN = make_plan(MODEL)


@pytest.mark.parametrize("name", [field.name for field in fields(EngineConfig)])
def test_every_option_counts(name):
    same = computation(replace(OPTIONS, **{name: "another"}), RESOLVED, PLAN) == computation(OPTIONS, RESOLVED, PLAN)
    assert same == (name in WITHOUT_INFLUENCE)


@pytest.mark.parametrize("name", [field.name for field in fields(ResolvedConfig)])
def test_every_resolved_option_counts(name):
    same = computation(OPTIONS, replace(RESOLVED, **{name: "another"}), PLAN) == computation(OPTIONS, RESOLVED, PLAN)
    assert same == (name in WITHOUT_INFLUENCE)


def test_all_elements_of_calibrated_ranges_count():
    """A repr of a large array leaves most of it out."""
    found = []
    for value in (1.0, 2.0):
        keys = jnp.ones((8, 128)).at[4, 64].set(value)
        found.append(computation(OPTIONS, replace(RESOLVED, ranges=(Ranges(keys, keys),)), PLAN))
    assert found[0] != found[1]


def test_plan_environment_and_sources_count(monkeypatch):
    before = computation(OPTIONS, RESOLVED, PLAN)
    assert computation(OPTIONS, RESOLVED, make_plan(MODEL, tensor=2)) != before
    for name in ("environment", "package_digest"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: "another")
            assert computation(OPTIONS, RESOLVED, PLAN) != before
