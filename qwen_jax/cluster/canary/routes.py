"""The admin port's routes for trials."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, StrictFloat, StrictInt, StrictStr

from qwen_jax.cluster.canary.client import TrialLink
from qwen_jax.cluster.canary.policy import CanaryOptions, Limit
from qwen_jax.serving.http.admin_routes import Prompt
from qwen_jax.serving.http.protocol import Body
from qwen_jax.serving.http.service import Service, contents_of
from qwen_jax.serving.ipc.errors import ApiError

DRAIN_SECONDS = 300.0  # that requests of the engine that tries weights have to end
Share = Annotated[StrictFloat | StrictInt, Field(gt=0, le=1)]
Named = Annotated[StrictStr, Field(min_length=1)]


class TrialRequest(Body):
    """
    Attributes:
      adapter: a loaded one; or else source: weights, as for ``POST /admin/weights``, which one engine of several gets,
        with golden: pairs of a prompt and how its greedy answer has to begin.
      weights, requests, shadowed: see `CanaryOptions`; by default shares of 0.1, 0.5 and 1, and where one of n engines
        has them 1 / (2 n) and 1 / n.
      disagreement: share of answers from which on the new version is bad, for one that is meant to answer otherwise.
    """

    adapter: Named | None = None
    source: Named | None = None
    golden: list[tuple[Prompt, Prompt]] | None = None
    weights: list[Share] | None = None
    requests: Annotated[StrictInt, Field(ge=1)] | None = None
    shadowed: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)] | None = None
    disagreement: Annotated[StrictFloat | StrictInt, Field(gt=0, lt=1)] | None = None

    def options(self, engines: int) -> CanaryOptions:
        given: dict[str, Any] = {name: value for name in ("requests", "shadowed")
                                 if (value := getattr(self, name)) is not None}
        if self.weights is not None:
            given["weights"] = tuple(self.weights)
        elif self.source is not None:
            given["weights"] = 0.5 / engines, 1 / engines
        if self.disagreement is not None:
            given["disagreed"] = Limit(self.disagreement / 2, self.disagreement)
        return CanaryOptions(**given)


def trial_routes(service: Service, link: TrialLink) -> APIRouter:
    routes = APIRouter()

    def now_with(source: str) -> None:
        service.now_with(contents_of(source), service.weight_version + 1)

    link.promoted = now_with

    def state() -> dict[str, Any]:
        canary = link.canary
        if canary is None:
            return {"state": "loading" if link.running else "none"}
        tests = {name: {"happened": test.happened, "of": test.seen, "verdict": test.verdict}
                 for name, test in canary.tests.items()}
        what = "adapter" if link.of_adapter else "source"
        return {"state": canary.state, what: canary.name, "weight": canary.weight, "requests": canary.total,
                "why": canary.why, "tests": tests}

    @routes.get("/admin/canary")
    async def show() -> Any:
        """How the trial goes, or how the last one went."""
        return state()

    @routes.post("/admin/canary")
    async def begin(body: TrialRequest) -> Any:
        """A share of the requests for the base model gets an adapter from now on, or other weights, of which the answer
        comes once an engine has them."""
        body.check_fields()
        if (body.adapter is None) == (body.source is None):
            raise ApiError(400, "give either adapter or source")
        if link.running:
            raise ApiError(409, f"{link.on_trial} is on trial: end that first, with DELETE")
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
        """Everybody gets the base model again, also after an adapter was promoted; weights that were promoted stay."""
        found = state()
        await link.end()
        return found

    return routes
