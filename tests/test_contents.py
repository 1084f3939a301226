"""Digests of what a checkpoint's files contain."""
import os
import shutil

import pytest

from qwen_jax.checkpoint import convert, resolve
from qwen_jax.checkpoint.source import SHIPPED
from qwen_jax.contents import digest_of, package_digest


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The bundled model as a Hugging Face folder and as a converted checkpoint."""
    root = tmp_path_factory.mktemp("contents")
    shutil.copytree(SHIPPED["bundled"], root / "hf")
    convert("bundled", root / "orbax")
    return root


def change(file):
    """Change a byte of a file, and leave its size and its times of change as they look."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_a_byte_of_any_file_of_a_checkpoint_changes_its_digest(folders, kind):
    source = resolve(folders / kind)
    digests = {source.files.digest()}
    names = [name for name, _ in source.files.states]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(names)
    changed = [name for name in names if (source.path / name).stat().st_size]
    for name in changed:
        change(source.path / name)
        digests.add(source.files.digest())
    assert len(digests) == 1 + len(changed) and None not in digests


def test_a_copy_has_the_same_digest_and_a_file_that_changes_meanwhile_none(tmp_path):
    copy = shutil.copytree(SHIPPED["bundled"], tmp_path / "copy")
    files = resolve(copy).files
    assert files.digest() == resolve("bundled").files.digest()
    change(copy / "tokenizer.json")
    assert files.digest() is None
    (copy / "tokenizer.json").unlink()
    assert files.digest() is None


def test_digests_of_values_and_of_the_package():
    assert digest_of([1, "a"]) == digest_of([1, "a"]) != digest_of([1, "b"])
    assert len(package_digest()) == 32
