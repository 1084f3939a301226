"""Runs of random requests one at a time and all at once, on engines of every kind, and the differences between them.

Tolerance: log-probabilities and embeddings of float32 engines differ by the order of sums, which other shapes of a step
change: by 8e-6 at most in 4,000 requests (two seeds of `scripts/bench/differential.py`). `TOLERANCE` is 1e-4.
Adapters must not make the model amplify rounding: with matrices of three times the size, single log-probabilities of a
plain engine's own prefill and decode differed by 4e-4. Where another token was chosen, the request alone is tried again
with its logits moved at random by at most `TIE`: if it then chooses that token, the two were tied within rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from random_requests import ADAPTERS, Case

from qwen_jax import Engine, UserError
from qwen_jax.engine.api.outputs import RequestOutput
from qwen_jax.engine.api.sampling_params import MAX_LOGIT_BIAS
from qwen_jax.engine.frontend.request import Request

TOLERANCE = 1e-4
TIE, TIE_TRIALS = 2e-5, 32


@dataclass(frozen=True)
class Answer:
    """A request's output, and what its deltas say together. refused: the sentence of a request that was refused."""

    output: RequestOutput | None = None
    text: str = ""
    token_ids: tuple[int, ...] = ()
    refused: str = ""

    @classmethod
    def of(cls, request: Request) -> Answer:
        deltas = request.deltas
        return cls(request.output, "".join(delta.text for delta in deltas),
                   tuple(token for delta in deltas for token in delta.token_ids))


def run_alone(engine: Engine, case: Case) -> list[Answer]:
    """Answer a case, one answer after the other, in an engine that has nothing else to do."""
    try:
        requests = case.requests(engine)
    except UserError as error:
        return [Answer(refused=str(error))]
    for request in requests:
        engine.core.complete([request])
    return [Answer.of(request) for request in requests]


def run_together(engine: Engine, cases: Sequence[Case], seed: int, on_end: Callable[[], object] = lambda: None
                 ) -> list[list[Answer]]:
    """Answer cases that arrive at random times, in bursts, while others run. on_end: called at the end of each."""
    rng, core = random.Random(seed), engine.core
    coming, answers = list(enumerate(cases)), [[] for _ in cases]
    running: list[tuple[int, list[Request]]] = []
    while coming or running:
        if coming and (not running or rng.random() < 0.25):
            for index, case in [coming.pop(0) for _ in range(min(len(coming), rng.choice((1, 2, 3, 12))))]:
                try:
                    running.append((index, case.requests(engine)))
                    core.submit(running[-1][1])
                except UserError as error:
                    answers[index] = [Answer(refused=str(error))]
        core.step()
        for index, requests in running:
            leaves = cases[index].abort_after
            for request in requests:
                if leaves is not None and len(request.sequence.output) >= leaves and rng.random() < 0.5:
                    core.abort(request.sequence.request_id)
            if all(request.closed for request in requests):
                answers[index] = [Answer.of(request) for request in requests]
                on_end()
        running = [item for item in running if not answers[item[0]]]
    return answers


# --- comparison


@dataclass
class Comparison:
    """Result of comparing the cases of a kind of engine.

    Attributes:
      differences: a sentence for each answer that differs. ties: of those, answers whose tokens were tied.
      largest: largest difference of two log-probabilities or embeddings.
    """

    tolerance: float = TOLERANCE
    answers: int = 0
    differences: list[str] = field(default_factory=list)
    ties: list[str] = field(default_factory=list)
    largest: float = 0.0

    def add(self, engine: Engine, case: Case, alone: Sequence[Answer], together: Sequence[Answer]) -> None:
        """Compare a case's answers. engine: the one that answered it alone."""
        if len(alone) != len(together):
            self.differences.append(f"{len(together)} answers, alone {len(alone)}: {case}")
            return
        for index, (mine, theirs) in enumerate(zip(together, alone, strict=True)):
            self.answers += 1
            tied = False
            if mine.output and theirs.output and (place := _first_other_token(mine.output, theirs.output)) is not None:
                tied = is_tie(engine, case, index, mine.output.token_ids[: place + 1])
            if problem := self._problem(mine, theirs):
                (self.ties if tied else self.differences).append(f"{problem}: answer {index} of {case}")

    def _problem(self, mine: Answer, theirs: Answer) -> str | None:
        """Return what differs between the answer in company and the answer alone."""
        if mine.refused or theirs.refused:
            return None if mine.refused == theirs.refused else f"refused {mine.refused!r}, alone {theirs.refused!r}"
        one, other = mine.output, theirs.output
        count = len(one.token_ids)
        left = one.finish_reason == "abort"
        if (place := _first_other_token(one, other)) is not None or (not left and count != len(other.token_ids)):
            return f"tokens {one.token_ids}, alone {other.token_ids}, first at {place}"
        if one.text != mine.text or tuple(one.token_ids) != mine.token_ids:
            return f"deltas {mine.text!r} {mine.token_ids} of {one.text!r} {one.token_ids}"
        if not left and (one.text, one.finish_reason, one.error) != (other.text, other.finish_reason, other.error):
            return (f"{one.text!r}, {one.finish_reason}, {one.error}, alone {other.text!r}, {other.finish_reason}, "
                    f"{other.error}")
        if left and one.error or count > len(other.token_ids):
            return f"{count} tokens and error {one.error} of an aborted answer, alone {len(other.token_ids)}"
        return self._other_numbers(one, other)

    def _other_numbers(self, one: RequestOutput, other: RequestOutput) -> str | None:
        """Return which log-probabilities or embeddings differ by more than the tolerance."""
        left = one.finish_reason == "abort"
        for name in ("logprobs", "prompt_logprobs", "embedding"):
            mine, theirs = getattr(one, name), getattr(other, name)
            if left and name != "logprobs":
                continue  # an answer that was aborted in its prefill may lack them
            if (mine is None) != (theirs is None):
                return f"{name} {mine}, alone {theirs}"
            if mine is None:
                continue
            gap = np.abs(mine - theirs).max() if name == "embedding" else _largest_gap(mine, theirs[: len(mine)])
            self.largest = max(self.largest, float(gap))
            if not gap <= self.tolerance:
                return f"{name} differ by {gap:.2e}"
        return None


def _first_other_token(one: RequestOutput, other: RequestOutput) -> int | None:
    """Return the first place at which two answers have different tokens; None where the shorter begins the longer."""
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
    return next((place for place, (mine, theirs) in pairs if mine != theirs), None)


def _largest_gap(mine: list, theirs: list) -> float:
    """Return the largest difference of two answers' log-probabilities; infinite where others are listed.

    The least likely of the listed ids may be others where two are alike: their values are compared.
    """
    worst = 0.0
    for ours, others in zip(mine, theirs, strict=True):
        if (ours is None) != (others is None) or len(ours or ()) != len(others or ()):
            return float("inf")
        for token in (ours or {}).keys() & (others or {}).keys():
            worst = max(worst, abs(ours[token] - others[token]))
        for a, b in zip(sorted((ours or {}).values()), sorted((others or {}).values()), strict=True):
            worst = max(worst, abs(a - b))
    return worst


def is_tie(engine: Engine, case: Case, index: int, tokens: Sequence[int], size: float = TIE) -> bool:
    """Return whether a case alone gives these tokens too once its logits move by at most ``size``.

    index: number of the answer. All that the sampler does with the logits counts: penalties, thresholds, the draw.
    """
    rng, vocab = np.random.default_rng(0), engine.config.vocab_size
    assert vocab <= MAX_LOGIT_BIAS, "every logit has to move"
    own = dict(case.params.logit_bias or {})
    for _ in range(TIE_TRIALS):
        noise = rng.uniform(-size, size, engine.input_processor.vocab_limit)
        bias = {token: float(np.clip(own.get(token, 0.0) + x, -100, 100)) for token, x in enumerate(noise)}
        params = replace(case.params, logit_bias=bias, n=1, seed=((case.params.seed or 0) + index) % 2**64,
                         max_tokens=len(tokens), min_tokens=min(case.params.min_tokens or 0, len(tokens)))
        answer, = run_alone(engine, replace(case, params=params))
        if answer.output and answer.output.token_ids[: len(tokens)] == list(tokens):
            return True
    return False


def left_behind(engine: Engine) -> list[str]:
    """Return what an engine without requests still holds: pages, sequences, adapters, compilations after its start."""
    stats, schedulers = engine.stats(), [replica.scheduler for replica in engine.deployment.replicas]
    found = {
        "pages": stats.pages_used, "sequences": sum(scheduler.num_sequences for scheduler in schedulers),
        "16-bit pages": sum(s.wide_pool.capacity - s.wide_pool.num_free for s in schedulers if s.wide_pool),
        "slots": sum(scheduler.limits.max_batch_size - scheduler.free_slots for scheduler in schedulers),
        "compilations": stats.compiles_after_warmup, "open requests": len(engine.core.versions_in_use()),
    }
    for name in ADAPTERS:
        try:
            engine.unload_adapter(name)
        except UserError:
            found[f"uses of the adapter {name}"] = 1
    return [f"{count} {name}" for name, count in found.items() if count]
