"""An open-loop load on an OpenAI-compatible server: requests arrive whatever became of earlier ones.

Every time is counted from the moment a request was scheduled to arrive. Counted from its sending, the time for which a
busy client holds it back would be in no figure (coordinated omission).
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from tqdm import tqdm

from qwen_jax.errors import UserError
from qwen_jax.serving.load_test.workload import PATHS, Load, arrivals, inputs


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times are seconds since the load began.

    Attributes:
      scheduled: when it arrived; sent: when the client got to it; ended: when its answer or its error was there.
      pieces: when each event with text came.
      error: its kind, such as "HTTP 429", None for a whole answer; detail: what was said about it.
    """

    scheduled: float
    sent: float
    ended: float
    pieces: tuple[float, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    detail: str = ""

    @property
    def lag(self) -> float:
        return self.sent - self.scheduled

    @property
    def ttft(self) -> float:
        """To the end for an answer without text."""
        return (self.pieces[0] if self.pieces else self.ended) - self.scheduled

    @property
    def tpot(self) -> float | None:
        """None for an answer that came in one piece, which has no time between tokens."""
        if len(self.pieces) < 2 or self.completion_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.completion_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:])]

    @property
    def e2e(self) -> float:
        return self.ended - self.scheduled


async def run(url: str, load: Load, rate: float, progress: bool = False) -> list[Outcome]:
    """Send the load at ``rate`` requests per second; outcomes in order of arrival, once all have ended.

    Args:
      url: of the server, with or without ``/v1``.
    Raises:
      UserError: for a server that cannot be reached or fails every warm-up request, and for what cannot be sent.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise UserError(f"a server's URL begins with http:// or https://, unlike {url}")
    times = arrivals(load, rate).tolist()
    asked = inputs(load, rate, load.warmup + len(times))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection for every open request
    async with _session(load) as session:
        options = {"model": await _model(session, base, load.model), "max_tokens": load.max_tokens, "stream": True,
                   "stream_options": {"include_usage": True}} | ({"ignore_eos": True} if load.ignore_eos else {})
        bodies = [msgspec.json.encode(options | one) for one in asked]
        await _warm_up(_Client(session, base + PATHS[load.endpoint]), bodies[:load.warmup])
        with tqdm(total=len(times), desc=f"{rate:g} requests/s", unit="request", file=sys.stderr,
                  disable=not progress) as bar:
            return await _send(_Client(session, base + PATHS[load.endpoint]), times, bodies[load.warmup:], bar)


async def _warm_up(client: _Client, bodies: list[bytes]) -> None:
    outcomes = await asyncio.gather(*(client.ask(body, 0.0) for body in bodies))
    if outcomes and all(outcome.error for outcome in outcomes):
        raise UserError(f"every warm-up request failed, the first with {outcomes[0].error}: {outcomes[0].detail}")


async def _send(client: _Client, times: list[float], bodies: list[bytes], bar: tqdm) -> list[Outcome]:
    tasks = []
    async with asyncio.TaskGroup() as group:
        for scheduled, body in zip(times, bodies):
            while (wait := scheduled - client.now()) > 0:  # again when a timer was early, as uvloop's may be
                await asyncio.sleep(wait)
            task = group.create_task(client.ask(body, scheduled))
            task.add_done_callback(lambda _: bar.update())
            tasks.append(task)
    return [task.result() for task in tasks]


class _Client:
    """Sends requests; its clock begins when it is made."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url, self._began = session, url, time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._began

    async def ask(self, body: bytes, scheduled: float) -> Outcome:
        """One request, to its end. What fails is an outcome too."""
        sent, answer, failure = self.now(), _Answer(), None
        try:
            async with self._session.post(self._url, data=body) as response:
                if response.status != 200:
                    raise _Failure(f"HTTP {response.status}", await response.content.read())
                async for chunk in response.content.iter_any():
                    answer.add(chunk, self.now())
        except _Failure as raised:
            failure = raised
        except (aiohttp.ClientError, msgspec.MsgspecError, OSError) as error:
            failure = None if answer.done else _Failure(_kind(error, answer), str(error).encode())
        failure = failure or answer.check()
        usage = answer.usage or _Usage()
        return Outcome(scheduled, sent, self.now() if failure else answer.done, tuple(answer.pieces),
                       usage.prompt_tokens, usage.completion_tokens, failure and failure.kind,
                       failure.detail if failure else "")


class _Failure(Exception):
    """Of one request: its kind, and what was said about it."""

    def __init__(self, kind: str, said: bytes = b"") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, said[:300].decode("utf-8", "replace")


def _kind(error: Exception, answer: _Answer) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, msgspec.MsgspecError):
        return "an event that is none of OpenAI's"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection"
    if isinstance(error, aiohttp.ClientPayloadError) or answer.pieces:
        return "closed in mid-stream"
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError):
        return "closed without an answer"
    return type(error).__name__


class _Text(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Text | None = None

    def __bool__(self) -> bool:
        """Whether there is something of the answer in it."""
        if (new := self.delta) is None:
            return bool(self.text)
        return bool(new.content or new.reasoning or new.reasoning_content or new.tool_calls)


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass
class _Answer:
    """A stream of server-sent events, so far."""

    pieces: list[float] = field(default_factory=list)
    usage: _Usage | None = None
    done: float | None = None
    rest: bytes = b""

    def add(self, chunk: bytes, now: float) -> None:
        """_Failure when an event says so."""
        *lines, self.rest = (self.rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self.done = now
                continue
            event = _decode(data)
            if event.error is not None:
                raise _Failure("error in the stream", data)
            if event.usage is not None:
                self.usage = event.usage
            if any(event.choices):
                self.pieces.append(now)

    def check(self) -> _Failure | None:
        """Of an answer that has come to its end."""
        if self.done is None:
            return _Failure("closed in mid-stream", b"the stream ended without [DONE]")
        return None if self.usage else _Failure("no usage", b"the stream does not say how many tokens it has")


def _session(load: Load) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if load.api_key:
        headers["Authorization"] = f"Bearer {load.api_key}"
    # Idle connections are given up before servers do so (uvicorn: after 5 s), lest a request is on its way just then.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    return aiohttp.ClientSession(connector=connector, headers=headers, cookie_jar=aiohttp.DummyCookieJar(),
                                 timeout=aiohttp.ClientTimeout(total=load.timeout))


async def _model(session: aiohttp.ClientSession, base: str, wanted: str | None) -> str:
    """The model to ask for. UserError for a server that does not answer, or has none."""
    try:
        async with session.get(f"{base}/v1/models", timeout=aiohttp.ClientTimeout(total=60)) as response:
            status, said = response.status, await response.content.read()
    except (aiohttp.ClientError, OSError) as error:
        raise UserError(f"{base} cannot be reached: {error or type(error).__name__}") from error
    if wanted is not None:
        return wanted
    if status != 200:
        raise UserError(f"{base}/v1/models answered {status}: {said[:300].decode('utf-8', 'replace')}")
    try:
        return msgspec.json.decode(said)["data"][0]["id"]
    except (msgspec.DecodeError, LookupError, TypeError):
        raise UserError(f"{base}/v1/models lists no model: name one, if this is an OpenAI-compatible server") from None
