"""Calibrations of released models in the package: found by weights, and not by other ones."""
import json
import logging

import numpy as np
import pytest
from oracle import random_qwen2
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax import Engine
from qwen_jax.checkpoint import convert, read_calibrated, read_sparsity, resolve, shipped_calibration, write_sparsity
from qwen_jax.checkpoint.shipped_calibration import calibration_folder, write_model
from qwen_jax.checkpoint.source import SPARSITY

torch = pytest.importorskip("torch")
LAYERS = (Sparsity(budget=0.5, dense_heads=(1,)), Sparsity(budget=2))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    random_qwen2().save_pretrained(folder)
    return folder


@pytest.fixture
def shipped(released, tmp_path, monkeypatch):
    """The package has a calibration of the model `released`, and of another shape."""
    monkeypatch.setattr(shipped_calibration, "SHIPPED_CALIBRATIONS", tmp_path / "shipped")
    for name in ("small", "wide"):
        folder = tmp_path / "shipped" / name
        folder.mkdir(parents=True)
        write_sparsity(folder, LAYERS, {})
        write_model(folder, f"Released-{name}", resolve(released))
    facts = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(facts | {"shape": [1, 2, 3]}))
    return tmp_path / "shipped" / "small"


def trained(folder, change: float):
    """Save the released model after a change of all its weights, by a share of each."""
    hf, rng = random_qwen2(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in hf.parameters():
            value *= 1 + change * torch.randn(value.shape, generator=rng)
    hf.save_pretrained(folder)
    return resolve(folder)


def test_the_same_weights_have_it(released, shipped, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert read_sparsity(resolve(released), resolve(released).config) == LAYERS
    assert "has the calibration of Released-small" in caplog.text and "fine-tuned" not in caplog.text
    assert read_calibrated(resolve(released), resolve(released).config) is None, "there is no such file"
    half = random_qwen2().to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert calibration_folder(resolve(tmp_path / "half"), SPARSITY) == shipped
    assert calibration_folder(resolve(convert(released, tmp_path / "orbax")), SPARSITY) == shipped
    engine = Engine.from_pretrained(released, tokenizer=None, warmup=False, max_batch_size=2, max_seq_len=128)
    assert engine.sparsity == LAYERS


def test_its_own_file_comes_first(released, shipped, tmp_path):
    source = trained(tmp_path / "own", 0.0)
    write_sparsity(source.path, (Sparsity(),) * 2, {})
    assert read_sparsity(source, source.config) == (Sparsity(),) * 2


def test_a_fine_tune_has_it_with_a_warning(shipped, tmp_path, caplog):
    source = trained(tmp_path / "tuned", 0.02)
    assert read_sparsity(source, source.config) == LAYERS
    assert "as if fine-tuned: `qwen-jax calibrate` measures its own" in caplog.text


def test_other_weights_have_none(shipped, tmp_path, caplog):
    for change in (0.2, 2.0):
        source = trained(tmp_path / f"{change}", change)
        assert read_sparsity(source, source.config) is None and not caplog.text


def test_the_package_files_can_be_read():
    folders = [file.parent for file in shipped_calibration.SHIPPED_CALIBRATIONS.glob("*/model.json")]
    assert folders
    for folder in folders:
        facts = json.loads((folder / "model.json").read_text())
        layers, kv_heads = facts["shape"][0], facts["shape"][4]
        stored = json.loads((folder / SPARSITY).read_text())["layers"]
        assert len(stored) == layers and all(head < kv_heads for layer in stored for head in layer["dense_heads"])
        assert all(np.all(np.isfinite(values)) and len(values) == 64 for values in facts["fingerprint"].values())
