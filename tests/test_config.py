"""Configurations: both spellings of rope, refused settings, presets, and the round trip through transformers."""

import json

import numpy as np
import pytest
import torch
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen_jax.config import PRESETS, GenerationDefaults, ModelConfig
from qwen_jax.errors import UserError

BASE = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 320, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rope_theta": 1e6}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}


def test_both_spellings_of_rope_are_one_config():
    old = ModelConfig.from_hf(BASE | {"rope_scaling": {"type": "yarn", **YARN}})
    new = dict(BASE)
    del new["rope_theta"]
    new["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e6, **YARN}
    assert ModelConfig.from_hf(new) == old
    assert old.max_context == 131072
    assert ModelConfig.from_hf(BASE).rope.yarn is None
    without = {k: v for k, v in BASE.items() if k != "rope_theta"}
    assert ModelConfig.from_hf(without).rope.theta == Qwen2Config(**without).rope_parameters["rope_theta"]


@pytest.mark.parametrize("yarn", [
    YARN, {"factor": 4.0}, YARN | {"beta_fast": 16, "beta_slow": 2}, YARN | {"attention_factor": 0.7},
    YARN | {"mscale": 1.3, "mscale_all_dim": 0.5}, YARN | {"truncate": False}, YARN | {"factor": 1.0},
])
@pytest.mark.parametrize("head_dim, theta", [(64, 1e6), (128, 1e6), (128, 1e7)])
def test_yarn_frequencies_are_transformers(yarn, head_dim, theta):
    parameters = {"rope_type": "yarn", "rope_theta": theta, **yarn}
    hf = Qwen2Config(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=dict(parameters))
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](hf, torch.device("cpu"))
    config = ModelConfig.from_hf(BASE | {"hidden_size": 4 * head_dim, "rope_parameters": parameters})
    got, scale = config.rope.frequencies(head_dim)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected.numpy(), rtol=3e-7)
    assert scale == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("change, named", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}}, "longrope"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "novelty": 1}}, "novelty"),
    ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}, "sliding_window=4096"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
    ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ({"model_type": "qwen3", "architectures": None}, "qwen3"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"num_key_value_heads": 3}, "3 KV heads"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_size": -64}, "hidden_size"),
])
def test_what_is_not_implemented_is_refused_by_name(change, named):
    with pytest.raises(UserError, match=named):
        ModelConfig.from_hf(BASE | change)


def test_a_window_over_no_layer_changes_nothing():
    """Released Qwen2.5 configs carry sliding_window with use_sliding_window false, or above the last layer."""
    for harmless in ({"use_sliding_window": False, "sliding_window": 131072},
                     {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}):
        assert ModelConfig.from_hf(BASE | harmless) == ModelConfig.from_hf(BASE)


def test_missing_keys_are_named_together():
    with pytest.raises(UserError, match="vocab_size, hidden_size"):
        ModelConfig.from_hf({"model_type": "qwen2", "intermediate_size": 1, "num_hidden_layers": 1,
                             "num_attention_heads": 1})


def test_files(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(BASE)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_the_round_trip(name):
    config = ModelConfig.preset(name)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("name, billions", [("0.5b", 0.494), ("1.5b", 1.544), ("3b", 3.086), ("7b", 7.616),
                                            ("14b", 14.77), ("32b", 32.76), ("72b", 72.71)])
def test_presets_have_the_published_sizes(name, billions):
    assert ModelConfig.preset(f"Qwen/Qwen2.5-{name}").num_parameters == pytest.approx(billions * 1e9, rel=1e-3)


def test_transformers_reads_what_we_write():
    config = ModelConfig.from_hf(BASE | {"rope_scaling": {"type": "yarn", **YARN}, "eos_token_id": [3, 4],
                                         "head_dim": 24})
    hf = Qwen2Config.from_dict(config.to_hf())
    assert hf.rope_parameters["rope_type"] == "yarn" and hf.rope_parameters["factor"] == 4.0
    assert ModelConfig.from_hf({**hf.to_dict(), "architectures": ["Qwen2ForCausalLM"]}) == config


def test_unknown_preset():
    with pytest.raises(UserError, match="unknown preset 'qwen9'.*qwen2.5-7b"):
        ModelConfig.preset("qwen9")


def test_million_token_context_stops_where_dual_chunk_attention_begins():
    assert ModelConfig.preset("qwen2.5-7b-instruct-1m").max_context == 262_144


def test_generation_defaults():
    config = ModelConfig.from_hf(BASE | {"eos_token_id": 5})
    instruct = {"eos_token_id": [151645, 151643], "temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True,
                "repetition_penalty": 1.05, "pad_token_id": 151643}
    got = GenerationDefaults.from_hf(instruct, config)
    assert got.eos_token_ids == (151645, 151643)
    assert (got.temperature, got.top_p, got.top_k, got.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert GenerationDefaults.from_hf({}, config).eos_token_ids == (5,)
