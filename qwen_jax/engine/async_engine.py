"""The engine for asyncio: coroutines add requests and read their answers while a thread steps the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from qwen_jax.engine.api.outputs import Delta, RequestOutput
from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.api.stats import EngineStats
from qwen_jax.engine.core.engine_thread import EngineBusy, EngineDead, EngineThread
from qwen_jax.engine.core.weight_update import Golden, update_weights
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.frontend.input_processor import Messages, Prompt
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.scheduling.schedule_policy import check_positive
from qwen_jax.errors import UserError

__all__ = ["AsyncEngine", "EngineBusy", "EngineDead"]


class AsyncEngine:
    """Engine for asyncio: ``async for delta in engine.stream(prompt)``, or ``output = await engine.generate(prompt)``.

    Args:
      engine: warmed up; from now on only this object uses it.
      max_requests: requests queued or running at once; more are refused with `EngineBusy` before they are tokenised.

    Prompts are tokenised on other threads, so that a long one does not hold up the steps.
    """

    def __init__(self, engine: Engine, max_requests: int = 1024) -> None:
        check_positive(max_requests=max_requests)
        self._engine = engine
        self._updates = ThreadPoolExecutor(1, "qwen-jax-weights")  # updates of the weights run one after the other
        self._thread = EngineThread(engine.core, max_requests)
        self._thread.start()

    @classmethod
    async def from_pretrained(cls, ref: str | Path, *, max_requests: int = 1024, **options: Any) -> AsyncEngine:
        """Make an engine as ``Engine.from_pretrained`` does; it is loaded and compiled on another thread."""
        return cls(await asyncio.to_thread(Engine.from_pretrained, ref, **options), max_requests)

    async def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None, *,
                     adapter: str | None = None, priority: int = 0,
                     timeout: float | None = None) -> AsyncIterator[Delta]:
        """Yield the answer piece by piece. Leaving the loop, or cancelling the task, aborts the request.

        Args:
          adapter: name of a loaded adapter.
          priority: requests with the lowest run first.
          timeout: seconds from now, waiting included; an answer that is not finished then ends as "abort".

        Raises UserError for a bad request, `EngineBusy` and `EngineDead`.
        """
        async with aclosing(self._answer(prompt, params, adapter, priority=priority, timeout=timeout,
                                         streams=True)) as answer:
            async for delta, _ in answer:
                yield delta

    async def generate(self, prompt: Prompt | Messages, params: SamplingParams | None = None, *,
                       adapter: str | None = None, priority: int = 0, timeout: float | None = None) -> RequestOutput:
        """Return the whole answer; arguments as for `stream`. Cancelling the task aborts the request."""
        async with aclosing(self._answer(prompt, params, adapter, priority=priority, timeout=timeout,
                                         streams=False)) as answer:
            async for _, request in answer:
                output = request.output
        return output

    async def update_weights(self, source: Any, policy: str = "finish_old", golden: Golden | None = None) -> int:
        """Update the weights as `Engine.update_weights` does, while other requests go on.

        Another thread loads and checks them, golden prompts run beside other requests, and the switch is made between
        two steps. Cancelling the task keeps the old weights, unless the switch has been made.
        """
        if self._thread.failure:
            raise EngineDead(f"the engine has stopped: {self._thread.failure}")
        cancelled = threading.Event()
        update = self._updates.submit(update_weights, self._engine.core, self._engine.input_processor, source,
                                      policy=policy, golden=golden, thread=self._thread, cancelled=cancelled.is_set)
        try:
            return await asyncio.wrap_future(update)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def rollback(self) -> int:
        """Go back to the weights before the last update, as `Engine.rollback` does, between two steps."""
        return await self._call(self._engine.rollback)

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        """Load a LoRA adapter as `Engine.load_adapter` does, between two steps."""
        await self._call(lambda: self._engine.load_adapter(name, folder))

    async def unload_adapter(self, name: str) -> None:
        """Unload a LoRA adapter as `Engine.unload_adapter` does, between two steps."""
        await self._call(lambda: self._engine.unload_adapter(name))

    async def stats(self) -> EngineStats:
        """Return the engine's counters (`Engine.stats`), read between two steps."""
        return await self._call(self._engine.stats)

    async def drain(self) -> None:
        """Refuse new requests, and return when the open ones have ended or the engine has stopped."""
        await asyncio.wrap_future(self._thread.drain())

    async def close(self) -> None:
        """Abort all open requests and end the engine's thread. May be called twice."""
        await asyncio.to_thread(self._thread.close)
        self._updates.shutdown(wait=False, cancel_futures=True)

    async def _call(self, function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._thread.call(function))

    async def _answer(self, prompt: Prompt | Messages, params: SamplingParams | None, adapter: str | None, *,
                      priority: int, timeout: float | None, streams: bool) -> AsyncIterator[tuple[Delta, Request]]:
        """Submit a request; yield each part of its answer (without ``streams`` only the last), with the request."""
        params = params or SamplingParams()
        if params.n != 1:
            raise UserError(f"n must be 1 for a single answer, not {params.n}: send the prompt {params.n} times")
        if timeout is not None and not timeout > 0:
            raise UserError(f"timeout must be a positive number of seconds, not {timeout!r}")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise UserError(f"priority must be an integer, not {priority!r}")
        deadline = None if timeout is None else time.monotonic() + timeout
        prepare = partial(self._engine.input_processor.requests, prompt, params, adapter=adapter, priority=priority,
                          deadline=deadline, streams=streams)
        deltas = _DeltaQueue(streams)
        submission = self._thread.submit(prepare, deltas, grammar=params.structured_output is not None)
        try:
            while True:
                delta = await deltas.next()
                yield delta, submission.requests[0]
                if delta.finish_reason:
                    return
        finally:
            self._thread.abort(submission)


class _DeltaQueue:
    """Listener that hands one request's deltas to a coroutine: each of them with ``streams``, else only the last."""

    def __init__(self, streams: bool) -> None:
        self._streams, self._loop = streams, asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    async def next(self) -> Delta:
        """Wait for the next part of the answer and return it. Raises what the request failed with."""
        delta = await self._queue.get()
        if isinstance(delta, Exception):
            raise delta
        return delta

    def after_step(self, requests: Sequence[Request]) -> None:
        request, = requests
        if self._streams:
            while request.deltas:
                self._put(request.deltas.popleft())
        elif request.closed:
            self._put(request.deltas.pop())

    def aborted(self, requests: Sequence[Request]) -> None:
        """Do nothing: the coroutine that read the answer has left."""

    def failed(self, error: Exception) -> None:
        self._put(error)

    def _put(self, delta: Delta | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, delta)
        except RuntimeError:  # the event loop is closed: its coroutines have ended
            pass
