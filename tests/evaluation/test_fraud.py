"""The generator, held against a judge that reads nothing but the text."""
import collections
import itertools
import json
import random
import re

import pytest

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud import (
    PATTERNS,
    conversations,
    draw_account,
    draw_transaction,
    format_messages,
    generate,
    write_jsonl,
)
from qwen_jax.evaluation.fraud_names import Deck, split_of

PAYMENT = re.compile(r"(\d\d):\d\d (?:(approved|declined|disputed) )?(\w+) (\d+) (\w+) terminal (\w+)"
                     r"(?: card (\w+) device (\w+) user (\w+) category (\w+))?$")


def after(text, word):
    return re.search(rf"\b{word} (\w+)", text)[1]


def broken_rules(text):
    """The rules that the last transaction of a prompt breaks, from the text alone."""
    profile = text[:text.index("History")]
    rows = [m.groups() for line in text.splitlines() if (m := PAYMENT.match(line))]
    hour, _, merchant, amount, city, terminal, card, device, user, category = rows[-1]
    history = [row[:6] for row in rows[:-1] if row[1]]
    broken = {
        "R01": device == after(profile, "removed"),
        "R02": city not in (after(profile, "Home"), after(profile, "notice")),
        "R03": any(r[1] == "disputed" and r[2] == merchant for r in history),
        "R04": category == after(profile, "blocked"),
        "R05": int(amount) > int(after(profile, "Limit")),
        "R06": any(r[0] == hour and r[4] != city for r in history),
        "R07": any(r[1] == "declined" and r[3] == amount for r in history),
        "R08": card == after(profile, "lost"),
        "R09": user == after(profile, "deleted"),
        "R10": any(r[5] == terminal and r[2] != merchant for r in history),
    }
    return [name for name, is_broken in broken.items() if is_broken]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_label_follows_from_the_text(split):
    for example in generate(5, split, 400):
        expected = [example.pattern] if example.label == "fraud" else []
        assert broken_rules(example.messages[-1]["content"]) == expected
        assert example.answer.split()[:2] == [example.label, example.reason]


def test_labels_of_training_conversations():
    for messages in itertools.islice(conversations(3, "train", 6, 0.0), 100):
        profile = messages[1]["content"]
        profile = profile[:profile.index("Judge")]
        for question, answer in zip(messages[1::2], messages[2::2]):
            if question["content"] == "List":
                continue
            judged = question["content"][question["content"].index("Judge"):]
            label, reason = answer["content"].split()[:2]
            assert broken_rules(profile + judged) == ([] if label == "legit" else [reason])


BROKEN = {"R01": "device removed", "R02": "city ended", "R03": "merchant disputed", "R04": "category blocked",
          "R05": "limit over", "R06": "hour elsewhere", "R07": "amount declined", "R08": "card lost",
          "R09": "user deleted", "R10": "terminal foreign"}


def test_explanations_say_what_is_wrong():
    seen = collections.Counter()
    for messages in itertools.islice(conversations(4, "train", 5, 1.0), 200):
        profile = messages[1]["content"]
        profile = profile[:profile.index("Judge")]
        for question, explanation in zip(messages[5::2], messages[6::2]):
            assert question["content"].startswith("Explain\n")
            found = [rule for rule, words in BROKEN.items() if words in explanation["content"]]
            assert found == broken_rules(profile + question["content"])
            seen.update(found)
    assert min(seen[rule] for rule in PATTERNS) > 100


def test_twins_have_the_same_words():
    examples = generate(7, "heldout", 200)
    for fraud, twin in zip(examples[::2], examples[1::2]):
        words = [collections.Counter(re.findall(r"\w+", e.messages[1]["content"])) for e in (fraud, twin)]
        assert words[0] == words[1]
        assert (fraud.label, twin.label) == ("fraud", "legit") and fraud.pattern == twin.pattern
        assert fraud.messages != twin.messages


def test_patterns_and_labels_are_balanced():
    examples = generate(0, "train", 200)
    assert set(collections.Counter((e.pattern, e.label) for e in examples).values()) == {10}
    assert len(PATTERNS) >= 8


def test_same_seed_same_examples():
    assert generate(1, "train", 20) == generate(1, "train", 20)
    assert generate(1, "train", 20) == generate(1, "train", 40)[:20]
    assert generate(1, "train", 20) != generate(2, "train", 20)


def test_splits_share_no_identifier():
    found = {}
    for split in ("train", "heldout"):
        text = "\n".join(e.messages[1]["content"] for e in generate(0, split, 600))
        names = set(re.findall(r"\b[A-Z]\w{4,}\b", re.sub(r"(?m)^[A-Z]\w+", "", text)))
        codes = set(re.findall(r"\b[a-z]{2}\d\d\b", text))
        numbers = set(re.findall(r"(?<![\w:])\d{3,5}\b", text))
        found[split] = names | codes | numbers
        assert len(names) > 100 and len(codes) > 100 and len(numbers) > 100
        assert {split_of(word) for word in found[split]} == {split}
    assert not found["train"] & found["heldout"]


def test_chatml():
    text = format_messages([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_jsonl(tmp_path):
    examples = generate(0, "heldout", 3)
    write_jsonl(tmp_path / "x.jsonl", examples)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == ["fraud", "legit", "fraud"]
    assert lines[1]["messages"] == examples[1].messages


def test_unknown_pattern_is_refused():
    deck = Deck(random.Random(0), "train")
    with pytest.raises(UserError, match="unknown fraud pattern R11"):
        draw_transaction(deck, draw_account(deck), {"R11"})


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="unknown split 'test'"):
        generate(0, "test", 1)
