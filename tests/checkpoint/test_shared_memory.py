"""Copies of checkpoints in shared memory: made once for several processes, identical, gone with the last process."""
import multiprocessing
import os
import shutil

import numpy as np
import pytest

from qwen_jax.checkpoint import convert, load_params, resolve
from qwen_jax.checkpoint.shared_memory import release, shared_copy
from qwen_jax.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return convert("bundled", tmp_path_factory.mktemp("converted") / "it")


def user(checkpoint, root, begun, end):
    """Hold a copy, in another process, until told to end; first send the file that is read."""
    copy = shared_copy(resolve(checkpoint), root)
    begun.put((str(copy.path), os.stat(copy.path / "model.safetensors").st_ino))
    end.wait(60)
    if end.is_set():
        release()
    os._exit(0)


def start(checkpoint, root, count):
    context = multiprocessing.get_context("spawn")
    begun, ends = context.Queue(), [context.Event() for _ in range(count)]
    processes = [context.Process(target=user, args=(checkpoint, root, begun, end)) for end in ends]
    for process in processes:
        process.start()
    return processes, ends, [begun.get(timeout=60) for _ in processes]


def test_several_processes_read_one_copy(checkpoint, tmp_path):
    root = tmp_path / "memory"
    processes, ends, read = start(checkpoint, root, 3)
    assert len(set(read)) == 1  # the same file: it was written once
    source = resolve(checkpoint)
    copy = shared_copy(source, root)
    assert str(copy.path) == read[0][0] and copy.kind == "hf"
    mine, theirs = (load_params(one, one.config, "float32") for one in (source, copy))
    for path, value in mine.items():
        np.testing.assert_array_equal(theirs[path], value, err_msg=path)
    for process, end in zip(processes, ends, strict=True):
        end.set()
        process.join(10)
    assert copy.path.exists()  # this process still has it
    release()
    assert not list(root.iterdir())


def test_what_a_killed_process_leaves_is_removed_by_the_next(checkpoint, tmp_path):
    root = tmp_path / "memory"
    (process,), _, (read,) = start(checkpoint, root, 1)
    process.kill()
    process.join(10)
    assert list(root.iterdir())
    other = convert("bundled", tmp_path / "other", dtype="float32")
    assert str(shared_copy(resolve(other), root).path) != read[0] and len(list(root.iterdir())) == 1
    release()


def kept(folder):
    """A folder with another in it, which is not to be removed."""
    (folder / "kept").mkdir(parents=True)
    (folder / "kept" / "file").touch()
    return folder


def test_a_link_in_the_place_of_the_folder_is_not_followed(checkpoint, tmp_path, caplog):
    victim, source = kept(tmp_path / "victim"), resolve(checkpoint)
    (tmp_path / "memory").symlink_to(victim)
    assert shared_copy(source, tmp_path / "memory") == source and "not a link" in caplog.text
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    assert shared_copy(source, tmp_path / "nowhere") == source
    assert [path.name for path in victim.rglob("*")] == ["kept", "file"] and not (tmp_path / "missing").exists()


@pytest.mark.parametrize("mode, parent", [(0o777, 0o700), (0o770, 0o700), (0o700, 0o777)])
def test_a_folder_that_others_can_change_is_not_used(checkpoint, tmp_path, mode, parent, caplog):
    root, source = tmp_path / "memory", resolve(checkpoint)
    kept(root)
    root.chmod(mode)
    tmp_path.chmod(parent)
    assert shared_copy(source, root) == source and (root / "kept" / "file").exists() and "mode 77" in caplog.text


def test_a_folder_of_another_user_is_not_used(checkpoint, tmp_path, monkeypatch, caplog):
    source = resolve(checkpoint)
    user = os.geteuid()
    tmp_path.chmod(0o1777)
    (tmp_path / "memory").mkdir(mode=0o700)
    monkeypatch.setattr("os.geteuid", lambda: user + 1)
    assert shared_copy(source, tmp_path / "memory") == source and f"user {user}" in caplog.text


def test_links_within_it_and_what_they_name_stay(checkpoint, tmp_path):
    victim, root = kept(tmp_path / "victim"), tmp_path / "memory"
    root.mkdir(mode=0o700)
    (root / "link").symlink_to(victim)
    (root / "file").touch()
    (root / "unused").mkdir()
    shared_copy(resolve(checkpoint), root)
    release()
    assert sorted(path.name for path in root.iterdir()) == ["file", "link"] and (victim / "kept" / "file").exists()


def test_what_is_not_copied(checkpoint, tmp_path, monkeypatch):
    assert shared_copy(resolve("bundled"), tmp_path / "a") == resolve("bundled")
    fp8 = resolve(convert("bundled", tmp_path / "fp8", fp8=True))
    assert shared_copy(fp8, tmp_path / "a") == fp8 and not (tmp_path / "a").exists()
    source = resolve(checkpoint)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10}))
    assert shared_copy(source, tmp_path / "b") == source
    monkeypatch.undo()
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    largest = max((damaged / "params").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError):
        shared_copy(resolve(damaged), tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())
