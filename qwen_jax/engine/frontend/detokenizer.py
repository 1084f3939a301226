"""Streaming detokenizer: makes text of token ids as they arrive, and finds stop strings. Host side."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers.decoders import ByteLevel, DecodeStream


class Detokenizer:
    """Decoder of an answer's tokens to text as they arrive. Without a tokenizer, text is always empty.

    A token takes the time that its own text takes, however long the answer and the stop strings are.

    Args:
      texts: texts of the tokenizer's tokens, or None without a tokenizer.
      stop: stop strings; text ends before the first of them.

    Attributes:
      stopped_by: the stop string that has appeared; None before.
    """

    def __init__(self, texts: TokenTexts | None, stop: Sequence[str]) -> None:
        self._stream = texts and texts.stream()
        self._stops = [_StopSearch(text) for text in stop]
        self._certain: list[str] = []  # pieces already returned
        self._held = ""  # text after them, which may be the beginning of a stop string
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """True once a stop string has appeared."""
        return self.stopped_by is not None

    @property
    def text(self) -> str:
        """Text of the answer so far, without a stop string."""
        return "".join(self._certain) + self._held

    def add(self, token: int, may_stop: bool = True) -> str:
        """Append a token and return the new text that is now certain. Sets ``stopped`` when a stop string appears.

        may_stop: whether it may end here; else stop strings that this token completes are text like any other.
        """
        return self._extend(self._stream.feed(token), may_stop) if self._stream else ""

    def finish(self) -> str:
        """End the answer; return the text held back because a stop string or a character might have been completed."""
        if self._stream is None or self.stopped:
            return ""
        certain = self._extend(self._stream.end())
        rest, self._held = self._held, ""
        self._certain.append(rest)
        return certain + rest

    def _extend(self, piece: str, may_stop: bool = True) -> str:
        """Append decoded text, cut it at a stop string, and return what is certain and has not been returned."""
        ends = [(len(self._held) + end, stop) for stop in self._stops
                if (end := stop.feed(piece, may_stop)) is not None]
        text = self._held + piece
        if ends:
            start, self.stopped_by = min((end - len(stop.text), stop.text) for end, stop in ends)
            text = text[:start]
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

    def feed(self, piece: str, may_stop: bool = True) -> int | None:
        """Read the next piece of text; return where in it the stop string's first occurrence ends, None without one.

        Without ``may_stop`` no occurrence that ends in this piece counts.
        """
        if not self.matched and self.text[0] not in piece:
            return None
        for place, character in enumerate(piece, 1):
            while self.matched and character != self.text[self.matched]:
                self.matched = self._borders[self.matched - 1]
            self.matched += character == self.text[self.matched]
            if self.matched == len(self.text):
                self.matched = self._borders[-1]
                if may_stop:
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


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for.

    GPT-2 defined it (``bytes_to_unicode`` in its encoder.py): printable bytes are letters themselves, the others follow
    from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_letters()


class TextStream(Protocol):
    """Decoder of one answer's tokens as they arrive."""

    def feed(self, token: int) -> str:
        """Return the text that a further token completes."""

    def end(self) -> str:
        """Return the rest of the text, with U+FFFD for a character that is not complete."""


class TokenTexts:
    """Texts of a tokenizer's tokens.

    Args:
      tokenizer: a transformers fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, text in added.items() if text.special)
        self._special_names = {added[token].content: token for token in self._special}
        self._byte_level = isinstance(self._backend.decoder, ByteLevel)
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, which may be part of a character; for a special token, those of its name."""
        if (known := self._bytes.get(token)) is None:
            known = self._bytes[token] = self._find_bytes(token)
        return known

    def stream(self) -> TextStream:
        """Return a decoder of the tokens of one answer, which leaves out special tokens."""
        return _ByteStream(self) if self._byte_level else _LibraryStream(self._tokenizer)

    def is_special(self, token: int) -> bool:
        """Return whether a token is no text, such as one that ends a turn."""
        return token in self._special

    def special_token(self, name: str) -> int | None:
        """Return the special token of this name; None if there is none."""
        return self._special_names.get(name)

    def _find_bytes(self, token: int) -> bytes:
        if not self._byte_level:
            return self._tokenizer.decode([token]).encode()
        text = self._backend.id_to_token(token) or ""
        try:
            return bytes([BYTES[letter] for letter in text])
        except KeyError:  # an added token may have other letters; it stands for itself
            return text.encode()


class _ByteStream:
    """Decoder for byte-level tokenizers. The time that a token takes depends on its own bytes alone."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts, self._decoder = texts, codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return "" if self._texts.is_special(token) else self._decoder.decode(self._texts.bytes_of(token))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class _LibraryStream:
    """Decoder for other tokenizers, whose text of a token depends on the tokens before it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._stream = tokenizer, DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._length = 0

    def feed(self, token: int) -> str:
        self._ids.append(token)
        text = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._length += len(text)
        return text

    def end(self) -> str:
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return whole[self._length:]
