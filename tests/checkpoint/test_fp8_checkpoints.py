"""FP8 in checkpoints: our own, converted and exported again, and the formats of other tools."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from oracle import hf_logits, random_qwen2
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM

from qwen_jax import UserError
from qwen_jax.checkpoint import convert, export, load_model, load_params, resolve, verify
from qwen_jax.checkpoint.source import read_manifest
from qwen_jax.model import params_of
from qwen_jax.quantization import QuantizedTensor, default_precision, quantize_host

E4M3 = ml_dtypes.float8_e4m3fn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    random_qwen2(num_hidden_layers=4, hidden_size=96, intermediate_size=160).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    return convert(folder, tmp_path_factory.mktemp("fp8") / "orbax", fp8=True)


def is_eight_bit(name):
    inner = any(f"layers.{layer}." in name for layer in (1, 2))
    return inner and not any(part in name for part in ("norm", "bias", "bqkv"))


def test_what_is_stored(folder, converted):
    manifest = read_manifest(resolve(converted))["tensors"]
    assert {name for name, entry in manifest.items() if entry["dtype"] == "float8_e4m3fn"} == set(
        filter(is_eight_bit, manifest))
    size = {path: sum(file.stat().st_size for file in (path / "params").rglob("*") if file.is_file())
            for path in (converted, convert(folder, converted.parent / "plain"))}
    assert size[converted] < 0.85 * size[converted.parent / "plain"]
    verify(converted)


def test_both_ways_of_loading(folder, converted):
    source, plain = resolve(converted), load_params(resolve(folder), resolve(folder).config, "float32")
    precision = default_precision(source.config, True, None)
    eight_bit = load_params(source, source.config, "float32", precision=precision)
    at_load = load_params(resolve(folder), source.config, "float32", precision=precision)
    widened = load_params(source, source.config, "float32")
    for path, value in eight_bit.items():
        assert isinstance(value, QuantizedTensor) == is_eight_bit("model." + path + ".weight")
        if isinstance(value, QuantizedTensor):
            same = np.asarray(value.values).view(np.uint8) == np.asarray(at_load[path].values).view(np.uint8)
            assert same.mean() > 0.999
            np.testing.assert_allclose(value.scale, at_load[path].scale, rtol=1e-6)
            np.testing.assert_array_equal(widened[path], value.dequantize("float32"))
            scale = np.asarray(value.scale).reshape(value.scale.shape + (1,) * (value.values.ndim - value.scale.ndim))
            half_step = np.maximum(np.abs(plain[path]) / 16, scale * 2.0**-10)  # of 3 mantissa bits, and of subnormals
            assert (np.abs(np.asarray(widened[path]) - np.asarray(plain[path])) <= half_step * 1.001).all()
        else:
            np.testing.assert_array_equal(value, plain[path])
            np.testing.assert_array_equal(widened[path], plain[path])


def test_export_loads_in_transformers(converted, tmp_path):
    export(converted, tmp_path / "back")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 320, (2, 40))
    ours = load_model(tmp_path / "back", "float32")(tokens)
    np.testing.assert_allclose(ours, hf_logits(theirs, tokens).numpy(), atol=2e-4)
    bf16 = {path: np.asarray(value) for path, value in params_of(load_model(converted, "bfloat16")).items()}
    for path, value in params_of(load_model(tmp_path / "back", "bfloat16")).items():
        np.testing.assert_array_equal(np.asarray(value), bf16[path])


def test_a_damaged_scale_is_found(folder, tmp_path):
    convert(folder, tmp_path / "orbax", fp8=True)
    scale = next(file for file in (tmp_path / "orbax" / "params").rglob("layers.1.mlp.down.scale/*")
                 if file.is_file() and not file.name.startswith("."))
    data = bytearray(scale.read_bytes())
    data[-3] ^= 1
    scale.write_bytes(data)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight .* differs from its SHA-256"):
        verify(tmp_path / "orbax")


# --- other tools' folders

BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CHANNELS = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {
    "targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}}


def as_others_write(folder, path, kind):
    """Make the folder's matrices e4m3; return the values that they stand for by Hugging Face's names."""
    path.mkdir()
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(tensors.items()):
        if "proj.weight" not in name:
            continue
        wide, size = tensor.astype(np.float32), 128 if kind == "block" else None
        if kind == "channel":
            scale = np.abs(wide).max(axis=1, keepdims=True) / 448
            spread = scale
        elif kind == "tensor":
            scale = spread = np.float32(np.abs(wide).max() / 448)
        else:
            rows, columns = (-(-n // size) for n in wide.shape)
            scale = np.array([[np.abs(wide[r * size:(r + 1) * size, c * size:(c + 1) * size]).max() / 448
                               for c in range(columns)] for r in range(rows)], np.float32)
            spread = np.kron(scale, np.ones((size, size), np.float32))[:wide.shape[0], :wide.shape[1]]
        tensors[name] = (wide / spread).astype(E4M3)
        scale_name = name + ("_scale_inv" if kind == "block" else "_scale")
        tensors[scale_name] = np.asarray(scale, np.float32)
        if kind == "tensor":
            tensors[name.replace(".weight", ".input_scale")] = np.ones((), np.float32)
        meant[name] = tensors[name].astype(np.float32) * spread
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = BLOCKS if kind == "block" else CHANNELS
    (path / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
def test_formats_of_other_tools(folder, tmp_path, kind):
    meant = as_others_write(folder, tmp_path / kind, kind)
    params = load_params(resolve(tmp_path / kind), resolve(folder).config)
    down = "model.layers.2.mlp.down_proj.weight"
    np.testing.assert_array_equal(np.asarray(params["layers.2.mlp.down"]), meant[down].astype(ml_dtypes.bfloat16))
    gate, up = (meant[f"model.layers.0.mlp.{name}_proj.weight"].astype(ml_dtypes.bfloat16) for name in ("gate", "up"))
    np.testing.assert_array_equal(np.asarray(params["layers.0.mlp.gate_up"]), np.stack([gate, up]))
    converted = convert(tmp_path / kind, tmp_path / "orbax", fp8=True)
    assert "quantization_config" not in json.loads((converted / "config.json").read_text())
    if kind == "channel":  # the same values again
        source = resolve(converted)
        again = load_params(source, source.config, precision=default_precision(source.config, True, None))
        values = np.asarray(again["layers.2.mlp.down"].values)
        np.testing.assert_array_equal(values.view(np.uint8), quantize_host(meant[down], 1)[0].view(np.uint8))


def break_(tensors, name, what):
    scale = name + "_scale"
    if what == "missing":
        del tensors[scale]
    elif what == "shape":
        tensors[scale] = tensors[scale][:-1]
    elif what == "both":
        tensors[scale + "_inv"] = tensors[scale]
    elif what == "e5m2":
        tensors[name] = tensors[name].astype(np.float32).astype(ml_dtypes.float8_e5m2)
    elif what == "nan":
        tensors[name].view(np.uint8)[0, 0] = 0x7F
    else:
        tensors[scale][3] = what


@pytest.mark.parametrize("what, message", [
    ("missing", "is FP8 and has no scale"), ("shape", "scales neither .* nor its rows"), ("both", "has two scales"),
    ("e5m2", r"wrong element type .*F8_E5M2"), ("nan", "holds NaN"), (0, "holds zero"), (-1, "a negative number"),
    (np.nan, "NaN or Inf"), (np.inf, "NaN or Inf")])
def test_damaged_scales_and_values_are_refused(folder, tmp_path, what, message):
    as_others_write(folder, tmp_path / "x", "channel")
    tensors = {name: tensor.view(torch.uint8).numpy().copy().view(E4M3) if tensor.dtype == torch.float8_e4m3fn
               else tensor.view(torch.int16).numpy().copy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16
               else tensor.numpy().copy() for name, tensor in load_torch(tmp_path / "x" / "model.safetensors").items()}
    break_(tensors, "model.layers.1.self_attn.o_proj.weight", what)
    save_file(tensors, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_params(resolve(tmp_path / "x"), resolve(folder).config)


@pytest.mark.parametrize("config", [
    {**BLOCKS, "weight_block_size": [64, 64]},
    {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 2, "type": "int"}}}},
    {"quant_method": "compressed-tensors"}])
def test_other_quantisation_is_refused(folder, tmp_path, config):
    as_others_write(folder, tmp_path / "x", "channel")
    facts = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "x" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="not supported: use another release"):
        resolve(tmp_path / "x")
