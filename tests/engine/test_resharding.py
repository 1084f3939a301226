"""From plan to plan with requests in flight: nothing is lost, computed again or compiled, and answers stay the same."""

import numpy as np
import pytest
from parallel_bench import LIMITS, engine_of, model_of, prompts, shrunk

from qwen_jax import Engine, SamplingParams
from qwen_jax.engine.compiled.compile_counter import backend_compiles
from qwen_jax.engine.config.load_policy import LoadPolicy
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.errors import UserError
from qwen_jax.model import init, params_of
from qwen_jax.parallel.plan import make_plan

LONG = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
MANY = Limits(52, 256, ((4, 64),), ((52, 64, 4),), (4, 52), 4)


def run(engine, work, params, at):
    """Answers of requests while ``at[step]`` is called before a step."""
    requests = [request for prompt in work for request in engine.input_processor.requests(prompt, params)]
    engine.core.submit(requests)
    steps = 0
    while not all(request.closed for request in requests):
        if steps in at:
            at[steps]()
        engine.core.step()
        steps += 1
    assert steps > max(at)
    return [request.output for request in requests]


def prefilled(engine):
    return sum(usage.tokens for bucket, usage in engine.core.counters.usage.items() if bucket.phase == "prefill")


def test_fifty_requests_from_four_devices_each_to_one_each_and_back():
    work = prompts(50, 150)
    wanted = [output.token_ids for output in engine_of("7b", limits=MANY).generate(work, LONG)]
    engine = engine_of("7b", limits=MANY, tp_size=4, prefix_cache=False)
    narrow, broad = engine.plan, make_plan(engine.config, data=4)
    engine.prepare_plan(broad)
    compiles, running = backend_compiles(), []

    def to(plan):
        def go():
            engine.reshard(plan)
            running.append((engine.stats().running, engine.stats().waiting))
        return go

    outputs = run(engine, work, LONG, {16: to(broad), 50: to(narrow)})
    assert [output.token_ids for output in outputs] == wanted
    assert [output.finish_reason for output in outputs] == ["length"] * 50
    assert backend_compiles() == compiles
    assert sum(running[0]) == sum(running[1]) == 50 and running[0][0] > 10 and running[1][0] > 10
    assert prefilled(engine) == sum(map(len, work)), "nothing was computed again"
    assert engine.stats().pages_used == 0 and engine.plan == narrow


@pytest.mark.parametrize("options", [{"kv_cache_dtype": "e4m3"}, {"max_adapters": 1}, {"speculation": "draft"}])
def test_all_kinds_of_state_move_through_padded_layouts_and_stages(options):
    """8-bit pages and their scales, counts of tokens for penalties, a draft model's pages; versions of the weights."""
    if options.get("speculation"):
        options = {"speculation": init(shrunk("0.5b", num_layers=1), 9),
                   "limits": Limits(4, 128, ((2, 64),), (), (4,), 1, draft_tokens=3)}
        via = {"tensor": 3}
    else:
        options, via = {"limits": LIMITS, **options}, {"tensor": 3, "stage": 2}
    params = SamplingParams(max_tokens=24, temperature=0.8, seed=7, frequency_penalty=1.0, repetition_penalty=1.3,
                            ignore_eos=True)
    if "speculation" in options:
        params = LONG
    options = {**options, "dtype": "float32", "progress": False}
    work = prompts(4, 60)
    engine = Engine(model_of("7b"), tp_size=2, **options)
    start, other = engine.plan, make_plan(engine.config, **via)
    engine.prepare_plan(other)
    engine.update_weights({path: value * 1.01 for path, value in params_of(model_of("7b")).items()})
    wanted = [output.token_ids for output in engine.generate(work, params)]
    again, compiles = prefilled(engine), backend_compiles()
    engine.scheduler.pool.forget_all()
    outputs = run(engine, work, params, {3: lambda: engine.reshard(other), 6: lambda: engine.reshard(start)})
    assert [output.token_ids for output in outputs] == wanted
    assert backend_compiles() == compiles and prefilled(engine) - again == sum(map(len, work))
    if "speculation" in options:
        assert engine.stats().accepted_tokens >= 0 and engine.stats().drafted_tokens > 0
    engine.reshard(other)
    engine.rollback()
    before = [output.token_ids for output in engine.generate(work, params)]
    engine.reshard(start)
    assert [output.token_ids for output in engine.generate(work, params)] == before != wanted


def test_shared_pages_stay_shared_and_kept_ones_are_not_mixed_up():
    shared = np.random.default_rng(3).integers(0, 307, 64).tolist()
    work = [shared + tail for tail in prompts(4, 50, seed=4)]
    engine = engine_of("7b", tp_size=2)
    start, other = engine.plan, make_plan(engine.config, data=1, tensor=1)
    engine.prepare_plan(other)
    wanted = [output.token_ids for output in engine.generate(work, LONG)]
    used = []
    outputs = run(engine, work, LONG, {6: lambda: (engine.reshard(other), used.append(engine.stats().pages_used))})
    assert [output.token_ids for output in outputs] == wanted
    assert used[0] <= 4 + 1, "one shared page, and one of each"
    # What was kept is found under the new plan; back under the old one nothing stale is.
    hits = engine.stats().prefix_hits
    assert [output.token_ids for output in engine.generate(work, LONG)] == wanted
    assert engine.stats().prefix_hits > hits
    engine.reshard(start)
    assert [output.token_ids for output in engine.generate(work[::-1], LONG)] == wanted[::-1]


def test_less_room_means_waiting_not_losing():
    """Four replicas of four rows become one of four."""
    work = prompts(14, 60)
    engine = engine_of("7b", dp_size=4)
    wanted = [output.token_ids for output in engine.generate(work, LONG)]
    narrow = make_plan(engine.config, tensor=4)
    outputs = run(engine, work, LONG, {24: lambda: engine.reshard(narrow)})
    assert [output.token_ids for output in outputs] == wanted


def test_a_request_that_the_new_plan_cannot_hold_keeps_the_old_one():
    page = 2 * 4 * 4 * 64 * 16 * 4  # keys and values of 4 layers and 4 heads
    engine = engine_of("7b", tp_size=4, limits=Limits(2, 256, ((2, 64),), (), (2,), 1), kv_cache_bytes=page)
    assert engine.pool.capacity == 4
    engine.prepare_plan(small := make_plan(engine.config))
    request, = engine.input_processor.requests(list(range(150)), LONG)
    engine.core.submit([request])
    engine.core.step()
    with pytest.raises(UserError, match="pages of KV cache"):
        engine.reshard(small)
    engine.core.complete([])
    while not request.closed:
        engine.core.step()
    assert request.output.finish_reason == "length" and engine.plan.tensor == 4


def test_the_engine_follows_its_load():
    narrow, broad = make_plan(shrunk("7b"), tensor=2), make_plan(shrunk("7b"), data=2)
    engine = engine_of("7b", tp_size=2, load_policy=LoadPolicy(narrow, broad, low=2, high=6, hold_seconds=3))
    now = [0.0]
    engine.core.clock = lambda: now[0]
    work = prompts(8, 60)
    wanted = [output.token_ids for output in engine_of("7b").generate(work, LONG)]
    plans, step = [], engine.core.step

    def counting():
        now[0] += 1
        plans.append(engine.plan)
        return step()

    engine.core.step = counting
    compiles = backend_compiles()
    assert [output.token_ids for output in engine.generate(work, LONG)] == wanted
    assert backend_compiles() == compiles
    changes = [plan for plan, before in zip(plans[1:], plans, strict=False) if plan != before]
    assert changes in ([broad], [broad, narrow]) and plans[0] == narrow
    with pytest.raises(UserError, match="neither of its load_policy"):
        engine_of("7b", load_policy=LoadPolicy(narrow, broad, low=2, high=6), warmup=False)
