"""The command line in processes of their own: what goes to stdout, and how mistakes end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import random_qwen2
from safetensors.torch import load_file

from qwen_jax import Engine, SamplingParams, UserError

ROOT = Path(__file__).parent.parent


def run(*args, stdin=None, check=False):
    done = subprocess.run([sys.executable, "-m", "qwen_jax.cli", *map(str, args)], input=stdin, text=True,
                          capture_output=True, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "hf"
    random_qwen2(tie_word_embeddings=True).save_pretrained(path)
    return path


def test_convert_info_export(folder, tmp_path):
    converted = run("convert", folder, tmp_path / "orbax", check=True)
    assert converted.stdout.strip() == str(tmp_path / "orbax")
    facts = json.loads(run("info", tmp_path / "orbax", "--json", check=True).stdout)
    assert facts["num_heads"] == 4 and facts["dtype"] == "float32"
    assert facts["parameters"] == sum(p.numel() for p in random_qwen2(tie_word_embeddings=True).parameters())
    run("export", tmp_path / "orbax", tmp_path / "hf", check=True)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


def test_info_of_a_preset():
    shown = run("info", "qwen2.5-7b", check=True).stdout
    assert "7,615,616,512" in shown and "57,344" in shown  # parameters; KV bytes per token


def test_plans_for_people_and_for_programs():
    args = ("plan", "qwen2.5-72b", "--devices", "8", "--device", "a100", "--batch", "8")
    text = run(*args).stdout
    assert "data=1 stage=1 tensor=8 on each device" in text and "Rejected:" in text
    rows = [json.loads(line) for line in run(*args, "--json").stdout.splitlines()]
    assert rows[0]["feasible"] and rows[0]["tensor"] == 8 and rows[0]["bytes"] == sum(rows[0]["memory"].values())
    assert run(*args, "--xla-flags").stdout.startswith("--xla_gpu_enable_latency_hiding_scheduler=true ")
    assert len(rows) == 10 and all(row["reason"] for row in rows if not row["feasible"])


def test_generate_streams_text_and_json_agrees():
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    common = ("generate", "bundled", "--prompt", prompt, "--max-tokens", "6", "--temperature", "0", "--max-seq-len",
              "64")
    plain = run(*common, check=True)
    as_json = run(*common, "--json", check=True)
    [line] = as_json.stdout.splitlines()
    answer = json.loads(line)
    assert plain.stdout == answer["text"] + "\n"
    assert answer["finish_reason"] in ("stop", "length") and 0 < len(answer["token_ids"]) <= 6
    assert answer["schedule"] == "full_attention"


def test_chat_keeps_the_conversation():
    done = run("chat", "bundled", "--max-tokens", "4", "--temperature", "0", "--max-seq-len", "256",
               stdin="first\n\nsecond\n", check=True)
    assert len(done.stdout.splitlines()) >= 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("args, said", [
    (("info", "qwen9"), "unknown preset 'qwen9'"),
    (("plan", "qwen2.5-7b", "--devices", "2", "--memory-gb", "24", "16"), "plan with 16 GB for each"),
    (("info", "/nowhere/at/all"), "no model at /nowhere/at/all"),
    (("generate", "bundled", "--prompt", "", "--max-seq-len", "64"), "the prompt is empty"),
    (("generate", "bundled", "--prompt", "x", "--temperature", "-1"), "temperature must be"),
    (("generate", "bundled", "--prompt", "x", "--temperature", "nan"), "temperature must be"),
    (("generate", "bundled", "--prompt", "x", "--max-tokens", "0"), "max_tokens must be at least 1"),
    (("generate", "bundled", "--prompt", "a b c d e f " * 40, "--max-seq-len", "64"), "max_seq_len=64 leaves no room"),
    (("generate", "bundled", "--prompt", "x", "--max-seq-len", "999999"), "exceeds the model's context"),
    (("convert", "{tmp}/absent", "{tmp}/x"), "no model at"),
    (("convert", "bundled", "{tmp}"), "{tmp}"),
    (("export", "{tmp}", "{tmp}/x"), "config.json"),
])
def test_a_mistake_is_one_line_and_exit_code_2(args, said, tmp_path):
    done = run(*(str(a).replace("{tmp}", str(tmp_path)) for a in args))
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("qwen-jax:")]
    assert len(lines) == 1 and said.replace("{tmp}", str(tmp_path)) in lines[0]
    assert "Traceback" not in done.stderr


def test_help_does_not_import_jax():
    code = "import sys; from qwen_jax.cli import _parser; _parser(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_programs_compiled_ahead_are_found_by_the_engine(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_JAX_LAYERS_PER_PROGRAM", "")
    sizes = ["--max-batch-size", "1", "--max-seq-len", "64", "--kv-cache-bytes", "100000", "--dtype", "float32"]
    assert "2 programs" in run("compile", folder, "-o", tmp_path / "programs", *sizes, check=True).stdout
    rows = [json.loads(line) for line in run("info", folder, "--buckets", "--json", *sizes, check=True
                                             ).stdout.splitlines()]
    assert [row["bucket"] for row in rows] == ["prefill/full_attention 1x64", "decode/full_attention 2x1"]
    assert all(row["gflops"] > 0 and row["accessed_mb"] > 0 and row["temporary_mb"] > 0 for row in rows)
    made = dict(max_batch_size=1, max_seq_len=64, kv_cache_bytes=100_000, dtype="float32", progress=False)
    engine = Engine.from_pretrained(folder, cache_dir=tmp_path / "programs", **made)
    assert all(bucket.from_disk for bucket in engine.stats().buckets)
    prompt, params = list(range(5)), SamplingParams(max_tokens=20, temperature=0.0)
    fresh = Engine.from_pretrained(folder, cache_dir=None, **made)
    assert engine.generate(prompt, params)[0].token_ids == fresh.generate(prompt, params)[0].token_ids
    with pytest.raises(UserError, match="not warmed up"):
        Engine.without_weights(folder, max_seq_len=64, max_batch_size=1).generate(prompt, params)
