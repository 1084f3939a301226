"""A stand-in for the engine's process: it answers at once, and streams one token per request and step, as fast as they
are taken."""

import queue
import socket
import sys
import threading

from qwen_jax.serving.ipc.messages import Abort, Gauges, Piece, Ready, Step, Submit, frame, read_frame


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    read_frame(connection)
    connection.sendall(frame(Ready(max_seq_len=4096, hidden_size=64, clock=0.0)))
    inbox: queue.SimpleQueue = queue.SimpleQueue()

    def read() -> None:
        while (message := read_frame(connection)) is not None:
            inbox.put(message)
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    lengths: dict[int, int] = {}  # tokens of the open streams
    left: dict[int, int] = {}  # tokens that are not yet sent
    while True:
        pieces = []
        try:
            while True:
                message = inbox.get() if not left and not pieces else inbox.get_nowait()
                if message is None:
                    return
                if isinstance(message, Abort):
                    left.pop(message.id, None)
                elif isinstance(message, Submit):
                    tokens = message.options.params.get("max_tokens", 16)
                    if message.options.stream:
                        lengths[message.id] = left[message.id] = tokens
                    else:
                        pieces.append(Piece(message.id, 0, "word " * tokens, finish_reason="length", tokens=tokens,
                                            prompt_tokens=1))
        except queue.Empty:
            pass
        for number in list(left):
            left[number] -= 1
            last = left[number] == 0
            end = {"finish_reason": "length", "tokens": lengths.pop(number), "prompt_tokens": 1} if last else {}
            pieces.append(Piece(number, 0, "word ", [7], **end))
            if last:
                del left[number]
        connection.sendall(frame(Step(pieces, Gauges(steps=1))))


if __name__ == "__main__":
    main()
