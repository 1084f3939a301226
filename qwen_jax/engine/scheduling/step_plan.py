"""What the scheduler decides: one run of one executable."""

from dataclasses import dataclass

from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.sequence import Sequence

DRAWN = -1  # a draft that the step itself makes


@dataclass(frozen=True)
class PlannedRow:
    """Computes positions start .. start + count - 1 of `seq`, whose pages are already there.

    In a prefill these are known tokens, of which the last one may yield the next. In a decode step, position `start` is
    the last known token and each position yields a token: one after another, or all at once where `drafts` guess them.
    """

    seq: Sequence
    start: int
    count: int
    samples: bool  # yields tokens: one, or in a decode step up to `count`
    drafts: tuple[int, ...] = ()  # tokens thought to follow; count - 1 of them


@dataclass(frozen=True)
class StepPlan:
    """One run of one executable. Row i of the batch is rows[i]; the bucket's other rows are padding."""

    bucket: Bucket
    rows: list[PlannedRow]

    @property
    def version(self) -> int:
        """Of the weights that run it."""
        return self.rows[0].seq.version
