"""Key to compiled executable: compiled ahead of time, kept on disk, counted."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import platform
import tempfile
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

log = logging.getLogger(__name__)


@dataclass
class Program:
    """One executable and what it took to get it ready.

    ``temp_bytes`` are XLA's temporary buffers. ``flops`` and ``bytes_accessed`` are XLA's estimates of one run, in
    which the body of a loop counts once: one micro-batch of a prefill, one token of a decode step. 0 where it gives
    none.
    """

    run: Callable
    seconds: float
    from_disk: bool
    temp_bytes: int
    flops: float
    bytes_accessed: float


class Executables:
    """The table of compiled programs.

    Args:
      lower: ``lower(key)`` gives the ``jax.stages.Lowered`` step.
      devices: ``devices(key)``, in the order of the step's mesh.
      identity: everything but key and devices that the programs depend on; any JSON value.
      cache_dir: where serialised programs are kept; None keeps none.
    """

    def __init__(self, lower: Callable[[Hashable], jax.stages.Lowered],
                 devices: Callable[[Hashable], Sequence[jax.Device]], identity: object,
                 cache_dir: Path | None) -> None:
        self._lower, self._devices = lower, devices
        self._identity = identity
        self._cache_dir = cache_dir if cache_dir and _is_private(cache_dir) else None
        self.programs: dict[Hashable, Program] = {}

    def prepare(self, keys: Iterable[Hashable]) -> Iterable[tuple[Hashable, Program]]:
        """Make the program of every key ready, and yield it with its key.

        Several compile at a time: XLA compiles one program on one core.
        """
        missing = [key for key in keys if key not in self.programs]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
            work = [threads.submit(self._load_or_compile, key) for key in missing]
            try:
                for key, program in zip(missing, work, strict=True):
                    self.programs[key] = program.result()
                    yield key, self.programs[key]
            finally:
                threads.shutdown(cancel_futures=True)

    def __getitem__(self, key: Hashable) -> Program:
        """The key's program. KeyError when it was not prepared: nothing compiles here."""
        return self.programs[key]

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
        return Program(compiled, time.perf_counter() - began, from_disk, getattr(memory, "temp_size_in_bytes", 0),
                       cost.get("flops", 0.0), cost.get("bytes accessed", 0.0))

    def _path(self, key: Hashable) -> Path | None:
        if self._cache_dir is None:
            return None
        ids = [device.id for device in self._devices(key)]
        process = [jax.process_index(), jax.process_count()]
        text = json.dumps([_environment(), self._identity, repr(key), ids, process], sort_keys=True)
        return self._cache_dir / f"{hashlib.sha256(text.encode()).hexdigest()}.exe"


def _is_private(folder: Path) -> bool:
    """Whether nobody but this user can have put a program there: loading one runs its code."""
    try:
        found = folder.stat()
    except OSError:  # it will be made, or nothing can be read from it
        return True
    if found.st_uid == os.geteuid() and not found.st_mode & 0o022:
        return True
    log.warning("%s belongs to or can be written by others, so programs are neither read from nor kept in it: "
                "chmod 700 it, or set QWEN_JAX_CACHE to a folder of your own", folder)
    return False


def _read(path: Path, devices: Sequence[jax.Device]):
    """The program kept at ``path``, for these devices; None when there is none that loads."""
    try:
        digest, payload = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            raise ValueError("its checksum does not match")
        return serialize_executable.deserialize_and_load(*pickle.loads(payload), execution_devices=devices)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a damaged or foreign file raises, compiling again is right
        log.warning("cached executable %s is not usable (%s): compiling again", path.name, error)
        return None


def _write(path: Path, compiled) -> None:
    """Keep a program, atomically, readable by its owner alone: loading one runs code."""
    try:
        payload = pickle.dumps(serialize_executable.serialize(compiled))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
        os.replace(file.name, path)
    except Exception as error:  # a full disk or a backend that cannot serialise must not stop the engine
        log.warning("could not keep an executable on disk (%s); the next start compiles again", error)


@cache
def _environment() -> dict[str, object]:
    """What a serialised program silently depends on: versions, devices, instruction set, flags, our own code."""
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


# Everything whose code or constants reach a traced program: whole folders, so that a new file cannot be forgotten.
TRACED = ("config.py", "engine/api", "engine/compiled", "engine/runner", "engine/scheduling", "engine/weights", "model",
          "parallel", "quantization")


def code_digest(package: Path, kernels: Path) -> str:
    """SHA-256 of every source file under the `TRACED` folders of ``package`` and under ``kernels``, names included."""
    digest = hashlib.sha256()
    for root, folders in ((package, TRACED), (kernels, ("",))):
        for top in (root / folder for folder in folders):
            for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


_lock = threading.Lock()  # programs are lowered on several threads, and the kernel's numbers are its module's



@contextmanager
def attention_tiles(pages: int) -> Iterator[None]:
    """Lower inside with chunks of ``pages``, a positive number; with 0 the kernel decides, as elsewhere."""
    with _lock:
        kept = xla.CHUNK_PAGES, xla.DECODE_CHUNK_PAGES
        try:
            if pages:
                xla.CHUNK_PAGES = xla.DECODE_CHUNK_PAGES = pages
            yield
        finally:
            xla.CHUNK_PAGES, xla.DECODE_CHUNK_PAGES = kept
