"""Calibration of sparse attention: finds heads to leave dense, and layers that need more pages than others."""
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

MAX_DENSE = 0.2   # largest share of KV heads that stay dense
MAX_BUDGET = 4    # largest budget of a layer, as a multiple of the given budget
DENSE_GAIN = 0.9  # a head stays dense if the divergence then is at most this share of the divergence before
BUDGET_GAIN = 0.75  # the same for doubling a layer's budget, which costs more
QUESTIONS = {"single_needle": 6, "many_keys": 10, "many_values": 3, "many_queries": 3, "variable_tracking": 4,
             "account_history": 6}  # family -> number of questions about a document


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration of sparse attention: each layer's settings, and how close they are to full attention.

    `before` and `after` compare the given settings and the found ones with full attention.
    """
    layers: tuple[Sparsity, ...]
    before: Fidelity
    after: Fidelity


def conversation(family: str, seed: str, length: int, tokenizer: Any) -> list[int]:
    """Draw token ids of a document with several answered questions, most of which need facts far from the end."""
    def encode(document: Document) -> list[int]:
        turns = []
        for index, question in enumerate(document.questions):
            request = f"{document.text}\n{question.text}" if index == 0 else question.text
            turns += [{"role": "user", "content": request},
                      {"role": "assistant", "content": question.prefix + question.answer}]
        if tokenizer.chat_template:
            return tokenizer.encode(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)
        return tokenizer.encode("\n".join(turn["content"] for turn in turns), add_special_tokens=False)

    return encode(draw(family, seed, length, lambda document: len(encode(document)), QUESTIONS[family]))


def calibrate(model: Qwen2, texts: Sequence[Sequence[int]], sparsity: Sparsity,
              progress: Callable[[str], None] = lambda _: None) -> Calibration:
    """Find each layer's sparsity so that the next token's distribution comes close to that of full attention.

    The best change is made again and again. First heads are left dense, at most a share of `MAX_DENSE`; then the
    budgets of layers are doubled, each at most to `MAX_BUDGET` times ``sparsity``'s. Only heads that miss a page that
    some query needed are tried, and layers of such heads. Each part ends when the best change helps too little
    (`DENSE_GAIN`, `BUDGET_GAIN`). Raises UserError when the texts are so short that every page is attended to.
    """
    layers = (sparsity,) * model.config.num_layers
    max_dense = int(MAX_DENSE * model.config.num_layers * model.config.num_kv_heads)

    def measure(layers: tuple[Sparsity, ...]) -> Fidelity:
        return _mean([fidelity(model, text, layers) for text in texts])

    def improve(changes: Callable[[], Iterator[tuple[str, int, Sparsity]]], gain: float) -> bool:
        """Make the change of `layers` with the least divergence, if that is at most `gain` times the present one.

        Returns whether it was made.
        """
        nonlocal layers, current
        tried = []
        for what, layer, changed in changes():
            candidate = (*layers[:layer], changed, *layers[layer + 1:])
            tried.append((measure(candidate), candidate))
            progress(f"layer {layer}, {what}: divergence {tried[-1][0].divergence:.4f} nats")
        best, candidate = min(tried, key=lambda pair: pair[0].divergence, default=(current, layers))
        if not tried or best.divergence > gain * current.divergence:
            return False
        current, layers = best, candidate
        return True

    def dense_heads():
        for layer, head in np.argwhere(current.needed > current.found):
            dense = (*layers[layer].dense_heads, int(head))
            yield f"head {head} dense", layer, replace(layers[layer], dense_heads=tuple(sorted(dense)))

    def budgets():
        for layer in np.flatnonzero(np.any(current.needed > current.found, axis=1)):
            doubled = 2 * layers[layer].budget
            if doubled <= MAX_BUDGET * sparsity.budget:
                yield f"budget {doubled:g}", layer, replace(layers[layer], budget=doubled)

    before = current = measure(layers)
    if before.density == 1:
        raise UserError("the texts must be longer: sparse attention leaves no page out of such short texts")
    progress(f"no head dense: divergence {current.divergence:.4f} nats; "
             f"{np.sum(current.needed > current.found)} heads miss a needed page")
    while sum(len(layer.dense_heads) for layer in layers) < max_dense and improve(dense_heads, DENSE_GAIN):
        pass
    while improve(budgets, BUDGET_GAIN):
        pass
    return Calibration(layers, before, current)


def _mean(results: Sequence[Fidelity]) -> Fidelity:
    fields = zip(*(vars(result).values() for result in results), strict=True)
    return Fidelity(*(np.mean(values, axis=0) for values in fields))


def default_texts(tokenizer: Any, length: int, seed: int = 0) -> list[list[int]]:
    """Draw the default texts to calibrate with, token ids: a conversation for each retrieval family of tasks."""
    return [conversation(family, f"calibration {seed}", length, tokenizer) for family in RETRIEVAL]
