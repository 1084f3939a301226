"""Choices of decode steps, and what is learnt from their costs."""

import pytest

from qwen_jax import Engine, SamplingParams
from qwen_jax.engine.scheduling.buckets import Bucket
from qwen_jax.engine.scheduling.decode_adaptation import Choice, DecodeAdaptation
from qwen_jax.engine.scheduling.schedule_policy import FULL
from qwen_jax.engine.scheduling.sequence import PlannedRow, Sequence, StepPlan
from qwen_jax.errors import UserError

ROWS = (2, 8, 16, 32, 64)


def plan(bucket_rows, rows, count, phase="decode"):
    seqs = [Sequence(index, [1], 100) for index in range(rows)]
    return StepPlan(Bucket(phase, FULL, bucket_rows, 1, 4, steps=8), [PlannedRow(s, 1, count, True) for s in seqs])


def test_the_default_comes_first_and_others_are_narrower_or_shorter():
    adaptation = DecodeAdaptation(ROWS, 8, 0.05)
    assert adaptation.choices(40, False) == tuple(Choice(*size) for size in (
        (64, 8), (64, 1), (32, 8), (32, 1), (16, 8), (16, 1)))
    assert adaptation.choices(40, True) == (Choice(64, 1), Choice(32, 1), Choice(16, 1))
    assert adaptation.choices(1, False) == (Choice(2, 8), Choice(2, 1))
    assert adaptation.choices(1000, True)[0] == Choice(64, 1)


def test_one_shape_leaves_only_the_length_of_a_dispatch():
    assert DecodeAdaptation((64,), 8, 0.05).choices(3, False) == (Choice(64, 8), Choice(64, 1))


def drive(adaptation, seconds, decoding=64, steps=400):
    """Let decode steps take ``seconds(rows, steps)``. Return (choice, seconds, tokens) of each."""
    taken = []
    for _ in range(steps):
        choice = adaptation.choose(decoding, False)
        rows = min(choice.rows, decoding)
        took = seconds(choice.rows, choice.steps)
        adaptation.record(plan(choice.rows, rows, choice.steps), took)
        taken.append((choice, took, rows * choice.steps))
    return taken


def test_it_learns_that_half_as_many_rows_are_faster():
    def seconds(rows, steps):
        return (1e-3 + 1e-4 * rows * (2 if rows == 64 else 1)) * steps

    taken = drive(DecodeAdaptation(ROWS, 8, 0.05), seconds)
    assert sum(choice.rows < 64 for choice, *_ in taken[-100:]) > 80
    assert sum(took for _, took, _ in taken) / sum(tokens for *_, tokens in taken) < 0.8 * seconds(64, 3) / (64 * 3)


def test_no_choice_makes_a_dispatch_longer():
    taken = drive(DecodeAdaptation(ROWS, 8, 0.05), lambda rows, steps: 2.5e-4 * rows * steps)
    assert all(took <= 0.05 + 1e-9 or choice.steps == 1 for choice, took, _ in taken)
    assert max(choice.steps for choice, *_ in taken) > 1


def test_prefills_teach_nothing():
    adaptation = DecodeAdaptation(ROWS, 8, 0.05)
    adaptation.choose(64, False)
    adaptation.record(plan(64, 64, 1, "prefill"), 1.0)
    assert adaptation.report() == {"64 rows": {}}
    adaptation.record(plan(64, 64, 1), 1.0)  # of a step that it did not choose
    assert adaptation.report() == {"64 rows": {}}


def test_an_engine_that_adapts_says_the_same():
    options = {"max_batch_size": 4, "max_seq_len": 128, "dtype": "float32", "tokenizer": None, "progress": False}
    prompts = [[(7 * i + j) % 900 for j in range(5 + i)] for i in range(6)]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    plain = Engine.from_pretrained("bundled", **options)
    adapting = Engine.from_pretrained("bundled", adapt=True, **options)
    for _ in range(3):
        answers = [[out.token_ids for out in engine.generate(prompts, params)] for engine in (plain, adapting)]
        assert answers[0] == answers[1]
    stats = adapting.stats()
    assert stats.compiles_after_warmup == 0
    assert stats.adaptation and len(next(iter(stats.adaptation.values()))) > 0
    assert plain.stats().adaptation == {}


def test_it_is_for_one_replica():
    with pytest.raises(UserError, match="one replica"):
        Engine.from_pretrained("bundled", adapt=True, dp_size=2, tokenizer=None, warmup=False)
