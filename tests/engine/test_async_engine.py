"""The engine for asyncio: concurrency, cancellation, deadlines, back-pressure, and what failures do."""
import asyncio
import json
import time

import numpy as np
import pytest
from test_engine_adapters import CONFIG, LIMITS, engine_of

from qwen_jax import AsyncEngine, SamplingParams
from qwen_jax.checkpoint.adapters import save_adapter
from qwen_jax.engine.async_engine import EngineBusy, EngineDead
from qwen_jax.errors import UserError
from qwen_jax.model import init, params_of
from qwen_jax.model.lora import LoraConfig

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
PROMPTS = [[(7 * i + j) % 320 for j in range(3 + 11 * i)] for i in range(9)]
assert LIMITS.max_batch_size < len(PROMPTS)


@pytest.fixture(scope="module")
def model():
    return init(CONFIG, 0, "float32")


@pytest.fixture(scope="module")
def inner(model):
    return engine_of(model, max_adapters=1, max_adapter_rank=4)


@pytest.fixture
def check(inner):
    """Run a coroutine function with an AsyncEngine, and check that nothing is left in the engine afterwards."""
    def run(work, **options):
        async def whole():
            engine = AsyncEngine(inner, **options)
            try:
                return await work(engine)
            finally:
                await engine.close()

        result = asyncio.run(asyncio.wait_for(whole(), 120))
        stats = inner.stats()
        assert (stats.running, stats.waiting, stats.pages_used, stats.compiles_after_warmup) == (0, 0, 0, 0)
        return result

    return run


def test_operations_that_fail_leave_the_engine_running(model, inner, check, tmp_path):
    golden, layers = [(PROMPTS[1], [1, 2])], CONFIG.num_layers
    adapter = {"q_proj.a": np.zeros((layers, 2, 32)), "q_proj.b": np.zeros((layers, 32, 2))}
    save_adapter(adapter, CONFIG, LoraConfig(2, 4.0, ("q_proj",)), tmp_path / "a")
    settings = tmp_path / "a" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "target_modules": 5}))
    params = params_of(model)
    overflowing = {path: np.full(value.shape, 3e38, np.float32) if "norm" in path else value
                   for path, value in params.items()}

    async def work(engine):
        with pytest.raises(UserError, match="target_modules must be"):
            await engine.load_adapter("a", tmp_path / "a")
        for prompts in (golden, None):
            with pytest.raises(UserError, match="fail on a golden prompt"):
                await engine.update_weights(overflowing, golden=prompts)
        with pytest.raises(UserError, match="expected"):
            await engine.update_weights(dict(params), golden=golden)
        return (await engine.generate(PROMPTS[0], GREEDY)).token_ids

    assert check(work) == inner.generate(PROMPTS[0], GREEDY)[0].token_ids and inner.weights.versions == [0]


def test_many_at_once_answer_as_one_after_the_other(inner, check):
    expected = [inner.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]

    async def work(engine):
        async def streamed(prompt):
            deltas = [delta async for delta in engine.stream(prompt, GREEDY)]
            assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
            assert deltas[-1].finish_reason == "length" and len(deltas) > 10
            return [token for delta in deltas for token in delta.token_ids]

        whole, pieces = await asyncio.gather(asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS)),
                                             asyncio.gather(*map(streamed, PROMPTS)))
        assert (await engine.stats()).generated_tokens > 0
        return [output.token_ids for output in whole], pieces

    assert check(work) == (expected, expected)


def test_leaving_a_stream_and_cancelling_a_task_free_the_pages(check):
    async def work(engine):
        async for delta in engine.stream(PROMPTS[3], LONG):
            if delta.token_ids:
                break
        tasks = [asyncio.create_task(engine.generate(prompt, LONG)) for prompt in PROMPTS]
        while not (await engine.stats()).running:
            await asyncio.sleep(0.01)
        for task in tasks[1:]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        stats = await engine.stats()
        assert stats.running == stats.waiting == stats.pages_used == 0
        return done

    first, *others = check(work)
    assert first.finish_reason == "length" and len(first.token_ids) == 200
    assert all(isinstance(other, asyncio.CancelledError) for other in others)


def test_a_deadline_ends_an_answer_wherever_it_is(check, inner, monkeypatch):
    step = inner.core.step
    monkeypatch.setattr(inner.core, "step", lambda: (time.sleep(0.05), step())[1])

    async def work(engine):
        others = [asyncio.create_task(engine.generate(prompt, LONG)) for prompt in PROMPTS[:4]]
        while (await engine.stats()).running < 4:  # all slots are taken: the next one waits
            await asyncio.sleep(0.005)
        waiting = await engine.generate(PROMPTS[4], LONG, timeout=0.05)
        others[0].cancel()
        running = await engine.generate(PROMPTS[5], LONG, timeout=0.4)
        return waiting, running, await asyncio.gather(*others[1:])

    waiting, running, others = check(work)
    assert (waiting.finish_reason, waiting.token_ids) == ("abort", [])
    assert running.finish_reason == "abort" and 0 < len(running.token_ids) < 200
    assert all(output.finish_reason == "length" for output in others)


def test_more_than_the_limit_are_refused_and_a_drained_engine_takes_no_requests(check):
    async def work(engine):
        tasks = [asyncio.create_task(engine.generate(prompt, LONG)) for prompt in PROMPTS[:3]]
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="3 requests are queued or running"):
            await engine.generate(PROMPTS[0], GREEDY)
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        await engine.generate(PROMPTS[0], GREEDY)
        draining = asyncio.create_task(engine.drain())
        await asyncio.sleep(0)
        with pytest.raises(EngineBusy, match="draining"):
            await engine.generate(PROMPTS[0], GREEDY)
        await draining
        return await asyncio.gather(*tasks[1:])

    assert [len(output.token_ids) for output in check(work, max_requests=3)] == [200, 200]


@pytest.mark.parametrize("request_, message", [
    (([], None), "the prompt is empty"), (([1] * 300, None), "leaves no room"),
    (([999], None), "not in the vocabulary"), (("a text", None), "no tokenizer"),
    (([1], SamplingParams(n=2, temperature=1.0)), "n must be 1")])
def test_bad_requests_raise_where_they_are_made(check, request_, message):
    async def work(engine):
        with pytest.raises(UserError, match=message):
            await engine.generate(*request_)
        for options in ({"adapter": "none"}, {"timeout": 0}):
            with pytest.raises(UserError, match="no adapter named|timeout must be"):
                await engine.generate([1], GREEDY, **options)
        return await engine.generate([1], GREEDY)

    assert len(check(work, max_requests=1).token_ids) == 20


def test_an_error_in_one_request_is_that_request_s_alone(check, inner, monkeypatch):
    from qwen_jax.engine.frontend.request import Request

    expected, add_tokens = inner.generate(PROMPTS[1], GREEDY)[0].token_ids, Request.add_tokens

    def failing(self, *arguments):
        if self.output.prompt_token_ids == PROMPTS[0] and len(self.output.token_ids) >= 5:
            raise ValueError("a strange token")
        return add_tokens(self, *arguments)

    monkeypatch.setattr(Request, "add_tokens", failing)

    async def work(engine):
        return await asyncio.gather(*(engine.generate(prompt, GREEDY) for prompt in PROMPTS[:2]))

    bad, good = check(work)
    assert (bad.finish_reason, bad.error) == ("error", "ValueError: a strange token")
    assert 5 <= len(bad.token_ids) < 20
    assert good.finish_reason == "length" and good.token_ids == expected and good.error is None


def test_a_failed_step_ends_everything_with_a_reason(monkeypatch):
    inner = engine_of(init(CONFIG, 0, "float32"))
    start, count = inner.runner.start, [0]

    def failing(*step):
        count[0] += 1
        if count[0] == 8:
            raise RuntimeError("the device is gone")
        return start(*step)

    monkeypatch.setattr(inner.runner, "start", failing)

    async def work():
        engine = AsyncEngine(inner)
        results = await asyncio.gather(*(engine.generate(prompt, LONG) for prompt in PROMPTS), return_exceptions=True)
        assert all(isinstance(result, EngineDead) and "the device is gone" in str(result) for result in results)
        with pytest.raises(EngineDead, match="the engine has stopped"):
            await engine.generate([1], GREEDY)
        with pytest.raises(EngineDead):
            await engine.stats()
        await engine.drain()
        await engine.close()
        await engine.close()

    asyncio.run(asyncio.wait_for(work(), 60))


def test_closing_ends_what_runs(inner):
    async def work():
        engine = AsyncEngine(inner)
        task = asyncio.create_task(engine.generate(PROMPTS[0], LONG))
        while not (await engine.stats()).running:
            await asyncio.sleep(0.005)
        await engine.close()
        with pytest.raises(EngineDead, match="the engine was closed"):
            await task

    asyncio.run(asyncio.wait_for(work(), 60))
    assert inner.stats().running == inner.stats().pages_used == 0


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_a_limit_that_is_none(inner, value):
    with pytest.raises(UserError, match="max_requests must be a positive integer"):
        AsyncEngine(inner, max_requests=value)
