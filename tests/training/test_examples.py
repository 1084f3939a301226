"""Files of examples to batches: learned tokens, refused lines, and the order of batches."""
import copy
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.checkpoint import load_tokenizer, resolve
from qwen_jax.errors import UserError
from qwen_jax.training import examples
from qwen_jax.training.examples import batch_function, encode_conversation, pack, read_examples, turn_end

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"}, {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "bye now"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("bundled"))


def write(path, *values):
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values))
    return path


def test_only_what_the_assistant_says_is_learned(tokenizer):
    tokens, learned = encode_conversation(CHAT, tokenizer)
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    runs = [[t for t, _ in run] for said, run in itertools.groupby(zip(tokens, learned), lambda x: x[1]) if said]
    assert [tokenizer.decode(run) for run in runs] == ["hello<|im_end|>", "bye now<|im_end|>"]


def test_a_turn_ends_as_the_template_ends_it_whatever_the_tokenizer_s_eos_is(tokenizer):
    """The EOS of a base model is the end of a text, and its template writes a line break after the end of a turn."""
    base = copy.deepcopy(tokenizer)
    base.eos_token = "<|endoftext|>"
    np.testing.assert_array_equal(encode_conversation(CHAT, base).learned, encode_conversation(CHAT, tokenizer).learned)
    assert turn_end(base) == turn_end(tokenizer) == tokenizer.eos_token_id
    base.chat_template = "{% for message in messages %}{{ message.role + ':' + message.content + '\n' }}{% endfor %}"
    assert turn_end(base) is None


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    original = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages | length }}" + original
    with pytest.raises(UserError, match="must not change earlier turns"):
        encode_conversation(CHAT, tokenizer)
    tokenizer.chat_template = original


def test_conversations_and_texts(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", {"messages": CHAT}, "", {"text": "word " * 70})
    examples = read_examples([file], tokenizer, 64)
    lengths = [len(example.tokens) for example in examples]
    assert all(length == 64 for length in lengths[1:-1]) and lengths[-1] <= 64
    text = np.concatenate([example.tokens for example in examples[1:]])
    assert tokenizer.decode(text) == "word " * 70 + tokenizer.eos_token
    assert all(example.learned.all() for example in examples[1:]) and not examples[0].learned.all()


def test_a_text_of_a_tokenizer_without_an_eos_has_no_end(tmp_path, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    example, = read_examples([write(tmp_path / "a.jsonl", {"text": "word"})], without, 64)
    assert tokenizer.decode(example.tokens) == "word"


BAD = [("{", "not JSON"), ([1], 'neither "messages" nor a "text"'), ({"messages": []}, "neither"),
       ({"text": ""}, "neither"),
       ({"messages": [{"role": "boss", "content": "x"}]}, "a message needs a role"),
       ({"messages": [{"role": "user"}]}, "a message needs a role"), ({"messages": CHAT[:2]}, "nothing to learn"),
       ({"messages": [{"role": "user", "content": "word " * 90}, CHAT[2]]}, "more than sequence_length=64")]


@pytest.mark.parametrize("line, message", BAD)
def test_a_bad_line_is_refused_or_skipped(tmp_path, tokenizer, capsys, line, message):
    file = write(tmp_path / "a.jsonl", {"messages": CHAT}, line)
    with pytest.raises(UserError, match=f"a.jsonl, line 2: .*{message}"):
        read_examples([file], tokenizer, 64)
    assert len(read_examples([file], tokenizer, 64, skip_bad=True)) == 1
    assert "skipped 1 bad lines; the first is" in capsys.readouterr().err


def test_no_data(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no examples in"):
        read_examples([write(tmp_path / "a.jsonl")], tokenizer, 64)
    with pytest.raises(UserError, match="cannot read"):
        read_examples([tmp_path / "none.jsonl"], tokenizer, 64)


@given(st.lists(st.integers(1, 50), max_size=200), st.integers(1, 8))
def test_packing_loses_nothing_and_overfills_nothing(lengths, open_rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "OPEN_ROWS", open_rows)
        rows = pack(lengths, range(len(lengths)), 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= 50 for row in rows)
    if open_rows == 8 and len(rows) <= 8:  # first fit: no two rows could have been one
        fill = [sum(lengths[i] for i in row) for row in rows]
        assert all(a + b > 50 for a, b in itertools.combinations(fill, 2))


def test_batches_hold_every_example_once_an_epoch_in_an_order_of_the_seed(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", *({"messages": [CHAT[1], {"role": "assistant", "content": "x " * n}]}
                                         for n in range(1, 24)))
    examples = read_examples([file], tokenizer, 64)
    batch_of = batch_function(examples, 3, 64, seed=5, pad=7)
    known = {tuple(example.tokens): index for index, example in enumerate(examples)}
    seen = []
    for step in range(1, 13):
        batch = batch_of(step)
        for row in range(3):
            for segment in range(batch.segment_ids[row].max() + 1):
                mine = batch.segment_ids[row] == segment
                index = known[tuple(batch.tokens[row, mine])]
                seen.append(index)
                assert batch.positions[row, mine].tolist() == list(range(mine.sum()))
                expected = examples[index].learned.astype(np.float32)
                expected[0] = 0
                np.testing.assert_array_equal(batch.weights[row, mine], expected)
            padding = batch.segment_ids[row] == -1
            assert (batch.tokens[row, padding] == 7).all() and not batch.weights[row, padding].any()
    epochs = [seen[i:i + 23] for i in range(0, len(seen) - 22, 23)]
    assert len(epochs) >= 2 and all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = batch_function(examples, 3, 64, seed=5, pad=7)
    other = batch_function(examples, 3, 64, seed=6, pad=7)
    for step in (9, 2):  # asked in any order
        assert all((a == b).all() for a, b in zip(again(step), batch_of(step)))
        assert any((a != b).any() for a, b in zip(other(step), batch_of(step)))
