"""Everything that can happen to a running engine, in any order, and every answer is its own.

Requests come and go, pages run out, deadlines pass, weights and adapters change, speculation guesses; what a request
has answered is at all times the beginning of what it answers alone, with the weights and the adapter it began with.

FAULT_WALK_STEPS=20000 makes the walk longer.
"""
import os
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_engine_adapters import CONFIG, LIMITS

from qwen_jax import Engine, SamplingParams, UserError
from qwen_jax.checkpoint.adapters import load_adapter, save_adapter
from qwen_jax.engine.scheduling.sequence import State
from qwen_jax.engine.scheduling.speculation import NGRAM
from qwen_jax.model import build, init, params_of
from qwen_jax.model.lora import LoraConfig, init_adapter, merge_adapter

STEPS = int(os.environ.get("FAULT_WALK_STEPS", 1000))
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(0, 320, n).tolist() for n in (1, 7, 40, 64, 70, 130, 180)]
PROMPTS += [PROMPTS[5] + [1, 2, 3], PROMPTS[6][:128] + PROMPTS[2], [5, 6, 7, 8] * 20]
MOST = 60  # tokens of an answer
BAD = [dict(prompts=[[]]), dict(prompts=[320]), dict(prompts=[1] * 256), dict(prompts=[1], adapter="nobody"),
       dict(prompts=[1], params=SamplingParams(stop_token_ids=[9999])), dict(prompts="text")]


class World:
    """One engine for all walks, and what requests answer alone."""

    def __init__(self, folder):
        self.models = [init(CONFIG, seed, "float32") for seed in (0, 1)]
        lora = LoraConfig(4, 8.0, ("q_proj", "down_proj"))
        adapter = {key: jnp.asarray(0.4 * rng.normal(size=value.shape), jnp.float32)
                   for key, value in init_adapter(CONFIG, lora).items()}
        save_adapter(adapter, CONFIG, lora, folder / "a")
        self.folder = folder
        page = 2 * CONFIG.num_layers * CONFIG.num_kv_heads * CONFIG.head_dim * 64 * 4
        self.engine = Engine(self.models[0], limits=replace(LIMITS, decode_steps=4, draft_tokens=3), speculation=NGRAM,
                             kv_cache_bytes=6 * page, max_adapters=1, max_adapter_rank=4, progress=False)
        _, kept = load_adapter(folder / "a", CONFIG)
        self.answers = {}
        for index, model in enumerate(self.models):
            merged = build(CONFIG, merge_adapter(CONFIG, params_of(model), kept, lora))
            for name, weights in ((None, model), ("a", merged)):
                alone = Engine(weights, limits=LIMITS, prefix_cache=False, progress=False)
                for place, prompt in enumerate(PROMPTS):
                    out, = alone.generate(prompt, SamplingParams(max_tokens=MOST, temperature=0.0))
                    self.answers[place, index, name] = out.token_ids
        self.broken = params_of(self.models[1]) | {"norm.scale": np.full(32, np.nan, np.float32)}
        self.before = self.engine.stats().compiles_after_warmup
        self.model_of = {0: 0}  # version of the weights -> model
        self.steps = 0
        self.seen = {"preempted": 0, "expired": 0, "aborted": 0, "updates": 0, "versions at once": 0, "accepted": 0}


world: World


@pytest.fixture(scope="module")
def the_world(tmp_path_factory):
    global world
    world = World(tmp_path_factory.mktemp("walk"))


class Walk(RuleBasedStateMachine):
    """What a rule draws does not depend on the engine, whose steps depend on time."""

    def __init__(self):
        super().__init__()
        self.engine, self.core, self.now = world.engine, world.engine.core, 0.0
        self.core.clock = lambda: self.now
        self.requests = []  # (request, prompt's place, adapter)

    @rule(place=st.integers(0, len(PROMPTS) - 1), most=st.integers(1, MOST), priority=st.integers(-1, 1),
          patience=st.none() | st.floats(0.1, 30), adapted=st.booleans(), streams=st.booleans())
    def add(self, place, most, priority, patience, adapted, streams):
        adapter = "a" if adapted and "a" in self.engine.adapters.names else None
        deadline = None if patience is None else self.now + patience
        params = SamplingParams(max_tokens=most, temperature=0.0)
        request, = self.engine.input_processor.requests(PROMPTS[place], params, None, adapter, priority, deadline)
        request.streams = streams
        self.core.submit([request])
        self.requests.append((request, place, adapter))

    @rule(bad=st.sampled_from(BAD))
    def add_what_cannot_run(self, bad):
        with pytest.raises(UserError):
            self.engine.generate(**bad)

    @rule(count=st.integers(1, 60))
    def run(self, count):
        for _ in range(count):
            world.steps += self.core.step()
            self.now += 0.1

    @rule(index=st.integers(0, 1000))
    def abort(self, index):
        if not self.requests:
            return
        request, _, _ = self.requests[index % len(self.requests)]
        was_open = request.sequence.state is not State.FINISHED
        assert self.core.abort(request.sequence.request_id) <= was_open
        assert not request.sequence.pages
        world.seen["aborted"] += was_open

    @rule(model=st.integers(0, 1), policy=st.sampled_from(["finish_old", "restart"]))
    def update(self, model, policy):
        version = self.engine.update_weights(world.models[model], policy)
        world.model_of[version] = model
        world.seen["updates"] += 1

    @rule()
    def rollback(self):
        if self.engine.runner.weights.previous is not None:
            self.engine.rollback()

    @rule()
    def bad_update(self):
        with pytest.raises(UserError):
            self.engine.update_weights(world.broken)

    @rule()
    def change_adapters(self):
        if "a" not in self.engine.adapters.names:
            self.engine.load_adapter("a", world.folder / "a")
        elif any(adapter and not request.closed for request, _, adapter in self.requests):
            with pytest.raises(UserError, match="requests use the adapter"):
                self.engine.unload_adapter("a")
        else:
            self.engine.unload_adapter("a")

    @invariant()
    def nothing_is_lost_and_every_answer_is_its_own(self):
        scheduler, pool = self.engine.scheduler, self.engine.pool
        held = {page for sequence in scheduler.running for page in sequence.pages}
        assert pool.capacity - pool.num_free == len(held)
        assert set(self.engine.runner.weights.versions) >= self.core.versions_in_use()
        for request, place, adapter in self.requests:
            sequence = request.sequence
            expected = world.answers[place, world.model_of[sequence.version], adapter][:sequence.max_new_tokens]
            assert sequence.output == expected[:len(sequence.output)]
            assert request.output.token_ids == expected[:len(request.output.token_ids)]
            if request.closed:
                assert request.output.finish_reason in ("length", "abort")
                assert request.output.finish_reason == "abort" or request.output.token_ids == expected
                world.seen["expired"] += sequence.deadline is not None and request.output.finish_reason == "abort"
        self.requests = [one for one in self.requests if not one[0].closed]
        world.seen["versions at once"] = max(world.seen["versions at once"], len(self.core.versions_in_use()))

    def teardown(self):
        while self.core.step():
            world.steps += 1
        self.nothing_is_lost_and_every_answer_is_its_own()
        stats = self.engine.stats()
        assert not self.requests and stats.pages_used == stats.running == stats.waiting == 0
        assert not any(self.engine.adapters._users.values()) and len(self.engine.runner.weights.versions) <= 2
        assert stats.compiles_after_warmup == world.before


def test_a_random_walk(the_world):
    machine = Walk.TestCase
    machine.settings = settings(max_examples=25, stateful_step_count=40, deadline=None, database=None,
                                suppress_health_check=list(HealthCheck))
    while world.steps < STEPS:
        machine("runTest").runTest()
    stats = world.engine.stats()
    world.seen |= {"preempted": stats.preemptions, "accepted": stats.accepted_tokens}
    assert all(world.seen.values()), f"the walk never met some of {world.seen}"
    print(world.steps, world.seen)
