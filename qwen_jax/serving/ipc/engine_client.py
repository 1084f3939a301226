"""The HTTP process's end of the connection to the engine's process."""

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
from qwen_jax.serving.ipc.messages import LENGTH, Piece, decode, frame

logger = logging.getLogger(__name__)
MOST_UNREAD = 4096  # pieces of an answer that its client has not taken; then it is aborted


class Answer:
    """The pieces of one request's answers, as they arrive.

    Attributes:
      number: by which its engine knows it. open: how many of its answers have not ended.
      begun: whether there has been a piece of it.
      watcher: told of each piece, and with None when there will be no more.
    """

    def __init__(self, answers: int) -> None:
        self.number, self.open, self.begun = 0, answers, False
        self.watcher: Callable[[Piece | None], None] | None = None
        self._pieces: list[Piece] = []
        self._failure: ApiError | None = None
        self._waiting: asyncio.Future | None = None

    def put(self, piece: Piece) -> None:
        self._pieces.append(piece)
        self.begun = True
        if self.watcher:
            self.watcher(piece)
        self._wake()

    def fail(self, error: ApiError) -> None:
        self._failure = self._failure or error
        if self.watcher:
            self.watcher(None)
        self._wake()

    @property
    def unread(self) -> int:
        return len(self._pieces)

    async def next(self) -> list[Piece]:
        """Everything that has arrived and not been taken, at least one piece. ApiError when there will be no more."""
        while not self._pieces:
            if self._failure:
                raise self._failure
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        pieces, self._pieces = self._pieces, []
        return pieces

    def _wake(self) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_result(None)


class Link(Protocol):
    """What a server needs of its engine, or of several that look like one. See `EngineLink`."""

    facts: dict[str, Any] | None
    gauges: dict[str, int]
    failure: str | None
    refused: str | None
    ended: asyncio.Event
    requests: int

    async def start(self) -> None: ...
    async def stop(self) -> int: ...
    def check_alive(self) -> None: ...
    def silent_seconds(self) -> float: ...
    def generate(self, options: Mapping[str, Any], answers: int) -> Answer: ...
    def close(self, answer: Answer) -> None: ...
    async def call(self, name: str, *arguments: Any, patient: bool = False) -> Any: ...


class EngineLink:
    """Starts the engine's process and talks to it. Used by one event loop.

    Args:
      model, options: of ``Engine.from_pretrained``. process: see ``worker.main``. environment: of its process, beside
        this one's.

    Attributes:
      model: as it was given.
      facts: what the engine is, once it is ready; None before.
      gauges: of its last step.
      failure: why there is no engine any more; None while there is.
      lost: called with each answer that a failure cuts short; true when somebody else sees to it.
    """

    def __init__(self, model: str, options: Mapping[str, Any], max_requests: int,
                 process: Mapping[str, Any] = MappingProxyType({}),
                 environment: Mapping[str, str] = MappingProxyType({}),
                 command: Sequence[str] = (sys.executable, "-m", "qwen_jax.serving.engine_process.process")) -> None:
        self.model = model
        self._first = model, options, dict(process)
        self._command, self._environment = command, {**os.environ, **environment}
        self._max_requests = max_requests
        self._numbers = itertools.count(1)
        self._answers: dict[int, Answer] = {}
        self._results: dict[int, asyncio.Future] = {}
        self._urgent: set[int] = set()  # calls that the engine should answer between two steps
        self.facts: dict[str, Any] | None = None
        self.gauges: dict[str, int] = {}
        self.failure: str | None = None
        self.refused: str | None = None
        self.ended = asyncio.Event()
        self.lost: Callable[[Answer], bool] = lambda answer: False
        self._heard = self._idle_since = time.monotonic()

    async def start(self) -> None:
        """Returns at once; the engine is there when ``facts`` are."""
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen([*self._command, str(theirs.fileno())], pass_fds=[theirs.fileno()],
                                        env=self._environment)
        theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        self._writer.write(frame(*self._first))
        self._reading = asyncio.create_task(self._read())

    @property
    def requests(self) -> int:
        """Open ones."""
        return len(self._answers)

    def silent_seconds(self) -> float:
        """How long the engine has had work and not been heard of; 0 without work."""
        busy = self.facts is not None and (self._answers or self._urgent)
        return time.monotonic() - max(self._heard, self._idle_since) if busy else 0.0

    def generate(self, options: Mapping[str, Any], answers: int) -> Answer:
        """Sends a request. ApiError when there is no engine, or as many requests as it takes."""
        self.check_alive()
        if len(self._answers) >= self._max_requests:
            raise ApiError(429, f"{len(self._answers)} requests are queued or running: try again later", retry_after=1)
        return self.send(options, Answer(answers))

    def send(self, options: Mapping[str, Any], answer: Answer) -> Answer:
        """Has this engine give an answer, of which there is no piece yet."""
        answer.number = next(self._numbers)
        try:
            message = frame("generate", answer.number, options)
        except (OverflowError, UnicodeEncodeError) as error:
            raise ApiError(400, f"a value cannot be sent to the engine: {error}") from error
        self._note_work()
        self._answers[answer.number] = answer
        self._writer.write(message)
        return answer

    def close(self, answer: Answer) -> None:
        """Forgets a request; what of it still runs is aborted."""
        if self._answers.pop(answer.number, None) and answer.open and not self.failure:
            self._writer.write(frame("abort", answer.number))

    async def withdraw(self, count: int) -> list[Answer]:
        """Takes back the last requests that the engine has not begun, at most ``count``."""
        numbers = await self._ask("withdraw", count)
        return [answer for number in numbers if (answer := self._answers.pop(number, None))]

    async def call(self, name: str, *arguments: Any, patient: bool = False) -> Any:
        """The result of one of the worker's calls. UserError when it refuses.

        patient: it may take long beside the steps, so that no answer does not mean that the engine hangs.
        """
        return await self._ask("call", name, arguments, patient=patient)

    async def _ask(self, *message: Any, patient: bool = False) -> Any:
        self.check_alive()
        kind, *rest = message
        number = next(self._numbers)
        try:
            message = frame(kind, number, *rest)
        except (OverflowError, UnicodeEncodeError) as error:
            raise ApiError(400, f"a value cannot be sent to the engine: {error}") from error
        if not patient:
            self._note_work()
            self._urgent.add(number)
        future = self._results[number] = asyncio.get_running_loop().create_future()
        self._writer.write(message)
        try:
            return await future
        finally:
            self._urgent.discard(number)
            del self._results[number]

    def check_alive(self) -> None:
        if self.failure:
            raise ApiError(503, f"the engine has stopped: {self.failure}")
        if self.facts is None:
            raise ApiError(503, "the engine is not ready yet", retry_after=5)

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()

    async def stop(self) -> int:
        """Lets the process end; its exit code."""
        self._reading.cancel()
        self._writer.close()
        return await asyncio.to_thread(self._wait)

    def _wait(self) -> int:
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _note_work(self) -> None:
        if not self._answers and not self._urgent:
            self._idle_since = time.monotonic()

    async def _read(self) -> None:
        try:
            while True:
                header = await self._reader.readexactly(LENGTH.size)
                self._take(decode(await self._reader.readexactly(LENGTH.unpack(header)[0])))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            self._fail(self.failure or self.refused or "its process has ended")

    def _take(self, message: list[Any]) -> None:
        self._heard = time.monotonic()
        match message:
            case ["step", pieces, gauges]:
                self.gauges = gauges or self.gauges
                for raw in pieces:
                    self._deliver(msgspec.convert(raw, Piece))
            case ["result", number, error, value]:
                if (future := self._results.get(number)) and not future.done():
                    future.set_exception(UserError(error)) if error else future.set_result(value)
            case ["ready", facts]:
                self.facts = facts
            case ["refused", sentence]:
                self.refused = sentence
            case ["failed", sentence]:
                self.failure = sentence

    def _deliver(self, piece: Piece) -> None:
        answer = self._answers.get(piece.id)
        if answer is None:
            return
        if piece.finish_reason:
            answer.open = 0 if piece.kind == "user" else answer.open - 1
        answer.put(piece)
        if answer.unread > MOST_UNREAD:
            logger.warning("request %d is aborted: its client does not read", piece.id)
            answer.fail(ApiError(408, "the answer was not read"))
            self.close(answer)

    def _fail(self, why: str) -> None:
        self.failure = why
        error = ApiError(503, f"the engine has stopped: {why}")
        for answer in list(self._answers.values()):
            if not self.lost(answer):
                answer.fail(error)
        for future in self._results.values():
            if not future.done():
                future.set_exception(error)
        self.ended.set()


async def pieces(answer: Answer) -> AsyncIterator[list[Piece]]:
    """Until all answers of a request have ended. ApiError for a request that failed."""
    while answer.open or answer.unread:
        some = await answer.next()
        for piece in some:
            if piece.error:
                raise error_of(piece)
        yield some


def error_of(piece: Piece) -> ApiError:
    if piece.kind == "user":
        missing = "no adapter named" in piece.error
        return ApiError(404 if missing else 400, piece.error, "model_not_found" if missing else None)
    if piece.kind == "deadline":
        return ApiError(408, piece.error)
    return ApiError(500, piece.error)
