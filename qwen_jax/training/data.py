"""Conversations to fixed-length rows of tokens, with a weight for every prediction."""
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from qwen_jax.training.tokenizer import END_OF_TEXT


class Batch(NamedTuple):
    """Rows to train on. `weights[b, t]` is the weight of predicting `tokens[b, t]` from what precedes it."""
    tokens: np.ndarray   # [B, T] int32, padded at the end with <|endoftext|>
    weights: np.ndarray  # [B, T] float32: 1 on answers, the recipe's lm_weight elsewhere, 0 on padding and on token 0
    verdict: np.ndarray  # [B, T] bool: the first token of each answer that is a verdict


def encode(tokenizer: Tokenizer, messages: list[dict], lm_weight: float) -> tuple[list[int], list[float], list[bool]]:
    """Tokens, weights and verdict positions of one ChatML conversation; answers end with their ``<|im_end|>``.

    Every role starts on a line of its own, where the pre-tokenizer always splits: encoding piece by piece gives the
    tokens of the whole text. An answer marked ``"verdict": False`` is trained on but not counted as a verdict.
    """
    tokens, weights, verdict = [], [], []

    def add(text: str, weight: float, answer: bool = False):
        ids = tokenizer.encode(text).ids
        tokens.extend(ids)
        weights.extend([weight] * len(ids))
        verdict.extend([answer and i == 0 for i in range(len(ids))])

    for message in messages:
        add(f"<|im_start|>{message['role']}\n", lm_weight)
        answer = message["role"] == "assistant"
        add(message["content"] + "<|im_end|>", 1.0 if answer else lm_weight,
            answer and message.get("verdict", True))
        add("\n", lm_weight)
    weights[0] = 0.0
    return tokens, weights, verdict


def batches(tokenizer: Tokenizer, conversations: Iterable[list[dict]], rows: int, length: int,
            lm_weight: float) -> Iterator[Batch]:
    """Batches of `rows` conversations, one per row, cut or padded to `length` tokens."""
    pad, source = tokenizer.token_to_id(END_OF_TEXT), iter(conversations)
    while True:
        tokens = np.full((rows, length), pad, np.int32)
        weights, verdict = np.zeros((rows, length), np.float32), np.zeros((rows, length), bool)
        for row in range(rows):
            messages = next(source, None)
            if messages is None:
                return
            for array, values in zip((tokens, weights, verdict), encode(tokenizer, messages, lm_weight)):
                array[row, :len(values)] = values[:length]
        yield Batch(tokens, weights, verdict)
