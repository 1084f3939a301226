"""A trial of an adapter, or of other weights, in a running server: a share of the requests for the base model gets it.

`Canary` decides the share, and when the trial is over. Weights are first in one of several engines, and in all of them
once they are promoted.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from qwen_jax.cluster.canary.policy import PROMOTED, RUNNING, TAKEN_BACK, Canary, CanaryOptions
from qwen_jax.cluster.routing.load_balancer import LoadBalancer
from qwen_jax.cluster.routing.replica_set import begin_trial, end_trial
from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.engine_client import Answer, EngineBackend
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import Piece, RequestOptions

logger = logging.getLogger(__name__)
MISSING = "the adapter is not loaded any more"


class CanaryClient:
    """A wrapper around a connection to engines that sends a share of the base model's requests to a version on trial.

    Requests that name an adapter are not part of a trial.

    Attributes:
      canary: the current or the last trial; None before the first.
      is_adapter: true if the version on trial is an adapter, false if it is weights.
      on_promoted: function that is called when all engines have got the weights of a trial.
    """

    def __init__(self, link: EngineBackend, seed: int | None = None) -> None:
        self._link, self._random = link, random.Random(seed)
        self.canary: Canary | None = None
        self.is_adapter = True
        # Arguments of the update with the weights on trial, also while they are loaded; None if no weights are tried.
        self._update: tuple[Any, ...] | None = None
        self._ending: asyncio.Task | None = None
        self.on_promoted: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped connection: everything but `generate` is passed on to it."""
        return getattr(self._link, name)

    @property
    def running(self) -> bool:
        """True while a trial runs, or its weights are loaded or removed: requests may get different versions."""
        return self._update is not None or (self.canary is not None and self.canary.state == RUNNING)

    @property
    def promoted_adapter(self) -> str | None:
        """The adapter that all requests for the base model get since its promotion, or None."""
        return self.canary.name if self.canary and self.canary.state == PROMOTED and self.is_adapter else None

    @property
    def on_trial(self) -> str:
        """Name of the version on trial: an adapter, or the source of weights."""
        return self._update[0] if self._update else self.canary.name

    @property
    def engines(self) -> int:
        """Number of engines that are alive, at least 1."""
        replicas = self._link.replicas if isinstance(self._link, LoadBalancer) else ()
        return max(sum(replica.alive for replica in replicas), 1)

    def adapter_for(self, user: str) -> str | None:
        """Return the adapter that a user's requests for the base model get: "" for none, None if that cannot be told
        because weights are on trial."""
        if self.canary is None or not self.canary.weight:
            return ""
        if not self.is_adapter:
            return None
        return self.canary.name if self.canary.gets(user) else ""

    def try_adapter(self, name: str, options: CanaryOptions) -> None:
        """Begin a trial: a share of the requests for the base model gets a loaded adapter."""
        self.canary, self.is_adapter = Canary(name, options), True

    async def try_weights(self, update: tuple[Any, ...], options: CanaryOptions, drain_seconds: float) -> None:
        """Load other weights into one engine and begin their trial. Errors, and arguments but ``options``, are those of
        `begin_trial`."""
        if not isinstance(self._link, LoadBalancer):
            raise ApiError(409, "a trial of weights needs several engines: start the server with --replicas 2 or more")
        if options.weights[-1] > 1 / self.engines:
            raise ApiError(400, f"weights must be at most {1 / self.engines:.3f}, the share of one of {self.engines} "
                           f"engines, not {options.weights[-1]}", param="weights")
        self._update, self.is_adapter = update, False
        try:
            await begin_trial(self._link, update, drain_seconds)
        except BaseException:
            self._update = None
            raise
        self.canary = Canary(update[0], options)

    async def end(self) -> None:
        """End the trial: all requests get the base model again. Weights that were promoted stay."""
        if self._update is not None:
            if self.canary is None or self.canary.name != self._update[0]:
                raise ApiError(409, f"{self._update[0]} is being loaded for a trial: end that once it has begun")
            if self.canary.state == RUNNING:
                self.canary.take_back("it was ended")
                self._end_weights_trial()
            await self._ending
        self.canary = None

    def generate(self, options: RequestOptions, answers: int) -> Answer:
        """Send a request to the version that its user gets, and record for a running trial how the version did."""
        canary = self.canary
        if canary is None or options.adapter is not None or not canary.weight:
            return self._link.generate(options, answers)
        if not self.is_adapter and canary.state != RUNNING:  # all engines have the same weights, or will have soon
            return self._link.generate(options, answers)
        if not self.is_adapter and not any(replica.on_trial for replica in self._link.replicas):
            canary.take_back("the engine that had it has ended")
            self._on_verdict(canary)
            return self._link.generate(options, answers)
        if not canary.gets(options.user or repr(options.prompt)):
            answer = self._link.generate(options, answers)
            _AnswerWatcher(answer, options, lambda old: old.failed or old.void or canary.old_answered(old.seconds))
            return answer
        version = {"adapter": canary.name} if self.is_adapter else {"on_trial": True}
        answer = self._link.generate(replace(options, **version), answers)
        if canary.state == RUNNING:
            self._compare(canary, answer, options, answers)
        else:
            _AnswerWatcher(answer, options, lambda new: new.missing and self._adapter_missing(canary))
        return answer

    async def call(self, name: str, *arguments: Any, patient: bool = False) -> Any:
        """Call a function of the engines. A trial, or a promotion, of an adapter ends before that is unloaded."""
        canary = self.canary
        if name == "unload_adapter" and self.is_adapter and canary and canary.weight and canary.name == arguments[0]:
            self._adapter_missing(canary)
        return await self._link.call(name, *arguments, patient=patient)

    def _adapter_missing(self, canary: Canary) -> None:
        """Give all requests to the base model again, because the adapter of a trial or promotion is not loaded."""
        if canary is self.canary and canary.weight:
            canary.take_back(MISSING)
            self._on_verdict(canary)

    def _compare(self, canary: Canary, answer: Answer, options: RequestOptions, answers: int) -> None:
        """Record an answer of the new version, and for a share of the requests also ask the old version to compare."""
        ended: dict[str, _AnswerWatcher] = {}
        shadow = None
        if canary.shadows(self._random):
            try:  # with a lower priority than the requests of clients
                shadow = self._link.generate(replace(options, stream=False, priority=options.priority + 1), answers)
            except ApiError:  # the request limit is reached: the old version is not asked
                pass

        def on_end(version: str) -> Callable[[_AnswerWatcher], None]:
            def record(watcher: _AnswerWatcher) -> None:
                ended[version] = watcher
                if version == "old":
                    self._link.close(shadow)
                    if not (watcher.failed or watcher.void):
                        canary.old_answered(watcher.seconds)
                if len(ended) == 1 + (shadow is not None):
                    self._record(canary, **ended)

            return record

        _AnswerWatcher(answer, options, on_end("new"))
        if shadow is not None:
            _AnswerWatcher(shadow, options, on_end("old"))

    def _record(self, canary: Canary, new: _AnswerWatcher, old: _AnswerWatcher | None = None) -> None:
        comparable = old is not None and not (new.failed or old.failed or old.void) and new.deterministic
        if new.void:
            return
        canary.new_answered(new.seconds, new.failed, new.tokens != old.tokens if comparable else None)
        if new.missing and canary.state == RUNNING:
            canary.take_back(MISSING)
        if canary.state != RUNNING and canary is self.canary:
            self._on_verdict(canary)

    def _on_verdict(self, canary: Canary) -> None:
        logger.warning("the trial of %s is over: %s%s", canary.name, canary.state,
                       f", because {canary.why}" if canary.why else "")
        if self._update is not None:
            self._end_weights_trial()

    def _end_weights_trial(self) -> None:
        if self._ending is None or self._ending.done():
            self._ending = asyncio.create_task(self._settle_weights(self.canary, self._update))

    async def _settle_weights(self, canary: Canary, update: tuple[Any, ...]) -> None:
        """Give the weights on trial to all engines if they were promoted, else roll back the engine that has them."""
        try:
            await end_trial(self._link, update if canary.state == PROMOTED else None)
            if canary.state == PROMOTED:
                self.on_promoted()
        except (UserError, ApiError) as error:
            if canary.state == PROMOTED:
                canary.state, canary.why = TAKEN_BACK, f"another engine could not have it: {error}"
            logger.error("the trial of %s did not end as it should: %s", canary.name, error)
        finally:
            self._update = None


class _AnswerWatcher:
    """A record of a request's answers, made as parts of them arrive. Calls ``on_end`` once, when all have ended.

    Attributes:
      deterministic: true if the same version always answers with the same tokens.
      tokens: token ids of each answer, by its index.
      missing: true if the adapter was not loaded.
      failed: true if the engine is to blame for an error, or the adapter was not loaded.
      void: true if the client or its deadline ended the request, which tells nothing about a version.
      seconds: time from arrival to the end.
    """

    def __init__(self, answer: Answer, options: RequestOptions, on_end: Callable[[_AnswerWatcher], None]) -> None:
        self._open, self._arrived, self._on_end = answer.open, options.arrived, on_end
        # A seed draws the same only where logits are the same; scores and embeddings are not compared.
        self.deterministic = options.params.get("temperature") == 0
        self.tokens: dict[int, list[int]] = {}
        self.missing, self.failed, self.void, self.seconds = False, False, False, 0.0
        answer.watcher = self._on_piece

    def _on_piece(self, piece: Piece | None) -> None:
        """Record a part of an answer that the engine sent; None if no more will come, though answers are incomplete."""
        if not self._open:
            return
        if piece is None or piece.kind in ("fault", "adapter"):
            self.missing = piece is not None and piece.kind == "adapter"
            self.failed, self._open = True, 0
        elif piece.kind is not None:
            self.void, self._open = True, 0
        else:
            self.tokens.setdefault(piece.index, []).extend(piece.token_ids)
            self._open -= piece.finish_reason is not None
        if not self._open:
            self.seconds = time.monotonic() - self._arrived
            self._on_end(self)
