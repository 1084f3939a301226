"""Digests of what computes an engine's answers, which the engine's process sends for the keys of cached answers."""

from __future__ import annotations

import threading
from collections.abc import Callable

from qwen_jax.contents import FileSet, digest_of
from qwen_jax.engine.engine import Engine
from qwen_jax.serving.ipc.messages import Computes


class AnswerIdentity:
    """Sender of the digests of what computes the answers of an engine, whenever they change or become known.

    The contents of a checkpoint are hashed on a thread of their own, because gigabytes take seconds.

    Args:
      send: sends a message to the HTTP process, from any thread.
    """

    def __init__(self, engine: Engine, send: Callable[[Computes], None]) -> None:
        self._engine, self._send = engine, send
        self._lock = threading.Lock()  # messages are sent in the order of the changes
        self._contents: dict[int, str | None] = {}  # version of the weights -> digest of its checkpoint
        self._sent: int | None = None  # version that the last message is about

    def note_weights(self, version: int, files: FileSet) -> None:
        """Send the digests, of which that of a version of the weights is known once a thread has hashed its checkpoint.

        files: the checkpoint's, as they were before it was loaded.
        """
        def hash_and_send() -> None:
            self._contents[version] = files.digest()
            self.send()

        self.send()
        threading.Thread(target=hash_and_send, name="digest", daemon=True).start()

    def send_if_switched(self) -> None:
        """Send the digests if the weights have been switched since. Called before answers of other weights are sent."""
        if self._engine.weights.current != self._sent:
            self.send()

    def send(self) -> None:
        """Send the digests of what computes answers from now on."""
        with self._lock:
            version = self._engine.weights.current
            try:
                self._send(self._computes())
            except OSError:  # the HTTP process has ended
                pass
            self._sent = version  # only now: `send_if_switched` must not overtake the message

    def _computes(self) -> Computes:
        # The first checkpoint has the tokenizer and the generation defaults, which stay when the weights are replaced.
        first, current = self._contents.get(0), self._contents.get(self._engine.weights.current)
        known = first is not None and current is not None
        base = digest_of((self._engine.computation, first, current)) if known else None
        return Computes(base, dict(self._engine.adapters.digests))
