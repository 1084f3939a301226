"""How sparse each layer of a checkpoint may be: heads left dense, and layers that attend to more pages than others."""
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.errors import UserError
from qwen_jax.evaluation.longcontext.samples import draw
from qwen_jax.evaluation.longcontext.suite import RETRIEVAL
from qwen_jax.evaluation.longcontext.tasks import Document
from qwen_jax.evaluation.sparse_fidelity import Fidelity, fidelity
from qwen_jax.model import Qwen2

MOST_DENSE = 0.2  # of all KV heads
MOST_BUDGET = 4   # times the budget asked for, in any layer
WORTH = 0.9       # a head is left dense if what the model says then differs by less than this share of before
WORTH_TWICE = 0.75  # and a layer's budget is doubled, which costs more
QUESTIONS = {"single_needle": 6, "many_keys": 10, "many_values": 3, "many_queries": 3, "variable_tracking": 4,
             "account_history": 6}  # about one document, answered one after another


@dataclass(frozen=True)
class Calibration:
    """What was found for every layer. The figures are means over the texts, with the sparsity asked for and with it."""
    layers: tuple[Sparsity, ...]
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
    """Brings the next token's distribution closer to full attention's, one change after another, each the best one.

    First heads are left dense, at most `MOST_DENSE` of all; then the budgets of layers are doubled, each at most to
    `MOST_BUDGET` times ``sparsity``'s. Only heads that miss a page that some query needed are tried, and layers of
    such heads; a change that helps too little (`WORTH`, `WORTH_TWICE`) ends each part. UserError when the texts are too
    short for anything to be left out.
    """
    layers = (sparsity,) * model.config.num_layers
    most_dense = int(MOST_DENSE * model.config.num_layers * model.config.num_kv_heads)

    def measure(layers: tuple[Sparsity, ...]) -> Fidelity:
        return _mean([fidelity(model, text, layers) for text in texts])

    def improve(changes: Callable[[], Iterator[tuple[str, int, Sparsity]]], worth: float) -> bool:
        nonlocal layers, now
        tried = []
        for what, layer, changed in changes():
            candidate = (*layers[:layer], changed, *layers[layer + 1:])
            tried.append((measure(candidate), candidate))
            progress(f"layer {layer}, {what}: divergence {tried[-1][0].divergence:.4f} nats")
        best, candidate = min(tried, key=lambda one: one[0].divergence, default=(now, layers))
        if not tried or best.divergence > worth * now.divergence:
            return False
        now, layers = best, candidate
        return True

    def dense_heads():
        for layer, head in np.argwhere(now.needed > now.found):
            dense = (*layers[layer].dense_heads, int(head))
            yield f"head {head} dense", layer, replace(layers[layer], dense_heads=tuple(sorted(dense)))

    def budgets():
        for layer in np.flatnonzero(np.any(now.needed > now.found, axis=1)):
            doubled = 2 * layers[layer].budget
            if doubled <= MOST_BUDGET * sparsity.budget:
                yield f"budget {doubled:g}", layer, replace(layers[layer], budget=doubled)

    before = now = measure(layers)
    if before.density == 1:
        raise UserError("the texts are too short: sparse attention would leave nothing out of them")
    progress(f"no head dense: divergence {now.divergence:.4f} nats; "
             f"{np.sum(now.needed > now.found)} heads miss something")
    while sum(len(layer.dense_heads) for layer in layers) < most_dense and improve(dense_heads, WORTH):
        pass
    while improve(budgets, WORTH_TWICE):
        pass
    return Calibration(layers, before, now)


def _mean(results: Sequence[Fidelity]) -> Fidelity:
    return Fidelity(*(np.mean(values, axis=0) for values in zip(*(vars(one).values() for one in results), strict=True)))


def default_texts(tokenizer: Any, length: int, seed: int = 0) -> list[list[int]]:
    """One conversation of each retrieval family."""
    return [conversation(family, f"calibration {seed}", length, tokenizer) for family in RETRIEVAL]
