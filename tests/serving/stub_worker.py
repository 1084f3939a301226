"""In the engine's place: answers at once, and streams one token per request and step, as fast as it is taken."""

import queue
import socket
import sys
import threading

from qwen_jax.serving.ipc.messages import Piece, frame, read_frame


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    read_frame(connection)
    facts = {"max_seq_len": 4096, "max_batch_size": 256, "adapters": [], "compiled": 0, "chat": True}
    connection.sendall(frame("ready", facts))
    inbox: queue.SimpleQueue = queue.SimpleQueue()

    def read() -> None:
        while (message := read_frame(connection)) is not None:
            inbox.put(message)
        inbox.put(None)

    threading.Thread(target=read, daemon=True).start()
    asked: dict[int, int] = {}  # tokens of streams that are open
    left: dict[int, int] = {}  # those not yet sent
    while True:
        pieces = []
        try:
            while True:
                message = inbox.get() if not left and not pieces else inbox.get_nowait()
                if message is None:
                    return
                kind, number, *rest = message
                if kind == "abort":
                    left.pop(number, None)
                elif kind == "generate":
                    tokens = rest[0]["params"].get("max_tokens", 16)
                    if rest[0]["stream"]:
                        asked[number] = left[number] = tokens
                    else:
                        pieces.append(Piece(number, 0, "word " * tokens, finish_reason="length", tokens=tokens,
                                            prompt_tokens=1))
        except queue.Empty:
            pass
        for number in list(left):
            left[number] -= 1
            last = left[number] == 0
            end = {"finish_reason": "length", "tokens": asked.pop(number), "prompt_tokens": 1} if last else {}
            pieces.append(Piece(number, 0, "word ", [7], **end))
            if last:
                del left[number]
        connection.sendall(frame("step", pieces, {"steps": 1}))


if __name__ == "__main__":
    main()
