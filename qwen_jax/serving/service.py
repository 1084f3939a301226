"""What all routes share: the engine, the names of its models, and whether requests are taken."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request

from qwen_jax.serving.errors import ApiError
from qwen_jax.serving.link import Answer, Link
from qwen_jax.serving.protocol import Body


class Service:
    """
    Attributes:
      draining: takes no new requests; adapters: names that may be asked for as models, beside ``model``.
    """

    def __init__(self, link: Link, model: str, stall_seconds: float, log_prompts: bool = False) -> None:
        self.link, self.model, self._stall_seconds, self._log_prompts = link, model, stall_seconds, log_prompts
        self.draining = False
        self.adapters: dict[str, str] = {}

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

    def note_prompt(self, request: Request, prompt: Any) -> None:
        """For the log, where that is wanted."""
        if self._log_prompts:
            request.scope["details"]["prompt"] = prompt

    def start(self, body: Body, prompt: Any, params: dict[str, Any], **more: Any) -> Answer:
        """Hands a request to the engine. ApiError when it cannot be. ``body``: a `Sampled` or a `Scored`."""
        return self.link.generate({"prompt": prompt, "params": params, "adapter": self.adapter(body.model),
                                   "priority": body.priority, "timeout": body.timeout, "stream": bool(body.stream),
                                   "arrived": time.monotonic(), **more}, params.get("n", 1))
