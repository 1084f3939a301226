"""From what a caller gives to requests: tokenised, checked, with every option resolved."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2
import numpy as np

from qwen_jax.config import GenerationDefaults
from qwen_jax.engine.api.sampling_params import MAX_LOGPROBS, SamplingParams
from qwen_jax.engine.frontend.grammar import GrammarCompiler
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.sequence import Sequence as TokenSequence
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.errors import UserError

POOLINGS = "mean", "last"
EMBEDDING = SamplingParams(max_tokens=1, temperature=0.0)  # the token that the step samples is nobody's
FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0, logprobs=MAX_LOGPROBS)  # nor here: how likely others are is
Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]


class InputProcessor:
    """Reads the engine and changes nothing in it, so it may run on other threads than the steps.

    Args:
      vocab_limit: how many token ids exist; vocab_size: how many the model has logits for.
      scheduler, adapters: asked whether a request could run at all.
    """

    def __init__(self, tokenizer: Any, defaults: GenerationDefaults, vocab_limit: int, vocab_size: int,
                 scheduler: Scheduler, adapters: AdapterTable) -> None:
        self._tokenizer, self._defaults, self.vocab_limit = tokenizer, defaults, vocab_limit
        self.scheduler, self._adapters = scheduler, adapters
        self._grammars = GrammarCompiler(tokenizer, vocab_size, defaults.eos_token_ids)
        self._ids = itertools.count()

    @property
    def max_seq_len(self) -> int:
        return self.scheduler.limits.max_seq_len

    def tokens(self, prompt: Prompt | Messages) -> list[int]:
        """Token ids of a text, of a conversation up to where the assistant begins to answer, or of token ids."""
        if not isinstance(prompt, str):
            if len(prompt) and isinstance(prompt[0], Mapping):
                return self.conversation(prompt)
            return check_token_ids(prompt, self.vocab_limit)
        if self._tokenizer is None:
            raise UserError("this engine has no tokenizer: give token ids, or a checkpoint with tokenizer.json")
        return self._tokenizer.encode(prompt, add_special_tokens=False)

    def conversation(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation up to where the assistant begins to answer.

        tools: descriptions of what the model may call, as the chat template wants them.
        """
        template = self._tokenizer and self._tokenizer.chat_template
        if not template:
            raise UserError("this checkpoint has no chat template: use generate with a text or token ids")
        if tools and "tools" not in template:
            raise UserError("this checkpoint's chat template knows no tools")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tools=list(tools) if tools else None,
                                                       add_generation_prompt=True, tokenize=False)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error
        return self.tokens(text)

    def requests(self, prompt: Prompt | Messages, params: SamplingParams, score_from: int | None = None,
                 adapter: str | None = None, priority: int = 0, deadline: float | None = None,
                 pooling: str | None = None) -> list[Request]:
        """``params.n`` requests, not yet submitted. UserError for what could not run.

        score_from: the first prompt position whose log-probability is wanted. priority: the lowest runs first.
        deadline: in seconds of ``time.monotonic``. pooling: of the embedding that is wanted, `POOLINGS`; None for none.
        """
        if pooling not in (None, *POOLINGS):
            raise UserError(f"unknown pooling {pooling!r}: use {' or '.join(POOLINGS)}")
        tokens = self.tokens(prompt)
        self._adapters.check(adapter)
        params = params.resolved(self._defaults).check(self.vocab_limit)
        if params.prompt_logprobs is not None and score_from is None:
            score_from = 1
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(32))
        matcher = params.structured_output and self._grammars.matcher(params.structured_output)
        requests = []
        for index in range(params.n):
            own = replace(params, seed=(params.seed + index) % 2**64) if index else params
            sequence = TokenSequence(next(self._ids), tokens, own.max_tokens, own, priority, deadline)
            sequence.min_new_tokens = own.min_tokens
            if matcher:
                sequence.burst = 1  # the host has to see each token
            self.scheduler.check(sequence)
            requests.append(Request(sequence, self._tokenizer, self._defaults.eos_token_ids, index, score_from,
                                    adapter, matcher, pooling))
        return requests


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt, and not several."""
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, int | np.integer) for p in prompts))


def check_token_ids(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """``tokens`` as a list of int; UserError for what is not a token id."""
    checked = []
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise UserError(f"a prompt is a text or a list of token ids; it contains {token!r}")
        if not 0 <= token < vocab_size:
            raise UserError(f"token id {token} is not in the vocabulary (0..{vocab_size - 1})")
        checked.append(int(token))
    return checked
