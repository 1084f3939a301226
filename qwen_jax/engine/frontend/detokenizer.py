"""Token ids to text as they arrive, stop strings included. Host side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Text of one answer. Without a tokenizer, text is always empty.

    Args:
      tokenizer: a transformers fast tokenizer, or None.
      stop: stop strings; text ends before the first of them.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""  # decoded so far; may still end in the beginning of a stop string
        self._given = 0  # characters of _text already returned
        self.stopped = False

    @property
    def text(self) -> str:
        """The answer so far, without a stop string."""
        return self._text

    def add(self, token: int) -> str:
        """Append a token; returns the text that is now certain. Sets ``stopped`` when a stop string appeared."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        return self._extend(self._stream.step(self._tokenizer.backend_tokenizer, token) or "", final=False)

    def finish(self) -> str:
        """The rest: what was held back for a stop string or for the end of a character."""
        if self._tokenizer is None or self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self._extend(whole[len(self._text):], final=True)

    def _extend(self, piece: str, final: bool) -> str:
        longest = max(map(len, self._stop), default=0)
        search_from = max(0, len(self._text) - longest + 1)
        self._text += piece
        found = [at for at in (self._text.find(stop, search_from) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]
        held = 0 if final or self.stopped else self._undecided()
        certain = self._text[self._given : len(self._text) - held]
        self._given += len(certain)
        return certain

    def _undecided(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        lengths = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if self._text.endswith(stop[:n]))
        return max(lengths, default=0)
