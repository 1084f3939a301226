"""Which schedule a request runs under, decided from its length and its neighbours."""

import operator
from dataclasses import dataclass

from qwen_jax.errors import UserError

FULL, SPARSE, RECOMPUTE = "full_attention", "sparse_attention", "recompute"



def check_positive(**values) -> None:
    """UserError, naming the first argument that is not a positive integer."""
    for name, value in values.items():
        try:
            valid = not isinstance(value, bool) and operator.index(value) >= 1
        except TypeError:
            valid = False
        if not valid:
            raise UserError(f"{name} must be a positive integer, not {value!r}")



@dataclass(frozen=True)
class SchedulePolicy:
    """The thresholds of `dynamic_schedule`."""

    sparse_above_tokens: int = 2048
    recompute_above_rows: int = 32

    def __post_init__(self):
        check_positive(sparse_above_tokens=self.sparse_above_tokens, recompute_above_rows=self.recompute_above_rows)



DEFAULT_POLICY = SchedulePolicy()



def dynamic_schedule(batch_size: int, seq_len: int, policy: SchedulePolicy = DEFAULT_POLICY) -> str:
    """The schedule of a prompt of `seq_len` tokens prefilled in a batch of `batch_size` rows.

    Long prompts are "sparse_attention"; else large batches are "recompute" (prefilled in micro-batches); else
    "full_attention". Both thresholds are exclusive.
    """
    check_positive(batch_size=batch_size, seq_len=seq_len)
    if seq_len > policy.sparse_above_tokens:
        return SPARSE
    if batch_size > policy.recompute_above_rows:
        return RECOMPUTE
    return FULL



def attention_of(schedule: str) -> str:
    """The attention a schedule computes. Recompute is full attention in less memory, so its requests decode, and
    prefill what is left in small batches, in the full_attention buckets."""
    return FULL if schedule == RECOMPUTE else schedule
