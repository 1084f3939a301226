"""Grammars that cannot be used: refused in one line when asked for, or an error when the answer cannot go on."""

import numpy as np
import pytest

from qwen_jax.checkpoint import load_tokenizer, resolve
from qwen_jax.engine.grammar import GrammarCompiler, GrammarError
from qwen_jax.engine.structured_output import StructuredOutput
from qwen_jax.errors import UserError

VOCAB, WORDS, EOS = 970, 31, (942, 940)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("bundled"))


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB, EOS)


BAD_GRAMMARS = [
    (StructuredOutput(json_schema={"type": "objekt"}), "json_schema cannot be used: Invalid type: objekt"),
    (StructuredOutput(json_schema={"type": "string", "pattern": "[a"}), "unclosed character class"),
    (StructuredOutput(json_schema={"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
    (StructuredOutput(json_schema={"$ref": "http://localhost/x.json"}), "http://localhost/x.json"),
    (StructuredOutput(json_schema={"type": "integer", "minimum": 3, "maximum": 2}), "nsatisfiable"),
    (StructuredOutput(json_schema='{"items":' * 300 + "{}" + "}" * 300), "json_schema cannot be used: recursion limit"),
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
    (StructuredOutput(grammar='start: "a" rest\nrest: rest "b"'), "a"),  # by fill: nothing can follow
])  # fmt: skip
def test_a_grammar_that_cannot_go_on_ends_with_an_error(compiler, tokenizer, spec, text):
    matcher = compiler.matcher(spec)
    with pytest.raises(GrammarError, match="cannot be followed further"):
        for token in tokenizer.encode(text):
            matcher.accept(token)
            matcher.fill(np.zeros(WORDS, np.int32))
    assert not matcher.finished


def test_without_a_tokenizer_or_an_end_there_is_no_grammar(tokenizer):
    for compiler, message in ((GrammarCompiler(None, VOCAB, EOS), "needs a tokenizer"),
                              (GrammarCompiler(tokenizer, VOCAB, (VOCAB - 1,)), "end-of-sequence")):
        with pytest.raises(UserError, match=message):
            compiler.matcher(StructuredOutput(json_object=True))
