"""Calibration for 8 bits: its choices, and the file that keeps them."""
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.checkpoint import from_transformers, read_calibrated, write_calibrated
from qwen_jax.errors import UserError
from qwen_jax.evaluation import calibrate_precision
from qwen_jax.evaluation.calibrate_precision import calibrate_eight_bit
from qwen_jax.model import build
from qwen_jax.quantization import default_precision, scales_of

torch = pytest.importorskip("torch")
from oracle import random_qwen2  # noqa: E402

TEXTS = [np.random.default_rng(n).integers(0, 320, n).tolist() for n in (70, 120)]


@pytest.fixture(scope="module")
def hf():
    return random_qwen2(num_hidden_layers=3)


@pytest.fixture(scope="module")
def calibrated(hf):
    config, params = from_transformers(hf, "float32")
    return config, params, calibrate_eight_bit(build(config, params), TEXTS)


def test_ranges_are_those_of_torch(hf, calibrated):
    config, _, result = calibrated
    for layer in range(config.num_layers):
        seen = {"k_proj": [], "v_proj": []}
        hooks = [getattr(hf.model.layers[layer].self_attn, name).register_forward_hook(
            lambda module, _, out, into=into: into.append((out - module.bias).detach().numpy()[0]))
            for name, into in seen.items()]
        for text in TEXTS:
            hf(torch.tensor([text]))
        for hook in hooks:
            hook.remove()
        keys, values = (np.concatenate(seen[name]).reshape(-1, config.num_kv_heads, config.head_dim).astype(np.float64)
                        for name in ("k_proj", "v_proj"))
        half = config.head_dim // 2
        planes = np.tile(np.hypot(keys[..., :half], keys[..., half:]).max(axis=0), 2)
        ranges = result.found.ranges[layer]
        np.testing.assert_allclose(ranges.keys, planes, rtol=1e-3)
        np.testing.assert_allclose(ranges.values, np.abs(values).max(axis=0), rtol=1e-3)


def test_what_loses_little_becomes_eight_bit(calibrated, monkeypatch):
    config, params, result = calibrated
    precision = result.found.precision
    assert set(precision.kv_cache) == {"int8"}  # without outliers, eight bits of mantissa are better than four
    assert np.all(result.errors["int8"] < 0.5 * result.errors["e4m3"]) and np.all(result.errors["e4m3"] < 0.1)
    assert 0 < result.pages_divergence < result.divergence <= calibrate_precision.MAX_DIVERGENCE
    assert all(result.layer_divergence > result.pages_divergence)
    # Two thirds of what all layers cost: not all of them, and those that cost least.
    pages = result.pages_divergence
    limit = pages + 0.66 * float(sum(result.layer_divergence - pages))
    monkeypatch.setattr(calibrate_precision, "MAX_DIVERGENCE", limit)
    fewer = calibrate_eight_bit(build(config, params), TEXTS)
    weights = fewer.found.precision.weights
    assert 0 < sum(weights) < 3 and fewer.divergence <= calibrate_precision.MAX_DIVERGENCE
    cheapest = np.argsort(result.layer_divergence)[:sum(weights)]
    assert all(weights[layer] for layer in cheapest)


def test_scales_leave_room(calibrated):
    config, params, result = calibrated
    precision = default_precision(config, False, "int8")
    with pytest.raises(UserError, match="needs ranges that were measured"):
        scales_of(params, precision)
    scales = scales_of(params, precision, result.found.ranges)
    for (keys, values), ranges in zip(scales, result.found.ranges, strict=True):
        np.testing.assert_allclose(keys * 127, 1.5 * ranges.keys, rtol=1e-6)
        np.testing.assert_allclose(values * 127, 1.5 * ranges.values, rtol=1e-6)
        assert np.all(np.asarray(keys) > 0)


def test_kept_beside_the_weights(calibrated, tmp_path):
    config, _, result = calibrated
    assert read_calibrated(tmp_path, config) is None
    path = write_calibrated(tmp_path, result.found, {"divergence": result.divergence})
    again = read_calibrated(tmp_path, config)
    assert again.precision == result.found.precision
    for ours, theirs in zip(again.ranges, result.found.ranges, strict=True):
        np.testing.assert_allclose(jnp.stack(ours), jnp.stack(theirs), rtol=1e-3)
    facts = json.loads(path.read_text())
    for change in ({"layers": facts["layers"][:-1]}, {"layers": 3}, {"tables": None, "layers": [{}]},
                   {"layers": [layer | {"kv_cache": "int4"} for layer in facts["layers"]]},
                   {"layers": [layer | {"keys": [[float("nan")] * 32] * 2} for layer in facts["layers"]]}):
        path.write_text(json.dumps(facts | change))
        with pytest.raises(UserError, match="run `qwen-jax calibrate --fp8` again|run it again"):
            read_calibrated(tmp_path, config)
    with pytest.raises(UserError, match="cannot write"):
        write_calibrated(tmp_path / "nowhere", result.found, {})
