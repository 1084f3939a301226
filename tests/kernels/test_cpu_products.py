"""The int8 and int4 products in C++ against float64: shapes, instruction sets, several at once, no compiler."""

import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen_kernels.cpu import (
    GROUP,
    MOST_ROWS,
    build,
    dequantize_int4,
    int4_product,
    int8_product,
    pack_int4,
    product_targets,
)

BFLOAT16 = "AVX-512 with bfloat16"
SETS = (BFLOAT16, "AVX-512", "AVX2", "portable")


def operands(rows, inputs, outputs, seed=0, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return (jnp.asarray(random.standard_normal((rows, inputs)), dtype),
            jnp.asarray(random.integers(-127, 128, (outputs, inputs)), jnp.int8),
            jnp.asarray(random.uniform(.01, 2, outputs), jnp.float32))


def int4_operands(rows, inputs, outputs, seed=0, dtype=jnp.float32):
    """Rows, packed weights, scales, and the integers that are packed."""
    random = np.random.default_rng(seed)
    integers = random.integers(-8, 8, (outputs, inputs))
    scale = jnp.asarray(random.uniform(-2, 2, (outputs, inputs // GROUP)), jnp.bfloat16)
    return jnp.asarray(random.standard_normal((rows, inputs)), dtype), pack_int4(jnp.asarray(integers)), scale, integers


def assert_right(x, values, scale, found):
    wide = [np.asarray(part.astype(jnp.float32), np.float64) for part in (x, values, scale)]
    assert_product(wide[0], wide[1] * wide[2][:, None], found)


def assert_right_int4(x, integers, scale, found):
    """Weights are as the format is described, without the library's own unpacking. AVX2 rounds few rows to int8."""
    scales = np.repeat(np.asarray(scale.astype(jnp.float32), np.float64), GROUP, axis=1)
    x = np.asarray(x.astype(jnp.float32))
    if build.instruction_set() == "AVX2" and len(x) <= MOST_ROWS:
        groups = x.reshape(len(x), -1, GROUP)
        most = np.abs(groups).max(axis=2, keepdims=True)
        x = (np.rint(groups * (np.float32(127) / most)) * (most / np.float32(127))).reshape(x.shape)
    assert_product(x.astype(np.float64), integers * scales, found)


def assert_product(x, weights, found):
    expected = x @ weights.T
    bound = np.abs(x) @ np.abs(weights).T  # of the sum's terms, which rounding goes by
    assert np.all(np.abs(found - expected) <= 1e-6 * bound + 1e-30)


@pytest.fixture(params=SETS)
def instruction_set(request):
    library = build.library()
    assert library is not None, "there is no C++ compiler on this machine"
    before = library.qwen_instruction_set()
    if not library.qwen_use_instruction_set(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.qwen_use_instruction_set(before)


def test_every_shape(instruction_set):
    assert build.instruction_set() == instruction_set
    random = np.random.default_rng(0)
    shapes = [(rows, 40, 70) for rows in range(1, 20)] + [(3, inputs, 5) for inputs in (1, 7, 8, 15, 16, 17, 33, 896)]
    shapes += [(2, 64, outputs) for outputs in (1, 63, 64, 65, 128, 300)] + [(64, 31, 33), (65, 31, 33)]
    shapes += [tuple(random.integers(1, (20, 300, 200))) for _ in range(20)]
    for number, shape in enumerate(shapes):
        for dtype in (jnp.float32, jnp.bfloat16) if instruction_set == BFLOAT16 else (jnp.float32,):
            x, values, scale = operands(*shape, seed=number, dtype=dtype)
            assert_right(x, values, scale, int8_product(x, values, scale))


def test_every_shape_of_int4(instruction_set):
    shapes = [(rows, 64, 70) for rows in (*range(1, 20), 64)] + [(3, 32 * groups, 5) for groups in (1, 2, 3, 7, 28)]
    shapes += [(2, 64, outputs) for outputs in (1, 63, 64, 65, 128, 300)]
    for number, shape in enumerate(shapes):
        for dtype in (jnp.float32, jnp.bfloat16) if instruction_set == BFLOAT16 else (jnp.float32,):
            x, packed, scale, integers = int4_operands(*shape, seed=number, dtype=dtype)
            assert_right_int4(x, integers, scale, int4_product(x, packed, scale))


def test_int4_of_many_rows_and_of_several_matrices():
    x, packed, scale, integers = int4_operands(65, 96, 20)  # more rows than the kernel takes
    scales = np.repeat(np.asarray(scale, np.float32), GROUP, axis=1)
    np.testing.assert_array_equal(dequantize_int4(packed, scale), integers * scales)
    assert_right_int4(x, integers, scale, int4_product(x, packed, scale))
    parts = [int4_operands(5, 64, 70, seed=seed) for seed in range(3)]
    found = int4_product(*(jnp.stack([part[index] for part in parts]) for index in range(3)))
    for (x, _, scale, integers), result in zip(parts, found, strict=True):
        assert_right_int4(x, integers, scale, result)


def test_bfloat16_rows_and_more_axes():
    x, values, scale = operands(6, 48, 20, dtype=jnp.bfloat16)
    found = int8_product(x.reshape(2, 3, 48), values, scale)
    assert found.shape == (2, 3, 20) and found.dtype == jnp.float32
    assert_right(x, values, scale, found.reshape(6, 20))
    assert_right(x, values, scale, jax.vmap(lambda row: int8_product(row, values, scale))(x))


def test_a_matrix_for_each_index_in_front():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((3, 2, 5, 40)), jnp.float32)
    values = jnp.asarray(random.integers(-127, 128, (3, 70, 40)), jnp.int8)
    scale = jnp.asarray(random.uniform(.1, 1, (3, 70)), jnp.float32)
    found = int8_product(x, values, scale)
    for one, matrix, scales, result in zip(x, values, scale, found, strict=True):
        assert_right(one.reshape(10, 40), matrix, scales, result.reshape(10, 70))


def test_the_kernel_is_what_runs():
    x, values, scale = operands(2, 48, 20)
    targets, lowered = product_targets(), jax.jit(int8_product).lower
    floats, bfloats = targets.int8
    assert f"@{floats}(" in lowered(x, values, scale).as_text()
    as_they_are = f"@{bfloats}(" in lowered(x.astype(jnp.bfloat16), values, scale).as_text()
    assert as_they_are == (build.instruction_set() == BFLOAT16) == (bfloats is not None)
    assert "qwen_int8_product" not in lowered(*operands(65, 48, 20)).as_text()
    assert f"@{targets.int4[0]}(" in jax.jit(int4_product).lower(*int4_operands(2, 64, 20)[:3]).as_text()


def test_many_bfloat16_rows_are_widened_where_their_products_are_emulated():
    x, values, scale = operands(65, 48, 20, dtype=jnp.bfloat16)
    emulated = product_targets().int8[1] is None
    product = next(line for line in jax.jit(int8_product).lower(x, values, scale).as_text().splitlines()
                   if "dot_general" in line)
    assert ("xf32>, tensor" in product) == emulated and ("xbf16>, tensor" in product) != emulated


def test_extreme_values():
    x = jnp.asarray([[0.0] * 32, [1e30] * 32, [np.inf] + [0.0] * 31], jnp.float32)
    values = jnp.asarray(np.stack([np.full(32, -128), np.full(32, 127), np.zeros(32)]), jnp.int8)
    found = np.asarray(int8_product(x, values, jnp.ones(3)))
    assert np.all(found[0] == 0) and found[1, 0] == pytest.approx(-128 * 32e30, rel=1e-6)
    assert found[2, 0] == -np.inf and np.isnan(found[2, 2])  # inf times zero


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_int4_of_a_row_that_is_not_finite(instruction_set, bad):
    """It does not become a number, nor touch the other rows."""
    x, packed, scale, integers = int4_operands(3, 64, 5)
    found = np.asarray(int4_product(x.at[1, 40].set(bad), packed, scale))
    assert not np.any(np.isfinite(found[1][integers[:, 40] != 0]))
    assert_right_int4(x[::2], integers, scale, found[::2])
    zeros = int4_product(jnp.zeros((2, 64)), packed, scale)
    assert not np.any(zeros)


def test_many_at_once_do_not_wait_for_each_other():
    x, values, scale = operands(4, 256, 1000)

    @jax.jit
    def several(x):  # products that XLA may run side by side
        return [int8_product(x + n, values, scale) for n in range(12)]

    expected = [np.asarray(part) for part in several(x)]
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda _: [np.asarray(part) for part in several(x)], range(60)):
            np.testing.assert_array_equal(found, expected)


PROGRAM = """
import jax, numpy as np
from qwen_kernels.cpu import build, int8_product
x, values = np.ones((2, 40), np.float32), np.full((3, 40), 2, np.int8)
print(float(int8_product(x, values, np.ones(3, np.float32))[0, 0]), build.library() is not None)
"""


def run(**environment):
    done = subprocess.run([sys.executable, "-c", PROGRAM], env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
                          capture_output=True, text=True, check=True)
    return done.stdout.split(), done.stderr


def test_without_a_compiler(tmp_path):
    (tmp_path / "bin").mkdir()
    (product, loaded), said = run(QWEN_JAX_CACHE=str(tmp_path / "cache"), PATH=str(tmp_path / "bin"), CXX="")
    assert (product, loaded) == ("80.0", "False") and said.count("there is no C++ compiler") == 1


def test_a_compiler_that_fails(tmp_path):
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'x.cc:1: error: no such thing' >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    (product, loaded), said = run(QWEN_JAX_CACHE=str(tmp_path / "cache"), CXX=str(tmp_path / "cc"))
    assert (product, loaded) == ("80.0", "False") and "error: no such thing" in said
    assert not list((tmp_path / "cache" / "kernels").iterdir())


def test_kept_once_and_not_where_others_can_write(tmp_path):
    (product, loaded), _ = run(QWEN_JAX_CACHE=str(tmp_path))
    kept, = (tmp_path / "kernels").iterdir()
    assert (product, loaded) == ("80.0", "True") and kept.suffix == ".so"
    before = kept.stat().st_mtime_ns
    assert run(QWEN_JAX_CACHE=str(tmp_path), CXX="/nonexistent")[0] == ["80.0", "True"]
    assert kept.stat().st_mtime_ns == before
    kept.unlink()
    (tmp_path / "kernels").chmod(0o777)
    (product, loaded), said = run(QWEN_JAX_CACHE=str(tmp_path))
    assert (product, loaded) == ("80.0", "True") and "must be a folder that only you can write to" in said
    assert not list((tmp_path / "kernels").iterdir())


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    (product, loaded), said = run(QWEN_JAX_CACHE=str(tmp_path / "file"))
    assert (product, loaded) == ("80.0", "True") and "compiled in each process anew" in said


def test_the_reason_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(build, "_compile", lambda path: (_ for _ in ()).throw(RuntimeError("because")))
    monkeypatch.setattr(build, "_digest", lambda: "0" * 16)
    build.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert build.library() is None and build.library() is None
        assert caplog.text.count("because") == 1
    finally:
        build.library.cache_clear()
