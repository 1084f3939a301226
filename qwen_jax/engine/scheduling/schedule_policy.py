"""Choice of a request's schedule (full or sparse attention, or prefill in micro-batches) by length and batch size."""

from dataclasses import dataclass

from qwen_jax.errors import check_positive_integer

FULL, SPARSE, RECOMPUTE = "full_attention", "sparse_attention", "recompute"


@dataclass(frozen=True)
class SchedulePolicy:
    """Thresholds above which `dynamic_schedule` chooses sparse attention, or a prefill in micro-batches.

    Attributes:
      sparse_above_tokens: prompt length above which attention is sparse. The default is where a CPU's prefill becomes
        1.3 times as fast by it (`scripts/bench/sparse_engine.py`).
      recompute_above_rows: batch size above which a prefill runs in micro-batches.
    """

    sparse_above_tokens: int = 8192
    recompute_above_rows: int = 32

    def __post_init__(self):
        check_positive(sparse_above_tokens=self.sparse_above_tokens, recompute_above_rows=self.recompute_above_rows)


def check_positive(**values) -> None:
    """Raise UserError, with the argument's name, for the first keyword argument that is not a positive integer."""
    for name, value in values.items():
        check_positive_integer(name, value)


DEFAULT_POLICY = SchedulePolicy()  # of engines
PUBLISHED_POLICY = SchedulePolicy(sparse_above_tokens=2048)  # the rule that the schedules' names come from


def dynamic_schedule(batch_size: int, seq_len: int, policy: SchedulePolicy = PUBLISHED_POLICY) -> str:
    """Return the schedule of a prompt of `seq_len` tokens that is prefilled in a batch of `batch_size` rows.

    An engine decides by its own policy, by default `DEFAULT_POLICY`.

    Long prompts are "sparse_attention"; else large batches are "recompute" (prefilled in micro-batches); else
    "full_attention".
    """
    check_positive(batch_size=batch_size, seq_len=seq_len)
    if seq_len > policy.sparse_above_tokens:
        return SPARSE
    if batch_size > policy.recompute_above_rows:
        return RECOMPUTE
    return FULL


def attention_of(schedule: str) -> str:
    """Return the kind of attention that a schedule computes: "full_attention" or "sparse_attention".

    Recompute is full attention in less memory: its requests decode, and prefill what is left in small batches, in the
    full_attention buckets.
    """
    return FULL if schedule == RECOMPUTE else schedule
