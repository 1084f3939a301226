"""Any degree of tensor parallelism on every released size: what `expand` makes computes the same, and can be undone."""

from dataclasses import replace

import numpy as np
import pytest

from qwen_jax.config import PRESETS
from qwen_jax.errors import UserError
from qwen_jax.model import abstract
from qwen_jax.parallel.layout import best_layout, contract, expand, expanded_shape, layouts
from qwen_jax.quantization import QuantizedTensor
from qwen_jax.quantization.quantized_tensor import quantize_host

SIZES = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")
DEGREES = range(1, 9)


def shrunk(size: str, **changes):
    """A released size's heads on narrow layers."""
    config = PRESETS[f"qwen2.5-{size}"]
    return replace(config, **{"hidden_size": 16, "head_dim": 4, "intermediate_size": 50, "vocab_size": 101,
                              "num_layers": 1, **changes})


def parameters(config, seed=0):
    rng = np.random.default_rng(seed)
    return {path: (rng.standard_normal(spec.shape).astype(np.float32), spec.axes)
            for path, spec in abstract(config, "float32").items()}


@pytest.mark.parametrize("size", SIZES)
def test_contract_undoes_expand_to_the_bit(size):
    config = shrunk(size)
    for tensor in DEGREES:
        for layout in layouts(config, tensor):
            for path, (value, axes) in parameters(config).items():
                there = expand(value, axes, layout)
                assert there.shape == expanded_shape(value.shape, axes, layout)
                for axis, name in enumerate(axes):
                    assert name not in ("kv_heads", "mlp", "vocab") or there.shape[axis] % tensor == 0
                np.testing.assert_array_equal(contract(there, axes, layout), value, err_msg=path)


@pytest.mark.parametrize("size", SIZES)
def test_every_query_head_is_somewhere_once_with_its_own_key(size):
    config = shrunk(size)
    for tensor in DEGREES:
        for layout in layouts(config, tensor):
            found = sorted((head, query) for head, row in zip(layout.heads, layout.queries, strict=True)
                           for query in row if query >= 0)
            assert found == [(head, query) for head in range(config.num_kv_heads) for query in range(config.group_size)]


@pytest.mark.parametrize("size", SIZES)
def test_attention_with_padded_and_copied_heads_is_the_same(size):
    """Brute force: project, attend to nothing but oneself, project back, in float64."""
    config = shrunk(size)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, config.hidden_size))
    values = {path.rpartition(".")[2]: (value.astype(np.float64), axes) for path, (value, axes) in
              parameters(config).items()}

    def attend(wqkv, bqkv, wo):
        qkv = np.einsum("td,kghd->tkgh", x, wqkv) + bqkv
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        scores = np.einsum("tkgh,skh->kgts", q, k)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("tkgh,dkgh->td", np.einsum("kgts,skh->tkgh", weights, v), wo)

    names = ("wqkv", "bqkv", "wo")
    wanted = attend(*(values[name][0] for name in names))
    for tensor in DEGREES:
        for layout in layouts(config, tensor):
            got = attend(*(expand(*values[name], layout) for name in names))
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


def test_degrees_that_divide_change_nothing():
    config = PRESETS["qwen2.5-72b"]
    for tensor in (1, 2, 4, 8):
        assert best_layout(config, tensor, 1 << 20).unchanged
    whole, = layouts(config, 1)
    assert whole.unchanged and not any(whole.waste.values())


def test_the_two_ways_of_14b_on_five_devices():
    """8 KV heads and 40 query heads: pad to 10 and 50, or give every device a copy of all KV heads."""
    padded, copied = layouts(PRESETS["qwen2.5-14b"], 5)
    assert (padded.slots, padded.slots * padded.group, padded.copies) == (10, 50, 1)
    assert (copied.slots, copied.slots * copied.group, copied.copies) == (40, 40, 5)
    assert padded.waste["query_heads"] == 0.25 and copied.waste["kv_heads"] == 4
    assert best_layout(PRESETS["qwen2.5-14b"], 5, 1 << 20) == padded  # a long cache: five times is too much


def test_no_layout_is_larger_than_another_in_all_respects():
    for size in SIZES:
        for tensor in DEGREES:
            sizes = [(one.slots, one.slots * one.group) for one in layouts(PRESETS[f"qwen2.5-{size}"], tensor)]
            assert sizes == sorted(sizes) and sorted(sizes, key=lambda pair: -pair[1]) == sizes
            assert len({one[0] for one in sizes}) == len({one[1] for one in sizes}) == len(sizes)


@pytest.mark.parametrize("path", ["layers.0.attention.wqkv", "layers.0.attention.wo", "layers.0.mlp.gate_up",
                                  "layers.0.mlp.down", "embed.weight"])
def test_8_bit_weights_expand_as_their_values_do(path):
    config = shrunk("0.5b")
    value, axes = parameters(config)[path]
    inputs = {"wo": 3}.get(path.rpartition(".")[2], 1)
    tensor = QuantizedTensor(*quantize_host(value, inputs))
    layout = best_layout(config, 8, 100)
    there = expand(tensor, axes, layout)
    wide = np.asarray(there.values, np.float32) * there.scale.reshape(there.scale.shape + (1,) * inputs)
    expected = expand(np.asarray(tensor.values, np.float32) * tensor.scale.reshape(tensor.scale.shape + (1,) * inputs),
                      axes, layout)
    np.testing.assert_array_equal(wide, expected)
    assert (there.scale > 0).all()
    back = contract(there, axes, layout)
    np.testing.assert_array_equal(back.scale, tensor.scale)
    np.testing.assert_array_equal(back.values.view(np.uint8), tensor.values.view(np.uint8))


def test_a_degree_that_is_no_number_of_devices_is_refused():
    for bad in (0, -1, 2.0, True):
        with pytest.raises(UserError, match="positive integer"):
            layouts(PRESETS["qwen2.5-7b"], bad)
