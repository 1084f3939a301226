"""Streaming detokenizer: makes text of token ids as they arrive, and finds stop strings. Host side."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from qwen_jax.engine.frontend.token_texts import TokenTexts


class Detokenizer:
    """Decoder of an answer's tokens to text as they arrive. Without a tokenizer, text is always empty.

    A token takes the time that its own text takes, however long the answer and the stop strings are.

    Args:
      texts: texts of the tokenizer's tokens, or None without a tokenizer.
      stop: stop strings; text ends before the first of them.

    Attributes:
      stopped: whether a stop string has appeared.
    """

    def __init__(self, texts: TokenTexts | None, stop: Sequence[str]) -> None:
        self._stream = texts and texts.stream()
        self._stops = [_StopSearch(text) for text in stop]
        self._certain: list[str] = []  # pieces already returned
        self._held = ""  # text after them, which may be the beginning of a stop string
        self.stopped = False

    @property
    def text(self) -> str:
        """Text of the answer so far, without a stop string."""
        return "".join(self._certain) + self._held

    def add(self, token: int) -> str:
        """Append a token and return the new text that is now certain. Sets ``stopped`` when a stop string appears."""
        return self._extend(self._stream.feed(token)) if self._stream else ""

    def finish(self) -> str:
        """End the answer; return the text held back because a stop string or a character might have been completed."""
        if self._stream is None or self.stopped:
            return ""
        certain = self._extend(self._stream.end())
        rest, self._held = self._held, ""
        self._certain.append(rest)
        return certain + rest

    def _extend(self, piece: str) -> str:
        """Append decoded text, cut it at a stop string, and return what is certain and has not been returned."""
        ends = [(len(self._held) + end, stop) for stop in self._stops if (end := stop.feed(piece)) is not None]
        text = self._held + piece
        if ends:
            self.stopped = True
            text = text[: min(end - len(stop.text) for end, stop in ends)]
        undecided = 0 if self.stopped else max((stop.matched for stop in self._stops), default=0)
        certain = text[: len(text) - undecided]
        self._held = text[len(certain):]
        self._certain.append(certain)
        return certain


class _StopSearch:
    """Search for a stop string in text that arrives in pieces (Knuth, Morris and Pratt's).

    Attributes:
      text: the stop string.
      matched: number of its characters with which the text so far ends; fewer than all.
    """

    def __init__(self, text: str) -> None:
        self.text, self.matched = text, 0
        self._borders = _borders(text)

    def feed(self, piece: str) -> int | None:
        """Read the next piece of text; return where in it the stop string's first occurrence ends, None without one."""
        if not self.matched and self.text[0] not in piece:
            return None
        for place, character in enumerate(piece, 1):
            while self.matched and character != self.text[self.matched]:
                self.matched = self._borders[self.matched - 1]
            self.matched += character == self.text[self.matched]
            if self.matched == len(self.text):
                self.matched = 0
                return place
        return None


@functools.lru_cache(maxsize=256)
def _borders(text: str) -> list[int]:
    """Return for each beginning of a text the length of its longest proper part that is both its beginning and end."""
    borders, length = [0], 0
    for character in text[1:]:
        while length and character != text[length]:
            length = borders[length - 1]
        length += character == text[length]
        borders.append(length)
    return borders
