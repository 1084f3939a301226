"""The engine for asyncio: one thread owns it and steps it; coroutines add requests and read their answers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from qwen_jax.engine.api.outputs import Delta, RequestOutput
from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.api.stats import EngineStats
from qwen_jax.engine.core.weight_update import Golden, check_golden, check_policy, golden_requests, switch
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.frontend.input_processor import Messages, Prompt
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.scheduling.schedule_policy import check_positive
from qwen_jax.errors import UserError


class EngineBusy(UserError):
    """As many requests as ``max_requests`` allows are queued or running: try again later."""


class EngineDead(RuntimeError):
    """The engine stopped (a failed step, or it was closed); what ran then has this as its answer."""


class _Listener:
    """Where the engine's thread puts the deltas of one request."""

    def __init__(self, request: Request, version: int | None = None) -> None:
        self.request, self.version = request, version
        self._loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()

    def put(self, item: Delta | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody listens any more
            pass


class AsyncEngine:
    """``async for delta in engine.stream(prompt, params)``; ``await engine.generate(prompt, params)``.

    Args:
      engine: warmed up; from now on only this object uses it.
      max_requests: requests queued or running at once; more are refused with `EngineBusy` before they are tokenised.

    Tokenising happens on other threads, so that a long prompt does not hold up the steps.
    """

    def __init__(self, engine: Engine, max_requests: int = 1024) -> None:
        check_positive(max_requests=max_requests)
        self._engine, self._max_requests = engine, max_requests
        self._lock = threading.Condition()  # guards the five below; the engine's thread waits on it
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._accepted = 0
        self._draining = self._closing = False
        self._failure: BaseException | None = None
        self._listeners: dict[int, _Listener] = {}  # by request id; the engine's thread only
        self._updating = asyncio.Lock()
        self._thread = threading.Thread(target=self._run, name="qwen-jax-engine", daemon=True)
        self._thread.start()

    @classmethod
    async def from_pretrained(cls, ref: str | Path, *, max_requests: int = 1024, **options: Any) -> AsyncEngine:
        """Arguments of ``Engine.from_pretrained``; loads and compiles on another thread."""
        return cls(await asyncio.to_thread(Engine.from_pretrained, ref, **options), max_requests)

    # --- for coroutines

    async def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None, *,
                     adapter: str | None = None, priority: int = 0,
                     timeout: float | None = None) -> AsyncIterator[Delta]:
        """The answer piece by piece. Leaving the loop, or cancelling the task, aborts the request at the next step.

        priority: requests with the lowest run first. timeout: seconds from now, waiting included; an answer that is not
        finished then ends as "abort".
        Raises UserError for a bad request, `EngineBusy` and `EngineDead`.
        """
        async with aclosing(self._follow(prompt, params, adapter, priority, timeout, True)) as items:
            async for delta, _ in items:
                yield delta

    async def generate(self, prompt: Prompt | Messages, params: SamplingParams | None = None, *,
                       adapter: str | None = None, priority: int = 0, timeout: float | None = None) -> RequestOutput:
        """The whole answer; arguments as for `stream`. Cancelling the task aborts the request."""
        async with aclosing(self._follow(prompt, params, adapter, priority, timeout, False)) as items:
            requests = [request async for _, request in items]
        return requests[-1].output

    async def update_weights(self, source: Any, policy: str = "finish_old", golden: Golden | None = None) -> int:
        """`Engine.update_weights` while the engine goes on: another thread loads and checks, golden prompts run beside
        other requests, and the switch is made between two steps."""
        check_policy(policy)
        engine = self._engine
        tried = golden_requests(engine.input_processor, golden)
        async with self._updating:
            add = partial(engine.weights.add, await asyncio.to_thread(engine.weights.load, source))
            version = await self._on_engine(add)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for request, _ in tried:
                        tasks.create_task(self._finish(_Listener(request, version)))
                check_golden(tried)
            except BaseException:
                await asyncio.shield(self._on_engine(lambda: engine.weights.forget(version)))
                raise
            await self._on_engine(lambda: switch(engine.core, version, policy))
        return version

    async def rollback(self) -> int:
        """`Engine.rollback`, between two steps."""
        return await self._on_engine(self._engine.rollback)

    async def load_adapter(self, name: str, folder: str | Path) -> None:
        await self._on_engine(lambda: self._engine.load_adapter(name, folder))

    async def unload_adapter(self, name: str) -> None:
        await self._on_engine(lambda: self._engine.unload_adapter(name))

    async def stats(self) -> EngineStats:
        return await self._on_engine(self._engine.stats)

    async def drain(self) -> None:
        """Refuses new requests and returns when those accepted have finished."""
        with self._lock:
            self._draining = True
        while self._accepted and not self._failure:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Aborts what is running and ends the thread. May be called twice."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        await asyncio.to_thread(self._thread.join)

    async def _follow(self, prompt, params, adapter, priority, timeout, streams
                      ) -> AsyncIterator[tuple[Delta, Request]]:
        params = params or SamplingParams()
        if params.n != 1:
            raise UserError(f"this gives one answer: n must be 1, not {params.n}")
        if timeout is not None and not timeout > 0:
            raise UserError(f"timeout must be a positive number of seconds, not {timeout!r}")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise UserError(f"priority must be an integer, not {priority!r}")
        deadline = None if timeout is None else time.monotonic() + timeout
        self._accept()
        try:
            request, = await asyncio.to_thread(self._engine.input_processor.requests, prompt, params, None,
                                               adapter, priority, deadline)
            request.streams = streams
            async with aclosing(self._listen(_Listener(request))) as deltas:
                async for delta in deltas:
                    yield delta, request
        finally:
            with self._lock:
                self._accepted -= 1

    async def _listen(self, listener: _Listener) -> AsyncIterator[Delta]:
        """Runs a request; leaving aborts it."""
        try:
            await self._on_engine(lambda: self._add(listener))
            while True:
                item = await listener.queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason:
                    return
        finally:
            self._post(lambda: self._engine.core.abort(listener.request.sequence.request_id))

    async def _finish(self, listener: _Listener) -> None:
        async with aclosing(self._listen(listener)) as deltas:
            async for _ in deltas:
                pass

    def _accept(self) -> None:
        with self._lock:
            self._check_alive()
            if self._draining:
                raise EngineBusy("the engine is draining: it takes no new requests")
            if self._accepted >= self._max_requests:
                raise EngineBusy(f"{self._accepted} requests are queued or running (max_requests): try again later")
            self._accepted += 1

    def _check_alive(self) -> None:
        if self._failure or self._closing:
            raise EngineDead("the engine has stopped" + (f": {self._failure}" if self._failure else "")
                             ) from self._failure

    def _post(self, call: Callable[[], Any]) -> Future:
        future: Future = Future()
        with self._lock:
            if self._failure or self._closing:
                future.set_exception(EngineDead("the engine has stopped"))
            else:
                self._calls.append((call, future))
                self._lock.notify()
        return future

    async def _on_engine(self, call: Callable[[], Any]) -> Any:
        """The result of a call that the engine's thread makes between two steps."""
        return await asyncio.wrap_future(self._post(call))

    # --- on the engine's thread

    def _add(self, listener: _Listener) -> None:
        self._engine.core.submit([listener.request], listener.version)
        self._listeners[listener.request.sequence.request_id] = listener

    def _run(self) -> None:
        try:
            while self._work():
                pass
            for number in self._listeners:
                self._engine.core.abort(number)
            failure: BaseException = EngineDead("the engine was closed")
        except BaseException as error:  # a step failed: the device's state is gone, and with it what was running
            failure = error
        with self._lock:
            self._failure = failure
            calls = list(self._calls)
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineDead("the engine has stopped"))
        for listener in self._listeners.values():
            listener.put(EngineDead(f"the engine has stopped: {failure}"))

    def _work(self) -> bool:
        """What others asked for, then one step; waits when there is nothing to do. False when it is over."""
        with self._lock:
            while not (self._calls or self._listeners or self._closing):
                self._lock.wait()
            if self._closing:
                return False
            calls, self._calls = self._calls, deque()
        for call, future in calls:
            if not future.set_running_or_notify_cancel():  # whoever asked has been cancelled
                continue
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)
        self._engine.core.step()
        self._publish()
        return True

    def _publish(self) -> None:
        ended = []
        for number, listener in self._listeners.items():
            deltas = listener.request.deltas
            while deltas:
                listener.put(deltas.popleft())
            if listener.request.closed:
                ended.append(number)
        for number in ended:
            del self._listeners[number]

