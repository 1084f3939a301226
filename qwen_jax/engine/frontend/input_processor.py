"""Input processing: makes requests of what callers give, tokenised and checked, with every option resolved."""

from __future__ import annotations

import itertools
import secrets
from collections import abc
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import jinja2
import numpy as np
from tokenizers import normalizers, pre_tokenizers

from qwen_jax.config import GenerationDefaults
from qwen_jax.engine.api.sampling_params import MAX_LOGPROBS, SamplingParams
from qwen_jax.engine.compiled.sampler import MAX_BIAS
from qwen_jax.engine.frontend.control_tokens import ControlTokens
from qwen_jax.engine.frontend.detokenizer import BYTES, TokenTexts
from qwen_jax.engine.frontend.grammar import GrammarCompiler, GrammarError
from qwen_jax.engine.frontend.request import Request
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.sequence import Sequence
from qwen_jax.engine.weights.lora_table import AdapterTable
from qwen_jax.errors import PromptTooLong, UserError

POOLINGS = "mean", "last"
# An embedding, a score and a classification need no answer. A step samples a token all the same, which is discarded.
EMBEDDING_PARAMS = SamplingParams(max_tokens=1, temperature=0.0)
SCORING_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
CLASSIFICATION_PARAMS = SamplingParams(max_tokens=1, temperature=0.0, logprobs=MAX_LOGPROBS)
Messages = abc.Sequence[abc.Mapping[str, Any]]
Prompt = str | abc.Sequence[int]
# Tokens before a text, before what follows it and before what is between, and those that end the latter.
FILL_IN = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
FILL_IN_ENDS = *FILL_IN, "<|fim_pad|>", "<|endoftext|>", "<|repo_name|>", "<|file_sep|>"
NFC_SHRINKS = 3  # times that Unicode's normal form C makes a text's UTF-8 shorter, at most


class InputProcessor:
    """Converter of prompts and options to tokenised, checked requests. Any thread may call it: the engine is unchanged.

    Args:
      tokenizer: a transformers fast tokenizer, or None: then prompts are token ids.
      defaults: sampling options and end-of-sequence ids of the checkpoint.
      vocab_limit: number of token ids that exist.
      vocab_size: number of token ids that the model has logits for.
      scheduler: checks whether a request fits into the engine.
      adapters: checks whether a request's adapter is loaded.

    Attributes:
      token_texts: texts of the tokenizer's tokens; None without a tokenizer.
    """

    def __init__(self, tokenizer: Any, defaults: GenerationDefaults, vocab_limit: int, vocab_size: int,
                 scheduler: Scheduler, adapters: AdapterTable) -> None:
        self._defaults, self.vocab_limit = defaults, vocab_limit
        self.scheduler, self._adapters = scheduler, adapters
        self.token_texts = tokenizer and TokenTexts(tokenizer)
        self._encoder = PromptEncoder(tokenizer, vocab_size, self.max_seq_len)
        self._grammars = GrammarCompiler(tokenizer, vocab_size, defaults.eos_token_ids)
        self._ids = itertools.count()

    @property
    def max_seq_len(self) -> int:
        """Maximum number of tokens of a prompt and its answer."""
        return self.scheduler.limits.max_seq_len

    def tokens(self, prompt: Prompt | Messages, allow_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a prompt: a text, a conversation (see `conversation`), or ids, which are checked.

        Without ``allow_special_tokens``, names of control tokens in a text are encoded as text.
        """
        if isinstance(prompt, str):
            return self._encoder.text(prompt, allow_special_tokens)
        if len(prompt) and isinstance(prompt[0], abc.Mapping):
            return self.conversation(prompt)
        self.scheduler.check_length(len(prompt), answered=False)
        return check_token_ids(prompt, self.vocab_limit)

    def conversation(self, messages: Messages, tools: abc.Sequence[abc.Mapping[str, Any]] | None = None,
                     continues: bool = False) -> list[int]:
        """Return the token ids of a conversation up to where the assistant begins to answer.

        Names of control tokens in messages and tools are encoded as text.

        Args:
          tools: descriptions of what the model may call, as the chat template takes them.
          continues: whether the answer goes on with the last message, in place of a new one.
        """
        return self._encoder.conversation(messages, tools, continues)

    def text_of(self, tokens: abc.Sequence[int]) -> str:
        """Return the text of token ids, control tokens by their names; "" without a tokenizer."""
        texts = self.token_texts
        return b"".join([texts.bytes_of(token) for token in tokens]).decode(errors="replace") if texts else ""

    def fill_in_the_middle(self, prompt: str, suffix: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt for the text between ``prompt`` and ``suffix``, and ids that end this text.

        Names of control tokens in both are text. Raises UserError for a model whose tokenizer has no tokens for it.
        """
        return self._encoder.fill_in_the_middle(prompt, suffix)

    def requests(self, prompt: Prompt | Messages, params: SamplingParams, score_from: int | None = None,
                 adapter: str | None = None, priority: int = 0, deadline: float | None = None,
                 pooling: str | None = None, streams: bool = False, cache_salt: str = "",
                 ends: abc.Sequence[int] = ()) -> list[Request]:
        """Make ``params.n`` requests for a prompt, not yet submitted. UserError for requests that could not run.

        Args:
          score_from: first prompt position whose log-probability is wanted; by default 1 with ``prompt_logprobs``.
          adapter: name of the LoRA adapter, if any.
          priority: requests with a lower number run first.
          deadline: time at which the request is aborted, in seconds of ``time.monotonic``.
          pooling: kind of embedding that is wanted (`POOLINGS`); None for none.
          streams: whether the answers are read piece by piece.
          cache_salt: only requests with the same text share pages of the prefix cache.
          ends: ids that end an answer beside those of ``params``.
        """
        if pooling not in (None, *POOLINGS):
            raise UserError(f"pooling must be {' or '.join(POOLINGS)}, not {pooling!r}")
        tokens = self.tokens(prompt)
        if adapter is not None:
            self._adapters.check(adapter)
        params = params.resolved(self._defaults).check(self.vocab_limit)
        ends = (*ends, *self._named_by(params.stop))
        banned = len(params.logit_bias) + len(params.stop_token_ids) + len(ends)
        if params.min_tokens and banned > MAX_BIAS:
            raise UserError(f"logit_bias and tokens that end an answer are {banned}, and with min_tokens at most "
                            f"{MAX_BIAS} fit: leave some of them out")
        if params.prompt_logprobs is not None and score_from is None:
            score_from = 1
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(32))
        matcher = params.structured_output and self._grammars.matcher(params.structured_output)
        reusable = None if score_from is None else score_from - 1  # logits are needed from the position before
        if pooling == "mean":  # hidden states of all tokens are needed
            reusable = 0
        requests = []
        for index in range(params.n):
            own = replace(params, seed=(params.seed + index) % 2**64) if index else params
            sequence = Sequence(next(self._ids), tokens, own.max_tokens, params=own, priority=priority,
                                deadline=deadline, min_new_tokens=own.min_tokens, reusable=reusable,
                                cache_salt=cache_salt, answered=pooling is None)
            if matcher:
                sequence.burst = 1  # the host has to see each token
            self.scheduler.check(sequence)
            requests.append(Request(sequence, self.token_texts, self._defaults.eos_token_ids, index=index, ends=ends,
                                    score_from=score_from, adapter_name=adapter, matcher=matcher, pooling=pooling,
                                    streams=streams))
            try:
                requests[-1].check_grammar()
            except GrammarError as error:
                raise UserError(str(error)) from error
        return requests

    def _named_by(self, stops: abc.Sequence[str]) -> list[int]:
        """Return the special tokens that stop strings name: no text, so a search in the text would not find them."""
        texts = self.token_texts
        return [token for stop in stops if texts and (token := texts.special_token(stop)) is not None]

    def score_requests(self, prompt: Prompt | Messages, continuation: Prompt, adapter: str | None = None,
                       **options: Any) -> list[Request]:
        """Make the request that computes a continuation's log-probabilities after its prompt; options of `requests`.

        The two are encoded apart and must fit into ``max_seq_len`` - 1 tokens together.
        """
        prompt, continuation = self.tokens(prompt), self.tokens(continuation)
        if not prompt or not continuation:
            raise UserError("a score needs at least one token of prompt and one of continuation")
        return self.requests([*prompt, *continuation], SCORING_PARAMS, len(prompt), adapter, **options)


class PromptEncoder:
    """Encoder of texts and conversations to token ids. Several threads may use it.

    Args:
      tokenizer: a transformers fast tokenizer, or None: then every prompt is refused.
      vocab_size: number of rows of the model's embedding.
      max_tokens: maximum length of a prompt. Texts that must be longer are refused before they are tokenised.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, max_tokens: int) -> None:
        self._tokenizer, self._vocab_size, self._max_tokens = tokenizer, vocab_size, max_tokens

    def text(self, text: str, allow_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text. With ``allow_special_tokens``, names of control tokens in it become these."""
        if self._tokenizer is None:
            raise UserError("this engine has no tokenizer: give token ids, or a checkpoint with tokenizer.json")
        self._check_length(text)
        return self._checked(self._tokenizer.encode(text, add_special_tokens=False) if allow_special_tokens
                             else self._control_tokens.encode_as_text(text))

    def fill_in_the_middle(self, prompt: str, suffix: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt for the text between ``prompt`` and ``suffix``, and ids that end this text.

        The form is that of Qwen2.5-Coder (https://arxiv.org/abs/2409.12186).
        """
        ids = self._fill_in_ids
        if not ids.keys() >= set(FILL_IN):
            raise UserError(f"this model does not fill in text before a suffix: its tokenizer has no {FILL_IN[0]}")
        before, after = (self.text(text, allow_special_tokens=False) if text else [] for text in (prompt, suffix))
        prefix, end, middle = (ids[name] for name in FILL_IN)
        return [prefix, *before, end, *after, middle], list(ids.values())

    @cached_property
    def _fill_in_ids(self) -> dict[str, int]:
        """Ids of the tokens for text before a suffix, and of those that end it, as far as the tokenizer has them."""
        backend = self._tokenizer and self._tokenizer.backend_tokenizer
        found = {name: backend.token_to_id(name) for name in FILL_IN_ENDS} if backend else {}
        return {name: token for name, token in found.items() if token is not None}

    def conversation(self, messages: Messages, tools: abc.Sequence[abc.Mapping[str, Any]] | None = None,
                     continues: bool = False) -> list[int]:
        """Return the token ids of a conversation up to where the assistant begins to answer.

        Names of control tokens in messages and tools are text. Without any, the ids are those of transformers'
        ``apply_chat_template``.

        Args:
          tools: descriptions of what the model may call, as the chat template takes them.
          continues: whether the answer goes on with the last message, in place of a new one.
        """
        template = self._tokenizer and self._tokenizer.chat_template
        if not template:
            raise UserError("this checkpoint has no chat template: use generate with a text or token ids")
        if tools and "tools" not in template:
            raise UserError("this checkpoint's chat template knows no tools")
        given = list(messages), list(tools) if tools else None
        render = partial(self._render, continues)
        text = render(*given)
        self._check_length(text)
        return self._checked(self._control_tokens.encode_chat(text, render, *given))

    def _render(self, continues: bool, messages: Any, tools: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=not continues,
                                                       continue_final_message=continues, tokenize=False)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        return ControlTokens(self._tokenizer)

    # --- limits

    def _checked(self, ids: list[int]) -> list[int]:
        """Return token ids, which must be in the model's vocabulary: a tokenizer may have more."""
        if (largest := max(ids, default=0)) >= self._vocab_size:
            raise UserError(f"the prompt has the token {self._tokenizer.decode([largest])!r} with the id {largest}, "
                            f"which is not in the model's vocabulary (0..{self._vocab_size - 1}): the tokenizer has "
                            "more tokens than the model has embeddings")
        return ids

    def _check_length(self, text: str) -> None:
        """Raise UserError for a text of more bytes than the maximum number of tokens can stand for."""
        if len(text) <= self._max_tokens or not self._longest_token:
            return
        size = len(text.encode("utf-8", "replace"))
        if size > self._max_tokens * self._longest_token:
            raise PromptTooLong(f"the prompt has {size} bytes, more than max_seq_len={self._max_tokens} tokens can "
                                "hold: shorten the prompt or raise max_seq_len")

    @cached_property
    def _longest_token(self) -> int:
        """Bytes of text that one token stands for, at most; 0 where no such bound is known.

        It is known for byte-level tokenizers, each of whose tokens stands for its own bytes and which leave none out.
        """
        backend = self._tokenizer.backend_tokenizer
        vocabulary = backend.get_vocab(with_added_tokens=False)
        added = backend.get_added_tokens_decoder().values()
        splits = backend.pre_tokenizer
        splits = list(splits) if isinstance(splits, pre_tokenizers.Sequence) else [splits]
        keeps_text = all(isinstance(split, pre_tokenizers.ByteLevel) or (
            isinstance(split, pre_tokenizers.Split) and split.behavior.lower() != "removed") for split in splits)
        strips = any(token.lstrip or token.rstrip for token in added)
        if (strips or not keeps_text or not isinstance(splits[-1], pre_tokenizers.ByteLevel)
                or not vocabulary.keys() >= BYTES.keys()
                or not isinstance(backend.normalizer, normalizers.NFC | None)):
            return 0
        longest = max(max(map(len, vocabulary)), *(len(token.content.encode()) for token in added), 1)
        return longest * (NFC_SHRINKS if backend.normalizer else 1)


def is_single(prompts: Any) -> bool:
    """Return True for a prompt, and False for a list of prompts."""
    return isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, int | np.integer) for p in prompts))


def check_token_ids(tokens: abc.Sequence[int], vocab_size: int) -> list[int]:
    """Return token ids as a list of int. UserError for values that are no ids below ``vocab_size``."""
    checked = []
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise UserError(f"a prompt is a text or a list of token ids; it contains {token!r}")
        if not 0 <= token < vocab_size:
            raise UserError(f"token id {token} is not in the vocabulary (0..{vocab_size - 1})")
        checked.append(int(token))
    return checked
