"""The thread that owns an engine: others submit requests and calls, and listeners get the answers after each step."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from qwen_jax.engine.core.engine_core import EngineCore
from qwen_jax.engine.frontend.request import Request
from qwen_jax.errors import UserError

logger = logging.getLogger(__name__)
PREPARING_THREADS = 2  # tokenise prompts beside the steps; as many do so for requests with a grammar, which is compiled
Value = TypeVar("Value")


class EngineBusy(UserError):
    """Refusal of a request because too many are open, or because the engine is draining: try again later."""


class EngineDead(RuntimeError):
    """End of all open requests and calls because the engine stopped: a step failed, or it was closed."""


class Listener(Protocol):
    """Receiver of the answers or the error of requests submitted together. Its methods must return quickly."""

    def after_step(self, requests: Sequence[Request]) -> None:
        """Take new parts of the answers. Called on the engine's thread after each step until all requests end."""

    def aborted(self, requests: Sequence[Request]) -> None:
        """Note which requests `EngineThread.abort` ended. Called on the engine's thread."""

    def failed(self, error: Exception) -> None:
        """Note why the requests cannot run: the error of preparing or submitting them, or `EngineDead`.

        Called once, on any thread, and nothing is called afterwards.
        """


@dataclass(eq=False)
class Submission:
    """Requests that were submitted together.

    Attributes:
      listener: receiver of their answers.
      requests: the requests, once they are prepared.
      version: version of the weights to run with; None for the current one.
      counted: whether they count towards the limit of open requests.
      over: whether they have ended, for any reason.
    """

    listener: Listener
    requests: Sequence[Request] = ()
    version: int | None = None
    counted: bool = True
    over: bool = False


@dataclass
class _Action:
    """Function to call between two steps, with a future for its result. Without one, its error stops the engine."""

    function: Callable[[], Any]
    future: Future | None = None

    def run(self) -> None:
        if self.future is None:
            self.function()
        else:
            _fulfil(self.future, self.function)


class EngineThread:
    """Owner of an `EngineCore`: the only thread that uses it.

    Other threads prepare requests (a small pool, beside the steps), submit and abort them, and have functions called
    between two steps. Without requests the thread waits and uses no processor time.

    Args:
      core: the engine; nothing else may use it while the thread runs.
      max_requests: submissions open at once, those that are being prepared included; None for no limit.
      after_step: called on the thread after each step, when all listeners have been.

    Attributes:
      failure: why the thread has ended; None while it runs. Closing it counts as `EngineDead`.
    """

    def __init__(self, core: EngineCore, max_requests: int | None = None,
                 after_step: Callable[[], None] = lambda: None) -> None:
        self.core = core
        self.failure: BaseException | None = None
        self._max_requests, self._after_step = max_requests, after_step
        self._inbox: queue.SimpleQueue[_Action | None] = queue.SimpleQueue()  # None closes
        self._lock = threading.Lock()  # guards the four below, `failure` and `Submission.over`
        self._open: dict[Submission, None] = {}  # not over; in the order of submission
        self._count = 0  # open ones that are counted
        self._draining = False
        self._drained: list[Future] = []
        self._running: dict[Submission, None] = {}  # inside the core; this and the next: the engine's thread only
        self._calls: deque[_Action] = deque()  # taken from the inbox and not called yet
        self._pool = ThreadPoolExecutor(PREPARING_THREADS, "qwen-jax-prepare")
        self._grammar_pool = ThreadPoolExecutor(PREPARING_THREADS, "qwen-jax-grammar")  # seconds for a hostile one
        self._thread: threading.Thread | None = None

    # --- for any other thread

    def start(self) -> None:
        """Start the thread that steps the engine."""
        self._thread = threading.Thread(target=self.run, name="qwen-jax-engine", daemon=True)
        self._thread.start()

    def submit(self, prepare: Callable[[], Sequence[Request]], listener: Listener, grammar: bool = False) -> Submission:
        """Submit requests that ``prepare`` makes on another thread; ``listener`` gets their answers.

        grammar: whether preparing them compiles a grammar: then no request without a grammar waits for it.

        Raises `EngineBusy` beyond ``max_requests`` or while draining, and `EngineDead`; ``listener`` gets later errors.
        """
        submission = Submission(listener)
        with self._lock:
            if self.failure:
                raise self._dead() from self.failure
            if self._draining:
                raise EngineBusy("the engine is draining: it takes no new requests")
            if self._max_requests is not None and self._count >= self._max_requests:
                raise EngineBusy(f"{self._count} requests are queued or running (max_requests): try again later")
            self._open[submission] = None
            self._count += 1
            pool = self._grammar_pool if grammar else self._pool
            pool.submit(self._prepare, submission, prepare)
        return submission

    def abort(self, submission: Submission) -> None:
        """Abort a submission's requests, also while they are prepared. At once they no longer count as open."""
        if self._end(submission):
            self._post(_Action(partial(self._abort, submission)))

    def withdraw(self, count: int) -> Future[list[Listener]]:
        """Take back at most ``count`` submissions, the latest that no step has worked on, as if never submitted.

        Returns a future of their listeners, which are not called any more.
        """
        return self.call(partial(self._withdraw, count))

    def call(self, function: Callable[[], Value]) -> Future[Value]:
        """Have the engine's thread call a function between two steps. While requests run, a step follows every call.

        Returns a future of its result, its error, or `EngineDead`.
        """
        future: Future[Value] = Future()
        if not self._post(_Action(function, future)):
            future.set_exception(self._dead())
        return future

    def between_steps(self, function: Callable[[], Value]) -> Value:
        """Have the engine's thread call a function between two steps; wait for its result and return it."""
        return self.call(function).result()

    def complete(self, requests: Sequence[Request], version: int | None = None) -> None:
        """Run prepared requests and wait until all are closed, beside others and regardless of ``max_requests``.

        Raises the error of submitting them, or `EngineDead`. They are aborted when the wait is interrupted.
        """
        done: Future[None] = Future()
        submission = Submission(_Completion(done), requests, version, counted=False)
        with self._lock:
            if self.failure:
                raise self._dead() from self.failure
            self._open[submission] = None
        self._post(_Action(partial(self._begin, submission)))
        try:
            done.result()
        finally:
            self.abort(submission)

    def drain(self) -> Future[None]:
        """Refuse new requests. The future is done when the open ones have ended, or the engine has stopped."""
        future: Future[None] = Future()
        with self._lock:
            self._draining = True
            waits = self._count > 0 and not self.failure
            if waits:
                self._drained.append(future)
        if not waits:
            future.set_result(None)
        return future

    def close(self) -> None:
        """Abort all open requests and end the thread. May be called twice."""
        self._inbox.put(None)
        if self._thread:
            self._thread.join()

    # --- on the threads that prepare requests

    def _prepare(self, submission: Submission, prepare: Callable[[], Sequence[Request]]) -> None:
        if submission.over:
            return
        try:
            submission.requests = prepare()
        except BaseException as error:  # a panic in a tokenizer's or a grammar's Rust code is no Exception
            self._fail(submission, error)
        else:
            self._post(_Action(partial(self._begin, submission)))

    # --- on the engine's thread

    def run(self) -> None:
        """Step the engine until `close` or a failed step; then tell the listeners of all open requests."""
        try:
            while self._act():
                self.core.step()
                self._notify()
            for submission in self._running:
                self._abort_requests(submission)
            failure: BaseException = EngineDead("the engine was closed")
        except BaseException as error:  # the device's state is lost, and with it all requests
            failure = error
        self._stop(failure)

    def _act(self) -> bool:
        """Run the actions that other threads posted; without requests, wait for one. Returns False after `close`.

        While requests run it makes one call at most, so that many calls do not keep the engine from its steps.
        """
        called = False
        while True:
            try:
                action = self._inbox.get(block=not self._running and not self._calls)
            except queue.Empty:
                if not self._calls or (called and self._running):
                    return True
                action, called = self._calls.popleft(), True
            else:
                if action is None:
                    return False
                if action.future is not None:
                    self._calls.append(action)
                    continue
            action.run()
            if self.core.failure:
                raise self.core.failure

    def _begin(self, submission: Submission) -> None:
        if submission.over:
            return
        try:
            self.core.submit(submission.requests, submission.version)
        except Exception as error:  # such as an adapter that was unloaded meanwhile
            self._abort_requests(submission)
            self._fail(submission, error)
        else:
            self._running[submission] = None

    def _notify(self) -> None:
        for submission in list(self._running):
            if all(request.closed for request in submission.requests):
                del self._running[submission]
                self._end(submission)  # its place is free before its client knows
            try:
                submission.listener.after_step(submission.requests)
            except Exception as error:  # it ends these requests alone
                logger.exception("the answers to a request could not be passed on")
                self._running.pop(submission, None)
                self._abort_requests(submission)
                self._end(submission)
                submission.listener.failed(error)
        self._after_step()

    def _abort(self, submission: Submission) -> None:
        if submission in self._running:
            del self._running[submission]
            submission.listener.aborted(self._abort_requests(submission))

    def _abort_requests(self, submission: Submission) -> list[Request]:
        """Abort those requests of a submission that are not closed, and return them."""
        return [request for request in submission.requests if self.core.abort(request.sequence.request_id)]

    def _withdraw(self, count: int) -> list[Listener]:
        waiting = [submission for submission in self._running if submission.counted
                   and not any(request.begun or request.closed for request in submission.requests)]
        withdrawn = waiting[max(len(waiting) - count, 0):]
        for submission in withdrawn:
            for request in submission.requests:
                self.core.withdraw(request)
            del self._running[submission]
            self._end(submission)
        return [submission.listener for submission in withdrawn]

    def _stop(self, failure: BaseException) -> None:
        with self._lock:
            self.failure = failure
            unfinished = list(self._open)
        for pool in (self._pool, self._grammar_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        for submission in unfinished:
            self._fail(submission, self._dead())
        self._running.clear()
        while not self._inbox.empty():
            if (action := self._inbox.get()) and action.future:
                self._calls.append(action)
        for action in self._calls:
            if action.future.set_running_or_notify_cancel():
                action.future.set_exception(self._dead())
        self._calls.clear()

    # --- shared

    def _post(self, action: _Action) -> bool:
        """Queue an action for the engine's thread; return False when the thread has ended."""
        with self._lock:
            if self.failure is None:
                self._inbox.put(action)
            return self.failure is None

    def _end(self, submission: Submission) -> bool:
        """Note that a submission is over and no longer counts as open; return False when it already was."""
        with self._lock:
            if submission.over:
                return False
            submission.over = True
            del self._open[submission]
            self._count -= submission.counted
            drained = [] if self._count else self._drained
            if drained:
                self._drained = []
        for future in drained:
            _fulfil(future, lambda: None)
        return True

    def _fail(self, submission: Submission, error: Exception) -> None:
        if self._end(submission):
            submission.listener.failed(error)

    def _dead(self) -> EngineDead:
        return EngineDead(f"the engine has stopped: {self.failure}")


class _Completion:
    """Listener that completes a future when all requests are closed."""

    def __init__(self, done: Future[None]) -> None:
        self._done = done

    def after_step(self, requests: Sequence[Request]) -> None:
        if all(request.closed for request in requests):
            self._done.set_result(None)

    def aborted(self, requests: Sequence[Request]) -> None:
        pass

    def failed(self, error: Exception) -> None:
        self._done.set_exception(error)


def _fulfil(future: Future, function: Callable[[], Any]) -> None:
    """Call a function and give its result or error to a future, unless the future was cancelled."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except (KeyboardInterrupt, SystemExit) as error:
        future.set_exception(error)
        raise
    except BaseException as error:  # a panic in Rust code is no Exception
        future.set_exception(error)
    else:
        future.set_result(result)
