"""A server answers with its first programs, and takes up the others as they come."""

import contextlib
import time

import psutil
from quick_xla import QUICK


def kill_compiler(server: int) -> bool:
    """Kill the process that compiles for a server's engine; return whether there is one."""
    for child in psutil.Process(server).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it may have ended
            if any("compile_process" in part for part in child.cmdline()):
                child.kill()
                return True
    return False


def test_requests_are_answered_while_programs_compile_and_the_compiler_is_killed(own, monkeypatch, tmp_path):
    monkeypatch.setenv("QWEN_JAX_WARMUP", "fast")
    monkeypatch.setenv("QWEN_JAX_LAYERS_PER_PROGRAM", "")  # whole steps, as small models have them
    monkeypatch.setenv("QWEN_JAX_CACHE", str(tmp_path))
    server, killed = own("--max-batch-size", "2", flags=QUICK), False
    model = server.http.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "one two", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    texts, end = set(), time.monotonic() + 120
    assert (to_come := server.http.get("/ready").json()["programs_to_come"]) > 0
    while to_come:
        assert time.monotonic() < end, server.output()
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 200, answer.text
        texts.add(answer.json()["choices"][0]["text"])
        killed = killed or kill_compiler(server.process.pid)
        now = server.http.get("/ready").json()["programs_to_come"]
        assert now <= to_come
        to_come = now
    texts.add(server.post("/v1/completions", body).json()["choices"][0]["text"])
    assert len(texts) == 1, "the text does not depend on the programs that are there"
    assert killed and server.stats()["engine"]["compiles_after_warmup"] == 0
    said = [line for line in server.output().splitlines() if "compiles in the background" in line]
    assert len(said) == 1 and "starting another" in said[0]
