"""Table of a runner's programs: which buckets can run, and which programs to prepare next."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from tqdm import tqdm

from qwen_jax.engine.runner.executable_cache import Executables, Key, Program
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.schedule_policy import FULL


class ProgramTable:
    """The programs of a runner's buckets, which become available one after another.

    Args:
      table: every bucket that a step may have.
      keys: function of a bucket that returns the keys of the programs that its steps run.

    Attributes:
      available: buckets whose programs are all there; it only grows, also while steps run.
      seconds: time to compile or load the programs of each bucket; those that several share count for the first.
      on_arrival: called after each program that has arrived, on the thread that brought it.
    """

    def __init__(self, table: Sequence[Bucket], keys: Callable[[Bucket], list[Key]],
                 executables: Executables) -> None:
        self._table, self._keys_of, self._executables = by_usefulness(table), keys, executables
        self._keys = {bucket: keys(bucket) for bucket in self._table}
        self._first = {key: bucket for bucket in reversed(self._table) for key in self._keys[bucket]}
        self.available: set[Bucket] = set()
        self.seconds: dict[Bucket, float] = dict.fromkeys(table, 0.0)
        self.on_arrival: Callable[[], None] = lambda: None

    def of(self, bucket: Bucket) -> list[Program]:
        """Return the programs of a bucket that are there."""
        programs = self._executables.programs
        return [programs[key] for key in self._keys_of(bucket) if key in programs]

    @property
    def smallest(self) -> list[Bucket]:
        """The buckets with which any request can be answered: the smallest prefill and the smallest decode step."""
        return self._table[:2]

    @property
    def missing(self) -> list[Key]:
        """Keys of the programs that are not there yet, the most useful first."""
        return [key for bucket in self._table if bucket not in self.available for key in self._keys[bucket]
                if self._first[key] is bucket and key not in self._executables.programs]

    def prepare(self, buckets: Iterable[Bucket] | None = None, progress: bool = False, label: str = ""
                ) -> Iterator[Bucket]:
        """Compile or load the programs of buckets, and yield each bucket when its programs are there.

        buckets: by default all, the most useful first. progress, label: show a bar on stderr with this text.
        """
        waiting = list(self._table if buckets is None else buckets)
        keys = list(dict.fromkeys(key for bucket in waiting for key in self._keys[bucket]))
        with tqdm(total=len(keys), desc=label, unit="program", file=sys.stderr, disable=not progress) as bar:
            bar.update(len(keys) - sum(key not in self._executables.programs for key in keys))
            for key, program in self._executables.prepare(keys):
                self._note(key)
                bar.set_postfix_str(f"{key[0]} {'loaded' if program.from_disk else 'compiled'} in "
                                    f"{program.seconds:.1f} s")
                bar.update()
                while waiting and waiting[0] in self.available:
                    yield waiting.pop(0)
        yield from waiting

    def prepare_smallest(self) -> None:
        """Compile or load the programs of the smallest buckets."""
        for _ in self.prepare(self.smallest):
            pass

    def prepare_key(self, key: Key) -> None:
        """Compile or load one program."""
        for _ in self._executables.prepare([key]):
            self._note(key)

    def load_missing(self, stopped: threading.Event) -> None:
        """Load from disk what is there of the missing programs, until ``stopped`` is set."""
        for key in self.missing:
            if not stopped.is_set() and self._executables.load(key):
                self._note(key)

    def take(self, key: Key, payload: bytes, seconds: float) -> None:
        """Take over a program that another process has compiled (`Executables.take`)."""
        self._executables.take(key, payload, seconds)
        self._note(key)

    def _note(self, key: Key) -> None:
        self.seconds[self._first[key]] += self._executables.programs[key].seconds
        self.available.update(bucket for bucket, keys in self._keys.items() if bucket not in self.available
                              and key in keys and all(key in self._executables.programs for key in keys))
        self.on_arrival()


def by_usefulness(table: Sequence[Bucket]) -> list[Bucket]:
    """Return the buckets in the order in which their programs are of use to an engine that has none yet.

    The smallest prefill and decode step come first, with which any request can be answered; then, for 8-bit engines,
    the 16-bit fallback; then the largest decode step and the largest prefill of one row; then the others. Full
    attention comes before sparse, and steps that check guesses come last.
    """
    usual = table[0].precision
    plain = [bucket for bucket in table if bucket.precision == usual and bucket.schedule == FULL]
    prefills = [bucket for bucket in plain if bucket.phase == "prefill"]
    decodes = [bucket for bucket in plain if bucket.phase == "decode" and bucket.tokens == 1]
    first = [prefills[0], decodes[0], *(bucket for bucket in table if bucket.precision != usual), decodes[-1],
             max(prefills, key=lambda bucket: (-bucket.rows, bucket.tokens)), *decodes, *prefills]
    rest = sorted(table, key=lambda bucket: bucket.phase == "decode" and bucket.tokens > 1)
    return list(dict.fromkeys([*first, *rest]))
