"""Effects of tuned values: on the bucket table, the choice of a prefill bucket, the kernel's tiles."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_kernels.attention import PAGE, paged_attention, xla

from qwen_jax.engine.runner.executable_cache import attention_tiles
from qwen_jax.engine.scheduling.buckets import bucket_table, default_grid, default_limits, pick_prefill
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY, FULL, SPARSE

GRID = replace(default_grid("cpu"), decode_rows=(2, 12), decode_steps=16, prefill_chunk_pages=1, decode_chunk_pages=2,
               step_overhead_tokens=256)


def test_a_grid_is_cut_to_the_engine():
    limits = default_limits(64, 16384, grid=GRID)
    assert limits.decode_rows == (2, 12) and limits.decode_steps == 16 and limits.step_overhead_tokens == 256
    assert default_limits(8, 4096, grid=GRID).decode_rows == (2, 8)
    assert default_limits(1, 64, grid=GRID).decode_rows == (2,)
    assert default_limits(64, 4096, grid=default_grid("cpu")) == default_limits(64, 4096)
    assert default_limits(64, 4096, "gpu").prefill_shapes != limits.prefill_shapes


def test_tiles_are_part_of_the_programs_of_full_attention():
    table = bucket_table(default_limits(64, 16384, grid=GRID))
    chunks = {(b.phase, b.schedule == SPARSE): set() for b in table}
    for bucket in table:
        chunks[bucket.phase, bucket.schedule == SPARSE].add(bucket.chunk_pages)
    assert chunks == {("prefill", False): {1}, ("decode", False): {2}, ("prefill", True): {0}, ("decode", True): {0}}
    assert {b.chunk_pages for b in bucket_table(default_limits())} == {0}


def test_dear_steps_favour_fewer_of_them():
    shapes = [b for b in bucket_table(default_limits(64, 2048), DEFAULT_POLICY) if (b.phase, b.schedule) == (
        "prefill", FULL)]
    assert str(pick_prefill(shapes, [200, 100], 1)).endswith("1x64")
    assert str(pick_prefill(shapes, [200, 100], 1000)).endswith("2x256")


@pytest.mark.parametrize("tokens", [1, 16])
def test_tiles_change_the_program_and_not_the_result(tokens):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, tokens, 2, 2, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(9, 2, PAGE, 16)), jnp.float32) for _ in range(2))
    table = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32)
    length = jnp.asarray([200, 256], jnp.int32)
    arguments = q, k, v, table, length - tokens, length

    def run(pages):
        with attention_tiles(pages):
            lowered = jax.jit(lambda *x: paged_attention(*x)).lower(*arguments)
        return lowered.as_text(), lowered.compile()(*arguments)

    before = xla.CHUNK_PAGES
    texts, results = zip(*map(run, (0, 1, 2)))
    spans = [f"tensor<2x2x{pages * PAGE}x16xf32>" for pages in (4, 1, 2)]  # keys of both rows and heads in one chunk
    for text, span in zip(texts, spans):
        assert [shape for shape in spans if shape in text] == [span]
    assert before == xla.CHUNK_PAGES
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=2e-5, atol=2e-6)
