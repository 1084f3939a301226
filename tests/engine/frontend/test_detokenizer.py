"""Text as it streams: characters split over tokens, stop strings split over tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_jax.engine.frontend.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level tokenizer, one token per byte and a few merges: most characters beyond ASCII span tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "th", "the", "lo"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e"), ("l", "o")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    return fast


def stream(tokenizer, ids, stop=()):
    """Feed ids until stopped; return (pieces, text, tokens used)."""
    decoder, pieces, used = Detokenizer(tokenizer, stop), [], 0
    for token in ids:
        pieces.append(decoder.add(token))
        used += 1
        if decoder.stopped:
            break
    pieces.append(decoder.finish())
    return pieces, decoder.text, used


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), data=st.data())
def test_pieces_make_the_whole(tokenizer, text, data):
    ids = tokenizer.encode(text)
    ids = ids[: data.draw(st.integers(0, len(ids)))]  # may end inside a character
    pieces, whole, _ = stream(tokenizer, ids, stop=data.draw(st.sampled_from([(), ("\x00never\x00",)])))
    assert "".join(pieces) == whole == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(text=st.text("abth e世", max_size=30), stop=st.lists(st.text("abth e世", min_size=1, max_size=4), min_size=1,
                                                           max_size=3))
def test_stop_strings_cut_at_the_first_and_never_leak(tokenizer, text, stop):
    ids = tokenizer.encode(text)
    pieces, whole, used = stream(tokenizer, ids, tuple(stop))
    # The oracle reads the text token by token: a stop string counts as soon as it is complete.
    for count in range(1, len(ids) + 1):
        so_far = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        places = [so_far.find(s) for s in stop if s in so_far]
        if places:
            assert (whole, used) == (so_far[: min(places)], count)
            break
    else:
        assert whole == text
    assert "".join(pieces) == whole


def test_a_character_waits_for_its_last_byte(tokenizer):
    ids = tokenizer.encode("é世!")
    pieces, _, _ = stream(tokenizer, ids)
    assert [p for p in pieces if p] == ["é", "世", "!"] and "\ufffd" not in "".join(pieces)


def test_the_beginning_of_a_stop_string_is_held_back(tokenizer):
    decoder = Detokenizer(tokenizer, ("lost",))
    given_out = [decoder.add(token) for token in tokenizer.encode("a lo")]
    assert "".join(given_out) == "a " and not decoder.stopped
    assert decoder.finish() == "lo"


def test_special_tokens_are_not_text(tokenizer):
    assert stream(tokenizer, [*tokenizer.encode("ab"), tokenizer.convert_tokens_to_ids("<|im_end|>")])[1] == "ab"


def test_without_a_tokenizer_there_is_no_text():
    assert stream(None, [1, 2, 3]) == (["", "", "", ""], "", 3)
