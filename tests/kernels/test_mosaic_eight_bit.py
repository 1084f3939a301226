"""The Hopper kernels for 8-bit pages without a GPU: they lower for CUDA, and agree in the interpreter with what the
pages hold; and what operands in FP8 cost."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from qwen_kernels.attention import PAGE, EightBitPages, PageFormat
from qwen_kernels.sparse_attention import Selection, fp8_operands, reference
from qwen_kernels.sparse_attention import mosaic_eight_bit_sm90 as kernel

DTYPES = {"int8": jnp.int8, "e4m3": jnp.float8_e4m3fn}
LARGEST = {"int8": 127, "e4m3": 448}
NORMS = 600, 20  # of the key biases of two heads: the first layer's of Qwen2.5-7B, and an ordinary one's
WIDTH, GROUP = 7, 3


def rotate(x, positions, frequencies):
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[..., None] * frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)


class Case:
    """Rows of 8-bit pages in random order, queries at the end of each, and a random selection of pages."""

    def __init__(self, kind, tokens, length, width=WIDTH, group=GROUP, dim=64, logits=1.5, dense=0.3,
                 value_bias=1.0):
        rng = np.random.default_rng(0)
        heads, length = len(NORMS), np.asarray(length, np.int32)
        shape = len(length), width * PAGE, heads, dim
        self.start = length - 1 if tokens == 1 else (length - 1) // PAGE * PAGE - tokens + PAGE
        self.shown = self.start[:, None] + np.arange(tokens) < length[:, None]
        frequencies = 1e6 ** (-np.arange(dim // 2) / (dim // 2))
        bias = rng.standard_normal((heads, dim)) * np.exp(1.5 * rng.standard_normal((heads, dim)))
        bias *= np.array(NORMS)[:, None] / np.linalg.norm(bias, axis=1, keepdims=True)
        spread = np.exp(0.5 * rng.standard_normal((2, 1, 1, heads, dim)))  # channels differ
        content, v = rng.standard_normal((2, *shape)) * spread
        positions = np.broadcast_to(np.arange(shape[1])[:, None], shape[:3])
        self.keys = rotate(content + bias, positions, frequencies)  # as they were before rounding
        q = rng.standard_normal((len(length), tokens, heads, group, dim))
        scores = np.einsum("bkgh,bskh->bkgs", q[:, -1], self.keys) * dim**-0.5
        q *= logits / scores.std(axis=-1)[:, None, ..., None]
        self.v_bias = value_bias * rng.standard_normal((heads, dim))
        self.table = np.zeros((len(length), width), np.int32)
        self.table.flat = 1 + rng.permutation(self.table.size)
        planes = np.hypot(*np.split(content, 2, axis=-1)).max(axis=(0, 1))
        page_formats = [(np.tile(planes, 2) / LARGEST[kind], bias, jnp.asarray(frequencies, jnp.float32)),
                 (np.abs(v).max(axis=(0, 1)) / LARGEST[kind], self.v_bias)]
        self.k_pages, self.v_pages = (
            self.paged(kind, values, PageFormat(*(jnp.asarray(x, jnp.float32) for x in page_format)))
            for values, page_format in zip((rotate(content, positions, frequencies), v), page_formats))
        self.v = v + self.v_bias
        self.length, self.q = length, jnp.asarray(q, jnp.bfloat16)
        own = self.start[:, None] // PAGE + np.arange(max(1, tokens // PAGE))
        self.selection = self.choose(rng, own, length, heads, width, dense)

    def paged(self, kind, values, page_format):
        empty = EightBitPages(jnp.zeros((self.table.size + 1, *page_format.scale.shape), DTYPES[kind]), page_format)
        encoded = np.asarray(empty.encode(jnp.asarray(values, jnp.float32)))
        pages = encoded.reshape(*self.table.shape, PAGE, *page_format.scale.shape).swapaxes(2, 3)
        stored = np.zeros((self.table.size + 1, *pages.shape[2:]), encoded.dtype)
        stored[self.table] = pages
        return EightBitPages(jnp.asarray(stored), page_format)

    @staticmethod
    def choose(rng, own, length, heads, width, dense):
        """Select half of the pages before a block's own, and its own; or all of them."""
        everything = rng.random((*own.shape, heads)) < dense
        taken = rng.random((*own.shape, heads, width)) < 0.5
        taken = (taken & (np.arange(width) < own[..., None, None])) | (np.arange(width) == own[..., None, None])
        places = np.sort(np.where(taken, np.arange(width), 1 << 24), axis=-1)
        count = np.where(everything, own[..., None] + 1, taken.sum(axis=-1))
        count = np.where(own[..., None] * PAGE < length[:, None, None], count, 0)
        return Selection(jnp.asarray(places, jnp.int32), jnp.asarray(count, jnp.int32), jnp.asarray(everything))

    @property
    def arguments(self):
        where = (jnp.asarray(x, jnp.int32) for x in (self.table, self.start, self.length))
        return self.q, self.k_pages, self.v_pages, *where, self.selection

    def oracle(self, *pages, attend=reference.attend):
        """The result in float32 from these pages, or the case's own."""
        q, k_pages, v_pages, *rest = self.arguments
        pages = pages or (k_pages, v_pages)
        with jax.default_matmul_precision("float32"):  # a GPU's default rounds to 11 bits
            return np.asarray(jax.jit(lambda q, *arrays: attend(q, *arrays))(q.astype(jnp.float32), *pages, *rest))

    def rounded(self, *pages):
        """The result with operands in FP8."""
        return self.oracle(*pages, attend=fp8_operands.attend)

    def unrounded(self):
        """Return the keys and values before they were rounded, in pages of float32."""
        plain = []
        for x in (self.keys, self.v):
            pages = x.reshape(*self.table.shape, PAGE, *x.shape[2:]).swapaxes(2, 3)
            plain.append(np.zeros((self.table.size + 1, *pages.shape[2:]), np.float32))
            plain[-1][self.table] = pages
        return [jnp.asarray(x) for x in plain]

    def cosines(self, got, want):
        """Return per KV head the mean similarity of outputs without the values' bias, which would hide differences."""
        a, b = ((np.asarray(x, np.float64) - self.v_bias[:, None])[self.shown] for x in (got, want))
        similar = np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        return similar.mean(axis=(0, 2))


def abstract(kind, rows, tokens, kv_heads, group, dim):
    """Return the arguments of a kernel as shapes and dtypes."""
    shape, blocks = jax.ShapeDtypeStruct, tokens // PAGE if tokens % PAGE == 0 else tokens
    channels, stored = shape((kv_heads, dim), jnp.float32), shape((99, kv_heads, PAGE, dim), DTYPES[kind])
    k_pages = EightBitPages(stored, PageFormat(channels, channels, shape((dim // 2,), jnp.float32)))
    selection = Selection(shape((rows, blocks, kv_heads, 24), jnp.int32), shape((rows, blocks, kv_heads), jnp.int32),
                          shape((rows, blocks, kv_heads), jnp.bool_))
    integers = [shape(size, jnp.int32) for size in ((rows, 512), (rows,), (rows,))]
    q = shape((rows, tokens, kv_heads, group, dim), jnp.bfloat16)
    return q, k_pages, EightBitPages(stored, PageFormat(channels, channels)), *integers, selection


@pytest.mark.parametrize("kind, rows, tokens, kv_heads, group, dim", [
    *[(kind, *shape) for kind in DTYPES for shape in ((8, 1, 4, 7, 128), (8, 1, 2, 7, 64), (2, 3, 2, 14, 64))],
    ("e4m3", 1, 512, 4, 7, 128), ("e4m3", 1, 512, 2, 7, 64), ("e4m3", 2, PAGE, 8, 1, 128)])
def test_lowers_for_cuda(kind, rows, tokens, kv_heads, group, dim):
    lowered = jax.jit(kernel.attend).trace(*abstract(kind, rows, tokens, kv_heads, group, dim)).lower(
        lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_what_it_cannot_run_is_refused():
    q, k_pages, v_pages, *rest = abstract("int8", 1, PAGE, 2, 7, 64)
    with pytest.raises(ValueError, match="multiplies e4m3 in a prefill, not int8"):
        kernel.attend(q, k_pages, v_pages, *rest)
    bits = EightBitPages(jax.ShapeDtypeStruct(k_pages.shape, jnp.uint8), k_pages.format)
    _, floats, *_ = abstract("e4m3", 1, PAGE, 2, 7, 64)
    decode, *_ = abstract("int8", 1, 1, 2, 7, 64)
    narrow = jax.ShapeDtypeStruct((1, 1, 2, 7, 32), jnp.bfloat16)
    wide = jax.ShapeDtypeStruct(decode.shape, jnp.float32)
    assert kernel.supported(decode, k_pages, v_pages) is None
    assert kernel.supported(q, floats, floats) is None
    for queries, keys, values, reason in [
            (decode, bits, bits, "int8 or e4m3 pages, not keys of uint8"),
            (decode, k_pages, floats, "not keys of int8, values of float8_e4m3fn"),
            (decode, k_pages.stored, v_pages.stored, "takes 8-bit pages"), (wide, k_pages, v_pages, "not float32"),
            (narrow, k_pages, v_pages, "head dims of 64 and 128")]:
        assert reason in kernel.supported(queries, keys, values)


def interpreted(case, tuning):
    params = getattr(plgpu, "InterpretGPUParams", None) or importlib.import_module(
        "jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams
    interpreter = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    got = np.asarray(kernel.attend(*case.arguments, tuning, interpret=params(detect_races=True)), np.float32)
    assert not interpreter.get_races().races_found
    return got


# One row each: the interpreter compiles the kernel anew for every thread of every block.
@pytest.mark.slow
@pytest.mark.parametrize("kind, dim", [("int8", 64), ("e4m3", 128)])
def test_decode_in_the_interpreter(kind, dim):
    case = Case(kind, 1, [4 * PAGE + 10], dim=dim, dense=(0, 1))
    assert case.selection.count[0, 0, 0] < case.selection.count[0, 0, 1] == 5
    got, want = interpreted(case, kernel.Tuning(splits=2)), case.oracle()
    print(kind, dim, case.cosines(got, want), np.abs(got - want).max())
    assert case.cosines(got, want).min() > 0.9999
    np.testing.assert_allclose(got, want, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128])
def test_prefill_in_the_interpreter(dim):
    case = Case("e4m3", PAGE, [4 * PAGE + 50], group=2, dim=dim, dense=(0, 1))
    got, want, rounded = interpreted(case, kernel.Tuning()), case.oracle(), case.rounded()
    print(dim, case.cosines(got, want), case.cosines(got, rounded), case.cosines(rounded, want))
    assert case.cosines(got, want).min() > 0.998
    assert case.cosines(got, rounded).min() > 0.9998  # a weight may be rounded the other way


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("logits", [1.0, 2.5])
def test_what_operands_in_fp8_cost(dim, logits):
    case = Case("e4m3", 2 * PAGE, [WIDTH * PAGE, 6 * PAGE - 5], dim=dim, logits=logits)
    exact = case.oracle(*case.unrounded())
    pages, operands = case.cosines(case.oracle(), exact), case.cosines(case.rounded(), exact)
    naive = case.cosines(case.rounded(*case.unrounded()), exact)  # keys with their bias, as FP8 caches have them
    print(dim, logits, pages, operands, naive)
    assert operands.min() > (0.998 if logits == 1 else 0.996)
    assert operands[0] > 0.999 and 1 - naive[0] > 2 * (1 - operands[0])


@pytest.mark.parametrize("tokens", [1, PAGE])
def test_fp8_operands_without_rounding_are_the_reference(tokens, monkeypatch):
    case = Case("e4m3", tokens, [WIDTH * PAGE, 300, 0])
    monkeypatch.setattr(fp8_operands, "to_e4m3", lambda x: x)
    got = case.rounded()
    np.testing.assert_allclose(got[case.shown], case.oracle()[case.shown], atol=1e-4)
    assert (got[2] == 0).all()


def test_operands_out_of_range_are_clipped():
    rounded = np.asarray(fp8_operands.to_e4m3(jnp.array([447.0, -465, 1e6, -jnp.inf, 0.01])), np.float32)
    np.testing.assert_allclose(rounded, [448, -448, 448, -448, 0.01], rtol=0.04)
    case = Case("e4m3", 1, [PAGE, 100])
    k, v = case.unrounded()
    large = case.rounded(2 * k, 1000 * v)  # keys with a bias of 1200, values of thousands
    assert np.isfinite(large).all() and np.abs(large).max() < 460
