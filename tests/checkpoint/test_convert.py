"""Convert and export: bit-exact, in little memory, and clear about bad input."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from hf_folders import hf_model, read_tensors, rewrite, same_bits, siblings
from safetensors.torch import save_file
from transformers import Qwen2ForCausalLM

import qwen_jax.checkpoint.safetensors_io as safetensors_io
from qwen_jax.checkpoint import convert, export, load_params, orbax_store, resolve, save_hf
from qwen_jax.checkpoint.hf_layout import hf_shapes
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError


@pytest.mark.parametrize("name", ["tied", "sharded"])
def test_round_trip_keeps_every_bit(shared, tmp_path, name):
    convert(shared / name, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=50_000)
    assert same_bits(read_tensors(shared / name), read_tensors(tmp_path / "back"))
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    assert siblings(tmp_path / "back") == ["back", "orbax"]
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (shared / name / "config.json").read_text())
    ours = Qwen2ForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    theirs = Qwen2ForCausalLM.from_pretrained(shared / name, dtype=torch.bfloat16)
    assert same_bits(dict(ours.state_dict()), dict(theirs.state_dict()))


def test_single_file_export_and_side_files(shared, tmp_path):
    convert(shared / "sharded", tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    assert [p.name for p in (tmp_path / "back").glob("*.safetensors*")] == ["model.safetensors"]
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["top_k"] == 20


def test_manifest_names_every_tensor_with_its_hash(shared, tmp_path):
    convert(shared / "sharded", tmp_path / "orbax")
    manifest = json.loads((tmp_path / "orbax" / "qwen_jax.json").read_text())
    tensors = read_tensors(shared / "sharded")
    assert manifest["tensors"].keys() == tensors.keys()
    assert manifest["dtype"] == manifest["source_dtype"] == "bfloat16"
    for name, tensor in tensors.items():
        digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        assert manifest["tensors"][name] == {"dtype": "bfloat16", "shape": list(tensor.shape), "sha256": digest}


def test_stored_element_type_can_be_chosen(shared, tmp_path):
    convert(shared / "tied", tmp_path / "orbax", dtype="float32")
    export(tmp_path / "orbax", tmp_path / "back")
    widened = {name: tensor.float() for name, tensor in read_tensors(shared / "tied").items()}
    assert same_bits(widened, read_tensors(tmp_path / "back"))
    assert ModelConfig.from_hf(tmp_path / "back").dtype == "float32"


def test_tied_head_stored_as_a_copy_is_accepted_and_dropped(folder, tmp_path):
    original = read_tensors(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert(folder, tmp_path / "orbax")
    export(tmp_path / "orbax", tmp_path / "back")
    assert same_bits(original, read_tensors(tmp_path / "back"))


def test_tied_head_that_differs_is_refused(folder, tmp_path):
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UserError, match="ties the head"):
        convert(folder, tmp_path / "orbax")


def test_rotary_buffers_are_passed_over(folder, tmp_path):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    convert(folder, tmp_path / "orbax")


def test_save_hf_writes_what_transformers_reads(tmp_path):
    from qwen_jax.model import init

    config = ModelConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
                         num_kv_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True)
    model = init(config, seed=3)
    save_hf(model, config, tmp_path / "hf")
    tokens = np.arange(12).reshape(2, 6)
    with torch.no_grad():
        theirs = Qwen2ForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(torch.tensor(tokens)).logits
    np.testing.assert_allclose(np.asarray(model(tokens)), theirs.numpy(), atol=2e-4)
    params = load_params(resolve(tmp_path / "hf"), config)
    save_hf(params, config, tmp_path / "again")
    assert same_bits(read_tensors(tmp_path / "hf"), read_tensors(tmp_path / "again"))
    with pytest.raises(UserError, match="norm.scale"):
        save_hf({k: v for k, v in params.items() if k != "norm.scale"}, config, tmp_path / "less")


def test_missing_unexpected_and_misshapen_come_in_one_message(folder, tmp_path):
    def damage(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.ones(1)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(2, 3)

    rewrite(folder, damage)
    with pytest.raises(UserError) as caught:
        convert(folder, tmp_path / "orbax")
    message = str(caught.value)
    assert "1 missing: model.norm.weight" in message
    assert "1 unexpected: model.extra" in message
    assert "1 misshapen: model.layers.1.mlp.up_proj.weight is [2, 3], should be [80, 48]" in message
    assert "\n" not in message and siblings(tmp_path / "orbax") == ["hf"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nan_is_named_and_nothing_is_left(folder, tmp_path, value, dtype):
    def damage(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors["model.layers.1.self_attn.k_proj.bias"][-1] = value

    rewrite(folder, damage)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.bias holds NaN or Inf"):
        convert(folder, tmp_path / "orbax")
    assert siblings(tmp_path / "orbax") == ["hf"]


def test_value_that_does_not_fit_the_new_type_is_refused(folder, tmp_path):
    rewrite(folder, lambda t: t["model.norm.weight"].fill_(1e6))
    with pytest.raises(UserError, match="model.norm.weight holds NaN or Inf in float16"):
        convert(folder, tmp_path / "orbax", dtype="float16")


@pytest.mark.parametrize("dtype, message", [
    (torch.int8, "wrong element type .*model.norm.weight"), (torch.float64, "wrong element type .*model.norm.weight"),
    (torch.float8_e4m3fn, "model.norm.weight is FP8 and has no scale")])
def test_wrong_element_type_is_named(folder, tmp_path, dtype, message):
    rewrite(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))
    with pytest.raises(UserError, match=message):
        convert(folder, tmp_path / "orbax")


def test_mixed_types_inside_one_parameter_need_a_choice(folder, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({name: t[name].float()}))
    with pytest.raises(UserError, match=f"{name} is float32"):
        convert(folder, tmp_path / "orbax")
    convert(folder, tmp_path / "orbax", dtype="bfloat16")
    manifest = json.loads((tmp_path / "orbax" / "qwen_jax.json").read_text())
    assert (manifest["dtype"], manifest["source_dtype"]) == ("bfloat16", "mixed")


@pytest.mark.parametrize("keep", [3, 100, 2000, -1])
def test_truncated_file_is_refused(folder, tmp_path, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors is truncated or corrupt"):
        convert(folder, tmp_path / "orbax")


def test_corrupt_header_is_refused(folder, tmp_path):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = os.urandom(32)
    file.write_bytes(data)
    with pytest.raises(UserError, match="truncated or corrupt"):
        convert(folder, tmp_path / "orbax")


def test_missing_shard_is_named(shared, tmp_path):
    shutil.copytree(shared / "sharded", tmp_path / "hf")
    victim = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(UserError, match=f"missing shard {victim.name}"):
        convert(tmp_path / "hf", tmp_path / "orbax")


def test_shards_that_disagree_with_their_index_are_named(shared, tmp_path):
    shutil.copytree(shared / "sharded", tmp_path / "hf")
    first, second, *_ = sorted((tmp_path / "hf").glob("*.safetensors"))
    shutil.copyfile(first, second)
    with pytest.raises(UserError, match=f"stored in both {first.name} and {second.name}"):
        convert(tmp_path / "hf", tmp_path / "orbax")
    save_file({"other": torch.ones(1)}, second)
    with pytest.raises(UserError, match=f"{second.name} lacks "):
        convert(tmp_path / "hf", tmp_path / "orbax")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x.safetensors"}}'])
def test_bad_index_is_refused(shared, tmp_path, text):
    shutil.copytree(shared / "sharded", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="index"):
        convert(tmp_path / "hf", tmp_path / "orbax")


def test_damage_after_conversion_is_found_by_its_hash(shared, tmp_path):
    convert(shared / "tied", tmp_path / "orbax")
    files = [path for path in (tmp_path / "orbax" / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[2000] ^= 1
    largest.write_bytes(data)
    with pytest.raises(UserError, match="model.embed_tokens.weight .* differs from its SHA-256"):
        export(tmp_path / "orbax", tmp_path / "back")
    assert siblings(tmp_path / "back") == ["orbax"]


def test_requests_that_make_no_sense(shared, tmp_path):
    with pytest.raises(UserError, match="'int8' is not supported"):
        convert(shared / "tied", tmp_path / "orbax", dtype="int8")
    convert(shared / "tied", tmp_path / "orbax")
    with pytest.raises(UserError, match="already converted"):
        convert(tmp_path / "orbax", tmp_path / "again")
    with pytest.raises(UserError, match="already a Hugging Face folder"):
        export(shared / "tied", tmp_path / "again")
    with pytest.raises(UserError, match="max_shard_bytes"):
        export(tmp_path / "orbax", tmp_path / "again", max_shard_bytes=0)


def test_memory_stays_within_one_group(tmp_path, monkeypatch):
    """A group's arrays are freed before the first tensor of the next group is read."""
    hf_model(layers=4).save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(orbax_store.groups, "__defaults__", (40_000,))
    save, read, saved, sizes = orbax_store.ocp.partial.save, safetensors_io.SafetensorsFolder.read, [], []

    def watch_save(path, piece):
        save(path, piece)
        saved.extend(weakref.ref(array) for array in piece.values())
        sizes.append(sum(array.nbytes for array in piece.values()))

    def watch_read(self, name, dtype=None):
        assert not any(ref() is not None for ref in saved), "an earlier group is still in memory"
        return read(self, name, dtype)

    monkeypatch.setattr(orbax_store.ocp.partial, "save", watch_save)
    monkeypatch.setattr(safetensors_io.SafetensorsFolder, "read", watch_read)
    convert(tmp_path / "hf", tmp_path / "orbax")
    assert len(sizes) > 3 and max(sizes) <= 40_000


def test_peak_memory_as_the_kernel_counts_it(shared, tmp_path):
    """128 MB in groups of 32 MB, after a first conversion has paid for imports and threads: growth under 2 groups."""
    config = ModelConfig(vocab_size=16_384, hidden_size=1024, intermediate_size=5120, num_layers=3, num_heads=8,
                         num_kv_heads=4, head_dim=64, tie_word_embeddings=True, dtype="bfloat16")
    (tmp_path / "hf").mkdir()
    with open(tmp_path / "hf" / "model.safetensors", "wb") as file:  # zeros: only the header needs writing
        header, end = {}, 0
        for name, shape in hf_shapes(config).items():
            size = int(np.prod(shape)) * 2
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end > 128e6
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config.to_hf()))
    script = ("import sys\nfrom qwen_jax.checkpoint import convert, orbax_store\n"
              "orbax_store.groups.__defaults__ = (32 << 20,)\n"
              "def peak(): return next(int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmHWM'))\n"
              "convert(sys.argv[1], sys.argv[2] + '1')\nbefore = peak()\nconvert(sys.argv[3], sys.argv[2] + '2')\n"
              "print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", script, str(shared / "tied"), str(tmp_path / "out"),
                           str(tmp_path / "hf")], check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) < 1.9 * 32 * 1024  # kB; 52,400 measured, 73,700 when Orbax copies its input


def test_a_model_of_another_shape_is_not_calibrated_as_its_source(tmp_path):
    """Calibration is measured layer by layer: an engine of a model with fewer layers would refuse it."""
    from dataclasses import replace

    from qwen_jax.model import init

    source = resolve("bundled")
    for name, config in (("same", source.config), ("fewer", replace(source.config, num_layers=2))):
        save_hf(init(config, seed=1), config, tmp_path / name, source.path)
    assert (tmp_path / "same" / "eight_bit.json").is_file() and (tmp_path / "fewer" / "tokenizer.json").is_file()
    assert not (tmp_path / "fewer" / "eight_bit.json").exists()
