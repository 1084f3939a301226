"""What all routes share: the engine, the names of its models, and whether requests are taken."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Request

from qwen_jax.serving.http.protocol import Body
from qwen_jax.serving.ipc.engine_client import Answer, Link
from qwen_jax.serving.ipc.errors import ApiError


class Service:
    """
    Attributes:
      draining: takes no new requests; adapters: what may be asked for as models, beside ``model``, and which contents
        they have.
      weights: which contents new requests run with; weight_version: the engine's number for them.
      varies: what beside these decides answers; None while that differs from client to client.
    """

    def __init__(self, link: Link, path: str, model: str, stall_seconds: float, log_prompts: bool = False) -> None:
        self.link, self.model, self._stall_seconds, self._log_prompts = link, model, stall_seconds, log_prompts
        self.draining = False
        self.adapters: dict[str, str] = {}
        self.weights, self.weight_version = contents_of(path), 0
        self._before = self.weights
        self.varies: Callable[[], str | None] = lambda: ""

    def check_open(self) -> None:
        if self.draining:
            raise ApiError(503, "the server is draining: it takes no new requests", retry_after=5)
        self.link.check_alive()

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a request's ``model`` names; None for the model itself."""
        if model is None or model == self.model:
            return None
        if model not in self.adapters:
            raise ApiError(404, f"the model {model!r} does not exist: use {', '.join([self.model, *self.adapters])}",
                           "model_not_found", "model")
        return model

    def check_health(self) -> None:
        if self.link.failure:
            raise ApiError(503, f"the engine has stopped: {self.link.failure}")
        if self.link.silent_seconds() > self._stall_seconds:
            raise ApiError(503, f"the engine has had work for {self.link.silent_seconds():.0f} s and made no step")

    @property
    def healthy(self) -> bool:
        try:
            self.check_health()
        except ApiError:
            return False
        return True

    def check_ready(self) -> None:
        self.check_health()
        self.check_open()

    async def update_weights(self, source: str, *others: Any) -> dict[str, Any]:
        """Has the engine go on with other weights; UserError when it refuses them."""
        contents = contents_of(source)
        found = await self.link.call("update_weights", source, *others, patient=True)
        self.now_with(contents, found["version"])
        return found

    async def rollback(self) -> dict[str, Any]:
        """Has the engine go back to the weights before."""
        found = await self.link.call("rollback")
        self.now_with(self._before, found["version"])
        return found

    def now_with(self, contents: str, version: int) -> None:
        """Notes which weights the engine has."""
        self._before, self.weights, self.weight_version = self.weights, contents, version

    def note_prompt(self, request: Request, prompt: Any) -> None:
        """For the log, where that is wanted."""
        if self._log_prompts:
            request.scope["details"]["prompt"] = prompt

    def start(self, body: Body, prompt: Any, params: dict[str, Any], **more: Any) -> Answer:
        """Hands a request to the engine. ApiError when it cannot be. ``body``: a `Sampled` or a `Scored`."""
        return self.link.generate({"prompt": prompt, "params": params, "adapter": self.adapter(body.model),
                                   "priority": body.priority, "timeout": body.timeout, "stream": bool(body.stream),
                                   "arrived": time.monotonic(), "user": (body.model_extra or {}).get("user"),
                                   **more}, params.get("n", 1))


def contents_of(ref: str) -> str:
    """What tells apart the contents that a folder has had: its path, and its files' sizes and times. Other references
    stand for themselves."""
    folder = Path(ref)
    if not folder.is_dir():
        return ref
    files = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*")
                   if file.is_file())
    return hashlib.blake2b(repr((str(folder.resolve()), files)).encode(), digest_size=16).hexdigest()
