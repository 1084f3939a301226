"""A server as its users start it, in processes of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


class Live:
    """``qwen-jax serve MODEL`` with these arguments; ready when made."""

    def __init__(self, *arguments: str, model: str = "bundled", env=None, wait: bool = True) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "JAX_PLATFORMS": "cpu",
                       "XLA_FLAGS": "", **(env or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qwen_jax.cli", "serve", model, "--port", str(self.port), *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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

    def gauges(self) -> dict:
        """Of the engine, once it has nothing to do."""
        return self.http.get("/stats").json()

    def stop(self, sig=signal.SIGTERM, seconds: float = 60) -> int:
        self.process.send_signal(sig)
        return self.process.wait(seconds)

    def output(self) -> str:
        self.process.kill()
        return self.process.communicate()[0]
