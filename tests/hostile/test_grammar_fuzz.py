"""Hostile grammars of every kind, a few of them; ``grammar_fuzz.py`` runs thousands."""

from grammar_fuzz import Fuzzer


def test_hostile_grammars_stay_within_their_bounds():
    fuzzer = Fuzzer(seed=3)
    for number in range(20):
        fuzzer.run(number)
    assert set(fuzzer.outcomes) == {"followed", "refused", "ended"}
