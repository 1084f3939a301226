"""Invented names, codes and amounts in two pools, one for training and one held out, without a common member.

Every identifier belongs to exactly one split, decided by a checksum of its text: one in five is held out. So a held-out
account, merchant, city, person, device, card or amount was never seen in training, but its syllables and digits were.

Names and codes are made of two pieces. Within one `Deck` no piece of a code and no start of a name is used twice: a
reader (or a model) can tell them apart by one piece.
"""
import random
import zlib

SPLITS = ("train", "heldout")

_STARTS = """
    Kal Bel Tor Mir Sav Dun Zel Nor Fal Zug Pol Lun Ver Har Cas Tam Rod Wex Jun Vex Dal Fen Gam Hol Ker Lom
    Mad Nes Orv Pil Wem Rin Sol Tev Ulm Vas Wil Yar Zan Yol Cor Lud Elm Pim Gav Hin Ist Jor Kes Lav Mon Nak
    Osk Pra Rus Jan Hob Urb Vin Zed
""".split()
_ENDINGS = {
    "merchant": """mart shop store foods tech wear cafe fuel books yarn parts games music sports garden lens
                   pharma travel market bakery""".split(),
    "city": """ton burg ville ford stad pool dale mouth haven bridge field wick minster chester port stead
               bury worth ham ness""".split(),
    "person": "da na lo ris mo ka be vo sen lin ros vig tan bel dor mir fan gus hol nik".split(),
}
_SYLLABLES = [c + v for c in "bdfgjkmnpqrstvwxyz" for v in "aeiou"]


def pieces() -> list[str]:
    """Return the pieces of which all invented names and codes are made, as they stand in a text.

    First pieces follow a space.
    """
    starts, codes = [" " + start for start in _STARTS], [" " + s for s in _SYLLABLES] + ["-" + s for s in _SYLLABLES]
    return starts + codes + sum(_ENDINGS.values(), [])


def names(kind: str) -> list[str]:
    """Return every possible invented name of this kind (merchant, city or person), of both splits."""
    return [start + ending for start in _STARTS for ending in _ENDINGS[kind]]


def codes() -> list[str]:
    """Return every possible card or device code, such as ``ka-zo``, of both splits."""
    return [f"{first}-{second}" for first in _SYLLABLES for second in _SYLLABLES if first != second]


def split_of(text: str) -> str:
    """Return the split of an identifier, "train" or "heldout" (a fifth of all texts), the same on every machine."""
    return "heldout" if zlib.crc32(text.encode()) % 5 == 0 else "train"


class Deck:
    """Source of random identifiers of one split for one conversation, no two with the same beginning."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split
        self._starts = rng.sample(_STARTS, len(_STARTS))
        self._syllables = rng.sample(_SYLLABLES, len(_SYLLABLES))

    def _in_split(self, draw) -> str:
        """Call `draw` until it returns an identifier of this split: on average 5 (held-out) or 1.25 (train) times."""
        while True:
            text = draw()
            if split_of(text) == self.split:
                return text

    def name(self, kind: str) -> str:
        """Draw an invented merchant, city or person, such as ``Kalmart``."""
        while True:  # not every start has an ending that makes a name of this split
            start = self._starts.pop()
            names = [name for ending in _ENDINGS[kind] if split_of(name := start + ending) == self.split]
            if names:
                return self.rng.choice(names)

    def code(self) -> str:
        """Draw an invented card or device code, such as ``ka-zo``."""
        first = self._syllables.pop()
        code = self._in_split(lambda: f"{first}-{self.rng.choice(self._syllables)}")
        self._syllables.remove(code[3:])
        return code

    def number(self, low: int, high: int, unlike: tuple = ()) -> str:
        """Draw a whole number in [low, high) whose last digit differs from that of every number in `unlike`."""
        last = [str(digit) for digit in range(10) if str(digit) not in {other[-1] for other in unlike}]
        return self._in_split(lambda: f"{self.rng.randrange(low // 10, high // 10)}{self.rng.choice(last)}")
