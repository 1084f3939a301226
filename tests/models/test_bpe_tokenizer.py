"""A trained tokenizer equals the tokenizer that transformers loads from its files."""
import itertools
import json

import pytest
from bpe_tokenizer import save_tokenizer, train_tokenizer
from transformers import AutoTokenizer

from qwen_jax.config import ModelConfig, Rope
from qwen_jax.evaluation.fraud.task import conversations
from qwen_jax.evaluation.fraud.text import format_messages

CONFIG = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8, max_position_embeddings=256, rope=Rope(10_000.0), tie_word_embeddings=True,
                     dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    texts = [format_messages(opening, False) for opening, _ in itertools.islice(conversations(0, "train", 1, 0.0), 50)]
    return train_tokenizer(texts, 320)


@pytest.mark.parametrize("text", ["Limit 437\nCard active 5134", "héllo  wörld, it's 24!\n\n x", "<|im_start|>user\n"])
def test_tokenizer_is_the_one_transformers_loads(tokenizer, tmp_path, text):
    save_tokenizer(tokenizer, tmp_path, 256)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"
    messages = [{"role": "system", "content": "a b"}, {"role": "user", "content": text}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == format_messages(messages)


def test_special_tokens_come_last(tokenizer):
    assert [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [317, 318, 319]
