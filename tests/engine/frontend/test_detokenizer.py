"""Text as it streams: characters split over tokens, stop strings split over tokens."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_jax.engine.frontend.detokenizer import Detokenizer, TokenTexts


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
    fast.add_tokens(["<tool é>"])
    return fast


def stream(tokenizer, ids, stop=()):
    """Feed ids until stopped; return (pieces, text, tokens used)."""
    decoder, pieces, used = Detokenizer(tokenizer and TokenTexts(tokenizer), stop), [], 0
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
@given(data=st.data())
def test_any_tokens_read_as_the_tokenizer_reads_them(tokenizer, data):
    """Also those that are no UTF-8, and special and added ones between the bytes of a character."""
    ids = data.draw(st.lists(st.one_of(st.integers(0, len(tokenizer) - 1), st.sampled_from(
        tokenizer.encode("é世\U0001f600<|im_end|><tool é>"))), max_size=12))
    pieces, whole, _ = stream(tokenizer, ids)
    assert "".join(pieces) == whole == tokenizer.decode(ids, skip_special_tokens=True)
    texts = TokenTexts(tokenizer)
    plain = b"".join(texts.bytes_of(token) for token in ids if not texts.is_special(token))
    assert plain.decode(errors="replace") == whole


def test_a_tokenizer_of_another_kind():
    """Whose decoder joins tokens by its own rules: here a blank before each word but the first."""
    backend = Tokenizer(models.WordLevel({"one": 0, "two": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    pieces, whole, _ = stream(fast, [0, 1, 0], stop=("o",))
    assert (whole, "".join(pieces)) == ("", "")
    assert stream(fast, [0, 1, 0])[1] == "one two one" and TokenTexts(fast).bytes_of(1) == b"two"


def seconds_per_token(texts, token, count, stop=()):
    decoder = Detokenizer(texts, stop)
    began = time.perf_counter()
    for _ in range(count):
        decoder.add(token)
    return (time.perf_counter() - began) / count


@pytest.mark.parametrize("piece, stop", [
    ("\x80", ()),                               # never completes a character
    ("<|im_end|>", ()),                         # no text at all
    ("a", ["a" * 1023 + "b"] * 16),             # a stop string that is always about to appear
    ("a", ["a" * 511 + "b" + "a" * 512] * 16)])
def test_a_token_costs_the_same_after_many_and_beside_long_stop_strings(tokenizer, piece, stop):
    texts = TokenTexts(tokenizer)
    token = next(token for token in range(len(tokenizer)) if texts.bytes_of(token) == piece.encode("latin-1"))
    early = min(seconds_per_token(texts, token, 100, ["ab"] * len(stop)) for _ in range(3))
    late = min(seconds_per_token(texts, token, 4000, stop) for _ in range(2))
    assert late < 4 * early + 1e-5


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
    decoder = Detokenizer(TokenTexts(tokenizer), ("lost",))
    given_out = [decoder.add(token) for token in tokenizer.encode("a lo")]
    assert "".join(given_out) == "a " and not decoder.stopped
    assert decoder.finish() == "lo"


def test_special_tokens_are_not_text(tokenizer):
    assert stream(tokenizer, [*tokenizer.encode("ab"), tokenizer.convert_tokens_to_ids("<|im_end|>")])[1] == "ab"


def test_without_a_tokenizer_there_is_no_text():
    assert stream(None, [1, 2, 3]) == (["", "", "", ""], "", 3)


class Spelled:
    """Texts whose tokens are numbered pieces."""

    def __init__(self, *pieces):
        self.feed, self.end = pieces.__getitem__, lambda: ""

    def stream(self):
        return self


@pytest.mark.parametrize("stop, pieces, least, text", [
    ("END", ["END;E", "ND", "more"], 2, "END;"), ("aa", ["a", "a", "a"], 3, "a"), ("aa", ["aa", "b", "aa"], 2, "aab"),
    ("ab", ["ab", "c", "d"], 1, ""), ("ab", ["ab", "c", "d"], 2, "abcd"), ("ab", ["xa", "b"], 2, "x")])
def test_stop_strings_end_an_answer_of_enough_tokens_alone(stop, pieces, least, text):
    found = Detokenizer(Spelled(*pieces), [stop])
    told = ""
    for place in range(len(pieces)):
        told += found.add(place, may_stop=place + 1 >= least)
        if found.stopped:
            break
    assert told + found.finish() == found.text == text
    assert found.stopped_by == (stop if text != "".join(pieces) else None)
