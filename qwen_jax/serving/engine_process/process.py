"""The engine's process: takes requests from a socket, runs the engine, sends new parts of answers after each step."""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future

from qwen_jax.checkpoint import resolve
from qwen_jax.checkpoint.shared_memory import shared_copy
from qwen_jax.contents import FileSet
from qwen_jax.engine.core.engine_thread import EngineDead, EngineThread
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.multihost.rendezvous import join
from qwen_jax.errors import UserError
from qwen_jax.serving.engine_process.calls import EngineCalls, sentence_of
from qwen_jax.serving.engine_process.client_request import ClientRequest, Outbox
from qwen_jax.serving.engine_process.engine_metrics import EngineMetrics
from qwen_jax.serving.engine_process.identity import AnswerIdentity
from qwen_jax.serving.ipc.logs import set_up_logging
from qwen_jax.serving.ipc.messages import (
    Abort,
    Call,
    Failed,
    Gauges,
    Ready,
    Refused,
    Result,
    Step,
    Submit,
    ToEngine,
    Withdraw,
    frame,
    read_frame,
)

logger = logging.getLogger(__name__)
DEVICE_FAILED = 3  # exit code
ORPHAN_SECONDS = 5  # between the end of the HTTP process and that of this one


class Worker:
    """Loop that runs an engine on the requests and calls that the HTTP process sends over a socket.

    The thread that calls `run` is the only one to use the engine; a second thread reads the socket.

    Args:
      files: files of the checkpoint that the engine was made from, as they were before it was loaded.
      find: returns the path of the checkpoint to load for the reference that an update of the weights names.
    """

    def __init__(self, engine: Engine, connection: socket.socket, files: FileSet, find: Callable[[str], str]) -> None:
        self._engine, self._connection = engine, connection
        self._outbox = Outbox(connection)
        self._metrics = EngineMetrics(engine)
        self._thread = EngineThread(engine.core, after_step=self._send_step)
        self._files = files
        self._identity = AnswerIdentity(engine, self._outbox.send)
        self._calls = EngineCalls(engine, self._thread, self._metrics, self._identity, find)
        self._requests: dict[int, ClientRequest] = {}  # open ones by the client's number
        self._steps = 0

    def run(self) -> None:
        """Run the engine until the HTTP process closes the connection. Raises the error that ends the engine before."""
        engine = self._engine
        self._outbox.send(Ready(engine.limits.max_seq_len, engine.config.hidden_size, time.monotonic(),
                                engine.adapters.max_adapters))
        self._identity.note_weights(0, self._files)
        self._engine.when_program_arrives(lambda: self._outbox.send(Step([], self._gauges())))
        threading.Thread(target=self._read, name="read", daemon=True).start()
        self._thread.run()
        if not isinstance(self._thread.failure, EngineDead):
            raise self._thread.failure

    def _read(self) -> None:
        """Read and handle messages until the HTTP process closes the connection; an error here ends the engine too."""
        try:
            while (message := read_frame(self._connection)) is not None:
                self._take(message)
        except EngineDead:  # `run` says why
            pass
        finally:
            self._thread.close()

    def _take(self, message: ToEngine) -> None:
        match message:
            case Submit():
                request = ClientRequest(message, self._engine, self._metrics, self._outbox, self._requests)
                self._requests[request.number] = request
                grammar = bool(message.options.params.get("structured_output"))
                request.submission = self._thread.submit(request.prepare, request, grammar)
            case Abort():
                if request := self._requests.pop(message.id, None):
                    self._thread.abort(request.submission)
            case Withdraw():
                self._thread.withdraw(message.count).add_done_callback(
                    lambda withdrawn, id=message.id: self._send_withdrawn(id, withdrawn))
            case Call():
                self._calls.start(message.name, message.arguments).add_done_callback(
                    lambda result, id=message.id: self._send_result(id, result))

    def _send_withdrawn(self, id: int, withdrawn: Future[list[ClientRequest]]) -> None:
        if not withdrawn.exception():
            numbers = [request.number for request in withdrawn.result()]
            for number in numbers:
                self._requests.pop(number, None)
            self._outbox.send(Result(id, numbers))

    def _send_result(self, id: int, result: Future) -> None:
        error = result.exception()
        if isinstance(error, EngineDead):  # the process ends, with a message for all calls
            return
        if error and not isinstance(error, UserError):
            logger.error("a call failed", exc_info=error)
        try:
            self._outbox.send(Result(id, error=sentence_of(error)) if error else Result(id, result.result()))
        except (OverflowError, TypeError, UnicodeEncodeError) as problem:  # nothing has been sent: encoding comes first
            logger.exception("the result of a call cannot be encoded")
            self._outbox.send(Result(id, error=f"the result cannot be sent: {problem}"))

    def _send_step(self) -> None:
        self._steps += 1
        self._identity.send_if_switched()
        self._outbox.send_step(self._gauges())

    def _gauges(self) -> Gauges:
        schedulers = [replica.scheduler for replica in self._engine.core.replicas]
        pools = [scheduler.pool for scheduler in schedulers]
        return Gauges(
            steps=self._steps, running=sum(len(scheduler.running) for scheduler in schedulers),
            waiting=sum(len(scheduler.waiting) for scheduler in schedulers),
            pages_used=sum(pool.capacity - pool.num_free for pool in pools),
            pages_total=sum(pool.capacity for pool in pools), programs_to_come=self._engine.programs_to_come)


def main() -> None:
    """Run an engine for the HTTP process at the other end of a socket.

    The only command-line argument is the inherited socket's file descriptor; the first message on it is `Launch`.
    """
    connection = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_exit_after_hangup, args=(connection,), daemon=True).start()
    launch = read_frame(connection)
    set_up_logging(launch.log_format)
    find = _in_shared_memory if launch.share_weights else str
    try:
        if launch.join:
            join(*launch.join)
        path = find(launch.model)
        files = resolve(path).files
        engine = Engine.from_pretrained(path, **launch.options)
    except UserError as error:
        connection.sendall(frame(Refused(str(error))))
        sys.exit(2)
    if launch.join and launch.join[2] > 0:
        engine.follow()
        return
    try:
        Worker(engine, connection, files, find).run()
    except (BrokenPipeError, ConnectionResetError):  # the HTTP process has ended
        pass
    except BaseException as error:
        traceback.print_exc()
        connection.sendall(frame(Failed(f"{type(error).__name__}: {error}")))
        sys.stderr.flush()
        os._exit(DEVICE_FAILED)  # what the devices run may never end


def _exit_after_hangup(connection: socket.socket) -> None:
    """End this process `ORPHAN_SECONDS` after the HTTP process has ended, even while the engine is in a step."""
    hangup = select.poll()
    hangup.register(connection, getattr(select, "POLLRDHUP", 0))  # of TCP, which says no more than that on Linux
    hangup.poll()
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def _in_shared_memory(ref: str) -> str:
    """Copy a converted checkpoint into shared memory, if it is not there yet, and return the copy's path."""
    return str(shared_copy(resolve(ref)).path)


if __name__ == "__main__":
    main()
