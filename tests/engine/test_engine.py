"""The engine against transformers.generate, and what a caller can see of it."""

import jax
import numpy as np
import pytest
import tokenizers
import torch
from oracle import hf_logits, random_qwen2

from qwen_jax import DeepSeekEngine, Engine, SamplingParams, UserError, load_model
from qwen_jax.engine.compiled.compile_counter import backend_compiles
from qwen_jax.engine.scheduling.buckets import Limits

GREEDY = SamplingParams(max_tokens=64, temperature=0.0)
# Few programs, because compiling is what these tests wait for.
LIMITS = Limits(max_batch_size=8, max_seq_len=1024, prefill_shapes=((8, 64), (1, 256)), recompute_shapes=(),
                decode_rows=(8,), decode_steps=8)
SMALLEST = Limits(max_batch_size=2, max_seq_len=128, prefill_shapes=((2, 64),), recompute_shapes=(), decode_rows=(4,))


def hf_greedy(model, prompt, count, **options):
    tokens = torch.tensor([prompt])
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False,
                         pad_token_id=0, **options)
    return out[0, len(prompt):].tolist()


@pytest.fixture(scope="module")
def hf():
    return random_qwen2()


@pytest.fixture(scope="module")
def engine(hf):
    """An engine whose steps are programs of the whole model, as those of small models are."""
    return DeepSeekEngine(model=hf, tp_size=1, pp_size=1, fp8_enabled=False, limits=LIMITS, progress=False,
                          layers_per_program=2)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 320, n).tolist() for n in (1, 2, 17, 63, 64, 65, 128, 257, 500, 700)]


def test_greedy_matches_transformers(engine, hf, prompts):
    """Ten prompts of 1 to 700 tokens share eight slots; float32, 64 tokens, identical ids."""
    outputs = engine.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == hf_greedy(hf, prompt, 64), f"prompt of {len(prompt)} tokens"
        assert (output.finish_reason, output.schedule, output.prompt_token_ids) == ("length", "full_attention", prompt)


def test_requests_finish_when_they_finish(engine, hf, prompts):
    counts = [3, 40, 1, 17]
    outputs = engine.generate(prompts[:4], [SamplingParams(max_tokens=n, temperature=0.0) for n in counts])
    for prompt, output, count in zip(prompts, outputs, counts, strict=False):
        assert output.token_ids == hf_greedy(hf, prompt, count)
    assert engine.stats().pages_used == 0 and engine.stats().running == 0


def test_repetition_penalty_matches_transformers(engine, hf, prompts):
    """Greedy under a penalty over prompt and output; the prompt of 500 tokens is counted over several chunks."""
    params = SamplingParams(max_tokens=24, temperature=0.0, repetition_penalty=1.7)
    for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
        assert output.token_ids == hf_greedy(hf, prompt, 24, repetition_penalty=1.7), len(prompt)


def test_min_tokens_and_eos(engine, hf, prompts):
    free = hf_greedy(hf, prompts[3], 30)
    first = free[4]
    params = SamplingParams(max_tokens=30, temperature=0.0, stop_token_ids=[first])
    [output] = engine.generate(prompts[3], params)
    assert output.token_ids == free[: free.index(first) + 1] and output.finish_reason == "stop"
    [output] = engine.generate(prompts[3], SamplingParams(max_tokens=30, min_tokens=20, temperature=0.0,
                                                          stop_token_ids=[first]))
    assert first not in output.token_ids[:20] and len(output.token_ids) >= 20


def test_logprobs_and_prompt_logprobs_match_transformers(engine, hf, prompts):
    chosen = [prompts[2], prompts[7]]
    params = SamplingParams(max_tokens=5, temperature=0.0, logprobs=3, prompt_logprobs=2)
    for prompt, output in zip(chosen, engine.generate(chosen, params), strict=True):
        whole = prompt + output.token_ids
        expected = torch.log_softmax(hf_logits(hf, [whole])[0], -1).numpy()
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
        for position, scores in enumerate([*output.prompt_logprobs[1:], *output.logprobs]):
            count = 2 if position < len(prompt) - 1 else 3
            best = np.argsort(-expected[position])[:count]
            assert set(scores) == {*best.tolist(), whole[position + 1]}
            for token, logprob in scores.items():
                assert logprob == pytest.approx(expected[position, token], abs=3e-4)


def test_classify_matches_transformers(engine, hf, prompts):
    labels = [[5], [6, 7], [8, 9, 10]]
    got = engine.classify(prompts[1:4], labels)
    for prompt, row in zip(prompts[1:4], got, strict=True):
        scores = []
        for label in labels:
            logprobs = torch.log_softmax(hf_logits(hf, [prompt + label])[0], -1).numpy()
            scores.append(sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(label)))
        expected = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_scores_match_transformers(engine, hf, prompts):
    """A continuation that greedy decoding would say, one that it would not, and one longer than a prefill chunk."""
    said = hf_greedy(hf, prompts[4], 5)
    pairs = [(prompts[4], said), (prompts[4], [*said[:4], (said[4] + 1) % 320]), (prompts[2], prompts[8][:400])]
    scores = engine.score(*zip(*pairs, strict=True))
    for (prompt, continuation), score in zip(pairs, scores, strict=True):
        logprobs = torch.log_softmax(hf_logits(hf, [prompt + continuation])[0], -1).numpy()[len(prompt) - 1:-1]
        expected = logprobs[np.arange(len(continuation)), continuation]
        np.testing.assert_allclose(score.token_logprobs, expected, atol=1e-4)
        assert score.greedy == (logprobs.argmax(-1) == continuation).all()
        assert score.logprob == pytest.approx(expected.sum(), abs=1e-3)
    assert [score.greedy for score in scores] == [True, False, False]


@pytest.mark.parametrize("prompts, continuations, message", [
    ([[1]], [], "1 prompts and 0 continuations"), ([[]], [[1]], "at least one token"), ([[1]], [[]], "at least one"),
    ([[1] * 1000], [[1] * 24], "leaves no room")])
def test_scores_that_cannot_be_computed(engine, prompts, continuations, message):
    with pytest.raises(UserError, match=message):
        engine.score(prompts, continuations)


def test_a_compilation_after_the_warm_up_is_counted_and_on_request_an_error(hf):
    engines = [Engine(hf, limits=SMALLEST, progress=False, strict_compiles=strict) for strict in (False, True)]
    jax.jit(lambda x: x * 17 + 4)(np.arange(3, dtype=np.float32)).block_until_ready()
    assert engines[0].generate([[1, 2]], GREEDY)[0].token_ids
    assert engines[0].stats().compiles_after_warmup >= 1
    with pytest.raises(UserError, match="strict_compiles is on"):
        engines[1].generate([[1, 2]], GREEDY)


def test_the_time_of_host_and_device_is_told_apart(engine, prompts):
    before = engine.stats()
    engine.generate(prompts[:4], GREEDY)
    after = engine.stats()
    assert after.device_seconds > before.device_seconds and after.host_seconds > before.host_seconds
    assert after.finished["length"] == before.finished.get("length", 0) + 4


def test_a_seed_decides_the_answer_whatever_shares_the_batch(engine, prompts):
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, seed=11)
    [alone] = engine.generate(prompts[2], params)
    others = [SamplingParams(max_tokens=9 + i, temperature=1.3, seed=i) for i in range(5)]
    together = engine.generate([prompts[2], *prompts[3:8]], [params, *others])[0]
    assert alone.token_ids == together.token_ids
    assert engine.generate(prompts[2], SamplingParams(max_tokens=20, seed=12))[0].token_ids != alone.token_ids


def test_n_answers(engine, prompts):
    outputs = engine.generate(prompts[:2], SamplingParams(max_tokens=12, temperature=1.0, n=3, seed=5))
    assert [o.index for o in outputs] == [0, 1, 2] * 2
    assert [o.prompt_token_ids for o in outputs] == [prompts[0]] * 3 + [prompts[1]] * 3
    assert len({tuple(o.token_ids) for o in outputs[:3]}) == 3


def test_stream_gives_the_same_tokens_and_interleaves(engine, prompts):
    expected = [o.token_ids for o in engine.generate(prompts[:2], SamplingParams(max_tokens=8, temperature=0.0))]
    streams = [engine.stream(p, SamplingParams(max_tokens=8, temperature=0.0)) for p in prompts[:2]]
    got, reasons = [[], []], []
    for deltas in zip(*streams, strict=True):
        for index, delta in enumerate(deltas):
            got[index] += delta.token_ids
            if delta.finish_reason:
                reasons.append(delta.finish_reason)
    assert got == expected and reasons == ["length", "length"]


def test_closing_a_stream_gives_its_pages_back(engine, prompts):
    stream = engine.stream(prompts[8], GREEDY)
    next(stream)
    assert engine.stats().pages_used > 0
    stream.close()
    assert engine.stats().pages_used == 0 and engine.stats().running == 0


def test_an_interrupted_call_leaves_nothing_behind(engine, prompts, monkeypatch):
    steps = iter(range(3))

    def interrupted(real=engine.core.step):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real()

    monkeypatch.setattr(engine.core, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts[:3], GREEDY)
    monkeypatch.undo()
    assert engine.stats().pages_used == 0 and not engine.scheduler.has_work
    assert len(engine.generate(prompts[0], GREEDY)[0].token_ids) == 64


def test_preemption_changes_nothing(hf, prompts):
    """Eight pages for five sequences that grow to four pages each: some are preempted and prefilled again."""
    page_bytes = 2 * 2 * 2 * 16 * 64 * 4
    limited = Engine(hf, limits=LIMITS, kv_cache_bytes=8 * page_bytes, progress=False)
    assert limited.stats().pages_total == 8
    preempted = []
    original = limited.scheduler._preempt
    limited.scheduler._preempt = lambda seq: (preempted.append(seq.request_id), original(seq))
    short = [p[:60] for p in prompts[3:8]]
    params = SamplingParams(max_tokens=150, temperature=0.0, repetition_penalty=1.3)
    for prompt, output in zip(short, limited.generate(short, params), strict=True):
        assert output.token_ids == hf_greedy(hf, prompt, 150, repetition_penalty=1.3)
    assert preempted, "the case must preempt, or it tests nothing"
    assert limited.stats().pages_used == 0


def test_nothing_compiles_after_warmup(engine):
    """300 requests with every option, in random company."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 320, rng.integers(1, 400)).tolist() for _ in range(300)]

    def maybe(value):
        return value if rng.random() < 0.3 else None

    params = [SamplingParams(
        max_tokens=int(rng.integers(1, 8)), min_tokens=maybe(1), temperature=maybe(0.0) if i % 2 else 0.8,
        top_k=maybe(int(rng.integers(1, 320))), top_p=maybe(0.7), min_p=maybe(0.05), repetition_penalty=maybe(1.2),
        presence_penalty=maybe(0.5), frequency_penalty=maybe(0.5), logit_bias=maybe({7: 5.0, 9: -100.0}),
        seed=maybe(i), stop_token_ids=maybe([3, 4]), ignore_eos=maybe(True), logprobs=maybe(5),
        prompt_logprobs=maybe(3)) for i in range(300)]
    before, counted = backend_compiles(), engine.stats().compiles_after_warmup
    outputs = engine.generate(prompts, params)
    assert len(outputs) == 300 and all(output.token_ids for output in outputs)
    assert backend_compiles() == before and engine.stats().compiles_after_warmup == counted


def test_the_compile_counter_counts(engine, hf):
    """A stray compilation shows; another engine's warm-up is not ours."""
    before = engine.stats().compiles_after_warmup
    Engine(hf, limits=SMALLEST, cache_dir=None, progress=False)
    assert engine.stats().compiles_after_warmup == before
    jax.jit(lambda x: x * 1.2345 + before)(np.ones(7)).block_until_ready()
    assert engine.stats().compiles_after_warmup > before


def test_every_call_uses_a_program_of_the_table(engine):
    stats = engine.stats()
    assert stats.executables == len(engine.runner.table) <= 64
    assert sum(bucket.steps for bucket in stats.buckets) > 0
    assert {b.bucket for b in stats.buckets} == {str(b) for b in engine.runner.table}


def test_vocabulary_ends_at_the_tokenizer(hf, prompts):
    """Padding rows of the embedding are never sampled, even where they are the most likely."""

    class Tokenizer:
        chat_template, backend_tokenizer = None, tokenizers.Tokenizer(tokenizers.models.BPE({}, []))
        added_tokens_decoder = {}

        def __len__(self):
            return 200

        def decode(self, *_, **__):
            return ""

    engine = Engine(hf, tokenizer=Tokenizer(), limits=LIMITS, progress=False)
    assert engine.input_processor.vocab_limit == 200
    prompt = [token % 200 for token in prompts[2]]
    free = hf_greedy(hf, prompt, 30)
    assert max(free) >= 200, "the case must want a padding id"
    output = engine.generate(prompt, SamplingParams(max_tokens=30, temperature=0.0, logprobs=20))[0]
    assert max(output.token_ids) < 200
    assert all(token < 200 for scores in output.logprobs for token in scores)


@pytest.mark.parametrize("prompts, params, message", [
    ([], None, None),
    ([[]], None, "prompt is empty"),
    ([[1, 2, 320]], None, "token id 320 is not in the vocabulary"),
    ([[1, -1]], None, "token id -1"),
    ([[1, 2.5]], None, "contains 2.5"),
    ([[1] * 1024], None, "1024 tokens"),
    (["text"], None, "no tokenizer"),
    ([[1]], SamplingParams(stop_token_ids=[999]), "999"),
    ([[1], [2]], [SamplingParams()], "1 SamplingParams for 2 prompts"),
])
def test_bad_requests_are_refused_and_leave_nothing(engine, prompts, params, message):
    if message is None:
        assert engine.generate(prompts) == []
        return
    with pytest.raises(UserError, match=message):
        engine.generate(prompts, params)
    assert not engine.scheduler.has_work and engine.stats().pages_used == 0


def test_one_bad_prompt_stops_the_call_before_anything_runs(engine, prompts):
    before = engine.stats()
    with pytest.raises(UserError, match="vocabulary"):
        engine.generate([prompts[0], [10_000]])
    assert engine.stats().buckets == before.buckets


@pytest.mark.parametrize("options, message", [
    (dict(tp_size=64), "need 64 devices"),
    (dict(tp_size=0), "tp_size must be a positive integer"),
    (dict(pp_size="2"), "pp_size must be a positive integer"),
    (dict(kv_cache_dtype="fp4"), "kv_cache_dtype must be"),
    (dict(max_seq_len=4096), "exceeds the model's context of 1024"),
    (dict(max_batch_size=0), "max_batch_size"),
    (dict(dtype="float16"), "dtype must be bfloat16 or float32"),
    (dict(kv_cache_bytes=10), "does not hold one page"),
])
def test_settings_that_cannot_work(hf, options, message):
    with pytest.raises(UserError, match=message):
        Engine(hf, warmup=False, **options)


def test_what_is_not_a_model():
    with pytest.raises(UserError, match="use Engine.from_pretrained"):
        Engine("some/path", warmup=False)


def test_a_failed_step_ends_the_engine_with_its_reason(hf):
    engine = Engine(hf, limits=SMALLEST, progress=False)

    def broken(*_):
        raise RuntimeError("device lost")

    for program in engine.runner.executables.programs.values():
        program.run = broken
    with pytest.raises(RuntimeError, match="device lost"):
        engine.generate([[1, 2]], GREEDY)
    with pytest.raises(RuntimeError, match="the engine stopped after a failed step"):
        engine.generate([[1, 2]], GREEDY)


def test_an_engine_that_was_not_warmed_up_says_so(hf):
    with pytest.raises(UserError, match="call warmup"):
        Engine(hf, warmup=False, limits=SMALLEST).generate([[1]])


def test_a_module_of_ours_serves_too(hf, tmp_path, prompts):
    hf.save_pretrained(tmp_path)
    engine = Engine(load_model(tmp_path, dtype="float32"), limits=LIMITS, progress=False, layers_per_program=2)
    assert engine.generate(prompts[2], GREEDY)[0].token_ids == hf_greedy(hf, prompts[2], 64)
    assert all(bucket.from_disk for bucket in engine.stats().buckets), "the same programs come from the disk cache"
