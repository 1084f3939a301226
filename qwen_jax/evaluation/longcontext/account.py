"""Long-context task `account_history`: a payment to judge after a long account history, where one line decides.

The history says once of every card, device and user whether it is in order. The payment names a card, a device and a
user. It is a fraud when one of these is not in order, for the reason of its kind (the codes of
`qwen_jax.evaluation.fraud.accounts`); else it is legitimate.
"""
import random

from qwen_jax.evaluation.fraud.accounts import DAYS
from qwen_jax.evaluation.fraud.names import codes, names
from qwen_jax.evaluation.longcontext.tasks import Document, Question

KINDS = {  # kind -> (in order, not in order, reason code)
    "card": ("active", "lost", "R06"), "device": ("trusted", "removed", "R01"), "user": ("added", "deleted", "R08")}
ENTITIES = 200  # most names of a kind
TASK = ("Screen card payments. Say what the history says of the card, the device and the user, then fraud and the "
        "reason code (card lost R06, device removed R01, user deleted R08), or legit R00.")


def account_history(rng: random.Random, lines: int, questions: int) -> Document:
    """Draw a long account history as lines of text, and questions that each ask to judge a payment.

    A third of the lines say how a card, a device or a user stands; the rest are old payments.
    """
    count = min(ENTITIES, max(2, lines // 9))
    drawn = rng.sample(codes(), 2 * count)
    members = {"card": drawn[:count], "device": drawn[count:], "user": rng.sample(names("person"), count)}
    standing, needles = {}, []
    for kind, (good, bad, _) in KINDS.items():
        for index, name in enumerate(members[kind]):
            standing[kind, name] = good if index % 2 else bad
            needles.append(f"{rng.choice(DAYS)} {kind} {name} {standing[kind, name]}")
    cities, merchants = rng.sample(names("city"), 12), rng.sample(names("merchant"), 40)
    others = [f"{rng.choice(DAYS)} {rng.choice(cities)} paid {rng.randrange(10, 1000)} {rng.choice(merchants)}"
              for _ in range(max(0, lines - len(needles)))]
    text = needles + others
    rng.shuffle(text)
    question_list = []
    for _ in range(questions):
        broken = rng.choice([*KINDS] if rng.random() < .5 else [None])
        chosen = {kind: rng.choice(members[kind][kind != broken::2]) for kind in KINDS}
        payment = [rng.choice(DAYS), rng.choice(cities), str(rng.randrange(10, 1000)), rng.choice(merchants),
                   *(f"{kind} {name}" for kind, name in chosen.items())]
        standings = ", ".join(f"{kind} {name} {standing[kind, name]}" for kind, name in chosen.items())
        verdict = f"fraud {KINDS[broken][2]}" if broken else "legit R00"
        question_list.append(Question(f"Judge {' '.join(payment)}", "The history says:",
                                      f" {standings}, so {verdict}.", (verdict,)))
    return Document("\n".join([TASK, *text]), tuple(question_list))
