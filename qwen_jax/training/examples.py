"""Training examples from JSONL files of conversations or texts, packed into batches in an order set by the seed.

A line is ``{"messages": [{"role": ..., "content": ...}, ...]}`` or ``{"text": ...}``. A conversation goes through the
checkpoint's chat template, and only the assistant's messages are learned; a text is learned whole, with the tokenizer's
EOS, if it has one, at its end.
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
OPEN_ROWS = 64  # rows that packing considers for an example


class Encoded(NamedTuple):
    """Tokens of an example, and which of them the model learns to predict."""
    tokens: np.ndarray   # [n] int32
    learned: np.ndarray  # [n] bool


def read_examples(paths: Iterable[str | Path], tokenizer: Any, length: int, skip_bad: bool = False) -> list[Encoded]:
    """Read every example of the files, in order; a text longer than `length` tokens becomes several examples.

    tokenizer: a transformers fast tokenizer. A line that is no example, or a conversation longer than `length`, raises
    a UserError that names file and line; with `skip_bad` it is left out, and the number of such lines is printed on
    stderr. Raises UserError also when no example is left.
    """
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
                if not skip_bad:
                    raise UserError(f"{path}, line {number}: {error}") from None
                skipped, first = skipped + 1, first or f"{path}, line {number}: {error}"
    if skipped:
        print(f"skipped {skipped} bad lines; the first is {first}", file=sys.stderr)
    if not examples:
        raise UserError(f"no examples in {', '.join(map(str, paths)) or 'no files'}")
    return examples


def _encode_line(line: str, tokenizer: Any, length: int) -> list[Encoded]:
    """Return the training examples of a JSONL line. UserError when it is not a conversation or text."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON ({error})") from None
    if isinstance(value, dict) and isinstance(value.get("text"), str) and value["text"]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [*tokenizer.encode(value["text"], add_special_tokens=False), *end]
        return [Encoded(np.array(ids[i:i + length], np.int32), np.ones(len(ids[i:i + length]), bool))
                for i in range(0, len(ids), length)]
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('neither "messages" nor a "text"')
    for message in messages:
        if (not isinstance(message, dict) or message.get("role") not in ROLES
                or not isinstance(message.get("content"), str)):
            raise UserError(f"a message needs a role ({', '.join(ROLES)}) and a content that is a text, not "
                            f"{json.dumps(message)[:80]}")
    encoded = encode_conversation(messages, tokenizer)
    if len(encoded.tokens) > length:
        raise UserError(f"the conversation has {len(encoded.tokens)} tokens, more than sequence_length={length}")
    if not encoded.learned.any():
        raise UserError("the assistant says nothing, so there is nothing to learn")
    return [encoded]


def encode_conversation(messages: Sequence[dict], tokenizer: Any) -> Encoded:
    """Encode a whole conversation. Learned tokens are the assistant's, including the token that ends its turn
    (`turn_end`, else the tokenizer's EOS) and nothing after it.

    An assistant's message is the text that the template adds after the earlier messages and the generation prompt.
    UserError when the template does not keep earlier messages as they are.
    """
    def render(count: int, prompt: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt)

    text, spans = render(len(messages), False), []
    token = turn_end(tokenizer)
    end_text = tokenizer.eos_token if token is None else tokenizer.convert_ids_to_tokens(token)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(index, True), render(index + 1, False)
            if not after.startswith(before) or not text.startswith(after):
                raise UserError("the chat template must not change earlier turns when later turns are added: the "
                                "assistant's messages cannot be told apart")
            end = after.rfind(end_text, len(before)) if end_text else -1
            spans.append((len(before), end + len(end_text) if end >= 0 else len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]])
    learned = np.zeros(len(begins), bool)
    for begin, end in spans:
        learned |= (begins >= begin) & (begins < end)
    return Encoded(np.array(encoded["input_ids"], np.int32), learned)


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token with which the chat template ends an assistant's turn; None when it writes none there.

    It may be another one than the tokenizer's EOS: a base model's is the end of a text.
    """
    said = "answer"
    text = tokenizer.apply_chat_template([{"role": "user", "content": "question"},
                                          {"role": "assistant", "content": said}], tokenize=False)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    after = tokenizer(text[text.rindex(said) + len(said):], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in special), None)


def pack(lengths: Sequence[int], order: Iterable[int], capacity: int) -> list[list[int]]:
    """Pack examples into rows: return for each row the indices of examples whose lengths sum to at most `capacity`.

    Examples go first-fit, in the given order, into the last `OPEN_ROWS` rows, so packing takes linear time.
    """
    rows, space = [], []
    for index in order:
        for row in range(max(0, len(rows) - OPEN_ROWS), len(rows)):
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
    """Return a function ``batch_of(step)`` that gives the training batch of a step; steps count from 1.

    A step always has the same batch, so a run resumes from its step number alone. Every epoch sees each example once,
    in its own order and packing; rows that do not fill the last batch of an epoch begin the next epoch's first batch.
    """
    lengths = [len(example.tokens) for example in examples]
    plans: dict[int, list[list[int]]] = {}
    starts = [0]  # first row of each epoch

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
                span = slice(end, end := end + len(tokens))
                batch.tokens[row, span], batch.weights[row, span] = tokens, learned
                batch.weights[row, span.start] = 0
                batch.segment_ids[row, span], batch.positions[row, span] = segment, np.arange(len(tokens))
        return batch

    return batch_of
