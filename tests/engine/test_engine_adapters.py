"""Serving LoRA adapters: chosen by name, mixed in one batch, loaded and unloaded without compiling."""
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import SamplingParams
from qwen_jax.checkpoint.adapters import load_adapter, save_adapter
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.errors import UserError
from qwen_jax.model import build, init, params_of
from qwen_jax.model.lora import TARGETS, LoraConfig, init_adapter, merge_adapter

CONFIG = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8, max_position_embeddings=256, rope=Rope(10_000.0), dtype="float32")
LIMITS = Limits(max_batch_size=4, max_seq_len=256, prefill_shapes=((4, 64),), recompute_shapes=(), decode_rows=(4,))
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, logprobs=1)
PROMPTS = [list(range(5, 5 + n)) for n in (3, 40, 90, 17)]


def engine_of(model, **options):
    return Engine(model, limits=LIMITS, progress=False, dtype="float32", **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three adapters of different ranks and targets."""
    root, rng = tmp_path_factory.mktemp("adapters"), np.random.default_rng(0)
    for name, rank, targets in (("a", 4, TARGETS), ("b", 2, ("q_proj", "down_proj")), ("wide", 8, ("v_proj",))):
        lora = LoraConfig(rank, 2.0 * rank, targets)
        adapter = {key: jnp.asarray(0.4 * rng.normal(size=value.shape), jnp.float32)
                   for key, value in init_adapter(CONFIG, lora).items()}
        save_adapter(adapter, CONFIG, lora, root / name)
    return root


@pytest.fixture(scope="module")
def engine():
    return engine_of(init(CONFIG, 0, "float32"), max_adapters=2, max_adapter_rank=4)


@pytest.fixture(scope="module")
def expected(folders):
    """Answers of engines without adapters, whose weights have each adapter merged into them."""
    params, answers = params_of(init(CONFIG, 0, "float32")), {}
    for name in (None, "a", "b"):
        merged = params
        if name:
            lora, adapter = load_adapter(folders / name, CONFIG)
            merged = merge_adapter(CONFIG, params, adapter, lora)
        answers[name] = engine_of(build(CONFIG, merged)).generate(PROMPTS, GREEDY)
    return answers


def texts(outs):
    return [out.token_ids for out in outs]


def test_every_row_runs_with_its_own_adapter(engine, folders, expected):
    engine.load_adapter("a", folders / "a")
    engine.load_adapter("b", folders / "b")
    assert engine.adapters.names == ["a", "b"]
    assert texts(expected["a"]) != texts(expected[None]) != texts(expected["b"])
    for name in ("a", "b", None):
        assert texts(engine.generate(PROMPTS, GREEDY, adapter=name)) == texts(expected[name])
    mixed = engine.generate(PROMPTS, GREEDY, adapter=["a", None, "b", "a"])
    for row, name in enumerate(["a", None, "b", "a"]):
        assert mixed[row].token_ids == expected[name][row].token_ids
        for ours, theirs in zip(mixed[row].logprobs, expected[name][row].logprobs, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(ours[token] == pytest.approx(theirs[token], abs=2e-4) for token in ours)
    assert "".join(map(str, (d.token_ids for d in engine.stream(PROMPTS[0], GREEDY, adapter="b")))).count("[") > 1
    labels = [[7], [8]]
    with_a, without = engine.classify(PROMPTS[:1], labels, adapter="a"), engine.classify(PROMPTS[:1], labels)
    assert np.abs(with_a - without).max() > 1e-3
    engine.unload_adapter("a")
    engine.unload_adapter("b")
    engine.load_adapter("a", folders / "b")  # another adapter under a name, and in a slot, that had cached pages
    assert texts(engine.generate(PROMPTS, GREEDY, adapter="a")) == texts(expected["b"])
    engine.unload_adapter("a")


def test_swapping_under_load_compiles_nothing_and_fails_nobody(engine, folders, expected):
    """While one request streams with adapter a, others come and go with b; slots are reused."""
    before = engine.stats().compiles_after_warmup
    engine.load_adapter("a", folders / "a")
    for _ in range(5):
        stream, tokens = engine.stream(PROMPTS[2], GREEDY, adapter="a"), []
        tokens += next(stream).token_ids
        with pytest.raises(UserError, match="1 requests use the adapter 'a'"):
            engine.unload_adapter("a")
        engine.load_adapter("b", folders / "b")
        assert texts(engine.generate(PROMPTS[:2], GREEDY, adapter="b")) == texts(expected["b"][:2])
        engine.unload_adapter("b")
        tokens += [token for delta in stream for token in delta.token_ids]
        assert tokens == expected["a"][2].token_ids
    engine.unload_adapter("a")
    assert texts(engine.generate(PROMPTS, GREEDY)) == texts(expected[None]), "an empty slot leaves nothing behind"
    assert engine.stats().compiles_after_warmup == before


def test_what_is_refused(engine, folders):
    with pytest.raises(UserError, match="no adapter named 'a' is loaded; loaded: none"):
        engine.generate(PROMPTS, GREEDY, adapter="a")
    with pytest.raises(UserError, match="1 adapters for 4 prompts"):
        engine.generate(PROMPTS, GREEDY, adapter=["a"])
    with pytest.raises(UserError, match="has rank 8, this engine takes 4"):
        engine.load_adapter("wide", folders / "wide")
    assert engine.adapters.names == []
    engine.load_adapter("a", folders / "a")
    with pytest.raises(UserError, match="named 'a' is loaded: unload it first"):
        engine.load_adapter("a", folders / "b")
    engine.load_adapter("b", folders / "b")
    with pytest.raises(UserError, match="all 2 adapter slots are taken"):
        engine.load_adapter("c", folders / "b")
    engine.unload_adapter("a")
    engine.unload_adapter("b")
    with pytest.raises(UserError, match="no adapter named 'b'"):
        engine.unload_adapter("b")


def test_an_adapter_that_cannot_be_sent_to_the_devices_is_not_loaded(engine, folders, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("qwen_jax.engine.weights.lora_table.put", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.load_adapter("a", folders / "a")
    assert engine.adapters.names == []
    engine.load_adapter("b", folders / "b")
    engine.load_adapter("a", folders / "a")  # there is room for both
    assert texts(engine.generate(PROMPTS, GREEDY, adapter="a")) == texts(expected["a"])
    engine.unload_adapter("a")
    engine.unload_adapter("b")


def test_only_requests_with_the_same_salt_share_pages(engine):
    prompt, params = [(3 * place) % 320 for place in range(130)], SamplingParams(max_tokens=1)

    def hits(salt):
        before = engine.stats().prefix_hits
        engine.core.complete(engine.input_processor.requests(prompt, params, cache_salt=salt))
        return engine.stats().prefix_hits - before

    assert [hits(salt) for salt in ("a", "a", "b", "", "b", "")] == [0, 2, 0, 0, 2, 2]


def test_settings_that_are_refused(folders):
    with pytest.raises(UserError, match="max_adapters must be an integer of at least 0, not -1"):
        engine_of(init(CONFIG), max_adapters=-1, warmup=False)
    with pytest.raises(UserError, match="max_adapter_rank must be an integer of at least 1, not 0"):
        engine_of(init(CONFIG), max_adapters=1, max_adapter_rank=0, warmup=False)
    with pytest.raises(UserError, match="this engine takes no adapters"):
        engine_of(init(CONFIG), warmup=False).load_adapter("a", folders / "a")
