"""From measured costs to a few promising choices: the scheduler is simulated with each of them."""

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
from qwen_jax.tuning.engine_bench import Lab, plain
from qwen_jax.tuning.scheduler_simulation import simulate
from qwen_jax.tuning.step_costs import Cost
from qwen_jax.tuning.workloads import Trace

DECODE_ROWS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MORE_PREFILL = ((1, 128), (2, 64), (4, 64), (2, 128), (16, 64), (8, 128))  # beside the default's
CHUNK_PAGES = (1, 2, 4, 16)  # beside the kernel's own numbers
STEPS = (1, 4, 8, 16, 32)
OVERHEAD_TOKENS = (16, 32, 64, 128, 256)
WORTH = 0.01  # of the time: a choice that gains less stays as it was
WORST = 3.0  # how much a trace that gets slower weighs against the mean


@dataclass
class Space:
    """What may be chosen, as far as it has been measured.

    Attributes:
      default: what an engine does untuned. costs: of buckets (`plain`).
      step_seconds: of the host, per step.
    """

    lab: Lab
    default: Tuned
    traces: list[Trace]
    step_seconds: float = 0.0
    costs: dict[Bucket, Cost] = field(default_factory=dict)
    _base: dict[Trace, float] = field(default_factory=dict)

    def seconds(self, tuned: Tuned, trace: Trace) -> float:
        """Predicted. KeyError for a bucket that has not been measured, UserError for what cannot be."""
        lab, table = self.lab, self.lab.table(tuned)
        costs = {bucket: self.costs[plain(bucket)] for bucket in table if plain(bucket) in self.costs}
        return simulate(trace, table, lab.limits(tuned), tuned.policy, lab.num_pages, costs, self.step_seconds)

    def ratio(self, tuned: Tuned, trace: Trace) -> float:
        """Predicted seconds, the default's being 1."""
        if trace not in self._base:
            self._base[trace] = self.seconds(self.default, trace)
        return self.seconds(tuned, trace) / self._base[trace]

    def score(self, tuned: Tuned) -> float:
        """The lower the better."""
        return score([self.ratio(tuned, trace) for trace in self.traces])


def score(ratios: Sequence[float]) -> float:
    """The mean, and a penalty for the trace that gains least, if it loses."""
    return geometric_mean(ratios) + WORST * max(0.0, max(ratios) - 1)


# --- one choice after another


def scaled(cost: Cost, like: Cost, to: Cost) -> Cost:
    """``cost`` as much larger or smaller as ``to`` is than ``like``."""
    def one(name: str) -> float:
        old, new, value = (getattr(one, name) for one in (like, to, cost))
        return value * new / old if old else value

    return Cost(one("base"), one("token"), one("context"), cost.short)


def best_tile(space: Space, phase: str, measured: dict[int, dict[Bucket, Cost]]) -> int:
    """Pages of keys at a time for a phase. ``measured``: by number of pages, costs of some of the default's buckets,
    these as keys; 0 is the kernel's own. Other buckets are taken to change as the measured one nearest in rows."""
    def costs(pages: int) -> dict[Bucket, Cost]:
        changed = {}
        for bucket, cost in space.costs.items():
            if bucket.phase == phase and bucket.schedule != SPARSE and bucket.chunk_pages == 0:
                near = min(measured[0], key=lambda one: abs(one.rows * one.tokens - bucket.rows * bucket.tokens))
                changed[bucket] = scaled(cost, measured[0][near], measured[pages][near])
        return space.costs | changed

    def total(pages: int) -> float:
        trial = replace(space, costs=costs(pages), _base=space._base)
        return geometric_mean([trial.ratio(space.default, trace) if pages else 1.0 for trace in space.traces])

    for trace in space.traces:
        space.ratio(space.default, trace)  # the denominators, by the kernel's own numbers
    best = min(measured, key=total)
    return best if total(best) < 1 - WORTH else 0


def sparse_threshold(space: Space, tuned: Tuned, answer: int = 64) -> tuple[int, dict[int, list[float]]]:
    """Up to how many tokens full attention is at least as fast as sparse, from the default's threshold on; and, by
    length, predicted seconds of a prompt and ``answer`` tokens with full and with sparse attention."""
    limits, policy = space.lab.limits(tuned), tuned.policy
    least, seconds = policy.sparse_above_tokens, {}
    if limits.max_seq_len <= least:
        return least, seconds
    shapes = {FULL: limits.prefill_shapes, SPARSE: limits.sparse_prefill_shapes}
    rows = {FULL: limits.decode_rows, SPARSE: limits.sparse_decode_rows}
    table = space.lab.table(tuned)

    def cost(phase: str, attention: str, shape: tuple[int, int]) -> Cost:
        return next(space.costs[plain(b)] for b in table
                    if (b.phase, b.schedule, b.rows, b.tokens) == (phase, attention, *shape))

    def took(attention: str, length: int) -> float:
        chunk = max(tokens for one, tokens in shapes[attention] if one == 1)
        prefill = cost("prefill", attention, (1, chunk))
        decode = cost("decode", attention, (rows[attention][0], 1))
        return sum(prefill.seconds(1, at) for at in range(0, length, chunk)) + decode.seconds(answer, length)

    found = least
    for pages in range(pages_for(least) + 4, pages_for(limits.max_seq_len - answer) + 1, 4):
        seconds[pages * PAGE] = [took(FULL, pages * PAGE), took(SPARSE, pages * PAGE)]
    for length, (full, sparse) in seconds.items():
        if full > sparse:
            break
        found = length
    return found, seconds


# --- all others together


def search(space: Space, start: Tuned, trials: int, deadline: float, tick: Callable[[], None] = lambda: None,
           seed: int = 0) -> list[Tuned]:
    """Choices in ascending order of their predicted `score`, each simplified, ``start`` among them.

    Optuna's TPE proposes, and its successive halving gives up what a part of the traces shows to be worse.
    deadline: of ``time.monotonic``.
    """
    try:
        import optuna
    except ModuleNotFoundError:
        raise UserError("tuning needs the package optuna: pip install 'qwen-jax[tune]'") from None

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), pruner=pruner)
    rows = sorted({b.rows for b in space.costs if (b.phase, b.schedule, b.chunk_pages, b.tokens) == (
        "decode", FULL, start.grid.decode_chunk_pages, 1)})
    shapes = sorted({(b.rows, b.tokens) for b in space.costs if (b.phase, b.schedule, b.chunk_pages) == (
        "prefill", FULL, start.grid.prefill_chunk_pages)})
    most = space.lab.max_batch_size
    found: dict[Tuned, float] = {start: space.score(start)}

    def propose(trial: Any) -> Tuned:
        cap = trial.suggest_categorical("most_rows", rows[1:] or rows)
        kept = [one for one in rows if one < cap and (one == rows[0] or trial.suggest_categorical(f"rows_{one}", [
            True, False]))]
        threshold = DEFAULT_POLICY.recompute_above_rows
        if most > threshold:
            threshold = trial.suggest_categorical("recompute_above_rows", [threshold, most])
        prefill = tuple((count, tokens) for count, tokens in shapes if count == 1 and tokens == PAGE
                        or trial.suggest_categorical(f"shape_{count}x{tokens}", [True, False]))
        grid = replace(start.grid, decode_rows=(*kept, cap), prefill_shapes=prefill,
                       decode_steps=trial.suggest_categorical("decode_steps", STEPS),
                       step_overhead_tokens=trial.suggest_categorical("step_overhead_tokens", OVERHEAD_TOKENS))
        return Tuned(replace(start.policy, recompute_above_rows=threshold), grid)

    grid = start.grid
    study.enqueue_trial({"most_rows": min(rows[-1], grid.decode_rows[-1]), "decode_steps": grid.decode_steps,
                         "step_overhead_tokens": grid.step_overhead_tokens,
                         "recompute_above_rows": start.policy.recompute_above_rows}
                        | {f"rows_{one}": one in grid.decode_rows for one in rows}
                        | {f"shape_{r}x{t}": (r, t) in grid.prefill_shapes for r, t in shapes})
    for _ in range(trials):
        if time.monotonic() > deadline:
            break
        trial = study.ask()
        try:
            tuned, ratios = propose(trial), []
            for step, trace in enumerate(space.traces, 1):
                ratios.append(space.ratio(tuned, trace))
                trial.report(score(ratios), step)
                if trial.should_prune():
                    break
            if len(ratios) == len(space.traces):
                found[tuned] = score(ratios)
            study.tell(trial, score(ratios), skip_if_finished=True)
        except (UserError, KeyError):  # an impossible combination, or one that was not measured
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        tick()
    best = sorted(found, key=found.__getitem__)[:8]
    simple = {one: space.score(one) for one in [simplified(space, one) for one in best[:4]] + best}
    return sorted(simple, key=lambda one: round(simple[one], 4))  # of those alike the simplified first


def alternatives(tuned: Tuned, default: Tuned) -> Iterator[tuple[str, Tuned]]:
    """``tuned`` with one choice as in the default; and with one shape or number of rows less, each by its name."""
    for part, kind in (("policy", SchedulePolicy), ("grid", Grid)):
        own, other = getattr(tuned, part), getattr(default, part)
        for one in fields(kind):
            value = getattr(other, one.name)
            if getattr(own, one.name) != value:
                try:
                    yield one.name, Tuned(**{"policy": tuned.policy, "grid": tuned.grid}
                                          | {part: replace(own, **{one.name: value})})
                except UserError:
                    continue
    for name in ("decode_rows", "prefill_shapes"):
        own = getattr(tuned.grid, name)
        for item in own[:-1] if name == "decode_rows" else own:
            if item not in getattr(default.grid, name):
                fewer = tuple(one for one in own if one != item)
                yield f"{name} {item}", Tuned(tuned.policy, replace(tuned.grid, **{name: fewer}))


def simplified(space: Space, tuned: Tuned) -> Tuned:
    """Without what gains less than `WORTH`."""
    now, changed = space.score(tuned), True
    while changed:
        changed = False
        for _, other in alternatives(tuned, space.default):
            try:
                value = space.score(other)
            except (UserError, KeyError):
                continue
            if value <= now * (1 + WORTH):
                tuned, now, changed = other, min(now, value), True
                break
    return tuned


def recompute_seconds(space: Space, tuned: Tuned) -> dict[str, float]:
    """Milliseconds per prompt token of the largest recompute bucket, and of the best one with fewer rows."""
    costs = {b: c.base / (b.rows * b.tokens) for b, c in space.costs.items() if b.phase == "prefill"}
    of = {schedule: [value for b, value in costs.items() if b.schedule == schedule] for schedule in (RECOMPUTE, FULL)}
    return {f"ms_per_token_{name}": 1e3 * min(values) for name, values in of.items() if values}
