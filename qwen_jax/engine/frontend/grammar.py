"""Grammars of answers: masks of the tokens that may come next, computed by llguidance on the host.

A mask has a bit per token id: id i is bit i % 32 of word i // 32. W = ceil(V / 32) words.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from qwen_jax.engine.api.structured_output import StructuredOutput
from qwen_jax.engine.frontend.grammar_definition import compiled, definition_of, reason
from qwen_jax.engine.frontend.grammar_trial import STACK_BYTES, GrammarTrial
from qwen_jax.errors import UserError

CACHE_BYTES = 32 << 20  # of compiled grammars that are kept
FORCED_BYTES = 32  # of a forced text, among whose beginnings a token is looked for
ENTRY_BYTES = 64 << 10  # that each of them counts for besides its text and what its trial took
# Time that an answer's grammar may take of the engine's thread: per token, and at once. A schema takes 0.05 ms a token,
# an ambiguous grammar more with each token.
SECONDS_PER_TOKEN, BURST_SECONDS = 0.005, 0.5


class GrammarError(RuntimeError):
    """Error in the middle of an answer: its grammar became too complex to follow, or allows no text any more."""


class _TokenIds(NamedTuple):
    """Token ids by their use: a mask uint32 [W] of those that are text, ids that end answers, other special ids."""

    text: np.ndarray
    eos: frozenset[int]
    special: tuple[int, ...]


class GrammarCompiler:
    """Compiler of grammars to matchers, which follow an answer token by token. Several threads may use it.

    A grammar is compiled in another process first, which dies of it in the engine's place.

    Args:
      tokenizer: a transformers fast tokenizer, or None: then every request for a matcher is refused.
      vocab_size: V, the width of the model's logits. Ids that the tokenizer lacks are never allowed.
      eos_token_ids: ids that end an answer.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        limit = min(len(tokenizer), vocab_size) if tokenizer is not None else 0
        self._eos = frozenset(token for token in eos_token_ids if token < limit)
        special = _special_tokens(tokenizer) if limit else {}
        ids = np.arange(-(-vocab_size // 32) * 32)
        text = (ids < limit) & ~np.isin(ids, list(self._eos))
        self._ids = _TokenIds(np.packbits(text, bitorder="little").view("<u4"), self._eos,
                              tuple(token for token in special if token < limit and token not in self._eos))
        self._size = max(vocab_size, limit and len(tokenizer))  # the library takes no less than the tokenizer has
        self._library: LLTokenizer | None = None
        self._lock = threading.Lock()  # guards the library and the cache
        self._cache: OrderedDict[str, tuple[LLMatcher, int]] = OrderedDict()  # by definition, with bytes; oldest first
        self._trial = limit and GrammarTrial(
            {"size": self._size, "special": special, "eos": sorted(self._eos) or [limit - 1]})

    def matcher(self, spec: StructuredOutput) -> Matcher:
        """Compile a grammar; return a matcher at the beginning of an answer. UserError for a bad grammar.

        Takes milliseconds, the first time seconds; at most seconds for a hostile one.
        """
        if self._tokenizer is None:
            raise UserError("structured output needs a tokenizer: give a checkpoint with tokenizer.json")
        if not self._eos:
            raise UserError("structured output needs an end-of-sequence id, and this model names none: set "
                            "eos_token_id in generation_config.json")
        try:
            definition = definition_of(spec)
            inner = self._cached(definition) or self._compile(definition)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{spec.kind} cannot be used: {reason(str(error))}") from None
        return Matcher(inner.deep_copy(), self._ids, self._library_tokenizer().tokenize_bytes)

    def _compile(self, definition: str) -> LLMatcher:
        """Compile a grammar, after its trial, and keep it; ValueError for a bad one."""
        self._trial.start()  # loads while the tokenizer is made
        tokenizer = self._library_tokenizer()
        size = self._trial.check(definition) + sys.getsizeof(definition) + ENTRY_BYTES
        inner = _on_deep_stack(lambda: compiled(tokenizer, definition))
        with self._lock:
            self._cache[definition] = inner, size
            while sum(size for _, size in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return inner

    def _cached(self, definition: str) -> LLMatcher | None:
        """Return a grammar that was compiled before, and note its use."""
        with self._lock:
            if definition not in self._cache:
                return None
            self._cache.move_to_end(definition)
            return self._cache[definition][0]

    def _library_tokenizer(self) -> LLTokenizer:
        """Return llguidance's form of the tokenizer, made on first use."""
        with self._lock:
            if self._library is None:
                from llguidance.hf import from_tokenizer  # imports transformers

                self._library = from_tokenizer(self._tokenizer, n_vocab=self._size, eos_token=sorted(self._eos))
            return self._library


class Matcher:
    """Position of an answer in its grammar: says which tokens may come next. For one thread at a time."""

    def __init__(self, inner: LLMatcher, ids: _TokenIds, tokenize: Callable[[bytes], list[int]], ended: bool = False,
                 seconds: float = BURST_SECONDS) -> None:
        """Begin where ``inner`` is.

        tokenize: returns the tokens of bytes. ended: whether end-of-sequence has been accepted. seconds: processor time
        that the grammar may take now.
        """
        self._inner, self._ids, self._tokenize, self._ended, self._seconds = inner, ids, tokenize, ended, seconds
        self._mask: np.ndarray | None = None  # of this position, once it has been asked for

    @property
    def finished(self) -> bool:
        """True when the answer is complete: nothing but end-of-sequence may follow."""
        return self._ended or (self._inner.is_stopped() and not self._inner.is_error())

    def mask(self) -> np.ndarray:
        """Return a new mask int32 [W] of the tokens that may come next. GrammarError if it cannot be computed."""
        if self._ended:
            words = np.zeros_like(self._ids.text)
        else:
            allowed = np.frombuffer(self._timed(self._inner.compute_bitmask), "<u4")
            self._check()
            words = allowed[: len(self._ids.text)] & self._ids.text
            for token in self._ids.special:  # a complement allows all of them, and then takes none
                if _has(words, token) and not self._inner.validate_tokens([token]):
                    words[token // 32] &= ~np.uint32(1 << token % 32)
        if self._ended or self._inner.is_accepting():
            for token in self._ids.eos:
                words[token // 32] |= np.uint32(1 << token % 32)
        if not words.any() and (token := self._spelled()) is not None:
            words[token // 32] |= np.uint32(1 << token % 32)
        if not words.any():
            raise GrammarError("the grammar cannot be followed further: no token of the vocabulary continues it")
        self._mask = words
        return words.view(np.int32)

    def accept(self, token: int) -> None:
        """Advance by a token of the answer. ValueError, and no change, if it is not allowed; GrammarError as `mask`."""
        if token in self._ids.eos:
            if not self._ended and not self._inner.is_accepting():
                raise ValueError(f"the grammar cannot end here: token {token} is not allowed")
            self._ended = True
            return
        self._seconds = min(self._seconds + SECONDS_PER_TOKEN, BURST_SECONDS)
        if self._ended or not _has(self._ids.text, token) or not self._timed(self._inner.try_consume_tokens, [token]):
            self._check()
            if self._mask is not None and _has(self._mask, token):  # the library says nothing where its fuel ends here
                raise GrammarError("the grammar cannot be followed further: it became too complex")
            raise ValueError(f"token {token} is not allowed by the grammar")
        self._mask = None

    def copy(self) -> Matcher:
        """Return a matcher at the same position, which advances on its own."""
        return Matcher(self._inner.deep_copy(), self._ids, self._tokenize, self._ended, self._seconds)

    def _spelled(self) -> int | None:
        """Return an ordinary token with which text begins that has to follow here; None without one.

        Where that text is also a special token's, as ``<tool_call>`` is one of Qwen2.5's, the library's mask has that
        token alone, which it then does not take.
        """
        forced = self._inner.compute_ff_bytes()
        for end in range(min(len(forced), FORCED_BYTES), 0, -1):
            tokens = self._tokenize(forced[:end])
            if len(tokens) == 1 and _has(self._ids.text, tokens[0]) and self._inner.validate_tokens(tokens):
                return tokens[0]
        return None

    def _check(self) -> None:
        if self._inner.is_error():
            raise GrammarError(f"the grammar cannot be followed further: {reason(self._inner.get_error())}")
        if self._seconds < 0:
            raise GrammarError("the grammar cannot be followed further: it takes too long for each token, as ambiguous "
                               "rules do")

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the library, and take the time from what the grammar may take."""
        began = time.thread_time()
        result = function(*arguments)
        self._seconds -= time.thread_time() - began
        return result


def _on_deep_stack(function: Callable[[], LLMatcher]) -> LLMatcher:
    """Call a function on a thread with twice the stack that its trial had; the calling thread may have less."""
    result: Future[LLMatcher] = Future()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # a panic in Rust is no Exception
            result.set_exception(error)

    thread = threading.Thread(target=work, name="qwen-jax-grammar", daemon=True)
    with _STACK_SIZE:
        before = threading.stack_size(2 * STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return result.result()


def _has(mask: np.ndarray, token: int) -> bool:
    """Return whether a mask uint32 [W] has a token."""
    return 0 <= token < 32 * len(mask) and bool(mask[token // 32] >> token % 32 & 1)


_STACK_SIZE = threading.Lock()  # of new threads: the whole process has one


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that llguidance takes for special, by id."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.startswith("<") and token.content.endswith(">"))}
