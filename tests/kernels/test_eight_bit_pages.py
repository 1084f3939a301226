"""8-bit pages against float64, with key biases as released checkpoints have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_kernels.attention import (
    PAGE,
    EightBitPages,
    PageFormat,
    eight_bit_dtype,
    page_dtype,
    paged_attention,
    write_pages,
)
from qwen_kernels.sparse_attention import Sparsity, new_summaries, sparse_attention, update_summaries

ROWS, HEADS, GROUP, DIM, WIDTH = 2, 2, 3, 64, 12
FREQUENCIES = 1e6 ** (-np.arange(DIM // 2) / (DIM // 2))


def rotate(x, positions):
    """``x[..., H]`` at ``positions[...]``, in float64."""
    angles = positions[..., None] * FREQUENCIES
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * np.cos(angles) - second * np.sin(angles),
                           second * np.cos(angles) + first * np.sin(angles)], axis=-1)


def key_bias(norm, spikes=0):
    """A bias per head with most of its norm in a few channels, as in Qwen2.5."""
    rng = np.random.default_rng(3)
    bias = rng.standard_normal((HEADS, DIM)) * np.exp(1.5 * rng.standard_normal((HEADS, DIM)))
    if spikes:
        at = np.stack([rng.permutation(DIM)[:spikes] for _ in range(HEADS)])
        np.put_along_axis(bias, at, 167 * rng.choice([-1, 1], at.shape), axis=1)
        return bias
    return bias * norm / np.linalg.norm(bias, axis=1, keepdims=True)


class Case:
    """Rows of a paged cache in 8 bits, and what was to be stored, in float64."""

    def __init__(self, kind, bias, tokens=PAGE, logits=1.0, length=WIDTH * PAGE):
        rng = np.random.default_rng(0)
        shape = ROWS, length, HEADS, DIM
        spread = np.exp(0.5 * rng.standard_normal((HEADS, DIM)))  # channels differ
        content, self.v = (rng.standard_normal(shape) * spread for _ in range(2))
        positions = np.broadcast_to(np.arange(length)[None, :, None], shape[:3])
        bare, self.k = rotate(content, positions), rotate(content + bias, positions)
        self.v_bias = rng.standard_normal((HEADS, DIM))
        self.start, self.length = np.full(ROWS, length - tokens), np.array([length, length - 7])
        self.q = rng.standard_normal((ROWS, tokens, HEADS, GROUP, DIM))
        scores = np.einsum("btkgh,bskh->btkgs", self.q, self.k) * DIM**-0.5
        self.q *= logits / scores.std(axis=-1, keepdims=True)  # so that the logits of a query have this deviation
        planes = np.hypot(*np.split(content, 2, axis=-1)).max(axis=(0, 1))
        most = {"int8": 127, "e4m3": 448}[kind]
        k_format = PageFormat(jnp.asarray(np.tile(planes, 2) / most, jnp.float32), jnp.asarray(bias, jnp.float32),
                          jnp.asarray(FREQUENCIES, jnp.float32))
        v_format = PageFormat(jnp.asarray(np.abs(self.v).max(axis=(0, 1)) / most, jnp.float32),
                          jnp.asarray(self.v_bias, jnp.float32))
        self.table = jnp.asarray(1 + rng.permutation(ROWS * WIDTH).reshape(ROWS, WIDTH), jnp.int32)
        empty = jnp.zeros((ROWS * WIDTH + 1, HEADS, PAGE, DIM), eight_bit_dtype(kind))
        where = self.table, jnp.zeros(ROWS, jnp.int32), jnp.asarray(self.length)
        self.k_pages = write_pages(EightBitPages(empty, k_format), jnp.asarray(bare, jnp.float32), *where)
        self.v_pages = write_pages(EightBitPages(empty, v_format), jnp.asarray(self.v, jnp.float32), *where)
        self.v = self.v + self.v_bias

    @property
    def arguments(self):
        return (jnp.asarray(self.q, jnp.float32), self.k_pages, self.v_pages, self.table,
                jnp.asarray(self.start, jnp.int32), jnp.asarray(self.length, jnp.int32))

    def stored(self):
        """Keys and values as the pages hold them, decoded by NumPy, ``[B, S, K, H]`` in float64."""
        decoded = []
        for pages in (self.k_pages, self.v_pages):
            bits = np.asarray(pages.stored)
            values = bits if bits.dtype == np.int8 else bits.view(jnp.float8_e4m3fn).astype(np.float32)
            rows = (values.astype(np.float64) * np.asarray(pages.format.scale)[:, None])[np.asarray(self.table)]
            decoded.append(rows.swapaxes(2, 3).reshape(ROWS, -1, HEADS, DIM))
        positions = np.broadcast_to(np.arange(decoded[0].shape[1])[None, :, None], decoded[0].shape[:3])
        bias = np.asarray(self.k_pages.format.bias, np.float64)
        return decoded[0] + rotate(np.broadcast_to(bias, decoded[0].shape), positions), decoded[1] + self.v_bias

    def attention(self, k, v):
        scores = np.einsum("btkgh,bskh->btkgs", self.q, k[:, :, :]) * DIM**-0.5
        at = self.start[:, None] + np.arange(self.q.shape[1])
        keys = np.arange(k.shape[1])
        visible = (keys <= at[..., None]) & (keys < self.length[:, None, None])
        scores = np.where(visible[:, :, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("btkgs,bskh->btkgh", weights, v)


def cosine(got, want):
    got, want = (np.asarray(x, np.float64).reshape(-1, DIM) for x in (got, want))
    similar = np.sum(got * want, axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    return similar.mean()


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
@pytest.mark.parametrize("tokens", [1, PAGE])
def test_attention_to_what_the_pages_hold(kind, tokens):
    case = Case(kind, key_bias(22), tokens)
    want = case.attention(*case.stored())
    for implementation in ("xla", "reference"):
        got = jax.jit(paged_attention, static_argnames="implementation")(*case.arguments,
                                                                         implementation=implementation)
        real = case.start[:, None] + np.arange(tokens) < case.length[:, None]
        np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-4)


# norms of the first, the last and an ordinary layer of Qwen2.5-7B, and eight channels of +-167 as in Qwen2-7B
@pytest.mark.parametrize("norm, spikes", [(605, 0), (921, 0), (22, 0), (0, 8)])
@pytest.mark.parametrize("logits", [1.0, 2.5])
def test_large_biases_cost_nothing(norm, spikes, logits):
    bias = key_bias(norm, spikes)
    figures = {}
    for kind in ("int8", "e4m3"):
        case = Case(kind, bias, logits=logits)
        exact = case.attention(case.k, case.v)
        real = case.start[:, None] + np.arange(PAGE) < case.length[:, None]
        got = np.asarray(jax.jit(paged_attention)(*case.arguments), np.float64)
        unbiased = case.v_bias[:, None]  # a constant of all outputs, which would hide what differs
        figures[kind] = cosine((got - unbiased)[real], (exact - unbiased)[real])
    naive = np.asarray(jnp.clip(jnp.asarray(case.k), -448, 448).astype(jnp.float8_e4m3fn), np.float64)
    figures["naive e4m3"] = cosine((case.attention(naive, case.v) - unbiased)[real], (exact - unbiased)[real])
    print(norm, spikes, logits, figures)
    assert figures["int8"] >= 0.9995 and figures["e4m3"] >= (0.999 if logits == 1 else 0.995)
    assert figures["naive e4m3"] < figures["e4m3"]


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_sparse_attention_selects_by_the_keys_that_pages_hold(kind, monkeypatch):
    monkeypatch.setattr("qwen_kernels.sparse_attention.pyramid.NEAR", 2)  # ranks by keys, in rows as short as these
    case = Case(kind, key_bias(100))
    k, v = case.stored()

    def paged(x):
        pages = x.reshape(ROWS, WIDTH, PAGE, HEADS, DIM).swapaxes(2, 3)
        plain = np.zeros((ROWS * WIDTH + 1, *pages.shape[2:]), np.float32)
        plain[np.asarray(case.table)] = pages
        return jnp.asarray(plain)

    sparsity, prompt = Sparsity(budget=0.8), jnp.full(ROWS, 1 << 20)

    def run(q, k_pages, v_pages, *where):
        summaries = new_summaries(k_pages, WIDTH, page_dtype(jnp.float32))
        summaries = update_summaries(summaries, k_pages, where[0], jnp.zeros(ROWS, jnp.int32), where[2], WIDTH * PAGE)
        return sparse_attention(q, k_pages, v_pages, summaries, *where, prompt, sparsity=sparsity)

    q, *_, table, start, length = case.arguments
    got, selection = jax.jit(run)(*case.arguments)
    want, expected = jax.jit(run)(q, paged(k), paged(v), table, start, length)
    assert (np.asarray(selection.count) < WIDTH).all()
    np.testing.assert_array_equal(selection.places, expected.places)
    np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("kind, most", [("int8", 127), ("e4m3", 448)])
def test_what_cannot_be_stored_is_clipped_and_found(kind, most):
    scale = jnp.full((2, 4), 0.5).at[1].set(2.0)
    pages = EightBitPages(jnp.zeros((2, 2, PAGE, 4), eight_bit_dtype(kind)), PageFormat(scale, jnp.zeros((2, 4))))
    values = jnp.array([[[1, -3, most / 2, -most / 2]] * 2, [[1.1 * most, jnp.inf, -jnp.inf, jnp.nan]] * 2])
    np.testing.assert_array_equal(np.asarray(pages.out_of_range(values)), [
        [[False] * 4, [False] * 4], [[True] * 4, [False, True, True, True]]])
    stored = write_pages(pages, values[None], jnp.array([[1]]), jnp.array([0]), jnp.array([2]))
    read = np.asarray(stored.read(jnp.array([[1]]), jnp.arange(2)[:, None], jnp.array([[0]])))[:, 0]
    np.testing.assert_allclose(read[:, 0], np.asarray(values[0]), rtol=0.07, atol=1)
    np.testing.assert_allclose(read[0, 1, :3], [most / 2, most / 2, -most / 2], rtol=1e-6)
    assert (read[:, 2:] == 0).all() and not np.asarray(stored.stored)[0].any()
    for damaged in (0, jnp.nan, jnp.inf, -1):
        page_format = PageFormat(scale.at[0, 2].set(damaged), jnp.zeros((2, 4)))
        found = np.asarray(EightBitPages(pages.stored, page_format).out_of_range(jnp.zeros((2, 4))))
        assert found[0, 2] and found.sum() == 1
    little = jnp.full((1, 2, 4), 0.9 * most)  # 1.8 times the range of head 0: clipped, and found in e4m3 alone
    assert np.asarray(pages.out_of_range(little))[0].tolist() == [[kind == "e4m3"] * 4, [False] * 4]
