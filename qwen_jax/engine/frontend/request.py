"""A request inside the engine: its tokens, its options, its text so far."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from qwen_jax.engine.api.outputs import Delta, RequestOutput
from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.compiled.lora_rows import NO_ADAPTER
from qwen_jax.engine.compiled.sampler import Sampled
from qwen_jax.engine.frontend.detokenizer import Detokenizer, TokenTexts
from qwen_jax.engine.frontend.grammar import GrammarError, Matcher
from qwen_jax.engine.scheduling.sequence import Sequence
from qwen_jax.errors import UserError


class Request:
    """A request inside the engine: its scheduler `Sequence`, its options and the answer that the caller gets.

    Args:
      sequence: tokens and pages; ``sequence.params`` are the resolved sampling options.
      texts: texts of the tokenizer's tokens, of which the answer's text is made; None without a tokenizer.
      eos_ids: ids that end an answer, unless ``ignore_eos``.
      index: number of this answer among the ``n`` to its prompt.
      score_from: first prompt position whose log-probability is wanted; None for none.
      adapter_name: name of the LoRA adapter; None for none.
      matcher: grammar that the answer has to follow, at its beginning; None for none.
      pooling: embedding of the prompt that is wanted: "mean" of the final hidden states, "last" of them, or None.
      streams: whether the deltas are read before the end.
      ends: ids that end an answer beside ``params.stop_token_ids``.

    Attributes:
      output: what the caller gets; complete when the request is closed.
      deltas: pieces of the answer that have not been read.
      closed: whether the output is complete.
      adapter_slot: place of the adapter in `Adapters`, while the engine has the request.
      allowed: mask of the tokens that may come next, as `Matcher.mask` makes it; None allows all.
    """

    def __init__(self, sequence: Sequence, texts: TokenTexts | None, eos_ids: tuple[int, ...], *, index: int = 0,
                 score_from: int | None = None, adapter_name: str | None = None, matcher: Matcher | None = None,
                 pooling: str | None = None, streams: bool = False, ends: tuple[int, ...] = ()) -> None:
        params: SamplingParams = sequence.params
        self.sequence, self.params = sequence, params
        self.output = RequestOutput(prompt_token_ids=sequence.prompt, index=index)
        self.score_from, self.pooling, self.adapter_name = score_from, pooling, adapter_name
        self.adapter_slot = NO_ADAPTER
        self.deltas: deque[Delta] = deque()
        self.closed, self.streams = False, streams
        self._texts, self._grammar = texts, matcher
        self._stop_ids = frozenset((*params.stop_token_ids, *ends, *(() if params.ignore_eos else eos_ids)))
        self._stop_id_list = tuple(self._stop_ids)
        self.forget()

    def forget(self) -> None:
        """Drop the answer so far, as if nothing had been generated."""
        self.output.token_ids = []
        self.output.logprobs = None if self.params.logprobs is None else []
        self.output.prompt_logprobs = None if self.score_from is None else [None] * len(self.sequence.prompt)
        self.deltas.clear()
        self._attended_pages = self._visible_pages = 0  # in steps of sparse attention
        self._text = Detokenizer(self._texts, self.params.stop)
        self._matcher = self._grammar and self._grammar.copy()
        self.allowed = self._matcher and self._matcher.mask()

    # --- before a step

    @property
    def begun(self) -> bool:
        """True once a step has computed any of the request's tokens."""
        return self.sequence.schedule is not None

    @property
    def stops_at_text(self) -> bool:
        """True when the text of each step decides if the answer goes on, because there are stop strings."""
        return bool(self.params.stop) and self._texts is not None

    @property
    def banned_now(self) -> tuple[int, ...]:
        """Token ids that may not be sampled next: those that end an answer, until it has ``min_tokens``."""
        return self._stop_id_list if len(self.sequence.output) < self.params.min_tokens else ()

    def check_grammar(self) -> None:
        """Raise an error if the grammar allows none of the tokens that may be sampled next.

        It is a UserError where ``min_tokens`` is the reason, else a GrammarError.
        """
        if self.allowed is None:
            return
        if not self.allowed.any():
            raise GrammarError("the grammar cannot be followed further: no token of the vocabulary continues it")
        free = self.allowed.view(np.uint32).copy()
        for token in self.banned_now:
            if token // 32 < len(free):
                free[token // 32] &= ~np.uint32(1 << token % 32)
        if not free.any():
            raise UserError("the structured output allows nothing here but tokens that end an answer, before it has "
                            f"min_tokens={self.params.min_tokens}: lower min_tokens, or leave them out of "
                            "stop_token_ids")

    def target_at(self, position: int) -> int:
        """Return the prompt token after ``position`` when its log-probability is wanted, else -1."""
        after = position + 1
        wanted = self.score_from is not None and self.score_from <= after < len(self.sequence.prompt)
        return self.sequence.prompt[after] if wanted else -1

    # --- after a step

    def up_to_end(self, tokens: list[int]) -> list[int]:
        """Return new tokens up to and including the first that ends the answer (end-of-sequence or a stop id)."""
        ends = (count for count, token in enumerate(tokens, 1) if token in self._stop_ids)
        return tokens[: next(ends, len(tokens))]

    def end_after(self, tokens: list[int]) -> str | None:
        """Return the finish reason if the answer ends with these new tokens, else None; advances the grammar."""
        return "stop" if tokens[-1] in self._stop_ids else self._follow_grammar(tokens)

    def add_tokens(self, tokens: list[int], sampled: Sampled, row: int, now: float) -> bool:
        """Add new tokens to the answer, up to one that completes a stop string, and a delta with their text.

        sampled, row: their log-probabilities. now: time of the step's end. Returns whether a stop string was completed.
        """
        times = self.output.times
        times.first_token, times.last_token = times.first_token or now, now
        text, taken = "", 0
        for token in tokens:
            if self.params.logprobs is not None:
                _, logprobs, top_ids, top_logprobs = (array[row, taken] for array in sampled)
                self.output.logprobs.append(_by_id(token, logprobs, top_ids, top_logprobs, self.params.logprobs))
            taken += 1
            text += self._text.add(token, len(self.output.token_ids) + taken >= self.params.min_tokens)
            if self._text.stopped:
                break
        self.output.token_ids += tokens[:taken]
        self.deltas.append(Delta(text, tokens[:taken]))
        return self._text.stopped

    def add_prompt_scores(self, start: int, logprobs, top_ids, top_logprobs) -> None:
        """Add a prefill chunk's log-probabilities, ``[T]`` and ``[T, 20]``, to the output. start: first position."""
        for offset in range(len(logprobs)):
            token = self.target_at(start + offset)
            if token >= 0:
                scores = _by_id(token, logprobs[offset], top_ids[offset], top_logprobs[offset],
                                self.params.prompt_logprobs or 0)
                self.output.prompt_logprobs[start + offset + 1] = scores

    def add_pooled(self, start: int, count: int, pooled: np.ndarray) -> None:
        """Add a prefill chunk's hidden states (``StepOutput.pooled`` of its row) to the embedding.

        Chunks come in order. When a prefill begins again at position 0, so does the embedding.
        """
        if self.pooling == "last":
            self.output.embedding = np.array(pooled[1])
            return
        before = 0.0 if start == 0 else self.output.embedding * start
        self.output.embedding = (before + pooled[0]) / np.float32(start + count)

    def add_pages(self, attended: int, visible: int) -> None:
        """Count the pages that a step attended to, and those that full attention would have attended to."""
        self._attended_pages += attended
        self._visible_pages += visible

    def close(self) -> Delta:
        """Complete the output of a request that has ended; return the last part of its answer."""
        out = self.output
        self.closed = True
        rest = "" if out.error else self._text.finish()
        out.text, out.finish_reason, out.schedule = self._text.text, self.sequence.finish_reason, self.sequence.schedule
        out.weight_version, out.stop = self.sequence.version, self._text.stopped_by
        out.density = self._attended_pages / self._visible_pages if self._visible_pages else 1.0
        if self._text.stopped and out.finish_reason == "length":
            out.finish_reason = "stop"  # the stop string was completed by the held-back end of the text
        out.times.ended = time.monotonic()
        return Delta(rest, [], out.finish_reason)

    def _follow_grammar(self, tokens: list[int]) -> str | None:
        """Advance the grammar by tokens. Return "stop" if only the end may follow, "error" if it forbids them."""
        if self._matcher is None:
            return None
        try:
            for token in tokens:
                self._matcher.accept(token)
            self.allowed = self._matcher.mask()
            if self._matcher.finished:
                return "stop"
            self.check_grammar()
        except (GrammarError, ValueError) as error:
            self.output.refused = isinstance(error, GrammarError | UserError)
            self.output.error = str(error) if self.output.refused else f"{type(error).__name__}: {error}"
            return "error"
        return None


def _by_id(token: int, logprob, top_ids, top_logprobs, count: int) -> dict[int, float]:
    """Return {id: log-probability} of ``token`` and of the ``count`` most likely ids."""
    top = {int(i): float(p) for i, p in zip(top_ids[:count], top_logprobs[:count], strict=True) if i >= 0}
    return {token: float(logprob)} | top
