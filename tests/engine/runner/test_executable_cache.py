"""Programs on disk: their owners, and what their names depend on."""

import ast
import importlib
import importlib.util
import os
import shutil
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import qwen_kernels
from qwen_kernels import private_folder

import qwen_jax
from qwen_jax.engine.runner import executable_cache
from qwen_jax.engine.runner.executable_cache import TRACED, Executables
from qwen_jax.errors import UserError


@pytest.fixture(autouse=True)
def environment_is_read_anew():
    executable_cache.environment.cache_clear()
    yield
    executable_cache.environment.cache_clear()


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
    inner, = folder.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder, inner)] == [0o700] * 3
    assert [stat.S_IMODE(path.stat().st_mode) for path in inner.iterdir()] == [0o600] * 2


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_process_with_no_memory_mappings_left_makes_no_program(tmp_path, monkeypatch, on_disk):
    """XLA would end the process."""
    if on_disk:
        prepare(tmp_path)
    monkeypatch.setattr(executable_cache, "MAPPINGS", 0)
    with pytest.raises(UserError, match="max_map_count"):
        prepare(tmp_path)


def test_a_program_is_found_again_under_the_same_configuration_only(tmp_path):
    assert not prepare(tmp_path).from_disk
    assert prepare(tmp_path).from_disk
    assert not prepare(tmp_path, "another configuration").from_disk


@pytest.mark.parametrize("name, value", [("XLA_FLAGS", "--xla_cpu_enable_fast_math=false"),
                                         ("LIBTPU_INIT_ARGS", "--a=1")])
def test_the_name_depends_on_flags(tmp_path, monkeypatch, name, value):
    before = table(tmp_path)._path("key")
    monkeypatch.setenv(name, value)
    executable_cache.environment.cache_clear()
    assert table(tmp_path)._path("key") != before


@pytest.mark.parametrize("what", ["_cpu_flags", "code_digest"])
def test_the_name_depends_on_instruction_set_and_code(tmp_path, monkeypatch, what):
    before = table(tmp_path)._path("key")
    monkeypatch.setattr(executable_cache, what, lambda *_: "another")
    executable_cache.environment.cache_clear()
    assert table(tmp_path)._path("key") != before


SOURCES = {"qwen_jax": Path(qwen_jax.__file__).parent, "qwen_kernels": Path(qwen_kernels.__file__).parent}


def test_a_changed_constant_in_any_traced_file_is_another_digest(tmp_path):
    """Checked in a copy of the sources, file by file."""
    for name, folder in SOURCES.items():
        shutil.copytree(folder, tmp_path / name, ignore=lambda at, names: {n for n in names if n.startswith("__py")})
    trees = tmp_path / "qwen_jax", tmp_path / "qwen_kernels"
    seen = {executable_cache.code_digest(*trees)}
    traced = [path for top in TRACED for path in [trees[0] / top, *(trees[0] / top).rglob("*.py")] if path.is_file()]
    traced += trees[1].rglob("*.py")
    assert {"sampling_params.py", "layout.py", "mesh.py", "topk_topp.py", "xla.py"} <= {path.name for path in traced}
    for path in traced:
        path.write_text(path.read_text() + "\nANOTHER = 1\n")
        seen.add(executable_cache.code_digest(*trees))
    assert len(seen) == 1 + len(traced)


def imported(module, seen):
    """Add to ``seen`` the modules of ours that a module imports, directly or not."""
    if module in seen:
        return
    seen.add(module)
    for node in ast.parse(Path(importlib.util.find_spec(module).origin).read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in SOURCES:
            for name in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
                if importlib.util.find_spec(name.rpartition(".")[0]).submodule_search_locations is None:
                    continue
                if importlib.util.find_spec(name):
                    imported(name, seen)


def test_all_that_steps_import_is_in_the_digest():
    """A program then cannot depend on a source that does not change its name."""
    reached = set()
    for entry in ("compiled.steps", "weights.model_shard", "weights.weight_sharding"):
        imported(f"qwen_jax.engine.{entry}", reached)
    free = {"qwen_jax", "qwen_jax.engine", "qwen_jax.errors"}  # no numbers in them
    outside = {name for name in reached if name.startswith("qwen_jax") and name not in free and not any(
        name.removeprefix("qwen_jax.").startswith(top.removesuffix(".py").replace("/", ".")) for top in TRACED)}
    assert len(reached) > 20 and not outside


def test_a_damaged_file_is_compiled_again(tmp_path, caplog):
    prepare(tmp_path)
    path, = tmp_path.glob("*/*.exe")
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


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_new_folder_in_one_that_others_can_write_to_is_not_used(tmp_path, monkeypatch, mode, caplog):
    """They could put another in its place, before it is made or later."""
    monkeypatch.setattr(private_folder, "_is_own_group", lambda group: False)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    for folder in (shared / "executables", shared / "mine" / "executables"):
        assert not prepare(folder).from_disk and not prepare(folder).from_disk
        assert not list(folder.iterdir())
    assert "name a folder of your own" in caplog.text


@pytest.mark.parametrize("mode", [0o1777, 0o770])
def test_a_new_folder_where_others_can_replace_nothing_is_used(tmp_path, monkeypatch, mode):
    """In a folder as that of temporary files, or one of the group that has this user alone."""
    monkeypatch.setattr(private_folder, "_is_own_group", lambda group: True)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(mode)
    assert not prepare(tmp_path / "shared" / "executables").from_disk
    assert prepare(tmp_path / "shared" / "executables").from_disk
    (tmp_path / "link").symlink_to(tmp_path / "shared" / "executables")
    assert prepare(tmp_path / "link").from_disk  # this user's own, to a folder that is private too


def test_a_folder_that_cannot_be_made_is_no_failure(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(executable_cache, "_warned", False)
    (tmp_path / "file").touch()
    assert not prepare(tmp_path / "file" / "executables").from_disk
    assert "could not keep an executable on disk" in caplog.text


def test_programs_of_another_processor_or_version_are_named(tmp_path, monkeypatch, caplog):
    """A folder that was filled elsewhere: what differs is said, and the programs are compiled anew."""
    folder = tmp_path / "programs"
    with monkeypatch.context() as patch:
        patch.setattr(executable_cache, "_cpu_flags", lambda: "flags : fpu avx2 avx512f")
        patch.setattr(executable_cache.jax, "__version__", "0.9.0")
        prepare(folder)
    executable_cache.environment.cache_clear()
    monkeypatch.setattr(executable_cache, "_cpu_flags", lambda: "flags : fpu avx2")
    table(folder)
    said, = [record.message for record in caplog.records]
    assert said.endswith("for they were made for another processor (AVX-512; this machine has AVX2), "
                         "jax")
    assert not prepare(folder).from_disk
    caplog.clear()
    assert prepare(folder).from_disk and not caplog.records
