"""JSONL files of conversations or texts to packed batches, in an order that depends on the seed alone.

A line is ``{"messages": [{"role": ..., "content": ...}, ...]}`` or ``{"text": ...}``. A conversation goes through the
checkpoint's chat template, and only what the assistant says is learned; a text is learned whole.
"""
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwen_jax.errors import UserError
from qwen_jax.training.batch import Batch, empty

ROLES = ("system", "user", "assistant", "tool")
REFUSE, SKIP = "refuse", "skip"


class Encoded(NamedTuple):
    """One example. ``learned[t]``: whether tokens[t] is to be predicted."""
    tokens: np.ndarray   # [n] int32
    learned: np.ndarray  # [n] bool


def read_examples(paths: Iterable[str | Path], tokenizer: Any, length: int, on_bad: str = REFUSE) -> list[Encoded]:
    """Every example of the files, in order; texts longer than `length` tokens become several.

    tokenizer: a transformers fast tokenizer. A line that is no example, or a conversation longer than `length`, is a
    UserError that names file and line; with ``on_bad="skip"`` it is left out, and how many were is said on stderr.
    UserError also when nothing is left.
    """
    if on_bad not in (REFUSE, SKIP):
        raise UserError(f"on_bad must be {REFUSE!r} or {SKIP!r}, not {on_bad!r}")
    examples, skipped, first = [], 0, ""
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                examples += _encode_line(line, tokenizer, length)
            except UserError as error:
                if on_bad == REFUSE:
                    raise UserError(f"{path}, line {number}: {error}") from None
                skipped, first = skipped + 1, first or f"{path}, line {number}: {error}"
    if skipped:
        print(f"skipped {skipped} bad lines; the first is {first}", file=sys.stderr)
    if not examples:
        raise UserError(f"no examples in {', '.join(map(str, paths)) or 'no files'}")
    return examples


def _encode_line(line: str, tokenizer: Any, length: int) -> list[Encoded]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error})") from None
    if isinstance(value, dict) and isinstance(value.get("text"), str) and value["text"]:
        ids = [*tokenizer.encode(value["text"], add_special_tokens=False), tokenizer.eos_token_id]
        return [Encoded(np.array(ids[i:i + length], np.int32), np.ones(len(ids[i:i + length]), bool))
                for i in range(0, len(ids), length)]
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('neither "messages" nor a "text"')
    for message in messages:
        if (not isinstance(message, dict) or message.get("role") not in ROLES
                or not isinstance(message.get("content"), str)):
            raise UserError(f"a message needs a role ({', '.join(ROLES)}) and a content, a text; this is not one: "
                            f"{json.dumps(message)[:80]}")
    encoded = encode_conversation(messages, tokenizer)
    if len(encoded.tokens) > length:
        raise UserError(f"the conversation has {len(encoded.tokens)} tokens, more than sequence_length={length}")
    if not encoded.learned.any():
        raise UserError("the assistant says nothing, so there is nothing to learn")
    return [encoded]


def encode_conversation(messages: Sequence[dict], tokenizer: Any) -> Encoded:
    """Tokens of the whole conversation; learned are the assistant's, up to and with the token that ends its turn.

    What the assistant says is what the template adds to the conversation before it with its generation prompt.
    """
    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    text, spans = render(len(messages), False), []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(index, True), render(index + 1, False)
            if not after.startswith(before) or not text.startswith(after):
                raise UserError("the chat template changes earlier turns when later ones come: what the assistant says "
                                "cannot be told apart")
            end = after.rfind(tokenizer.eos_token, len(before)) if tokenizer.eos_token else -1
            spans.append((len(before), end + len(tokenizer.eos_token) if end >= 0 else len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]])
    learned = np.zeros(len(begins), bool)
    for begin, end in spans:
        learned |= (begins >= begin) & (begins < end)
    return Encoded(np.array(encoded["input_ids"], np.int32), learned)


def pack(lengths: Sequence[int], order: Iterable[int], capacity: int, open_rows: int = 64) -> list[list[int]]:
    """Rows of example indices whose lengths sum to at most `capacity`, filled first-fit in the given order.

    At most `open_rows` rows are considered for an example, so packing takes linear time.
    """
    rows, space = [], []
    for index in order:
        for row in range(max(0, len(rows) - open_rows), len(rows)):
            if space[row] >= lengths[index]:
                break
        else:
            row = len(rows)
            rows.append([])
            space.append(capacity)
        rows[row].append(index)
        space[row] -= lengths[index]
    return rows


def batch_function(examples: Sequence[Encoded], rows: int, length: int, seed: int, pad: int) -> Callable[[int], Batch]:
    """``batch_of(step)``, steps counted from 1: the same batch whenever asked, so resuming needs no other position.

    Every epoch sees each example once, in its own order and packing; what does not fill a last batch begins the next
    epoch's first one.
    """
    lengths = [len(example.tokens) for example in examples]
    plans: dict[int, list[list[int]]] = {}
    starts = [0]  # of each epoch, in rows

    def plan(epoch: int) -> list[list[int]]:
        if epoch not in plans:
            plans.pop(epoch - 2, None)
            order = np.random.default_rng([seed, epoch]).permutation(len(examples)).tolist()
            plans[epoch] = pack(lengths, order, length)
        return plans[epoch]

    def row_at(position: int) -> list[int]:
        epoch = 0
        while True:
            if len(starts) == epoch + 1:
                starts.append(starts[epoch] + len(plan(epoch)))
            if position < starts[epoch + 1]:
                return plan(epoch)[position - starts[epoch]]
            epoch += 1

    def batch_of(step: int) -> Batch:
        batch = empty(rows, length, pad)
        for row in range(rows):
            end = 0
            for segment, index in enumerate(row_at((step - 1) * rows + row)):
                tokens, learned = examples[index]
                here = slice(end, end := end + len(tokens))
                batch.tokens[row, here], batch.weights[row, here] = tokens, learned
                batch.weights[row, here.start] = 0
                batch.segment_ids[row, here], batch.positions[row, here] = segment, np.arange(len(tokens))
        return batch

    return batch_of
