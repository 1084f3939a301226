"""Streaming detokenizer: makes text of token ids as they arrive, and finds stop strings. Host side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Decoder of an answer's tokens to text as they arrive. Without a tokenizer, text is always empty.

    Args:
      tokenizer: a transformers fast tokenizer, or None.
      stop: stop strings; text ends before the first of them.

    Attributes:
      stopped: whether a stop string has appeared.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""  # decoded so far; may still end in the beginning of a stop string
        self._returned = 0  # characters of _text already returned
        self.stopped = False

    @property
    def text(self) -> str:
        """Text of the answer so far, without a stop string."""
        return self._text

    def add(self, token: int) -> str:
        """Append a token and return the new text that is now certain. Sets ``stopped`` when a stop string appears."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token)
        return self._extend(self._stream.step(self._tokenizer.backend_tokenizer, token) or "", final=False)

    def finish(self) -> str:
        """End the answer; return the text held back because a stop string or a character might have been completed."""
        if self._tokenizer is None or self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self._extend(whole[len(self._text):], final=True)

    def _extend(self, piece: str, final: bool) -> str:
        """Append decoded text, cut it at a stop string, and return what is certain and has not been returned."""
        longest = max(map(len, self._stop), default=0)
        search_from = max(0, len(self._text) - longest + 1)
        self._text += piece
        starts = [start for stop in self._stop if (start := self._text.find(stop, search_from)) >= 0]
        if starts:
            self.stopped = True
            self._text = self._text[: min(starts)]
        undecided = 0 if final or self.stopped else self._undecided()
        certain = self._text[self._returned : len(self._text) - undecided]
        self._returned += len(certain)
        return certain

    def _undecided(self) -> int:
        """Return the number of characters at the text's end that may be the beginning of a stop string."""
        lengths = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if self._text.endswith(stop[:n]))
        return max(lengths, default=0)
