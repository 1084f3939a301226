"""Messages between the HTTP process and the engine's process, over a pair of sockets.

A frame is a message's length (4 bytes, big-endian) and the message in MessagePack: an array of the class's name and the
fields. `Launch` is the first frame. `Submit`, `Abort`, `Withdraw` and `Call` then go to the engine; `Ready`,
`Computes`, `Step`, `Result`, `Refused` and `Failed` come from it.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import Any

import msgspec

LENGTH = struct.Struct(">I")


class RequestOptions(msgspec.Struct, array_like=True, kw_only=True):
    """A client's request as the HTTP process sends it to the engine: prompt and options.

    Attributes:
      prompt: text, token ids, or a conversation as a dict of ``messages`` and maybe ``tools`` and ``continues``,
        whether the answer goes on with the last message.
      params: keywords of `SamplingParams`; ``structured_output`` is a dict of its keywords.
      adapter: name of a loaded LoRA adapter; None for the model itself.
      priority: number; waiting requests with the lowest one run first.
      timeout: seconds from ``arrived`` after which the request is aborted; None for no limit.
      stream: whether parts of the answer are sent as they are generated.
      arrived: time of arrival, by ``time.monotonic`` of the engine's machine.
      continuation: text or token ids whose log-probabilities after the prompt are computed; None for an answer.
      pooling: kind of embedding ("mean" or "last") to compute instead of an answer; None for none.
      normalize: whether the embedding gets length 1.
      user: the client's name for its user. It routes requests; the engine does not use it.
      on_trial: whether an engine with weights on trial is to answer. It routes requests; the engine does not use it.
      allow_special_tokens: whether names of control tokens in a text become these tokens; else they are text. Those in
        conversations always are.
      cache_salt: text that is part of the keys of cached pages: only requests with the same one share them.
      echo: whether the answer begins with its prompt.
      suffix: text that follows the answer, for models that fill in what is between; None for none.
      to_end_of_context: whether the answer may have as many tokens as there is room for, in place of ``max_tokens``.
    """

    prompt: str | list[int] | dict[str, Any]
    params: dict[str, Any] = {}
    adapter: str | None = None
    priority: int = 0
    timeout: float | None = None
    stream: bool = False
    arrived: float
    continuation: str | list[int] | None = None
    pooling: str | None = None
    normalize: bool = False
    user: Any = None
    on_trial: bool = False
    allow_special_tokens: bool = True
    cache_salt: str = ""
    echo: bool = False
    suffix: str | None = None
    to_end_of_context: bool = False


class Launch(msgspec.Struct, array_like=True, tag=True):
    """Message to a new engine process: load this checkpoint and run an engine with these options.

    Attributes:
      model: the checkpoint: a folder, a hub id or ``bundled``.
      options: keywords of `Engine.from_pretrained`.
      log_format: "text" or "json".
      share_weights: whether converted checkpoints are read from a copy in shared memory.
      join: arguments of `rendezvous.join` (address, number of processes, index) where several processes are one
        engine; None for an engine of one process. All processes but the first follow what that one does.
    """

    model: str
    options: dict[str, Any]
    log_format: str = "text"
    share_weights: bool = False
    join: tuple[str, int, int] | None = None


class Submit(msgspec.Struct, array_like=True, tag=True):
    """Message to the engine: run this new request, which both processes will know by the number ``id``."""

    id: int
    options: RequestOptions


class Abort(msgspec.Struct, array_like=True, tag=True):
    """Message to the engine: the answers to the request with the number ``id`` are not wanted any more."""

    id: int


class Withdraw(msgspec.Struct, array_like=True, tag=True):
    """Message to the engine: give back up to ``count`` requests that have not begun; the `Result` has their numbers."""

    id: int
    count: int


class Call(msgspec.Struct, array_like=True, tag=True):
    """Message to the engine: call the function ``name`` of `EngineCalls`; the `Result` has what it returns."""

    id: int
    name: str
    arguments: list[Any]


class TokenLogprob(msgspec.Struct, array_like=True, frozen=True):
    """Log-probability of a token, with its text in UTF-8, which may be part of a character."""

    id: int
    utf8: bytes
    logprob: float


class Piece(msgspec.Struct, array_like=True):
    """New part of one answer: the text and tokens that the engine has generated since the part before.

    Attributes:
      id: number of the request.
      index: which of the request's ``n`` answers.
      text, token_ids: new text and new tokens.
      logprobs: for each new token its log-probability and, after it, those of the most likely tokens; None where they
        were not asked for.
      weight_version: version of the weights that the request runs with.
      finish_reason: why the answer ended; None before. The fields below are set together with it.
      stop: the stop string that ended it, if one did.
      tokens, prompt_tokens: numbers of tokens of the whole answer and of the prompt.
      times: when the request arrived, its first step began, its first token was there and it ended, by
        ``time.monotonic`` of the engine's machine.
      error: what went wrong.
      kind: whose mistake ``error`` is: "user" for the client's, found before the request began, "adapter" where the
        adapter is not loaded, "length" for a prompt that is too long, "refused" for the client's, found later, "fault"
        for the engine's, "deadline" for a timeout.
      prompt_text: text of the prompt, with the first part of an answer that repeats it; else None.
      prompt: for each token of this prompt its log-probability (NaN for the first) and those of the most likely tokens;
        None where they were not asked for.
      score: log-probabilities of the continuation's tokens; None unless a continuation was given.
      vector: embedding, as little-endian float32; None unless one was asked for.
    """

    id: int
    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[list[TokenLogprob]] | None = None
    weight_version: int = 0
    finish_reason: str | None = None
    stop: str | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    times: tuple[float | None, ...] = ()
    error: str | None = None
    kind: str | None = None
    prompt_text: str | None = None
    prompt: list[list[TokenLogprob]] | None = None
    score: list[float] | None = None
    vector: bytes | None = None


class Gauges(msgspec.Struct, array_like=True, frozen=True):
    """Load of an engine after a step: its requests, its use of the KV cache, and programs that it lacks.

    Attributes:
      steps: number of steps so far.
      running, waiting: numbers of requests that hold pages of the KV cache, and of requests in the queue.
      pages_used, pages_total: numbers of pages of the KV cache that requests hold, and of all pages.
      programs_to_come: number of programs that are still being compiled or loaded.
    """

    steps: int = 0
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    programs_to_come: int = 0

    @classmethod
    def total(cls, gauges: Iterable[Gauges]) -> Gauges:
        """Sum up the gauges of several engines."""
        return cls(*map(sum, zip(*map(msgspec.structs.astuple, gauges), strict=True)))


class Ready(msgspec.Struct, array_like=True, tag=True):
    """Message from the engine: it is loaded, compiled and ready for requests, and has these limits and sizes.

    Attributes:
      max_seq_len: largest number of tokens that a prompt and its answer may have together.
      hidden_size: length of embeddings.
      clock: time when the message was sent, by ``time.monotonic`` of the engine's machine.
      max_adapters: number of LoRA adapters that may be loaded at once.
    """

    max_seq_len: int
    hidden_size: int
    clock: float
    max_adapters: int = 0


class Computes(msgspec.Struct, array_like=True, tag=True):
    """Message from the engine: what computes the answers to requests that begin from now on, as digests of contents.

    Attributes:
      base: digest of weights, tokenizer, options, versions and devices; None while the contents of weights are unknown.
      adapters: name of each loaded adapter -> digest of its contents.
    """

    base: str | None
    adapters: dict[str, str]


class Step(msgspec.Struct, array_like=True, tag=True):
    """Message from the engine after a step: new parts of answers, and its load; ``gauges`` is None between steps."""

    pieces: list[Piece]
    gauges: Gauges | None = None


class Result(msgspec.Struct, array_like=True, tag=True):
    """Message from the engine: the result of a `Call` or `Withdraw`, or a sentence that says why there is none."""

    id: int
    value: Any = None
    error: str | None = None


class Refused(msgspec.Struct, array_like=True, tag=True):
    """Message from the engine's process: `Launch` asks for an impossible engine; ``reason`` is the user's mistake."""

    reason: str


class Failed(msgspec.Struct, array_like=True, tag=True):
    """Message from the engine's process: the engine has stopped, for this reason, and the process ends."""

    reason: str


ToEngine = Launch | Submit | Abort | Withdraw | Call
FromEngine = Ready | Computes | Step | Result | Refused | Failed
_encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def frame(message: ToEngine | FromEngine) -> bytes:
    """Encode a message in MessagePack, with its length in bytes before it.

    Raises OverflowError and UnicodeEncodeError for values that MessagePack cannot hold.
    """
    payload = _encode(message)
    return LENGTH.pack(len(payload)) + payload


def read_frame(connection: socket.socket) -> ToEngine | None:
    """Wait for the next message to the engine and return it; None when the HTTP process has closed the socket."""
    header = _read_exactly(connection, LENGTH.size)
    payload = header and _read_exactly(connection, LENGTH.unpack(header)[0])
    return decode_to_engine(payload) if payload else None


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            return None
        data += part
    return bytes(data)
