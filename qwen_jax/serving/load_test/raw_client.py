"""An open-loop load of payments to screen: requests are sent when they are due, whatever became of earlier ones.

Written to cost little beside the server that it measures: connections are kept and parse no more of an answer than its
length, status and ``X-Cache``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

_HEAD = b"POST /fraud/screen HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


@dataclass(slots=True)
class Outcome:
    """Seconds since the load began.

    Attributes:
      due: when the request was to be sent; sent: when it was. ended: when its answer was there.
      status: of HTTP; 0 when the connection broke. cached: whether the server said so.
    """

    due: float
    sent: float
    ended: float = 0.0
    status: int = 0
    cached: bool = False
    body: bytes = b""

    @property
    def seconds(self) -> float:
        """From when it was due: what the client was late is part of it."""
        return self.ended - self.due

    @property
    def verdict(self) -> dict:
        return msgspec.json.decode(self.body)


class _Connection(asyncio.Protocol):
    """One request at a time; ``ended`` is called with it when that has ended."""

    def __init__(self, now: Callable[[], float], ended: Callable[[_Connection], None]) -> None:
        self._now, self._ended, self._data = now, ended, b""
        self.outcome: Outcome | None = None  # of the request that is open

    def connection_made(self, transport) -> None:
        self._transport = transport

    def connection_lost(self, error) -> None:
        self._transport = None
        if self.outcome:
            self._end()

    @property
    def usable(self) -> bool:
        return self._transport is not None

    def ask(self, message: bytes, outcome: Outcome) -> None:
        self.outcome, self._data = outcome, b""
        self._transport.write(message)

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        head = head.lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r")[0])
        if len(body) >= length and (outcome := self.outcome):
            outcome.status, outcome.cached, outcome.body = int(head[9:12]), b"x-cache: hit" in head, body
            self._end()

    def _end(self) -> None:
        self.outcome.ended = self._now()
        self._ended(self)
        self.outcome = None


async def replay(port: int, requests: Iterable[tuple[float, bytes]], clock: float | None = None,
                 note: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Sends each body when it is due; outcomes in that order, once all have ended.

    Args:
      requests: (seconds from now, a body), by time. clock: what ``time.perf_counter`` says at 0; by default now.
      note: told of each as it ends.
    """
    began = time.perf_counter() if clock is None else clock
    idle: list[_Connection] = []
    outcomes: list[Outcome] = []
    left, nothing_left = 0, asyncio.Event()

    def now() -> float:
        return time.perf_counter() - began

    def ended(connection: _Connection) -> None:
        nonlocal left
        left -= 1
        if not left:
            nothing_left.set()
        if connection.usable:
            idle.append(connection)
        note(connection.outcome)

    for number, (due, body) in enumerate(requests):
        while (wait := due - now()) > 0:
            await asyncio.sleep(wait)
        if number % 16 == 0:  # who is late sends without a pause, and has to read all the same
            await asyncio.sleep(0)
        connection = None
        while idle and (connection is None or not connection.usable):
            connection = idle.pop()
        if connection is None or not connection.usable:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(now, ended), "127.0.0.1", port)
        left += 1
        nothing_left.clear()
        outcomes.append(Outcome(due, now()))
        connection.ask(_HEAD % len(body) + body, outcomes[-1])
    if left:
        await nothing_left.wait()
    for connection in idle:
        connection.close()
    return outcomes
