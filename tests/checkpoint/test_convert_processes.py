"""Conversion by several processes: the same checkpoint as by a single process, or none."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from hf_folders import hf_model, rewrite, siblings

from qwen_jax.checkpoint import conversion_workers, convert, export, orbax_store, resolve, verify
from qwen_jax.checkpoint.conversion_groups import GroupConverter
from qwen_jax.cli import main
from qwen_jax.errors import UserError


@pytest.fixture
def many_groups(monkeypatch):
    monkeypatch.setattr(orbax_store.groups, "__defaults__", (10_000,))


@pytest.fixture
def started(monkeypatch):
    """Every process that a conversion starts."""
    found, popen = [], subprocess.Popen
    monkeypatch.setattr(conversion_workers.subprocess, "Popen",
                        lambda *args, **kw: found.append(popen(*args, **kw)) or found[-1])
    return found


def contents(folder):
    """Return the bytes of every chunk, metadata as parsed JSON, and the names of files that hold paths or times."""
    found = {}
    for file in (path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        metadata = file.name in ("_METADATA", "qwen_jax.json")
        found[name] = None if file.name in ("commit_success.txt", "_CHECKPOINT_METADATA") else (
            json.loads(file.read_text()) if metadata else file.read_bytes())
    sizes = found["qwen_jax.json"].pop("files")
    return found, sizes.keys(), list(found["qwen_jax.json"]["tensors"])


@pytest.mark.parametrize("processes, options", [(2, {}), (3, {"fp8": True, "dtype": "bfloat16"})])
def test_the_same_checkpoint_as_by_one_process(tmp_path, many_groups, started, capfd, processes, options):
    hf_model(tied=False, layers=4, dtype=torch.float32 if options else torch.bfloat16).save_pretrained(
        tmp_path / "hf", max_shard_size="60KB")
    convert(tmp_path / "hf", tmp_path / "one", **options)
    capfd.readouterr()
    convert(tmp_path / "hf", tmp_path / "several", processes=processes, **options)
    assert len(started) == processes and all(process.poll() is not None for process in started)
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    verify(tmp_path / "several")
    export(tmp_path / "several", tmp_path / "back")
    assert siblings(tmp_path / "hf") == ["back", "hf", "one", "several"]
    assert not any("arning" in text or "Error" in text for text in capfd.readouterr())


def test_no_more_processes_than_groups(folder, tmp_path, started):
    convert(folder, tmp_path / "orbax", processes=5)
    assert len(started) == 1
    verify(tmp_path / "orbax")


def test_a_killed_process_leaves_nothing_and_ends_the_others(folder, tmp_path, monkeypatch, many_groups, started):
    ask, asked = conversion_workers._Worker.ask, []

    def kill_after_some(self, group):
        asked.append(group)
        if len(asked) == 4:  # two groups are written
            assert len(siblings(tmp_path / "orbax")) == 2
            self._process.kill()
        return ask(self, group)

    monkeypatch.setattr(conversion_workers._Worker, "ask", kill_after_some)
    with pytest.raises(UserError, match="processes that convert was killed by SIGKILL, and nothing was kept"):
        convert(folder, tmp_path / "orbax", processes=2)
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    assert siblings(tmp_path / "orbax") == ["hf"]


def test_bad_weights_are_named(folder, tmp_path, many_groups, started):
    rewrite(folder, lambda t: t["model.layers.1.self_attn.k_proj.bias"][-1:].fill_(float("nan")))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj\.bias holds NaN"):
        convert(folder, tmp_path / "orbax", processes=2)
    assert all(process.poll() is not None for process in started) and siblings(tmp_path / "orbax") == ["hf"]


def test_a_full_disk_and_an_interrupt_leave_nothing(folder, tmp_path, monkeypatch, many_groups, started):
    def fill(*args):
        raise RuntimeError(f"a process failed: {os.strerror(errno.ENOSPC)}")

    def interrupt(*args, **kw):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk filled up"):
        patch.setattr(conversion_workers._Worker, "ask", fill)
        convert(folder, tmp_path / "orbax", processes=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(conversion_workers, "wait", interrupt)
        convert(folder, tmp_path / "orbax", processes=2)
    assert len(started) == 4 and all(process.poll() is not None for process in started)
    assert siblings(tmp_path / "orbax") == ["hf"]


def test_a_process_ends_with_the_one_that_started_it(folder, tmp_path):
    worker = conversion_workers._Worker()
    try:
        worker.send((GroupConverter(resolve(folder)), tmp_path / "part"))
        worker._pipe.close()
        assert worker._process.wait(timeout=60) == 1
    finally:
        worker.stop()


def test_a_script_without_a_guard_converts(folder, tmp_path):
    """The processes do not run the caller's main module again, as those of `multiprocessing.Process` would."""
    script = tmp_path / "script.py"
    script.write_text("from qwen_jax import convert\n"
                      f"convert({str(folder)!r}, {str(tmp_path / 'orbax')!r}, processes=2)")
    with script.open() as stdin:
        subprocess.run([sys.executable, "-"], stdin=stdin, check=True)
    verify(tmp_path / "orbax")


@pytest.mark.parametrize("processes", [0, -1, True, 1.5, "2", None])
def test_a_number_that_is_none(folder, tmp_path, processes):
    with pytest.raises(UserError, match="must be a positive integer, not"):
        convert(folder, tmp_path / "orbax", processes=processes)


def test_on_the_command_line(folder, tmp_path, started, capsys):
    assert main(["convert", str(folder), str(tmp_path / "orbax"), "--processes", "0"]) == 2
    assert "must be a positive integer, not 0" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "orbax"), "--processes", "2"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'orbax'}\n" and started
