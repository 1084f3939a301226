"""Grammars of answers: masks of the tokens that may come next, computed by llguidance on the host.

A mask has a bit per token id: id i is bit i % 32 of word i // 32. W = ceil(V / 32) words.
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

# Blanks between two JSON tokens. Bounded, because a weak model may otherwise write blanks until max_tokens; 32 are a
# line end and more indentation than people read.
JSON_BLANKS = r"[ \t\n\r]{1,32}"
# A hostile regex keeps the library busy for as long as its fuel lasts: 3 s by default, 0.3 s so. A schema of 400 varied
# fields still fits. Verbose errors would print the parser's state, not what is wrong with the grammar.
_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, verbose_errors=False)


class GrammarError(RuntimeError):
    """Error in the middle of an answer: its grammar became too complex to follow, or allows no text any more."""


class GrammarCompiler:
    """Compiler of grammars to matchers, which follow an answer token by token. Several threads may use it.

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
        """Compile a grammar; return a matcher at the beginning of an answer. UserError for a bad grammar.

        Takes milliseconds, the first time seconds. The first mask is computed here: it finds grammars without any text,
        and prepares data that every later mask uses.
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
        """Return llguidance's form of the tokenizer, made on first use."""
        with self._lock:
            if self._library is None:
                from llguidance.hf import from_tokenizer  # imports transformers

                size = max(self._vocab_size, len(self._tokenizer))  # the library takes no less than the tokenizer has
                self._library = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=sorted(self._eos))
            return self._library


class Matcher:
    """Position of an answer in its grammar: says which tokens may come next. For one thread at a time."""

    def __init__(self, inner: LLMatcher, text_ids: np.ndarray, eos: frozenset[int], ended: bool = False) -> None:
        """Begin where ``inner`` is.

        text_ids: mask uint32 [W] of the ids that are text. ended: whether end-of-sequence has been accepted.
        """
        self._inner, self._text_ids, self._eos, self._ended = inner, text_ids, eos, ended

    @property
    def finished(self) -> bool:
        """True when the answer is complete: nothing but end-of-sequence may follow."""
        return self._ended or (self._inner.is_stopped() and not self._inner.is_error())

    def mask(self) -> np.ndarray:
        """Return a new mask int32 [W] of the tokens that may come next. GrammarError if it cannot be computed."""
        if self._ended:
            words = np.zeros_like(self._text_ids)
        else:
            allowed = np.frombuffer(self._inner.compute_bitmask(), "<u4")
            self._check()
            words = allowed[: len(self._text_ids)] & self._text_ids
        if self._ended or self._inner.is_accepting():
            for token in self._eos:
                words[token // 32] |= np.uint32(1 << token % 32)
        return words.view(np.int32)

    def accept(self, token: int) -> None:
        """Advance by a token of the answer. ValueError, and no change, if it is not allowed; GrammarError as `mask`."""
        if token in self._eos:
            if not self._ended and not self._inner.is_accepting():
                raise ValueError(f"the grammar cannot end here: token {token} is not allowed")
            self._ended = True
        elif self._ended or not self._is_text(token) or not self._inner.try_consume_tokens([token]):
            self._check()
            raise ValueError(f"token {token} is not allowed by the grammar")

    def copy(self) -> Matcher:
        """Return a matcher at the same position, which advances on its own."""
        return Matcher(self._inner.deep_copy(), self._text_ids, self._eos, self._ended)

    def _is_text(self, token: int) -> bool:
        return 0 <= token < 32 * len(self._text_ids) and bool((self._text_ids[token // 32] >> (token % 32)) & 1)

    def _check(self) -> None:
        if self._inner.is_error():
            raise GrammarError(f"the grammar cannot be followed further: {_reason(self._inner.get_error())}")


def _definition(spec: StructuredOutput) -> str:
    """Return the form of an answer as a grammar in llguidance's own notation."""
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
    """Return the line of llguidance's error message that names the fault, without the drawing that may follow it."""
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    if "error: " in message:  # the regex parser says it last
        message = message.rpartition("error: ")[2]
    return (message.strip().splitlines() or ["unknown reason"])[0]
