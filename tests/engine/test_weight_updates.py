"""Updates of a running engine's weights: checked, tried on golden prompts, switched between steps, and back."""
import asyncio
import json
import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest
from test_engine_adapters import CONFIG, LIMITS

from qwen_jax import AsyncEngine, Engine, SamplingParams, UserError
from qwen_jax.checkpoint import convert, save_hf
from qwen_jax.engine.core import weight_update
from qwen_jax.engine.core.engine_thread import EngineThread
from qwen_jax.model import build, init, params_of

GREEDY = SamplingParams(max_tokens=40, temperature=0.0)
PROMPTS = [[(7 * i + j) % 320 for j in range(3 + 11 * i)] for i in range(9)]


LONG = SamplingParams(max_tokens=150, temperature=0.0)
MODELS = [init(CONFIG, seed, "float32") for seed in (0, 1, 2)]  # before compilations are counted


def model(seed):
    return MODELS[seed]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of three models, the last one converted."""
    root = tmp_path_factory.mktemp("weights")
    for seed in (0, 1, 2):
        save_hf(model(seed), CONFIG, root / str(seed))
    convert(root / "2", root / "converted")
    return root


@pytest.fixture(scope="module")
def answers():
    return [[out.token_ids for out in Engine(model(seed), limits=LIMITS, progress=False).generate(PROMPTS, GREEDY)]
            for seed in (0, 1, 2)]


@pytest.fixture
def engine():
    return Engine(model(0), limits=LIMITS, progress=False)


def texts(outputs):
    return [out.token_ids for out in outputs]


def test_updates_and_back_without_compiling(engine, folders, answers):
    assert texts(engine.generate(PROMPTS, GREEDY)) == answers[0]
    assert engine.update_weights(folders / "1") == engine.weight_version == 1
    out = engine.generate(PROMPTS, GREEDY)
    assert texts(out) == answers[1] and {o.weight_version for o in out} == {1}
    assert engine.update_weights(folders / "converted") == 2 and texts(engine.generate(PROMPTS, GREEDY)) == answers[2]
    assert engine.rollback() == 1 and texts(engine.generate(PROMPTS, GREEDY)) == answers[1]
    assert engine.rollback() == 2 and texts(engine.generate(PROMPTS, GREEDY)) == answers[2]
    assert engine.update_weights(model(0)) == 3 and texts(engine.generate(PROMPTS, GREEDY)) == answers[0]
    assert engine.update_weights(params_of(model(1))) == 4 and texts(engine.generate(PROMPTS, GREEDY)) == answers[1]
    assert engine.runner.weights.versions == [3, 4] and engine.stats().compiles_after_warmup == 0


def test_there_is_nothing_to_roll_back_to_at_first(engine):
    with pytest.raises(UserError, match="no other version"):
        engine.rollback()


def broken(folder, destination, change):
    shutil.copytree(folder, destination)
    change(destination)
    return destination


def params_with(**changes):
    return params_of(model(1)) | changes


NAN = {"layers.0.mlp.down": jnp.full((32, 48), jnp.nan)}


def other_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))


def flip_a_byte(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("source, message", [
    (lambda root, tmp: tmp / "nowhere", "no model at"),
    (lambda root, tmp: broken(root / "1", tmp / "x", other_architecture), "differs in rms_norm_eps"),
    (lambda root, tmp: broken(root / "converted", tmp / "x", flip_a_byte), "SHA-256|damaged|cannot be read"),
    (lambda root, tmp: params_with(**NAN), "layers.0.mlp.down holds NaN"),
    (lambda root, tmp: params_with(**{"layers.0.mlp.down": jnp.zeros((32, 47))}), r"mlp.down \(32, 47\)"),
    (lambda root, tmp: params_with(extra=jnp.zeros(3)), "missing or unexpected: extra"),
    (lambda root, tmp: {}, "missing or unexpected"),
    (lambda root, tmp: 7, "not from int"),
    # Every number is finite, and no logit is.
    (lambda root, tmp: params_with(**{"norm.scale": np.full(32, 3e38, np.float32)}), "fail on a golden prompt"),
])
def test_bad_weights_leave_the_old_ones(engine, folders, answers, tmp_path, source, message):
    with pytest.raises(UserError, match=message):
        engine.update_weights(source(folders, tmp_path))
    assert engine.weight_version == 0 and engine.runner.weights.versions == [0]
    assert texts(engine.generate(PROMPTS, GREEDY)) == answers[0]


def test_golden_answers_decide(engine, folders, answers):
    golden = [(prompt, answer[:5]) for prompt, answer in zip(PROMPTS[:3], answers[1])]
    with pytest.raises(UserError, match="answer a golden prompt with tokens"):
        engine.update_weights(folders / "converted", golden=golden)
    assert engine.weight_version == 0
    engine.update_weights(folders / "1", golden=golden)
    assert texts(engine.generate(PROMPTS, GREEDY)) == answers[1]


def test_a_rollback_while_weights_are_tried_is_refused(engine, folders, answers):
    """It would make another version current, and the one that is tried would be dropped as unused."""
    engine.update_weights(folders / "1")
    tried = engine.weights.add(engine.weights.load(folders / "0"))
    with pytest.raises(UserError, match="are being tried"):
        engine.rollback()
    engine.weights.forget(tried)
    with pytest.raises(ValueError, match="not loaded"):
        engine.weights.make_current(tried)
    assert engine.rollback() == 0
    assert texts(engine.generate(PROMPTS, GREEDY)) == answers[0]


def update_engine(engine, folder, golden=None):
    return engine.update_weights(folder, golden=golden)


def update_async_engine(engine, folder, golden=None):
    async def work():
        serving = AsyncEngine(engine)
        try:
            return await serving.update_weights(folder, golden=golden)
        finally:
            await serving.close()

    return asyncio.run(work())


def update_server(engine, folder, golden=None):
    """Update as the engine's process does when the HTTP process calls it."""
    from qwen_jax.serving.engine_process.calls import EngineCalls
    from qwen_jax.serving.engine_process.engine_metrics import EngineMetrics
    from qwen_jax.serving.engine_process.identity import AnswerIdentity

    thread = EngineThread(engine.core)
    thread.start()
    try:
        identity = AnswerIdentity(engine, lambda message: None)
        calls = EngineCalls(engine, thread, EngineMetrics(engine), identity, str)
        return calls.start("update_weights", [str(folder), "finish_old", golden]).result(60)["version"]
    finally:
        thread.close()


@pytest.mark.parametrize("update", [update_engine, update_async_engine, update_server])
def test_any_failure_forgets_the_version(engine, folders, answers, monkeypatch, update):
    def crash(runs):
        assert engine.weights.versions == [0, 1]  # the golden prompts have run with version 1
        raise RuntimeError("a crash in golden prompts")

    with monkeypatch.context() as crashing:
        crashing.setattr(weight_update, "_check_golden", crash)
        with pytest.raises(RuntimeError, match="a crash in golden prompts"):
            update(engine, folders / "1")
    assert engine.weights.versions == [0] and engine.weight_version == 0
    assert texts(engine.generate(PROMPTS, GREEDY)) == answers[0]
    golden = [(PROMPTS[0], answers[1][0][:5])]
    assert update(engine, folders / "1", golden) == engine.weight_version == 2
    assert texts(engine.generate(PROMPTS, GREEDY)) == answers[1]


@pytest.fixture
def slow_steps(engine, monkeypatch):
    step = engine.core.step
    monkeypatch.setattr(engine.core, "step", lambda: (time.sleep(0.02), step())[1])


def test_requests_are_taken_and_answered_while_golden_prompts_run(engine, folders, slow_steps):
    golden = [(prompt, answer) for prompt, answer in zip(PROMPTS[:3], long_answers(1))]

    async def work():
        serving = AsyncEngine(engine)
        update = asyncio.create_task(serving.update_weights(folders / "1", golden=golden))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        output = await serving.generate(PROMPTS[3], SamplingParams(max_tokens=1, temperature=0.0))
        assert not update.done() and output.weight_version == 0
        assert await update == 1
        await serving.close()

    asyncio.run(asyncio.wait_for(work(), 60))


def test_a_cancelled_update_keeps_the_old_weights(engine, folders, slow_steps):
    async def work():
        serving = AsyncEngine(engine)
        update = asyncio.create_task(serving.update_weights(folders / "1"))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        update.cancel()
        with pytest.raises(asyncio.CancelledError):
            await update
        assert await serving.update_weights(folders / "2") == 2  # it begins when the first has ended
        assert engine.weights.versions == [0, 2]
        await serving.close()

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("options, message", [
    (dict(policy="later"), "policy must be finish_old or restart, not 'later'"),
    (dict(in_place=True, golden=[]), "no golden prompts")])
def test_options_that_make_no_sense(engine, folders, options, message):
    with pytest.raises(UserError, match=message):
        engine.update_weights(folders / "1", **options)


def test_too_little_memory_is_said_before_anything_is_read(engine, folders, monkeypatch):
    monkeypatch.setattr("qwen_jax.engine.config.memory.free_memory", lambda: 10)
    with pytest.raises(UserError, match="10 are free"):
        engine.update_weights(folders / "nowhere")


def begun(engine, count=6, params=GREEDY):
    """Requests of which as many have begun as there are slots, and the others wait."""
    requests = [engine.input_processor.requests(prompt, params)[0] for prompt in PROMPTS[:count]]
    engine.core.submit(requests)
    while sum(bool(request.sequence.output) for request in requests) < min(count, 4):
        engine.core.step()
    return requests


def finish(engine, requests):
    while not all(request.closed for request in requests):
        engine.core.step()
    return [request.output for request in requests]


def long_answers(seed):
    return texts(Engine(model(seed), limits=LIMITS, progress=False).generate(PROMPTS[:3], LONG))


def test_requests_that_have_begun_keep_their_version(engine, folders):
    requests = begun(engine, 3, LONG)
    engine.update_weights(folders / "1")
    assert all(request.sequence.version == 0 and not request.closed for request in requests)
    later = [engine.input_processor.requests(prompt, LONG)[0] for prompt in PROMPTS[:3]]
    engine.core.submit(later)  # both versions run side by side
    outputs = finish(engine, requests + later)
    assert [out.weight_version for out in outputs] == [0] * 3 + [1] * 3
    assert texts(outputs) == long_answers(0) + long_answers(1)


def test_requests_that_wait_get_the_new_version(engine, folders, answers):
    requests = begun(engine, 9)
    engine.update_weights(folders / "1")
    outputs = finish(engine, requests)
    versions = [out.weight_version for out in outputs]
    assert versions[:4] == [0] * 4 and versions[-1] == 1
    assert texts(outputs) == [answers[version][index] for index, version in enumerate(versions)]


def test_restart_begins_again_except_what_is_being_read(engine, folders):
    requests = begun(engine, 3, LONG)
    requests[0].streams = True
    engine.update_weights(folders / "1", policy="restart")
    outputs = finish(engine, requests)
    assert [out.weight_version for out in outputs] == [0, 1, 1]
    assert texts(outputs) == [long_answers(0)[0], *long_answers(1)[1:]]
    assert outputs[1].finish_reason == "length" and engine.stats().pages_used == 0


@pytest.mark.parametrize("policy, versions", [("finish_old", [0, 0, 0, 0, 1, 1]), ("restart", [1] * 6)])
def test_in_place_no_second_copy_exists(engine, folders, answers, policy, versions, monkeypatch):
    monkeypatch.setattr("qwen_jax.engine.config.memory.free_memory", lambda: 10)
    requests = begun(engine)
    assert engine.update_weights(folders / "converted", policy=policy, in_place=True) == 1
    assert engine.runner.weights.versions == [1]
    outputs = finish(engine, requests)
    assert sorted(out.weight_version for out in outputs) == versions
    assert texts(outputs) == [answers[2 if out.weight_version else 0][index] for index, out in enumerate(outputs)]
    with pytest.raises(UserError, match="no other version"):
        engine.rollback()


def test_in_place_waits_for_those_preempted_in_the_middle(folders):
    page = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 64 * 4
    engine = Engine(model(0), limits=LIMITS, kv_cache_bytes=5 * page, progress=False)
    requests = begun(engine, 3, LONG)
    for request in requests:
        request.streams = True
    while not any(sequence.output for sequence in engine.scheduler.waiting):
        engine.core.step()
    engine.update_weights(folders / "1", in_place=True)
    assert texts(finish(engine, requests)) == long_answers(0)
    assert {request.output.weight_version for request in requests} == {0}


def test_in_place_a_bad_checkpoint_is_found_before_anything_is_replaced(engine, folders, answers, tmp_path):
    with pytest.raises(UserError):
        engine.update_weights(broken(folders / "converted", tmp_path / "x", flip_a_byte), in_place=True)
    assert texts(engine.generate(PROMPTS, GREEDY)) == answers[0]


def test_under_load_nothing_fails_and_no_request_mixes_versions(engine, folders, answers):
    async def work():
        serving = AsyncEngine(engine)
        stop, seen = asyncio.Event(), []

        async def client(number):
            while not stop.is_set():
                index = number % len(PROMPTS)
                output = await serving.generate(PROMPTS[index], GREEDY)
                seen.append(output.weight_version)
                assert output.finish_reason == "length"
                assert output.token_ids == answers[output.weight_version][index], output.weight_version
                number += 1

        clients = [asyncio.create_task(client(number)) for number in range(8)]
        for version in (1, 2):
            while version - 1 not in seen:
                await asyncio.sleep(0.01)
            assert await serving.update_weights(folders / str(version)) == version
        while seen.count(2) < 8:
            await asyncio.sleep(0.01)
        with pytest.raises(UserError, match="golden"):
            await serving.update_weights(params_with(**{"norm.scale": np.full(32, 3e38, np.float32)}))
        assert await serving.rollback() == 1
        count = len(seen)
        while seen[count:].count(1) < 8:
            await asyncio.sleep(0.01)
        stop.set()
        await asyncio.gather(*clients)
        stats = await serving.stats()
        await serving.close()
        return stats

    stats = asyncio.run(asyncio.wait_for(work(), 120))
    assert stats.compiles_after_warmup == 0 and stats.pages_used == 0 and stats.weight_version == 1


def test_the_prefix_cache_does_not_cross_versions(engine, folders, answers):
    long = PROMPTS[8] * 2
    engine.generate(long, GREEDY)
    engine.update_weights(folders / "1")
    fresh = Engine(model(1), limits=LIMITS, progress=False).generate(long, GREEDY)[0].token_ids
    hits = engine.stats().prefix_hits
    assert engine.generate(long, GREEDY)[0].token_ids == fresh and engine.stats().prefix_hits == hits


def test_a_module_s_arrays_are_copied(engine, answers):
    params = {path: np.array(value) for path, value in params_of(model(1)).items()}
    engine.update_weights(params)
    for value in params.values():
        value[:] = 0
    assert texts(engine.generate(PROMPTS, GREEDY)) == answers[1]
    assert build(CONFIG, params_of(model(1))) is not None
