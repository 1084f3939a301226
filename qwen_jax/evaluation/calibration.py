"""Which heads a checkpoint needs dense: those without which sparse attention changes what the model says."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.errors import UserError
from qwen_jax.evaluation.fidelity import Fidelity, fidelity
from qwen_jax.evaluation.longcontext.samples import draw
from qwen_jax.evaluation.longcontext.suite import RETRIEVAL
from qwen_jax.evaluation.longcontext.tasks import Document
from qwen_jax.model import Qwen2

MOST_DENSE = 0.2  # of all KV heads
WORTH = 0.9       # a head is left dense if what the model says then differs by less than this share of before
QUESTIONS = {"single_needle": 6, "many_keys": 10, "many_values": 3, "many_queries": 3, "variable_tracking": 4,
             "account_history": 6}  # about one document, answered one after another


@dataclass(frozen=True)
class Calibration:
    """``dense``: bool ``[L, K]``. The figures are means over the texts, without dense heads and with them."""
    dense: np.ndarray
    before: Fidelity
    after: Fidelity


def conversation(family: str, seed: str, length: int, tokenizer: Any) -> list[int]:
    """A document and several answered questions about it, as tokens: most answers are far from the end."""
    def encode(document: Document) -> list[int]:
        turns = []
        for index, question in enumerate(document.questions):
            said = f"{document.text}\n{question.text}" if index == 0 else question.text
            turns += [{"role": "user", "content": said},
                      {"role": "assistant", "content": question.prefix + question.answer}]
        if tokenizer.chat_template:
            return tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)
        return tokenizer.encode("\n".join(turn["content"] for turn in turns), add_special_tokens=False)

    return encode(draw(family, seed, length, lambda document: len(encode(document)), QUESTIONS[family]))


def calibrate(model: Qwen2, texts: Sequence[Sequence[int]], sparsity: Sparsity,
              progress: Callable[[str], None] = lambda _: None) -> Calibration:
    """Leaves dense, one after another, the head that brings the next token's distribution closest to full attention's.

    Only heads that miss a page that some query needed are tried, at most `MOST_DENSE` of all are taken, and none that
    does not help (`WORTH`). UserError when the texts are too short for anything to be left out.
    """
    dense = np.zeros((model.config.num_layers, model.config.num_kv_heads), bool)

    def measure(dense: np.ndarray) -> list[Fidelity]:
        return [fidelity(model, text, sparsity, dense) for text in texts]

    before = now = measure(dense)
    if min(one.density for one in before) == 1:
        raise UserError("the texts are too short: sparse attention would leave nothing out of them")
    missed = sum(one.needed - one.found for one in before)
    progress(f"no head dense: divergence {_divergence(now):.4f} nats; {np.sum(missed > 0)} heads miss something")
    while np.sum(dense) + 1 <= MOST_DENSE * dense.size:
        tried = {}
        for layer, head in zip(*np.nonzero((missed > 0) & ~dense), strict=True):
            with_it = dense.copy()
            with_it[layer, head] = True
            tried[layer, head] = measure(with_it)
            progress(f"layer {layer}, head {head} dense: divergence {_divergence(tried[layer, head]):.4f} nats")
        if not tried:
            break
        best = min(tried, key=lambda place: _divergence(tried[place]))
        if _divergence(tried[best]) > WORTH * _divergence(now):
            break
        dense[best], now = True, tried[best]
    return Calibration(dense, _mean(before), _mean(now))


def _divergence(results: Sequence[Fidelity]) -> float:
    return float(np.mean([one.divergence for one in results]))


def _mean(results: Sequence[Fidelity]) -> Fidelity:
    return Fidelity(*(np.mean(values, axis=0) for values in zip(*(vars(one).values() for one in results), strict=True)))


def default_texts(tokenizer: Any, length: int, seed: int = 0) -> list[list[int]]:
    """One conversation of each retrieval family."""
    return [conversation(family, f"calibration {seed}", length, tokenizer) for family in RETRIEVAL]
