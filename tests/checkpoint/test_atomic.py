"""Results appear complete or not at all: existing destinations, full disks, interrupted and killed runs."""

import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
from hf_folders import siblings

import qwen_jax.checkpoint.safetensors_io as safetensors_io
from qwen_jax.atomic import new_folder, replace_file
from qwen_jax.checkpoint import convert, export, orbax_store
from qwen_jax.errors import UserError


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "broken link"])
def test_existing_destination_is_left_alone(shared, tmp_path, kind):
    dst = tmp_path / "orbax"
    if kind == "file":
        dst.write_text("mine")
    elif kind == "broken link":
        dst.symlink_to(tmp_path / "nowhere")
    else:
        dst.mkdir()
        if kind == "folder":
            (dst / "note").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        convert(shared / "tied", dst)
    assert siblings(dst) == ["orbax"] and (kind != "folder" or (dst / "note").read_text() == "mine")


def test_disk_space_is_checked_first(shared, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    monkeypatch.setattr(orbax_store, "write", lambda *args: pytest.fail("writing began"))
    with pytest.raises(UserError, match=re.escape("GB needed, 0.00 GB free")):
        convert(shared / "tied", tmp_path / "orbax")
    assert siblings(tmp_path / "orbax") == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
                                   ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device")])
def test_disk_filling_up_while_converting_leaves_nothing(shared, tmp_path, monkeypatch, error):
    save, calls = orbax_store.ocp.partial.save, []

    def fail_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        save(*args)

    monkeypatch.setattr(orbax_store.ocp.partial, "save", fail_second)
    monkeypatch.setattr(orbax_store.groups, "__defaults__", (1,))
    with pytest.raises(UserError, match="disk filled up"):
        convert(shared / "tied", tmp_path / "orbax")
    assert siblings(tmp_path / "orbax") == []


def test_a_failing_write_is_one_exception_and_no_log(tmp_path, monkeypatch, capfd, caplog):
    def fail(*args):
        logging.getLogger("absl").error("pages of traceback")
        logging.getLogger("asyncio").error("more pages")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(orbax_store.ocp.partial, "save", fail)
    hook = sys.unraisablehook
    with pytest.raises(OSError, match="No space"):
        orbax_store.write(tmp_path / "params", [{"a": np.ones(3)}])
    assert not caplog.records and "pages" not in capfd.readouterr().err
    logging.getLogger("absl").error("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"] and sys.unraisablehook is hook


def test_disk_filling_up_while_exporting_leaves_nothing(shared, tmp_path, monkeypatch):
    convert(shared / "tied", tmp_path / "orbax")

    def full(self, name, tensor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_io.SafetensorsWriter, "write", full)
    with pytest.raises(UserError, match="disk filled up"):
        export(tmp_path / "orbax", tmp_path / "back")
    assert siblings(tmp_path / "back") == ["orbax"]


def test_interrupt_leaves_nothing(shared, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax_store.ocp.partial, "finalize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(shared / "tied", tmp_path / "orbax")
    assert siblings(tmp_path / "orbax") == []


def test_killed_run_leaves_no_destination_and_the_next_run_succeeds(shared, tmp_path):
    script = ("import sys, time\nfrom qwen_jax.checkpoint import convert, orbax_store\n"
              "orbax_store.ocp.partial.finalize = lambda path: (print('ready', flush=True), time.sleep(60))\n"
              "convert(sys.argv[1], sys.argv[2])\n")
    dst = tmp_path / "orbax"
    child = subprocess.Popen([sys.executable, "-c", script, str(shared / "tied"), str(dst)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    assert len(siblings(dst)) == 1 and not dst.exists()

    other = tmp_path / "other"
    convert(shared / "tied", other)
    with pytest.raises(UserError, match="not enough"):  # a running neighbour's folder survives another run's cleaning
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: namedtuple("u", "free")(0))
            convert(shared / "tied", dst)
    assert any(name.startswith(".orbax.partial-") for name in siblings(dst))

    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    time.sleep(0.05)
    assert not dst.exists()
    convert(shared / "tied", dst)
    assert siblings(dst) == ["orbax", "other"]


@pytest.mark.parametrize("private, mode", [(False, 0o644), (True, 0o600)])
def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path, monkeypatch, private, mode):
    path, umask = tmp_path / "file", os.umask(0o022)
    try:
        for content in (b"first", b"second"):
            replace_file(path, content, private)
            assert path.read_bytes() == content and path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(umask)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"third", private)
    assert path.read_bytes() == b"second" and siblings(path) == ["file"]


def test_the_folders_of_other_users_stay_whatever_their_names_are(tmp_path, monkeypatch):
    (tmp_path / "victim").mkdir()
    (tmp_path / ".dst.partial-link").symlink_to(tmp_path / "victim")
    (tmp_path / ".dst.partial-theirs").mkdir()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with new_folder(tmp_path / "dst", 0):
        pass
    assert siblings(tmp_path / "dst") == [".dst.partial-link", ".dst.partial-theirs", "dst", "victim"]
