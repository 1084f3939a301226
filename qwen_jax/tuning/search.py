"""Search for promising tuning choices (shapes of steps, thresholds) by predicted times of request traces.

The times are predicted from measured costs of steps by simulating the scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from statistics import geometric_mean
from typing import Any

from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.scheduling.buckets import PAGE, Bucket, Grid, pages_for
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY, FULL, RECOMPUTE, SPARSE, SchedulePolicy
from qwen_jax.errors import UserError
from qwen_jax.tuning.engine_bench import EngineBench, cost_key
from qwen_jax.tuning.scheduler_simulation import simulate
from qwen_jax.tuning.step_costs import Cost
from qwen_jax.tuning.workloads import Trace

DECODE_ROWS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MORE_PREFILL = ((1, 128), (2, 64), (4, 64), (2, 128), (16, 64), (8, 128))  # in addition to the default's shapes
CHUNK_PAGES = (1, 2, 4, 16)  # in addition to the kernel's own number
STEPS = (1, 4, 8, 16, 32)
OVERHEAD_TOKENS = (16, 32, 64, 128, 256)
MIN_GAIN = 0.01  # share of the time; a choice that gains less stays as in the default
LOSS_WEIGHT = 3.0  # weight of a trace that gets slower against the mean of all traces
ANSWER_TOKENS = 64  # length of the answers for which the sparse threshold is chosen


@dataclass
class Space:
    """Measured costs of steps, and predictions from them of how long request traces take under given tuning choices.

    Attributes:
      bench: the engine that is tuned.
      default: the choices of an engine without tuning.
      traces: the traces to predict.
      step_seconds: the host's seconds per step.
      costs: measured cost of each bucket, by `cost_key`.
    """

    bench: EngineBench
    default: Tuned
    traces: list[Trace]
    step_seconds: float = 0.0
    costs: dict[Bucket, Cost] = field(default_factory=dict)
    _base: dict[Trace, float] = field(default_factory=dict)

    def seconds(self, tuned: Tuned, trace: Trace) -> float:
        """Predict the seconds that the engine takes to answer a trace under these tuning choices.

        Raises KeyError for a bucket that has not been measured, UserError for choices that no engine could run.
        """
        bench, table = self.bench, self.bench.table(tuned)
        costs = {bucket: self.costs[cost_key(bucket)] for bucket in table if cost_key(bucket) in self.costs}
        return simulate(trace, table, bench.limits(tuned), tuned.policy, num_pages=bench.num_pages, costs=costs,
                        step_seconds=self.step_seconds)

    def ratio(self, tuned: Tuned, trace: Trace) -> float:
        """Predict a trace's seconds under these tuning choices, as a multiple of those under the default's."""
        if trace not in self._base:
            self._base[trace] = self.seconds(self.default, trace)
        return self.seconds(tuned, trace) / self._base[trace]

    def score(self, tuned: Tuned) -> float:
        """Return the `score` of these tuning choices, predicted over all traces: the lower, the faster."""
        return score([self.ratio(tuned, trace) for trace in self.traces])


def score(ratios: Sequence[float]) -> float:
    """Return the mean of a choice's seconds relative to the default's, plus a penalty when the worst trace gets slower.

    ratios: the choice's seconds as a multiple of the default's, one for each trace.
    """
    return geometric_mean(ratios) + LOSS_WEIGHT * max(0.0, max(ratios) - 1)


# --- one choice after another


def scaled(cost: Cost, like: Cost, to: Cost) -> Cost:
    """Return ``cost`` with each part (base, token, context) multiplied by that part's ratio of ``to`` to ``like``."""
    def part(name: str) -> float:
        old, new, value = (getattr(source, name) for source in (like, to, cost))
        return value * new / old if old else value

    return Cost(part("base"), part("token"), part("context"), cost.short)


def best_tile(space: Space, phase: str, measured: dict[int, dict[Bucket, Cost]]) -> int:
    """Return the fastest number of pages of keys for attention to load at a time; 0 is the kernel's own number.

    phase: "prefill" or "decode". measured: number of pages -> costs of some of the default's buckets. Other buckets are
    assumed to change in proportion to the measured bucket that is nearest in size.
    """
    def costs(pages: int) -> dict[Bucket, Cost]:
        changed = {}
        for bucket, cost in space.costs.items():
            if bucket.phase == phase and bucket.schedule != SPARSE and bucket.chunk_pages == 0:
                near = min(measured[0], key=lambda b: abs(b.rows * b.tokens - bucket.rows * bucket.tokens))
                changed[bucket] = scaled(cost, measured[0][near], measured[pages][near])
        return space.costs | changed

    def total(pages: int) -> float:
        trial = replace(space, costs=costs(pages), _base=space._base)
        return geometric_mean([trial.ratio(space.default, trace) if pages else 1.0 for trace in space.traces])

    for trace in space.traces:
        space.ratio(space.default, trace)  # caches the denominators, with the kernel's own number of pages
    best = min(measured, key=total)
    return best if total(best) < 1 - MIN_GAIN else 0


def sparse_threshold(space: Space, tuned: Tuned) -> tuple[int, dict[int, list[float]]]:
    """Return the prompt length in tokens up to which full attention is as fast as sparse.

    It is at least the default's threshold. Also returns by prompt length the predicted seconds [full, sparse] of the
    prompt and `ANSWER_TOKENS` tokens.
    """
    limits, policy = space.bench.limits(tuned), tuned.policy
    least, seconds = policy.sparse_above_tokens, {}
    if limits.max_seq_len <= least:
        return least, seconds
    shapes = {FULL: limits.prefill_shapes, SPARSE: limits.sparse_prefill_shapes}
    rows = {FULL: limits.decode_rows, SPARSE: limits.sparse_decode_rows}
    table = space.bench.table(tuned)

    def cost(phase: str, attention: str, shape: tuple[int, int]) -> Cost:
        return next(space.costs[cost_key(b)] for b in table
                    if (b.phase, b.schedule, b.rows, b.tokens) == (phase, attention, *shape))

    def predicted(attention: str, length: int) -> float:
        chunk = max(tokens for count, tokens in shapes[attention] if count == 1)
        prefill = cost("prefill", attention, (1, chunk))
        decode = cost("decode", attention, (rows[attention][0], 1))
        return sum(prefill.seconds(1, at) for at in range(0, length, chunk)) + decode.seconds(ANSWER_TOKENS, length)

    threshold = least
    for pages in range(pages_for(least) + 4, pages_for(limits.max_seq_len - ANSWER_TOKENS) + 1, 4):
        seconds[pages * PAGE] = [predicted(FULL, pages * PAGE), predicted(SPARSE, pages * PAGE)]
    for length, (full, sparse) in seconds.items():
        if full > sparse:
            break
        threshold = length
    return threshold, seconds


# --- all others together


def search(space: Space, start: Tuned, trials: int, deadline: float, tick: Callable[[], None] = lambda: None
           ) -> list[Tuned]:
    """Search for tuning choices with a low predicted `score`; return the best ones, each simplified, and ``start``.

    The result is in ascending order of the score. Optuna's TPE proposes choices, and its successive halving gives up
    choices that a part of the traces shows to be worse. deadline: a time of ``time.monotonic``. tick is called after
    every trial.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("tuning needs the package optuna: pip install 'qwen-jax[tune]'") from None

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=pruner)
    proposals = _Proposals(space, start)
    study.enqueue_trial(proposals.start_parameters())
    scores: dict[Tuned, float] = {start: space.score(start)}
    for _ in range(trials):
        if time.monotonic() > deadline:
            break
        trial = study.ask()
        try:
            tuned, ratios = proposals.propose(trial), []
            for step, trace in enumerate(space.traces, 1):
                ratios.append(space.ratio(tuned, trace))
                trial.report(score(ratios), step)
                if trial.should_prune():
                    break
            if len(ratios) == len(space.traces):
                scores[tuned] = score(ratios)
            study.tell(trial, score(ratios), skip_if_finished=True)
        except (UserError, KeyError):  # an impossible combination, or a bucket without a measured cost
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        tick()
    best = sorted(scores, key=scores.__getitem__)[:8]
    candidates = {tuned: space.score(tuned) for tuned in [simplified(space, tuned) for tuned in best[:4]] + best}
    return sorted(candidates, key=lambda tuned: round(candidates[tuned], 4))  # of equal ones the simplified first


class _Proposals:
    """Tuning choices that Optuna combines: decode rows and prefill shapes with a measured cost, steps and thresholds.

    Everything else, such as how many pages attention loads at a time, is as in ``start``.
    """

    def __init__(self, space: Space, start: Tuned) -> None:
        self.start, self.max_rows = start, space.bench.max_batch_size
        grid = start.grid
        self.rows = sorted({b.rows for b in space.costs if (b.phase, b.schedule, b.chunk_pages, b.tokens) == (
            "decode", FULL, grid.decode_chunk_pages, 1)})
        self.shapes = sorted({(b.rows, b.tokens) for b in space.costs if (b.phase, b.schedule, b.chunk_pages) == (
            "prefill", FULL, grid.prefill_chunk_pages)})

    def start_parameters(self) -> dict[str, Any]:
        """Return the parameters of the Optuna trial that proposes ``start``."""
        grid, policy = self.start.grid, self.start.policy
        return {"most_rows": min(self.rows[-1], grid.decode_rows[-1]), "decode_steps": grid.decode_steps,
                "step_overhead_tokens": grid.step_overhead_tokens, "recompute_above_rows": policy.recompute_above_rows,
                **{f"rows_{rows}": rows in grid.decode_rows for rows in self.rows},
                **{f"shape_{rows}x{tokens}": (rows, tokens) in grid.prefill_shapes for rows, tokens in self.shapes}}

    def propose(self, trial: Any) -> Tuned:
        """Return the tuning choices of an Optuna trial. UserError for a combination that no engine could run."""
        cap = trial.suggest_categorical("most_rows", self.rows[1:] or self.rows)
        fewer = [rows for rows in self.rows if rows < cap and (
            rows == self.rows[0] or trial.suggest_categorical(f"rows_{rows}", [True, False]))]
        threshold = DEFAULT_POLICY.recompute_above_rows
        if self.max_rows > threshold:
            threshold = trial.suggest_categorical("recompute_above_rows", [threshold, self.max_rows])
        prefill = tuple((rows, tokens) for rows, tokens in self.shapes if rows == 1 and tokens == PAGE
                        or trial.suggest_categorical(f"shape_{rows}x{tokens}", [True, False]))
        grid = replace(self.start.grid, decode_rows=(*fewer, cap), prefill_shapes=prefill,
                       decode_steps=trial.suggest_categorical("decode_steps", STEPS),
                       step_overhead_tokens=trial.suggest_categorical("step_overhead_tokens", OVERHEAD_TOKENS))
        return Tuned(replace(self.start.policy, recompute_above_rows=threshold), grid)


def alternatives(tuned: Tuned, default: Tuned) -> Iterator[tuple[str, Tuned]]:
    """Yield (name, variant of ``tuned``): with one choice as in the default, or without one shape or row count."""
    for part, kind in (("policy", SchedulePolicy), ("grid", Grid)):
        own, other = getattr(tuned, part), getattr(default, part)
        for choice in fields(kind):
            value = getattr(other, choice.name)
            if getattr(own, choice.name) != value:
                try:
                    yield choice.name, Tuned(**{"policy": tuned.policy, "grid": tuned.grid}
                                             | {part: replace(own, **{choice.name: value})})
                except UserError:
                    continue
    for name in ("decode_rows", "prefill_shapes"):
        own = getattr(tuned.grid, name)
        for item in own[:-1] if name == "decode_rows" else own:
            if item not in getattr(default.grid, name):
                fewer = tuple(kept for kept in own if kept != item)
                yield f"{name} {item}", Tuned(tuned.policy, replace(tuned.grid, **{name: fewer}))


def simplified(space: Space, tuned: Tuned) -> Tuned:
    """Return ``tuned`` without the choices that gain less than `MIN_GAIN` over the default's."""
    now, changed = space.score(tuned), True
    while changed:
        changed = False
        for _, other in alternatives(tuned, space.default):
            try:
                value = space.score(other)
            except (UserError, KeyError):
                continue
            if value <= now * (1 + MIN_GAIN):
                tuned, now, changed = other, min(now, value), True
                break
    return tuned


def recompute_costs(space: Space) -> dict[str, float]:
    """Return the milliseconds per token of the best prefill bucket under the recompute and the full schedule."""
    costs = {b: c.base / (b.rows * b.tokens) for b, c in space.costs.items() if b.phase == "prefill"}
    by_schedule = {name: [value for b, value in costs.items() if b.schedule == name] for name in (RECOMPUTE, FULL)}
    return {f"ms_per_token_{name}": 1e3 * min(values) for name, values in by_schedule.items() if values}
