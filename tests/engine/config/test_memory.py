"""What a model takes of a device, against arrays that exist."""

import json

import pytest
from oracle import random_qwen2

from qwen_jax import Engine, ModelConfig
from qwen_jax.cli import main
from qwen_jax.engine.config.memory import kv_bytes_per_token, memory_report, weight_bytes
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.quantization import default_precision

LIMITS = Limits(max_batch_size=2, max_seq_len=128, prefill_shapes=((1, 64),), recompute_shapes=(), decode_rows=(2,))


@pytest.mark.parametrize("options", [{}, {"fp8_enabled": True}, {"kv_cache_dtype": "e4m3"}, {"weights": "int8"}])
def test_as_many_bytes_as_there_are(options):
    engine = Engine(random_qwen2(num_hidden_layers=4), dtype="bfloat16", limits=LIMITS, warmup=False, cache_dir=None,
                    **options)
    weights, scales = engine.runner.weights, 2 * 4 * 2 * 16 * 4 if engine.precision.kv_cache[0] else 0
    assert weight_bytes(engine.config, "bfloat16", engine.precision) == weights.nbytes - scales
    engine.runner.stages[0].allocate()
    state = engine.runner.state
    pages = sum(leaf.nbytes for leaf in (*state.k_pages, *state.v_pages))
    assert kv_bytes_per_token(engine.config, "bfloat16", engine.precision) == pages / engine.pool.num_pages / 64


@pytest.mark.parametrize("preset", ["qwen2.5-7b", "qwen2.5-72b"])
@pytest.mark.parametrize("tables, most", [(False, 0.62), (True, 0.55)])
def test_share_of_16_bits(preset, tables, most):
    """Weights, and a KV cache of 64 full contexts of 32k."""
    config = ModelConfig.preset(preset)

    def total(precision):
        return (weight_bytes(config, "bfloat16", precision)
                + 64 * 32768 * kv_bytes_per_token(config, "bfloat16", precision))

    eight, sixteen = default_precision(config, True, "e4m3", tables), default_precision(config, False, None)
    assert total(eight) <= most * total(sixteen)
    assert weight_bytes(config, "bfloat16", eight) <= most * weight_bytes(config, "bfloat16", sixteen)


def test_report(capsys):
    config = ModelConfig.preset("qwen2.5-72b")
    report = memory_report(config, "bfloat16", default_precision(config, False, None), int(141e9))
    assert report["context_tokens_that_fit"] == 0 and report["weight_bytes"] > 141e9
    assert main(["info", "qwen2.5-72b", "--memory", "--fp8", "--memory-gb", "141", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert 70e9 < said["weight_bytes"] < 80e9 and said["context_tokens_that_fit"] > 300_000 and said["fp8"] is True
    assert main(["info", "qwen2.5-72b", "--memory", "--weights", "int8", "--memory-gb", "141", "--json"]) == 0
    int8 = json.loads(capsys.readouterr().out)
    assert int8["weights"] == "int8" and int8["weight_bytes"] < said["weight_bytes"]
    assert int8["kv_bytes_per_token"] > said["kv_bytes_per_token"]
    assert main(["info", "qwen2.5-72b", "--memory", "--weights", "int8", "--fp8"]) == 2
    assert "choose one" in capsys.readouterr().err
    assert main(["info", "qwen2.5-72b", "--memory", "--memory-gb", "0"]) == 2
    assert "--memory-gb" in capsys.readouterr().err
