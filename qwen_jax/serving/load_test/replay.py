"""Load generator for fraud screening: sends each payment when it is due, without waiting for earlier answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import aiohttp
import msgspec


@dataclass(slots=True)
class Outcome:
    """Course and result of one screening request. Times are seconds since the load began.

    Attributes:
      due: time at which the request was to be sent.
      sent: time at which it was sent.
      ended: time at which its answer was complete, or its connection broke.
      status: HTTP status; 0 if the connection broke.
      cached: true if the header ``X-Cache`` says that the answer came from the cache.
      body: body of the answer.
    """

    due: float
    sent: float = 0.0
    ended: float = 0.0
    status: int = 0
    cached: bool = False
    body: bytes = b""

    @property
    def seconds(self) -> float:
        """Latency in seconds, from the time at which the request was due (not sent, which may be later) to its end."""
        return self.ended - self.due

    @property
    def verdict(self) -> dict:
        return msgspec.json.decode(self.body)


async def replay(port: int, requests: Iterable[tuple[float, bytes]], clock: float | None = None,
                 note: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Send each request to ``/fraud/screen`` when it is due; return the outcomes in that order, once all have ended.

    Args:
      port: port of a server on this machine.
      requests: pairs of the time at which a request is due, in seconds since the load began, and its body, in order.
      clock: value of ``time.perf_counter`` at which the load begins; default: now.
      note: called with each outcome as it ends.
    """
    began = time.perf_counter() if clock is None else clock
    outcomes: list[Outcome] = []

    def now() -> float:
        return time.perf_counter() - began

    async def ask(session: aiohttp.ClientSession, outcome: Outcome, body: bytes) -> None:
        outcome.sent = now()
        try:
            async with session.post(f"http://127.0.0.1:{port}/fraud/screen", data=body) as response:
                outcome.body = await response.read()
                outcome.status, outcome.cached = response.status, response.headers.get("X-Cache") == "hit"
        except (aiohttp.ClientError, OSError):
            pass  # the status stays 0
        outcome.ended = now()
        note(outcome)

    # Idle connections are closed before the server closes them (uvicorn: after 5 s), while a request may be on its way.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    async with (aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(),
                                      headers={"Content-Type": "application/json", "Accept-Encoding": "identity"},
                                      timeout=aiohttp.ClientTimeout(total=None)) as session,
                asyncio.TaskGroup() as group):
        for number, (due, body) in enumerate(requests):
            while (wait := due - now()) > 0:
                await asyncio.sleep(wait)
            if number % 16 == 0:  # a client that is late sends without a pause, but must read answers too
                await asyncio.sleep(0)
            outcomes.append(Outcome(due))
            group.create_task(ask(session, outcomes[-1], body))
    return outcomes
