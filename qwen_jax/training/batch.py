"""Rows to train on."""
from typing import NamedTuple

import numpy as np

PADDING = -1  # segment id


class Batch(NamedTuple):
    """Rows of tokens in which several segments stand side by side and do not see one another."""
    tokens: np.ndarray       # [B, T] int32
    weights: np.ndarray      # [B, T] float32, of predicting tokens[b, t] from what it sees: 0 where a segment begins
    segment_ids: np.ndarray  # [B, T] int32, PADDING at the end of a row
    positions: np.ndarray    # [B, T] int32, within the segment


def empty(rows: int, length: int, pad: int) -> Batch:
    """A batch of nothing but padding, to be filled."""
    return Batch(np.full((rows, length), pad, np.int32), np.zeros((rows, length), np.float32),
                 np.full((rows, length), PADDING, np.int32), np.zeros((rows, length), np.int32))
