"""One request inside the engine: its tokens, its options, its text so far."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from qwen_jax.engine.api.outputs import Delta, RequestOutput
from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.compiled.lora_rows import NO_ADAPTER
from qwen_jax.engine.compiled.sampler import Sampled
from qwen_jax.engine.frontend.detokenizer import Detokenizer
from qwen_jax.engine.frontend.grammar import GrammarError, Matcher
from qwen_jax.engine.scheduling.sequence import Sequence


class Request:
    """Joins a scheduler's ``Sequence`` to what the caller sees of it.

    Args:
      sequence: its tokens and pages; ``sequence.params`` are the resolved sampling options.
      eos_ids: ids that end an answer, unless ``ignore_eos``.
      score_from: first prompt position whose log-probability is wanted; None for none.
      adapter_name: the LoRA adapter it runs with; None for none.
      matcher: at the beginning of the grammar that the answer has to follow; None for none.
      pooling: what embedding of the prompt is wanted: "mean" of the final hidden states, "last" one, or None.
    """

    def __init__(self, sequence: Sequence, tokenizer: Any, eos_ids: tuple[int, ...], index: int,
                 score_from: int | None, adapter_name: str | None = None, matcher: Matcher | None = None,
                 pooling: str | None = None) -> None:
        params: SamplingParams = sequence.params
        self.sequence = sequence
        self.params = params
        self.output = RequestOutput(prompt_token_ids=sequence.prompt, index=index)
        self.score_from, self.pooling = score_from, pooling
        self.adapter_name = adapter_name
        self.adapter = NO_ADAPTER  # its slot, while the engine has the request
        self.deltas: deque[Delta] = deque()  # not yet streamed
        self.closed = False  # the output is complete
        self.streams = False  # somebody reads `deltas` before the end
        self._tokenizer, self._grammar = tokenizer, matcher
        self._stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))
        self.banned = tuple(self._stop_ids)  # before min_tokens
        self.forget()

    def forget(self) -> None:
        """Begin again, as if nothing had been generated."""
        self.output.token_ids = []
        self.output.logprobs = None if self.params.logprobs is None else []
        self.output.prompt_logprobs = None if self.score_from is None else [None] * len(self.sequence.prompt)
        self.deltas.clear()
        self._attended = self._everything = 0  # pages, of sparse attention
        self._text = Detokenizer(self._tokenizer, self.params.stop)
        self._matcher = self._grammar and self._grammar.copy()
        self.allowed = self._matcher and self._matcher.mask()  # of the next token; None for anything

    def follow_grammar(self, tokens: list[int]) -> str | None:
        """Take tokens of the answer. Returns why it ends here, as a finish reason, or None."""
        if self._matcher is None:
            return None
        try:
            for token in tokens:
                self._matcher.accept(token)
            self.allowed = self._matcher.mask()
        except (GrammarError, ValueError) as error:
            self.output.error = f"{type(error).__name__}: {error}"
            return "error"
        return "stop" if self._matcher.finished else None

    @property
    def begun(self) -> bool:
        """Whether a step has computed any of it."""
        return self.sequence.schedule is not None

    @property
    def stops_at_text(self) -> bool:
        """Whether the text of each step decides if the answer goes on."""
        return bool(self.params.stop) and self._tokenizer is not None

    @property
    def banned_now(self) -> tuple[int, ...]:
        """Ids that may not be drawn for the next token."""
        return self.banned if len(self.sequence.output) < self.params.min_tokens else ()

    def target_at(self, position: int) -> int:
        """The prompt token after ``position`` when its log-probability is wanted, else -1."""
        after = position + 1
        wanted = self.score_from is not None and self.score_from <= after < len(self.sequence.prompt)
        return self.sequence.prompt[after] if wanted else -1

    def ends_at(self, tokens: list[int]) -> int | None:
        """How many of these new tokens there are up to the first that ends the answer; None when none does."""
        return next((place for place, token in enumerate(tokens, 1) if token in self._stop_ids), None)

    def add_tokens(self, tokens: list[int], sampled: Sampled, row: int) -> bool:
        """Take the tokens that this row of a step sampled, up to the one with which a stop string appears. Returns
        whether one did. What is new goes to ``deltas``."""
        text, taken = "", 0
        for token in tokens:
            if self.params.logprobs is not None:
                _, logprobs, top_ids, top_logprobs = (array[row, taken] for array in sampled)
                self.output.logprobs.append(_top(token, logprobs, top_ids, top_logprobs, self.params.logprobs))
            taken += 1
            text += self._text.add(token)
            if self._text.stopped:
                break
        self.output.token_ids += tokens[:taken]
        self.deltas.append(Delta(text, tokens[:taken]))
        return self._text.stopped

    def add_prompt_scores(self, start: int, logprobs, top_ids, top_logprobs) -> None:
        """Take a prefill chunk's log-probabilities (``[T]``, ``[T, 20]``), whose first position is ``start``."""
        for offset in range(len(logprobs)):
            token = self.target_at(start + offset)
            if token >= 0:
                scores = _top(token, logprobs[offset], top_ids[offset], top_logprobs[offset],
                              self.params.prompt_logprobs or 0)
                self.output.prompt_logprobs[start + offset + 1] = scores

    def add_pooled(self, start: int, count: int, pooled: np.ndarray) -> None:
        """Take a prefill chunk's hidden states (``StepOutput.pooled``, of one row). Chunks come in order; where
        they begin again, so does the embedding."""
        if self.pooling == "last":
            self.output.embedding = np.array(pooled[1])
            return
        before = 0.0 if start == 0 else self.output.embedding * start
        self.output.embedding = (before + pooled[0]) / np.float32(start + count)

    def add_pages(self, attended: int, everything: int) -> None:
        """Take a step's count of pages attended to, and of those that full attention would have."""
        self._attended += attended
        self._everything += everything

    def close(self) -> Delta:
        """The last piece of text; fills in the output."""
        out = self.output
        self.closed = True
        rest = "" if out.error else self._text.finish()
        out.text, out.finish_reason, out.schedule = self._text.text, self.sequence.finish_reason, self.sequence.schedule
        out.weight_version = self.sequence.version
        out.density = self._attended / self._everything if self._everything else 1.0
        if self._text.stopped and out.finish_reason == "length":
            out.finish_reason = "stop"  # the stop string was completed by the held-back end of the text
        return Delta(rest, [], out.finish_reason)


def _top(token: int, logprob, top_ids, top_logprobs, count: int) -> dict[int, float]:
    """{id: log-probability} of the ``count`` most likely ids and of ``token``."""
    found = {int(i): float(p) for i, p in zip(top_ids[:count], top_logprobs[:count], strict=True) if i >= 0}
    return {token: float(logprob)} | found
