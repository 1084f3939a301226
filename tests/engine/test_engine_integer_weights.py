"""Engines with int8 and int4 weights, against a model in float32 that has the numbers which they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_qwen2
from qwen_kernels.cpu import library, product_targets

from qwen_jax import Engine, SamplingParams
from qwen_jax.checkpoint import from_transformers
from qwen_jax.checkpoint.adapters import save_adapter
from qwen_jax.engine.config import resolve
from qwen_jax.engine.config.memory import weight_bytes
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.errors import UserError
from qwen_jax.model import build, params_of
from qwen_jax.model.lora import TARGETS, LoraConfig, init_adapter
from qwen_jax.quantization import INPUTS, INT4, QuantizedTensor, quantize
from qwen_jax.quantization.quantized_tensor import INT8

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0)
LIMITS = Limits(max_batch_size=4, max_seq_len=256, prefill_shapes=((1, 64), (1, 128)), recompute_shapes=(),
                decode_rows=(4,), decode_steps=1)
PROMPTS = [np.random.default_rng(n).integers(0, 320, n).tolist() for n in (5, 30, 70, 120)]
OPTIONS = {"limits": LIMITS, "progress": False, "warmup": "full"}


@pytest.fixture(scope="module")
def config_and_params():
    return from_transformers(random_qwen2(num_hidden_layers=2, intermediate_size=128, head_dim=32))


@pytest.fixture(scope="module")
def model(config_and_params):
    return build(*config_and_params)


@pytest.fixture(scope="module", params=["int8", "int4"])
def weights(request):
    """Type of the weights. Products of int4 run without AVX2, which rounds the other operand too."""
    kernels = library()
    before = kernels.qwen_instruction_set()
    if request.param == "int4" and before == b"AVX2":
        assert kernels.qwen_use_instruction_set(b"portable")
    yield request.param
    kernels.qwen_use_instruction_set(before)


@pytest.fixture(scope="module")
def engine(model, weights, tmp_path_factory):
    return Engine(model, weights=weights, max_adapters=1, max_adapter_rank=2,
                  cache_dir=tmp_path_factory.mktemp("programs"), **OPTIONS)


@pytest.fixture(scope="module")
def rounded(config_and_params, weights):
    """The model in float32 with every matrix rounded and back."""
    config, params = config_and_params

    def of(path, value):
        inputs = INPUTS.get(path.partition(".")[2].partition(".")[2])
        if inputs is not None:
            return quantize(value, inputs, INT8 if weights == "int8" else INT4).dequantize(value.dtype)
        return quantize(value, 1, INT8).dequantize(value.dtype) if path in ("embed.weight", "head.weight") else value

    return Engine(build(config, {path: of(path, value) for path, value in params.items()}), max_adapters=1,
                  max_adapter_rank=2, **OPTIONS)


def test_rounding(config_and_params):
    value = np.asarray(config_and_params[1]["layers.1.mlp.down"])
    found = quantize(value, 1, INT8)
    assert found.dtype == INT8 and np.abs(np.asarray(found.values, int)).max(axis=1).tolist() == [127] * len(value)
    assert np.all(np.abs(found.dequantize("float32") - value) <= np.asarray(found.scale)[:, None] / 2 * 1.0001)
    assert quantize(np.zeros((2, 3), np.float32), 1, INT8).scale.tolist() == [1, 1]


def test_int4_rounding(config_and_params):
    """The scale of a group is no worse than the one that takes its largest value to -8, by the sum of squares."""
    value = np.asarray(config_and_params[1]["layers.1.mlp.down"])
    found = quantize(value, 1, INT4)
    assert found.dtype == INT4 and found.shape == value.shape and found.values.nbytes == value.size // 2
    assert found.scale.shape == (value.shape[0], value.shape[1] // 32)
    groups = value.reshape(-1, 32)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    scale = (largest / -8).astype(jnp.bfloat16).astype(np.float32)
    plain = np.clip(np.round(groups / scale), -8, 7) * scale
    errors = np.square(np.asarray(found.dequantize("float32")).reshape(-1, 32) - groups).sum(axis=1)
    assert np.all(errors <= np.square(plain - groups).sum(axis=1) * 1.0001)
    assert errors.sum() < .98 * np.square(plain - groups).sum()
    zeros = quantize(np.zeros((2, 32), np.float32), 1, INT4)
    assert zeros.scale.tolist() == [[1], [1]] and not np.any(zeros.dequantize("float32"))


def test_every_matrix_is_quantized(engine, model, weights):
    store = engine.runner.weights
    params = store.sharding.by_name(store.leaves_of[0])[0]
    kinds = {path: value.dtype for path, value in params.items() if isinstance(value, QuantizedTensor)}
    assert len(kinds) == 2 * 4 + 2
    assert all(kind == (INT4 if weights == "int4" and path.startswith("layers.") else INT8)
               for path, kind in kinds.items())
    assert engine.precision.format == weights and not engine.precision.eight_bit
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert weight_bytes(model.config, "float32", engine.precision) == stored
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


def test_two_devices(model, rounded, weights):
    if weights == "int4":
        with pytest.raises(UserError, match="int4 weights cannot be divided"):
            Engine(model, weights=weights, tp_size=2, **OPTIONS)
        return
    engine = Engine(model, weights=weights, tp_size=2, **OPTIONS)
    check_equal(engine.generate(PROMPTS, GREEDY), rounded.generate(PROMPTS, GREEDY))


def test_one_row_has_a_step_of_its_own(model, weights):
    """Where a step of 16 bits has two rows at least."""
    def rows(kind, most):
        engine = Engine(model, weights=kind, max_batch_size=most, max_seq_len=128, warmup=False, progress=False)
        return {bucket.rows for bucket in engine.runner.table if bucket.phase == "decode"}

    assert rows(None, 8) == {2, 8} and rows(weights, 8) == {1, 2, 8} and rows(weights, 1) == {1}


def test_stages(model, rounded, weights):
    engine = Engine(model, weights=weights, pp_size=2, **OPTIONS)
    check_equal(engine.generate(PROMPTS, GREEDY), rounded.generate(PROMPTS, GREEDY))


def test_programs_come_from_the_disk(engine, model, rounded, weights):
    again = Engine(model, weights=weights, max_adapters=1, max_adapter_rank=2, cache_dir=engine._options.cache_dir,
                   **OPTIONS)
    assert {bucket.from_disk for bucket in engine.stats().buckets} == {False}
    assert {bucket.from_disk for bucket in again.stats().buckets} == {True}
    check_equal(again.generate(PROMPTS, GREEDY), rounded.generate(PROMPTS, GREEDY))
    assert str(product_targets()) in str([stage.identity for stage in again.runner.stages])


@pytest.mark.parametrize("platform, compiled, fp8, wanted", [
    ("cpu", True, False, "int8"), ("cpu", False, False, None), ("gpu", True, False, None), ("cpu", True, True, None)])
def test_auto_is_int8_on_cpus_with_kernels(platform, compiled, fp8, wanted, monkeypatch):
    monkeypatch.setattr(resolve, "product_targets", lambda: compiled or None)
    monkeypatch.setattr(resolve.memory, "platform", lambda: platform)
    assert resolve.chosen_weights("auto", fp8) == wanted
    assert [resolve.chosen_weights(kind, fp8) for kind in ("int8", "int4", None)] == ["int8", "int4", None]


def test_an_engine_with_auto_is_one_with_what_it_stands_for(model):
    kinds = [Engine(model, weights=kind, max_batch_size=8, max_seq_len=128, warmup=False, progress=False)
             for kind in ("auto", resolve.chosen_weights("auto", False))]
    assert kinds[0].precision == kinds[1].precision and kinds[0].limits == kinds[1].limits
    assert kinds[0].computation == kinds[1].computation


@pytest.mark.parametrize("options, said", [
    ({"weights": "int2"}, "weights must be 'auto', 'int8', 'int4' or None, not 'int2'"),
    ({"weights": "e4m3"}, "e4m3 is fp8_enabled=True"),
    ({"weights": "int8", "fp8_enabled": True}, "two ways to store the same matrices")])
def test_what_is_refused(model, options, said):
    with pytest.raises(UserError, match=said):
        Engine(model, **options)


def test_a_model_without_whole_groups_is_refused():
    narrow = build(*from_transformers(random_qwen2(num_hidden_layers=1)))
    with pytest.raises(UserError, match="intermediate_size 112, head_dim 16: use weights='int8'"):
        Engine(narrow, weights="int4", **OPTIONS)
