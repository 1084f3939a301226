"""Engines on several devices answer as one device does: every degree, every released size's heads, stages, replicas."""

import jax
import numpy as np
import pytest
from parallel_bench import (
    GREEDY,
    LIMITS,
    answers_of_one_device,
    engine_of,
    largest_difference,
    model_of,
    one_device,
    prompts,
    shrunk,
)

from qwen_jax import Engine, SamplingParams
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy
from qwen_jax.engine.weights.model_shard import OVERLAP_FROM
from qwen_jax.errors import UserError
from qwen_jax.model import abstract, init, params_of
from qwen_jax.parallel.layout import contract

SLOW = pytest.mark.slow
# Each degree and each size once, each number of stages and replicas with others; the rest: scripts/bench/parallel.py.
COMBINATIONS = [("1.5b", 1, 2, 2), ("3b", 3, 1, 2), ("32b", 4, 2, 1), ("7b", 8, 1, 1),
                *(pytest.param(*one, marks=SLOW) for one in (("72b", 2, 4, 1), ("14b", 5, 1, 1), ("0.5b", 6, 1, 1),
                                                             ("7b", 7, 1, 1)))]


@pytest.mark.parametrize("size, tensor, stages, data", COMBINATIONS)
def test_the_same_answers_as_one_device(size, tensor, stages, data):
    whole = tensor == 8  # steps of one program, as models of few layers on one stage have them
    engine = engine_of(size, tp_size=tensor, pp_size=stages, dp_size=data, layers_per_program=4 if whole else 1)
    assert largest_difference(engine.generate(prompts(), GREEDY), answers_of_one_device(size)) <= 1e-4
    np.testing.assert_allclose(engine.embed(prompts()), one_device(size).embed(prompts()), atol=1e-5)
    stats = engine.stats()
    assert stats.compiles_after_warmup == 0 and stats.pages_used == 0
    assert stats.executables == (2 if whole else 5 + 2 * stages) * data


def test_parameters_come_back_as_they_were():
    engine = engine_of("0.5b", tp_size=6, warmup=False)
    own, = engine.weights.sharding.by_name(engine.weights.leaves_of[0])
    layout = engine.plan.layout
    assert layout.copies == 3
    given = params_of(model_of("0.5b"))
    for path, spec in abstract(engine.config).items():
        back = contract(np.asarray(own[path]), spec.axes, layout)
        np.testing.assert_array_equal(back, given[path], err_msg=path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from qwen_jax.checkpoint import convert, save_hf

    config = shrunk("0.5b")
    folder = tmp_path_factory.mktemp("hf")
    save_hf(init(config, 3), config, folder / "hf")
    return folder / "hf", convert(folder / "hf", folder / "orbax", dtype="float32")


OPTIONS = {"limits": LIMITS, "progress": False, "dtype": "float32"}


@pytest.mark.parametrize("plan", [{"tp_size": 4}, {"tp_size": 2, "pp_size": 2}])
def test_checkpoints_are_read_onto_the_plan(checkpoint, plan):
    """Layouts that expand (4 devices for 2 KV heads), and a tied head on another stage than the embedding."""
    hf, orbax = checkpoint
    others = {path: np.asarray(value) * np.float32(0.9) for path, value in params_of(model_of("0.5b")).items()}
    wanted = Engine.from_pretrained(hf, **OPTIONS).generate(prompts(), GREEDY)
    engine = Engine.from_pretrained(orbax, **plan, **OPTIONS)
    assert largest_difference(engine.generate(prompts(), GREEDY), wanted) <= 1e-4
    # Another version, from the folder, and back.
    engine.update_weights(others)
    assert largest_difference(engine.generate(prompts(), GREEDY), wanted) > 1e-2
    engine.update_weights(hf)
    assert largest_difference(engine.generate(prompts(), GREEDY), wanted) <= 1e-4
    engine.update_weights(orbax, in_place=True)
    assert largest_difference(engine.generate(prompts(), GREEDY), wanted) <= 1e-4
    assert engine.stats().compiles_after_warmup == 0


def distances(outputs, others) -> np.ndarray:
    """Of the log-probabilities of the prompts' own tokens."""
    return np.array([abs(mine[token] - theirs[token])
                     for prompt, one, other in zip(prompts(), outputs, others, strict=True)
                     for token, mine, theirs in zip(prompt[1:], one.prompt_logprobs[1:], other.prompt_logprobs[1:],
                                                    strict=True)])


@pytest.mark.parametrize("plan", [{"tp_size": 3}, pytest.param({"tp_size": 2, "pp_size": 2}, marks=SLOW)])
def test_8_bits(plan):
    """Weights of the middle layers and all pages: as near to 32 bits as on one device. It is not the same to the last
    digit, because a device rounds its part of a product's input with a scale of its own."""
    exact, alone = answers_of_one_device("7b"), Engine(model_of("7b"), fp8_enabled=True, **OPTIONS)
    engine = Engine(model_of("7b"), fp8_enabled=True, **plan, **OPTIONS)
    usual = distances(alone.generate(prompts(), GREEDY), exact)
    found = distances(engine.generate(prompts(), GREEDY), exact)
    assert 0 < np.mean(found) <= 1.1 * np.mean(usual) and np.max(found) <= 1.5 * np.max(usual)
    assert engine.stats().guard_trips == {} and engine.runner.state.k_pages[0].dtype.itemsize == 1


def test_8_bit_pages_alone_are_the_same():
    options = {**OPTIONS, "kv_cache_dtype": "e4m3"}
    alone, engine = Engine(model_of("7b"), **options), Engine(model_of("7b"), tp_size=3, **options)
    distance = distances(engine.generate(prompts(), GREEDY), alone.generate(prompts(), GREEDY))
    assert np.median(distance) <= 1e-5 and np.max(distance) <= 0.02  # where a value is rounded the other way


def test_only_some_devices_see_a_fault_and_all_act_on_it():
    """A scale of one KV head, which one of the devices has, is damaged: the row is computed again in 16 bits."""
    model = init(shrunk("7b"), 1)
    engine = Engine(model, fp8_enabled=True, tp_size=4, **OPTIONS)
    wanted = Engine(model, **OPTIONS).generate(prompts(), GREEDY)
    weights = engine.weights
    leaves, = weights.leaves_of[0]
    at = len(leaves) - 2 * (4 - 2)  # the keys' scales of layer 2
    broken = np.array(leaves[at])
    broken[3] = np.nan
    weights.leaves_of[0] = (*leaves[:at], jax.device_put(broken, leaves[at].sharding), *leaves[at + 1:]),
    got = engine.generate(prompts(), GREEDY)
    assert engine.stats().guard_trips == {2: 4}
    assert [one.finish_reason for one in got] == ["length"] * 4
    assert [len(one.token_ids) for one in wanted] == [len(one.token_ids) for one in got]


@pytest.mark.parametrize("plan", [pytest.param({"tp_size": 4}, marks=SLOW), {"tp_size": 2, "pp_size": 2}])
def test_sparse_attention_adapters_and_options_of_sampling(plan, tmp_path):
    from qwen_jax.checkpoint.adapters import save_adapter
    from qwen_jax.model.lora import TARGETS, LoraConfig, init_adapter

    config = shrunk("7b")
    lora = LoraConfig(4, 16.0, TARGETS)
    rng = np.random.default_rng(5)
    adapter = {name: np.asarray(value) if name.endswith(".a") else rng.normal(0, 0.2, value.shape).astype(np.float32)
               for name, value in init_adapter(config, lora).items()}
    save_adapter(adapter, config, lora, tmp_path / "adapter")
    options = {**OPTIONS, "limits": Limits(4, 512, ((2, 64),), (), (4,), 4), "max_adapters": 1,
               "policy": SchedulePolicy(sparse_above_tokens=200)}
    long = prompts(2, 100) + [np.random.default_rng(1).integers(0, 307, 400).tolist()]
    params = [SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=1, repetition_penalty=1.2,
                             ignore_eos=True),
              SamplingParams(max_tokens=12, temperature=0.7, top_k=20, presence_penalty=0.5, seed=2, ignore_eos=True),
              SamplingParams(max_tokens=12, temperature=0.0, logprobs=3, ignore_eos=True)]
    found = []
    for one in ({}, plan):
        engine = Engine(model_of("7b"), **options, **one)
        engine.load_adapter("it", tmp_path / "adapter")
        found.append(engine.generate(long, params, adapter=["it", None, "it"]))
        assert found[-1][2].schedule == "sparse_attention" and engine.stats().compiles_after_warmup == 0
    assert [one.token_ids for one in found[0]] == [one.token_ids for one in found[1]]


@pytest.mark.parametrize("plan, scattered, more", [
    ({"tp_size": 4}, True, {}), pytest.param({"tp_size": 3}, False, {"kv_cache_dtype": "e4m3"}, marks=SLOW),
    ({"tp_size": 2, "pp_size": 2}, True, {"policy": SchedulePolicy(sparse_above_tokens=200)})])
def test_large_prefills_in_two_halves(plan, scattered, more, monkeypatch):
    """Rows that end in either half, chunks that do not begin at 0, 8-bit pages, sparse attention, stages."""
    options = {**OPTIONS, "limits": Limits(4, 768, ((2, 256),), (), (4,), 4), **more}
    model, rng = init(shrunk("7b", num_layers=2), 0), np.random.default_rng(2)
    long = [rng.integers(0, 307, length).tolist() for length in (250, 70, 128, 640)]
    wanted = Engine(model, **options).generate(long, GREEDY)
    monkeypatch.setitem(OVERLAP_FROM, "cpu", 512)
    monkeypatch.setattr("qwen_jax.engine.weights.model_shard.SCATTER_FROM", 512 if scattered else 1 << 20)
    found = Engine(model, **options, **plan).generate(long, GREEDY)
    if "kv_cache_dtype" in more:  # where a value is rounded the other way
        best = [[max(position.values()) for position in one.logprobs] for one in (*found, *wanted)]
        np.testing.assert_allclose(best[:4], best[4:], atol=0.05)
    else:
        assert largest_difference(found, wanted) <= 1e-4
    assert {one.schedule for one in found} == {one.schedule for one in wanted}


@pytest.mark.parametrize("plan, speculation", [({"tp_size": 3}, "draft"), ({"tp_size": 2, "pp_size": 2}, "ngram"),
                                               pytest.param({"dp_size": 2}, "draft", marks=SLOW)])
def test_speculation(plan, speculation):
    draft = init(shrunk("0.5b", num_layers=1), 9) if speculation == "draft" else "ngram"
    limits = Limits(4, 128, ((2, 64),), (), (4,), 1, draft_tokens=3)
    engine = Engine(model_of("7b"), speculation=draft, **{**OPTIONS, "limits": limits}, **plan)
    repeating = [([5, 6, 7, 8] * 12)[:40 + extra] for extra in range(4)]
    wanted = Engine(model_of("7b"), **OPTIONS).generate(repeating, GREEDY)
    assert largest_difference(engine.generate(repeating, GREEDY), wanted) <= 1e-4
    assert engine.stats().drafted_tokens > 0


def test_a_pipeline_idles_no_longer_than_it_takes_to_fill():
    """Played with one unit of time for each program: s stages and m micro-batches idle (s - 1) / (m + s - 1) of it."""
    engine, stages, played = engine_of("7b", pp_size=4, cache_dir=None), 4, []
    runner, pieces = engine.runner, engine.runner.steps._pieces
    run, start = pieces.run, runner.start

    def recorded_run(programs, key, *others, **block):
        if key[0].kind == "block":  # each stage has one, beside which the others are short
            played[-1].append(key[1])
        return run(programs, key, *others, **block)

    def recorded_start(*arguments):
        played.append([])
        started = start(*arguments)
        played[-1] = len(started.micro_batches), played[-1]
        return started

    pieces.run, runner.start = recorded_run, recorded_start
    engine.generate(prompts(), GREEDY)
    assert {micro for micro, _ in played} >= {2, 4}  # of prefills, which have two rows, and of decode steps
    for micro, order in played:
        free, ready = [0] * stages, [0] * micro
        for place, stage in enumerate(order):
            assert stage == place % stages
            batch = place // stages % micro
            free[stage] = ready[batch] = max(free[stage], ready[batch]) + 1
        idle = 1 - len(order) / (stages * max(free))
        assert idle <= (stages - 1) / (micro + stages - 1) + 1e-9


def test_replicas_share_the_work_and_nobody_waits_beside_an_idle_one():
    engine = engine_of("7b", dp_size=2)
    engine.core.submit([r for prompt in prompts(8) for r in engine.input_processor.requests(prompt, GREEDY)])
    loads = [replica.scheduler.num_sequences for replica in engine.deployment.replicas]
    assert loads == [4, 4]
    for sequence in list(engine.deployment.replicas[1].scheduler.waiting):
        engine.core.abort(sequence.request_id)
    engine.core.submit([r for prompt in prompts(9, seed=1) for r in engine.input_processor.requests(prompt, GREEDY)])
    schedulers = [replica.scheduler for replica in engine.deployment.replicas]
    for sequence in [*schedulers[1].waiting][1:]:  # all that wait are the first one's
        engine.core.abort(sequence.request_id)
    waited, ran = len(schedulers[0].waiting), [0, 0]
    for index, replica in enumerate(engine.deployment.replicas):
        def adding(sequence, add=replica.scheduler.add, index=index):
            ran[index] += 1
            add(sequence)
        replica.scheduler.add = adding
    while engine.core.step():
        pass
    assert waited == 7 and ran[0] == 0 and ran[1] >= 1, "the second replica has taken some over"
    assert engine.stats().pages_used == 0 and engine.stats().running == 0


@pytest.mark.parametrize("options, message", [
    ({"tp_size": 3, "pp_size": 3}, "tp_size=3 and pp_size=3 need 9 devices and there are 8"),
    ({"dp_size": 16}, "dp_size=16 need 16 devices"),
    ({"pp_size": 5}, "must be at most the number of layers, 4, not 5"),
    ({"tp_size": 0}, "positive integer"),
])
def test_plans_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        engine_of("7b", warmup=False, **options)


def test_the_planner_chooses_the_degree(monkeypatch):
    engine = engine_of("7b", tp_size="auto", warmup=False)
    assert 1 <= engine.plan.tensor <= 8 and engine.plan.devices == engine.plan.tensor
    monkeypatch.setattr("qwen_jax.engine.config.memory.free_memory", lambda: 1000)
    with pytest.raises(UserError, match="does not fit"):
        engine_of("7b", tp_size="auto", warmup=False)


def test_a_draft_model_and_stages():
    with pytest.raises(UserError, match="use pp_size=1"):
        Engine(model_of("7b"), pp_size=2, speculation=init(shrunk("0.5b"), 0), warmup=False,
               limits=Limits(4, 128, ((2, 64),), (), (4,), 1, draft_tokens=4), dtype="float32")
