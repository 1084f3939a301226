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
from typing import Any

import jax
import jaxlib
import qwen_kernels
from jax.experimental import serialize_executable
from qwen_kernels.attention import xla

from qwen_jax.atomic import replace_file
from qwen_jax.engine.compiled.compile_counter import planned
from qwen_jax.errors import UserError
from qwen_jax.private_folder import open_private

log = logging.getLogger(__name__)
# Everything whose code or constants reach a traced program: whole folders, so that a new file cannot be forgotten.
TRACED = ("config.py", "engine/api", "engine/compiled", "engine/runner", "engine/scheduling", "engine/weights", "model",
          "parallel", "quantization")
ENVIRONMENT_FILE = "environment.json"  # what the programs of a folder depend on
MAPPINGS = 0.8  # most of the memory mappings that a process may have, before another program is made
Key = tuple[Hashable, int]  # of a program: a bucket or a piece of its step, and the number of the stage that it runs in
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
        self._cache_dir = _private(cache_dir) if cache_dir else None
        if self._cache_dir and (foreign := foreign_programs(self._cache_dir)):
            log.warning("%s", foreign)
        self.programs: dict[Hashable, Program] = {}

    def prepare(self, keys: Iterable[Key]) -> Iterable[tuple[Key, Program]]:
        """Compile or load the program of every key that has none yet, and yield it with its key.

        Several compile at a time, because XLA compiles a program on few cores. All compilations are planned.
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

    def load(self, key: Key) -> bool:
        """Load a program from disk, and return whether it was there."""
        began = time.perf_counter()
        path = self._path(key)
        compiled = _read(path, self._devices(key)) if path else None
        if compiled is not None:
            self.programs[key] = _program(compiled, began, from_disk=True)
        return compiled is not None

    def take(self, key: Key, payload: bytes, seconds: float) -> None:
        """Load a program that another process has compiled (`serialized`) in ``seconds``, and keep it on disk."""
        compiled = _loaded(payload, self._devices(key))
        if path := self._path(key):
            _write(path, payload)
        self.programs[key] = _program(compiled, time.perf_counter() - seconds, from_disk=False)

    def _load_or_compile(self, key: Key) -> Program:
        if self.load(key):
            return self.programs[key]
        check_mappings()
        began = time.perf_counter()
        with planned():
            compiled = self._lower(key).compile()
        if path := self._path(key):
            _write(path, compiled)
        return _program(compiled, began, from_disk=False)

    def _path(self, key: Key) -> Path | None:
        """Return the file of a key's program, named by a hash of what it depends on; None without a cache folder.

        The programs of one `environment` are in one folder.
        """
        if self._cache_dir is None:
            return None
        ids = [device.id for device in self._devices(key)]
        process = [jax.process_index(), jax.process_count()]
        text = json.dumps([self._identity, repr(key), ids, process], sort_keys=True)
        return self._cache_dir / _digest(environment()) / f"{hashlib.sha256(text.encode()).hexdigest()}.exe"


def check_mappings() -> None:
    """Raise UserError when the system lets this process have hardly more memory mappings.

    A program on CPUs takes up to some thousands, and XLA ends the process (SIGSEGV) when there are none left.
    """
    try:
        most = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as maps:
            used = sum(1 for _ in maps)
    except (OSError, ValueError):  # other systems have no such limit
        return
    if used > MAPPINGS * most:
        raise UserError(f"this process has {used:,} memory mappings of the {most:,} that the system allows, and each "
                        "compiled program needs some hundreds: allow more (sysctl -w vm.max_map_count=1048576), have "
                        "fewer programs (a smaller max_batch_size, speculation=None), or delete other engines first")


@contextmanager
def attention_tiles(pages: int) -> Iterator[None]:
    """Set how many pages of keys full attention reads at a time, in programs that are lowered inside the context.

    pages: number of pages; 0 leaves the kernel's own number.
    """
    with _tiles_lock:
        before, xla.CHUNK_PAGES = xla.CHUNK_PAGES, pages
        try:
            yield
        finally:
            xla.CHUNK_PAGES = before


def code_digest(package: Path, kernels: Path) -> str:
    """Return a SHA-256 of the Python files (names and contents) in `TRACED` of ``package``, and in ``kernels``."""
    digest = hashlib.sha256()
    for root, folders in ((package, TRACED), (kernels, ("",))):
        for top in (root / folder for folder in folders):
            for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
                digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _private(folder: Path) -> Path | None:
    """Make a folder of programs if it is not there, and return its real path.

    Returns None, and logs why, unless only this user can have put programs into it: loading a program runs its code.
    """
    try:
        folder = folder.resolve()
        os.close(open_private(folder))
        return folder
    except UserError as error:
        log.warning("programs are neither read from disk nor kept there: %s (QWEN_JAX_CACHE)", error)
    except OSError as error:
        _warn_not_kept(error)
    return None


def _read(path: Path, devices: Sequence[jax.Device]):
    """Load the compiled program in the file ``path`` onto these devices; None when there is no usable file."""
    try:
        digest, payload = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            raise ValueError("its checksum does not match")
        return _loaded(payload, devices)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UserError:
        raise
    except Exception as error:  # a damaged or foreign file may raise anything, and compiling again is right
        log.warning("cached executable %s is not usable (%s): compiling again", path.name, error)
        return None


def serialized(compiled: jax.stages.Compiled) -> bytes:
    """Return a compiled program as bytes, for processes with the same `environment`."""
    return pickle.dumps(serialize_executable.serialize(compiled))


def _loaded(payload: bytes, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """Load a program from bytes that `serialized` returned. This runs its code: they must be from this user."""
    check_mappings()
    return serialize_executable.deserialize_and_load(*pickle.loads(payload), execution_devices=devices)


def _program(compiled: jax.stages.Compiled, began: float, from_disk: bool) -> Program:
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Program(compiled, time.perf_counter() - began, from_disk,
                   temp_bytes=getattr(memory, "temp_size_in_bytes", 0), flops=cost.get("flops", 0.0),
                   bytes_accessed=cost.get("bytes accessed", 0.0))


_warned = False  # of programs that are not kept, once


def _warn_not_kept(error: Exception) -> None:
    global _warned
    if not _warned:
        log.warning("could not keep an executable on disk (%s); the next start compiles again", error)
    _warned = True


def _write(path: Path, program: jax.stages.Compiled | bytes) -> None:
    """Write a compiled program to a file, atomically, readable by its owner alone: loading a program runs its code."""
    try:
        payload = program if isinstance(program, bytes) else serialized(program)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not (about := path.with_name(ENVIRONMENT_FILE)).exists():
            replace_file(about, json.dumps(environment()).encode(), private=True)
        replace_file(path, hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload, private=True)
    except Exception as error:  # a full disk or a backend that cannot serialise must not stop the engine
        _warn_not_kept(error)


def foreign_programs(folder: Path) -> str | None:
    """Return a sentence about a folder that has programs, but none for this process's `environment`; else None.

    It says in what the environment for which they were compiled differs.
    """
    try:
        files = sorted(folder.glob(f"*/{ENVIRONMENT_FILE}"), key=lambda file: file.stat().st_mtime)
        if not files or any(file.parent.name == _digest(environment()) for file in files):
            return None
        other = json.loads(files[-1].read_text())
    except (OSError, ValueError):
        return None
    here = environment()
    differing = [name for name in here if name != "machine" and other.get(name) != here[name]]
    if other.get("machine") != here["machine"]:
        differing.insert(0, f"processor ({_instruction_set(other.get('machine'))}; this machine has "
                            f"{_instruction_set(here['machine'])})")
    return f"the programs in {folder} are compiled anew, for they were made for another {', '.join(differing)}"


def _instruction_set(machine: Any) -> str:
    """Return the name of the widest vector instructions that a machine of `environment` has."""
    architecture, flags = machine if isinstance(machine, list) and len(machine) == 2 else ("", "")
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE"}
    return next((shown for flag, shown in names.items() if flag in str(flags).split()), str(architecture) or "unknown")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@cache
def environment() -> dict[str, object]:
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
