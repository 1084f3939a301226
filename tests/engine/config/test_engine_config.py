"""Options of an engine: one documented object, or keyword arguments."""
import re
from dataclasses import FrozenInstanceError, fields

import pytest
from parallel_bench import shrunk

from qwen_jax import Engine, EngineConfig, UserError
from qwen_jax.model import init


def test_keywords_and_a_config_are_the_same():
    assert EngineConfig.of({"tp_size": 2, "fp8_enabled": True}) == EngineConfig(tp_size=2, fp8_enabled=True)
    with pytest.raises(FrozenInstanceError):
        EngineConfig().tp_size = 2


def test_every_option_is_documented():
    documented = set(re.findall(r"\b(\w+)(?=[,:])", EngineConfig.__doc__))
    assert {option.name for option in fields(EngineConfig)} <= documented


@pytest.mark.parametrize("name, hint", [("max_batchsize", "did you mean 'max_batch_size'"), ("colour", "see help")])
def test_an_unknown_option_is_refused(name, hint):
    with pytest.raises(UserError, match=f"unknown engine option '{name}': {hint}"):
        Engine(None, **{name: 1})


def test_options_beside_a_config_are_refused():
    with pytest.raises(UserError, match="give config or options, not both: tp_size would be ignored"):
        Engine(None, config=EngineConfig(), tp_size=2)


def test_the_environment_sets_the_layers_of_a_program_where_no_option_does(monkeypatch):
    def layers(**options) -> int | None:
        return Engine(init(shrunk("0.5b"), 0), warmup=False, **options).runner.sizes.layers_per_program

    monkeypatch.setenv("QWEN_JAX_LAYERS_PER_PROGRAM", "3")
    assert (layers(), layers(layers_per_program=2)) == (3, 2)
    monkeypatch.setenv("QWEN_JAX_LAYERS_PER_PROGRAM", "many")
    with pytest.raises(UserError, match="layers_per_program must be a positive integer, not 'many'"):
        layers()
    monkeypatch.delenv("QWEN_JAX_LAYERS_PER_PROGRAM")
    assert layers() is None
