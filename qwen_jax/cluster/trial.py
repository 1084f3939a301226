"""An adapter on trial in a running server: a share of the requests for the base model gets it, as `Canary` says."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, StrictFloat, StrictInt, StrictStr

from qwen_jax.cluster.canary import PROMOTED, RUNNING, Canary, CanaryOptions, Limit
from qwen_jax.serving.errors import ApiError
from qwen_jax.serving.link import Answer, Link
from qwen_jax.serving.protocol import Body
from qwen_jax.serving.service import Service
from qwen_jax.serving.wire import Piece

logger = logging.getLogger(__name__)
Share = Annotated[StrictFloat | StrictInt, Field(gt=0, le=1)]


class TrialLink:
    """A link around another one. Requests that name an adapter are not part of a trial.

    Attributes:
      canary: the trial, running or over; None before the first.
    """

    def __init__(self, link: Link, seed: int | None = None) -> None:
        self._link, self._random = link, random.Random(seed)
        self.canary: Canary | None = None

    def __getattr__(self, name: str) -> Any:
        """What is no request is the other link's."""
        return getattr(self._link, name)

    @property
    def running(self) -> bool:
        return self.canary is not None and self.canary.state == RUNNING

    @property
    def everybody_has(self) -> str | None:
        """The adapter that was promoted: requests for the base model get it."""
        return self.canary.name if self.canary and self.canary.state == PROMOTED else None

    def generate(self, options: Mapping[str, Any], answers: int) -> Answer:
        canary = self.canary
        if canary is None or options["adapter"] is not None or not canary.weight:
            return self._link.generate(options, answers)
        if not canary.gets(options.get("user") or repr(options["prompt"])):
            answer = self._link.generate(options, answers)
            _Watched(answer, options, lambda old: old.failed or old.void or canary.old_answered(old.seconds))
            return answer
        answer = self._link.generate({**options, "adapter": canary.name}, answers)
        if canary.state == RUNNING:
            self._compare(canary, answer, options, answers)
        return answer

    def _compare(self, canary: Canary, answer: Answer, options: Mapping[str, Any], answers: int) -> None:
        """Has the old version answer as well, if it is this request's turn, and enters what comes of both."""
        ended: dict[str, _Watched] = {}
        shadow = None
        if canary.shadows(self._random):
            try:  # after those that somebody waits for
                shadow = self._link.generate({**options, "stream": False, "priority": options["priority"] + 1}, answers)
            except ApiError:  # as many requests as there may be: then without
                pass

        def end(name: str) -> Callable[[_Watched], None]:
            def note(watched: _Watched) -> None:
                ended[name] = watched
                if name == "old":
                    self._link.close(shadow)
                    if not (watched.failed or watched.void):
                        canary.old_answered(watched.seconds)
                if len(ended) == 1 + (shadow is not None):
                    self._enter(canary, **ended)

            return note

        _Watched(answer, options, end("new"))
        if shadow is not None:
            _Watched(shadow, options, end("old"))

    def _enter(self, canary: Canary, new: _Watched, old: _Watched | None = None) -> None:
        comparable = old is not None and not (new.failed or old.failed or old.void) and new.deterministic
        if new.void:
            return
        canary.new_answered(new.seconds, new.failed, new.tokens != old.tokens if comparable else None)
        if canary.state != RUNNING:
            logger.warning("the trial of %s is over: %s%s", canary.name, canary.state,
                           f", because {canary.why}" if canary.why else "")


class _Watched:
    """One request's answers, looked at as they pass. ``ended`` is called once, when all of them have ended.

    Attributes:
      failed: by the engine's fault. void: by the client's, or its deadline: that says nothing of a version.
    """

    def __init__(self, answer: Answer, options: Mapping[str, Any], ended: Callable[[_Watched], None]) -> None:
        self._left, self._arrived, self._ended = answer.open, options["arrived"], ended
        # A seed draws the same only where logits are the same; scores and embeddings are not compared.
        self.deterministic = options["params"].get("temperature") == 0
        self.tokens: dict[int, list[int]] = {}
        self.failed, self.void, self.seconds = False, False, 0.0
        answer.watcher = self._look

    def _look(self, piece: Piece | None) -> None:
        """None: there will be no more."""
        if not self._left:
            return
        if piece is None or piece.kind == "fault":
            self.failed, self._left = True, 0
        elif piece.kind is not None:
            self.void, self._left = True, 0
        else:
            self.tokens.setdefault(piece.index, []).extend(piece.token_ids)
            self._left -= piece.finish_reason is not None
        if not self._left:
            self.seconds = time.monotonic() - self._arrived
            self._ended(self)


class TrialRequest(Body):
    """
    Attributes:
      adapter: a loaded one. weights, requests, shadowed: see `CanaryOptions`.
      disagreement: share of answers from which on the new version is bad, for one that is meant to answer otherwise.
    """

    adapter: Annotated[StrictStr, Field(min_length=1)]
    weights: list[Share] | None = None
    requests: Annotated[StrictInt, Field(ge=1)] | None = None
    shadowed: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)] | None = None
    disagreement: Annotated[StrictFloat | StrictInt, Field(gt=0, lt=1)] | None = None

    def options(self) -> CanaryOptions:
        given: dict[str, Any] = {name: value for name in ("requests", "shadowed")
                                 if (value := getattr(self, name)) is not None}
        if self.weights is not None:
            given["weights"] = tuple(self.weights)
        if self.disagreement is not None:
            given["disagreed"] = Limit(self.disagreement / 2, self.disagreement)
        return CanaryOptions(**given)


def trial_routes(service: Service, link: TrialLink) -> APIRouter:
    """For the admin port."""
    routes = APIRouter()

    def state() -> dict[str, Any]:
        canary = link.canary
        if canary is None:
            return {"state": "none"}
        tests = {name: {"happened": test.happened, "of": test.seen, "verdict": test.verdict}
                 for name, test in canary.tests.items()}
        return {"state": canary.state, "adapter": canary.name, "weight": canary.weight, "requests": canary.total,
                "why": canary.why, "tests": tests}

    @routes.get("/admin/canary")
    async def show() -> Any:
        """How the trial goes, or how the last one went."""
        return state()

    @routes.post("/admin/canary")
    async def begin(body: TrialRequest) -> Any:
        """A share of the requests for the base model gets an adapter from now on."""
        body.check_fields()
        if link.running:
            raise ApiError(409, f"{link.canary.name} is on trial: end that first, with DELETE")
        if body.adapter not in service.adapters:
            raise ApiError(404, f"no adapter named {body.adapter!r} is loaded", "model_not_found", "adapter")
        link.canary = Canary(body.adapter, body.options())
        return state()

    @routes.delete("/admin/canary")
    async def end() -> Any:
        """Everybody gets the base model again, also after a promotion."""
        found = state()
        link.canary = None
        return found

    return routes
