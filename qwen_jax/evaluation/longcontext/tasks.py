"""Eight families of long-context tasks: documents of any length, questions about them, and their exact answers.

Seven follow RULER's (Hsieh et al. 2024, https://arxiv.org/abs/2404.06654), with names of animals as values; in the
eighth a decision about a card payment hinges on one line of a long account history. Documents are drawn, never
downloaded, so no model has met them.

A family is ``(rng, lines, questions) -> Document``: `lines` is roughly the number of lines, `questions` at most how
many independent questions are asked about the document (one for a test, many to train on).
"""
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qwen_jax.evaluation.longcontext.words import ADJECTIVES, ANIMALS, DEEDS, PEOPLE, PLACES, THINGS, TIMES


class Question(NamedTuple):
    """What is asked after the document. The assistant's answer begins with `prefix`, which the model is given."""
    text: str
    prefix: str
    answer: str               # how the right answer goes on
    expected: tuple[str, ...]  # words that must all be in it


class Document(NamedTuple):
    text: str
    questions: tuple[Question, ...]


Family = Callable[[random.Random, int, int], Document]


def _noise(rng: random.Random) -> str:
    return f"{rng.choice(PEOPLE)} {rng.choice(DEEDS)} near the {rng.choice(PLACES)} {rng.choice(TIMES)}."


def _keys(rng: random.Random, count: int) -> list[str]:
    """Different things with an adjective each, such as ``amber lamp``; as few as possible share the thing."""
    things, adjectives = rng.sample(THINGS, len(THINGS)), rng.sample(ADJECTIVES, len(ADJECTIVES))
    count = min(count, len(things) * len(adjectives))
    shifts = rng.choices(range(len(adjectives)), k=len(things))
    return [f"{adjectives[(shifts[i % len(things)] + i // len(things)) % len(adjectives)]} {things[i % len(things)]}"
            for i in range(count)]


def _scatter(rng: random.Random, lines: Sequence[str], others: Sequence[str]) -> str:
    """All lines: `lines` in their order, at random places among the `others`."""
    places = sorted(rng.randint(0, len(others)) for _ in lines)
    text, start = [], 0
    for line, place in zip(lines, places):
        text += [*others[start:place], line]
        start = place
    return "\n".join([*text, *others[start:]])


NEEDLES = "Some lines note an animal for a thing, such as: Note amber lamp falcon. Remember them."


def _needle(key: str, animal: str) -> str:
    return f"Note {key} {animal}."


def _one_animal(key: str, animal: str) -> Question:
    return Question(f"Which animal is noted for the {key}?", f"Note {key}", f" {animal}.", (animal,))


def _several_animals(question: str, pairs: Sequence[tuple[str, str]]) -> Question:
    said = ", ".join(f"{key} {animal}" for key, animal in pairs).removeprefix(pairs[0][0])
    return Question(question, f"Notes: {pairs[0][0]}", f"{said}.", tuple(animal for _, animal in pairs))


def single_needle(rng: random.Random, lines: int, questions: int) -> Document:
    """One note (one per question) in prose."""
    pairs = list(zip(_keys(rng, questions), rng.sample(ANIMALS, questions)))
    text = _scatter(rng, [_needle(*pair) for pair in pairs], [_noise(rng) for _ in range(lines)])
    return Document(f"{NEEDLES}\n{text}", tuple(_one_animal(*pair) for pair in pairs))


def many_keys(rng: random.Random, lines: int, questions: int) -> Document:
    """Nothing but notes, one of them asked for."""
    pairs = [(key, rng.choice(ANIMALS)) for key in _keys(rng, max(lines, 1))]
    rng.shuffle(pairs)
    # Prose only when there are no more keys.
    text = _scatter(rng, [_needle(*pair) for pair in pairs], [_noise(rng) for _ in range(lines - len(pairs))])
    asked = rng.sample(pairs, min(questions, len(pairs)))
    return Document(f"{NEEDLES}\n{text}", tuple(_one_animal(*pair) for pair in asked))


OCCASIONS = ("dawn", "noon", "lunch", "night")


def many_values(rng: random.Random, lines: int, questions: int) -> Document:
    """Four notes for one thing (per question), one for each time of day, in prose: all are asked for."""
    animals = rng.sample(ANIMALS, len(OCCASIONS) * questions)
    groups = [[(f"{key} {when}", animals.pop()) for when in OCCASIONS] for key in _keys(rng, questions)]
    notes = [note for group in groups for note in group]
    rng.shuffle(notes)
    text = _scatter(rng, [_needle(*note) for note in notes], [_noise(rng) for _ in range(lines)])
    asked = [_several_animals(f"Which animals are noted for the {group[0][0].removesuffix(' ' + OCCASIONS[0])}, from "
                              f"{OCCASIONS[0]} to {OCCASIONS[-1]}?", group) for group in groups]
    return Document(f"{NEEDLES}\n{text}", tuple(asked))


QUERIES = 4


def many_queries(rng: random.Random, lines: int, questions: int) -> Document:
    """Notes for several things in prose, four of them asked for at once."""
    pairs = list(zip(_keys(rng, 2 * QUERIES), rng.sample(ANIMALS, 2 * QUERIES)))
    text = _scatter(rng, [_needle(*pair) for pair in pairs], [_noise(rng) for _ in range(lines)])
    asked = []
    for _ in range(questions):
        some = rng.sample(pairs, QUERIES)
        names = ", ".join(key for key, _ in some)
        asked.append(_several_animals(f"Which animals are noted for these: {names}?", some))
    return Document(f"{NEEDLES}\n{text}", tuple(asked))


CHAINS, HOPS = 4, 4


def variable_tracking(rng: random.Random, lines: int, questions: int) -> Document:
    """Assignments in prose: a value goes from variable to variable, and all that hold it are asked for."""
    words = rng.sample(THINGS, CHAINS * (HOPS + 1))
    chains = [words[i * (HOPS + 1):][:HOPS + 1] for i in range(CHAINS)]  # a value, then the variables that hold it
    place = [0] * CHAINS
    assignments = []
    while any(at < HOPS for at in place):
        chain = rng.choice([i for i, at in enumerate(place) if at < HOPS])
        assignments.append("Copy {} {}.".format(*chains[chain][place[chain]:][:2]))
        place[chain] += 1
    text = _scatter(rng, assignments, [_noise(rng) for _ in range(lines)])
    asked = [Question(f"Which {HOPS} variables does {chain[0]} reach, from one to the next?", f"The copies: {chain[0]}",
                      f" {' '.join(chain[1:])}.", tuple(chain[1:]))
             for chain in rng.sample(chains, min(questions, CHAINS))]
    return Document("Values are copied to variables: Copy lamp key copies the value of lamp to key. Keep track of them."
                    f"\n{text}", tuple(asked))


WORDS_PER_LINE = 12
COMMON = 5          # words asked for
COMMON_SHARE = .2   # of the list is them
UNCOMMON_TIMES = 3  # every other word occurs at most so often


def common_words(rng: random.Random, lines: int, questions: int) -> Document:
    """A list in which five words are common, evenly so, and all others rare. Several questions are one and the same:
    their answers differ in order."""
    size = WORDS_PER_LINE * max(lines, 3)
    vocabulary = rng.sample(THINGS, len(THINGS))
    common, rare = vocabulary[:COMMON], vocabulary[COMMON:]
    times = max(UNCOMMON_TIMES + 2, round(size * COMMON_SHARE / COMMON))
    needed = -(-(size - times * COMMON) // UNCOMMON_TIMES)
    known = set(vocabulary)
    while len(rare) < needed:  # two words make a new one
        word = "".join(rng.sample(vocabulary, 2))
        if word not in known:
            known.add(word)
            rare.append(word)
    words = common * times + (rare[:needed] * UNCOMMON_TIMES)[:size - times * COMMON]
    answers = [common, *(rng.sample(common, COMMON) for _ in range(questions - 1))]
    return _word_list(rng, words, [(f"What are the {COMMON} most common words in the list?", answer)
                                   for answer in answers])


FREQUENT = (3, 4, 2, 1)  # words asked for, by question


def frequent_words(rng: random.Random, lines: int, questions: int) -> Document:
    """A list of few different words whose frequencies follow Zipf's law; the three most frequent are asked for, in
    order. Three more questions at most, which ask for another number of them."""
    size = WORDS_PER_LINE * max(lines, 3)
    vocabulary = rng.sample(THINGS, 40)
    share = [1 / rank ** 1.5 for rank in range(1, len(vocabulary) + 1)]
    counts = [max(1, round(size * s / sum(share))) for s in share]
    for rank in range(max(FREQUENT), 0, -1):  # no ties among what is asked for
        counts[rank - 1] = max(counts[rank - 1], counts[rank] + 1)
    words = [word for word, count in zip(vocabulary, counts) for _ in range(count)]
    return _word_list(rng, words, [(f"What are the {count} most frequent words in the list, the most frequent first?",
                                    vocabulary[:count]) for count in FREQUENT[:questions]])


def _word_list(rng: random.Random, words: list[str], asked: Sequence[tuple[str, Sequence[str]]]) -> Document:
    rng.shuffle(words)
    text = "\n".join("- " + " ".join(words[i:i + WORDS_PER_LINE]) for i in range(0, len(words), WORDS_PER_LINE))
    return Document(f"Count the words of this list.\n{text}",
                    tuple(Question(question, "They are", f" {', '.join(answer)}.", tuple(answer))
                          for question, answer in asked))
