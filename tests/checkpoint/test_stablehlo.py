"""Exported programs give the same logits, for any shape, in a process without this package."""

import json
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from hf_folders import hf_model, siblings
from safetensors.flax import load_file

from qwen_jax.checkpoint import convert, export_stablehlo, load_model, load_params, resolve
from qwen_jax.errors import UserError

# Importing any of these fails there.
ELSEWHERE = """
import runpy, sys
sys.modules.update(dict.fromkeys(["qwen_jax", "qwen_kernels", "flax", "transformers", "orbax", "torch"]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_elsewhere(folder, *arguments):
    """Return what ``run.py`` prints in a process of its own, in another folder."""
    command = [sys.executable, "-I", "-c", ELSEWHERE, str(folder / "run.py")]
    done = subprocess.run([*command, *map(str, arguments)], cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(folder, tokens):
    """Return the program's logits, computed in this process."""
    program = jax.export.deserialize(bytearray((folder / "logits.jaxexport").read_bytes()))
    return np.asarray(program.call(load_file(folder / "parameters.safetensors"), np.asarray(tokens, np.int32)))


def own_logits(ref, tokens, dtype="float32"):
    """Return the logits of the model that `load_model` returns."""
    return np.asarray(jax.jit(load_model(ref, dtype))(np.asarray(tokens)))


@pytest.mark.parametrize("name", ["tied", "sharded"])
def test_a_fresh_process_computes_the_same_logits(shared, tmp_path, name):
    folder = export_stablehlo(shared / name, tmp_path / "out" / "program", "float32")
    tokens = np.random.default_rng(0).integers(0, 320, (3, 70))
    np.save(tmp_path / "tokens.npy", tokens)
    run_elsewhere(folder, "--tokens", tmp_path / "tokens.npy", "--logits", tmp_path / "logits.npy")
    logits = np.load(tmp_path / "logits.npy")
    assert logits.dtype == np.float32 and logits.shape == (3, 70, 320)
    np.testing.assert_allclose(logits, own_logits(shared / name, tokens), atol=2e-5)
    np.testing.assert_array_equal(logits, call(folder, tokens))
    assert siblings(folder) == ["program"]


def test_a_fresh_process_continues_greedily_and_stops(tmp_path):
    folder = export_stablehlo("bundled", tmp_path / "program", "float32")
    stops = folder / "generation_config.json"
    assert json.loads(stops.read_text())["eos_token_id"] == [942, 940]
    model, prompts = jax.jit(load_model("bundled", "float32")), [[941, 486, 198, 71, 288], [552, 328, 15, 16, 786]]
    rows = np.pad(prompts, ((0, 0), (0, 5)))
    for length in range(5, 10):
        rows[:, length] = np.asarray(model(rows))[:, length - 1].argmax(-1)
    first, second = rows[:, 5:].tolist()
    stop = first[2]
    assert stop not in first[:2] + second
    stops.write_text(json.dumps({"eos_token_id": [stop]}))
    np.save(tmp_path / "tokens.npy", prompts)
    printed = run_elsewhere(folder, "--tokens", tmp_path / "tokens.npy", "--max-tokens", 5).splitlines()
    assert [list(map(int, line.split())) for line in printed] == [first[:3], second]


def test_any_shape_runs(shared, tmp_path):
    folder = export_stablehlo(shared / "tied", tmp_path / "program", "float32")
    for shape in ((1, 1), (2, 130)):
        tokens = np.random.default_rng(1).integers(0, 320, shape)
        np.testing.assert_allclose(call(folder, tokens), own_logits(shared / "tied", tokens), atol=2e-5)


def test_bfloat16_is_the_default_and_costs_no_more_than_the_models_own(shared, tmp_path):
    folder = export_stablehlo(shared / "tied", tmp_path / "program")
    assert {str(array.dtype) for array in load_file(folder / "parameters.safetensors").values()} == {"bfloat16"}
    tokens = np.random.default_rng(2).integers(0, 320, (2, 40))
    exact = own_logits(shared / "tied", tokens)
    own = np.abs(own_logits(shared / "tied", tokens, "bfloat16") - exact).max()
    assert 0 < np.abs(call(folder, tokens) - exact).max() < 1.5 * own


def test_converted_fp8_checkpoints_are_written_as_what_they_stand_for(tmp_path):
    hf_model(layers=3).save_pretrained(tmp_path / "hf")
    source = resolve(convert(tmp_path / "hf", tmp_path / "fp8", fp8=True))
    written = load_file(export_stablehlo(source, tmp_path / "program", "float32") / "parameters.safetensors")
    expected = load_params(source, source.config, "float32")
    assert written.keys() == expected.keys()
    for name, value in written.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_the_program_is_for_several_platforms_and_holds_no_weights_and_no_paths(shared, tmp_path):
    folder = export_stablehlo(shared / "tied", tmp_path / "program", "float32")
    stored = (folder / "logits.jaxexport").read_bytes()
    assert jax.export.deserialize(bytearray(stored)).platforms == ("cpu", "cuda", "tpu")
    assert len(stored) < 40_000 < (folder / "parameters.safetensors").stat().st_size
    assert b".py" not in stored


def test_side_files_are_copied_and_the_folder_is_no_model_here(tmp_path):
    folder = export_stablehlo("bundled", tmp_path / "program")
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == 940
    with pytest.raises(UserError, match="no config.json"):
        load_model(folder)


def test_bad_destinations_dtypes_and_a_missing_package_are_refused(shared, tmp_path, monkeypatch):
    (tmp_path / "program").mkdir()
    with pytest.raises(UserError, match="already exists"):
        export_stablehlo(shared / "tied", tmp_path / "program")
    with pytest.raises(UserError, match="int8"):
        export_stablehlo(shared / "tied", tmp_path / "other", "int8")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match=r"pip install 'qwen-jax\[stablehlo\]'"):
        export_stablehlo(shared / "tied", tmp_path / "other")
    assert siblings(tmp_path / "program") == ["program"]
