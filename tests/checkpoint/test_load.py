"""Weights read from folders, from Orbax and from a transformers model, compared with torch's values."""

import gc
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_folders import hf_model, rewrite
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from qwen_jax.checkpoint import convert, from_transformers, load_model, load_params, resolve
from qwen_jax.errors import UserError
from qwen_jax.model import build

TOKENS = np.arange(24).reshape(2, 12) * 13 % 320


@pytest.fixture(scope="module")
def converted(shared, tmp_path_factory):
    root = tmp_path_factory.mktemp("orbax")
    for name in ("tied", "sharded"):
        convert(shared / name, root / name)
    return root


def bits(params):
    return {path: (str(array.dtype), array.shape, np.asarray(array).tobytes()) for path, array in params.items()}


@pytest.mark.parametrize("name", ["tied", "sharded"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32", "float16"])
def test_orbax_and_hugging_face_give_the_same_parameters(shared, converted, name, dtype):
    hf, orbax = resolve(shared / name), resolve(converted / name)
    assert (hf.kind, orbax.kind) == ("hf", "orbax")
    a, b = load_params(hf, hf.config, dtype), load_params(orbax, orbax.config, dtype)
    assert list(a) == list(b) and bits(a) == bits(b)
    assert {str(array.dtype) for array in b.values()} == {dtype or "bfloat16"}
    assert all(isinstance(array, jax.Array) and array.sharding == a[path].sharding for path, array in b.items())


@pytest.mark.parametrize("name", ["tied", "sharded"])
def test_logits_are_transformers(shared, converted, name):
    with torch.no_grad():
        theirs = Qwen2ForCausalLM.from_pretrained(shared / name, dtype=torch.float32)(torch.tensor(TOKENS)).logits
    for folder in (shared, converted):
        np.testing.assert_allclose(np.asarray(load_model(folder / name, "float32")(TOKENS)), theirs.numpy(), atol=2e-4)


def test_each_device_receives_its_part_already_cast(shared, converted):
    """Four virtual devices, in a process of its own because their number is fixed when JAX starts."""
    script = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from qwen_jax.checkpoint import load_params, resolve
mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
cut = {"embed.weight": P("tensor"), "layers.0.mlp.gate_up": P(None, "tensor"), "layers.1.mlp.down": P(None, "tensor")}
whole = P()
for folder in sys.argv[1:]:
    source = resolve(folder)
    plain = load_params(source, source.config)
    shardings = {path: NamedSharding(mesh, cut.get(path, whole)) for path in plain}
    params = load_params(source, source.config, "float32", shardings)
    for path, array in params.items():
        assert array.sharding == shardings[path] and array.dtype == np.float32, path
        np.testing.assert_array_equal(np.asarray(array), np.asarray(plain[path]).astype(np.float32))
    assert params["embed.weight"].addressable_shards[3].data.shape == (80, 48)
print("sharded")
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script, str(shared / "tied"), str(converted / "tied")],
                          env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "sharded\n", done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_transformers_model_in_memory(tied, dtype):
    model = hf_model(tied=tied, dtype=dtype)
    config, params = from_transformers(model)
    assert config.tie_word_embeddings is tied and ("head.weight" in params) is not tied
    if dtype == torch.float32:
        with torch.no_grad():
            theirs = model(torch.tensor(TOKENS)).logits.numpy()
        np.testing.assert_allclose(np.asarray(build(config, params)(TOKENS)), theirs, atol=2e-4)
    else:
        assert params["norm.scale"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(params["norm.scale"], np.float32),
                                      model.model.norm.weight.detach().float().numpy())
    before = np.asarray(params["norm.scale"], np.float32)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    np.testing.assert_array_equal(np.asarray(params["norm.scale"], np.float32), before)


def test_a_head_that_differs_in_a_model_whose_config_ties_it_is_refused():
    """As in a folder. Otherwise the model would answer with other logits than it had."""
    model = hf_model(tied=True, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    from_transformers(model)  # a copy that is equal
    with torch.no_grad():
        model.lm_head.weight[3, 2] += 1
    with pytest.raises(UserError, match="set its tie_word_embeddings to False"):
        from_transformers(model)
    model.config.tie_word_embeddings = False
    config, params = from_transformers(model)
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(np.asarray(build(config, params)(TOKENS)), theirs, atol=2e-4)


def test_other_transformers_models_are_refused():
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2))
    with pytest.raises(UserError, match="must be a transformers Qwen2ForCausalLM, not LlamaForCausalLM"):
        from_transformers(llama)
    with pytest.raises(UserError, match="not Qwen2Model"):
        from_transformers(hf_model().model)
    broken = hf_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="model.norm.weight holds NaN"):
        from_transformers(broken)
    with pytest.raises(UserError, match="float64"):
        from_transformers(hf_model(dtype=torch.float64))
    with pytest.raises(UserError, match="meta tensor"):
        from_transformers(hf_model().to("meta"))


def test_bad_weights_are_refused_when_loading_a_folder(folder):
    rewrite(folder, lambda t: t["model.layers.0.mlp.down_proj.weight"].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.down_proj\.weight holds NaN"):
        load_model(folder)
    rewrite(folder, lambda t: t.pop("model.layers.0.mlp.down_proj.weight"))
    with pytest.raises(UserError, match="1 missing"):
        load_model(folder)


def test_unknown_dtype_is_refused(shared):
    for dtype in ("float8_e4m3fn", "int32", "half-ish", 3):
        with pytest.raises(UserError, match="is not supported for weights"):
            load_model(shared / "tied", dtype)


@pytest.mark.parametrize(("damage", "said"), [
    ("truncated", "embed.weight/.* is truncated"), ("no data", "mlp.down/.* is missing"),
    ("no metadata", "_METADATA is missing"), ("other config", "12 missing: model.layers.2"),
    ("manifest", "qwen_jax.json is damaged"), ("no tensors", "do not match"),
])
def test_damaged_orbax_checkpoint_is_one_line(converted, tmp_path, capfd, caplog, damage, said):
    folder = tmp_path / "orbax"
    shutil.copytree(converted / "tied", folder)
    files = [path for path in (folder / "params").rglob("*") if path.is_file()]
    if damage == "truncated":
        largest = max(files, key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:1000])
    elif damage == "no data":
        for path in files:
            if path.parent.name == "layers.0.mlp.down":
                path.unlink()
    elif damage == "no metadata":
        for path in files:
            if path.name == "_METADATA":
                path.unlink()
    elif damage == "manifest":
        (folder / "qwen_jax.json").write_text("{}")
    elif damage == "no tensors":
        manifest = json.loads((folder / "qwen_jax.json").read_text())
        (folder / "qwen_jax.json").write_text(json.dumps({**manifest, "tensors": {}}))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError, match=said) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    del caught
    gc.collect()
    assert capfd.readouterr().err == "" and not caplog.records
