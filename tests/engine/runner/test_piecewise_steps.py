"""Steps that are sequences of programs answer as steps that are one program each, whatever an engine is asked for."""

from dataclasses import replace

import numpy as np
import pytest
from parallel_bench import GREEDY, engine_of, largest_difference, model_of, prompts, shrunk

from qwen_jax import Engine, SamplingParams
from qwen_jax.engine.runner.piecewise_steps import PiecewiseSteps
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.schedule_policy import RECOMPUTE, SPARSE, SchedulePolicy
from qwen_jax.engine.scheduling.speculation import NGRAM, Speculation
from qwen_jax.engine.weights.network_part import divide
from qwen_jax.model import init

LIMITS = Limits(4, 512, ((2, 64),), (), (4,), 4)
WHOLE = 4  # layers of the models here
LONG = [*prompts(3, 100), np.random.default_rng(1).integers(0, 307, 400).tolist()]


def pair(layers: int, size: str = "7b", **options) -> tuple[Engine, Engine]:
    """Engines of whole steps and of programs of so many layers."""
    options = {"limits": LIMITS, "prefix_cache": False, **options}
    whole, pieces = (engine_of(size, layers_per_program=most, **options) for most in (WHOLE, layers))
    assert isinstance(pieces.runner.steps, PiecewiseSteps) and not isinstance(whole.runner.steps, PiecewiseSteps)
    return whole, pieces


def check(whole: Engine, pieces: Engine, texts=LONG, params=GREEDY, most: float = 1e-5, **options) -> list:
    before = pieces.stats().compiles_after_warmup
    ours, theirs = (engine.generate(texts, params, **options) for engine in (pieces, whole))
    assert largest_difference(ours, theirs) <= most
    assert [one.schedule for one in ours] == [one.schedule for one in theirs]
    assert [one.finish_reason for one in ours] == [one.finish_reason for one in theirs]
    stats = pieces.stats()
    assert stats.compiles_after_warmup == before and stats.pages_used == 0
    return ours


@pytest.mark.parametrize("layers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_answers_scores_and_embeddings(layers):
    whole, pieces = pair(layers)
    check(whole, pieces)
    np.testing.assert_allclose(pieces.embed(LONG), whole.embed(LONG), atol=1e-6)
    np.testing.assert_allclose(pieces.classify(LONG, [[1], [2, 3]]), whole.classify(LONG, [[1], [2, 3]]), atol=1e-6)


def test_every_option_of_sampling():
    """Penalties read the counts of the prompt, which a prefill piece writes, and of what was sampled."""
    whole, pieces = pair(2)
    for options in (dict(temperature=0.8, top_k=9), dict(temperature=0.9, top_p=0.8, repetition_penalty=1.4),
                    dict(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5),
                    dict(temperature=0.7, min_p=0.05, logit_bias={5: 4.0}, min_tokens=9, stop_token_ids=(7,))):
        params = SamplingParams(max_tokens=10, seed=3, logprobs=3, prompt_logprobs=2, ignore_eos=True, **options)
        check(whole, pieces, params=params)


def test_sparse_attention():
    whole, pieces = pair(1, policy=SchedulePolicy(sparse_above_tokens=200))
    assert check(whole, pieces)[-1].schedule == SPARSE
    ours, theirs = pieces.stats(), whole.stats()
    assert (ours.sparse_pages_read, ours.sparse_pages_visible) == (theirs.sparse_pages_read,
                                                                    theirs.sparse_pages_visible) != (0, 0)


@pytest.mark.slow
def test_recompute():
    limits = Limits(8, 256, ((4, 64),), ((8, 64, 2),), (8,))
    whole, pieces = pair(2, limits=limits, policy=SchedulePolicy(recompute_above_rows=4))
    texts = prompts(7, 150, seed=4)
    assert RECOMPUTE in {one.schedule for one in check(whole, pieces, texts)}


def test_adapters(tmp_path):
    from qwen_jax.checkpoint.adapters import save_adapter
    from qwen_jax.model.lora import TARGETS, LoraConfig, init_adapter

    config, lora, rng = shrunk("7b"), LoraConfig(4, 16.0, TARGETS), np.random.default_rng(5)
    adapter = {name: np.asarray(value) if name.endswith(".a") else rng.normal(0, 0.2, value.shape).astype(np.float32)
               for name, value in init_adapter(config, lora).items()}
    save_adapter(adapter, config, lora, tmp_path / "adapter")
    whole, pieces = pair(2, max_adapters=1)
    for engine in (whole, pieces):
        engine.load_adapter("one", tmp_path / "adapter")
    adapted = check(whole, pieces, adapter="one")
    assert adapted[0].token_ids != pieces.generate(LONG, GREEDY)[0].token_ids


@pytest.mark.parametrize("draft", [NGRAM, pytest.param("model", marks=pytest.mark.slow)])
def test_guesses(draft, monkeypatch):
    monkeypatch.setattr(Speculation, "_cost", lambda self: 0.0)  # never off
    speculation = model_of("7b") if draft == "model" else NGRAM
    whole, pieces = pair(2, limits=replace(LIMITS, draft_tokens=3), speculation=speculation)
    texts = [[7, 11, 200, 45, 9] * 8, *prompts(2)]
    for params in (GREEDY, SamplingParams(max_tokens=30, temperature=0.7, seed=1, ignore_eos=True, logprobs=2,
                                          prompt_logprobs=1)):
        check(whole, pieces, texts, params)
    assert pieces.stats().accepted_tokens > 0


def test_8_bits_and_the_fallback_to_16():
    whole, pieces = pair(2, fp8_enabled=True)
    check(whole, pieces, most=1e-4)
    kinds = {key[0].block for key in pieces.runner.executables.programs if key[0].kind == "block"}
    assert kinds == {(0, 1), (1, 3)}, "the first and the last layer have 16-bit weights and share their programs"
    for engine in (whole, pieces):
        leaves, = engine.weights.leaves_of[0]
        at = len(leaves) - 2 * (4 - 2)  # the scales of the keys of layer 2
        engine.weights.leaves_of[0] = (*leaves[:at], leaves[at].at[1, 3].set(np.nan), *leaves[at + 1:]),
    check(whole, pieces, most=1e-4)
    assert pieces.stats().guard_trips == whole.stats().guard_trips == {2: 4}


def test_tensor_parallelism_and_stages():
    whole = engine_of("7b", limits=LIMITS, layers_per_program=WHOLE)
    for plan in ({"tp_size": 2}, {"tp_size": 2, "pp_size": 2}):
        pieces = engine_of("7b", limits=LIMITS, layers_per_program=1, **plan)
        check(whole, pieces, most=1e-4)


def test_stream_and_abort_in_the_middle():
    _, pieces = pair(2)
    stream = pieces.stream(LONG[0], SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True))
    next(stream)
    stream.close()
    assert pieces.stats().pages_used == 0 and pieces.stats().finished == {"abort": 1}


def test_another_version_of_the_weights():
    whole, pieces = pair(2)
    other = init(shrunk("7b"), 5)
    before = check(whole, pieces)
    for engine in (whole, pieces):
        engine.update_weights(other)
    assert check(whole, pieces)[0].token_ids != before[0].token_ids


def test_programs_and_the_time_to_trace_them_do_not_grow_with_the_layers():
    sizes = {}
    for layers in (4, 12):
        model = init(shrunk("0.5b", num_layers=layers), 0)
        engine = Engine(model, limits=LIMITS, layers_per_program=2, warmup=False, dtype="float32", cache_dir=None)
        steps = engine.runner.steps
        sizes[layers] = [len(steps.lower(key).as_text()) for bucket in engine.runner.table
                         for key in steps.keys(bucket)]
    assert len(sizes[4]) == len(sizes[12])
    np.testing.assert_allclose(sizes[4], sizes[12], rtol=0.02)


@pytest.mark.parametrize("kinds, layers, exact, sizes", [
    ("a" * 24, 8, False, [8, 8, 8]), ("a" * 28, 8, False, [7] * 4), ("a" * 80, 8, False, [8] * 10),
    ("a" * 36, 8, False, [9] * 4), ("abbba", 2, True, [1, 2, 1, 1]), ("a" * 7, 3, True, [3, 2, 2]),
    ("a" * 26, 8, False, [7, 7, 6, 6]), ("a", 8, False, [1])])
def test_layers_are_divided_into_few_kinds_of_blocks(kinds, layers, exact, sizes):
    blocks = divide(kinds, layers, exact)
    assert [end - start for start, end in blocks] == sizes
    assert [layer for start, end in blocks for layer in range(start, end)] == list(range(len(kinds)))


def test_calls_of_programs_take_the_fast_way():
    """An effect in a traced function, such as a check, makes each call pass hundreds of arguments through Python."""
    for engine in pair(2):
        for bucket in engine.runner.table:
            for key in engine.runner.steps.keys(bucket):
                assert not engine.runner.steps.lower(key)._lowering.compile_args["unordered_effects"], key
