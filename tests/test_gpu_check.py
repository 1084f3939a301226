"""Rehearse the GPU check without a GPU."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_rehearsal_reports_every_part(tmp_path):
    run = subprocess.run([ROOT / "scripts/gpu_check.sh", "--rehearse"], env=os.environ | {"OUT": str(tmp_path)},
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(report) == ["facts", "tests", "ceilings", "dense prefill", "sparse prefill", "decode", "tuning"]
    assert [row["tokens"] for row in report["sparse prefill"]] == [512, 1024]
    assert max(report[part][0]["distance"] for part in ("dense prefill", "sparse prefill")) < 1e-2
    assert "## decode" in (tmp_path / "gpu_check.md").read_text()


def test_without_a_gpu_it_says_so(tmp_path):
    env = os.environ | {"OUT": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([ROOT / "scripts/gpu_check.sh"], env=env, capture_output=True, text=True)
    assert run.returncode == 2 and "jax sees no GPU" in run.stderr
