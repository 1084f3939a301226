"""Control tokens of a tokenizer, such as ``<|im_end|>``: in a conversation only the chat template writes them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from qwen_jax.errors import UserError

PRIVATE_USE = range(0xE000, 0xF900)  # code points
Render = Callable[[Any, Any], str]  # messages and tools to the text of the conversation


class ControlTokens:
    """Encoder of texts in which the names of control tokens are text.

    Control tokens are special tokens, and other added tokens that look like tags, such as ``<tool_call>``. Added words
    are none.

    Args:
      tokenizer: a transformers fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = sorted(tokenizer.backend_tokenizer.get_added_tokens_decoder().items())
        self._ids = {token.content: id for id, token in added if _is_control(token)}
        self._name_of = {id: name for name, id in self._ids.items()}
        self._plain = _without_control_tokens(tokenizer.backend_tokenizer, [token for _, token in added])
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._firsts = sorted({name[0] for name in self._ids})
        self._first = re.compile("|".join(map(re.escape, self._firsts)) or "(?!)")

    def encode_as_text(self, text: str) -> list[int]:
        """Return the token ids of a text without any control token."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_chat(self, text: str, render: Render, messages: Any, tools: Any) -> list[int]:
        """Return the token ids of a conversation: names of control tokens in messages and tools are text.

        Without such names the ids are those of the whole text.

        Args:
          text: the rendered conversation.
          render: renders it from ``messages`` and ``tools``, or from copies of these with other characters.
        """
        strings = list(_strings((messages, tools)))
        if any(map(self._first.search, strings)):
            mark, *substitutes = _unused_characters(strings, 1 + len(self._firsts))
            given = messages, tools
            parts = self._split_by_marks(text, render, given, mark)
            if parts is None:
                parts = self._split_by_substitutes(text, render, given, substitutes)
            foreign = any(isinstance(part, str) and self._names.search(part) for part in parts)
            if foreign or "".join(self._name_of.get(part, part) for part in parts) != text:
                return [id for part in parts for id in (
                    self.encode_as_text(part) if isinstance(part, str) else [part])]
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _split_by_marks(self, text: str, render: Render, given: Any, mark: str) -> list[str | int] | None:
        """Split a conversation at the template's own control tokens: texts and ids by turns.

        The template gets contents with a mark before each character that may begin a control token. It can read, trim,
        cut, join and escape them, and a name after a mark comes from the contents. Returns None where marks change
        more, as in a template that counts characters.
        """
        marked = render(*_changed(given, lambda string: self._first.sub(rf"{mark}\g<0>", string)))
        forms = mark, _escaped(mark)
        marks = re.compile("|".join(map(re.escape, forms)))
        if marks.sub("", marked) != text:
            return None
        own = (name for name in self._names.finditer(marked) if not marked.endswith(forms, 0, name.start()))
        return [marks.sub("", part) if isinstance(part, str) else part for part in self._split(marked, own)]

    def _split_by_substitutes(self, text: str, render: Render, given: Any, substitutes: Sequence[str]
                              ) -> list[str | int]:
        """Split a conversation as `_split_by_marks` does, for templates that count or move characters.

        The template gets contents with other characters in the place of those that may begin a control token.
        """
        by_first = dict(zip(self._firsts, substitutes, strict=True))
        restored = {form: first for first, other in by_first.items() for form in (other, _escaped(other))}
        others = re.compile("|".join(map(re.escape, restored)))
        changed = render(*_changed(given, lambda string: self._first.sub(lambda first: by_first[first[0]], string)))
        return [others.sub(lambda form: restored[form[0]], part) if isinstance(part, str) else part
                for part in self._split(changed, self._names.finditer(changed))]

    def _split(self, text: str, names: Iterable[re.Match[str]]) -> list[str | int]:
        """Return the text between names of control tokens, with the tokens' ids in the place of the names."""
        parts: list[str | int] = []
        start = 0
        for name in names:
            parts += [text[start : name.start()], self._ids[name[0]]]
            start = name.end()
        return [*parts, text[start:]]


def _is_control(token: AddedToken) -> bool:
    return token.special or (token.content.startswith("<") and token.content.endswith(">"))


def _without_control_tokens(backend: Tokenizer, added: Iterable[AddedToken]) -> Tokenizer:
    """Return a tokenizer with the vocabulary of another, which it shares, that encodes control tokens' names as text.

    added: the other's added tokens in the order of their ids, which makes the ids the same here.
    """
    plain = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(backend, part) is not None:
            setattr(plain, part, getattr(backend, part))
    plain.add_tokens([AddedToken(token.content, special=_is_control(token), normalized=token.normalized,
                                 single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip)
                      for token in added])
    plain.encode_special_tokens = True  # as text
    return plain


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings in nested mappings (also their keys) and sequences."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, Sequence):
            waiting += value


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """Return nested mappings (also their keys) and sequences with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(inner, change) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_changed(inner, change) for inner in value]
    return value


def _unused_characters(strings: Sequence[str], count: int) -> list[str]:
    """Return characters for private use that are in none of the strings, and neither are their `_escaped` forms."""
    used = set().union(*strings, *(re.findall(r"\\u[0-9a-f]{4}", string) for string in strings))
    unused = (letter for letter in map(chr, PRIVATE_USE) if letter not in used and _escaped(letter) not in used)
    found = list(itertools.islice(unused, count))
    if len(found) < count:
        raise UserError("the messages have all characters of Unicode's private use area: leave some of them out")
    return found


def _escaped(character: str) -> str:
    """Return a character's form in JSON that is ASCII only."""
    return json.dumps(character)[1:-1]
