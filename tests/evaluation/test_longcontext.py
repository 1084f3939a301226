"""The long-context suite: answers solved again from the text; lengths, scores and pictures."""
import random
import re
from collections import Counter

import pytest
from scipy.stats import binomtest

from qwen_jax.checkpoint import load_tokenizer, resolve
from qwen_jax.errors import UserError
from qwen_jax.evaluation.longcontext.report import heat_map, table
from qwen_jax.evaluation.longcontext.samples import FAMILIES, draw
from qwen_jax.evaluation.longcontext.suite import (
    AGGREGATION,
    RETRIEVAL,
    Cell,
    evaluate,
    found,
    sample,
    samples_of,
    wilson,
)

NOTE = re.compile(r"Note (\w+ \w+(?: (?:dawn|noon|lunch|night))?) (\w+)\.")


def notes(text):
    """Return key -> animals of a document without its first line, which has an example."""
    table = {}
    for key, animal in NOTE.findall(text.split("\n", 1)[1]):
        table.setdefault(key, []).append(animal)
    return table


def solve(family, text, question):
    """Return the words that answer a question, read from the document's text."""
    if family == "many_values":
        key = re.search(r"for the (.*), from dawn to night", question).group(1)
        return [notes(text)[f"{key} {when}"][0] for when in ("dawn", "noon", "lunch", "night")]
    if family in ("single_needle", "many_keys", "many_queries"):
        keys = re.search(r"for (?:the |these: )(.*)\?", question).group(1).split(", ")
        return [animal for key in keys for animal in notes(text)[key]]
    if family == "variable_tracking":
        copies = dict(re.findall(r"^Copy (\w+) (\w+)\.$", text, re.MULTILINE))
        name, reached = re.search(r"does (\w+) reach", question).group(1), []
        while name in copies:
            name = copies[name]
            reached.append(name)
        return reached
    if family in AGGREGATION:
        counts = Counter(re.findall(r"\w+", text.split("\n", 1)[1]))
        return [word for word, _ in counts.most_common(int(re.search(r"\d", question).group()))]
    standing = {(kind, name): word for kind, name, word in
                re.findall(r"^\w+ (card|device|user) (\S+) (\w+)$", text, re.MULTILINE)}
    said = [standing[pair] for pair in re.findall(r"(card|device|user) (\S+)", question)]
    codes = {"lost": "R06", "removed": "R01", "deleted": "R08"}
    return next((["fraud " + codes[word]] for word in said if word in codes), ["legit R00"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lines", [4, 60, 700])
def test_the_answers_follow_from_the_documents(family, lines):
    for seed in range(3):
        document = FAMILIES[family](random.Random(seed), lines, 4)
        assert document == FAMILIES[family](random.Random(seed), lines, 4)
        for question in document.questions:
            answer, expected = solve(family, document.text, question.text), list(question.expected)
            assert answer == expected if family not in AGGREGATION else set(answer) == set(expected)
            assert found(question.prefix + question.answer, question.expected) == 1
            assert found(question.text, question.expected) == 0  # nothing is given away


def test_the_commonest_words_stand_out():
    text = FAMILIES["common_words"](random.Random(0), 400, 1).text
    counts = [count for _, count in Counter(re.findall(r"\w+", text.split("\n", 1)[1])).most_common()]
    assert len(set(counts[:5])) == 1 and counts[4] > 10 * counts[5] and counts[5] <= 3


def test_keys_share_a_thing_only_when_they_must():
    keys = list(notes(FAMILIES["many_keys"](random.Random(0), 282, 1).text))
    assert len(keys) == len({key.split()[1] for key in keys}) == 282
    keys = list(notes(FAMILIES["many_keys"](random.Random(0), 5000, 1).text))
    assert len(keys) == len(set(keys)) == 5000


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_fill_the_length(family):
    tokenizer = load_tokenizer(resolve("bundled"))
    for length in (600, 3000):
        one = sample(family, "0.1", length, tokenizer)
        assert 0.9 * length < len(one.prompt) + one.max_tokens <= length
        assert one == sample(family, "0.1", length, tokenizer) != sample(family, "0.2", length, tokenizer)
    with pytest.raises(UserError, match=f"{family} does not fit into 60 tokens"):
        draw(family, 0, 60, lambda document: len(document.text))


def test_a_prompt_is_the_chat_template_and_the_beginning_of_the_answer():
    tokenizer = load_tokenizer(resolve("bundled"))
    text = tokenizer.decode(sample("single_needle", "0.0", 800, tokenizer).prompt)
    assert re.fullmatch(r"<\|im_start\|>user\nSome lines note.*\nWhich animal is noted for the (\w+ \w+)\?"
                        r"<\|im_end\|>\n<\|im_start\|>assistant\nNote \1", text, re.DOTALL)


def test_found_looks_for_whole_words():
    assert found("The Lion, a cat and legit R00.", ("lion", "legit R00")) == 1
    assert found("lions and cats", ("lion", "cat")) == 0 and found("a cow", ("cow", "crow")) == 0.5


@pytest.mark.parametrize("right, samples", [(0, 20), (7, 9), (50, 50), (1, 1)])
def test_intervals_are_wilsons(right, samples):
    expected = binomtest(right, samples).proportion_ci(method="wilson")
    assert wilson(right, samples) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_a_perfect_and_a_silent_model(tmp_path):
    tokenizer = load_tokenizer(resolve("bundled"))

    def perfect(prompts, max_tokens):
        answers = []
        for prompt, most in zip(prompts, max_tokens, strict=True):
            text = tokenizer.decode(prompt).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            document, question = text.rsplit("\n", 1)
            family = next(name for name in ("single_needle", "variable_tracking", "common_words", "account_history")
                          if {"single_needle": "noted for", "variable_tracking": "reach", "common_words": "most common",
                              "account_history": "Judge"}[name] in question)
            answers.append(", ".join(solve(family, document, question)))
            assert len(tokenizer.encode(answers[-1])) <= most
        return answers

    families = ("single_needle", "variable_tracking", "common_words", "account_history")
    cells = list(evaluate(perfect, tokenizer, [600, 1200], families, 4))
    assert [(cell.family, cell.length) for cell in cells] == [(f, n) for n in (600, 1200) for f in families]
    assert all(cell.right == cell.samples == 4 and cell.recall == 1 for cell in cells)
    silent = list(evaluate(lambda prompts, _: [""] * len(prompts), tokenizer, [600], families, 4))
    assert all(cell.right == cell.recall == 0 for cell in silent)
    heat_map(cells, tmp_path / "map.png", "a title")
    assert (tmp_path / "map.png").stat().st_size > 5000
    with pytest.raises(UserError, match="unknown family needles: use single_needle"):
        next(evaluate(perfect, tokenizer, [600], ["needles"]))


def test_the_table():
    cells = [Cell(family, length, 10, 9 if family == "many_keys" else 10, 1.0) for length in (512, 1024)
             for family in (*RETRIEVAL, *AGGREGATION)]
    lines = table(cells).splitlines()
    assert lines[0].split()[-2:] == ["512", "1,024"] and len(lines) == 11
    assert lines[2].split()[-6:] == ["90.0", "[60,", "98]", "90.0", "[60,", "98]"]
    assert lines[-2].split()[-2:] == ["98.3", "98.3"] and lines[-1].split()[-2:] == ["100.0", "100.0"]
    assert set(RETRIEVAL) | set(AGGREGATION) == set(FAMILIES)


def test_questions_about_one_document_share_its_tokens():
    tokenizer = load_tokenizer(resolve("bundled"))
    several = samples_of("many_keys", "0", 800, tokenizer, 5)
    assert len(several) == 5 and len({tuple(one.prompt) for one in several}) == 5
    shared = next(i for i, tokens in enumerate(zip(*(one.prompt for one in several))) if len(set(tokens)) > 1)
    assert shared > 600 and all(len(one.prompt) + one.max_tokens <= 800 for one in several)
    assert several == samples_of("many_keys", "0", 800, tokenizer, 5)
