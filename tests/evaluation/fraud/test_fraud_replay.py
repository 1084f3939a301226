"""The generated day, and requests to a screening service."""
import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from test_fraud import broken_rules

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.accounts import PATTERNS, draw_account, draw_transaction
from qwen_jax.evaluation.fraud.names import Deck, split_of
from qwen_jax.evaluation.fraud.replay import DRIFT, NIGHT, Day, arrival_times, day, screenings, write_training
from qwen_jax.evaluation.fraud.request import evidence_of, messages_of, prompt_of, request_of
from qwen_jax.evaluation.fraud.text import evidence, format_messages, render_account, render_transaction

DAY = Day(seconds=60, rate=50, seed=3)


@pytest.fixture(scope="module")
def arrived():
    return day(DAY)


def test_a_day_is_the_same_every_time_and_another_with_another_seed(arrived):
    assert day(DAY) == arrived
    assert day(replace(DAY, seed=4))[0].screening.request != arrived[0].screening.request


def test_repetitions_are_exact_recent_and_as_many_as_asked_for(arrived):
    seen, distances = {}, []
    for one in arrived:
        key = json.dumps(one.screening.request)
        assert one.repeats == (key in seen)
        if one.repeats:
            distances.append(len(seen) - seen[key])
        else:
            seen[key] = len(seen)
    share = sum(one.repeats for one in arrived) / len(arrived)
    assert abs(share - DAY.repeats) < 4 * np.sqrt(DAY.repeats * (1 - DAY.repeats) / len(arrived))
    assert np.median(distances) < len(seen) / 3


def test_requests_come_in_the_rhythm_of_a_day():
    times = np.array(arrival_times(random.Random(0), 100.0, 500.0))
    assert (np.diff(times) > 0).all() and abs(len(times) - 50_000) < 5 * np.sqrt(50_000)
    night, noon = (times < 5).sum() + (times > 95).sum(), ((times > 45) & (times < 55)).sum()
    assert NIGHT - .02 < night / 5_000 < NIGHT + .05 and 1.8 < noon / 5_000 < 1.95


def test_labels_follow_from_the_text_in_old_words_and_new(arrived):
    back = {new: old for old, new in DRIFT.items()}
    for one in {id(one.screening): one.screening for one in arrived}.values():
        prompt = prompt_of(one.request)
        assert one.drifted == any(f" {word}" in prompt for word in back)
        assert not one.drifted or not any(f" {word}" in prompt for word in DRIFT)
        for new, old in back.items():
            prompt = prompt.replace(f" {new}", f" {old}")
        expected = [one.reason] if one.label == "fraud" else []
        assert broken_rules(prompt.split("user\n", 1)[1].split("<|im_end|>")[0]) == expected
        assert one.answer.split()[:2] == [one.label, one.reason]
        assert all(split_of(name) == "heldout" for name in (one.request["account"]["number"],
                                                            one.request["payment"]["merchant"]))
    drifted = [one.at for one in arrived if one.screening.drifted]
    assert min(drifted) >= DAY.drift_at * DAY.seconds


def test_accounts_have_several_payments():
    numbers = [one.request["account"]["number"] for one in itertools.islice(screenings(1, "heldout", .2, 4.0), 4000)]
    assert 3.3 < len(numbers) / len(set(numbers)) < 4.7


def test_prompts_are_those_that_the_model_was_trained_on():
    deck = Deck(random.Random(0), "heldout")
    for pattern in PATTERNS:
        account = draw_account(deck := Deck(random.Random(pattern), "heldout"))
        tx = draw_transaction(deck, account, {pattern})
        request = json.loads(json.dumps(request_of(account, tx)))
        words = lambda text: sorted(text.replace(",", "").split())  # noqa: E731  lines and pairs have any order
        system, user = messages_of(request)
        assert user["content"].endswith("\n" + render_transaction(tx))
        assert words(user["content"]) == words(f"{render_account(account)}\n{render_transaction(tx)}")
        assert prompt_of(request) == format_messages([system, user])
        if pattern != "R02":
            assert evidence_of(request, pattern) == evidence(account, tx, pattern)
        else:
            assert evidence_of(request, pattern) == f"city {tx.city} ended"


def test_training_material_is_in_other_names_and_in_both_wordings(tmp_path):
    write_training(tmp_path / "train.jsonl", 200)
    lines = [json.loads(line)["messages"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    texts = [user["content"] for _, user, _ in lines]
    assert len(lines) == 200 and 90 < sum(" stolen" in text for text in texts) < 150
    assert sum("\nExplain\n" in text for text in texts) == sum("\nJudge\n" in text for text in texts) == 100
    assert all(split_of(text.split()[1]) == "train" for text in texts)
    for *_, user, said in lines:  # answered in the old words
        card = user["content"].split(" card ")[1].split()[0]
        if f"{card} stolen" in user["content"]:
            assert f"{card} lost" in said["content"] or "\nJudge\n" in user["content"]
        assert not any(word in said["content"] for word in DRIFT.values())


def test_a_day_that_cannot_be_is_refused():
    for wrong in ({"seconds": 0}, {"repeats": 1.0}, {"frauds": 2}, {"payments": 0}):
        with pytest.raises(UserError):
            Day(**wrong)
