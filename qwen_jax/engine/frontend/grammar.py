"""Answers that follow a grammar: which tokens may come next, as bits, computed by llguidance on the host.

A mask row has a bit per token id: id i is bit i % 32 of word i // 32. W = ceil(V / 32) words.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from qwen_jax.engine.api.structured_output import StructuredOutput
from qwen_jax.errors import UserError

# Between two JSON tokens. Bounded, because a weak model may otherwise write blanks until max_tokens; 32 is a line end
# and more indentation than people read.
JSON_BLANKS = r"[ \t\n\r]{1,32}"
# A hostile regex keeps the library busy for as long as its fuel lasts: 3 s by default, 0.3 s so. A schema of 400 varied
# fields still fits. Verbose errors would print the parser's state, not what is wrong with the grammar.
_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, verbose_errors=False)


class GrammarError(RuntimeError):
    """In the middle of an answer the grammar became too complex to follow, or allows no text any more."""


class GrammarCompiler:
    """Makes matchers for one tokenizer. May be used from several threads.

    Args:
      tokenizer: a transformers fast tokenizer, or None: then every request for a matcher is refused.
      vocab_size: V, the width of the model's logits. Ids that the tokenizer lacks are never allowed.
      eos_token_ids: ids that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        limit = min(len(tokenizer), vocab_size) if tokenizer is not None else 0
        self._eos = frozenset(token for token in eos_token_ids if token < limit)
        ids = np.arange(-(-vocab_size // 32) * 32)
        text = (ids < limit) & ~np.isin(ids, list(self._eos))
        self._text_ids = np.packbits(text, bitorder="little").view("<u4")
        self._library: LLTokenizer | None = None
        self._lock = threading.Lock()

    def matcher(self, spec: StructuredOutput) -> Matcher:
        """A matcher at the beginning of an answer. Milliseconds, the first time seconds; UserError for a bad grammar.

        The first mask is computed here: it finds grammars without any text, and prepares what every later mask uses.
        """
        if self._tokenizer is None:
            raise UserError("structured output needs a tokenizer: give a checkpoint with tokenizer.json")
        if not self._eos:
            raise UserError("structured output needs an end-of-sequence id, and this model names none: set "
                            "eos_token_id in generation_config.json")
        try:
            definition = _definition(spec)
        except ValueError as error:  # a schema nested deeper than the library reads
            raise UserError(f"{spec.kind} cannot be used: {_reason(str(error))}") from None
        inner = LLMatcher(self._library_tokenizer(), definition, log_level=0, limits=_LIMITS)
        if inner.is_error():
            raise UserError(f"{spec.kind} cannot be used: {_reason(inner.get_error())}")
        inner.compute_bitmask()
        if inner.is_error():
            raise UserError(f"{spec.kind} cannot be used: {_reason(inner.get_error())}")
        return Matcher(inner, self._text_ids, self._eos)

    def _library_tokenizer(self) -> LLTokenizer:
        with self._lock:
            if self._library is None:
                from llguidance.hf import from_tokenizer  # imports transformers

                size = max(self._vocab_size, len(self._tokenizer))  # the library takes no less than the tokenizer has
                self._library = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=sorted(self._eos))
            return self._library


class Matcher:
    """Where one answer is in its grammar. One thread at a time."""

    def __init__(self, inner: LLMatcher, text_ids: np.ndarray, eos: frozenset[int], accepted: int = 0,
                 ends: int = 0) -> None:
        self._inner, self._text_ids, self._eos = inner, text_ids, eos
        # End-of-sequence is counted here and not told to the library, whose rollback does not count it consistently.
        self._accepted, self._ends = accepted, ends

    @property
    def finished(self) -> bool:
        """Whether nothing but end-of-sequence is possible."""
        return self._ends > 0 or (self._inner.is_stopped() and not self._inner.is_error())

    def fill(self, row: np.ndarray) -> None:
        """Writes the mask of the next token into ``row``, uint32 or int32 [W]. GrammarError when it is lost."""
        words = row.view(np.uint32)
        if self._ends:
            words[:] = 0
        else:
            allowed = np.frombuffer(self._inner.compute_bitmask(), "<u4")
            self._check()
            np.bitwise_and(allowed[: len(self._text_ids)], self._text_ids, out=words)
        if self._ends or self._inner.is_accepting():
            for token in self._eos:
                words[token // 32] |= np.uint32(1 << token % 32)

    def mask(self) -> np.ndarray:
        """A new mask of the next token, int32 [W]."""
        row = np.empty(len(self._text_ids), np.int32)
        self.fill(row)
        return row

    def accept(self, token: int) -> None:
        """Advance by one token. ValueError, and no change, when the mask does not allow it; GrammarError as `fill`."""
        if token in self._eos:
            if not self._ends and not self._inner.is_accepting():
                raise ValueError(f"the grammar cannot end here: token {token} is not allowed")
            self._ends += 1
        elif self._ends or not self._is_text(token) or not self._inner.try_consume_tokens([token]):
            self._check()
            raise ValueError(f"token {token} is not allowed by the grammar")
        self._accepted += 1

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` accepted tokens. ValueError for more than were accepted."""
        if not 0 <= count <= self._accepted:
            raise ValueError(f"cannot take back {count} tokens of {self._accepted}")
        ends = min(count, self._ends)
        if count > ends and not self._inner.rollback(count - ends):
            raise GrammarError(_reason(self._inner.get_error()))
        self._ends -= ends
        self._accepted -= count

    def copy(self) -> Matcher:
        """One that advances on its own."""
        return Matcher(self._inner.deep_copy(), self._text_ids, self._eos, self._accepted, self._ends)

    def _is_text(self, token: int) -> bool:
        return 0 <= token < 32 * len(self._text_ids) and bool((self._text_ids[token // 32] >> (token % 32)) & 1)

    def _check(self) -> None:
        if self._inner.is_error():
            raise GrammarError(f"the grammar cannot be followed further: {_reason(self._inner.get_error())}")


def _definition(spec: StructuredOutput) -> str:
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.regex)
    if spec.kind == "grammar":
        return LLMatcher.grammar_from_lark(spec.grammar)
    if spec.kind == "choice":  # Lark's string literals have JSON's escapes
        options = " | ".join(json.dumps(option, ensure_ascii=False) for option in spec.choice)
        return LLMatcher.grammar_from_lark(f"start: {options}")
    schema = spec.json_schema or '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_BLANKS})


def _reason(message: str) -> str:
    """One line of the library's message, which may draw below it where in the grammar the fault is."""
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    if "error: " in message:  # the regex parser says it last
        message = message.rpartition("error: ")[2]
    return (message.strip().splitlines() or ["unknown reason"])[0]
