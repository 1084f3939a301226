"""What the HTTP process and the engine's process say to each other, over a pair of sockets.

A frame is its length (4 bytes, big-endian) and a MessagePack array whose first element names it. To the engine:
``("generate", id, {...})``, ``("abort", id)``, ``("call", number, name, arguments)``, ``("withdraw", number, count)``.
From it: ``("ready", facts)``, ``("step", pieces, gauges)``, ``("result", number, error, value)``.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

import msgspec

LENGTH = struct.Struct(">I")
_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder()
decode = _decoder.decode


def frame(*message: Any) -> bytes:
    payload = _encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


class Piece(msgspec.Struct, array_like=True, omit_defaults=True):
    """What is new of one answer.

    Attributes:
      id: of the request; index: which of its ``n`` answers.
      logprobs: of each of ``token_ids``: the token's text, its log-probability, and the most likely ones as pairs of
        these; None where none were asked for.
      finish_reason: None before the end. The rest comes with it.
      tokens: of the whole answer. prompt_tokens: of the prompt.
      times: by ``time.monotonic``, when it arrived, its first step began, its first token was there, it ended.
      kind: what ``error`` is: "user" for the client's mistake, "fault" for ours, "deadline" when it passed before a
        token was computed.
      score: log-probabilities of the prompt's scored tokens; vector: an embedding, float32 little-endian.
    """

    id: int
    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[tuple[str, float, list[tuple[str, float]]]] | None = None
    finish_reason: str | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    weight_version: int = 0
    times: tuple[float | None, ...] = ()
    error: str | None = None
    kind: str | None = None
    score: list[float] | None = None
    vector: bytes | None = None


def read_frame(connection: socket.socket) -> list[Any] | None:
    """The next message; None when the other side has closed."""
    header = _exactly(connection, LENGTH.size)
    payload = header and _exactly(connection, LENGTH.unpack(header)[0])
    return decode(payload) if payload else None


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)
