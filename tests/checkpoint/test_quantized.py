"""GPTQ, AWQ and compressed-tensors checkpoints against the tools that write them.

``packed_by_other_tools.npz`` was made by AutoGPTQ 0.7.1 and AutoAWQ 0.2.9: a matrix of 96 x 64 as they pack it, and
their own dequantisation of it, in float16.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from oracle import hf_logits, random_qwen2
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import AutoModelForCausalLM

from qwen_jax import UserError
from qwen_jax.checkpoint import convert, load_model, load_params, resolve
from qwen_jax.checkpoint.quantized import scheme_of
from qwen_jax.checkpoint.quantized.integers import ROLES

TOKENS = np.random.default_rng(0).integers(0, 320, (2, 40))
PACKED = np.load(Path(__file__).parent / "packed_by_other_tools.npz")


@pytest.mark.parametrize("case, settings", [
    ("gptq 4 bits", {"quant_method": "gptq", "bits": 4}), ("gptq act order", {"quant_method": "gptq", "bits": 4}),
    ("gptq 8 bits", {"quant_method": "gptq", "bits": 8}), ("awq", {"quant_method": "awq", "bits": 4})])
def test_matrices_that_other_tools_packed(case, settings):
    parts = {role: PACKED[name] for role, ending in ROLES.items() if (name := f"{case}/{ending[1:]}") in PACKED}
    found = scheme_of({"quantization_config": settings}).dequantize("x", parts, np.dtype(np.float32))
    np.testing.assert_array_equal(found.astype(np.float16), PACKED[f"{case}/expected"].astype(np.float16))


# --- whole models

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    random_qwen2(intermediate_size=128).to(torch.float16).save_pretrained(path)
    return path


def packed(codes, bits):
    """Codes ``[..., n]`` in words, the slow way."""
    count = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // count), np.int64)
    for place in np.ndindex(*codes.shape):
        words[(*place[:-1], place[-1] // count)] |= int(codes[place]) << bits * (place[-1] % count)
    return words.astype(np.uint32).view(np.int32)


def as_gptq(weight, bits=4, size=32, checkpoint_format="gptq", **_):
    """A matrix's parts as GPTQ lays them, with the inputs in the order of their size, and what they stand for."""
    out, inputs = weight.shape
    rank = np.argsort(np.argsort(-np.abs(weight).max(axis=0)))
    groups = rank // size
    scale, zero = np.zeros((inputs // size, out), np.float16), np.zeros((inputs // size, out), np.int64)
    for group in range(len(scale)):
        low, high = (np.minimum(weight[:, groups == group].min(1), 0), np.maximum(weight[:, groups == group].max(1), 0))
        scale[group] = (high - low) / (2**bits - 1)
        zero[group] = np.clip(np.round(-low / scale[group]), 1, 2**bits - 1)
    wide = scale.astype(np.float32)[groups].T
    codes = np.clip(np.round(weight / wide) + zero[groups].T, 0, 2**bits - 1)
    meant = (codes - zero[groups].T) * wide
    return {"qweight": packed(codes, bits).T.copy(), "scales": scale,
            "qzeros": packed(zero - (checkpoint_format == "gptq"), bits), "g_idx": groups.astype(np.int32)}, meant


def as_awq(weight, size=32, **_):
    """A matrix's parts as AWQ lays them, and what they stand for."""
    out, inputs = weight.shape
    blocks = weight.reshape(out, inputs // size, size)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    scale = ((high - low) / 15).astype(np.float16)
    zero = np.round(-low / scale)
    codes = np.clip(np.round(blocks / scale[..., None].astype(np.float32)) + zero[..., None], 0, 15)
    meant = ((codes - zero[..., None]) * scale[..., None].astype(np.float32)).reshape(weight.shape)

    def interleaved(values):  # word by word the outputs 0, 2, 4, 6, 1, 3, 5, 7
        return packed(values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape), 4)

    return {"qweight": interleaved(codes.reshape(weight.shape).T), "qzeros": interleaved(zero.T),
            "scales": np.ascontiguousarray(scale.T)}, meant


def write(folder, path, how, settings, biases=None):
    """Write a model with quantised matrices; return the model in torch with what they stand for."""
    path.mkdir()
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    state = model.state_dict()
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        stem = name.removesuffix(".weight")
        parts, meant = how(tensors.pop(name).astype(np.float32), **settings)
        tensors |= {f"{stem}.{part}": value for part, value in parts.items()}
        state[name].copy_(torch.from_numpy(meant))
        if biases is not None and f"{stem}.bias" not in tensors:
            tensors[f"{stem}.bias"] = np.full(len(meant), biases, np.float16)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (path / "config.json").write_text(json.dumps(config))
    return model


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize("how, settings", [(as_gptq, GPTQ), (as_gptq, GPTQ | {"bits": 8}),
                                           (as_gptq, GPTQ | {"checkpoint_format": "gptq_v2"}), (as_awq, AWQ)])
def test_logits_of_a_quantised_model(folder, tmp_path, how, settings):
    theirs = write(folder, tmp_path / "x", how, settings, biases=0)
    np.testing.assert_allclose(load_model(tmp_path / "x", "float32")(TOKENS), hf_logits(theirs, TOKENS), atol=2e-4)
    converted = convert(tmp_path / "x", tmp_path / "orbax", "float32")
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    source = resolve(tmp_path / "x")
    direct, stored = (load_params(place, source.config) for place in (source, resolve(converted)))
    for path, value in stored.items():
        assert direct[path].dtype == np.float16  # as config.json says
        np.testing.assert_array_equal(np.asarray(value).astype(np.float16), direct[path])


@pytest.mark.parametrize("file, settings", [
    ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": True}),
    ("quant_config.json", {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"})])
def test_settings_in_a_file_of_their_own(folder, tmp_path, file, settings):
    how, full = (as_gptq, GPTQ) if file == "quantize_config.json" else (as_awq, AWQ)
    theirs = write(folder, tmp_path / "x", how, full)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    (tmp_path / "x" / file).write_text(json.dumps(settings))
    np.testing.assert_allclose(load_model(tmp_path / "x", "float32")(TOKENS), hf_logits(theirs, TOKENS), atol=2e-4)


WEIGHTS = {"w4a16": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
           "w4a16, zero points": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
           "w8a16": {"num_bits": 8, "strategy": "channel", "symmetric": True},
           "w8a8": {"num_bits": 8, "strategy": "channel", "symmetric": True}}


def as_compressed(folder, path, kind):
    """Write a model as compressed-tensors' own compressor stores it; return it in torch as that library reads it."""
    path.mkdir()
    form = "int-quantized" if kind == "w8a8" else "pack-quantized"
    args = QuantizationArgs(type="int", **WEIGHTS[kind])
    activations = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True) if kind == "w8a8" else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    state, tensors = model.state_dict(), load_torch(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        stem, weight = name.removesuffix("weight"), tensors.pop(name).float()
        blocks = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        steps, half = 2**args.num_bits - 1, 2 ** (args.num_bits - 1)
        scale = (torch.maximum(-low, high) * 2 if args.symmetric else high - low) / steps
        parts = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            parts["weight_zero_point"] = (torch.round(-low / scale) - half).clamp(-half, half - 1).to(torch.int8)
        stored = compressor.compress(parts, scheme)
        tensors |= {stem + part: value.contiguous() for part, value in stored.items()}
        state[name].copy_(compressor.decompress(stored, scheme)["weight"])
    save_torch(tensors, path / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
                "config_groups": {"group_0": scheme.model_dump(mode="json")}}
    (path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())
                                                 | {"quantization_config": settings}))
    return model


@pytest.mark.parametrize("kind", WEIGHTS)
def test_logits_of_compressed_tensors(folder, tmp_path, kind):
    theirs = as_compressed(folder, tmp_path / "x", kind)
    np.testing.assert_allclose(load_model(tmp_path / "x", "float32")(TOKENS), hf_logits(theirs, TOKENS), atol=2e-4)


# --- what is refused

def test_a_bias_that_is_not_zero(folder, tmp_path):
    write(folder, tmp_path / "x", as_gptq, GPTQ, biases=1)
    with pytest.raises(UserError, match=r"_proj\.bias in .* is not zero"):
        load_model(tmp_path / "x")


@pytest.mark.parametrize("settings, said", [
    (GPTQ | {"bits": 3}, "GPTQ weights of 3 bits are not supported"),
    (GPTQ | {"checkpoint_format": "marlin"}, "in the layout 'marlin'"),
    (GPTQ | {"dynamic": {"-:.*down.*": {}, "+:.*up.*": {"bits": 8}}}, "other bits in some layers"),
    (AWQ | {"bits": 8}, "AWQ weights of 8 bits"), (AWQ | {"version": "gemv"}, "in the layout 'gemv'"),
    (AWQ | {"zero_point": False}, "without zero points"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised with bitsandbytes"),
    ({"quant_method": "compressed-tensors"}, "without config_groups"),
    ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}},
     r"4 bits \(float\)"),
    ({"quant_method": "compressed-tensors", "config_groups": {
        "a": {"weights": {"num_bits": 4, "type": "int"}}, "b": {"weights": {"num_bits": 8, "type": "int"}}}},
     "4 bits in some layers and of 8"),
    ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"},
      "config_groups": {"a": {"weights": {"num_bits": 8, "type": "int"}}}}, "sparse weights")])
def test_other_settings_are_refused(folder, tmp_path, settings, said):
    (tmp_path / "x").mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        resolve(tmp_path / "x")


def cut(part):
    def change(tensors, stem):
        tensors[f"{stem}.{part}"] = tensors[f"{stem}.{part}"][:-1].copy()
    return change


def lack(tensors, stem):
    del tensors[f"{stem}.scales"]


def far(tensors, stem):
    tensors[f"{stem}.g_idx"][3] = 99


def bad_scale(tensors, stem):
    tensors[f"{stem}.scales"][0, 0] = np.nan


@pytest.mark.parametrize("change, said", [
    (cut("scales"), "does not fit"), (cut("qzeros"), "does not fit"), (cut("g_idx"), "does not fit"),
    (cut("qweight"), "does not fit"), (lack, r"lacks .*\.scales"), (far, "inputs of group 99"), (bad_scale, "NaN")])
def test_damaged_parts_are_named(folder, tmp_path, change, said):
    write(folder, tmp_path / "x", as_gptq, GPTQ)
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    change(tensors, "model.layers.1.mlp.down_proj")
    save_file(tensors, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"down_proj.*{said}|{said}.*down_proj"):
        load_model(tmp_path / "x")


def test_packed_weights_without_settings(folder, tmp_path):
    write(folder, tmp_path / "x", as_gptq, GPTQ)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"wrong element type .*g_idx \(I32\)"):
        load_model(tmp_path / "x")
