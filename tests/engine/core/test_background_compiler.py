"""An engine answers with its first programs while the others come from a process that may be killed."""

import os
import signal
import subprocess
import sys
import time

import pytest
from parallel_bench import GREEDY, engine_of, largest_difference, prompts

from qwen_jax import SamplingParams, UserError
from qwen_jax.engine.core import background_compiler
from qwen_jax.engine.runner.executable_cache import environment
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.schedule_policy import FULL, SPARSE, SchedulePolicy

LIMITS = Limits(4, 512, ((2, 64), (1, 128)), (), (2, 4), 4)
OPTIONS = {"limits": LIMITS, "policy": SchedulePolicy(sparse_above_tokens=200), "cache_dir": None}
LONG = [list(range(1, 300)), *prompts(3, 100)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(background_compiler, "START_AFTER_SECONDS", 0)
    monkeypatch.delenv("QWEN_JAX_WARMUP")


@pytest.fixture(scope="module")
def whole():
    return engine_of("0.5b", **OPTIONS, warmup="full")


def until(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def test_answers_come_before_the_other_programs_and_across_their_arrival(whole, tmp_path):
    """A long prompt that comes before the programs of sparse attention is answered in full attention."""
    engine = engine_of("0.5b", **{**OPTIONS, "cache_dir": tmp_path}, warmup="fast")
    smallest = engine.runner.programs.smallest
    assert engine.runner.programs.available == set(smallest) and engine.programs_to_come > 0
    assert [(bucket.phase, bucket.rows * bucket.tokens) for bucket in smallest] == [("prefill", 128), ("decode", 2)]
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    wanted, = whole.generate(LONG[1], params)
    stream, tokens = engine.stream(LONG[1], params), []
    tokens += next(stream).token_ids
    assert engine.programs_to_come > 0
    early = engine.generate(LONG[:1], GREEDY)[0]
    assert early.schedule == FULL
    until(lambda: engine.programs_to_come == 0)
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == wanted.token_ids
    assert engine.runner.programs.available == set(engine.runner.table)
    outputs = engine.generate(LONG, GREEDY)
    assert outputs[0].schedule == SPARSE and largest_difference(outputs, whole.generate(LONG, GREEDY)) <= 1e-5
    stats = engine.stats()
    assert stats.compiles_after_warmup == 0 and stats.programs_to_come == 0
    # The next engine finds all of them on disk, and starts no process.
    again = engine_of("0.5b", **{**OPTIONS, "cache_dir": tmp_path}, warmup="full")
    assert all(bucket.from_disk for bucket in again.stats().buckets)


def test_a_killed_process_is_replaced_once_and_said(whole, caplog, monkeypatch):
    processes = []
    start = subprocess.Popen

    def started(command, **options):
        processes.append(start(command, **options))
        if len(processes) == 1:
            processes[0].send_signal(signal.SIGKILL)
        return processes[-1]

    monkeypatch.setattr(background_compiler.subprocess, "Popen", started)
    engine = engine_of("0.5b", **OPTIONS, warmup="fast")
    assert largest_difference(engine.generate(LONG[1:], GREEDY), whole.generate(LONG[1:], GREEDY)) <= 1e-5
    until(lambda: engine.programs_to_come == 0)
    assert len(processes) == 2
    said, = [record.message for record in caplog.records if "compiles in the background" in record.message]
    assert "exit code -9" in said and "starting another" in said


def test_without_a_process_the_engine_goes_on_with_what_it_has(whole, caplog, monkeypatch):
    monkeypatch.setattr(background_compiler, "COMMAND", (sys.executable, "-c", "import os; os._exit(7)"))
    engine = engine_of("0.5b", **OPTIONS, warmup="fast")
    until(lambda: any("goes on without these" in record.message for record in caplog.records))
    outputs = engine.generate(LONG, GREEDY)
    assert outputs[0].schedule == FULL and [len(one.token_ids) for one in outputs] == [10] * 4
    assert largest_difference(outputs[1:], whole.generate(LONG, GREEDY)[1:]) <= 1e-5
    assert engine.programs_to_come > 0 and engine.stats().compiles_after_warmup == 0


def test_a_process_with_another_environment_says_what_differs(caplog, monkeypatch):
    environment()  # is known before it changes
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false")
    monkeypatch.setattr(background_compiler, "FRUITLESS_STARTS", 1)
    engine = engine_of("0.5b", **OPTIONS, warmup="fast")
    until(lambda: any("runs with another flags than the engine" in record.message for record in caplog.records))
    assert engine.programs_to_come > 0


def test_the_process_ends_with_the_engine(monkeypatch):
    processes = []
    start = subprocess.Popen
    monkeypatch.setattr(background_compiler.subprocess, "Popen",
                        lambda *arguments, **options: processes.append(start(*arguments, **options)) or processes[-1])
    engine = engine_of("0.5b", **OPTIONS, warmup="fast")
    until(lambda: processes)
    del engine
    until(lambda: processes[0].poll() is not None)


def test_what_cannot_be_written_is_said_once_and_costs_nothing(whole, tmp_path, caplog):
    folder = tmp_path / "file"
    folder.write_text("not a folder")
    engine = engine_of("0.5b", **{**OPTIONS, "cache_dir": folder / "programs"}, warmup="fast")
    until(lambda: engine.programs_to_come == 0)
    assert largest_difference(engine.generate(LONG, GREEDY), whole.generate(LONG, GREEDY)) <= 1e-5
    assert sum("could not keep an executable" in record.message for record in caplog.records) <= 1


def test_warmup_waits_for_everything(whole):
    engine = engine_of("0.5b", **OPTIONS, warmup="fast")
    engine.warmup()
    assert engine.programs_to_come == 0 and engine.stats().compiles_after_warmup == 0


def test_warmup_must_be_known():
    with pytest.raises(UserError, match="warmup must be 'fast', 'full', True or False, not 'slow'"):
        engine_of("0.5b", warmup="slow")
