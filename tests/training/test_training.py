"""Batches, loss, the step and the loop, on a model of a few thousand parameters."""
import itertools
import json
import math

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from qwen_jax.checkpoint.hf_layout import layout, split
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud import conversations, format_messages
from qwen_jax.model import build, init, params_of
from qwen_jax.training.attention import blocked_causal_attention
from qwen_jax.training.data import Batch, batches, encode
from qwen_jax.training.initial import prepare_for_retrieval
from qwen_jax.training.loop import fit
from qwen_jax.training.loss import next_token_loss
from qwen_jax.training.recipe import ModelShape, Recipe, load_recipe
from qwen_jax.training.step import make_optimizer, make_train_step
from qwen_jax.training.tokenizer import save_tokenizer, train_tokenizer

RECIPE = Recipe(seed=0, vocab_size=320, sequence_length=96, batch_size=2, turns=1, explain=0.0, steps=30,
                profile_steps=0, warmup_steps=2, learning_rate=1e-2, weight_decay=0.0, clip_norm=1.0, adam_b2=0.98,
                lm_weight=0.1, evaluate_every=10, model=ModelShape(32, 48, 2, 4, 2, 8, 256, 10_000.0))
CONFIG = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8, max_position_embeddings=256, rope=Rope(10_000.0), tie_word_embeddings=True,
                     dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [format_messages(m, False) for m in itertools.islice(conversations(0, "train", 1, 0.0), 50)]
    return train_tokenizer(texts, 320)


def small_batch(seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.choice([0.0, 0.1, 1.0], (2, 96)).astype(np.float32)
    return Batch(rng.integers(0, 320, (2, 96)).astype(np.int32), weights, weights == 1)


# ---- tokenizer

@pytest.mark.parametrize("text", ["Limit 437\nCard active 5134", "héllo  wörld, it's 24!\n\n x", "<|im_start|>user\n"])
def test_tokenizer_is_the_one_transformers_loads(tokenizer, tmp_path, text):
    save_tokenizer(tokenizer, tmp_path, 256)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"
    messages = [{"role": "system", "content": "a b"}, {"role": "user", "content": text}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == format_messages(messages)


def test_special_tokens_come_last(tokenizer):
    assert [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [317, 318, 319]


# ---- batches

def test_encoding_piecewise_equals_the_whole_text_and_weights_mark_answers(tokenizer):
    messages = next(conversations(1, "train", 3, 1.0))
    tokens, weights, verdict = encode(tokenizer, messages, 0.25)
    assert tokens == tokenizer.encode(format_messages(messages, False)).ids
    assert weights[0] == 0 and set(weights[1:]) == {0.25, 1.0}
    spans = itertools.groupby(zip(tokens, weights), lambda pair: pair[1] == 1)
    answers = [[token for token, _ in span] for answer, span in spans if answer]
    expected = [tokenizer.encode(m["content"] + "<|im_end|>").ids for m in messages if m["role"] == "assistant"]
    assert answers == expected
    assert np.flatnonzero(verdict).tolist() == [weights.index(1.0)]  # listings and explanations are no verdicts


def test_batches_pad_and_cut(tokenizer):
    source = [[{"role": "assistant", "content": "legit"}], [{"role": "user", "content": "a " * 200}]]
    batch, = batches(tokenizer, source, 2, 64, 0.1)
    assert batch.tokens.shape == (2, 64) and batch.tokens.dtype == np.int32
    length = len(encode(tokenizer, source[0], 0.1)[0])
    assert (batch.tokens[0, length:] == tokenizer.token_to_id("<|endoftext|>")).all()
    assert not batch.weights[0, length:].any() and batch.weights[1, 1:].all()


# ---- numbers

def test_blocked_attention_is_causal_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape) for shape in ((2, 150, 2, 3, 8), (2, 150, 2, 8), (2, 150, 2, 8)))
    scores = np.einsum("btkgh,bskh->bkgts", q, k) / math.sqrt(8)
    scores = np.where(np.tril(np.ones((150, 150), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bkgts,bskh->btkgh", weights / weights.sum(-1, keepdims=True), v)
    found = blocked_causal_attention(*(x.astype(np.float32) for x in (q, k, v)))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def torch_model(params):
    config = Qwen2Config(**{k: v for k, v in CONFIG.to_hf().items() if k not in ("architectures", "model_type")},
                         attn_implementation="eager")
    model = Qwen2ForCausalLM(config).float()
    table = layout(CONFIG)
    state = {name: torch.tensor(np.array(tensor)) for path, array in params.items()
             for name, tensor in split(table[path], np.asarray(array))}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return model


def test_loss_gradient_and_update_match_torch():
    params = params_of(init(CONFIG, 3, "float32"))
    rng = np.random.default_rng(1)
    params = {path: np.asarray(p) + (0.3 * rng.normal(size=p.shape).astype(np.float32) if "bqkv" in path else 0)
              for path, p in params.items()}
    batch, theirs = small_batch(), torch_model(params)
    logits = theirs(torch.tensor(batch.tokens.astype(np.int64))).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 320),
                                            torch.tensor(batch.tokens[:, 1:].astype(np.int64)).reshape(-1),
                                            reduction="none").reshape(2, -1)
    weights = torch.tensor(batch.weights[:, 1:])
    loss = (nll * weights).sum() / weights.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), RECIPE.clip_norm)

    # plain SGD with rate 1 after the same clipping: the change of a parameter is its clipped gradient
    model = build(CONFIG, {path: jax.numpy.array(p) for path, p in params.items()})
    optimizer = optax.chain(optax.clip_by_global_norm(RECIPE.clip_norm), optax.sgd(1.0))
    state = nnx.state(model, nnx.Param)
    new, _, metrics = make_train_step(model, optimizer)(state, optimizer.init(state), batch)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(norm.item(), rel=1e-4)
    right = (logits[:, :-1].argmax(-1).numpy() == batch.tokens[:, 1:])[batch.verdict[:, 1:]]
    assert float(metrics["verdict_accuracy"]) == pytest.approx(right.mean(), abs=1e-6)

    nnx.update(model, new)
    gradients, table = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}, layout(CONFIG)
    for path, value in params_of(model).items():
        for name, change in split(table[path], params[path] - np.asarray(value)):
            np.testing.assert_allclose(change, gradients[name], atol=2e-6, err_msg=name)


def test_loss_ignores_what_has_no_weight():
    rng, batch = np.random.default_rng(0), small_batch()
    logits = rng.normal(size=(2, 96, 320)).astype(np.float32)
    loss, _ = next_token_loss(logits, batch)
    other = np.where(batch.weights == 0, 5, batch.tokens)
    assert float(next_token_loss(logits, batch._replace(tokens=other))[0]) == float(loss)
    other = np.where(batch.weights == 1, 5, batch.tokens)
    assert float(next_token_loss(logits, batch._replace(tokens=other))[0]) != float(loss)


def test_training_reduces_the_loss():
    model, optimizer = init(CONFIG, 0, "float32"), make_optimizer(RECIPE)
    step, params = make_train_step(model, optimizer), nnx.state(model, nnx.Param)
    opt_state, losses = optimizer.init(params), []
    for _ in range(30):
        params, opt_state, metrics = step(params, opt_state, small_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_initial_heads_look_back_and_match():
    config = ModelConfig(vocab_size=320, hidden_size=128, intermediate_size=48, num_layers=3, num_heads=4,
                         num_kv_heads=2, head_dim=32, rope=Rope(1e6), tie_word_embeddings=True)
    model = build(config, prepare_for_retrieval(params_of(init(config, 0, "float32")), config))
    tokens = np.random.default_rng(0).permutation(300).astype(np.int32)[:100]
    tokens[65:95] = tokens[5:35]  # a passage said twice
    best = {}

    def attend(layer, q, k, v):
        scores = np.einsum("tkgh,skh->kgts", np.asarray(q[0]), np.asarray(k[0]))
        best[layer] = np.where(np.tril(np.ones((100, 100), bool)), scores, -np.inf).argmax(-1).reshape(4, 100)
        return blocked_causal_attention(q, k, v)

    model.hidden(tokens[None], np.arange(100)[None], attend)
    for head, offset in enumerate((1, 2, 3, 4)):
        assert (best[0][head, offset:] == np.arange(100 - offset)).mean() > 0.9
    like, after_like, passage = best[1][0, 65:95], best[1][2, 65:95], best[2][0, 65:95]
    assert (like == np.arange(5, 35)).mean() > 0.5  # by chance, one in eighty
    assert (after_like == np.arange(6, 36)).mean() > 0.1
    assert (passage == np.arange(5, 35)).mean() > 0.3


def test_a_model_too_small_to_prepare_is_refused():
    with pytest.raises(UserError, match="at least 3 layers"):
        prepare_for_retrieval(params_of(init(CONFIG)), CONFIG)


# ---- recipe and loop

def test_the_shipped_recipe_loads():
    assert load_recipe("configs/train/bundled.toml").vocab_size == 1024


@pytest.mark.parametrize("edit, message", [
    (lambda text: "learning_rat = 1\n" + text, "unknown key learning_rat"),
    (lambda text: text.replace("num_layers", "layers"), r"\[model\]: unknown key layers"),
    (lambda text: text.replace("steps = ", "#", 1), "missing key steps"),
    (lambda text: text.replace("vocab_size = 1024", "vocab_size = '1024'"), "vocab_size should be int, is '1024'"),
    (lambda text: text.replace("[model]", "[model"), "not valid TOML"),
])
def test_a_wrong_recipe_is_refused(tmp_path, edit, message):
    (tmp_path / "r.toml").write_text(edit(open("configs/train/bundled.toml").read()))
    with pytest.raises(UserError, match=message):
        load_recipe(tmp_path / "r.toml")


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml")


def test_an_interrupted_run_continues_to_the_same_weights(tmp_path):
    def interrupted(step):
        if step == 25:
            raise KeyboardInterrupt
        return small_batch(step)

    def evaluate(model):
        return {"accuracy": 0.5}

    whole = params_of(fit(init(CONFIG), RECIPE, small_batch, tmp_path / "whole", evaluate))
    with pytest.raises(KeyboardInterrupt):
        fit(init(CONFIG), RECIPE, interrupted, tmp_path / "cut", evaluate)
    resumed = params_of(fit(init(CONFIG), RECIPE, small_batch, tmp_path / "cut", evaluate))
    for path, value in whole.items():
        np.testing.assert_array_equal(value, resumed[path])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "accuracy" in line] == [10, 20, 30]
    assert all({"loss", "tokens_per_second"} <= line.keys() for line in lines if "accuracy" not in line)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(init(CONFIG), RECIPE, small_batch, tmp_path, lambda model: {})
    other = ModelConfig(**{**vars(CONFIG), "hidden_size": 16})
    with pytest.raises(UserError, match="another model"):
        fit(init(other), RECIPE, small_batch, tmp_path, lambda model: {})
