"""The Hopper kernel without a GPU: it lowers for CUDA, and the interpreter agrees with the reference."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import (
    Selection,
    Sparsity,
    mosaic_sm90,
    new_summaries,
    reference,
    select,
    update_summaries,
)


@pytest.mark.parametrize("rows, tokens, kv_heads, group, dim", [
    (1, 512, 2, 7, 64), (1, 512, 4, 7, 128), (2, PAGE, 8, 5, 128), (8, 1, 4, 7, 128), (8, 1, 2, 7, 64)])
def test_lowers_for_cuda(rows, tokens, kv_heads, group, dim):
    shape, blocks = jax.ShapeDtypeStruct, tokens // PAGE if tokens % PAGE == 0 else tokens
    integers = [shape(size, jnp.int32) for size in ((rows, 512), (rows,), (rows,))]
    pages = shape((99, kv_heads, PAGE, dim), jnp.bfloat16)
    selection = Selection(shape((rows, blocks, kv_heads, 24), jnp.int32), shape((rows, blocks, kv_heads), jnp.int32),
                          shape((rows, blocks, kv_heads), jnp.bool_))
    q = shape((rows, tokens, kv_heads, group, dim), jnp.bfloat16)
    lowered = jax.jit(mosaic_sm90.attend).trace(q, pages, pages, *integers, selection).lower(
        lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_what_it_cannot_run_is_refused():
    q = jnp.zeros((1, PAGE, 1, 1, 32), jnp.bfloat16)
    assert "head dims of 64 and 128" in mosaic_sm90.supported(q)
    assert "bfloat16" in mosaic_sm90.supported(q.astype(jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, PAGE])
def test_interpreter_agrees_with_the_reference(tokens):
    params = getattr(plgpu, "InterpretGPUParams", None) or importlib.import_module(
        "jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams
    rng, width, dim = np.random.default_rng(0), 7, 64
    table = jnp.asarray(rng.permutation(np.arange(1, 2 * width + 1)).reshape(2, width), jnp.int32)
    k, v = jnp.asarray(rng.normal(size=(2, 2 * width + 1, 1, PAGE, dim)), jnp.bfloat16)
    length = jnp.array([6 * PAGE + 10, 300])
    start = length - 1 if tokens == 1 else jnp.array([6 * PAGE, 4 * PAGE])
    q = jnp.asarray(2 * rng.normal(size=(2, tokens, 1, 2, dim)), jnp.bfloat16)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    summaries = update_summaries(new_summaries(k.astype(jnp.float32), width), k.astype(jnp.float32), table,
                                 jnp.zeros(2, jnp.int32), length, width * PAGE)
    selection = select(q, k.astype(jnp.float32), summaries, table, start, length, length,
                       Sparsity(budget=.8, dense_tail=0))
    assert int(selection.count.min()) < 6
    want = reference.attend(*wide, table, start, length, selection)
    got = mosaic_sm90.attend(q, k, v, table, start, length, selection, interpret=params(detect_races=True))
    shown = (np.asarray(start)[:, None] + np.arange(tokens)) < np.asarray(length)[:, None]
    np.testing.assert_allclose(np.asarray(got, np.float32)[shown], np.asarray(want)[shown], atol=0.02)
    races = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call").get_races()
    assert not races.races_found
