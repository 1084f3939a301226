"""An engine with int8 weights, against a model in float32 that has the numbers which they stand for."""

import numpy as np
import pytest
from oracle import random_qwen2
from qwen_kernels.cpu import int8_targets

from qwen_jax import Engine, SamplingParams
from qwen_jax.checkpoint import from_transformers
from qwen_jax.checkpoint.adapters import save_adapter
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.errors import UserError
from qwen_jax.model import build, params_of
from qwen_jax.model.lora import TARGETS, LoraConfig, init_adapter
from qwen_jax.quantization import INPUTS, EightBitTensor, quantize
from qwen_jax.quantization.fp8 import INT8

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0)
LIMITS = Limits(max_batch_size=4, max_seq_len=256, prefill_shapes=((1, 64), (1, 128)), recompute_shapes=(),
                decode_rows=(4,), decode_steps=1)
PROMPTS = [np.random.default_rng(n).integers(0, 320, n).tolist() for n in (5, 30, 70, 120)]
OPTIONS = {"limits": LIMITS, "progress": False, "warmup": "full"}


@pytest.fixture(scope="module")
def config_and_params():
    return from_transformers(random_qwen2(num_hidden_layers=2))


@pytest.fixture(scope="module")
def model(config_and_params):
    return build(*config_and_params)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    return Engine(model, weights="int8", max_adapters=1, max_adapter_rank=2,
                  cache_dir=tmp_path_factory.mktemp("programs"), **OPTIONS)


@pytest.fixture(scope="module")
def rounded(config_and_params):
    """The model in float32 with every matrix rounded to int8 and back."""
    config, params = config_and_params

    def of(path, value):
        inputs = INPUTS.get(path.partition(".")[2].partition(".")[2], 1 if path in ("embed.weight", "head.weight")
                            else None)
        return value if inputs is None else quantize(value, inputs, INT8).dequantize(value.dtype)

    return Engine(build(config, {path: of(path, value) for path, value in params.items()}), max_adapters=1,
                  max_adapter_rank=2, **OPTIONS)


def test_rounding(config_and_params):
    value = np.asarray(config_and_params[1]["layers.1.mlp.down"])
    found = quantize(value, 1, INT8)
    assert found.dtype == INT8 and np.abs(np.asarray(found.values, int)).max(axis=1).tolist() == [127] * len(value)
    assert np.all(np.abs(found.dequantize("float32") - value) <= np.asarray(found.scale)[:, None] / 2 * 1.0001)
    assert quantize(np.zeros((2, 3), np.float32), 1, INT8).scale.tolist() == [1, 1]


def test_every_matrix_is_int8(engine, model):
    weights = engine.runner.weights
    params = weights.sharding.by_name(weights.leaves_of[0])[0]
    kinds = {path: value.dtype == INT8 for path, value in params.items() if isinstance(value, EightBitTensor)}
    assert all(kinds.values()) and len(kinds) == 2 * 4 + 2
    assert engine.precision.format == "int8" and not engine.precision.eight_bit
    assert params.keys() == params_of(model).keys()


def check_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        np.testing.assert_allclose([entry[token] for entry, token in zip(ours.logprobs, ours.token_ids, strict=True)],
                                   [entry[token] for entry, token in zip(theirs.logprobs, ours.token_ids, strict=True)],
                                   atol=2e-4)


def test_answers(engine, rounded):
    check_equal(engine.generate(PROMPTS, GREEDY), rounded.generate(PROMPTS, GREEDY))


def test_answers_of_an_adapter(engine, rounded, config_and_params, tmp_path):
    config = config_and_params[0]
    lora, random = LoraConfig(2, 4.0, TARGETS), np.random.default_rng(0)
    factors = {path: np.asarray(0.4 * random.normal(size=value.shape), np.float32)
               for path, value in init_adapter(config, lora).items()}
    save_adapter(factors, config, lora, tmp_path / "adapter")
    for each in (engine, rounded):
        each.load_adapter("a", tmp_path / "adapter")
    plain = engine.generate(PROMPTS[:2], GREEDY)
    found, expected = (each.generate(PROMPTS[:2], GREEDY, adapter="a") for each in (engine, rounded))
    check_equal(found, expected)
    assert [one.token_ids for one in found] != [one.token_ids for one in plain]


def test_other_weights_are_rounded_too(engine, model, config_and_params):
    """An update is stored like the first weights, with scales of its own, and compiles nothing."""
    before = engine.generate(PROMPTS, GREEDY)
    config, params = config_and_params
    doubled = {path: value * 2 if path.endswith("mlp.down") else value for path, value in params.items()}
    engine.update_weights(build(config, doubled))
    after = engine.generate(PROMPTS, GREEDY)
    assert [one.token_ids for one in after] != [one.token_ids for one in before]
    engine.rollback()
    check_equal(engine.generate(PROMPTS, GREEDY), before)


def test_two_devices(model, rounded):
    engine = Engine(model, weights="int8", tp_size=2, **OPTIONS)
    check_equal(engine.generate(PROMPTS, GREEDY), rounded.generate(PROMPTS, GREEDY))


def test_programs_come_from_the_disk(engine, model, rounded):
    again = Engine(model, weights="int8", max_adapters=1, max_adapter_rank=2, cache_dir=engine._options.cache_dir,
                   **OPTIONS)
    assert {bucket.from_disk for bucket in engine.stats().buckets} == {False}
    assert {bucket.from_disk for bucket in again.stats().buckets} == {True}
    check_equal(again.generate(PROMPTS, GREEDY), rounded.generate(PROMPTS, GREEDY))
    assert str(int8_targets()) in str([stage.identity for stage in again.runner.stages])


@pytest.mark.parametrize("options, said", [
    ({"weights": "int4"}, "weights must be 'int8' or None, not 'int4'"),
    ({"weights": "e4m3"}, "e4m3 is fp8_enabled=True"),
    ({"weights": "int8", "fp8_enabled": True}, "two ways to store the same matrices")])
def test_what_is_refused(model, options, said):
    with pytest.raises(UserError, match=said):
        Engine(model, **options)
