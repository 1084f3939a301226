"""`qwen-jax tune`: measure, search, race, and keep what won."""

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
from qwen_jax.tuning.engine_bench import Lab, host_seconds, plain
from qwen_jax.tuning.search import (
    CHUNK_PAGES,
    DECODE_ROWS,
    MORE_PREFILL,
    Space,
    alternatives,
    best_tile,
    recompute_seconds,
    search,
    sparse_threshold,
)
from qwen_jax.tuning.step_costs import Cost
from qwen_jax.tuning.successive_halving import Heats, race
from qwen_jax.tuning.workloads import traces

TRIALS = 200
FINALISTS = 4
TOGETHER = 4  # programs that are compiled before the next ones are measured
MEASURE, SEARCH = 0.45, 0.6  # of the time: when measuring stops, and when searching does; the rest is the race's
SEEDS = (1, 2, 3)  # of the traces that choices are made on
HEATS = 9 * (FINALISTS + 1)  # about so many runs of all traces make a race


class Tuner:
    """One run on one `Lab`; ``minutes``: that it may take, compiling for a step under way not counted."""

    def __init__(self, lab: Lab, minutes: float, progress: bool = True) -> None:
        self.lab, self.progress = lab, progress
        self.began, self.limit = time.monotonic(), 60 * minutes
        steps = lab.default.decode_steps
        self.default = Tuned(DEFAULT_POLICY, replace(default_grid(platform()), decode_steps=steps))
        self.space = Space(lab, self.default, [
            trace for seed in SEEDS for trace in traces(seed, lab.max_seq_len)])

    def run(self) -> Tuned:
        """What was kept, in the file that it names; the default's own choices when nothing else held."""
        self._measure_default()
        tiles = self._tiles()
        start = self._with_tiles(tiles)
        self._measure(self.lab.table(start), "shapes with these tiles", always=True)
        self._measure(self._wider(start), "more shapes")
        threshold, lengths = sparse_threshold(self.space, start)
        start = Tuned(replace(start.policy, sparse_above_tokens=threshold), start.grid)
        with self._bar(TRIALS, "search") as bar:
            found = search(self.space, start, TRIALS, self.began + SEARCH * self.limit, bar.update)
        finalists = [one for one in found if one != self.default][:FINALISTS]
        predicted = {one: self.space.score(one) for one in finalists}
        winner, heats = self._race(finalists)
        return self._keep(winner, heats, predicted, tiles, lengths)

    # --- measuring

    def _measure_default(self) -> None:
        self._measure(self.lab.table(self.default), "default shapes", always=True)
        self.space.step_seconds = host_seconds(self.lab, self.default, self.space.traces[0])

    def _measure(self, buckets: Iterable[Bucket], what: str, always: bool = False) -> dict[Bucket, Cost]:
        """Costs, as far as time allows; with ``always``, of all of them."""
        usual = self.lab.engine.runner.table[0].precision
        buckets = list(dict.fromkeys(plain(bucket) for bucket in buckets if bucket.precision == usual))
        with self._bar(len(buckets), what) as bar:
            for index, bucket in enumerate(buckets):
                if not always and time.monotonic() > self.began + MEASURE * self.limit:
                    break
                if index % TOGETHER == 0:
                    self.lab.prepare_measuring(buckets[index:index + TOGETHER])
                self.space.costs[bucket] = self.lab.measure(bucket)
                bar.set_postfix_str(f"{bucket}: {1e3 * self.space.costs[bucket].base:.1f} ms")
                bar.update()
        return {bucket: self.space.costs[bucket] for bucket in buckets if bucket in self.space.costs}

    def _tiles(self) -> dict[str, dict[int, dict[Bucket, Cost]]]:
        """By phase and pages at a time, costs of some of the default's buckets."""
        found = {}
        table = [plain(b) for b in self.lab.table(self.default) if b.schedule == FULL]
        for phase, order in (("decode", "rows"), ("prefill", "tokens")):
            own = sorted((b for b in table if b.phase == phase and b in self.space.costs),
                         key=lambda b: (getattr(b, order), b.rows))
            some = [own[0], own[-1]] if phase == "prefill" else [own[0], own[len(own) // 2], own[-1]]
            some = list(dict.fromkeys(some))
            found[phase] = {0: {one: self.space.costs[one] for one in some}}
            for pages in CHUNK_PAGES:
                if pages * PAGE > self.lab.max_seq_len:
                    continue
                costs = self._measure([replace(one, chunk_pages=pages) for one in some], f"{phase} tiles of {pages}")
                if len(costs) == len(some):
                    found[phase][pages] = dict(zip(some, costs.values(), strict=True))
        return found

    def _with_tiles(self, tiles: dict[str, dict[int, dict[Bucket, Cost]]]) -> Tuned:
        grid = self.default.grid
        for phase, measured in tiles.items():
            grid = replace(grid, **{f"{phase}_chunk_pages": best_tile(self.space, phase, measured)})
        return Tuned(self.default.policy, grid)

    def _wider(self, start: Tuned) -> list[Bucket]:
        """The default's shapes with the chosen tiles, and others to choose from."""
        lab, table = self.lab, self.lab.table(start)
        model = next(b for b in table if b.phase == "prefill" and b.schedule == FULL)
        more = [replace(model, rows=rows, tokens=tokens, micro_rows=rows) for rows, tokens in MORE_PREFILL
                if rows <= min(lab.max_batch_size, start.policy.recompute_above_rows) and tokens <= lab.max_seq_len]
        decode = next(b for b in table if b.phase == "decode" and b.schedule == FULL)
        rows = [replace(decode, rows=rows, micro_rows=rows) for rows in DECODE_ROWS if rows <= lab.max_batch_size]
        return [*table, *rows, *more]

    # --- deciding

    def _race(self, finalists: list[Tuned]) -> tuple[Tuned | None, dict[Tuned, Heats]]:
        left = self.began + self.limit - time.monotonic()
        whole = sum(self.space.seconds(self.default, trace) for trace in self.space.traces) / len(SEEDS)
        share = min(1.0, max(0.1, left / (HEATS * whole)))
        heats = [{trace.name: trace for trace in traces(seed, self.lab.max_seq_len, share)} for seed in SEEDS]
        if not finalists:
            return None, {}
        with self._bar(None, "race") as bar:
            def tick(text: str) -> None:
                bar.set_postfix_str(text)
                bar.update()

            for choice in (self.default, *finalists):  # compiled before the clock runs, and run once
                self.lab.run(choice, next(iter(heats[0].values())))
                tick("compiling")
            return race(self.default, finalists, list(heats[0]),
                        lambda choice, name, number: self.lab.run(choice, heats[number % len(SEEDS)][name]),
                        self.began + self.limit, tick=tick)

    def _keep(self, winner: Tuned | None, heats: dict[Tuned, Heats], predicted: dict[Tuned, float],
              tiles: dict[str, dict[int, dict[Bucket, Cost]]], lengths: dict[int, list[float]]) -> Tuned:
        tuned = winner or self.default
        found = {name: {"default_seconds": [own[0] for own in pairs], "seconds": [own[1] for own in pairs],
                        "ratio": heats[winner].ratio(name)}
                 for name, pairs in (heats[winner].pairs.items() if winner else ())}
        others = [{"predicted": 1 / predicted[one], "measured": heats[one].mean, "worst": heats[one].worst,
                   "rounds": heats[one].rounds} for one in heats if heats[one].pairs and one != winner]
        beside = self._beside(tuned, tiles, lengths)
        kept = write(self.lab.path, self.lab.about, tuned, beside, max_batch_size=self.lab.max_batch_size,
                     max_seq_len=self.lab.max_seq_len, accepted=winner is not None, traces=found, others=others,
                     host_seconds_per_step=self.space.step_seconds,
                     step_seconds={str(b) + (f", {b.chunk_pages} pages" if b.chunk_pages else ""): asdict(cost)
                                   for b, cost in self.space.costs.items()},
                     minutes=(time.monotonic() - self.began) / 60)
        self.lab.forget()
        return kept

    def _beside(self, tuned: Tuned, tiles, lengths) -> dict[str, dict]:
        """What was measured for each choice. ``default``: what it would be. ``gain``: predicted, how much slower the
        default's value would make the whole, as a ratio."""
        base = self.default.choices()
        beside = {name: {"default": base[name]} for name, value in tuned.choices().items() if value != base[name]}
        now = [self.space.ratio(tuned, trace) for trace in self.space.traces]
        for name, other in alternatives(tuned, self.default):
            if name in beside:
                try:
                    then = [self.space.ratio(other, trace) for trace in self.space.traces]
                    beside[name]["gain"] = geometric_mean(then) / geometric_mean(now)
                except KeyError:
                    pass

        def ms(phase: str) -> dict[str, list[float]]:
            chunk = getattr(tuned.grid, f"{phase}_chunk_pages")
            return {f"{b.rows}x{b.tokens}": [1e3 * cost.base, 1e3 * cost.seconds(1, self.lab.max_seq_len)]
                    for b, cost in sorted(self.space.costs.items(), key=lambda item: (item[0].rows, item[0].tokens))
                    if (b.phase, b.schedule, b.chunk_pages) == (phase, FULL, chunk)}

        def more(name: str, **facts: object) -> None:
            beside.setdefault(name, {}).update(facts)

        more("decode_rows", ms_short_and_long_context=ms("decode"))
        more("prefill_shapes", ms_short_and_long_context=ms("prefill"))
        for phase, measured in tiles.items():
            more(f"{phase}_chunk_pages", ms_short_and_long_context={
                str(pages): {f"{b.rows}x{b.tokens}": [1e3 * cost.base, 1e3 * cost.seconds(1, self.lab.max_seq_len)]
                             for b, cost in costs.items()} for pages, costs in measured.items()})
        more("decode_steps", ms_first_and_further_token={
            str(b.rows): [1e3 * cost.base, 1e3 * cost.token] for b, cost in self.space.costs.items()
            if (b.phase, b.schedule, b.chunk_pages) == ("decode", FULL, tuned.grid.decode_chunk_pages)})
        more("recompute_above_rows", **recompute_seconds(self.space, tuned))
        if any(b.schedule == SPARSE for b in self.space.costs):
            more("sparse_above_tokens", seconds_full_and_sparse={str(length): both for length, both in lengths.items()})
        return beside

    def _bar(self, total: int | None, what: str) -> tqdm:
        return tqdm(total=total, desc=what, file=sys.stderr, disable=not self.progress, leave=False)


def ratios(tuned: Tuned) -> dict[str, float]:
    """Of a kept result, by trace: above 1 where it was faster than the default."""
    return {name: one["ratio"] for name, one in tuned.measured.get("traces", {}).items()}

