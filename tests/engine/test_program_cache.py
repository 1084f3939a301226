"""Programs on the disk: whose they are, and what their names depend on."""

import os
import stat

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.engine.runner import executable_cache
from qwen_jax.engine.runner.executable_cache import Executables


@pytest.fixture(autouse=True)
def environment_is_read_anew():
    executable_cache._environment.cache_clear()
    yield
    executable_cache._environment.cache_clear()


def table(folder, identity="one"):
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((3,), jnp.float32))
    return Executables(lambda key: lowered, lambda key: jax.devices()[:1], identity, folder)


def prepare(folder, identity="one"):
    (_, program), = table(folder, identity).prepare(["key"])
    assert program.run(jnp.zeros(3)).tolist() == [1, 1, 1]
    return program


def test_folder_and_files_are_their_owners_alone(tmp_path):
    before = os.umask(0)  # the most that a user's settings may allow
    try:
        prepare(tmp_path / "cache" / "executables")
    finally:
        os.umask(before)
    folder = tmp_path / "cache" / "executables"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]


def test_a_program_is_found_again_and_by_nobody_else(tmp_path):
    assert not prepare(tmp_path).from_disk
    assert prepare(tmp_path).from_disk
    assert not prepare(tmp_path, "another configuration").from_disk


@pytest.mark.parametrize("name, value", [("XLA_FLAGS", "--xla_cpu_enable_fast_math=false"),
                                         ("LIBTPU_INIT_ARGS", "--a=1")])
def test_the_name_depends_on_flags(tmp_path, monkeypatch, name, value):
    before = table(tmp_path)._path("key")
    monkeypatch.setenv(name, value)
    executable_cache._environment.cache_clear()
    assert table(tmp_path)._path("key") != before


@pytest.mark.parametrize("what", ["_cpu_flags", "_code_digest"])
def test_the_name_depends_on_instruction_set_and_code(tmp_path, monkeypatch, what):
    assert getattr(executable_cache, what)()
    before = table(tmp_path)._path("key")
    monkeypatch.setattr(executable_cache, what, lambda: "another")
    executable_cache._environment.cache_clear()
    assert table(tmp_path)._path("key") != before


def test_a_damaged_file_is_compiled_again(tmp_path, caplog):
    prepare(tmp_path)
    path, = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not prepare(tmp_path).from_disk
    assert "its checksum does not match" in caplog.text
    assert prepare(tmp_path).from_disk
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, mode, caplog):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(mode)
    assert not prepare(folder).from_disk and not prepare(folder).from_disk
    assert not list(folder.iterdir()) and "chmod 700" in caplog.text
