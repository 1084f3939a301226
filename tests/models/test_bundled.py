"""The shipped model: small, loadable by transformers, and right about transactions it has never seen."""
import json
from pathlib import Path

import jax
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_jax import load_model
from qwen_jax.evaluation.fraud.score import answers_in_one_pass, score
from qwen_jax.evaluation.fraud.task import generate
from qwen_jax.evaluation.fraud.text import format_messages

FOLDER = Path(__file__).resolve().parents[2] / "qwen_jax" / "bundled"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_it_is_small_and_complete():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*")) <= 10_000_000
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["tie_word_embeddings"]
    assert {"generation_config.json", "tokenizer_config.json"} <= {file.name for file in FOLDER.iterdir()}


def test_its_tokenizer_is_the_one_transformers_loads(tokenizer):
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    for example in generate(10, "heldout", 6):
        messages = [*example.messages, {"role": "assistant", "content": example.answer}]
        text = format_messages(messages, False)
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
        assert theirs.apply_chat_template(messages, tokenize=False) == text
    assert theirs.decode(theirs("prix: 12 €, día 7\n")["input_ids"]) == "prix: 12 €, día 7\n"


def test_accuracy_on_transactions_it_has_never_seen(tokenizer):
    examples = generate(11, "heldout", 800)
    model = load_model(FOLDER, dtype="float32")
    forward = jax.jit(lambda tokens: model(tokens))
    result = score(answers_in_one_pass(forward, tokenizer, examples), examples)
    assert result.majority == 0.5 and len(result.patterns) == 8
    assert result.accuracy >= 0.97, result.table()


def test_transformers_generates_the_same_verdicts(tokenizer):
    """transformers, too, loads the folder, and generates the labels that one forward pass gives."""
    examples = generate(12, "heldout", 12)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    texts = []
    for example in examples:
        ids = torch.tensor([tokenizer.encode(format_messages(example.messages)).ids])
        out = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(out[0, ids.shape[1]:].tolist()))
    model = load_model(FOLDER, dtype="float32")
    ours = answers_in_one_pass(jax.jit(lambda tokens: model(tokens)), tokenizer, examples, rows=12)
    assert [t.split()[0] for t in texts] == [t.split()[0] for t in ours]
