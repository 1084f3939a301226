"""Every experiment in a tiny form runs from its recipe to its picture, with plausible results."""
import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.errors import UserError
from qwen_jax.evaluation.sparse_recall import Paged
from qwen_jax.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # msgspec looks up the annotations of recipes there
    spec.loader.exec_module(module)
    return module


def tiny(name: str, folder: Path, **changes: str) -> str:
    """Write the experiment's own recipe with some lines replaced; return its path."""
    lines = (ROOT / "configs" / "experiments" / f"{name}.toml").read_text().splitlines()
    for key, value in changes.items():
        at, = [index for index, line in enumerate(lines) if line.startswith(f"{key} = ")]
        lines[at] = f"{key} = {value}"
    (folder / "tiny.toml").write_text("\n".join(lines))
    return str(folder / "tiny.toml")


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_a_new_selector_beside_the_others(tmp_path, capsys):
    recipe = tiny("selector", tmp_path, families='["many_keys"]', documents="2", tokens="512", budgets="[0.25]",
                  selectors='["gaussian", "window"]')
    load("selector").main([recipe, "--picture", str(tmp_path / "picture.png")])
    assert is_png(tmp_path / "picture.png")
    rows = {line.split()[0]: line.replace("%", "").split()[-3:] for line in capsys.readouterr().out.splitlines()[1:]}
    (ours, window, full) = ([float(x) for x in rows[name]] for name in ("gaussian", "window", "full"))
    assert full == [100, 1, 100]  # the yardstick finds both answers, and nothing was left out
    assert ours[0] == window[0] < 90 and 0.3 < ours[1] < 1 and ours[1] != window[1]  # as many pages, other ones


def test_the_new_selector_finds_the_page_that_is_asked_for():
    load("selector")
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1024, 1, *heads, 32)), jnp.float32) for heads in ((1,), ()))
    k = k.at[:, 5 * 64:6 * 64].add(q[0, -1, 0, 0] * 0.5)  # page 5 is like the last query
    places = Paged(k, k, 1024).select(jnp.broadcast_to(q[:, -1:], q.shape), Sparsity("gaussian", budget=0.25)).places
    assert 5 in np.asarray(places)[0, -1, 0]  # beside the first and the last two pages, one of thirteen


def test_scales(tmp_path, capsys):
    """The granularity of scales hardly changes e4m3 and changes four-bit integers much."""
    load("scales").main([tiny("scales", tmp_path, tokens="512", kinds='["e4m3", "int4"]'), "--picture",
                         str(tmp_path / "picture.png")])
    assert is_png(tmp_path / "picture.png")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    bits, divergence = ({(row[0], " ".join(row[1:-4])): float(row[at]) for row in rows[:-1]} for at in (-4, -3))
    e4m3, int4 = ({name: value for (kind, name), value in divergence.items() if kind == wanted}
                  for wanted in ("e4m3", "int4"))
    assert int4["block 1 x 32"] < int4["output channel"] < int4["tensor"] / 2
    assert 0 < max(e4m3.values()) < 2 * min(e4m3.values()) < min(int4.values()) and rows[-1][0] == "float32"
    assert bits["e4m3", "block 32 x 32"] == 8.03 and bits["int4", "block 1 x 32"] == 5


def test_rounding_by_blocks():
    module, rng = load("scales"), np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(5, 70)) * np.exp(rng.normal(size=(5, 1)) * 3), jnp.float32)
    for rows, columns, scales in ((0, 0, 1), (1, 0, 5), (2, 32, 9), (1, 7, 50)):
        held, count = module.rounded(matrix, "int8", rows, columns)
        assert held.shape == matrix.shape and count == scales
        height, width = rows or 5, columns or 70
        for i in range(0, 5, height):
            for j in range(0, 70, width):
                block = np.asarray(matrix)[i:i + height, j:j + width]
                error = np.abs(np.asarray(held)[i:i + height, j:j + width] - block).max()
                assert error <= np.abs(block).max() / 127 * .5001


def test_sharding_plans(tmp_path, capsys):
    module = load("sharding")
    recipe = tiny("sharding", tmp_path, batches="[4, 256]")
    module.main([recipe, "--picture", str(tmp_path / "picture.png")])
    assert is_png(tmp_path / "picture.png")
    assert "data=2 stage=1 tensor=4" in capsys.readouterr().out
    points, split = module.run(load_recipe(recipe, module.Recipe))
    small, large = (min((p for p in points if p.batch == batch), key=lambda p: p.per_token) for batch in (4, 256))
    assert small.plan == "data=1 stage=1 tensor=8" and large.plan == "data=2 stage=1 tensor=4"
    assert sum(split[large.plan]) == pytest.approx(large.per_token)  # one stage: its step is the time per token
    assert split["data=1 stage=1 tensor=8"].exchanging > split[large.plan].exchanging > 0


@pytest.mark.parametrize("name, changes, message", [
    ("selector", {"selectors": '["best"]'}, "unknown selector or family best"),
    ("selector", {"families": '["needles"]'}, "unknown selector or family needles"),
    ("scales", {"kinds": '["e3m4"]'}, "unknown element type e3m4"),
    ("sharding", {"batches": "[100000]"}, "fits on 8 x a10 with none of the batches")])
def test_a_recipe_that_cannot_be_run_is_refused(tmp_path, name, changes, message):
    module = load(name)
    with pytest.raises(UserError, match=message):
        module.run(load_recipe(tiny(name, tmp_path, **changes), module.Recipe))
