"""Paged attention against a float64 loop, and the page writer against plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from qwen_kernels.attention import (
    PAGE,
    causal_attention,
    check_page_table,
    page_dtype,
    paged_attention,
    write_pages,
    xla,
)
from qwen_kernels.attention.storage import from_storage, to_storage


def brute_force(q, k, v, start, length):
    """Attention in float64, a query at a time; q[B, T, K, G, H], k and v[B, S, K, H] in position order."""
    out = np.zeros(q.shape)
    for b, t, h, g in np.ndindex(*q.shape[:4]):
        seen = min(start[b] + t + 1, length[b])
        if start[b] + t >= length[b]:
            continue
        scores = k[b, :seen, h].astype(np.float64) @ q[b, t, h, g] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h, g] = weights / weights.sum() @ v[b, :seen, h].astype(np.float64)
    return out


def paged_case(rng, tokens, starts, counts, kv_heads=2, group=3, dim=16, width=12, dtype=np.float32):
    """Return random rows whose pages are scattered over the pool, in random order."""
    rows = len(starts)
    length = np.array([s + c for s, c in zip(starts, counts)], np.int32)
    pages = 1 + rows * width
    table = np.zeros((rows, width), np.int32)
    free = rng.permutation(np.arange(1, pages))
    k = rng.standard_normal((rows, width * PAGE, kv_heads, dim)).astype(dtype)
    v = rng.standard_normal((rows, width * PAGE, kv_heads, dim)).astype(dtype)
    k_pages = np.full((pages, kv_heads, PAGE, dim), np.nan, dtype)  # unwritten positions must not be read
    v_pages = k_pages.copy()
    used = 0
    for b in range(rows):
        for n in range(-(-length[b] // PAGE)):
            table[b, n] = free[used]
            used += 1
            filled = min(PAGE, length[b] - n * PAGE)
            at = slice(n * PAGE, n * PAGE + filled)
            k_pages[table[b, n], :, :filled] = k[b, at].swapaxes(0, 1)
            v_pages[table[b, n], :, :filled] = v[b, at].swapaxes(0, 1)
    q = rng.standard_normal((rows, tokens, kv_heads, group, dim)).astype(dtype)
    return q, k, v, k_pages, v_pages, table, np.array(starts, np.int32), length


CASES = {
    "decode": (1, [0, 5, 63, 64, 700], [1, 1, 1, 1, 1]),
    "decode with padding rows": (1, [100, 0, 0], [1, 0, 0]),
    "prefill from zero": (64, [0, 0, 0], [64, 1, 40]),
    "prefill chunk after context": (64, [64, 512, 0], [64, 13, 0]),
    "several query blocks": (256, [0, 128], [256, 200]),
    "query blocks of an odd number of pages": (192, [0, 64], [192, 150]),
    "nothing at all": (1, [0, 0], [0, 0]),
}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_matches_brute_force(name, implementation):
    tokens, starts, counts = CASES[name]
    q, k, v, k_pages, v_pages, table, start, length = paged_case(np.random.default_rng(0), tokens, starts, counts)
    run = jax.jit(lambda *a: paged_attention(*a, implementation=implementation))
    got = run(q, k_pages, v_pages, table, start, length)
    expected = brute_force(q, k, v, start, length)
    for b, count in enumerate(counts):
        np.testing.assert_allclose(np.asarray(got)[b, :count], expected[b, :count], atol=2e-5)
        if not length[b]:
            assert (np.asarray(got)[b] == 0).all(), "a padding row gives zeros"
    assert np.isfinite(np.asarray(got)[np.array(counts) > 0][:, 0]).all()


@pytest.mark.parametrize("kv_heads, group, dim", [(1, 1, 8), (2, 7, 16), (4, 8, 32), (3, 1, 64)])
def test_head_layouts_and_bfloat16(kv_heads, group, dim):
    rng = np.random.default_rng(1)
    q, k, v, k_pages, v_pages, table, start, length = paged_case(rng, 64, [0, 320], [64, 64], kv_heads, group, dim)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    stored = [to_storage(jnp.asarray(x), page_dtype(jnp.bfloat16)) for x in (k_pages, v_pages)]
    got = paged_attention(half[0], *stored, table, start, length)
    assert got.dtype == jnp.bfloat16
    expected = brute_force(*(np.asarray(x, np.float32) for x in half), start, length)
    assert np.abs(np.asarray(got, np.float32) - expected).max() < 0.03


@pytest.mark.parametrize("rows, tokens, pages", [(1, 1, 4), (40, 1, 3), (160, 1, 1), (1, 128, 4), (3, 128, 2),
                                                 (3, 64, 4)])
def test_chunks_are_shorter_where_many_rows_share_the_processors_cache(rows, tokens, pages):
    """A chunk of 160 rows' keys would have 10 MB with as many pages as one row's."""
    rng = np.random.default_rng(3)
    starts = rng.integers(0, 600, rows).tolist()
    q, k, v, *paged = paged_case(rng, tokens, starts, [tokens] * rows)
    assert xla.chunk_pages(q, PAGE) == pages
    out = jax.jit(lambda *a: paged_attention(*a, implementation="xla"))(q, *paged)
    np.testing.assert_allclose(out, brute_force(q, k, v, *paged[-2:]), rtol=2e-4, atol=2e-5)


def test_result_does_not_depend_on_the_neighbours():
    rng = np.random.default_rng(2)
    q, _, _, k_pages, v_pages, table, start, length = paged_case(rng, 1, [10, 700, 300], [1, 1, 1])
    run = jax.jit(paged_attention)
    together = np.asarray(run(q, k_pages, v_pages, table, start, length))
    for b in range(3):
        one = slice(b, b + 1)
        alone = np.asarray(run(q[one], k_pages, v_pages, table[one], start[one], length[one]))
        np.testing.assert_allclose(alone[0], together[b], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_write_pages(dtype):
    rng = np.random.default_rng(3)
    table = np.array([[3, 1, 5], [2, 4, 0], [6, 0, 0]], np.int32)
    start, length = np.array([60, 0, 0], np.int32), np.array([60 + 70, 64, 0], np.int32)
    values = jnp.asarray(rng.standard_normal((3, 70, 2, 8)), dtype)
    before = to_storage(jnp.asarray(rng.standard_normal((7, 2, PAGE, 8))), page_dtype(dtype))
    after = np.asarray(from_storage(write_pages(before, values, table, start, length)), np.float32)
    expected = np.asarray(from_storage(before), np.float32).copy()
    for b in range(3):
        for t in range(70):
            position = start[b] + t
            if position < length[b]:
                expected[table[b, position // PAGE], :, position % PAGE] = np.asarray(values[b, t], np.float32)
    np.testing.assert_array_equal(after[1:], expected[1:])  # page 0 takes the padding


def test_storage_keeps_bits():
    values = jnp.asarray([1.0, -2.5, jnp.nan, jnp.inf], jnp.bfloat16)
    assert page_dtype(jnp.bfloat16) == jnp.uint16, "on CPU bf16 pages hold raw bits"
    kept = from_storage(to_storage(values, jnp.uint16))
    assert kept.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(kept, np.float32), np.asarray(values, np.float32))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_causal_attention_segments(implementation):
    rng = np.random.default_rng(4)
    q = rng.standard_normal((1, 150, 2, 3, 8)).astype(np.float32)
    k, v = (rng.standard_normal((1, 150, 2, 8)).astype(np.float32) for _ in range(2))
    segments = np.array([[0] * 70 + [1] * 80])
    got = np.asarray(causal_attention(q, k, v, segment_ids=segments, implementation=implementation))
    first = brute_force(q[:, :70], k[:, :70], v[:, :70], [0], [70])
    second = brute_force(q[:, 70:], k[:, 70:], v[:, 70:], [0], [80])
    np.testing.assert_allclose(got, np.concatenate([first, second], 1), atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_shared_segment_is_seen_by_all_that_follow(implementation):
    rng = np.random.default_rng(6)
    q = rng.standard_normal((1, 150, 2, 3, 8)).astype(np.float32)
    k, v = (rng.standard_normal((1, 150, 2, 8)).astype(np.float32) for _ in range(2))
    segments = np.array([[0] * 70 + [1] * 30 + [2] * 50])
    got = np.asarray(causal_attention(q, k, v, segment_ids=segments, shared_segment=0, implementation=implementation))
    for number in (1, 2):
        seen = (segments[0] == 0) | (segments[0] == number)
        alone = brute_force(q[:, seen], k[:, seen], v[:, seen], [0], [seen.sum()])
        np.testing.assert_allclose(got[:, seen], alone, atol=2e-5)


@pytest.mark.parametrize("length, dtype", [(1, "float32"), (63, "float32"), (130, "float32"), (1100, "bfloat16")])
def test_dense_attention_in_blocks_is_the_reference(length, dtype):
    rng = np.random.default_rng(length)
    q = jnp.asarray(rng.standard_normal((2, length, 2, 2, 8)), dtype)
    k, v = (jnp.asarray(rng.standard_normal((2, length, 2, 8)), dtype) for _ in range(2))
    ours, theirs = (np.asarray(causal_attention(q, k, v, implementation=name), np.float32)
                    for name in ("xla", "reference"))
    np.testing.assert_allclose(ours, theirs, atol=2e-6 if dtype == "float32" else 0.02)


def test_what_is_refused():
    q, _, _, k_pages, v_pages, table, start, length = paged_case(np.random.default_rng(5), 1, [3], [1])
    with pytest.raises(ValueError, match="implementation must be one of xla, reference, or None, not 'cuda'"):
        paged_attention(q, k_pages, v_pages, table, start, length, implementation="cuda")
    with pytest.raises(ValueError, match="implementation must be one of xla, reference, or None, not 'flash'"):
        causal_attention(q, q[:, :, :, 0], q[:, :, :, 0], implementation="flash")
    with pytest.raises(ValueError, match="pages must be"):
        paged_attention(q, k_pages[:, :, :32], v_pages[:, :, :32], table, start, length)
    with pytest.raises(ValueError, match="does not match"):
        paged_attention(q[..., :8], k_pages, v_pages, table, start, length)
    with pytest.raises(ValueError, match="do not hold"):
        paged_attention(q.astype(jnp.bfloat16), k_pages, v_pages, table, start, length)


@pytest.mark.parametrize("change, message", [
    (None, None), ({"table": 99}, "names a page outside 1 .. 12"), ({"table": 0}, "names a page outside"),
    ({"length": 800}, "a row of 800 tokens exceeds its page table")])
def test_checkify_finds_bad_page_tables(change, message):
    """Unused entries may hold anything."""
    _, _, _, k_pages, _, table, _, length = paged_case(np.random.default_rng(5), 1, [100], [1])
    table[0, 5:] = 1 << 20
    if change:
        table[0, 1] = change.get("table", table[0, 1])
        length[0] = change.get("length", length[0])
    check = checkify.checkify(lambda table, length: check_page_table(table, length, len(k_pages)))
    error, _ = jax.jit(check)(table, length)
    assert message in error.get() if message else error.get() is None
