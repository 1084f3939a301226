"""Compilation of the C++ kernels on first use, into the user's cache, and their registration with JAX."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax

from qwen_kernels.cache import cache_root
from qwen_kernels.private_folder import NotPrivate, open_private

logger = logging.getLogger(__name__)

SOURCES = ("products.cc", "product_body.h", "int4_body.h", "int4_avx2.h")
# More flags, such as -fsanitize=address, come from the environment (CONTRIBUTING.md).
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w", *os.environ.get("QWEN_JAX_KERNEL_FLAGS", "").split())
SECONDS = 300  # most that the compiler may take


class Targets(NamedTuple):
    """Names under which JAX calls the products, registered; they have a digest of the sources, so that a program on
    disk never calls another version of a kernel.

    For each type of weights: the product of float32 rows, and that of bfloat16 rows, None where the processor does not
    multiply them.
    """

    int8: tuple[str, str | None]
    int4: tuple[str, str | None]


@cache
def product_targets() -> Targets | None:
    """Register the products and return their names; None where they cannot be compiled, which is logged once."""
    loaded = library()
    if loaded is None:
        return None

    def registered(symbol: str) -> str:
        name = f"{symbol}_{_digest()}"
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, symbol)), platform="cpu")
        return name

    bfloats = loaded.qwen_multiplies_bfloat16()
    return Targets(*((registered(symbol), registered(f"{symbol}_bfloat16") if bfloats else None)
                     for symbol in ("qwen_int8_product", "qwen_int4_product")))


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, loaded; None where they cannot be compiled, which is logged."""
    folder, temporary = cache_root() / "kernels", None
    try:
        try:
            os.close(open_private(folder))
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} cannot be written")
        except (OSError, NotPrivate) as error:
            logger.warning("%s: the CPU kernels are compiled in each process anew", error)
            folder = temporary = Path(tempfile.mkdtemp(prefix="qwen-jax-kernels-"))
        path = folder / f"{platform.machine()}-{_digest()}.so"
        if not path.is_file():
            _compile(path)
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("the CPU kernels cannot be compiled (%s): XLA computes products with int8 and int4 weights, "
                       "which takes several times as long as with 16-bit weights", error)
        return None
    finally:
        if temporary:  # a library that is loaded needs its file no longer
            shutil.rmtree(temporary, ignore_errors=True)
    loaded.qwen_instruction_set.restype = ctypes.c_char_p
    return loaded


def instruction_set() -> str | None:
    """Return the instruction set that the kernels use on this processor; None without kernels."""
    loaded = library()
    return loaded.qwen_instruction_set().decode() if loaded else None


def _digest() -> str:
    """Return a digest of everything that the compiled library depends on."""
    here = Path(__file__).parent
    parts = [(here / name).read_bytes() for name in SOURCES]
    return hashlib.sha256(b"\0".join([*parts, repr(FLAGS).encode(), jax.lib.__version__.encode()])).hexdigest()[:16]


def _compile(path: Path) -> None:
    """Compile the kernels to ``path``, which appears complete or not at all. Raises RuntimeError with the reason."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if not compiler:
        raise RuntimeError("there is no C++ compiler: install g++ or set CXX")
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run([compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(Path(__file__).parent / SOURCES[0]),
                               "-o", temporary], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(f"{compiler}: {(errors or done.stderr.splitlines() or ['no message'])[0][:200]}")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
