"""Other weights for a running server, on a port and with keys of their own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictBool, StrictInt, StrictStr

from qwen_jax.errors import UserError
from qwen_jax.serving.http.app_factory import new_app
from qwen_jax.serving.http.protocol import Body
from qwen_jax.serving.http.request_log import Observer
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.errors import ApiError

BODY_BYTES = 1 << 20
Prompt = StrictStr | list[StrictInt]


class WeightsRequest(Body):
    """
    Attributes:
      source: a folder of the server's, a hub id or ``bundled``.
      policy: what becomes of requests that have begun; see ``Engine.update_weights``.
      golden: pairs of a prompt and how its greedy answer has to begin.
      wait: answer when it is done; else at once, and ``GET /admin/weights`` says how it goes.
    """

    source: Annotated[StrictStr, Field(min_length=1)]
    policy: Literal["finish_old", "restart"] = "finish_old"
    golden: list[tuple[Prompt, Prompt]] | None = None
    wait: StrictBool = False


class Update:
    """The last update of the weights, and whether one is under way: there is one at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._running: asyncio.Task | None = None
        self.state: dict[str, Any] = {"state": "none"}

    def begin(self, body: WeightsRequest) -> asyncio.Task:
        self._service.check_open()
        if self._running and not self._running.done():
            raise ApiError(409, f"an update to {self.state['source']} is under way")
        self.state = {"state": "loading", "source": body.source}
        self._running = asyncio.create_task(self._run(body))
        return self._running

    async def _run(self, body: WeightsRequest) -> None:
        """Never raises: what went wrong is part of the state."""
        began = time.monotonic()
        try:
            await self._service.update_weights(body.source, body.policy, body.golden)
            self.state["state"] = "current"
        except (UserError, ApiError) as error:
            self.state |= {"state": "refused", "error": str(error)}
        self.state["seconds"] = round(time.monotonic() - began, 3)


def create_admin_app(service: Service, observers: Sequence[Observer], keys: Sequence[bytes]) -> FastAPI:
    app = new_app("qwen-jax admin", observers, keys, BODY_BYTES)
    update = Update(service)

    @app.get("/admin/weights")
    async def status() -> Any:
        """Versions of the weights, and how the last update went."""
        return {**await service.link.call("versions"), "update": update.state}

    @app.post("/admin/weights", status_code=202, responses={200: {"description": "Done, with wait=true."}})
    async def load(body: WeightsRequest) -> Response:
        """Loads, checks and tries other weights beside the old ones, which serve until then and afterwards when the
        new ones are refused."""
        body.check_fields()
        task = update.begin(body)
        if not body.wait:
            return JSONResponse(update.state, 202)
        await asyncio.shield(task)
        if update.state["state"] == "refused":
            raise ApiError(400, update.state["error"])
        return JSONResponse({**await service.link.call("versions"), "update": update.state}, 200)

    @app.post("/admin/weights/rollback")
    async def rollback() -> Any:
        """Back to the weights before, which are still there."""
        service.check_open()
        return await service.rollback()

    return app
