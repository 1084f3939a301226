"""Cache of executables: programs that are compiled ahead of time, kept by key in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import platform
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jaxlib
import qwen_kernels
from jax.experimental import serialize_executable
from qwen_kernels.attention import xla

from qwen_jax.atomic import replace_file

log = logging.getLogger(__name__)
# Everything whose code or constants reach a traced program: whole folders, so that a new file cannot be forgotten.
TRACED = ("config.py", "engine/api", "engine/compiled", "engine/runner", "engine/scheduling", "engine/weights", "model",
          "parallel", "quantization")
_tiles_lock = threading.Lock()  # programs are lowered on several threads, and tiles are globals of the kernel's module


@dataclass
class Program:
    """A compiled program, with the time and memory that it takes."""

    run: Callable  # the executable
    seconds: float  # time to compile or load it
    from_disk: bool  # whether it was loaded from disk
    temp_bytes: int  # size of XLA's temporary buffers; 0 where it is not known
    # XLA's estimates of one run, in which the body of a loop counts once: one micro-batch of a prefill, one token of a
    # decode step. 0 where XLA gives none.
    flops: float
    bytes_accessed: float


class Executables:
    """Table of compiled programs by key, which compiles missing ones or loads them from disk.

    Args:
      lower: function of a key that returns the lowered program.
      devices: function of a key that returns the program's devices in the order of its mesh.
      identity: everything but key and devices that the programs depend on; any JSON value.
      cache_dir: folder that keeps serialised programs; None keeps none.

    Attributes:
      programs: the programs that are ready, by key.
    """

    def __init__(self, lower: Callable[[Hashable], jax.stages.Lowered],
                 devices: Callable[[Hashable], Sequence[jax.Device]], identity: object,
                 cache_dir: Path | None) -> None:
        self._lower, self._devices = lower, devices
        self._identity = identity
        self._cache_dir = cache_dir if cache_dir and _is_private(cache_dir) else None
        self.programs: dict[Hashable, Program] = {}

    def prepare(self, keys: Iterable[Hashable]) -> Iterable[tuple[Hashable, Program]]:
        """Compile or load the program of every key that has none yet, and yield it with its key.

        Several compile at a time, because XLA compiles a program on a single core.
        """
        missing = [key for key in keys if key not in self.programs]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
            futures = [threads.submit(self._load_or_compile, key) for key in missing]
            try:
                for key, future in zip(missing, futures, strict=True):
                    self.programs[key] = future.result()
                    yield key, self.programs[key]
            finally:
                threads.shutdown(cancel_futures=True)

    def _load_or_compile(self, key: Hashable) -> Program:
        began = time.perf_counter()
        path = self._path(key)
        compiled = _read(path, self._devices(key)) if path else None
        from_disk = compiled is not None
        if compiled is None:
            compiled = self._lower(key).compile()
            if path:
                _write(path, compiled)
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        return Program(compiled, time.perf_counter() - began, from_disk,
                       temp_bytes=getattr(memory, "temp_size_in_bytes", 0), flops=cost.get("flops", 0.0),
                       bytes_accessed=cost.get("bytes accessed", 0.0))

    def _path(self, key: Hashable) -> Path | None:
        """Return the file of a key's program, named by a hash of what it depends on; None without a cache folder."""
        if self._cache_dir is None:
            return None
        ids = [device.id for device in self._devices(key)]
        process = [jax.process_index(), jax.process_count()]
        text = json.dumps([_environment(), self._identity, repr(key), ids, process], sort_keys=True)
        return self._cache_dir / f"{hashlib.sha256(text.encode()).hexdigest()}.exe"


@contextmanager
def attention_tiles(pages: int) -> Iterator[None]:
    """Set how many pages of keys full attention reads at a time, in programs that are lowered inside the context.

    pages: number of pages; 0 leaves the kernel's own number.
    """
    with _tiles_lock:
        before = xla.CHUNK_PAGES, xla.DECODE_CHUNK_PAGES
        try:
            if pages:
                xla.CHUNK_PAGES = xla.DECODE_CHUNK_PAGES = pages
            yield
        finally:
            xla.CHUNK_PAGES, xla.DECODE_CHUNK_PAGES = before


def code_digest(package: Path, kernels: Path) -> str:
    """Return a SHA-256 of the Python files (names and contents) in `TRACED` of ``package``, and in ``kernels``."""
    digest = hashlib.sha256()
    for root, folders in ((package, TRACED), (kernels, ("",))):
        for top in (root / folder for folder in folders):
            for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _is_private(folder: Path) -> bool:
    """Return whether only this user can have put programs into the folder: loading a program runs its code."""
    try:
        status = folder.stat()
    except OSError:  # it will be made, or nothing can be read from it
        return True
    if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
        return True
    log.warning("%s belongs to or can be written by others, so programs are neither read from nor kept in it: "
                "chmod 700 it, or set QWEN_JAX_CACHE to a folder of your own", folder)
    return False


def _read(path: Path, devices: Sequence[jax.Device]):
    """Load the compiled program in the file ``path`` onto these devices; None when there is no usable file."""
    try:
        digest, payload = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            raise ValueError("its checksum does not match")
        return serialize_executable.deserialize_and_load(*pickle.loads(payload), execution_devices=devices)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged or foreign file may raise anything, and compiling again is right
        log.warning("cached executable %s is not usable (%s): compiling again", path.name, error)
        return None


def _write(path: Path, compiled) -> None:
    """Write a compiled program to a file, atomically, readable by its owner alone: loading a program runs its code."""
    try:
        payload = pickle.dumps(serialize_executable.serialize(compiled))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload, private=True)
    except Exception as error:  # a full disk or a backend that cannot serialise must not stop the engine
        log.warning("could not keep an executable on disk (%s); the next start compiles again", error)


@cache
def _environment() -> dict[str, object]:
    """Return what a serialised program silently depends on: versions, devices, instruction set, flags, our own code."""
    devices = jax.devices()
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "backend": devices[0].client.platform_version,
        "devices": [d.device_kind for d in devices],
        "machine": [platform.machine(), _cpu_flags()],
        "flags": [os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")],
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
        "code": code_digest(Path(__file__).parents[2], Path(qwen_kernels.__file__).parent),
    }


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
