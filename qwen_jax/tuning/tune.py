"""`qwen-jax tune`: time steps, search for faster shapes and thresholds, race them with the default, keep the winner."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from statistics import geometric_mean

from tqdm import tqdm

from qwen_jax.engine.config.memory import platform
from qwen_jax.engine.config.tuned import Tuned, write
from qwen_jax.engine.scheduling.buckets import PAGE, Bucket, default_grid
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY, FULL, SPARSE
from qwen_jax.tuning.engine_bench import EngineBench, cost_key, host_seconds
from qwen_jax.tuning.search import (
    CHUNK_PAGES,
    DECODE_ROWS,
    MORE_PREFILL,
    Space,
    alternatives,
    best_tile,
    recompute_costs,
    search,
    sparse_threshold,
)
from qwen_jax.tuning.step_costs import Cost
from qwen_jax.tuning.successive_halving import PairedTimings, race
from qwen_jax.tuning.workloads import traces

TRIALS = 200
FINALISTS = 4
TOGETHER = 4  # number of programs that are compiled before they are measured
MEASURE, SEARCH = 0.45, 0.6  # shares of the time after which measuring and searching stop; the rest is for the race
SEEDS = (1, 2, 3)  # seeds of the traces that are predicted and raced
RACE_RUNS = 9 * (FINALISTS + 1)  # approximate number of runs of all traces in a race


class Tuner:
    """A tuning run, which finds the fastest shapes of steps and thresholds of one engine.

    It takes about ``minutes``; compiling that has begun is finished.
    """

    def __init__(self, bench: EngineBench, minutes: float, progress: bool = True) -> None:
        self.bench, self.progress = bench, progress
        self.began, self.limit = time.monotonic(), 60 * minutes
        steps = bench.default.decode_steps
        self.default = Tuned(DEFAULT_POLICY, replace(default_grid(platform()), decode_steps=steps))
        self.space = Space(bench, self.default, [
            trace for seed in SEEDS for trace in traces(seed, bench.max_seq_len)])

    def run(self) -> Tuned:
        """Tune the engine, write the tuned file, and return its choices: the default's own when none won the race."""
        self._measure_default()
        tiles = self._tiles()
        start = self._with_tiles(tiles)
        self._measure(self.bench.table(start), "shapes with these tiles", always=True)
        self._measure(self._wider(start), "more shapes")
        threshold, lengths = sparse_threshold(self.space, start)
        start = Tuned(replace(start.policy, sparse_above_tokens=threshold), start.grid)
        with self._bar(TRIALS, "search") as bar:
            candidates = search(self.space, start, TRIALS, self.began + SEARCH * self.limit, bar.update)
        finalists = [tuned for tuned in candidates if tuned != self.default][:FINALISTS]
        predicted = {tuned: self.space.score(tuned) for tuned in finalists}
        winner, timings = self._race(finalists)
        return self._keep(winner, timings, predicted, tiles, lengths)

    # --- measuring

    def _measure_default(self) -> None:
        self._measure(self.bench.table(self.default), "default shapes", always=True)
        self.space.step_seconds = host_seconds(self.bench, self.default, self.space.traces[0])

    def _measure(self, buckets: Iterable[Bucket], what: str, always: bool = False) -> dict[Bucket, Cost]:
        """Measure the costs of buckets and return them; stop when the time for measuring is over, unless ``always``.

        what: label of the progress bar.
        """
        precision = self.bench.engine.runner.table[0].precision
        buckets = list(dict.fromkeys(cost_key(bucket) for bucket in buckets if bucket.precision == precision))
        with self._bar(len(buckets), what) as bar:
            for index, bucket in enumerate(buckets):
                if not always and time.monotonic() > self.began + MEASURE * self.limit:
                    break
                if index % TOGETHER == 0:
                    self.bench.prepare_measuring(buckets[index:index + TOGETHER])
                self.space.costs[bucket] = self.bench.measure(bucket)
                bar.set_postfix_str(f"{bucket}: {1e3 * self.space.costs[bucket].base:.1f} ms")
                bar.update()
        return {bucket: self.space.costs[bucket] for bucket in buckets if bucket in self.space.costs}

    def _tiles(self) -> dict[str, dict[int, dict[Bucket, Cost]]]:
        """Measure some of the default's buckets with other numbers of pages of keys that attention loads at a time.

        Returns phase -> number of pages -> costs.
        """
        tiles = {}
        table = [cost_key(b) for b in self.bench.table(self.default) if b.schedule == FULL]
        for phase, order in (("decode", "rows"), ("prefill", "tokens")):
            own = sorted((b for b in table if b.phase == phase and b in self.space.costs),
                         key=lambda b: (getattr(b, order), b.rows))
            sample = [own[0], own[-1]] if phase == "prefill" else [own[0], own[len(own) // 2], own[-1]]
            sample = list(dict.fromkeys(sample))
            tiles[phase] = {0: {b: self.space.costs[b] for b in sample}}
            for pages in CHUNK_PAGES:
                if pages * PAGE > self.bench.max_seq_len:
                    continue
                costs = self._measure([replace(b, chunk_pages=pages) for b in sample], f"{phase} tiles of {pages}")
                if len(costs) == len(sample):
                    tiles[phase][pages] = dict(zip(sample, costs.values(), strict=True))
        return tiles

    def _with_tiles(self, tiles: dict[str, dict[int, dict[Bucket, Cost]]]) -> Tuned:
        """Return the default choices, with the fastest number of pages of keys to load at a time in each phase."""
        grid = self.default.grid
        for phase, measured in tiles.items():
            grid = replace(grid, **{f"{phase}_chunk_pages": best_tile(self.space, phase, measured)})
        return Tuned(self.default.policy, grid)

    def _wider(self, start: Tuned) -> list[Bucket]:
        """Return the buckets of ``start``, and further prefill shapes and decode rows to measure for the search."""
        bench, table = self.bench, self.bench.table(start)
        max_rows = min(bench.max_batch_size, start.policy.recompute_above_rows)
        prefill, decode = (next(b for b in table if (b.phase, b.schedule) == (phase, FULL))
                           for phase in ("prefill", "decode"))
        more_prefill = [replace(prefill, rows=rows, tokens=tokens, micro_rows=rows) for rows, tokens in MORE_PREFILL
                        if rows <= max_rows and tokens <= bench.max_seq_len]
        more_decode = [replace(decode, rows=rows, micro_rows=rows) for rows in DECODE_ROWS
                       if rows <= bench.max_batch_size]
        return [*table, *more_decode, *more_prefill]

    # --- deciding

    def _race(self, finalists: list[Tuned]) -> tuple[Tuned | None, dict[Tuned, PairedTimings]]:
        """Race the finalists with the default, on traces shortened to fit the time left; see `race` for the result."""
        left = self.began + self.limit - time.monotonic()
        whole = sum(self.space.seconds(self.default, trace) for trace in self.space.traces) / len(SEEDS)
        share = min(1.0, max(0.1, left / (RACE_RUNS * whole)))
        by_seed = [{trace.name: trace for trace in traces(seed, self.bench.max_seq_len, share)} for seed in SEEDS]
        if not finalists:
            return None, {}
        with self._bar(None, "race") as bar:
            def tick(text: str) -> None:
                bar.set_postfix_str(text)
                bar.update()

            for choice in (self.default, *finalists):  # compiled and run once before the race is timed
                self.bench.run(choice, next(iter(by_seed[0].values())))
                tick("compiling")
            return race(self.default, finalists, list(by_seed[0]),
                        lambda choice, name, number: self.bench.run(choice, by_seed[number % len(SEEDS)][name]),
                        self.began + self.limit, tick=tick)

    def _keep(self, winner: Tuned | None, timings: dict[Tuned, PairedTimings], predicted: dict[Tuned, float],
              tiles: dict[str, dict[int, dict[Bucket, Cost]]], lengths: dict[int, list[float]]) -> Tuned:
        """Write the winner, else the default, with all measurements to the tuned file, and return its choices."""
        tuned = winner or self.default
        by_trace = {name: {"default_seconds": [default for default, _ in pairs], "seconds": [own for _, own in pairs],
                           "ratio": timings[winner].ratio(name)}
                    for name, pairs in (timings[winner].pairs.items() if winner else ())}
        others = [{"predicted": 1 / predicted[other], "measured": timing.mean, "worst": timing.worst,
                   "rounds": timing.rounds} for other, timing in timings.items() if timing.pairs and other != winner]
        bench, evidence = self.bench, self._evidence(tuned, tiles, lengths)
        written = write(bench.path, bench.about, tuned, evidence, max_batch_size=bench.max_batch_size,
                        max_seq_len=bench.max_seq_len, accepted=winner is not None, traces=by_trace, others=others,
                        host_seconds_per_step=self.space.step_seconds,
                        step_seconds={str(b) + (f", {b.chunk_pages} pages" if b.chunk_pages else ""): asdict(cost)
                                      for b, cost in self.space.costs.items()},
                        minutes=(time.monotonic() - self.began) / 60)
        bench.forget()
        return written

    def _evidence(self, tuned: Tuned, tiles, lengths) -> dict[str, dict]:
        """Return, by the name of each tuning choice, what was measured or predicted for it.

        A choice that differs from the default has ``default``, the default's value, and ``gain``, the predicted ratio
        of the time with the default's value to the time with the choice.
        """
        base = self.default.choices()
        evidence = {name: {"default": base[name]} for name, value in tuned.choices().items() if value != base[name]}
        now = [self.space.ratio(tuned, trace) for trace in self.space.traces]
        for name, other in alternatives(tuned, self.default):
            if name in evidence:
                try:
                    then = [self.space.ratio(other, trace) for trace in self.space.traces]
                    evidence[name]["gain"] = geometric_mean(then) / geometric_mean(now)
                except KeyError:
                    pass

        def milliseconds(costs: Iterable[tuple[Bucket, Cost]]) -> dict[str, list[float]]:
            return {f"{b.rows}x{b.tokens}": [1e3 * cost.base, 1e3 * cost.seconds(1, self.bench.max_seq_len)]
                    for b, cost in costs}

        def add(name: str, **facts: object) -> None:
            evidence.setdefault(name, {}).update(facts)

        for name, phase in (("decode_rows", "decode"), ("prefill_shapes", "prefill")):
            key = phase, FULL, getattr(tuned.grid, f"{phase}_chunk_pages")
            costs = [item for item in self.space.costs.items()
                     if (item[0].phase, item[0].schedule, item[0].chunk_pages) == key]
            costs.sort(key=lambda item: (item[0].rows, item[0].tokens))
            add(name, ms_short_and_long_context=milliseconds(costs))
        for phase, measured in tiles.items():
            add(f"{phase}_chunk_pages", ms_short_and_long_context={
                str(pages): milliseconds(costs.items()) for pages, costs in measured.items()})
        add("decode_steps", ms_first_and_further_token={
            str(b.rows): [1e3 * cost.base, 1e3 * cost.token] for b, cost in self.space.costs.items()
            if (b.phase, b.schedule, b.chunk_pages) == ("decode", FULL, tuned.grid.decode_chunk_pages)})
        add("recompute_above_rows", **recompute_costs(self.space))
        if any(b.schedule == SPARSE for b in self.space.costs):
            add("sparse_above_tokens", seconds_full_and_sparse={str(length): both for length, both in lengths.items()})
        return evidence

    def _bar(self, total: int | None, what: str) -> tqdm:
        return tqdm(total=total, desc=what, file=sys.stderr, disable=not self.progress, leave=False)


def ratios(tuned: Tuned) -> dict[str, float]:
    """Return, by the name of each trace, the measured speed-up of a tuned file's choices over the default's."""
    return {name: timing["ratio"] for name, timing in tuned.measured.get("traces", {}).items()}

