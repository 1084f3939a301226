"""A server as its users start it, in processes of its own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
from quick_xla import SERVED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def quick_environment() -> dict[str, str]:
    """Of an engine's process, for tests: it compiles quickly (`quick_xla`)."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": SERVED}


class Live:
    """``qwen-jax serve MODEL`` with these arguments; ready when made.

    worker: a script in the engine's place. flags: XLA's; `QUICK` for a test that compiles more than it runs.
    """

    def __init__(self, *arguments: str, model: str = "bundled", wait: bool = True, worker: str | None = None,
                 flags: str = SERVED) -> None:
        self.port = free_port()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **quick_environment()}
        environment["XLA_FLAGS"] = flags
        self.process = subprocess.Popen(
            [sys.executable, HERE / "with_worker.py", worker or "", "serve", model, "--port", str(self.port),
             *arguments],
            env=environment, stdout=(printed := tempfile.TemporaryFile("a+")), stderr=subprocess.STDOUT)
        self._file, self._printed = printed, None
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not self.answers("/ready"):
            assert self.process.poll() is None and time.monotonic() < end, self.output()
            time.sleep(0.1)

    def answers(self, path: str) -> bool:
        try:
            return self.http.get(path).status_code == 200
        except httpx.TransportError:
            return False

    def post(self, path: str, body=None, **options) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def stats(self) -> dict:
        return self.http.get("/stats").json()

    def wait_until_free(self, seconds: float = 10) -> dict:
        """Until no request is open and no page is held; counters."""
        end = time.monotonic() + seconds
        while (found := self.stats())["requests"] or found["engine"]["pages_used"]:
            assert time.monotonic() < end, found
            time.sleep(0.02)
        return found["engine"]

    def output(self) -> str:
        """What it has printed; ends it, and its engine."""
        if self._printed is not None:
            return self._printed
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children():
                child.kill()
        self.process.kill()
        self.process.wait()
        self._printed = self.printed()
        self._file.close()
        return self._printed

    def printed(self) -> str:
        """So far."""
        self._file.seek(0)
        return self._file.read()
