"""Rows of turns: a turn is encoded and learned as in a conversation of its own."""
import itertools

import jax
import numpy as np
import pytest
from bpe_tokenizer import train_tokenizer
from turn_rows import OPENING, batches, encode

from qwen_jax.config import ModelConfig, Rope
from qwen_jax.evaluation.fraud.task import conversations
from qwen_jax.evaluation.fraud.text import format_messages
from qwen_jax.model import init, params_of
from qwen_jax.training.stacked import stack
from qwen_jax.training.step import language_model_loss

CONFIG = ModelConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=8, max_position_embeddings=256, rope=Rope(10_000.0), tie_word_embeddings=True,
                     dtype="float32")

BEFORE = [{"role": "system", "content": "Say it."}, {"role": "user", "content": "Limit 437\nCard lost"}]
BEFORE_TEXT = format_messages(BEFORE, False).removesuffix("<|im_end|>\n") + "\n"
TURNS = [("Judge\nfood 12", "fraud R08 lost"), ("Explain", "limit 437"), ("Judge\n9", "legit")]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [format_messages(opening, False) for opening, _ in itertools.islice(conversations(0, "train", 1, 0.0), 50)]
    return train_tokenizer(texts, 320)


def test_encoding_piecewise_equals_the_whole_text_and_weights_mark_answers(tokenizer):
    row = {name: np.array(values) for name, values in encode(tokenizer, BEFORE_TEXT, TURNS, 0.25).items()}
    for number, (request, answer) in enumerate(TURNS, 1):
        mine = (row["segment_ids"] == OPENING) | (row["segment_ids"] == number)
        question = {"role": "user", "content": f"{BEFORE[1]['content']}\n{request}"}
        whole = format_messages([BEFORE[0], question, {"role": "assistant", "content": answer}], False)
        assert row["tokens"][mine].tolist() == tokenizer.encode(whole.removesuffix("\n")).ids
        assert row["positions"][mine].tolist() == list(range(mine.sum()))
        assert row["tokens"][mine & (row["weights"] == 1)].tolist() == tokenizer.encode(answer + "<|im_end|>").ids
        first = np.flatnonzero(row["segment_ids"] == number)[0]
        assert row["weights"][first] == 0, "what precedes it in the row is another turn"
    assert row["weights"][0] == 0 and set(row["weights"]) == {0, 0.25, 1.0}


def test_positions_left_out_of_the_opening(tokenizer):
    """Skips leave the tokens as they are and move them apart: lines stay together, turns follow the last line."""
    plain, apart = ({name: np.array(values) for name, values in encode(tokenizer, BEFORE_TEXT, TURNS, 0.25, s).items()}
                    for s in ({}, {1: 100, 3: 1000}))
    for name in ("tokens", "weights", "segment_ids"):
        np.testing.assert_array_equal(plain[name], apart[name])
    lines = BEFORE_TEXT.splitlines(keepends=True)
    ends = np.cumsum([len(tokenizer.encode(line).ids) for line in lines])
    moved = apart["positions"] - plain["positions"]
    assert set(moved[:ends[0]]) == {0} and set(moved[ends[0]:ends[2]]) == {100} and set(moved[ends[2]:]) == {1100}


def test_batches_pad_and_cut(tokenizer):
    source = [(BEFORE_TEXT, TURNS[:1]), (BEFORE_TEXT, TURNS * 9)]
    batch, = batches(tokenizer, source, 2, 128, 0.1)
    assert batch.tokens.shape == (2, 128) and batch.tokens.dtype == np.int32
    length = len(encode(tokenizer, *source[0], 0.1)["tokens"])
    assert length < 128 and (batch.tokens[0, length:] == tokenizer.token_to_id("<|endoftext|>")).all()
    assert not batch.weights[0, length:].any() and (batch.segment_ids[0, length:] == -1).all()
    assert (batch.segment_ids[1] >= 0).all() and batch.weights[1, -1] > 0


def test_a_turn_learns_as_if_it_stood_alone(tokenizer):
    """The loss of a row of turns is the sum of the losses of its turns, each in a row of its own."""
    params = stack(params_of(init(CONFIG, 0, "float32")))
    loss = jax.jit(language_model_loss(CONFIG, shared_segment=OPENING))

    def total(turns):
        batch, = batches(tokenizer, [(BEFORE_TEXT, turns)], 1, 256, 0.0)
        return [float(x) for x in (lambda nll, aux: (nll, aux[0]))(*loss(params, {}, batch))]

    alone = np.sum([total([turn]) for turn in TURNS], axis=0)
    np.testing.assert_allclose(total(TURNS), alone, rtol=1e-5)
