"""Tuning of a small engine, whose times are made up where measuring would take long."""

import json
import time
from dataclasses import replace

import pytest

from qwen_jax import Engine
from qwen_jax.cli import main
from qwen_jax.engine.config.tuned import Tuned
from qwen_jax.engine.scheduling.schedule_policy import DEFAULT_POLICY
from qwen_jax.tuning.engine_bench import EngineBench, host_seconds
from qwen_jax.tuning.scheduler_simulation import simulate
from qwen_jax.tuning.step_costs import Cost
from qwen_jax.tuning.tune import Tuner, ratios
from qwen_jax.tuning.workloads import LOADS, Trace

pytest.importorskip("optuna")
SIZES = {"dtype": "float32", "max_batch_size": 8, "max_seq_len": 256, "progress": False}
ENGINE = {"tokenizer": None, "warmup": False} | SIZES


@pytest.fixture
def cache(tmp_path, monkeypatch, executable_cache):
    """A cache with tuned files of this test alone, and the programs that all tests share."""
    (tmp_path / "executables").symlink_to(executable_cache / "executables", target_is_directory=True)
    (executable_cache / "executables").mkdir(exist_ok=True)
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path))
    return tmp_path


def made_up(self, bucket):
    """Return costs in which eight decode rows are expensive and two pages at a time are the best tile."""
    ms = 1e-3 + bucket.rows * bucket.tokens * 2e-5 * {0: 1, 2: 0.5}.get(bucket.chunk_pages, 2)
    ms *= 4 if bucket.phase == "decode" and bucket.rows == 8 else 1
    return Cost(ms, ms - 1e-3, 0.0, 64)


@pytest.fixture
def pretended(monkeypatch):
    """Replace the device: steps and traces take the times of `made_up`."""
    monkeypatch.setattr(Engine, "warmup", lambda self: None)
    monkeypatch.setattr(EngineBench, "_time", made_up)
    monkeypatch.setattr(EngineBench, "prepare", lambda self, buckets: None)
    monkeypatch.setattr("qwen_jax.tuning.tune.host_seconds", lambda *_: 1e-4)
    monkeypatch.setattr("qwen_jax.tuning.tune.TRIALS", 30)
    monkeypatch.setattr("qwen_jax.tuning.workloads.LOADS", {
        name: replace(load, requests=min(12, load.requests), answer=(1, 12)) for name, load in LOADS.items()})

    def run(self, tuned, trace):
        table = self.table(tuned)
        return simulate(trace, table, self.limits(tuned), tuned.policy, num_pages=self.num_pages,
                        costs={bucket: made_up(self, bucket) for bucket in table}, step_seconds=1e-4)

    monkeypatch.setattr(EngineBench, "run", run)


def tuner(minutes=1.0):
    return Tuner(EngineBench("bundled", **SIZES), minutes, progress=False)


@pytest.mark.usefixtures("pretended")
def test_what_is_found_is_what_the_next_engine_takes(cache):
    found = tuner().run()
    assert found.grid.decode_chunk_pages == 2 and found.grid.decode_rows[-1] == 4
    assert found.policy == DEFAULT_POLICY and min(ratios(found).values()) >= 1 and set(ratios(found)) == {
        "chat", "documents", "crowd", "classify", "mixed"}
    engine = Engine.from_pretrained("bundled", **ENGINE)
    assert engine.stats().tuned == str(found.path) and engine.limits.decode_rows == found.grid.decode_rows
    stored = json.loads(found.path.read_text())
    choice = stored["choices"]["decode_rows"]
    assert choice["gain"] > 1 and choice["ms_short_and_long_context"]["8x1"][0] > 1
    assert stored["choices"]["decode_chunk_pages"]["ms_short_and_long_context"].keys() >= {"0", "1", "2", "4"}
    assert stored["accepted"] and stored["traces"]["mixed"]["ratio"] > 1
    assert list(found.path.parent.iterdir()) == [found.path], "no journal is left"


@pytest.mark.usefixtures("pretended")
def test_when_the_race_says_no_the_defaults_stay(cache, monkeypatch):
    monkeypatch.setattr(EngineBench, "run", lambda self, tuned, trace: 2.0 if tuned.grid.decode_rows[-1] < 8 or (
        tuned.grid.decode_chunk_pages) else 1.0)
    found = tuner().run()
    assert not found.measured["accepted"] and found.measured["others"]
    assert Engine.from_pretrained("bundled", **ENGINE).limits == Engine.from_pretrained(
        "bundled", tuned=None, **ENGINE).limits


@pytest.mark.usefixtures("pretended")
def test_an_interruption_loses_nothing(cache, monkeypatch):
    measured = []

    def interrupted(self, bucket):
        if len(measured) == 7:
            raise KeyboardInterrupt
        measured.append(bucket)
        return made_up(self, bucket)

    monkeypatch.setattr(EngineBench, "_time", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuner().run()
    first = list(measured)
    monkeypatch.setattr(EngineBench, "_time", lambda self, bucket: measured.append(bucket) or made_up(self, bucket))
    again = tuner()
    again.run()
    assert len(measured) == len(set(measured)) > 7 and measured[:7] == first
    measured.clear()
    tuner().run()
    assert set(first) <= set(measured), "after a result everything is measured anew"


@pytest.mark.usefixtures("pretended")
def test_a_damaged_journal_is_measured_anew(cache, caplog):
    bench = EngineBench("bundled", **SIZES)
    bench.measure(bench.engine.runner.table[0])
    bench._journal.write_text("{")
    assert EngineBench("bundled", **SIZES)._kept == {} and "measuring anew" in caplog.text


@pytest.mark.usefixtures("pretended")
def test_no_time_leaves_the_defaults(cache):
    began = time.monotonic()
    found = tuner(1e-6).run()
    assert not found.measured["accepted"] and time.monotonic() - began < 20
    assert found.choices() == tuner().default.choices()


def test_real_steps_and_real_traces(cache):
    bench = EngineBench("bundled", **SIZES | {"max_batch_size": 2, "max_seq_len": 128})
    engine = bench.engine
    prefill, decode = (next(b for b in engine.runner.table if b.phase == phase) for phase in ("prefill", "decode"))
    for bucket in (prefill, replace(decode, chunk_pages=1)):
        cost = bench.measure(bucket)
        assert 1e-5 < cost.base < 5 and cost.seconds(4, 100) >= cost.base
    assert bench.measure(prefill) is bench.measure(prefill)
    default = Tuner(bench, 1, False).default
    other = Tuned(DEFAULT_POLICY, replace(default.grid, prefill_shapes=((1, 64),), decode_chunk_pages=1))
    work, before = Trace("one", (30, 40, 50), (5, 6, 7)), engine.stats()
    for tuned in (default, other):
        assert bench.run(tuned, work) > 0 and host_seconds(bench, tuned, work) > 0
    after = engine.stats()
    assert after.generated_tokens - before.generated_tokens == 4 * 18 and after.compiles_after_warmup == 0
    used = {bucket for bucket, usage in engine.core.counters.usage.items() if usage.steps and bucket.phase == "decode"}
    assert {b.chunk_pages for b in used} == {0, 1}
    assert engine.scheduler.limits == engine.limits, "the engine is as before"


@pytest.mark.usefixtures("pretended")
def test_the_command(cache, capsys):
    sizes = ["--dtype", "float32", "--max-batch-size", "8", "--max-seq-len", "256"]
    assert main(["tune", "bundled", "--json", "--budget-minutes", "1", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["choices"]["decode_rows"]["value"][-1] == 4 and found["accepted"]
    assert main(["tune", "bundled", "--budget-minutes", "1", *sizes]) == 0
    out = capsys.readouterr().out
    assert "decode_chunk_pages: 0 -> 2" in out and found["path"] in out and "mixed" in out
    assert main(["tune", "bundled", "--budget-minutes", "0"]) == 2
    assert "--budget-minutes" in capsys.readouterr().err
