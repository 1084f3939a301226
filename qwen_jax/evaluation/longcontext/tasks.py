"""Families of long-context tasks: documents of any length, questions about them, and their exact answers.

Seven families, in this module, follow RULER (Hsieh et al. 2024, https://arxiv.org/abs/2404.06654), with names of
animals as values; the eighth is in `longcontext.account`. Documents are drawn at random, so no model has met them.

A family is ``(rng, lines, questions) -> Document``: `lines` is roughly the number of lines, `questions` the largest
number of independent questions about the document (one for a test, many to train on).
"""
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from qwen_jax.evaluation.longcontext.words import ADJECTIVES, ANIMALS, DEEDS, PEOPLE, PLACES, THINGS, TIMES


class Question(NamedTuple):
    """Question about a document, with its right answer.

    The assistant's answer begins with `prefix`, which is part of the prompt.
    """
    text: str
    prefix: str
    answer: str               # rest of the right answer, after the prefix
    expected: tuple[str, ...]  # words that must all be in the answer


class Document(NamedTuple):
    """Text of a long-context task, and the questions about it."""
    text: str
    questions: tuple[Question, ...]


Family = Callable[[random.Random, int, int], Document]


def _noise(rng: random.Random) -> str:
    """Draw a sentence to fill a document with, which no question is about."""
    return f"{rng.choice(PEOPLE)} {rng.choice(DEEDS)} near the {rng.choice(PLACES)} {rng.choice(TIMES)}."


def _keys(rng: random.Random, count: int) -> list[str]:
    """Draw different names of things, adjective and noun, such as ``amber lamp``; as few as possible share a noun."""
    things, adjectives = rng.sample(THINGS, len(THINGS)), rng.sample(ADJECTIVES, len(ADJECTIVES))
    count = min(count, len(things) * len(adjectives))
    shifts = rng.choices(range(len(adjectives)), k=len(things))
    return [f"{adjectives[(shifts[i % len(things)] + i // len(things)) % len(adjectives)]} {things[i % len(things)]}"
            for i in range(count)]


def _scatter(rng: random.Random, lines: Sequence[str], others: Sequence[str]) -> str:
    """Return a text in which `lines`, in their order, stand at random places among the lines `others`."""
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
    rest = ", ".join(f"{key} {animal}" for key, animal in pairs).removeprefix(pairs[0][0])
    return Question(question, f"Notes: {pairs[0][0]}", f"{rest}.", tuple(animal for _, animal in pairs))


def single_needle(rng: random.Random, lines: int, questions: int) -> Document:
    """Draw a single-needle task: prose in which, per question, one line pairs a thing with an animal to be named."""
    pairs = list(zip(_keys(rng, questions), rng.sample(ANIMALS, questions)))
    text = _scatter(rng, [_needle(*pair) for pair in pairs], [_noise(rng) for _ in range(lines)])
    return Document(f"{NEEDLES}\n{text}", tuple(_one_animal(*pair) for pair in pairs))


def many_keys(rng: random.Random, lines: int, questions: int) -> Document:
    """Draw a document that consists of notes of animals for things; a question asks for the animal of one of them."""
    pairs = [(key, rng.choice(ANIMALS)) for key in _keys(rng, max(lines, 1))]
    rng.shuffle(pairs)
    # Prose fills the document only when the keys run out.
    text = _scatter(rng, [_needle(*pair) for pair in pairs], [_noise(rng) for _ in range(lines - len(pairs))])
    targets = rng.sample(pairs, min(questions, len(pairs)))
    return Document(f"{NEEDLES}\n{text}", tuple(_one_animal(*pair) for pair in targets))


OCCASIONS = ("dawn", "noon", "lunch", "night")


def many_values(rng: random.Random, lines: int, questions: int) -> Document:
    """Draw prose that hides four notes for a thing, one per time of day; a question asks for its four animals."""
    animals = rng.sample(ANIMALS, len(OCCASIONS) * questions)
    groups = [[(f"{key} {when}", animals.pop()) for when in OCCASIONS] for key in _keys(rng, questions)]
    notes = [note for group in groups for note in group]
    rng.shuffle(notes)
    text = _scatter(rng, [_needle(*note) for note in notes], [_noise(rng) for _ in range(lines)])
    question_list = []
    for group in groups:
        thing = group[0][0].removesuffix(f" {OCCASIONS[0]}")
        question_list.append(_several_animals(
            f"Which animals are noted for the {thing}, from {OCCASIONS[0]} to {OCCASIONS[-1]}?", group))
    return Document(f"{NEEDLES}\n{text}", tuple(question_list))


QUERIES = 4


def many_queries(rng: random.Random, lines: int, questions: int) -> Document:
    """Draw prose that hides notes of animals for several things; a question asks for the animals of four of them."""
    pairs = list(zip(_keys(rng, 2 * QUERIES), rng.sample(ANIMALS, 2 * QUERIES)))
    text = _scatter(rng, [_needle(*pair) for pair in pairs], [_noise(rng) for _ in range(lines)])
    question_list = []
    for _ in range(questions):
        chosen = rng.sample(pairs, QUERIES)
        names = ", ".join(key for key, _ in chosen)
        question_list.append(_several_animals(f"Which animals are noted for these: {names}?", chosen))
    return Document(f"{NEEDLES}\n{text}", tuple(question_list))


CHAINS, HOPS = 4, 4


def variable_tracking(rng: random.Random, lines: int, questions: int) -> Document:
    """Draw prose with assignments that copy values from variable to variable; a question asks for all that hold one."""
    words = rng.sample(THINGS, CHAINS * (HOPS + 1))
    chains = [words[i * (HOPS + 1):][:HOPS + 1] for i in range(CHAINS)]  # a value, then the variables that hold it
    place = [0] * CHAINS
    assignments = []
    while any(at < HOPS for at in place):
        chain = rng.choice([i for i, at in enumerate(place) if at < HOPS])
        assignments.append("Copy {} {}.".format(*chains[chain][place[chain]:][:2]))
        place[chain] += 1
    text = _scatter(rng, assignments, [_noise(rng) for _ in range(lines)])
    question_list = [Question(f"Which {HOPS} variables does {chain[0]} reach, from one to the next?",
                              f"The copies: {chain[0]}", f" {' '.join(chain[1:])}.", tuple(chain[1:]))
                     for chain in rng.sample(chains, min(questions, CHAINS))]
    return Document("Values are copied to variables: Copy lamp key copies the value of lamp to key. Keep track of them."
                    f"\n{text}", tuple(question_list))


WORDS_PER_LINE = 12
COMMON = 5          # number of common words
COMMON_SHARE = .2   # share of the list that they make up
UNCOMMON_TIMES = 3  # most occurrences of any other word


def common_words(rng: random.Random, lines: int, questions: int) -> Document:
    """Draw a list in which five words are equally common and all others rare; a question asks for the five.

    Several questions are the same question, with answers in different orders.
    """
    size = WORDS_PER_LINE * max(lines, 3)
    vocabulary = rng.sample(THINGS, len(THINGS))
    common, rare = vocabulary[:COMMON], vocabulary[COMMON:]
    times = max(UNCOMMON_TIMES + 2, round(size * COMMON_SHARE / COMMON))
    needed = -(-(size - times * COMMON) // UNCOMMON_TIMES)
    used = set(vocabulary)
    while len(rare) < needed:  # two words make a new one
        word = "".join(rng.sample(vocabulary, 2))
        if word not in used:
            used.add(word)
            rare.append(word)
    words = common * times + (rare[:needed] * UNCOMMON_TIMES)[:size - times * COMMON]
    answers = [common, *(rng.sample(common, COMMON) for _ in range(questions - 1))]
    return _word_list(rng, words, [(f"What are the {COMMON} most common words in the list?", answer)
                                   for answer in answers])


FREQUENT = (3, 4, 2, 1)  # number of words that each question asks for


def frequent_words(rng: random.Random, lines: int, questions: int) -> Document:
    """Draw a list of 40 different words, as frequent as Zipf's law says; questions ask for the most frequent.

    The first question asks for the three most frequent words, in order; at most three more ask for another number.
    """
    size = WORDS_PER_LINE * max(lines, 3)
    vocabulary = rng.sample(THINGS, 40)
    share = [1 / rank ** 1.5 for rank in range(1, len(vocabulary) + 1)]
    counts = [max(1, round(size * s / sum(share))) for s in share]
    for rank in range(max(FREQUENT), 0, -1):  # no ties among the words in an answer
        counts[rank - 1] = max(counts[rank - 1], counts[rank] + 1)
    words = [word for word, count in zip(vocabulary, counts) for _ in range(count)]
    return _word_list(rng, words, [(f"What are the {count} most frequent words in the list, the most frequent first?",
                                    vocabulary[:count]) for count in FREQUENT[:questions]])


def _word_list(rng: random.Random, words: list[str], questions: Sequence[tuple[str, Sequence[str]]]) -> Document:
    rng.shuffle(words)
    text = "\n".join("- " + " ".join(words[i:i + WORDS_PER_LINE]) for i in range(0, len(words), WORDS_PER_LINE))
    return Document(f"Count the words of this list.\n{text}",
                    tuple(Question(question, "They are", f" {', '.join(answer)}.", tuple(answer))
                          for question, answer in questions))
