"""Grammars: answers drawn from the masks have the right form, and no other answers can be drawn.

Grammars that cannot be used are refused in one line when they are given, or are an error when the answer cannot go on.
"""

import json
import re
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance.hf import from_tokenizer

from qwen_jax.checkpoint import load_tokenizer, resolve
from qwen_jax.engine.api.structured_output import StructuredOutput
from qwen_jax.engine.compiled.sampler import apply_mask
from qwen_jax.engine.frontend.grammar import GrammarCompiler, GrammarError
from qwen_jax.errors import UserError

VOCAB = 970  # more than the tokenizer's 943 ids, and no multiple of 32
WORDS = 31
IM_START, EOS = 941, (942, 940)

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {"$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}},
                           "additionalProperties": False}}, "$ref": "#/$defs/node"}  # fmt: skip
CHOICE = ("yes", "yes, but", 'a "quoted" \\ one', "two\nlines\x00", "世界 😀", "/x/i")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("bundled"))


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB, EOS)


def allowed(matcher):
    """Return the ids of the mask."""
    row = matcher.mask().view(np.uint32)
    assert len(row) == WORDS
    ids = np.arange(WORDS * 32, dtype=np.uint32)
    return np.flatnonzero((row[ids // 32] >> ids % 32) & 1).tolist()


def walk(matcher, tokenizer, seed, check=lambda text, can_end: None, limit=2000):
    """Draw tokens until the end, preferring brackets and quotes; return (ids without end-of-sequence, text)."""
    rng, ids = np.random.default_rng(seed), []
    closing = {i for i in range(len(tokenizer)) if set(tokenizer.decode([i])) & set('"}]')}
    while len(ids) < limit:
        tokens = allowed(matcher)
        text, can_end = tokenizer.decode(ids), set(EOS) <= set(tokens)
        assert tokens and max(tokens) < len(tokenizer) and IM_START not in tokens
        assert can_end or not set(EOS) & set(tokens)
        assert matcher.finished == (sorted(tokens) == sorted(EOS))
        check(text, can_end)
        if can_end and (matcher.finished or rng.random() < 0.3):
            matcher.accept(int(rng.choice(EOS)))
            assert matcher.finished and allowed(matcher) == sorted(EOS)
            return ids, text
        tokens = [token for token in tokens if token not in EOS]
        tokens = [token for token in tokens if token in closing and rng.random() < 0.5] or tokens
        ids.append(int(rng.choice(tokens)))
        matcher.accept(ids[-1])
    raise AssertionError(f"no end: {tokenizer.decode(ids)}")


def is_person(value):
    return (set(value) <= {"name", "age", "tags"} and isinstance(value["name"], str) and len(value["name"]) <= 8
            and type(value["age"]) is int and 0 <= value["age"] <= 120
            and len(value.get("tags", [])) <= 2 and set(value.get("tags", [])) <= {"a", "b"})


def is_node(value):
    return isinstance(value, dict) and (value == {} or (list(value) == ["next"] and is_node(value["next"])))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("schema, holds", [(PERSON, is_person), (TREE, is_node), (json.dumps(PERSON), is_person)])
def test_a_walk_through_a_schema_is_json_that_satisfies_it(compiler, tokenizer, schema, holds, seed):
    _, text = walk(compiler.matcher(StructuredOutput(json_schema=schema)), tokenizer, seed)
    assert holds(json.loads(text))


@pytest.mark.parametrize("seed", range(4))
def test_any_object(compiler, tokenizer, seed):
    ids, text = walk(compiler.matcher(StructuredOutput(json_object=True)), tokenizer, seed)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("regex", [r"[A-C]{2}-\d+(\.[0-9]{2})?", r"a*b?", r"(yes|no)( /[a-z]+/)*", r"\{\"x\": [ab]+\}",
                                   "^é+$"])
@pytest.mark.parametrize("seed", range(4))
def test_the_end_is_allowed_exactly_where_the_regex_matches(compiler, tokenizer, regex, seed):
    def check(text, can_end):
        if not text.endswith("\ufffd"):
            assert can_end == bool(re.fullmatch(regex, text)), text

    _, text = walk(compiler.matcher(StructuredOutput(regex=regex)), tokenizer, seed, check)
    assert re.fullmatch(regex, text)


def test_blanks_between_json_tokens_are_bounded(compiler, tokenizer):
    matcher = compiler.matcher(StructuredOutput(json_object=True))
    space, newline = tokenizer.encode(" ")[0], tokenizer.encode("\n")[0]
    matcher.accept(tokenizer.encode("{")[0])
    for token in [newline] + [space] * 31:
        matcher.accept(token)
    assert not {space, newline} & set(allowed(matcher))


def test_every_choice_and_no_other(compiler, tokenizer):
    spec = StructuredOutput(choice=list(CHOICE))
    assert {walk(compiler.matcher(spec), tokenizer, seed)[1] for seed in range(60)} == set(CHOICE)
    for option in CHOICE:
        matcher = compiler.matcher(spec)
        for token in tokenizer.encode(option):
            matcher.accept(token)
        assert set(EOS) <= set(allowed(matcher))


def test_a_lark_grammar(compiler, tokenizer):
    matcher = compiler.matcher(StructuredOutput(grammar='start: pair ("," pair)*\npair: /[a-z]/ "=" /[0-9]/'))
    _, text = walk(matcher, tokenizer, 0)
    assert re.fullmatch(r"[a-z]=[0-9](,[a-z]=[0-9])*", text)


def test_special_tokens_and_padding_are_no_text(compiler, tokenizer):
    for spec in (StructuredOutput(regex=r"[\s\S]*"), StructuredOutput(json_schema={"type": "string"})):
        matcher = compiler.matcher(spec)
        if '"' in tokenizer.decode(allowed(matcher)[:1]):
            matcher.accept(tokenizer.encode('"')[0])
        tokens = set(allowed(matcher))
        assert len(tokens) > 500 and IM_START not in tokens and max(tokens) < len(tokenizer)
        for token in (IM_START, len(tokenizer), VOCAB, 10**6, -1):
            with pytest.raises(ValueError, match="not allowed"):
                matcher.accept(token)
        assert set(allowed(matcher)) == tokens  # a refused token changes nothing


def test_ids_beyond_a_smaller_vocabulary_are_never_allowed(tokenizer):
    matcher = GrammarCompiler(tokenizer, 900, (899,)).matcher(StructuredOutput(regex=r"[\s\S]*"))
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    assert len(bits) == 29 * 32
    assert bits[:899].sum() > 500 and bits[899] and not bits[900:].any()


def test_end_of_sequence_is_refused_in_the_middle(compiler, tokenizer):
    matcher = compiler.matcher(StructuredOutput(regex="ab"))
    for token in EOS:
        with pytest.raises(ValueError, match="cannot end here"):
            matcher.accept(token)
    for token in tokenizer.encode("a"):
        matcher.accept(token)
    assert allowed(matcher) == tokenizer.encode("b") and not matcher.finished


def test_a_copy_advances_on_its_own(compiler, tokenizer):
    matcher = compiler.matcher(StructuredOutput(json_schema=PERSON))
    for token in tokenizer.encode('{"name"'):
        matcher.accept(token)
    before, copy = allowed(matcher), matcher.copy()
    _, rest = walk(copy, tokenizer, 1)
    assert is_person(json.loads('{"name"' + rest))
    assert allowed(matcher) == before and copy.finished and not matcher.finished


def test_several_threads_ask_a_new_compiler_at_once(tokenizer, monkeypatch):
    compiler, results, built = GrammarCompiler(tokenizer, VOCAB, EOS), [], []
    start = threading.Barrier(4)

    def build(*args, **options):
        built.append(1)
        time.sleep(0.05)  # as for a large vocabulary, so that the others come meanwhile
        return from_tokenizer(*args, **options)

    monkeypatch.setattr("llguidance.hf.from_tokenizer", build)

    def ask(seed):
        start.wait()
        results.append(walk(compiler.matcher(StructuredOutput(json_schema=PERSON)), tokenizer, seed)[1])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1] and len(results) == 4 and all(is_person(json.loads(text)) for text in results)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 4), vocab=st.sampled_from([1, 31, 32, 33, 970]), seed=st.integers(0, 99),
       dtype=st.sampled_from([np.int32, np.uint32]))
def test_apply_mask_against_numpy(rows, vocab, seed, dtype):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, vocab)).astype(np.float32)
    scores.flat[:1] = np.nan
    words = rng.integers(0, 2**32, (rows, -(-vocab // 32)), np.uint32)
    bits = np.array([[word >> np.uint32(i % 32) & 1 for i, word in enumerate(row.repeat(32)[:vocab])] for row in words])
    result = jax.jit(apply_mask)(scores, words.view(dtype))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, np.where(bits, scores, -np.inf))


# --- grammars that cannot be used


BAD_GRAMMARS = [
    (StructuredOutput(json_schema={"type": "objekt"}), "json_schema cannot be used: Invalid type: objekt"),
    (StructuredOutput(json_schema={"type": "string", "pattern": "[a"}), "unclosed character class"),
    (StructuredOutput(json_schema={"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
    (StructuredOutput(json_schema={"$ref": "http://localhost/x.json"}), "http://localhost/x.json"),
    (StructuredOutput(json_schema={"type": "integer", "minimum": 3, "maximum": 2}), "nsatisfiable"),
    (StructuredOutput(json_schema='{"items":' * 300 + "{}" + "}" * 300), "json_schema must be nested at most 100 deep"),
    (StructuredOutput(regex="(a"), "regex cannot be used: unclosed group"),
    (StructuredOutput(regex="a(?=b)"), "look-ahead"),
    (StructuredOutput(regex=r"[^\s\S]"), "regex cannot be used: no text satisfies it"),
    (StructuredOutput(regex="|".join(f"word{i}x{{9}}" for i in range(30_000))), "too big"),
    (StructuredOutput(grammar="start: pair"), 'unknown name: "pair"'),
    (StructuredOutput(grammar="start: start"), "no text satisfies it"),
]


@pytest.mark.parametrize("spec, message", BAD_GRAMMARS, ids=range(len(BAD_GRAMMARS)))
def test_a_bad_grammar_is_refused_in_one_line(compiler, spec, message):
    with pytest.raises(UserError) as error:
        compiler.matcher(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("spec, text", [
    (StructuredOutput(regex="((a{1000}){1000}){100}"), "aaa"),  # found by accept
    (StructuredOutput(grammar='start: "a" rest\nrest: rest "b"'), "a"),  # no mask: nothing can follow
])  # fmt: skip
def test_a_grammar_that_cannot_go_on_ends_with_an_error(compiler, tokenizer, spec, text):
    matcher = compiler.matcher(spec)
    with pytest.raises(GrammarError, match="cannot be followed further"):
        for token in tokenizer.encode(text):
            matcher.accept(token)
            matcher.mask()
    assert not matcher.finished


@pytest.mark.parametrize("rules", ['e: e e e | e e | "a"', 'e: e "a" | e e | "a" e | "a"'])
def test_an_ambiguous_grammar_ends_before_it_takes_the_engine_s_time(compiler, tokenizer, rules):
    matcher, (token,) = compiler.matcher(StructuredOutput(grammar=f"start: e\n{rules}")), tokenizer.encode("a")
    began = time.thread_time()
    with pytest.raises(GrammarError, match="takes too long"):
        for _ in range(3000):
            matcher.accept(token)
            matcher.mask()
    assert time.thread_time() - began < 5


def test_a_token_that_the_mask_had_and_the_library_refuses_is_the_grammar_s_error(compiler, tokenizer, monkeypatch):
    """As the library does where its fuel ends while it takes a token."""
    matcher, (token,) = compiler.matcher(StructuredOutput(regex="ab")), tokenizer.encode("a")
    matcher.mask()
    monkeypatch.setattr(matcher, "_timed", lambda function, *arguments: 0)
    with pytest.raises(GrammarError, match="too complex"):
        matcher.accept(token)
    with pytest.raises(ValueError, match="not allowed"):
        matcher.accept(token + 1)


def test_a_mask_has_no_special_token_that_is_refused_then(compiler, tokenizer):
    """The library's own mask has them, for a complement."""
    matcher = compiler.matcher(StructuredOutput(grammar="start: T\nT: ~(/ab/)"))
    assert IM_START not in allowed(matcher) and len(allowed(matcher)) > 500
    matcher = compiler.matcher(StructuredOutput(grammar='start: <|im_start|> "a"'))
    assert allowed(matcher) == [IM_START]
    matcher.accept(IM_START)
    assert allowed(matcher) == tokenizer.encode("a")


def test_text_that_is_also_a_special_token_is_spelled_out():
    """As `<tool_call>` in Qwen2.5's vocabulary: the library's mask has that token alone, and refuses it."""
    tokenizer = load_tokenizer(resolve("bundled"))
    tokenizer.add_tokens(["<tool_call>"])
    compiler = GrammarCompiler(tokenizer, VOCAB, EOS)
    matcher = compiler.matcher(StructuredOutput(grammar='start: "<tool_call>\\n" "a"'))
    assert walk(matcher, tokenizer, 0)[1] == "<tool_call>\na"


def test_without_a_tokenizer_or_an_end_there_is_no_grammar(tokenizer):
    for compiler, message in ((GrammarCompiler(None, VOCAB, EOS), "needs a tokenizer"),
                              (GrammarCompiler(tokenizer, VOCAB, (VOCAB - 1,)), "end-of-sequence")):
        with pytest.raises(UserError, match=message):
            compiler.matcher(StructuredOutput(json_object=True))
