"""e4m3 weights against ml_dtypes' own grid and float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.quantization import (
    E4M3,
    QuantizedTensor,
    matrix,
    multiplies_fp8,
    product,
    quantize,
    quantize_host,
    rows,
    saturate,
    widened,
)

GRID = np.sort(np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)[~np.isnan(
    np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32))])


def nearest(x):
    return np.abs(GRID[None] - np.ravel(x)[:, None]).min(axis=1).reshape(np.shape(x))


def test_conversion_saturates_and_keeps_nan():
    x = jnp.array([449, 464, 465, 1e9, jnp.inf, -jnp.inf, -500, 447, jnp.nan], jnp.float32)
    assert np.isnan(np.asarray(x.astype(E4M3), np.float32)[2])  # what a plain cast does
    for convert in (saturate, jax.jit(saturate)):
        got = np.asarray(convert(x), np.float32)
        np.testing.assert_array_equal(got[:8], [448, 448, 448, 448, 448, -448, -448, 448])
        assert np.isnan(got[8])
    np.testing.assert_array_equal(np.asarray(saturate(x, jnp.float8_e5m2), np.float32)[3:6], [57344] * 2 + [-57344])


@pytest.mark.parametrize("shape, inputs", [((6, 5, 8, 32), 1), ((48, 2, 3, 16), 3), ((2, 24, 40), 1)])
def test_weights_are_within_half_a_step_of_the_grid(shape, inputs):
    weight = np.random.default_rng(0).normal(size=shape)
    weight *= np.logspace(-3, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    weight = weight.astype(np.float32)
    weight[-1, 0] = 0
    tensor = quantize(jnp.asarray(weight), inputs)
    assert tensor.values.dtype == E4M3 and tensor.values.shape == shape and tensor.scale.shape == shape[:-inputs]
    scale = np.asarray(tensor.scale).reshape(tensor.scale.shape + (1,) * inputs)
    values = np.asarray(tensor.values, np.float32)
    np.testing.assert_allclose(np.abs(values - weight / scale), nearest(weight / scale), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(tensor.dequantize(jnp.float32)), values * scale)
    largest = np.abs(values).max(axis=tuple(range(len(shape) - inputs, len(shape))))
    assert set(np.unique(largest)) <= {0, 448} and (np.asarray(tensor.scale)[largest == 0] == 1).all()
    on_host = quantize_host(weight, inputs)
    np.testing.assert_allclose(on_host[1], tensor.scale, rtol=1e-6)  # XLA multiplies by the reciprocal
    assert np.mean(on_host[0].view(np.uint8) != np.asarray(tensor.values).view(np.uint8)) < 1e-3


@pytest.mark.parametrize("spec, x, weight", [
    ("btd,nd->btn", (2, 3, 64), (40, 64)), ("gbtd,gfd->gbtf", (2, 2, 3, 64), (2, 24, 64)),
    ("nd,vd->nv", (5, 64), (99, 64))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products(spec, x, weight, dtype):
    generator = np.random.default_rng(1)
    x = jnp.asarray(generator.normal(size=x) * 30, dtype)
    tensor = quantize(jnp.asarray(generator.normal(size=weight), dtype), 1)
    exact = np.einsum(spec, np.asarray(x, np.float64), np.asarray(tensor.dequantize(jnp.float32), np.float64))
    size = np.abs(exact).max()
    wide = np.asarray(jax.jit(product, static_argnums=(0, 3))(spec, x, widened(tensor), jnp.float32))
    np.testing.assert_allclose(wide, exact, atol=1e-5 * size)
    got = np.asarray(jax.jit(product, static_argnums=(0, 3))(spec, x, tensor, jnp.float32))
    per_vector = np.abs(np.asarray(x, np.float32)).max(axis=-1, keepdims=True) / 448
    rounded = np.asarray(saturate(jnp.asarray(np.asarray(x, np.float32) / per_vector)), np.float64) * per_vector
    want = np.einsum(spec, rounded, np.asarray(tensor.dequantize(jnp.float32), np.float64))
    np.testing.assert_allclose(got, want, atol=1e-4 * size)
    assert 1e-3 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.03
    assert product(spec, x, tensor).dtype == jnp.dtype(dtype)


def test_bad_vectors_give_nan_and_spoil_no_other():
    tensor = quantize(jax.random.normal(jax.random.key(0), (8, 16)), 1)
    x = np.ones((5, 16), np.float32)
    x[1, 3], x[2, 5], x[3] = np.nan, np.inf, 0
    out = np.asarray(product("nd,vd->nv", jnp.asarray(x), tensor))
    assert np.isnan(out[1:3]).all() and (out[3] == 0).all()
    np.testing.assert_array_equal(out[0], out[4])
    assert np.isfinite(out[0]).all()


def test_matrix_and_rows():
    weight = jax.random.normal(jax.random.key(0), (6, 2, 3, 4))
    for given in (weight, quantize(weight, 3)):
        flat = matrix(given, 3)
        assert flat.shape == (6, 24)
        if isinstance(flat, QuantizedTensor):
            np.testing.assert_array_equal(flat.dequantize(jnp.float32),
                                          given.dequantize(jnp.float32).reshape(6, 24))
    table = quantize(jax.random.normal(jax.random.key(1), (10, 16)), 1)
    index = jnp.array([[3, 0], [9, 3]])
    np.testing.assert_array_equal(rows(table, index, jnp.bfloat16), table.dequantize(jnp.bfloat16)[index])


@pytest.mark.gpu
def test_which_products_the_backend_computes_in_8_bits():
    """A backend without 8-bit products compiles a wider copy of the weight; a backend with them none."""
    weight, x = quantize(jnp.ones((384, 256)), 1), jnp.ones((32, 256), jnp.bfloat16)
    compiled = jax.jit(lambda x, weight: product("tk,nk->tn", x, weight)).lower(x, weight).compile().as_text()
    wide = re.findall(r"(?:bf16|f16|f32)\[(?:384,256|256,384)\]", compiled)
    assert "f8e4m3fn[384,256]" in compiled and bool(wide) != multiplies_fp8()
