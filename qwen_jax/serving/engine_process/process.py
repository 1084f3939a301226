"""The engine's process: takes requests from a socket, steps, and sends what is new."""

from __future__ import annotations

import logging
import os
import queue
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qwen_jax.checkpoint import resolve
from qwen_jax.checkpoint.shared_memory import shared_copy
from qwen_jax.engine.api.outputs import unit
from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.api.structured_output import StructuredOutput
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.frontend.input_processor import EMBEDDING
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.multihost.rendezvous import join
from qwen_jax.errors import UserError
from qwen_jax.serving.engine_process.calls import Operations, sentence_of
from qwen_jax.serving.engine_process.engine_metrics import EngineMetrics
from qwen_jax.serving.ipc.logs import set_up_logging
from qwen_jax.serving.ipc.messages import Piece, frame, read_frame

logger = logging.getLogger(__name__)
INTAKE_THREADS = 2  # which tokenise and compile grammars beside the steps
DEVICE_FAILED = 3  # exit code
ORPHAN_SECONDS = 5


class _Open:
    """A request of a client, whose ``n`` answers are requests of the engine."""

    def __init__(self, number: int, requests: list[Request], options: dict[str, Any]) -> None:
        self.number, self.requests, self.streams = number, requests, options["stream"]
        self.timeout, self.normalize = options["timeout"] is not None, options.get("normalize", False)
        self.sent = [0] * len(requests)  # tokens of each answer
        self.last_token: list[float | None] = [None] * len(requests)


class Worker:
    """One thread, the caller of `run`, owns the engine. Others read the socket, tokenise and load weights."""

    def __init__(self, engine: Engine, connection: socket.socket, find: Callable[[str], str] = str) -> None:
        self._engine, self._connection = engine, connection
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: dict[int, _Open] = {}
        self._aborted: set[int] = set()  # while they were being tokenised
        self._preparing: set[int] = set()
        self._pool = ThreadPoolExecutor(INTAKE_THREADS, "intake")
        self._metrics = EngineMetrics(engine)
        self._operations = Operations(engine, self._metrics, self._inbox.put, self._pool, find)
        self._steps = 0

    def run(self) -> None:
        """Until the other side closes."""
        self._send("ready", self._facts())
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            try:
                call = self._inbox.get() if not self._open else self._inbox.get_nowait()
                if call is None:
                    return
                call()
            except queue.Empty:
                self._engine.core.step()
                self._steps += 1
                self._publish()

    def _facts(self) -> dict[str, Any]:
        engine = self._engine
        chat = bool(engine.tokenizer and engine.tokenizer.chat_template)
        return {"max_seq_len": engine.limits.max_seq_len, "max_batch_size": engine.limits.max_batch_size,
                "hidden_size": engine.config.hidden_size, "adapters": engine.adapters.names,
                "compiled": engine.stats().executables, "chat": chat, "clock": time.monotonic()}

    # --- from the other process, on the reading thread

    def _read(self) -> None:
        while (message := read_frame(self._connection)) is not None:
            kind, number, *rest = message
            if kind == "generate":
                self._preparing.add(number)
                self._pool.submit(self._prepare, number, *rest)
            elif kind == "abort":
                self._inbox.put(lambda number=number: self._abort(number))
            elif kind == "withdraw":
                self._inbox.put(lambda number=number, rest=rest: self._withdraw(number, *rest))
            else:
                self._operations.begin(*rest, lambda value, error, number=number: self._send("result", number, error,
                                                                                            value))
        self._inbox.put(None)

    def _prepare(self, number: int, options: dict[str, Any]) -> None:
        """On a thread of its own: from a client's options to requests."""
        try:
            requests = self._requests(options)
            opened = _Open(number, requests, options)
            self._inbox.put(lambda: self._begin(opened))
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("request %d could not be prepared", number)
            kind = "user" if isinstance(error, UserError) else "fault"
            failed = Piece(number, 0, error=sentence_of(error), kind=kind, finish_reason="error")
            self._inbox.put(lambda: self._refuse(failed))

    def _requests(self, options: dict[str, Any]) -> list[Request]:
        intake, timeout = self._engine.input_processor, options["timeout"]
        deadline = None if timeout is None else options["arrived"] + timeout
        params = dict(options["params"])
        if looks := params.pop("structured_output", None):
            params["structured_output"] = StructuredOutput(**looks)
        prompt, score_from = options["prompt"], None
        if isinstance(prompt, dict):  # a conversation
            prompt = intake.conversation(prompt["messages"], prompt.get("tools"))
        if "continuation" in options:
            prompt, ending = intake.tokens(prompt), intake.tokens(options["continuation"])
            if not prompt or not ending:
                raise UserError("a score needs at least one token of prompt and one of continuation")
            prompt, score_from = [*prompt, *ending], len(prompt)
            params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        pooling = options.get("pooling")
        asked = EMBEDDING if pooling else SamplingParams(**params)
        requests = intake.requests(prompt, asked, score_from, options["adapter"], options["priority"], deadline,
                                   pooling)
        for request in requests:
            request.streams, request.output.times.arrived = options["stream"], options["arrived"]
        return requests

    # --- on the engine's thread

    def _begin(self, opened: _Open) -> None:
        self._preparing.discard(opened.number)
        if opened.number in self._aborted:
            self._aborted.discard(opened.number)
            return
        begun = []
        try:
            for request in opened.requests:
                self._engine.core.submit([request])
                begun.append(request)
        except UserError as error:  # an adapter may have gone since it was looked up
            for request in begun:
                self._engine.core.abort(request.sequence.request_id)
            self._send("step", [Piece(opened.number, 0, error=str(error), kind="user", finish_reason="error")], {})
            return
        self._open[opened.number] = opened

    def _refuse(self, failed: Piece) -> None:
        self._preparing.discard(failed.id)
        self._aborted.discard(failed.id)
        self._send("step", [failed], {})

    def _abort(self, number: int) -> None:
        opened = self._open.pop(number, None)
        if opened is None:
            if number in self._preparing:
                self._aborted.add(number)
            return
        for request in opened.requests:
            if self._engine.core.abort(request.sequence.request_id):
                self._metrics.ended(request)

    def _withdraw(self, number: int, count: int) -> None:
        """Gives back the last requests of those that have not begun, for another engine. The answer: their ids."""
        waiting = [opened for opened in self._open.values()
                   if not any(request.begun or request.closed for request in opened.requests)]
        given_back = waiting[len(waiting) - min(count, len(waiting)):]
        for opened in given_back:
            for request in opened.requests:
                self._engine.core.withdraw(request)
            del self._open[opened.number]
        self._send("result", number, None, [opened.number for opened in given_back])

    def _publish(self) -> None:
        pieces, ended = [], []
        for opened in self._open.values():
            for request in opened.requests:
                self._note_times(opened, request)
                if opened.streams or request.closed:
                    pieces += self._new(opened, request)
            if all(request.closed for request in opened.requests):
                ended.append(opened.number)
        for number in ended:
            del self._open[number]
        self._send("step", pieces, self._gauges())

    def _note_times(self, opened: _Open, request: Request) -> None:
        index, now = request.output.index, request.output.times.last_token
        before = opened.last_token[index]
        if now != before:
            opened.last_token[index] = now
            if before is not None:
                self._metrics.had_tokens(now - before)

    def _new(self, opened: _Open, request: Request) -> list[Piece]:
        """What has not been sent of an answer; nothing when it has not changed."""
        index, output = request.output.index, request.output
        if not request.deltas:
            return []
        piece = Piece(opened.number, index, weight_version=request.sequence.version)
        while request.deltas:
            delta = request.deltas.popleft()
            piece.text += delta.text
            piece.token_ids = piece.token_ids + delta.token_ids
            piece.finish_reason = delta.finish_reason or piece.finish_reason
        if output.logprobs is not None:
            first = opened.sent[index]
            piece.logprobs = [self._named(request.params.logprobs, among)
                              for among in output.logprobs[first:first + len(piece.token_ids)]]
        opened.sent[index] += len(piece.token_ids)
        if piece.finish_reason:
            piece.tokens, piece.prompt_tokens = len(output.token_ids), len(output.prompt_token_ids)
            times = output.times
            piece.times = times.arrived, times.started, times.first_token, times.ended
            piece.error = output.error
            piece.kind = output.error and "fault"
            if output.finish_reason == "abort" and opened.timeout:
                piece.kind, piece.error = "deadline", "the deadline has passed"
            if request.score_from is not None:
                scored = zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True)
                piece.score = [among[token] for token, among in scored if among is not None]
            if output.embedding is not None:
                vector = unit(output.embedding) if opened.normalize else output.embedding
                piece.vector = vector.astype("<f4").tobytes()
            self._metrics.ended(request)
        return [piece]

    def _named(self, count: int, among: dict[int, float]) -> tuple[str, float, list[tuple[str, float]]]:
        (token, logprob), *_ = among.items()
        most = sorted(among.items(), key=lambda one: -one[1])[:count]
        return self._text_of(token), logprob, [(self._text_of(one), value) for one, value in most]

    def _text_of(self, token: int) -> str:
        return self._engine.tokenizer.decode([token]) if self._engine.tokenizer else ""

    def _gauges(self) -> dict[str, int]:
        schedulers = [replica.scheduler for replica in self._engine.deployment.replicas]
        return {"steps": self._steps, "running": sum(len(one.running) for one in schedulers),
                "waiting": sum(len(one.waiting) for one in schedulers),
                "pages_used": sum(one.pool.capacity - one.pool.num_free for one in schedulers),
                "pages_total": sum(one.pool.capacity for one in schedulers)}

    def _send(self, *message: Any) -> None:
        self._connection.sendall(frame(*message))


def _end_with(connection: socket.socket) -> None:
    """Ends this process some seconds after the other one has, whatever the engine is doing."""
    hangup = select.poll()
    hangup.register(connection, getattr(select, "POLLRDHUP", 0))  # of TCP, which says no more than that on Linux
    hangup.poll()
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def _in_shared_memory(ref: str) -> str:
    return str(shared_copy(resolve(ref)).path)


def main() -> None:
    """``python -m qwen_jax.serving.engine_process.process FD``: run an engine behind the inherited socket FD, whose
    first frame says what to load.

    That frame: the model, options of ``Engine.from_pretrained``, and what is this process's own: ``log_format``,
    ``share_weights``, with which checkpoints are read from a copy in shared memory, and ``join``, the arguments of
    `hosts.join`, where several processes are one engine; all but the first do what that one says.
    """
    connection = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    model, options, process = read_frame(connection)
    set_up_logging(process.get("log_format", "text"))
    find = _in_shared_memory if process.get("share_weights") else str
    try:
        if place := process.get("join"):
            join(*place)
        engine = Engine.from_pretrained(find(model), **options)
    except UserError as error:
        connection.sendall(frame("refused", str(error)))
        sys.exit(2)
    if place and place[2] > 0:
        engine.follow()
        return
    try:
        Worker(engine, connection, find).run()
    except (BrokenPipeError, ConnectionResetError):  # nobody is left to answer
        pass
    except BaseException as error:
        traceback.print_exc()
        connection.sendall(frame("failed", f"{type(error).__name__}: {error}"))
        sys.stderr.flush()
        os._exit(DEVICE_FAILED)  # what the devices run may never end


if __name__ == "__main__":
    main()
