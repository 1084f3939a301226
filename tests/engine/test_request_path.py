"""A request's way through a warm engine passes few files, so that people can follow it."""
import sys
from pathlib import Path

import qwen_jax
from qwen_jax import Engine, SamplingParams

PACKAGE = str(Path(qwen_jax.__file__).parent)
CORE = str(Path("engine", "core", "engine_core.py"))
BETWEEN = {"contextlib.py"}  # runs the core's own context manager


def test_a_request_passes_few_files_and_a_step_enters_the_core_seldom(executable_cache, monkeypatch):
    monkeypatch.setenv("QWEN_JAX_LAYERS_PER_PROGRAM", "")  # as small models run
    engine = Engine.from_pretrained("bundled", max_batch_size=2, max_seq_len=256, progress=False)
    files, entries = set(), 0

    def note(frame, event, _argument):
        nonlocal entries
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE):
            name = file.removeprefix(PACKAGE).lstrip("/")
            files.add(name)
            caller = Path(frame.f_back.f_code.co_filename)
            entries += name == CORE and not str(caller).endswith(CORE) and caller.name not in BETWEEN

    steps = sum(bucket.steps for bucket in engine.stats().buckets)
    sys.setprofile(note)
    try:
        engine.generate("Account 81352", SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True))
    finally:
        sys.setprofile(None)
    steps = sum(bucket.steps for bucket in engine.stats().buckets) - steps
    assert CORE in files and len(files - {"errors.py"}) <= 16, sorted(files)
    assert steps > 1 and entries <= 5 * steps
