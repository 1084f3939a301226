"""The file: who finds it, and that a bad one is said to be bad and changes nothing."""

import json
from dataclasses import replace

import pytest

from qwen_jax import Engine
from qwen_jax.checkpoint import resolve
from qwen_jax.engine.config import tuned as files
from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.scheduling.buckets import Grid, default_grid
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY, SchedulePolicy
from qwen_jax.errors import UserError

GRID = Grid(prefill_shapes=((1, 64), (2, 64)), sparse_prefill_shapes=((1, 64),), recompute_shapes=((64, 8),),
            decode_rows=(2, 4), sparse_decode_rows=(2,), decode_steps=16, step_overhead_tokens=32,
            decode_chunk_pages=2)
TUNED = Tuned(SchedulePolicy(8192, 64), GRID)
SIZES = {"max_batch_size": 6, "max_seq_len": 256, "tokenizer": None, "warmup": False, "dtype": "float32"}


@pytest.fixture
def about():
    return files.subject(resolve("bundled").config, "float32", False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path))
    return tmp_path


def keep(about, tuned=TUNED, **more):
    return files.write(files.path_of(about), about, tuned, {"decode_rows": {"gain": 1.2}}, **more)


def test_what_is_written_is_found(about):
    kept = keep(about, minutes=3)
    found = files.find(resolve("bundled").config, "float32")
    assert found == TUNED and found.path == kept.path
    assert found.measured["choices"]["decode_rows"] == {"value": [2, 4], "gain": 1.2}
    assert found.measured["minutes"] == 3 and not list(kept.path.parent.glob("*.partial"))


def test_the_engine_takes_it_and_says_so(about):
    keep(about)
    engine = Engine.from_pretrained("bundled", **SIZES)
    assert engine.limits.decode_rows == (2, 4) and engine.limits.prefill_shapes == ((1, 64), (2, 64))
    assert engine.limits.decode_steps == 16 and engine.limits.step_overhead_tokens == 32
    assert engine.scheduler.policy == TUNED.policy
    assert {bucket.chunk_pages for bucket in engine.runner.table if bucket.phase == "decode"} == {2}
    assert engine.stats().tuned == str(files.path_of(about))


@pytest.mark.parametrize("options", [{"tuned": None}, {"policy": SchedulePolicy(3000, 32)}, {"batch_invariant": True},
                                     {"speculation": "ngram"}, {"dtype": "bfloat16"}])
def test_explicit_options_win(about, options):
    plain = Engine.from_pretrained("bundled", **SIZES | options)
    keep(about)
    engine = Engine.from_pretrained("bundled", **SIZES | options)
    assert engine.limits == plain.limits and engine.stats().tuned is None


def test_explicit_limits_and_the_environment_win(about, monkeypatch):
    limits = Engine.from_pretrained("bundled", **SIZES).limits
    keep(about)
    assert Engine.from_pretrained("bundled", limits=limits, **SIZES).limits == limits
    monkeypatch.setenv("QWEN_JAX_TUNED", "0")
    assert Engine.from_pretrained("bundled", **SIZES).limits == limits


def changed(stored, **changes):
    return json.dumps(stored | changes)


@pytest.mark.parametrize("damage, says", [
    (lambda s: "{", "cannot be read"),
    (lambda s: "[]", "cannot be read"),
    (lambda s: "{}", "cannot be read"),
    (lambda s: changed(s, format=7), "format 7"),
    (lambda s: changed(s, jax="0.1"), "measured with jax 0.1"),
    (lambda s: changed(s, about={"device": "abacus"}), "another device or model"),
    (lambda s: changed(s, choices=s["choices"] | {"magic": {"value": 1}}), "do not know magic"),
    (lambda s: changed(s, choices={}), "lack"),
    (lambda s: changed(s, choices=s["choices"] | {"decode_steps": {"value": "many"}}), "must hold integers"),
    (lambda s: changed(s, choices=s["choices"] | {"decode_steps": {"value": 0}}), "decode_steps must be a positive"),
    (lambda s: changed(s, choices=s["choices"] | {"decode_steps": 8}), "cannot be read"),
    (lambda s: changed(s, choices=s["choices"] | {"decode_rows": {"value": []}}), "ascending"),
    (lambda s: changed(s, choices=s["choices"] | {"prefill_shapes": {"value": [[1, 65]]}}), "whole pages"),
    (lambda s: changed(s, choices=s["choices"] | {"prefill_shapes": {"value": [[1]]}}), "cannot be read"),
    (lambda s: changed(s, choices=s["choices"] | {"decode_rows": {"value": list(range(2, 90))}}), "over 64"),
    (lambda s: changed(s, choices=s["choices"] | {"sparse_above_tokens": {"value": 1024}}), "approximated"),
])
def test_a_bad_file_is_said_so_and_passed_over(about, caplog, damage, says):
    path = keep(about).path
    path.write_text(damage(json.loads(path.read_text())))
    assert files.find(resolve("bundled").config, "float32") is None
    message, = (record.getMessage() for record in caplog.records)
    assert says in message and str(path) in message and "defaults" in message


def test_the_sparse_threshold_is_never_lowered():
    with pytest.raises(UserError, match="approximated"):
        Tuned(SchedulePolicy(sparse_above_tokens=DEFAULT_POLICY.sparse_above_tokens - 1), GRID)
    Tuned(SchedulePolicy(sparse_above_tokens=DEFAULT_POLICY.sparse_above_tokens + 1), GRID)


def test_the_default_grid_is_what_an_untuned_engine_has():
    engine = Engine.from_pretrained("bundled", **SIZES)
    assert Engine.from_pretrained("bundled", tuned=Tuned(DEFAULT_POLICY, default_grid("cpu")), **SIZES
                                  ).limits == engine.limits


def test_another_device_has_another_file(about, monkeypatch):
    monkeypatch.setattr(files, "device_name", lambda: "NVIDIA H100")
    other = files.subject(resolve("bundled").config, "float32", False)
    assert files.path_of(other) != files.path_of(about) and "nvidia-h100" in files.path_of(other).name
    keep(other)
    monkeypatch.undo()
    assert replace(TUNED) == TUNED


def test_a_folder_that_cannot_be_written(about, tmp_path):
    (tmp_path / "tuned").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write"):
        keep(about)
