"""Training rows of one opening and many turns, each a request and its answer that see the opening and themselves.

The opening is computed once for all its turns, and every turn learns what it would learn in a conversation of its own.
"""
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from bpe_tokenizer import END_OF_TEXT, IM_END, IM_START
from tokenizers import Tokenizer

from qwen_jax.training.batch import Batch, empty

OPENING = 0  # segment id of the opening; turns are 1, 2, ...


def encode(tokenizer: Tokenizer, opening: str, turns: Sequence[tuple[str, str]], lm_weight: float,
           skips: Mapping[int, int] = MappingProxyType({})) -> dict[str, list]:
    """Encode an opening and its turns as one training row of any length; return the row's `Batch` fields by name.

    opening: ChatML text up to a line end within the user's message. turns: pairs (rest of the user's message, answer).
    Answers, with the token that ends them, weigh 1; other predicted tokens weigh `lm_weight`. skips: line number of
    the opening -> positions left out before it, so that short rows teach long distances (positional skip-wise
    training, https://arxiv.org/abs/2309.10400).

    Opening and turns meet at line ends, where the pre-tokenizer always splits: encoding them apart changes no token.
    """
    row = {name: [] for name in Batch._fields}

    def add(text: str, segment: int, first: int, weight: float):
        ids = tokenizer.encode(text).ids
        row["tokens"] += ids
        row["weights"] += [weight] * len(ids)
        row["segment_ids"] += [segment] * len(ids)
        row["positions"] += range(first, first + len(ids))
        return first + len(ids)

    lines, end = opening.splitlines(keepends=True), 0
    starts = sorted({0, *skips})
    for start, stop in zip(starts, [*starts[1:], len(lines)]):
        end = add("".join(lines[start:stop]), OPENING, end + skips.get(start, 0), lm_weight)
    row["weights"][0] = 0.0
    for number, (request, answer) in enumerate(turns, OPENING + 1):
        begin = len(row["weights"])
        answer_start = add(f"{request}{IM_END}\n{IM_START}assistant\n", number, end, lm_weight)
        add(answer + IM_END, number, answer_start, 1.0)
        row["weights"][begin] = 0.0
    return row


def batches(tokenizer: Tokenizer, conversations: Iterable[tuple[str, Sequence[tuple[str, str]]]], rows: int,
            length: int, lm_weight: float) -> Iterator[Batch]:
    """Yield training batches of `rows` rows, each an opening with its turns, cut or padded to `length` tokens."""
    source = iter(conversations)
    while True:
        batch = empty(rows, length, tokenizer.token_to_id(END_OF_TEXT))
        for index in range(rows):
            conversation = next(source, None)
            if conversation is None:
                return
            put(batch, index, encode(tokenizer, *conversation, lm_weight))
        yield batch


def put(batch: Batch, row: int, fields: Mapping[str, list]) -> None:
    """Write the `fields` of an encoded row into row number `row` of a batch, cut to the batch's length."""
    length = batch.tokens.shape[1]
    for name, values in fields.items():
        getattr(batch, name)[row, :len(values)] = values[:length]
