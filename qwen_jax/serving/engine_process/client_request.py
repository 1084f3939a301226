"""A client's request in the engine's process: it becomes engine requests, whose new text and tokens are sent back."""

from __future__ import annotations

import logging
import math
import socket
import threading
from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from qwen_jax.engine.api.outputs import RequestOutput, normalized
from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.api.structured_output import StructuredOutput
from qwen_jax.engine.core.engine_thread import EngineDead, Submission
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.frontend.input_processor import EMBEDDING_PARAMS
from qwen_jax.engine.frontend.request import Request
from qwen_jax.errors import PromptTooLong, UnknownAdapter, UserError
from qwen_jax.serving.engine_process.calls import sentence_of
from qwen_jax.serving.engine_process.engine_metrics import EngineMetrics
from qwen_jax.serving.ipc.messages import (
    FromEngine,
    Gauges,
    Piece,
    RequestOptions,
    Step,
    Submit,
    TokenLogprob,
    frame,
)

logger = logging.getLogger(__name__)
_KINDS = {"adapter": UnknownAdapter, "length": PromptTooLong, "user": UserError}  # `Piece.kind` of an error


class Outbox:
    """Sender of messages to the HTTP process. The new parts of all answers after an engine step go in one message."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self.pieces: list[Piece] = []  # of the next step; the engine's thread only

    def send(self, message: FromEngine) -> None:
        """Send a message to the HTTP process at once, from any thread."""
        data = frame(message)
        with self._lock:
            self._connection.sendall(data)

    def send_step(self, gauges: Gauges) -> None:
        """Send the HTTP process the parts of answers in ``pieces``, with the engine's gauges, and empty ``pieces``."""
        pieces, self.pieces = self.pieces, []
        self.send(Step(pieces, gauges))


class ClientRequest:
    """A client's request while the engine runs it: sends what the engine generates for each of its ``n`` answers.

    Every answer is a request of its own to the engine.

    Args:
      message: the request, as it arrived from the HTTP process.
      open_requests: requests that have not ended, by number; this one is removed from it when it ends.

    Attributes:
      number: the HTTP process's number for the request.
      submission: the engine thread's handle on the request, with which it can be aborted.
    """

    def __init__(self, message: Submit, engine: Engine, metrics: EngineMetrics, outbox: Outbox,
                 open_requests: MutableMapping[int, ClientRequest]) -> None:
        self.number, self._options = message.id, message.options
        self.submission: Submission | None = None
        self._engine, self._metrics, self._outbox, self._open_requests = engine, metrics, outbox, open_requests
        self._last_token: dict[int, float | None] = {}  # when each answer last got tokens

    def prepare(self) -> list[Request]:
        """Make the engine's requests for the answers. Raises UserError for options that cannot run."""
        return requests_of(self._options, self._engine)

    def after_step(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._observe_tokens(request)
            if request.deltas and (self._options.stream or request.closed):
                self._outbox.pieces.append(self._piece(request))
        if all(request.closed for request in requests):
            self._open_requests.pop(self.number, None)

    def aborted(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._metrics.ended(request)

    def failed(self, error: Exception) -> None:
        self._open_requests.pop(self.number, None)
        if isinstance(error, EngineDead):  # the process ends, with a message for all requests
            return
        kind = next((kind for kind, error_type in _KINDS.items() if isinstance(error, error_type)), "fault")
        if kind == "fault":
            logger.error("request %d could not be answered", self.number, exc_info=error)
        text = sentence_of(error)
        if kind == "length":  # in the words by which OpenAI's clients know it
            text = (f"This model's maximum context length is {self._engine.limits.max_seq_len} tokens. However, "
                    f"{text}")
        piece = Piece(self.number, 0, error=text, kind=kind, finish_reason="error")
        self._outbox.send(Step([piece]))

    def _observe_tokens(self, request: Request) -> None:
        index, now = request.output.index, request.output.times.last_token
        before = self._last_token.get(index)
        if now != before:
            self._last_token[index] = now
            if before is not None:
                self._metrics.had_tokens(now - before)

    def _piece(self, request: Request) -> Piece:
        """Return the text, tokens and log-probabilities of an answer that have not been sent to the client yet."""
        output, deltas = request.output, list(request.deltas)
        request.deltas.clear()
        tokens = [token for delta in deltas for token in delta.token_ids]
        piece = Piece(self.number, output.index, "".join([delta.text for delta in deltas]), tokens,
                      weight_version=request.sequence.version, finish_reason=deltas[-1].finish_reason)
        if output.logprobs is not None:
            first = len(output.logprobs) - len(tokens)
            piece.logprobs = [self._token_logprobs(logprobs, request.params.logprobs) for logprobs in
                              output.logprobs[first:]]
        if self._options.echo and len(output.token_ids) == len(tokens):  # the first part
            piece.prompt_text = self._engine.input_processor.text_of(output.prompt_token_ids)
            if output.prompt_logprobs is not None:
                piece.prompt = self._prompt_logprobs(request)
        if piece.finish_reason:
            self._add_results(piece, output, request)
            self._metrics.ended(request)
        return piece

    def _add_results(self, piece: Piece, output: RequestOutput, request: Request) -> None:
        """Add to an answer's last piece what is known at its end: token counts, times, error, score and embedding."""
        piece.stop = output.stop
        piece.tokens, piece.prompt_tokens = len(output.token_ids), len(output.prompt_token_ids)
        times = output.times
        piece.times = times.arrived, times.started, times.first_token, times.ended
        if output.error:
            piece.error, piece.kind = output.error, "refused" if output.refused else "fault"
        if output.finish_reason == "abort" and self._options.timeout is not None:
            piece.error, piece.kind = "the deadline has passed", "deadline"
        if request.score_from is not None:
            scored = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
            piece.score = [logprobs[token] for token, logprobs in scored if logprobs is not None]
        if output.embedding is not None:
            vector = normalized(output.embedding) if self._options.normalize else output.embedding
            piece.vector = vector.astype("<f4").tobytes()

    def _prompt_logprobs(self, request: Request) -> list[list[TokenLogprob]]:
        """Return the prompt's tokens with their log-probabilities, NaN where none was computed."""
        prompt, count = request.output.prompt_token_ids, request.params.prompt_logprobs or 0
        computed = request.output.prompt_logprobs
        return [self._token_logprobs({token: math.nan} if logprobs is None else logprobs,
                                     0 if logprobs is None else count)
                for token, logprobs in zip(prompt, computed, strict=True)]

    def _token_logprobs(self, logprobs: dict[int, float], count: int) -> list[TokenLogprob]:
        """Return the log-probabilities of a token and, after it, of the ``count`` most likely tokens.

        ``logprobs`` maps token ids to log-probabilities; the token itself comes first.
        """
        texts = self._engine.input_processor.token_texts
        most_likely = sorted(logprobs.items(), key=lambda item: -item[1])[:count]
        return [TokenLogprob(token, texts.bytes_of(token) if texts else b"", logprob)
                for token, logprob in [next(iter(logprobs.items())), *most_likely]]


def requests_of(options: RequestOptions, engine: Engine) -> list[Request]:
    """Make the engine's requests for a client's request, one per answer. Raises UserError for what cannot run."""
    processor, prompt = engine.input_processor, options.prompt
    more: dict[str, Any] = {}
    if isinstance(prompt, dict):
        prompt = processor.conversation(prompt["messages"], prompt.get("tools"),
                                        continues=prompt.get("continues", False))
    elif options.suffix is not None:
        prompt, more["ends"] = processor.fill_in_the_middle(prompt, options.suffix)
    elif not options.allow_special_tokens:
        prompt = processor.tokens(prompt, allow_special_tokens=False)
    deadline = None if options.timeout is None else options.arrived + options.timeout
    common = {"adapter": options.adapter, "priority": options.priority, "deadline": deadline,
              "streams": options.stream, "cache_salt": options.cache_salt}
    if options.continuation is not None:
        requests = processor.score_requests(prompt, options.continuation, **common)
    else:
        params = EMBEDDING_PARAMS if options.pooling else _sampling_params(options.params)
        if options.to_end_of_context:
            prompt = processor.tokens(prompt)
            params = replace(params, max_tokens=processor.scheduler.room_after(len(prompt)))
        requests = processor.requests(prompt, params, pooling=options.pooling, **common, **more)
    for request in requests:
        request.output.times.arrived = options.arrived  # at the HTTP process
    return requests


def _sampling_params(fields: dict[str, Any]) -> SamplingParams:
    if structure := fields.get("structured_output"):
        fields = {**fields, "structured_output": StructuredOutput(**structure)}
    return SamplingParams(**fields)
