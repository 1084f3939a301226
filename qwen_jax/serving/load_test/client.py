"""Load generator for OpenAI-compatible servers: sends requests on schedule, also while earlier ones are open.

Latencies are counted from the scheduled arrival of a request. If they were counted from its sending, the time for which
a busy client holds it back would be in no figure (coordinated omission).
"""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from tqdm import tqdm

from qwen_jax.errors import UserError
from qwen_jax.serving.load_test.workload import PATHS, Load, arrivals, inputs
from qwen_jax.sockets import allow_many_connections


@dataclass(frozen=True, slots=True)
class Outcome:
    """Course and result of one request of a load. Times are seconds since the load began.

    Attributes:
      scheduled: time at which the request was to be sent.
      sent: time at which the client sent it.
      ended: time of the end of the answer, or of the error.
      pieces: arrival times of the server-sent events that had text.
      prompt_tokens, completion_tokens: numbers of tokens by the server's count.
      error: kind of error, such as "HTTP 429"; None for a whole answer.
      detail: the server's or the client's words about the error.
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
        """Seconds by which the client sent the request late."""
        return self.sent - self.scheduled

    @property
    def ttft(self) -> float:
        """Seconds from scheduled arrival to the first token; to the end for an answer without text."""
        return (self.pieces[0] if self.pieces else self.ended) - self.scheduled

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for an answer that came in one event."""
        if len(self.pieces) < 2 or self.completion_tokens < 2:
            return None
        return (self.pieces[-1] - self.pieces[0]) / (self.completion_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between each event with text and the one before (inter-token latency)."""
        return [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:])]

    @property
    def e2e(self) -> float:
        """Seconds from scheduled arrival to the end of the answer."""
        return self.ended - self.scheduled


async def run(url: str, load: Load, rate: float, progress: bool = False) -> list[Outcome]:
    """Send a load's requests at ``rate`` per second; return their outcomes in order of arrival once all have ended.

    Args:
      url: URL of the server, with or without ``/v1``.
      progress: whether to show a progress bar on stderr.
    Raises:
      UserError: a server that cannot be reached or fails every warm-up request, or a wrong load.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise UserError(f"the server's URL must begin with http:// or https://, not {url!r}")
    times = arrivals(load, rate).tolist()
    prompts = inputs(load, rate, load.warmup + len(times))
    allow_many_connections()  # every open request has one
    async with _session(load) as session:
        options = {"model": await _model(session, base, load.model), "max_tokens": load.max_tokens, "stream": True,
                   "stream_options": {"include_usage": True}} | ({"ignore_eos": True} if load.ignore_eos else {})
        bodies = [msgspec.json.encode(options | prompt) for prompt in prompts]
        await _warm_up(_Client(session, base + PATHS[load.endpoint]), bodies[:load.warmup])
        with tqdm(total=len(times), desc=f"{rate:g} requests/s", unit="request", file=sys.stderr,
                  disable=not progress) as bar:
            return await _send(_Client(session, base + PATHS[load.endpoint]), times, bodies[load.warmup:], bar)


async def _warm_up(client: _Client, bodies: list[bytes]) -> None:
    outcomes = await asyncio.gather(*(client.ask(body, 0.0) for body in bodies))
    if outcomes and all(outcome.error for outcome in outcomes):
        raise UserError(f"every warm-up request failed, the first with {outcomes[0].error}: {outcomes[0].detail}")


async def _send(client: _Client, times: list[float], bodies: list[bytes], bar: tqdm) -> list[Outcome]:
    """Send each request body at its time, in seconds by the client's clock; return the outcomes in the same order."""
    tasks = []
    async with asyncio.TaskGroup() as group:
        for scheduled, body in zip(times, bodies):
            while (wait := scheduled - client.now()) > 0:  # a loop, since uvloop's timers may be early
                await asyncio.sleep(wait)
            task = group.create_task(client.ask(body, scheduled))
            task.add_done_callback(lambda _: bar.update())
            tasks.append(task)
    return [task.result() for task in tasks]


class _Client:
    """HTTP client that sends requests to one URL and times them by a clock that begins when the client is made."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url, self._began = session, url, time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._began

    async def ask(self, body: bytes, scheduled: float) -> Outcome:
        """Send a request, read its answer to the end and return its times; a failure is returned too, not raised."""
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
        return Outcome(scheduled, sent, self.now() if failure else answer.done, pieces=tuple(answer.pieces),
                       prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens,
                       error=failure and failure.kind, detail=failure.detail if failure else "")


class _Failure(Exception):
    """Failure of a request: its kind, such as "HTTP 429", and the server's or the client's words about it."""

    def __init__(self, kind: str, message: bytes = b"") -> None:
        super().__init__(kind)
        self.kind, self.detail = kind, message[:300].decode("utf-8", "replace")


def _kind(error: Exception, answer: _Answer) -> str:
    """Return the name, for reports, of the kind of failure that an exception of the HTTP client means."""
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
        """Return whether an event's choice has text or tool calls, and is not merely a role or a finish reason."""
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
    """Parser of an answer's server-sent events, which notes when they arrive.

    Attributes:
      pieces: arrival times of the events that had text.
      usage: the numbers of tokens, which the server sends last.
      done: time at which the stream ended with ``[DONE]``; None before.
      rest: bytes of a line that is incomplete.
    """

    pieces: list[float] = field(default_factory=list)
    usage: _Usage | None = None
    done: float | None = None
    rest: bytes = b""

    def add(self, chunk: bytes, now: float) -> None:
        """Parse the next bytes of the stream, which arrived at ``now``. Raises `_Failure` when an event is an error."""
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
        """Return what is wrong with a stream that has ended; None when nothing is."""
        if self.done is None:
            return _Failure("closed in mid-stream", b"the stream ended without [DONE]")
        return None if self.usage else _Failure("no usage", b"the stream does not say how many tokens it has")


def _session(load: Load) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if load.api_key:
        headers["Authorization"] = f"Bearer {load.api_key}"
    # Shorter than servers keep idle connections (uvicorn: 5 s), which would otherwise close one as it is used again.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    return aiohttp.ClientSession(connector=connector, headers=headers, cookie_jar=aiohttp.DummyCookieJar(),
                                 timeout=aiohttp.ClientTimeout(total=load.timeout))


async def _model(session: aiohttp.ClientSession, base: str, wanted: str | None) -> str:
    """Return the name of the model for the requests: ``wanted``, or else the first that the server lists.

    UserError for a server that does not answer or, without ``wanted``, lists no model.
    """
    try:
        async with session.get(f"{base}/v1/models", timeout=aiohttp.ClientTimeout(total=60)) as response:
            status, body = response.status, await response.content.read()
    except (aiohttp.ClientError, OSError) as error:
        raise UserError(f"{base} cannot be reached: {error or type(error).__name__}") from error
    if wanted is not None:
        return wanted
    if status != 200:
        raise UserError(f"{base}/v1/models answered {status}: {body[:300].decode('utf-8', 'replace')}")
    try:
        return msgspec.json.decode(body)["data"][0]["id"]
    except (msgspec.DecodeError, LookupError, TypeError):
        raise UserError(f"{base}/v1/models lists no model: name one, if this is an OpenAI-compatible server") from None
