"""Client of the engine's process: starts it, sends it requests and calls, and receives the answers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from qwen_jax.errors import UserError
from qwen_jax.serving.ipc.errors import ApiError
from qwen_jax.serving.ipc.messages import (
    LENGTH,
    Abort,
    Call,
    Computes,
    Failed,
    FromEngine,
    Gauges,
    Launch,
    Piece,
    Ready,
    Refused,
    RequestOptions,
    Result,
    Step,
    Submit,
    ToEngine,
    Withdraw,
    decode_from_engine,
    frame,
)
from qwen_jax.serving.ipc.open_answers import OpenAnswers

logger = logging.getLogger(__name__)
MAX_UNREAD_PIECES = 4096  # that an answer's client has not taken; then the answer is aborted
READ_BUFFER_BYTES = 1 << 24
STOP_SECONDS = 10  # that the process has to end by itself
ENGINE_COMMAND = (sys.executable, "-m", "qwen_jax.serving.engine_process.process")
# With one heap for each thread, as is the C library's default, memory that requests free is not used for later ones.
ENGINE_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}


class Answer:
    """The answers to one request, whose parts are put in as the engine sends them and taken out by one reader.

    Attributes:
      number: number by which the HTTP process and the engine's process know the request.
      open: how many of the request's answers have not ended.
      begun: whether any part of an answer has arrived.
      watcher: called with each part that arrives, and with None when a failure ends the request.
    """

    def __init__(self, answers: int) -> None:
        self.number, self.open, self.begun = 0, answers, False
        self.watcher: Callable[[Piece | None], None] | None = None
        self._pieces: list[Piece] = []
        self._failure: ApiError | None = None
        self._waiting: asyncio.Future | None = None

    def put(self, piece: Piece) -> None:
        """Add a part of an answer that has arrived from the engine, and wake the reader."""
        self._pieces.append(piece)
        self.begun = True
        self._tell_watcher(piece)
        self._wake()

    def fail(self, error: ApiError) -> None:
        """End the request with an error, which the reader gets after the parts of answers that have arrived."""
        self._failure = self._failure or error
        self._tell_watcher(None)
        self._wake()

    @property
    def unread(self) -> int:
        """Number of parts that have arrived and that the reader has not taken."""
        return len(self._pieces)

    async def next(self) -> list[Piece]:
        """Take out all parts that have arrived; wait if there is none. Raises ApiError if the request failed."""
        while not self._pieces:
            if self._failure:
                raise self._failure
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        pieces, self._pieces = self._pieces, []
        return pieces

    def _tell_watcher(self, piece: Piece | None) -> None:
        if self.watcher is None:
            return
        try:
            self.watcher(piece)
        except Exception:  # what watches one request must not end the reading for all
            logger.exception("request %d is no longer watched", self.number)
            self.watcher = None

    def _wake(self) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)


class EngineBackend(Protocol):
    """Interface of an engine, or of several that act as one, to the HTTP server; `EngineClient` describes it."""

    facts: Ready | None
    gauges: Gauges
    failure: str | None
    refused: str | None
    ended: asyncio.Event
    requests: int
    open_answers: OpenAnswers

    async def start(self) -> None: ...
    async def stop(self) -> int: ...
    def check_alive(self) -> None: ...
    def silent_seconds(self) -> float: ...
    def computes(self, adapter: str | None) -> str | None: ...
    def generate(self, options: RequestOptions, answers: int) -> Answer: ...
    def close(self, answer: Answer) -> None: ...
    async def call(self, name: str, *arguments: Any, patient: bool = False) -> Any: ...


class EngineClient:
    """Client of one engine, in a process that it starts; for use in one asyncio event loop.

    Args:
      model: the checkpoint: a folder, a hub id or ``bundled``.
      options: keywords of ``Engine.from_pretrained``.
      max_requests: largest number of answers open at once; requests for more are answered with status 429.
      process: other fields of `Launch`.
      environment: environment variables for the engine's process, besides this one's.
      command: command line of the engine's process, to which a socket's file descriptor is added.

    Attributes:
      model: the checkpoint, as it was given.
      facts: the engine's limits and sizes, once it is ready; None before.
      gauges: state of the engine after its last step.
      open_answers: count of the answers that `generate` was asked for and that are not closed.
      failure: why the engine has stopped; None while it has not.
      refused: why no engine could be made, which is the user's mistake; None otherwise.
      ended: event that is set when the connection to the engine's process has ended.
      lost: called with each answer that a failure cuts short; returns whether another engine answers instead.
    """

    def __init__(self, model: str, options: Mapping[str, Any], max_requests: int,
                 process: Mapping[str, Any] = MappingProxyType({}),
                 environment: Mapping[str, str] = MappingProxyType({}),
                 command: Sequence[str] = ENGINE_COMMAND) -> None:
        self.model = model
        self._launch = Launch(model, dict(options), **process)
        self._command, self._environment = command, {**ENGINE_ENVIRONMENT, **os.environ, **environment}
        self.open_answers = OpenAnswers(max_requests)
        self._numbers = itertools.count(1)
        self._answers: dict[int, Answer] = {}
        self._results: dict[int, asyncio.Future] = {}
        self._urgent: set[int] = set()  # numbers of calls that the engine should answer between two steps
        self.facts: Ready | None = None
        self.gauges = Gauges()
        self._computes = Computes(None, {})
        self.failure: str | None = None
        self.refused: str | None = None
        self.ended = asyncio.Event()
        self.lost: Callable[[Answer], bool] = lambda answer: False
        self._last_message = self._idle_until = time.monotonic()

    async def start(self) -> None:
        """Start the engine's process and return at once; the engine is ready when ``facts`` is not None."""
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen([*self._command, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                                        env=self._environment)
        theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=READ_BUFFER_BYTES)
        self._writer.write(frame(self._launch))
        self._reading = asyncio.create_task(self._read())

    @property
    def requests(self) -> int:
        """Number of requests that have not been answered completely."""
        return len(self._answers)

    def silent_seconds(self) -> float:
        """Return for how many seconds the engine has had work and sent nothing; 0 if it has no work."""
        busy = self.facts is not None and (self._answers or self._urgent)
        return time.monotonic() - max(self._last_message, self._idle_until) if busy else 0.0

    def computes(self, adapter: str | None) -> str | None:
        """Return a digest of all that computes answers with an adapter, or with none, beside the request itself.

        None while it is not known, and where no such adapter is loaded.
        """
        base, adapters = self._computes.base, self._computes.adapters
        if adapter is None or base is None:
            return base
        return f"{base} {adapters[adapter]}" if adapter in adapters else None

    def generate(self, options: RequestOptions, answers: int) -> Answer:
        """Send a request for ``answers`` answers. ApiError if the engine is not ready or has no room."""
        self.check_alive()
        answer = Answer(answers)
        self.open_answers.add(answer, answers)
        try:
            return self.send(options, answer)
        except BaseException:
            self.open_answers.remove(answer)
            raise

    def send(self, options: RequestOptions, answer: Answer) -> Answer:
        """Send a request whose results are put into ``answer``, which must be new, and return ``answer``."""
        answer.number = next(self._numbers)
        message = _encoded(Submit(answer.number, options))
        self._note_work()
        self._answers[answer.number] = answer
        self._writer.write(message)
        return answer

    def close(self, answer: Answer) -> None:
        """Forget a request, and tell the engine to abort those of its answers that have not ended."""
        self.open_answers.remove(answer)
        if self._answers.pop(answer.number, None) and answer.open and not self.failure:
            self._writer.write(frame(Abort(answer.number)))

    async def withdraw(self, count: int) -> list[Answer]:
        """Take back the newest requests that the engine has not begun, at most ``count``, and return their answers."""
        numbers = await self._ask(Withdraw(next(self._numbers), count))
        return [answer for number in numbers if (answer := self._answers.pop(number, None))]

    async def call(self, name: str, *arguments: Any, patient: bool = False) -> Any:
        """Call the function ``name`` of `EngineCalls` in the engine's process and return its result.

        Raises UserError when the engine refuses the call.

        patient: the call may take long beside the steps, so that a missing result is no sign of a hanging engine.
        """
        return await self._ask(Call(next(self._numbers), name, list(arguments)), patient)

    async def _ask(self, message: Call | Withdraw, patient: bool = False) -> Any:
        self.check_alive()
        encoded = _encoded(message)
        if not patient:
            self._note_work()
            self._urgent.add(message.id)
        result = self._results[message.id] = asyncio.get_running_loop().create_future()
        self._writer.write(encoded)
        try:
            return await result
        finally:
            self._urgent.discard(message.id)
            del self._results[message.id]

    def check_alive(self) -> None:
        """Raise ApiError when the engine has stopped or is not ready yet."""
        if self.failure:
            raise ApiError(503, f"the engine has stopped: {self.failure}")
        if self.facts is None:
            raise ApiError(503, "the engine is not ready yet", retry_after=5)

    def kill(self) -> None:
        """Kill the engine's process at once."""
        self.process.kill()

    async def stop(self) -> int:
        """Close the connection, so that the engine's process ends, and return its exit code; kill it if it does not."""
        self._reading.cancel()
        self._writer.close()
        return await asyncio.to_thread(self._wait)

    def _wait(self) -> int:
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _note_work(self) -> None:
        if not self._answers and not self._urgent:
            self._idle_until = time.monotonic()

    async def _read(self) -> None:
        try:
            while True:
                header = await self._reader.readexactly(LENGTH.size)
                self._take(decode_from_engine(await self._reader.readexactly(LENGTH.unpack(header)[0])))
        except (asyncio.IncompleteReadError, ConnectionResetError, msgspec.DecodeError):  # it died, perhaps half-way
            self._fail(self.failure or self.refused or "its process has ended")
        except Exception as error:
            logger.exception("messages of the engine's process are read no more")
            self._fail(f"a message of its process could not be handled: {error!r}")

    def _take(self, message: FromEngine) -> None:
        self._last_message = time.monotonic()
        match message:
            case Step():
                self.gauges = message.gauges or self.gauges
                for piece in message.pieces:
                    self._deliver(piece)
            case Result():
                result = self._results.get(message.id)
                if result and not result.done():
                    if message.error:
                        result.set_exception(UserError(message.error))
                    else:
                        result.set_result(message.value)
            case Ready():
                self.facts = message
            case Computes():
                self._computes = message
            case Refused():
                self.refused = message.reason
            case Failed():
                self.failure = message.reason

    def _deliver(self, piece: Piece) -> None:
        answer = self._answers.get(piece.id)
        if answer is None:
            return
        if piece.finish_reason:
            answer.open = 0 if piece.kind in ("user", "adapter", "length") else answer.open - 1
        answer.put(piece)
        if answer.unread > MAX_UNREAD_PIECES:
            logger.warning("request %d is aborted: its client does not read", piece.id)
            answer.fail(ApiError(408, "the answer was not read"))
            self.close(answer)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        error = ApiError(503, f"the engine has stopped: {reason}")
        for answer in list(self._answers.values()):
            if not self.lost(answer):
                answer.fail(error)
        for result in self._results.values():
            if not result.done():
                result.set_exception(error)
        self.ended.set()


async def pieces(answer: Answer) -> AsyncIterator[list[Piece]]:
    """Yield the parts of a request's answers as they arrive, until all have ended. Raises ApiError when one failed."""
    while answer.open or answer.unread:
        arrived = await answer.next()
        for piece in arrived:
            if piece.error:
                raise _error_of(piece)
        yield arrived


def _error_of(piece: Piece) -> ApiError:
    if piece.kind == "adapter":
        return ApiError(404, piece.error, "model_not_found")
    if piece.kind == "length":
        return ApiError(400, piece.error, "context_length_exceeded")
    if piece.kind in ("user", "refused"):
        return ApiError(400, piece.error)
    if piece.kind == "deadline":
        return ApiError(408, piece.error)
    return ApiError(500, piece.error)


def _encoded(message: ToEngine) -> bytes:
    try:
        return frame(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise ApiError(400, f"a value cannot be sent to the engine: {error}") from error
