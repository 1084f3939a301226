"""The 8-bit Hopper kernels on the GPU they are for: ``JAX_PLATFORMS=cuda,cpu pytest -m gpu``."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import mosaic_eight_bit_sm90 as kernel
from test_mosaic_eight_bit import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("dense", [0, 1], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind, tokens", [("int8", 1), ("e4m3", 1), ("e4m3", 4 * PAGE)])
@pytest.mark.parametrize("group, dim", [(7, 64), (7, 128), (5, 128), (8, 128)])
def test_agrees_with_the_reference(kind, tokens, group, dim, dense):
    lengths = [40 * PAGE, 39 * PAGE + 1, 20 * PAGE - 7]
    # No bias of values: to that, means of thousands of values would be small, and drown in bfloat16's rounding.
    case = Case(kind, tokens, lengths, 40, group, dim, dense=dense, value_bias=0)
    attend = jax.jit(kernel.attend)
    got = np.asarray(attend(*case.arguments), np.float32)
    if tokens == 1:
        assert case.cosines(got, case.oracle()).min() > 0.9999
    else:
        assert case.cosines(got, case.oracle()).min() > 0.997
        assert case.cosines(got, case.rounded()).min() > 0.9995
    for _ in range(3):  # a race would show as another result
        np.testing.assert_array_equal(np.asarray(attend(*case.arguments), np.float32), got)


@pytest.mark.parametrize("tokens", [1, PAGE])
def test_rows_keep_to_themselves(tokens):
    case = Case("e4m3", tokens, [20 * PAGE, 20 * PAGE, 0], 20, 7, 128, dense=1)
    q, k_pages, *rest = case.arguments
    clean = np.asarray(jax.jit(kernel.attend)(q, k_pages, *rest), np.float32)
    damaged = dataclasses.replace(k_pages, stored=k_pages.stored.at[case.table[0, 5]].set(jnp.nan))
    dirty = np.asarray(jax.jit(kernel.attend)(q, damaged, *rest), np.float32)
    assert np.isnan(dirty[0]).any() and not clean[2].any()
    np.testing.assert_array_equal(dirty[1:], clean[1:])
