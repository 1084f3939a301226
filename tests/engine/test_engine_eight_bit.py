"""8-bit weights and pages in the engine, and what happens when a request's numbers leave their range."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_qwen2
from qwen_kernels.attention import PAGE, causal_attention

from qwen_jax import Engine, SamplingParams
from qwen_jax.checkpoint import from_transformers
from qwen_jax.checkpoint.adapters import save_adapter
from qwen_jax.engine.compiled.compile_counter import backend_compiles
from qwen_jax.engine.scheduling.buckets import EIGHT_BIT, Limits
from qwen_jax.errors import UserError
from qwen_jax.evaluation.calibrate_precision import calibrate_eight_bit
from qwen_jax.model import build, params_of
from qwen_jax.model.lora import LoraConfig, init_adapter
from qwen_jax.model.rope import apply_rope, rope_tables
from qwen_jax.quantization import QuantizedTensor, default_precision, scales_of

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=0)
LIMITS = Limits(max_batch_size=4, max_seq_len=512, prefill_shapes=((1, 64), (1, 256)), recompute_shapes=(),
                decode_rows=(4,), decode_steps=4)
PROMPTS = [np.random.default_rng(n).integers(0, 320, n).tolist() for n in (5, 70, 130, 300)]


@pytest.fixture(scope="module")
def hf():
    return random_qwen2(num_hidden_layers=4)


@pytest.fixture(scope="module")
def engine(hf):
    return Engine(hf, fp8_enabled=True, limits=LIMITS, progress=False)


@pytest.fixture(scope="module")
def fragile(hf):
    return Engine(hf, kv_cache_dtype="e4m3", limits=LIMITS, progress=False, max_adapters=1, max_adapter_rank=1)


@pytest.fixture(scope="module")
def exact(hf):
    return Engine(hf, limits=LIMITS, progress=False, max_adapters=1, max_adapter_rank=1)


@pytest.fixture(scope="module")
def answers(engine):
    return engine.generate(PROMPTS, GREEDY)


def test_what_is_stored(engine):
    weights = engine.runner.weights
    model = build(engine.config, weights.sharding.by_name(weights.leaves_of[0])[0])
    kinds = {path: isinstance(value, QuantizedTensor) for path, value in params_of(model).items()}
    for layer in range(4):
        for name in ("attention.wqkv", "attention.wo", "mlp.gate_up", "mlp.down"):
            assert kinds[f"layers.{layer}.{name}"] == (layer in (1, 2))
    assert not kinds["embed.weight"] and not kinds["head.weight"] and not kinds["layers.1.attention.bqkv"]
    assert engine.runner.state.k_pages[0].dtype.itemsize == 1
    assert {bucket.precision for bucket in engine.runner.table} == {EIGHT_BIT, "f32"}


def simulated(hf, tokens, weights):
    """Log-probabilities of a model whose keys and values, and with ``weights`` all that products take, are rounded to
    e4m3, by attention over whole rows."""
    config, params = from_transformers(hf, "float32")
    precision = default_precision(config, weights, "e4m3")
    scales = scales_of(params, precision)
    model = build(config, {path: precision.store(path, value) for path, value in params.items()})
    positions = jnp.arange(tokens.shape[1])[None]
    cos, sin = rope_tables(config.rope, config.head_dim, positions)

    def rounded(x, scale):
        return jnp.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale

    def attend(layer, q, k, v):
        bias = model.layers[layer].attention.bqkv[...]
        k = rounded(k, scales[layer][0]) + apply_rope(jnp.broadcast_to(bias[:, -2], k.shape), cos[:, :, None],
                                                      sin[:, :, None])
        return causal_attention(q, k, rounded(v, scales[layer][1]) + bias[:, -1])

    @jax.jit
    def logprobs(tokens):
        return jax.nn.log_softmax(model.logits(model.hidden(tokens, positions, attend, bare=(True,) * 4)), axis=-1)

    return logprobs(tokens)


@pytest.mark.parametrize("name, weights, tolerance, factor", [("engine", True, 0.1, 2), ("fragile", False, 1e-4, 1000)])
def test_log_probabilities_are_those_of_a_rounded_model(hf, exact, answers, name, weights, tolerance, factor, request):
    """Other orders of summation round some numbers the other way, which with rounded products this model amplifies. A
    model in full precision differs by far more."""
    engine = request.getfixturevalue(name)
    compiles = backend_compiles()
    scores = [one.score(PROMPTS, [output.token_ids for output in answers]) for one in (engine, exact)]
    assert backend_compiles() == compiles
    ours, unrounded = (np.concatenate([score.token_logprobs for score in some]) for some in scores)
    whole = [prompt + output.token_ids for prompt, output in zip(PROMPTS, answers, strict=True)]
    tokens = np.zeros((len(whole), max(map(len, whole))), np.int32)
    for row, some in enumerate(whole):
        tokens[row, :len(some)] = some
    logprobs = np.asarray(simulated(hf, tokens, weights))
    want = [logprobs[row, len(prompt) + n - 1, token]
            for row, (prompt, output) in enumerate(zip(PROMPTS, answers, strict=True))
            for n, token in enumerate(output.token_ids)]
    assert np.median(np.abs(ours - want)) < tolerance < np.abs(unrounded - want).mean() / factor
    assert engine.stats().guard_trips == {}


def test_int8_pages_with_measured_ranges(hf, fragile, exact, answers):
    """Nearer to the model in full precision than e4m3 pages are, and nothing leaves the ranges."""
    config, params = from_transformers(hf, "float32")
    said = [output.token_ids for output in answers]
    whole = [prompt + some for prompt, some in zip(PROMPTS, said, strict=True)]
    found = calibrate_eight_bit(build(config, params), whole).found
    engine = Engine(hf, kv_cache_dtype="int8", calibrated=found, limits=LIMITS, progress=False)
    assert engine.runner.state.k_pages[0].dtype == jnp.int8
    scores = [np.concatenate([score.token_logprobs for score in one.score(PROMPTS, said)])
              for one in (exact, engine, fragile)]
    ours, e4m3 = (np.linalg.norm(some - scores[0]) for some in scores[1:])
    assert 0 < ours < 0.5 * e4m3 and engine.stats().guard_trips == {}


def test_a_row_does_not_depend_on_its_neighbours(engine, answers):
    alone = [engine.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    assert [one.token_ids for one in alone] == [one.token_ids for one in answers]


# --- faults. Weights of `fragile` are not rounded: what it computes again is what an engine without 8 bits says.

@pytest.fixture(scope="module")
def in_16_bits(exact):
    return [output.token_ids for output in exact.generate(PROMPTS, GREEDY)]


@pytest.fixture(scope="module")
def in_8_bits(fragile):
    return [output.token_ids for output in fragile.generate(PROMPTS, GREEDY)]


def poison(engine, prompt, page, layer):
    """Writes NaN into a page that the prefix cache holds for a prompt, and returns its id."""
    sequence = engine.input_processor.requests(prompt, GREEDY)[0].sequence
    sequence.salt = repr((0, engine.runner.adapters.identity(0), "full_attention", sequence.cache_salt)).encode()
    found = engine.pool.match(sequence.page_keys(len(prompt) // PAGE))
    state = engine.runner.state
    pages = list(state.v_pages)
    pages[layer] = pages[layer].at[found[page], 1, 7].set(0x7F)  # e4m3's NaN
    engine.runner.state = state._replace(v_pages=tuple(pages))
    return found[page]


def damage(engine, layer, which, value):
    """Puts ``value`` into one scale of a layer's keys (0) or values (1); returns what undoes it."""
    weights = engine.runner.weights
    leaves, = weights.leaves_of[0]
    at = len(leaves) - 2 * (4 - layer) + which
    weights.leaves_of[0] = (*leaves[:at], leaves[at].at[1, 3].set(value), *leaves[at + 1:]),

    def undo():
        weights.leaves_of[0] = leaves,

    return undo


def test_a_poisoned_page_reaches_nobody(fragile, in_8_bits, in_16_bits):
    page = poison(fragile, PROMPTS[3], page=2, layer=1)
    before = fragile.stats()
    outputs = fragile.generate(PROMPTS, GREEDY)
    assert [output.token_ids for output in outputs] == [*in_8_bits[:3], in_16_bits[3]]
    assert [output.finish_reason for output in outputs] == ["length"] * 4
    after = fragile.stats()
    assert after.guard_trips == {1: 1} and before.guard_trips == {}
    assert after.compiles_after_warmup == before.compiles_after_warmup and after.pages_used == 0
    assert fragile.scheduler.wide_pool.num_free == fragile.scheduler.wide_pool.capacity
    # Nobody finds the page any more, nor those after it; whoever gets it overwrites it.
    assert fragile.pool._key_of.get(page) is None
    assert fragile.generate([PROMPTS[3]], GREEDY)[0].token_ids == in_8_bits[3]
    assert fragile.stats().guard_trips == {1: 1}


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e-9])
def test_damaged_scales_are_found(fragile, in_16_bits, value):
    """Of 1e-9, keys are beyond the range."""
    before = fragile.stats().guard_trips.get(2, 0)
    undo = damage(fragile, 2, 0, value)
    try:
        outputs = fragile.generate(PROMPTS, GREEDY)
    finally:
        undo()
    assert [output.token_ids for output in outputs] == in_16_bits
    assert fragile.stats().guard_trips[2] == before + 4


def test_a_second_trip_is_an_error(engine, answers):
    """The scale of a weight is needed in 16 bits too."""
    weights = engine.runner.weights
    leaves, = weights.leaves_of[0]
    at = next(n for n, leaf in enumerate(leaves) if leaf.dtype == jnp.float8_e4m3fn) + 1
    weights.leaves_of[0] = (*leaves[:at], leaves[at].at[0].set(0), *leaves[at + 1:]),
    try:
        outputs = engine.generate(PROMPTS, GREEDY)
        for ask in (lambda: engine.score([[1, 2]], [[3]]), lambda: engine.classify([[1, 2]], [[3], [4]]),
                    lambda: engine.embed([[1, 2]])):
            with pytest.raises(RuntimeError, match="could not be computed: .* not finite .*layer 1"):
                ask()
    finally:
        weights.leaves_of[0] = leaves,
    assert all(output.finish_reason == "error" and "layer 1" in output.error and output.token_ids == []
               for output in outputs)
    assert engine.stats().guard_trips == {1: 14} and engine.stats().pages_used == 0
    assert [output.token_ids for output in engine.generate(PROMPTS, GREEDY)] == [one.token_ids for one in answers]


def test_an_answer_goes_on_where_it_tripped(fragile, exact, in_16_bits):
    """Sampling with penalties and a seed, streamed: what was handed out stays, nothing is handed out twice."""
    params = SamplingParams(max_tokens=40, temperature=0.8, seed=5, presence_penalty=0.5, ignore_eos=True)
    clean = fragile.generate([PROMPTS[1]], params)[0].token_ids
    stream, got = fragile.stream(PROMPTS[1], params), []
    while len(got) < 8:
        got += next(stream).token_ids
    undo = damage(fragile, 0, 1, 0.0)
    got += next(stream).token_ids  # computed before
    for delta in stream:
        got += delta.token_ids
    undo()
    assert len(got) == 40 and got[:8] == clean[:8]
    # What follows is what a 16-bit engine says after the same beginning, drawn with the same random numbers.
    begun = next(n for n in range(8, 40) if got[n:] == _continued(exact, PROMPTS[1], got[:n], params))
    assert begun < 20


def _continued(engine, prompt, said, params):
    request, = engine.input_processor.requests(prompt, params)
    request.sequence.output.extend(said)
    request.sequence.prefill_end = request.sequence.num_tokens
    engine.core.complete([request])
    return request.sequence.output[len(said):]


def test_random_faults(fragile, in_8_bits, in_16_bits):
    """FAULT_TRIALS=500 for the long run."""
    rng = np.random.default_rng(0)
    counted = sum(fragile.stats().guard_trips.values())
    for trial in range(int(os.environ.get("FAULT_TRIALS", "12"))):
        fragile.generate(PROMPTS, GREEDY)  # every prompt's pages are in the cache
        kind, layer, victim = rng.integers(3), int(rng.integers(4)), int(rng.integers(1, 4))
        undo = None
        if kind == 0:
            poison(fragile, PROMPTS[victim], int(rng.integers(len(PROMPTS[victim]) // PAGE)), layer)
        else:
            undo = damage(fragile, layer, int(rng.integers(2)), (0.0, 1e-9)[kind - 1])
        compiles = backend_compiles()
        outputs = [output.token_ids for output in fragile.generate(PROMPTS, GREEDY)]
        assert backend_compiles() == compiles
        if undo:
            undo()
        tripped = {victim} if kind == 0 else set(range(4))
        assert outputs == [(in_16_bits if row in tripped else in_8_bits)[row] for row in range(4)], (trial, kind, layer)
        counted += len(tripped)
    assert sum(fragile.stats().guard_trips.values()) == counted
    assert fragile.stats().pages_used == 0


@pytest.mark.parametrize("kind", ["beyond the range", "infinite"])
def test_activations_out_of_hand(fragile, exact, in_8_bits, kind, tmp_path):
    """Of one request, by an adapter of its own: keys that 8 bits do not hold, which 16 do, and keys that nothing does.
    Its neighbours' answers stay what they were."""
    lora = LoraConfig(1, 1.0, ("k_proj",))
    size = {"beyond the range": 1e3, "infinite": 1e38}[kind]
    adapter = {key: jnp.zeros(value.shape).at[2].set(size) for key, value in init_adapter(exact.config, lora).items()}
    save_adapter(adapter, exact.config, lora, tmp_path / "loud")
    before = fragile.stats()
    for engine in (fragile, exact):
        engine.load_adapter("loud", tmp_path / "loud")
    compiles = backend_compiles()
    try:
        outputs = fragile.generate(PROMPTS, GREEDY, adapter=[None, None, "loud", None])
        assert backend_compiles() == compiles
        want = exact.generate([PROMPTS[2]], GREEDY, adapter="loud")[0]
    finally:
        for engine in (fragile, exact):
            engine.unload_adapter("loud")
    neighbours = [0, 1, 3]
    assert [outputs[n].token_ids for n in neighbours] == [in_8_bits[n] for n in neighbours]
    after, trips = fragile.stats(), {"beyond the range": 1, "infinite": 2}[kind]
    assert {layer: count - before.guard_trips.get(layer, 0) for layer, count in after.guard_trips.items()
            if count != before.guard_trips.get(layer, 0)} == {2: trips}
    assert after.pages_used == 0
    if kind == "infinite":
        assert outputs[2].finish_reason == "error" and "layer 2" in outputs[2].error and not outputs[2].token_ids
    else:
        assert outputs[2].token_ids == want.token_ids and outputs[2].finish_reason == "length"


def test_other_weights_in_8_bits(hf, engine, answers, tmp_path):
    """An update is rounded like the first weights were, with scales of its own, and compiles nothing."""
    other = random_qwen2(seed=1, num_hidden_layers=4)
    other.save_pretrained(tmp_path)
    engine.update_weights(tmp_path)
    got = engine.generate(PROMPTS, GREEDY)
    want = Engine(other, fp8_enabled=True, limits=LIMITS, progress=False).generate(PROMPTS, GREEDY)
    assert [one.token_ids for one in got] == [one.token_ids for one in want] != [one.token_ids for one in answers]
    engine.rollback()
    assert [one.token_ids for one in engine.generate(PROMPTS, GREEDY)] == [one.token_ids for one in answers]
    engine.update_weights(tmp_path, in_place=True)
    assert [one.token_ids for one in engine.generate(PROMPTS, GREEDY)] == [one.token_ids for one in want]


def test_memory(engine, exact):
    pages = [sum(leaf.nbytes for leaf in one.runner.state.k_pages) / one.pool.num_pages for one in (engine, exact)]
    assert pages[0] == pages[1] / 4  # of float32
    assert engine.runner.weights.nbytes < 0.75 * exact.runner.weights.nbytes
    assert 0 < engine.scheduler.wide_pool.capacity == 512 // PAGE


def test_settings(hf, caplog):
    with pytest.raises(UserError, match="int8 KV cache needs ranges that were measured"):
        Engine(hf, kv_cache_dtype="int8", limits=LIMITS, warmup=False)
    assert sum("does not multiply 8-bit floats" in record.message for record in caplog.records) <= 1
    with pytest.raises(UserError, match="beside .* bytes of 16-bit pages"):
        Engine(hf, fp8_enabled=True, limits=LIMITS, kv_cache_bytes=400_000, warmup=False)
