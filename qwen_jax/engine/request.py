"""One request inside the engine: its tokens, its options, its text so far."""

from __future__ import annotations

from collections import deque
from typing import Any

from qwen_jax.engine.adapters import NO_ADAPTER
from qwen_jax.engine.detokenize import Detokenizer
from qwen_jax.engine.outputs import Delta, RequestOutput
from qwen_jax.engine.sampling_params import SamplingParams
from qwen_jax.engine.sequence import Sequence


class Request:
    """Joins a scheduler's ``Sequence`` to what the caller sees of it.

    Args:
      sequence: its tokens and pages; ``sequence.params`` are the resolved sampling options.
      eos_ids: ids that end an answer, unless ``ignore_eos``.
      score_from: first prompt position whose log-probability is wanted; None for none.
      adapter_name: the LoRA adapter it runs with; None for none.
    """

    def __init__(self, sequence: Sequence, tokenizer: Any, eos_ids: tuple[int, ...], index: int,
                 score_from: int | None, adapter_name: str | None = None) -> None:
        params: SamplingParams = sequence.params
        self.sequence = sequence
        self.params = params
        self.output = RequestOutput(prompt_token_ids=sequence.prompt, index=index)
        self.score_from = score_from
        self.adapter_name = adapter_name
        self.adapter = NO_ADAPTER  # its slot, while the engine has the request
        self.deltas: deque[Delta] = deque()  # not yet streamed
        self._text = Detokenizer(tokenizer, params.stop)
        self._stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))
        self.banned = tuple(self._stop_ids)  # before min_tokens
        if params.logprobs is not None:
            self.output.logprobs = []
        if score_from is not None:
            self.output.prompt_logprobs = [None] * len(sequence.prompt)

    @property
    def banned_now(self) -> tuple[int, ...]:
        """Ids that may not be drawn for the next token."""
        return self.banned if len(self.sequence.output) < self.params.min_tokens else ()

    def target_at(self, position: int) -> int:
        """The prompt token after ``position`` when its log-probability is wanted, else -1."""
        after = position + 1
        wanted = self.score_from is not None and self.score_from <= after < len(self.sequence.prompt)
        return self.sequence.prompt[after] if wanted else -1

    def add_token(self, token: int, logprob: float, top_ids, top_logprobs) -> tuple[str, bool]:
        """Take a sampled token. Returns the new text and whether the answer ends here."""
        self.output.token_ids.append(token)
        if self.params.logprobs is not None:
            self.output.logprobs.append(_top(token, logprob, top_ids, top_logprobs, self.params.logprobs))
        text = self._text.add(token)
        return text, self._text.stopped or token in self._stop_ids

    def add_prompt_scores(self, start: int, logprobs, top_ids, top_logprobs) -> None:
        """Take a prefill chunk's log-probabilities (``[T]``, ``[T, 20]``), whose first position is ``start``."""
        for offset in range(len(logprobs)):
            token = self.target_at(start + offset)
            if token >= 0:
                scores = _top(token, logprobs[offset], top_ids[offset], top_logprobs[offset],
                              self.params.prompt_logprobs or 0)
                self.output.prompt_logprobs[start + offset + 1] = scores

    def close(self, weight_version: int, note: str) -> Delta:
        """The last piece of text; fills in the output."""
        out = self.output
        rest = "" if out.error else self._text.finish()
        out.text, out.finish_reason, out.schedule = self._text.text, self.sequence.finish_reason, self.sequence.schedule
        out.schedule_note, out.weight_version = note, weight_version
        if self._text.stopped and out.finish_reason == "length":
            out.finish_reason = "stop"  # the stop string was completed by the held-back end of the text
        return Delta(rest, [], out.finish_reason)


def _top(token: int, logprob, top_ids, top_logprobs, count: int) -> dict[int, float]:
    """{id: log-probability} of the ``count`` most likely ids and of ``token``."""
    found = {int(i): float(p) for i, p in zip(top_ids[:count], top_logprobs[:count], strict=True) if i >= 0}
    return {token: float(logprob)} | found
