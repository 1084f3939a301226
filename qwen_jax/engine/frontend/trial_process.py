"""Process that tries grammars for an engine in another process: a child of its own compiles each, and may die of it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys

from llguidance import LLTokenizer

from qwen_jax.engine.frontend.grammar_definition import compiled
from qwen_jax.engine.frontend.grammar_trial import BEGUN, CPU_SECONDS, MEMORY_BYTES, STACK_BYTES, WALL_SECONDS

# More than MEMORY_BYTES: the library takes 50 MB to describe its own panics, and hangs where it does not get them.
ADDRESS_SPACE_BYTES = 256 << 20
NICENESS = 5  # leaves the serving process two thirds of a core that both want


class ByteVocabulary:
    """Vocabulary for llguidance: special tokens at their ids, a token for each byte, and nothing else.

    Args:
      size: number of token ids.
      special: names of the special tokens by id, as JSON has them: with the ids as strings.
      eos: ids that end an answer.
    """

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, size: int, special: dict[str, str], eos: list[int]) -> None:
        names = {int(token): name for token, name in special.items()}
        self.special_token_ids, self.eos_token_id = sorted(names), eos[0]
        free = (token for token in range(max(size, *names, *eos) + 257) if token not in names and token not in eos)
        texts = {token: name.encode() for token, name in names.items()}
        self._ids = [next(free) for _ in range(256)]
        texts |= {token: bytes([byte]) for byte, token in enumerate(self._ids)}
        self.tokens = [texts.get(token, b"") for token in range(max(size, *texts))]

    def __call__(self, text: str | bytes) -> list[int]:
        return [self._ids[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def main() -> None:
    """Try grammars until the engine's process closes its end of the socket whose file descriptor is the argument.

    stdin has the arguments of `ByteVocabulary` as JSON. Each message on the socket has the descriptor of another one,
    of which a child reads the grammar and to which it writes what came of it.
    """
    control = socket.socket(fileno=int(sys.argv[1]))
    vocabulary = json.load(sys.stdin)
    tokenizer = LLTokenizer(ByteVocabulary(**vocabulary), eos_token=vocabulary["eos"])
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, for the engine's process
    gc.freeze()  # a child would copy what it collects
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            try:
                _try(tokenizer, socket.socket(fileno=descriptors[0]))
            finally:
                os._exit(0)
        os.close(descriptors[0])


def _try(tokenizer: LLTokenizer, connection: socket.socket) -> None:
    """Compile the grammar that the connection has, and write the reason against it or the memory that it took.

    The limits end the process with signals. What libraries print then is not for the engine's log.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    connection.sendall(BEGUN)
    definition = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
    _limit()
    before, reason = _memory(), None
    try:
        compiled(tokenizer, definition).deep_copy()
    except ValueError as error:
        reason = str(error)
    grown = _memory() - before
    if reason or grown <= MEMORY_BYTES:
        connection.sendall(json.dumps({"reason": reason, "bytes": grown}).encode())


def _limit() -> None:
    """Limit this process's time, memory and stack."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # which systems beside Linux may refuse
        with open("/proc/self/statm") as pages:
            address_space = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (address_space + ADDRESS_SPACE_BYTES,) * 2)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))


def _memory() -> int:
    """Return the most bytes of memory that this process has used."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
