"""Routes of the admin port that begin, show and end a trial of an adapter or of weights."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, StrictFloat, StrictInt, StrictStr

from qwen_jax.cluster.canary.client import CanaryClient
from qwen_jax.cluster.canary.policy import CanaryOptions, Limit
from qwen_jax.serving.http.admin_routes import Prompt
from qwen_jax.serving.http.protocol import Body
from qwen_jax.serving.http.service import Service, contents_of
from qwen_jax.serving.ipc.errors import ApiError

DRAIN_SECONDS = 300.0  # for the running requests of the engine that tries weights to end
Share = Annotated[StrictFloat | StrictInt, Field(gt=0, le=1)]
Named = Annotated[StrictStr, Field(min_length=1)]


class CanaryRequest(Body):
    """Body of the request that begins a trial, of either an adapter or weights.

    Attributes:
      adapter: name of a loaded adapter.
      source: weights, as for ``POST /admin/weights``. One engine of several gets them.
      golden: pairs of a prompt and the beginning of its greedy answer, which the weights must give.
      weights: growing shares of the requests; by default those of `CanaryOptions`, and for weights that one of n
        engines has, 1 / (2 n) and 1 / n.
      requests: number of requests before the next share.
      shadowed: share of the new version's requests that the old version is asked as well.
      disagreement: share of differing answers from which on the new version is bad. A version that is meant to answer
        otherwise needs a large one.
    """

    adapter: Named | None = None
    source: Named | None = None
    golden: list[tuple[Prompt, Prompt]] | None = None
    weights: list[Share] | None = None
    requests: Annotated[StrictInt, Field(ge=1)] | None = None
    shadowed: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)] | None = None
    disagreement: Annotated[StrictFloat | StrictInt, Field(gt=0, lt=1)] | None = None

    def options(self, engines: int) -> CanaryOptions:
        """Return the settings of the trial that this body asks for, in a server with ``engines`` live engines."""
        given: dict[str, Any] = {name: value for name in ("requests", "shadowed")
                                 if (value := getattr(self, name)) is not None}
        if self.weights is not None:
            given["weights"] = tuple(self.weights)
        elif self.source is not None:
            given["weights"] = 0.5 / engines, 1 / engines
        if self.disagreement is not None:
            given["disagreed"] = Limit(self.disagreement / 2, self.disagreement)
        return CanaryOptions(**given)


def canary_routes(service: Service, link: CanaryClient) -> APIRouter:
    """Return the routes under ``/admin/canary`` of the admin port, which begin, show and end a trial."""
    routes = APIRouter()

    async def note_weights(source: str) -> None:
        service.note_weights(await asyncio.to_thread(contents_of, source), service.weight_version + 1)

    link.on_promoted = note_weights

    def state() -> dict[str, Any]:
        canary = link.canary
        if canary is None:
            return {"state": "loading" if link.running else "none"}
        tests = {name: {"happened": test.happened, "of": test.seen, "verdict": test.verdict}
                 for name, test in canary.tests.items()}
        kind = "adapter" if link.is_adapter else "source"
        return {"state": canary.state, kind: canary.name, "weight": canary.weight, "requests": canary.total,
                "why": canary.why, "tests": tests}

    @routes.get("/admin/canary")
    async def show() -> Any:
        """Show the current or the last trial: its state, its share, and the evidence so far."""
        return state()

    @routes.post("/admin/canary")
    async def begin(body: CanaryRequest) -> Any:
        """Begin a trial: give a share of the requests for the base model to an adapter or to other weights.

        For weights, the response comes once an engine has loaded them.
        """
        body.check_fields()
        if (body.adapter is None) == (body.source is None):
            raise ApiError(400, "either adapter or source must be given, not both or neither")
        if link.running:
            raise ApiError(409, f"{link.on_trial} is on trial: end that first, with DELETE /admin/canary")
        options = body.options(link.engines)
        if body.source is not None:
            service.check_open()
            update = body.source, "finish_old", body.golden
            await asyncio.shield(asyncio.create_task(link.try_weights(update, options, DRAIN_SECONDS)))
        elif body.adapter not in service.adapters:
            raise ApiError(404, f"no adapter named {body.adapter!r} is loaded", "model_not_found", "adapter")
        else:
            link.try_adapter(body.adapter, options)
        return state()

    @routes.delete("/admin/canary")
    async def end() -> Any:
        """End the trial: all requests get the base model again, also after an adapter was promoted.

        Weights that were promoted stay. Returns the state before.
        """
        before = state()
        await link.end()
        return before

    return routes
