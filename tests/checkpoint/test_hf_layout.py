"""The table of names, compared with the model's own parameters and with a slow spelling of the fused layouts."""

import numpy as np
import pytest
from hf_folders import hf_model
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.checkpoint.hf_layout import assemble, check_shapes, hf_shapes, layout, split
from qwen_jax.checkpoint.orbax_store import groups
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.model import abstract


def small(kv: int = 2, group: int = 3, tied: bool = True) -> ModelConfig:
    return ModelConfig(vocab_size=11, hidden_size=6, intermediate_size=5, num_layers=2, num_heads=kv * group,
                       num_kv_heads=kv, head_dim=4, tie_word_embeddings=tied)


@pytest.mark.parametrize("tied", [True, False])
def test_paths_and_shapes_are_the_models(tied):
    config = small(tied=tied)
    assert {path: entry.shape for path, entry in layout(config).items()} == {
        path: spec.shape for path, spec in abstract(config).items()}


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_transformers(tied):
    model = hf_model(tied=tied)
    theirs = {name: tuple(t.shape) for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert hf_shapes(ModelConfig.from_hf(model.config.to_dict())) == theirs


@given(kv=st.integers(1, 4), group=st.integers(1, 8), tied=st.booleans())
@settings(max_examples=20, deadline=None)
def test_every_element_goes_where_the_heads_are_and_back(kv, group, tied):
    config = small(kv, group, tied)
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in hf_shapes(config).items()}
    params = {path: assemble(entry, tensors.__getitem__) for path, entry in layout(config).items()}

    h = config.head_dim
    q, k, v = (tensors[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    wqkv = params["layers.1.attention.wqkv"]
    for head in range(kv):
        for member in range(group):
            start = (head * group + member) * h  # transformers repeats KV head j for query heads j*G .. j*G+G-1
            np.testing.assert_array_equal(wqkv[head, member], q[start:start + h])
        np.testing.assert_array_equal(wqkv[head, group], k[head * h:(head + 1) * h])
        np.testing.assert_array_equal(wqkv[head, group + 1], v[head * h:(head + 1) * h])
    o = tensors["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(params["layers.0.attention.wo"][:, kv - 1, group - 1], o[:, -h:])
    np.testing.assert_array_equal(params["layers.0.mlp.gate_up"][1], tensors["model.layers.0.mlp.up_proj.weight"])

    back = {name: value for path, entry in layout(config).items() for name, value in split(entry, params[path])}
    assert list(back) == list(tensors)
    for name, value in back.items():
        assert value.flags.c_contiguous
        np.testing.assert_array_equal(value, tensors[name])


def test_long_lists_of_errors_are_cut():
    with pytest.raises(UserError, match=r"26 missing: .* and 18 more") as caught:
        check_shapes(small(), {}, "nowhere")
    assert len(str(caught.value)) < 600


@given(sizes=st.lists(st.integers(0, 50)), limit=st.integers(1, 60))
def test_groups_keep_the_order_and_the_limit(sizes, limit):
    named = {str(index): size for index, size in enumerate(sizes)}
    found = list(groups(named, limit))
    assert [name for group in found for name in group] == list(named)
    assert all(len(group) == 1 or sum(named[name] for name in group) <= limit for group in found)
