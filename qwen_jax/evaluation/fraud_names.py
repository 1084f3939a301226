"""Invented names, codes and amounts, in two pools that never meet.

Every identifier belongs to exactly one split, decided by a checksum of its text: one in five is held out. So a held-out
account, merchant, city, person, device, terminal, card or amount was never seen in training, while the syllables and
digits it is spelled with were.

Within one `Deck` no two names start with the same syllable and no two codes with the same letters: a reader (or a
model) can tell them apart by their beginnings.
"""
import random
import zlib

SPLITS = ("train", "heldout")

_STARTS = """
    Kal Bel Tor Mir Sav Dun Zel Nor Fal Gri Pol Lun Ver Har Cas Tam Rod Wex Jun Bri Dal Fen Gam Hol Ker Lom
    Mad Nes Orv Pil Quo Rin Sol Tev Ulm Vas Wil Yar Zan Bos Cor Dre Elm Fos Gav Hin Ist Jor Kes Lav Mon Nak
    Osk Pra Rus Ski Tul Urb Vin Zed
""".split()
_MIDDLES = "a e i o u an en in on ar er or".split()
_ENDINGS = {
    "merchant": "mart shop store foods tech wear cafe fuel".split(),
    "city": "ton burg ville ford stad pool dale mouth".split(),
    "person": "da na lo ris mo ka be ti".split(),
}
_CONSONANTS, _VOWELS = "bdfgjkmnpqrstvwxyz", "aeiou"


def split_of(text: str) -> str:
    """The split that owns this identifier: a fifth of all texts are held out, the same fifth on every machine."""
    return "heldout" if zlib.crc32(text.encode()) % 5 == 0 else "train"


class Deck:
    """Draws identifiers of one split for one conversation, without repeating a beginning."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split
        self._starts = rng.sample(_STARTS, len(_STARTS))
        self._letters = [c + v for c in _CONSONANTS for v in _VOWELS]
        rng.shuffle(self._letters)

    def _own(self, draw) -> str:
        while True:  # one draw in five (held-out) or four in five (train) is ours
            text = draw()
            if split_of(text) == self.split:
                return text

    def name(self, kind: str) -> str:
        """A merchant, city or person, such as ``Kalomart``."""
        start = self._starts.pop()
        return self._own(lambda: start + self.rng.choice(_MIDDLES) + self.rng.choice(_ENDINGS[kind]))

    def code(self) -> str:
        """A card, device or terminal code, such as ``ka73``."""
        letters = self._letters.pop()
        return self._own(lambda: f"{letters}{self.rng.randrange(10)}{self.rng.randrange(10)}")

    def number(self, low: int, high: int, unlike: tuple = ()) -> str:
        """A whole number in [low, high) whose last digit no number in `unlike` ends with."""
        last = [str(digit) for digit in range(10) if str(digit) not in {other[-1] for other in unlike}]
        return self._own(lambda: f"{self.rng.randrange(low // 10, high // 10)}{self.rng.choice(last)}")
