"""Logits against transformers, over head layouts, tying, rope types and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracle import hf_logits, random_qwen2

from qwen_jax.checkpoint import from_transformers
from qwen_jax.model import Qwen2, abstract, build, init, params_of

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}

# name: (transformers options, tokens per row)
CONFIGURATIONS = {
    "mha, ratio 1": (dict(num_attention_heads=4, num_key_value_heads=4), 40),
    "ratio 2": (dict(num_attention_heads=4, num_key_value_heads=2), 40),
    "ratio 7 (0.5B layout)": (dict(num_attention_heads=14, num_key_value_heads=2, hidden_size=112), 40),
    "ratio 7 (7B layout)": (dict(num_attention_heads=28, num_key_value_heads=4, hidden_size=112), 40),
    "ratio 8 (3B layout)": (dict(num_attention_heads=16, num_key_value_heads=2, hidden_size=128), 40),
    "odd heads 3/1": (dict(num_attention_heads=3, num_key_value_heads=1, hidden_size=48), 40),
    "odd heads 5/5": (dict(num_attention_heads=5, num_key_value_heads=5, hidden_size=80), 40),
    "odd groups 15/3": (dict(num_attention_heads=15, num_key_value_heads=3, hidden_size=60), 40),
    "tied": (dict(tie_word_embeddings=True), 40),
    "small rope base (Math)": (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}), 40),
    "long": (dict(num_hidden_layers=1), 1000),
    "head dim apart from width": (dict(head_dim=24), 40),
    "epsilon 1e-5": (dict(rms_norm_eps=1e-5), 40),
    "yarn inside the original length": (dict(rope_parameters=YARN), 50),
    "yarn beyond the original length": (dict(rope_parameters=YARN), 200),
    "yarn, given attention factor": (dict(rope_parameters=YARN | {"attention_factor": 0.8}), 100),
    "yarn, mscale and betas": (dict(rope_parameters=YARN | {"mscale": 1.2, "mscale_all_dim": 0.7, "beta_fast": 16.0,
                                                            "beta_slow": 2.0}), 100),
    "yarn, not truncated": (dict(rope_parameters=YARN | {"truncate": False}), 100),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_match_transformers(name):
    options, length = CONFIGURATIONS[name]
    hf = random_qwen2(**options)
    tokens = np.random.default_rng(1).integers(0, 320, (2, length))
    expected = hf_logits(hf, tokens).numpy()
    model = build(*from_transformers(hf))
    got = np.asarray(jax.jit(lambda t: model(t))(tokens))
    assert got.dtype == np.float32 and got.shape == (2, length, 320)
    assert 1 < expected.std() < 10, "the oracle's logits must have a realistic scale"
    assert np.abs(got - expected).max() <= 2e-4
    assert (got.argmax(-1) == expected.argmax(-1)).all()


def test_padded_batch_matches_transformers():
    """Left and right padding: a segment of its own hides the padding, positions count real tokens."""
    hf = random_qwen2()
    model = build(*from_transformers(hf))
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 320, (3, 24))
    mask = np.ones((3, 24), int)
    mask[1, :9] = 0
    mask[2, 15:] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    expected = hf_logits(hf, tokens, attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions)).numpy()
    got = np.asarray(model(jnp.asarray(tokens), positions=jnp.asarray(positions), segment_ids=jnp.asarray(mask)))
    real = mask.astype(bool)
    assert np.abs(got - expected)[real].max() <= 2e-4
    assert (got.argmax(-1) == expected.argmax(-1))[real].all()


def test_bfloat16_stays_close_to_float32():
    hf = random_qwen2()
    tokens = np.random.default_rng(3).integers(0, 320, (2, 32))
    expected = hf_logits(hf, tokens).numpy()
    got = np.asarray(build(*from_transformers(hf, dtype="bfloat16"))(jnp.asarray(tokens)))
    assert np.abs(got - expected).mean() < 0.05 * expected.std()


def test_a_module_like_any_other():
    """split, grad and vmap, and no second copy of a tied embedding."""
    config, params = from_transformers(random_qwen2(tie_word_embeddings=True))
    model = build(config, params)
    assert model.head is None and "head.weight" not in params_of(model)
    assert params_of(model).keys() == abstract(config).keys()
    graph, state = nnx.split(model)
    tokens = jnp.arange(12).reshape(2, 6)
    assert len(jax.tree.leaves(state)) == 2 + config.num_layers * 7

    def loss(state):
        return nnx.merge(graph, state)(tokens).mean()

    gradients = params_of(nnx.merge(graph, jax.grad(loss)(state)))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in gradients.values())
    rows = jax.vmap(lambda row: nnx.merge(graph, state)(row[None])[0])(tokens)
    np.testing.assert_allclose(rows, model(tokens), atol=2e-5)


def test_gradients_match_torch():
    hf = random_qwen2(num_attention_heads=14, num_key_value_heads=2, hidden_size=112)
    config, params = from_transformers(hf)
    graph, state = nnx.split(build(config, params))
    tokens = np.random.default_rng(4).integers(0, 320, (2, 16))
    weight = np.random.default_rng(5).standard_normal((2, 16, 320)).astype(np.float32)
    (hf(torch.tensor(tokens)).logits * torch.tensor(weight)).mean().backward()
    gradients = params_of(nnx.merge(graph, jax.grad(
        lambda s: (nnx.merge(graph, s)(jnp.asarray(tokens)) * weight).mean())(state)))
    wanted = {"layers.1.mlp.down": hf.model.layers[1].mlp.down_proj.weight.grad,
              "layers.0.attention.wo": hf.model.layers[0].self_attn.o_proj.weight.grad,
              "embed.weight": hf.model.embed_tokens.weight.grad,
              "norm.scale": hf.model.norm.weight.grad}
    for path, expected in wanted.items():
        expected = expected.numpy()
        error = np.linalg.norm(np.asarray(gradients[path]).reshape(expected.shape) - expected)
        assert error <= 1e-4 * np.linalg.norm(expected), path


def test_abstract_allocates_nothing_and_names_every_axis():
    from qwen_jax.config import ModelConfig

    config = ModelConfig.preset("qwen2.5-72b")
    specs = abstract(config)
    assert sum(np.prod(spec.shape) for spec in specs.values()) == config.num_parameters
    assert specs["layers.79.attention.wqkv"].shape == (8, 10, 128, 8192)
    assert all(len(spec.axes) == len(spec.shape) for spec in specs.values())


def test_build_names_what_does_not_fit():
    config, params = from_transformers(random_qwen2())
    params.pop("norm.scale")
    with pytest.raises(KeyError, match="norm.scale"):
        build(config, params)


def test_init_is_seeded():
    from qwen_jax.config import ModelConfig

    config = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1,
                         head_dim=16)
    first, again, other = (params_of(init(config, seed)) for seed in (1, 1, 2))
    assert isinstance(init(config), Qwen2)
    assert all((first[path] == again[path]).all() for path in first)
    assert (first["embed.weight"] != other["embed.weight"]).any()
    assert abs(float(first["layers.0.mlp.down"].std()) - 48**-0.5) < 0.02
