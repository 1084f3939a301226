"""Hostile requests of every kind against a live server, some hundreds; ``scripts/bench/hostile.py`` sends thousands."""

import asyncio

import pytest
from hostile_client import NORMAL_SECONDS, attack, normal_answer
from hostile_requests import KINDS


@pytest.fixture(scope="module")
def normal_text(server):
    return asyncio.run(normal_answer(server.port))[0]


def test_they_are_enough():
    assert sum(kind.short for kind in KINDS.values()) >= 300


@pytest.mark.parametrize("name", KINDS)
def test_the_server_answers_as_before_after(server, normal_text, name):
    kind = KINDS[name]
    outcomes = asyncio.run(attack(kind, kind.short, name, server.port))
    text, seconds = asyncio.run(normal_answer(server.port))
    assert not [outcome.problem for outcome in outcomes if outcome.problem]
    assert server.process.poll() is None and text == normal_text
    assert seconds < 3 * NORMAL_SECONDS  # other tests run beside
    server.wait_until_free()
