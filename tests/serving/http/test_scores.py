"""Scores and classifications, and adapters as models, over HTTP against the engine in-process."""
import numpy as np
import pytest
from random_adapter import save_random_adapter

from qwen_jax import Engine, SamplingParams


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("bundled", dtype="float32", max_seq_len=256, max_batch_size=8, progress=False,
                                  max_adapters=2)


def test_scores(server, engine):
    wanted, = engine.score(["hello there"], [" friend"])
    got = server.post("/score", {"model": "bundled", "prompt": "hello there", "continuation": " friend"}).json()
    assert got["token_logprobs"] == pytest.approx(wanted.token_logprobs, abs=1e-4)
    assert got["logprob"] == pytest.approx(wanted.logprob, abs=1e-4)
    for change in ({"prompt": ""}, {"continuation": []}, {"prompt": [10**6]}, {"colour": 1}):
        body = {"model": "bundled", "prompt": "a", "continuation": "b", **change}
        assert server.post("/score", body).status_code == 400


def test_classifications(server, engine):
    inputs, labels = ["amount 9000 at night", "amount 3 at noon"], [" yes", " no", " maybe"]
    wanted = engine.classify(inputs, labels)
    got = server.post("/classify", {"model": "bundled", "input": inputs, "labels": labels}).json()
    np.testing.assert_allclose([one["probs"] for one in got["data"]], wanted, atol=1e-4)
    assert [one["label"] for one in got["data"]] == [labels[row.argmax()] for row in wanted]
    assert server.post("/classify", {"model": "bundled", "input": "x", "labels": ["a"]}).status_code == 400


def test_labels_of_one_token_take_one_pass(server, engine):
    """And give what the product of probabilities gives, which the rest of the labels needs."""
    inputs = ["amount 3 at noon"]
    output, = engine.generate(inputs, SamplingParams(max_tokens=1, temperature=0.0, logprobs=20))
    texts = {token: engine.tokenizer.decode([token]) for token in range(900)}
    single = [token for token in texts if engine.input_processor.tokens(texts[token]) == [token]]
    likely = [texts[token] for token in single if token in output.logprobs[0]]
    rare = next(texts[token] for token in single if token not in output.logprobs[0])
    assert len(likely) >= 2
    for labels in (likely[:3], [*likely[:2], "maybe then"], [likely[0], rare]):
        scores = engine.score([prompt for prompt in inputs for _ in labels], labels * len(inputs))
        logits = np.reshape([one.logprob for one in scores], (len(inputs), -1))
        wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        before = sum(engine.stats().finished.values())
        np.testing.assert_allclose(engine.classify(inputs, labels), wanted, atol=1e-5)
        passes = sum(engine.stats().finished.values()) - before
        assert passes == len(inputs) if labels == likely[:3] else passes >= len(inputs) * len(labels)
        before = sum(server.wait_until_free()["finished"].values())
        got = server.post("/classify", {"model": "bundled", "input": inputs, "labels": labels})
        np.testing.assert_allclose([one["probs"] for one in got.json()["data"]], wanted, atol=1e-4)
        assert sum(server.wait_until_free()["finished"].values()) - before == passes
        assert got.headers["x-weight-version"] == "0"


def test_adapters_are_models(server, engine, tmp_path):
    save_random_adapter(tmp_path / "it")
    engine.load_adapter("it", tmp_path / "it")
    options = {"prompt": "hello", "max_tokens": 8, "temperature": 0}
    wanted, = engine.generate("hello", SamplingParams(max_tokens=8, temperature=0.0), adapter="it")
    assert server.post("/v1/completions", {"model": "it", **options}).status_code == 404
    loaded = server.post("/v1/load_lora_adapter", {"lora_name": "it", "lora_path": str(tmp_path / "it")})
    assert loaded.status_code == 200
    assert [one["id"] for one in server.http.get("/v1/models").json()["data"]] == ["bundled", "it"]
    assert server.post("/v1/completions", {"model": "it", **options}).json()["choices"][0]["text"] == wanted.text
    plain = server.post("/v1/completions", {"model": "bundled", **options}).json()["choices"][0]["text"]
    assert plain != wanted.text
    again = server.post("/v1/load_lora_adapter", {"lora_name": "it", "lora_path": str(tmp_path / "it")})
    assert again.status_code == 400 and "is loaded" in again.text
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "it"}).status_code == 200
    assert server.post("/v1/completions", {"model": "it", **options}).status_code == 404
