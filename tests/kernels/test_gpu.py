"""The Hopper kernel on the GPU it is for: ``JAX_PLATFORMS=cuda,cpu pytest -m gpu`` (or ``scripts/gpu_check.sh``)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import (
    Sparsity,
    mosaic_sm90,
    new_summaries,
    reference,
    select,
    update_summaries,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")]

KV_HEADS = 2


def case(rows, width, group, dim, tokens, length, seed=0):
    """Pages in random order, queries at the end of each row, and the selection that fits."""
    rng = np.random.default_rng(seed)
    table = jnp.asarray(rng.permutation(np.arange(1, rows * width + 1)).reshape(rows, width), jnp.int32)
    k, v = jnp.asarray(rng.normal(size=(2, rows * width + 1, KV_HEADS, PAGE, dim)), jnp.bfloat16)
    q = jnp.asarray(2 * rng.normal(size=(rows, tokens, KV_HEADS, group, dim)), jnp.bfloat16)
    length = jnp.asarray(length, jnp.int32)
    start = length - 1 if tokens == 1 else (length - 1) // PAGE * PAGE - tokens + PAGE
    return q, k, v, table, start, length


def chosen(q, k, table, start, length, sparsity):
    @jax.jit
    def run(q, k):
        summaries = update_summaries(new_summaries(k, table.shape[1]), k, table, jnp.zeros_like(start), length,
                                     table.shape[1] * PAGE)
        return select(q, k, summaries, table, start, length, length, sparsity)

    return run(q, k)


@pytest.mark.parametrize("dense_tail", [0, 1 << 20], ids=["sparse", "dense"])
@pytest.mark.parametrize("tokens", [1, 4 * PAGE], ids=["decode", "prefill"])
@pytest.mark.parametrize("group, dim", [(7, 64), (7, 128), (5, 128), (8, 128)])
def test_agrees_with_the_reference(group, dim, tokens, dense_tail):
    arrays = q, k, v, table, start, length = case(3, 40, group, dim, tokens, [40 * PAGE, 39 * PAGE + 1, 20 * PAGE - 7])
    selection = chosen(q, k, table, start, length, Sparsity(budget=1.0, dense_tail=dense_tail))
    want = jax.jit(reference.attend)(*(x.astype(jnp.float32) for x in arrays[:3]), *arrays[3:], selection)
    attend = jax.jit(mosaic_sm90.attend)
    got = attend(*arrays, selection)
    shown = np.asarray(start)[:, None] + np.arange(tokens) < np.asarray(length)[:, None]
    a, b = np.asarray(got, np.float32)[shown], np.asarray(want)[shown]
    assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-2
    for _ in range(3):  # a race would show as another result
        np.testing.assert_array_equal(np.asarray(attend(*arrays, selection)), np.asarray(got))


def test_nan_stays_in_its_row():
    arrays = q, k, v, table, start, length = case(2, 20, 7, 128, PAGE, [20 * PAGE, 20 * PAGE])
    selection = chosen(q, k, table, start, length, Sparsity(dense_tail=1 << 20))
    clean = jax.jit(mosaic_sm90.attend)(*arrays, selection)
    dirty = jax.jit(mosaic_sm90.attend)(q, k.at[table[0, 5]].set(jnp.nan), *arrays[2:], selection)
    assert np.isnan(np.asarray(dirty[0], np.float32)).any()
    np.testing.assert_array_equal(np.asarray(dirty[1]), np.asarray(clean[1]))
