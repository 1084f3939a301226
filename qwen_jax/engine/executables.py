"""Bucket to compiled executable: compiled ahead of time, kept on disk, counted."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import jaxlib
import qwen_kernels
from jax.experimental import serialize_executable

from qwen_jax.engine.schedule import Bucket

log = logging.getLogger(__name__)

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_backend_compiles = 0
_warmup_compiles = 0


def _count(event: str, duration: float, **_) -> None:
    global _backend_compiles
    _backend_compiles += event == _COMPILE_EVENT


jax.monitoring.register_event_duration_secs_listener(_count)


def backend_compiles() -> int:
    """XLA compilations in this process so far, whoever caused them."""
    return _backend_compiles


def unplanned_compiles() -> int:
    """XLA compilations in this process so far that were not part of an engine's warm-up."""
    return _backend_compiles - _warmup_compiles


@contextmanager
def planned():
    """Compilations inside are a warm-up's."""
    global _warmup_compiles
    before = _backend_compiles
    try:
        yield
    finally:
        _warmup_compiles += _backend_compiles - before


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
      lower: ``lower(bucket)`` gives the ``jax.stages.Lowered`` step.
      identity: everything but the bucket that the programs depend on; any JSON value.
      cache_dir: where serialised programs are kept; None keeps none.
    """

    def __init__(self, lower: Callable[[Bucket], jax.stages.Lowered], identity: object,
                 cache_dir: Path | None) -> None:
        self._lower = lower
        self._identity = identity
        self._cache_dir = cache_dir
        self.programs: dict[Bucket, Program] = {}

    def prepare(self, buckets: Iterable[Bucket]) -> Iterable[tuple[Bucket, Program]]:
        """Make the program of every bucket ready, and yield it with its bucket.

        Several compile at a time: XLA compiles one program on one core.
        """
        missing = [bucket for bucket in buckets if bucket not in self.programs]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
            work = [threads.submit(self._load_or_compile, bucket) for bucket in missing]
            try:
                for bucket, program in zip(missing, work, strict=True):
                    self.programs[bucket] = program.result()
                    yield bucket, self.programs[bucket]
            finally:
                threads.shutdown(cancel_futures=True)

    def __getitem__(self, bucket: Bucket) -> Program:
        """The bucket's program. KeyError when it was not prepared: nothing compiles here."""
        return self.programs[bucket]

    def _load_or_compile(self, bucket: Bucket) -> Program:
        began = time.perf_counter()
        path = self._path(bucket)
        compiled = _read(path) if path else None
        from_disk = compiled is not None
        if compiled is None:
            compiled = self._lower(bucket).compile()
            if path:
                _write(path, compiled)
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
        return Program(compiled, time.perf_counter() - began, from_disk, getattr(memory, "temp_size_in_bytes", 0),
                       cost.get("flops", 0.0), cost.get("bytes accessed", 0.0))

    def _path(self, bucket: Bucket) -> Path | None:
        if self._cache_dir is None:
            return None
        key = json.dumps([_environment(), self._identity, repr(bucket)], sort_keys=True)
        return self._cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()}.exe"


def default_cache_dir() -> Path:
    """``$QWEN_JAX_CACHE``, else ``~/.cache/qwen-jax``; the programs are in ``executables`` below it."""
    root = os.environ.get("QWEN_JAX_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "qwen-jax") / "executables"


def _read(path: Path):
    """The program kept at ``path``, or None when there is none that loads (it is then compiled again)."""
    try:
        digest, payload = path.read_bytes().split(b"\n", 1)
        if hashlib.sha256(payload).hexdigest().encode() != digest:
            raise ValueError("its checksum does not match")
        return serialize_executable.deserialize_and_load(*pickle.loads(payload))
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
        "code": _code_digest(),
    }


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _code_digest() -> str:
    """Digest of the sources that are traced into programs."""
    package, kernels = Path(__file__).parents[1], Path(qwen_kernels.__file__).parent
    steps = [package / "engine" / f"{name}.py"
             for name in ("steps", "adapters", "guard", "sampler", "draw", "grammar", "schedule")]
    digest = hashlib.sha256()
    for path in [package / "config.py", *steps, *sorted((package / "model").rglob("*.py")),
                 *sorted((package / "quantization").rglob("*.py")),
                 *sorted(kernels.rglob("*.py"))]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
