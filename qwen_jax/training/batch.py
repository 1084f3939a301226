"""Batches of token rows to train on."""
from typing import NamedTuple

import numpy as np

PADDING = -1  # segment id of padding


class Batch(NamedTuple):
    """A training batch: rows of tokens, each of several examples (segments) that attend to themselves alone."""
    tokens: np.ndarray       # [B, T] int32
    weights: np.ndarray      # [B, T] float32, weight of the loss of predicting tokens[b, t]: 0 where a segment begins
    segment_ids: np.ndarray  # [B, T] int32, PADDING at the end of a row
    positions: np.ndarray    # [B, T] int32, within the segment


def empty(rows: int, length: int, pad: int) -> Batch:
    """Return a batch that holds only padding, to be filled."""
    return Batch(np.full((rows, length), pad, np.int32), np.zeros((rows, length), np.float32),
                 np.full((rows, length), PADDING, np.int32), np.zeros((rows, length), np.int32))
