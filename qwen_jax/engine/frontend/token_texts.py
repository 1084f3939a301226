"""Texts of tokens: the bytes of a single token, and decoders of tokens that arrive one by one. Host side."""

from __future__ import annotations

import codecs
from typing import Any, Protocol

from tokenizers.decoders import ByteLevel, DecodeStream


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
