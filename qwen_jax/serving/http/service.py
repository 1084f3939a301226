"""State that all HTTP routes share: the link to the engine, the names of model and adapters, and the weights."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from fastapi import Request

from qwen_jax.serving.http.limits import Caller
from qwen_jax.serving.http.protocol import EngineRequest
from qwen_jax.serving.ipc.engine_client import Answer, EngineBackend
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import RequestOptions
from qwen_jax.serving.options import ServerOptions


class Service:
    """State that all HTTP routes share: the engine, and the names by which clients ask for the model and its adapters.

    Args:
      link: the engine, or several that act as one.
      path: the model that the server was started with: a folder, a hub id or ``bundled``.
      options: the server's options.

    Attributes:
      model: the model's name for clients.
      draining: whether new requests are refused because the server is shutting down.
      adapters: names of loaded adapters, which clients may ask for as models.
      weight_version: the engine's number for the weights that new requests run with.
      varies: returns the adapter that answers requests for the model itself, "" for none; None while that differs
        between clients, so that no response may be cached.
    """

    def __init__(self, link: EngineBackend, path: str, options: ServerOptions) -> None:
        self.link, self.options, self.model = link, options, options.name or path
        self.draining = False
        self.adapters: set[str] = set()
        self.weight_version = 0
        self.varies: Callable[[], str | None] = lambda: ""

    def check_open(self) -> None:
        """Raise ApiError 503 when the server is shutting down, or has no engine that is ready."""
        if self.draining:
            raise ApiError(503, "the server is draining: it takes no new requests", retry_after=5)
        self.link.check_alive()

    def adapter(self, model: str | None) -> str | None:
        """Return the LoRA adapter that ``model`` names, None if it is the model itself. ApiError 404 if unknown."""
        if model is None or model == self.model:
            return None
        if model not in self.adapters:
            names = ", ".join([self.model, *sorted(self.adapters)])
            raise ApiError(404, f"the model {model!r} does not exist: use {names}", "model_not_found", "model")
        return model

    def check_health(self) -> None:
        """Raise ApiError 503 when the engine has stopped, or has work but made no step for ``stall_seconds``."""
        if self.link.failure:
            raise ApiError(503, f"the engine has stopped: {self.link.failure}")
        if self.link.silent_seconds() > self.options.stall_seconds:
            raise ApiError(503, f"the engine has had work for {self.link.silent_seconds():.0f} s and made no step")

    @property
    def healthy(self) -> bool:
        try:
            self.check_health()
        except ApiError:
            return False
        return True

    def check_ready(self) -> None:
        """Raise ApiError 503 unless the server is healthy and takes requests."""
        self.check_health()
        self.check_open()

    async def update_weights(self, source: str, *others: Any) -> dict[str, Any]:
        """Load other weights into the engine and switch to them; UserError when the engine refuses them."""
        versions = await self.link.call("update_weights", source, *others, patient=True)
        self.weight_version = versions["version"]
        return versions

    async def rollback(self) -> dict[str, Any]:
        """Switch the engine back to its previous weights."""
        versions = await self.link.call("rollback")
        self.weight_version = versions["version"]
        return versions

    def note_prompt(self, request: Request, prompt: Any) -> None:
        """Add a prompt to the request's log line, if the server was started with ``--log-prompts``."""
        if self.options.log_prompts:
            request.scope["details"]["prompt"] = prompt

    def start(self, request: Request, body: EngineRequest, prompt: Any, params: dict[str, Any],
              **more: Any) -> Answer:
        """Send a client's request to the engine; return its answers-to-be. ApiError when the engine does not take it.

        Args:
          body: body of the HTTP ``request``.
          prompt: a text, token ids, or a conversation: ``{"messages": [...], "tools": [...]}``.
          params: keywords of `SamplingParams`.
          more: further fields of `RequestOptions`, such as ``continuation``.
        """
        caller: Caller = request.scope["caller"]
        least = self.options.min_priority
        if least is not None and body.priority < least and not caller.admin:
            raise ApiError(403, f"priority must be at least {least} without an admin key, not {body.priority}",
                           param="priority")
        salt = body.cache_salt or ""
        if self.options.salt_by_key:
            salt = f"{hashlib.blake2b(caller.key, digest_size=16).hexdigest()}:{salt}"
        options = {"adapter": self.adapter(body.model), "priority": body.priority, "timeout": body.timeout,
                   "stream": bool(body.stream), "user": (body.model_extra or {}).get("user"), "cache_salt": salt,
                   "allow_special_tokens": getattr(body, "allow_special_tokens", True), **more}
        return self.link.generate(RequestOptions(prompt=prompt, params=params, arrived=time.monotonic(), **options),
                                  params.get("n", 1))
