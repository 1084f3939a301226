"""Generated examples, checked by rules that read only the text."""
import collections
import itertools
import json
import random
import re

import pytest

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.accounts import PATTERNS, draw_account, draw_transaction
from qwen_jax.evaluation.fraud.names import Deck, split_of
from qwen_jax.evaluation.fraud.task import conversations, generate, write_jsonl
from qwen_jax.evaluation.fraud.text import format_messages

PAYMENT = re.compile(r"([A-Z][a-z]{2}) (\w+) (\d+)(?: (approved|declined))? (\w+)(?: (settled|disputed))?"
                     r"(?: card (\S+) device (\S+) user (\w+) category (\w+))?$")


def before(text, word):
    return re.search(rf"(\S+) {word}\b", text)[1]


def broken_rules(text):
    """Return the rules that the last transaction of a prompt breaks, judged by the text alone."""
    profile = text[:text.index("History")]
    rows = [m.groups() for line in text.splitlines() if (m := PAYMENT.match(line))]
    _, city, amount, _, merchant, _, card, device, user, category = rows[-1]
    history = [row[:6] for row in rows[:-1] if row[3]]
    assert len(history) == 4
    broken = {
        "R01": device == before(profile, "removed"),
        "R02": city not in (before(profile, "home"), before(profile, "notice")),
        "R03": any(r[5] == "disputed" and r[4] == merchant for r in history),
        "R04": category == before(profile, "blocked"),
        "R05": int(amount) > int(re.search(r"Limit (\d+)", profile)[1]),
        "R06": card == before(profile, "lost"),
        "R07": any(r[3] == "declined" and r[2] == amount for r in history),
        "R08": user == before(profile, "deleted"),
    }
    return [name for name, is_broken in broken.items() if is_broken]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_label_follows_from_the_text(split):
    for example in generate(5, split, 400):
        expected = [example.pattern] if example.label == "fraud" else []
        assert broken_rules(example.messages[-1]["content"]) == expected
        assert example.answer.split()[:2] == [example.label, example.reason]


def test_labels_of_training_conversations():
    for opening, turns in itertools.islice(conversations(3, "train", 6, 0.0), 100):
        for turn in turns:
            assert turn.verdict == (turn.request.split()[0] == "Judge")
            if turn.verdict:
                label, reason = turn.answer.split()[:2]
                found = broken_rules(f"{opening[1]['content']}\n{turn.request}")
                assert found == ([] if label == "legit" else [reason])


BROKEN = {"R01": "removed", "R02": "ended", "R03": "disputed", "R04": "blocked", "R05": "over", "R06": "lost",
          "R07": "declined", "R08": "deleted"}


def test_explanations_say_what_is_wrong():
    seen = collections.Counter()
    for opening, turns in itertools.islice(conversations(4, "train", 5, 1.0), 200):
        for turn in turns:
            if turn.request.startswith("Explain\n"):
                found = [rule for rule, word in BROKEN.items() if word in turn.answer.split()]
                assert found == broken_rules(f"{opening[1]['content']}\n{turn.request}")
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
    examples = generate(0, "train", 160)
    assert set(collections.Counter((e.pattern, e.label) for e in examples).values()) == {10}
    assert len(PATTERNS) == 8


def test_same_seed_same_examples():
    assert generate(1, "train", 20) == generate(1, "train", 20)
    assert generate(1, "train", 20) == generate(1, "train", 40)[:20]
    assert generate(1, "train", 20) != generate(2, "train", 20)


def test_splits_share_no_identifier():
    found = {}
    for split in ("train", "heldout"):
        text = "\n".join(e.messages[1]["content"] for e in generate(0, split, 600))
        names = set(re.findall(r"\b[A-Z]\w{4,}\b", re.sub(r"(?m)^[A-Z]\w{3,}", "", text)))
        codes = set(re.findall(r"\b\w\w-\w\w\b", text))
        numbers = set(re.findall(r"\b\d{3,5}\b", text))
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
    with pytest.raises(UserError, match="unknown fraud pattern R09"):
        draw_transaction(deck, draw_account(deck), {"R09"})


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="unknown split 'test'"):
        generate(0, "test", 1)
