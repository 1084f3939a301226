"""Export to each format by its name on the command line."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_jax.checkpoint import convert
from qwen_jax.cli import main


def export(src, dst, options=""):
    assert main(["export", str(src), str(dst), *options.split()]) == 0
    return dst


def test_each_format_by_its_name(shared, tmp_path, capsys):
    convert(shared / "tied", tmp_path / "orbax")
    written = {format: export(tmp_path / "orbax", tmp_path / format, f"--format {format}")
               for format in ("hf", "gguf", "stablehlo")}
    assert capsys.readouterr().out.split() == [str(path) for path in written.values()]
    assert (written["hf"] / "config.json").is_file()
    assert (written["stablehlo"] / "run.py").is_file()
    assert written["gguf"].read_bytes()[:4] == b"GGUF"
    assert (export(tmp_path / "orbax", tmp_path / "default") / "config.json").is_file()


def test_dtypes_reach_the_format(shared, tmp_path, capsys):
    assert export(shared / "tied", tmp_path / "q8.gguf", "--format gguf --dtype q8_0").is_file()
    folder = export(shared / "tied", tmp_path / "wide", "--format stablehlo --dtype float32")
    assert load_file(folder / "parameters.safetensors")["norm.scale"].dtype == np.float32
    assert main(["export", str(shared / "tied"), str(tmp_path / "hf"), "--dtype", "float32"]) == 2
    assert "hf keeps the stored element type" in capsys.readouterr().err


def test_unknown_formats_are_refused(shared, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(shared / "tied"), str(tmp_path / "out"), "--format", "onnx"])
    assert "invalid choice: 'onnx'" in capsys.readouterr().err and not (tmp_path / "out").exists()
