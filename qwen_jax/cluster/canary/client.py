"""An adapter, or other weights, on trial in a running server: a share of the requests for the base model gets them, as
`Canary` says. Weights are first in one of several engines, and in the others once they are promoted."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from qwen_jax.cluster.canary.policy import PROMOTED, RUNNING, TAKEN_BACK, Canary, CanaryOptions
from qwen_jax.cluster.routing.load_balancer import Balancer
from qwen_jax.cluster.routing.replica_set import begin_trial, end_trial
from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.engine_client import Answer, Link
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import Piece

logger = logging.getLogger(__name__)


class TrialLink:
    """A link around another one. Requests that name an adapter are not part of a trial.

    Attributes:
      canary: the trial, running or over; None before the first. of_adapter: it is one of an adapter.
      promoted: called with the weights that all engines have got.
    """

    def __init__(self, link: Link, seed: int | None = None) -> None:
        self._link, self._random = link, random.Random(seed)
        self.canary: Canary | None = None
        self.of_adapter = True
        self._weights: tuple[Any, ...] | None = None  # on trial, or to be; None where that is an adapter, or over
        self._ending: asyncio.Task | None = None
        self.promoted: Callable[[str], None] = lambda source: None

    def __getattr__(self, name: str) -> Any:
        """What is no request is the other link's."""
        return getattr(self._link, name)

    @property
    def running(self) -> bool:
        """Whether engines, or clients, may have different versions."""
        return self._weights is not None or (self.canary is not None and self.canary.state == RUNNING)

    @property
    def everybody_has(self) -> str | None:
        """The adapter that was promoted: requests for the base model get it."""
        return self.canary.name if self.canary and self.canary.state == PROMOTED and self.of_adapter else None

    @property
    def on_trial(self) -> str:
        return self._weights[0] if self._weights else self.canary.name

    @property
    def engines(self) -> int:
        members = self._link.members if isinstance(self._link, Balancer) else ()
        return max(sum(member.alive for member in members), 1)

    def try_adapter(self, name: str, options: CanaryOptions) -> None:
        self.canary, self.of_adapter = Canary(name, options), True

    async def try_weights(self, update: tuple[Any, ...], options: CanaryOptions, drain_seconds: float) -> None:
        """``update``: as for the worker's ``update_weights``. See `begin_trial`."""
        if not isinstance(self._link, Balancer):
            raise ApiError(409, "a trial of weights takes one engine of several: there is no second one")
        if options.weights[-1] > 1 / self.engines:
            raise ApiError(400, f"one of {self.engines} engines is to have them: shares of at most "
                           f"{1 / self.engines:.3f}", param="weights")
        self._weights, self.of_adapter = update, False
        try:
            await begin_trial(self._link, update, drain_seconds)
        except BaseException:
            self._weights = None
            raise
        self.canary = Canary(update[0], options)

    async def end(self) -> None:
        """Everybody gets the base model again; weights that were promoted stay."""
        if self._weights is not None:
            if self.canary is None or self.canary.name != self._weights[0]:
                raise ApiError(409, f"{self._weights[0]} is being loaded for a trial: end that once it has begun")
            if self.canary.state == RUNNING:
                self.canary.state, self.canary.why = TAKEN_BACK, "it was ended"
                self._end_of_weights()
            await self._ending
        self.canary = None

    def generate(self, options: Mapping[str, Any], answers: int) -> Answer:
        canary = self.canary
        if canary is None or options["adapter"] is not None or not canary.weight:
            return self._link.generate(options, answers)
        if not self.of_adapter and canary.state != RUNNING:  # all engines have the same weights, or will have soon
            return self._link.generate(options, answers)
        if not self.of_adapter and not any(member.on_trial for member in self._link.members):
            canary.state, canary.why = TAKEN_BACK, "the engine that had it has ended"
            self._note_end(canary)
            return self._link.generate(options, answers)
        if not canary.gets(options.get("user") or repr(options["prompt"])):
            answer = self._link.generate(options, answers)
            _Watched(answer, options, lambda old: old.failed or old.void or canary.old_answered(old.seconds))
            return answer
        new = {"adapter": canary.name} if self.of_adapter else {"on_trial": True}
        answer = self._link.generate({**options, **new}, answers)
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
        if canary.state != RUNNING and canary is self.canary:
            self._note_end(canary)

    def _note_end(self, canary: Canary) -> None:
        logger.warning("the trial of %s is over: %s%s", canary.name, canary.state,
                       f", because {canary.why}" if canary.why else "")
        if self._weights is not None:
            self._end_of_weights()

    def _end_of_weights(self) -> None:
        if self._ending is None or self._ending.done():
            self._ending = asyncio.create_task(self._finish(self.canary, self._weights))

    async def _finish(self, canary: Canary, update: tuple[Any, ...]) -> None:
        try:
            await end_trial(self._link, update if canary.state == PROMOTED else None)
            if canary.state == PROMOTED:
                self.promoted(update[0])
        except (UserError, ApiError) as error:
            if canary.state == PROMOTED:
                canary.state, canary.why = TAKEN_BACK, f"another engine could not have it: {error}"
            logger.error("the trial of %s did not end as it should: %s", canary.name, error)
        finally:
            self._weights = None


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
