"""Gradients, updates and losses of a training step, against torch and peft."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from oracle import torch_model
from qwen_kernels.attention import causal_attention

from qwen_jax.checkpoint.hf_layout import layout, split
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.model import build, init, params_of
from qwen_jax.model.lora import LoraConfig, init_adapter
from qwen_jax.training.batch import Batch
from qwen_jax.training.loss import cross_entropy, distillation
from qwen_jax.training.recipe import Optimizer
from qwen_jax.training.stacked import hidden, stack, unstack
from qwen_jax.training.step import (
    decays,
    init_state,
    kept_for_backward,
    language_model_loss,
    make_optimizer,
    make_train_step,
)

CONFIG = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
                     head_dim=8, max_position_embeddings=256, rope=Rope(10_000.0), tie_word_embeddings=True,
                     dtype="float32")
LORA = LoraConfig(4, 12.0, ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
ROWS, LENGTH = 2, 48


def random_params(config=CONFIG, seed=3):
    """Return parameters whose biases and norms are away from their trivial initial values."""
    rng = np.random.default_rng(seed)
    params = {path: np.asarray(p) for path, p in params_of(init(config, seed, "float32")).items()}
    return {path: p + 0.3 * rng.normal(size=p.shape).astype(np.float32) if path.endswith(("bqkv", "scale")) else p
            for path, p in params.items()}


def random_batch(seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    weights = rng.choice([0.0, 0.1, 1.0], (rows, LENGTH)).astype(np.float32)
    return Batch(rng.integers(0, 320, (rows, LENGTH)).astype(np.int32), weights, np.zeros((rows, LENGTH), np.int32),
                 np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1)))


def torch_loss(model, batch):
    logits = model(torch.tensor(batch.tokens.astype(np.int64))).logits
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 320),
                                            torch.tensor(batch.tokens[:, 1:].astype(np.int64)).reshape(-1),
                                            reduction="none").reshape(len(batch.tokens), -1)
    weights = torch.tensor(batch.weights[:, 1:])
    return (nll * weights).sum() / weights.sum()


def gradients(loss, trainable, frozen, batch):
    (total, (weight, _)), gradient = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch)
    return float(total / weight), {name: np.asarray(g / weight) for name, g in gradient.items()}


def close(ours, theirs, name=""):
    error = np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12)
    assert error <= 1e-4, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_of_every_parameter_are_those_of_torch(tied, recompute):
    config = ModelConfig(**{**vars(CONFIG), "tie_word_embeddings": tied})
    params, batch = random_params(config), random_batch()
    theirs = torch_model(config, params)
    loss = torch_loss(theirs, batch)
    loss.backward()
    ours, gradient = gradients(language_model_loss(config, recompute=recompute), stack(params), {}, batch)
    assert ours == pytest.approx(loss.item(), abs=1e-5)
    expected, table = {name: p.grad.numpy() for name, p in theirs.named_parameters()}, layout(config)
    seen = set()
    for path, value in unstack(gradient).items():
        for name, part in split(table[path], value):
            close(part, expected[name], name)
            seen.add(name)
    assert seen == expected.keys()


def peft_model(config, params, lora, adapter):
    """Return peft's own LoRA model with the same parameters and adapter."""
    model = peft.get_peft_model(torch_model(config, params), peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), bias="none"))
    state = {}
    for name in model.state_dict():
        for key, values in adapter.items():
            target, factor = key.split(".")
            if f".{target}.lora_{factor.upper()}." in name:
                state[name] = torch.tensor(np.array(values[int(name.split(".layers.")[1].split(".")[0])]))
    assert len(state) == config.num_layers * len(adapter)
    model.load_state_dict(state, strict=False)
    return model


def random_adapter(lora=LORA, config=CONFIG):
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(0.3 * rng.normal(size=value.shape), jnp.float32)
            for name, value in init_adapter(config, lora).items()}


def test_gradients_of_an_adapter_are_those_of_peft():
    params, batch, adapter = random_params(), random_batch(), random_adapter()
    theirs = peft_model(CONFIG, params, LORA, adapter)
    loss = torch_loss(theirs, batch)
    loss.backward()
    ours, gradient = gradients(language_model_loss(CONFIG, lora=LORA), adapter, stack(params), batch)
    assert ours == pytest.approx(loss.item(), abs=1e-5)
    trained = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(trained) == CONFIG.num_layers * len(gradient)
    for name, expected in trained.items():
        layer, rest = name.split(".layers.")[1].split(".", 1)
        _, target, factor = rest.split(".")[:3]
        close(gradient[f"{target}.{factor[-1].lower()}"][int(layer)], expected, name)


def test_fifty_steps_follow_torch():
    """The same batches, AdamW with decay on matrices only, clipping and schedule give the same loss at every step."""
    recipe = Optimizer(learning_rate=3e-3, warmup_steps=10, weight_decay=0.1, clip_norm=0.5, adam_b2=0.98)
    params = random_params()
    theirs = torch_model(CONFIG, params)
    groups = [{"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), eps=1e-8)
    rates = [3e-3 * (step + 1) / 11 if step < 10 else 1.5e-3 * (1 + math.cos(math.pi * (step - 10) / 40))
             for step in range(50)]
    optimizer = make_optimizer(recipe, 50)
    step = make_train_step(language_model_loss(CONFIG), optimizer)
    state = init_state(stack({path: jnp.array(p) for path, p in params.items()}), optimizer)
    for index in range(50):
        batch = random_batch(index % 7)
        for group in adamw.param_groups:
            group["lr"] = rates[index]
        adamw.zero_grad()
        loss = torch_loss(theirs, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adamw.step()
        state, metrics = step(state, {}, batch)
        assert float(metrics["loss"]) == pytest.approx(loss.item(), abs=1e-3), index
        assert float(metrics["gradient_norm"]) == pytest.approx(norm.item(), rel=1e-2)
    assert int(state.step) == 50 and loss.item() < 5.0


@pytest.mark.parametrize("warmup_steps", [0, 1, 8])
def test_every_step_has_an_effect(warmup_steps):
    """The first one of a warm-up too, and the last one of the decay."""
    optimizer = make_optimizer(Optimizer(learning_rate=1e-2, warmup_steps=warmup_steps), 10)
    params = {"norm.scale": jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(10):
        update, state = optimizer.update(params, state, params)
        assert float(jnp.abs(update["norm.scale"]).min()) > 1e-6


def test_what_decays():
    assert {name for name in stack(random_params()) if not decays(name)} == {
        "norm.scale", "layers.attention_norm.scale", "layers.mlp_norm.scale", "layers.attention.bqkv"}


def test_accumulated_groups_are_one_batch():
    params, optimizer = random_params(), optax.sgd(1.0)
    results = []
    for accumulate in (1, 2, 4):
        state = init_state(stack({path: jnp.array(p) for path, p in params.items()}), optimizer)
        step = make_train_step(language_model_loss(CONFIG), optimizer, accumulate)
        results.append(step(state, {}, random_batch(2, 4)))
    for state, metrics in results[1:]:
        for name in ("loss", "gradient_norm", "accuracy"):
            assert float(metrics[name]) == pytest.approx(float(results[0][1][name]), rel=1e-5)
        for name, value in state.trainable.items():
            np.testing.assert_allclose(value, results[0][0].trainable[name], atol=2e-6)


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing():
    optimizer = optax.adam(1e-2)
    step = make_train_step(language_model_loss(CONFIG, lora=LORA), optimizer)
    state, frozen = init_state(random_adapter(), optimizer), stack(random_params())
    state, metrics = step(state, frozen, random_batch())
    assert all(metrics["finite"].values()) and int(state.skipped) == 0
    before = jax.device_get(state)
    broken = {**frozen, "layers.mlp.down": frozen["layers.mlp.down"].at[1].set(jnp.nan)}
    for count in (1, 2):
        state, metrics = step(state, broken, random_batch())
        assert not any(metrics["finite"].values())
        assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1 + count, count, count)
    for a, b in zip(jax.tree.leaves((before.trainable, before.optimizer)),
                    jax.tree.leaves((state.trainable, state.optimizer)), strict=True):
        np.testing.assert_array_equal(a, b)
    state, _ = step(state, frozen, random_batch())
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (2, 0)
    assert any((np.asarray(state.trainable[k]) != before.trainable[k]).any() for k in before.trainable)


def test_stacked_layers_compute_what_the_model_computes():
    params, batch = random_params(), random_batch()
    states, model = hidden(CONFIG, stack(params), batch.tokens, batch.positions, causal_attention)
    expected = build(CONFIG, params)(batch.tokens)
    np.testing.assert_allclose(model.logits(states), expected, atol=1e-5)
    assert all((unstack(stack(params))[path] == value).all() for path, value in params.items())


@pytest.mark.parametrize("rows, length, at_once", [(1, 1, 64), (1, 64, 64), (1, 65, 64), (3, 50, 64), (70, 5, 64),
                                                   (2, 100, 1 << 24)])
def test_cross_entropy_in_chunks(monkeypatch, rows, length, at_once):
    monkeypatch.setattr("qwen_jax.training.loss.LOGITS_AT_ONCE", at_once)
    rng = np.random.default_rng(length)
    states, head = rng.normal(size=(rows, length, 8)).astype(np.float32), rng.normal(size=(30, 8)).astype(np.float32)
    targets, weights = rng.integers(0, 30, (rows, length)), rng.uniform(size=(rows, length)).astype(np.float32)

    def ours(states, head):
        return cross_entropy(states, head, targets, weights)

    states_t, head_t = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (states, head))
    logits = states_t @ head_t.T
    each = torch.nn.functional.cross_entropy(logits.mT, torch.tensor(targets), reduction="none")
    nll = (each * torch.tensor(weights)).sum()
    nll.backward()
    (found, right), gradient = jax.value_and_grad(ours, (0, 1), has_aux=True)(states, head)
    assert float(found) == pytest.approx(nll.item(), rel=1e-5)
    assert float(right) == pytest.approx(weights[logits.argmax(-1).numpy() == targets].sum(), rel=1e-5)
    for mine, theirs in zip(gradient, (states_t.grad, head_t.grad), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("at_once", [64, 1 << 24])
def test_distillation_is_that_of_torch(monkeypatch, at_once):
    monkeypatch.setattr("qwen_jax.training.loss.LOGITS_AT_ONCE", at_once)
    rng, (rows, length, vocab) = np.random.default_rng(2), (2, 70, 30)
    states, guide = (rng.normal(size=(rows, length, dim)).astype(np.float32) for dim in (8, 12))
    head, guide_head = (rng.normal(size=(vocab, dim)).astype(np.float32) for dim in (8, 12))
    targets, weights = rng.integers(0, vocab, (rows, length)), rng.uniform(size=(rows, length)).astype(np.float32)

    def ours(states, head):
        total, *rest = distillation(hidden=states, head=head, teacher_hidden=guide, teacher_head=guide_head,
                                    targets=targets, weights=weights, temperature=3.0, kl_weight=0.7)
        return total, rest

    functional = torch.nn.functional
    states_t, head_t = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (states, head))
    logits, wanted = states_t @ head_t.T, torch.tensor(guide).double() @ torch.tensor(guide_head).double().T
    kl = functional.kl_div(functional.log_softmax(logits / 3, -1), functional.softmax(wanted / 3, -1),
                           reduction="none").sum(-1)
    ce = functional.cross_entropy(logits.mT, torch.tensor(targets), reduction="none")
    total = ((0.3 * ce + 0.7 * 9 * kl) * torch.tensor(weights)).sum()
    total.backward()
    (found, (right, divergence)), gradient = jax.value_and_grad(ours, (0, 1), has_aux=True)(states, head)
    assert float(found) == pytest.approx(total.item(), rel=1e-5)
    assert float(divergence) == pytest.approx((kl * torch.tensor(weights)).sum().item(), rel=1e-5)
    assert float(right) == pytest.approx(weights[logits.argmax(-1).numpy() == targets].sum(), rel=1e-5)
    for mine, theirs in zip(gradient, (states_t.grad, head_t.grad), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_recompute_keeps_less_for_the_backward_pass():
    params = stack(params_of(init(CONFIG, 0)))
    without, kept = (kept_for_backward(language_model_loss(CONFIG, recompute=on), params, {}, random_batch())
                     for on in (False, True))
    weights = sum(value.size * 4 for value in params.values())
    assert weights < kept and kept - weights < 0.3 * (without - weights)


def test_a_frozen_head_gets_no_gradient():
    rng = np.random.default_rng(0)
    states, head = rng.normal(size=(2, 20, 8)).astype(np.float32), rng.normal(size=(30, 8)).astype(np.float32)
    targets, weights = rng.integers(0, 30, (2, 20)), np.ones((2, 20), np.float32)

    def gradient(train_head):
        return jax.grad(lambda *x: 2 * cross_entropy(*x, targets, weights, train_head)[0], (0, 1))(states, head)

    with_head, without = gradient(True), gradient(False)
    np.testing.assert_array_equal(with_head[0], without[0])
    assert np.abs(with_head[1]).max() > 0.1 and not np.any(without[1])


def test_the_logits_of_a_long_row_never_exist_whole():
    """32,768 tokens and Qwen2.5's vocabulary: whole logits would take 20 GB."""
    def total(states, head):
        return cross_entropy(states, head, jnp.zeros((1, 32_768), jnp.int32), jnp.ones((1, 32_768)))[0]

    shapes = jax.ShapeDtypeStruct((1, 32_768, 896), jnp.float32), jax.ShapeDtypeStruct((151_936, 896), jnp.float32)
    compiled = jax.jit(jax.grad(total, (0, 1))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 1e9
