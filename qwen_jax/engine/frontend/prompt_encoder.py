"""Encoder of prompts: texts and conversations to token ids, in which only the chat template writes control tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import normalizers, pre_tokenizers

from qwen_jax.engine.frontend.control_tokens import ControlTokens
from qwen_jax.engine.frontend.token_texts import BYTES
from qwen_jax.errors import UserError

Messages = Sequence[Mapping[str, Any]]
NFC_SHRINKS = 3  # times that Unicode's normal form C makes a text's UTF-8 shorter, at most


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

    def conversation(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Return the token ids of a conversation up to where the assistant begins to answer.

        Names of control tokens in messages and tools are text. Without any, the ids are those of transformers'
        ``apply_chat_template``.

        tools: descriptions of what the model may call, as the chat template takes them.
        """
        template = self._tokenizer and self._tokenizer.chat_template
        if not template:
            raise UserError("this checkpoint has no chat template: use generate with a text or token ids")
        if tools and "tools" not in template:
            raise UserError("this checkpoint's chat template knows no tools")
        given = list(messages), list(tools) if tools else None
        text = self._render(*given)
        self._check_length(text)
        return self._checked(self._control_tokens.encode_chat(text, self._render, *given))

    def _render(self, messages: Any, tools: Any) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True,
                                                       tokenize=False)
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
            raise UserError(f"the prompt has {size} bytes, more than max_seq_len={self._max_tokens} tokens can hold: "
                            "shorten the prompt or raise max_seq_len")

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
