"""Routes of the admin port, which update the model's weights while the server runs and have API keys of their own."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictBool, StrictInt, StrictStr

from qwen_jax.errors import UserError
from qwen_jax.serving.http.app_factory import new_app
from qwen_jax.serving.http.limits import Keys
from qwen_jax.serving.http.protocol import Body
from qwen_jax.serving.http.request_log import Observer
from qwen_jax.serving.http.service import Service
from qwen_jax.serving.ipc.errors import ApiError

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 1 << 20
Prompt = StrictStr | list[StrictInt]


class WeightsRequest(Body):
    """Body of ``POST /admin/weights``: a request to replace the model's weights.

    Attributes:
      source: the new weights: a folder on the server, a hub id or ``bundled``.
      policy: what happens to requests that have begun to run: see ``Engine.update_weights``.
      golden: pairs of a prompt and the text or tokens with which the new weights' greedy answer must begin.
      wait: whether to answer when the update is done. Otherwise the answer comes at once, and ``GET /admin/weights``
        has the state of the update.
    """

    source: Annotated[StrictStr, Field(min_length=1)]
    policy: Literal["finish_old", "restart"] = "finish_old"
    golden: list[tuple[Prompt, Prompt]] | None = None
    wait: StrictBool = False


class WeightUpdates:
    """Runner of updates of the model's weights, one at a time.

    Attributes:
      state: state of the last update, as ``GET /admin/weights`` shows it.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._running: asyncio.Task | None = None
        self.state: dict[str, Any] = {"state": "none"}

    def begin(self, body: WeightsRequest) -> asyncio.Task:
        """Start an update of the weights; the task ends with it. ApiError 409 while another update is under way."""
        self._service.check_open()
        if self._running and not self._running.done():
            raise ApiError(409, f"an update to {self.state['source']} is under way")
        self.state = {"state": "loading", "source": body.source}
        self._running = asyncio.create_task(self._run(body))
        return self._running

    async def _run(self, body: WeightsRequest) -> ApiError | None:
        """Update the weights and record the outcome in ``state``. A failure is returned too, and not raised."""
        began, failure = time.monotonic(), None
        try:
            await self._service.update_weights(body.source, body.policy, body.golden)
            self.state["state"] = "current"
        except (UserError, ApiError) as error:
            self.state["state"], failure = "refused", ApiError(400, str(error))
        except Exception as error:
            logger.exception("an update of the weights failed")
            self.state["state"], failure = "failed", ApiError(500, f"{type(error).__name__}: {error}")
        if failure:
            self.state["error"] = failure.message
        self.state["seconds"] = round(time.monotonic() - began, 3)
        return failure


def create_admin_app(service: Service, observers: Sequence[Observer], keys: tuple[bytes, ...],
                     routers: Sequence[APIRouter] = ()) -> FastAPI:
    """Return the FastAPI application of the admin port.

    Args:
      observers: called with the record of every request that has ended.
      keys: API keys, of which a request needs one.
      routers: routes to add to those for weights.
    """
    app = new_app("qwen-jax admin", observers, Keys(admins=keys, clients=keys), MAX_BODY_BYTES)
    updates = WeightUpdates(service)

    @app.get("/admin/weights")
    async def status() -> Any:
        """Return the numbers of the loaded versions of the weights, and the state of the last update."""
        return {**await service.link.call("versions"), "update": updates.state}

    @app.post("/admin/weights", status_code=202, responses={200: {"description": "Done, with wait=true."}})
    async def load(body: WeightsRequest) -> Response:
        """Load, check and try new weights beside the old ones, then switch to them. Refused weights change nothing."""
        body.check_fields()
        task = updates.begin(body)
        if not body.wait:
            return JSONResponse(updates.state, 202)
        if failure := await asyncio.shield(task):
            raise failure
        return JSONResponse({**await service.link.call("versions"), "update": updates.state}, 200)

    @app.post("/admin/weights/rollback")
    async def rollback() -> Any:
        """Switch back to the weights before the last update, which are still loaded."""
        service.check_open()
        return await service.rollback()

    for router in routers:
        app.include_router(router)
    return app
