"""Folders shared by the tests of this package."""

import json
import shutil

import pytest
from hf_folders import hf_model


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Folders made once: tied, untied in shards. Tests copy what they damage."""
    root = tmp_path_factory.mktemp("hf")
    hf_model(tied=True).save_pretrained(root / "tied")
    hf_model(tied=False).save_pretrained(root / "sharded", max_shard_size="40KB")
    (root / "sharded" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "top_k": 20}))
    assert len(list((root / "sharded").glob("*.safetensors"))) > 3
    return root


@pytest.fixture
def folder(shared, tmp_path):
    """A private copy of the tied model."""
    copy = tmp_path / "hf"
    shutil.copytree(shared / "tied", copy)
    return copy
