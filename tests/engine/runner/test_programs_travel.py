"""Programs that were compiled without weights serve a checkpoint of the same shape, whatever its control tokens."""
import json

import numpy as np
import pytest
from oracle import random_qwen2

from qwen_jax import Engine, SamplingParams

SIZES = {"max_batch_size": 2, "max_seq_len": 128, "dtype": "float32"}
PROMPT = np.random.default_rng(0).integers(1, 300, 70).tolist()
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_qwen2().save_pretrained(folder)
    return folder


def changed(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def engine(folder, cache):
    return Engine.from_pretrained(folder, tokenizer=None, cache_dir=cache, warmup="full", **SIZES)


def test_control_tokens_need_no_other_programs(folder, tmp_path):
    compiled = Engine.without_weights(folder, cache_dir=tmp_path, **SIZES)
    compiled.runner.compile(progress=False)
    before = engine(folder, tmp_path)
    assert {bucket.from_disk for bucket in before.stats().buckets} == {True}
    free = before.generate([PROMPT], GREEDY)[0].token_ids
    assert len(free) == 6
    changed(folder, eos_token_id=free[2], bos_token_id=7, torch_dtype="float16")
    after = engine(folder, tmp_path)
    assert {bucket.from_disk for bucket in after.stats().buckets} == {True}
    answer = after.generate([PROMPT], GREEDY)[0]
    assert answer.token_ids[:2] == free[:2] and answer.finish_reason == "stop" and len(answer.token_ids) <= 3


def test_another_shape_needs_its_own(folder, tmp_path):
    Engine.without_weights(folder, cache_dir=tmp_path, **SIZES).runner.compile(progress=False)
    changed(folder, rms_norm_eps=1e-5)
    assert {bucket.from_disk for bucket in engine(folder, tmp_path).stats().buckets} == {False}
