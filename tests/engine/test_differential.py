"""Random requests say in company what they say alone; `scripts/bench/differential.py` runs more, on more engines."""

import dataclasses

import differential_engines
import differential_kinds as kinds
import pytest
from differential_engines import is_tie, run_alone
from random_requests import CONFIG, Case

from qwen_jax import SamplingParams
from qwen_jax.engine.scheduling.scheduler import Scheduler
from qwen_jax.engine.scheduling.speculation import Speculation

GUESSING = next(kind for kind in kinds.KINDS if kind.name == "n-gram")
WHOLE = {"layers_per_program": CONFIG.num_layers}  # steps of one program, which run faster
KIND = dataclasses.replace(GUESSING, options=GUESSING.options | WHOLE, alone=WHOLE)


@pytest.fixture(autouse=True)
def always_guess(monkeypatch):
    """Check even the worst guesses."""
    monkeypatch.setattr(Speculation, "_cost", lambda self: 0.0)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


def test_random_requests_say_what_they_say_alone(adapters):
    """Batched, cut into chunks, preempted, guessed, with shared prefixes and adapters."""
    result = kinds.check(KIND, adapters, 50)
    assert not result.problems and not result.comparison.ties
    assert result.comparison.largest > 0, "other shapes of steps round otherwise, or nothing is compared"
    assert len(result.sorts) > 20


def test_a_page_of_another_sequence_is_noticed(adapters, monkeypatch):
    admit = Scheduler._admit

    def admit_wrongly(self, seq, kept, batch_size):
        admit(self, seq, kept, batch_size)
        others = [other.pages[0] for other in self.running if other.pages and other.pages[0] not in seq.pages]
        if others:
            self.pool.free(seq.pages[:1])
            self.pool.share(others[:1])
            seq.pages[0] = others[0]

    monkeypatch.setattr(Scheduler, "_admit", admit_wrongly)
    monkeypatch.setattr(differential_engines, "TIE_TRIALS", 1)
    comparison = kinds.check(KIND, adapters, 5).comparison
    assert comparison.differences and not comparison.ties


def test_tied_candidates_are_told_from_others(adapters):
    engine = KIND.engine_alone(adapters)
    case = Case(1, [5, 6, 7], SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, seed=0))
    (first, most), (second, less) = run_alone(engine, case)[0].output.logprobs[0].items()
    assert most - less > 0.01 and not is_tie(engine, case, 0, [second])
    tied = dataclasses.replace(case, params=dataclasses.replace(case.params, logit_bias={second: most - less}))
    assert is_tie(engine, tied, 0, [first]) and is_tie(engine, tied, 0, [second])
