"""Formats by name."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_jax.checkpoint import FORMATS, convert, export_as
from qwen_jax.errors import UserError


def test_each_format_by_its_name(shared, tmp_path):
    convert(shared / "tied", tmp_path / "orbax")
    written = {format: export_as(tmp_path / "orbax", tmp_path / format, format) for format in FORMATS}
    assert (written["hf"] / "config.json").is_file()
    assert (written["stablehlo"] / "run.py").is_file()
    assert written["gguf"].read_bytes()[:4] == b"GGUF"
    assert export_as(tmp_path / "orbax", tmp_path / "default") and (tmp_path / "default" / "config.json").is_file()


def test_dtypes_reach_the_format(shared, tmp_path):
    export_as(shared / "tied", tmp_path / "q8.gguf", "gguf", "q8_0")
    assert (tmp_path / "q8.gguf").is_file()
    folder = export_as(shared / "tied", tmp_path / "wide", "stablehlo", "float32")
    assert load_file(folder / "parameters.safetensors")["norm.scale"].dtype == np.float32
    with pytest.raises(UserError, match="hf keeps the stored element type"):
        export_as(shared / "tied", tmp_path / "hf", "hf", "float32")


def test_unknown_formats_are_refused(shared, tmp_path):
    with pytest.raises(UserError, match="unknown format 'onnx': use hf, gguf, stablehlo"):
        export_as(shared / "tied", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
