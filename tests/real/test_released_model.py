"""A released model, which scripts/real_model.sh names: its answers are those of transformers, sparse attention costs
it little, its GGUF file is read, and its calibration is found.

`greedy.json` has transformers' greedy answers in float32 to ten conversations of one turn, by
Qwen2.5-Coder-0.5B-Instruct.
"""
import argparse
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from qwen_kernels.sparse_attention import Sparsity
from transformers import AutoModelForCausalLM

from qwen_jax import Engine, SamplingParams
from qwen_jax.checkpoint import load_model, load_tokenizer, read_calibrated, read_sparsity, resolve
from qwen_jax.engine.config.resolve import precision_of
from qwen_jax.evaluation.sparse_fidelity import fidelity
from qwen_jax.model import build, params_of
from qwen_jax.quantization import QuantizedTensor

pytestmark = pytest.mark.real
ANSWERS = json.loads((Path(__file__).parent / "greedy.json").read_text())
TEXT = Path(argparse.__file__)
TOKENS = 3072


@pytest.fixture(scope="module")
def source():
    name = os.environ.get("QWEN_JAX_REAL_MODEL")
    if not name:
        pytest.fail("QWEN_JAX_REAL_MODEL names no checkpoint: run scripts/real_model.sh FOLDER")
    return resolve(name)


def test_greedy_answers_are_those_of_transformers(source):
    tokenizer = load_tokenizer(source)
    for answer in ANSWERS:
        turn = [{"role": "user", "content": answer["prompt"]}]
        assert tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) == answer[
            "prompt_ids"]
    if (source.config.num_layers, source.config.hidden_size) != (24, 896):
        pytest.skip("greedy.json is of a 0.5B: scripts/verify_release.sh compares other models with transformers")
    engine = Engine.from_pretrained(source.path, dtype="float32", max_batch_size=10, max_seq_len=256)
    outs = engine.generate([answer["prompt_ids"] for answer in ANSWERS],
                           [SamplingParams(max_tokens=len(answer["greedy_ids"]), temperature=0.0, ignore_eos=True,
                                           repetition_penalty=1.0)  # not the checkpoint's
                            for answer in ANSWERS])
    assert [out.token_ids for out in outs] == [answer["greedy_ids"] for answer in ANSWERS]


def test_its_gguf_file_is_read_as_transformers_reads_it(source):
    """Where a GGUF file lies beside the model's folder: logits, and the most likely token at every position."""
    files = sorted(source.path.parent.glob("*.gguf"))
    if len(files) != 1:
        pytest.skip("no GGUF file beside the model's folder")
    theirs = AutoModelForCausalLM.from_pretrained(files[0].parent, gguf_file=files[0].name, dtype=torch.float32)
    ours, answer = load_model(files[0], "float32"), ANSWERS[0]
    turn = [{"role": "user", "content": answer["prompt"]}]
    assert load_tokenizer(resolve(files[0])).apply_chat_template(turn, add_generation_prompt=True, return_dict=False
                                                                 ) == answer["prompt_ids"]
    tokens = np.asarray([answer["prompt_ids"] + answer["greedy_ids"]])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = np.asarray(ours(tokens))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_int8_weights_add_little_to_the_loss(source):
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    tokens = np.asarray([tokenizer.encode(TEXT.read_text())[:512]])

    def loss(params):
        logits = jax.nn.log_softmax(build(model.config, params)(tokens)[0, :-1])
        return -float(np.mean(np.asarray(logits)[np.arange(511), tokens[0, 1:]]))

    precision = precision_of(model.config, False, None, weights="int8")
    params = params_of(model)
    rounded = {path: precision.store(path, value) for path, value in params.items()}
    assert sum(isinstance(value, QuantizedTensor) for value in rounded.values()) == 4 * model.config.num_layers + 1
    assert abs(loss(rounded) - loss(params)) <= 0.02


def test_sparse_attention_adds_little_to_the_loss(source):
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    tokens = tokenizer.encode(TEXT.read_text())[:TOKENS]
    found = fidelity(model, tokens, (Sparsity(),) * model.config.num_layers, recall=False)
    assert found.density < 0.65, "some pages must be left out"
    assert 0.5 < found.full_loss < 3, "a model of code knows code"
    assert found.loss - found.full_loss <= 0.02


def test_its_calibration_comes_with_the_package(source):
    if source.config.hidden_size != 896:
        pytest.skip("the package has the calibration of the 0.5B alone")
    layers, eight_bit = read_sparsity(source, source.config), read_calibrated(source, source.config)
    assert sum(len(layer.dense_heads) for layer in layers) == 3 and {layer.budget for layer in layers} == {3, 6}
    assert sum(eight_bit.precision.weights) == 12 and set(eight_bit.precision.kv_cache) == {"int8"}
