"""Calibration of sparse attention: finds heads to leave dense, and layers that need more pages than others."""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from qwen_kernels.sparse_attention import Sparsity

from qwen_jax.errors import UserError
from qwen_jax.evaluation.longcontext.samples import draw
from qwen_jax.evaluation.longcontext.tasks import Document
from qwen_jax.evaluation.measured import Measured
from qwen_jax.evaluation.sparse_fidelity import Closeness, SparseRun, Text, observe
from qwen_jax.model import Qwen2

MAX_DENSE = 0.1   # largest share of KV heads that stay dense
MAX_BUDGET = 4    # largest budget of a layer, as a multiple of the given budget
MAX_ADDED = 0.04  # largest density that changes together add, if it is more than one change
MIN_GAIN = 0.1    # each hundredth of density has to lower the divergence by this share
# Last share of the layers that rank pages by their keys: in these it takes away most of what estimates lose on long
# texts, and in the first ones nothing (docs/quality.md). At 64 pages or fewer, as here, both are the same.
RANKED_BY_KEYS = 1 / 3
CANDIDATES = 12   # heads, and layers, that are tried: those with the largest errors
EVERY = 4         # candidates are compared at every fourth token
QUESTIONS = {"many_keys": 10, "account_history": 6, "variable_tracking": 4, "many_queries": 3, "many_values": 3,
             "single_needle": 6}  # family -> number of questions about a document


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration of sparse attention: each layer's settings, and how close they are to full attention.

    `before` and `after` compare the given settings and the found ones with full attention.
    """
    layers: tuple[Sparsity, ...]
    before: Closeness
    after: Closeness


class Change(NamedTuple):
    """A change of one layer's settings that calibration may make, and the next one that it makes possible."""
    what: str
    layer: int
    apply: Callable[[Sparsity], Sparsity]
    dense: bool = False
    then: "Change | None" = None


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


def calibrate(model: Qwen2, texts: Sequence[Sequence[int]], sparsity: Sparsity, measured: Measured | None = None
              ) -> Calibration:
    """Find each layer's sparsity so that the next token's distribution comes close to that of full attention.

    One run with full attention finds the error that each head's sparsity causes. Of the heads and layers with the
    largest errors, heads are left dense (at most a share of `MAX_DENSE`) and layers' budgets doubled (to at most
    `MAX_BUDGET` times ``sparsity``'s), in the order of what a change gains for the pages that it adds: as long as it
    gains enough (`MIN_GAIN`) and all add no more than `MAX_ADDED`. Where ``sparsity`` ranks pages by estimates alone,
    the last layers (`RANKED_BY_KEYS`) rank them by their keys.

    measured: figures of an earlier calibration of the same model that was interrupted, which are not measured again;
    new ones are added. Raises UserError when the texts are so short that every page is attended to.
    """
    layers, late = [sparsity] * model.config.num_layers, round(RANKED_BY_KEYS * model.config.num_layers)
    if sparsity.selector == "pyramid" and late:
        layers[-late:] = [replace(sparsity, selector="reranked")] * late
    search = _Search(model, texts, tuple(layers), measured or Measured())
    before = search.measure(search.layers, every=1)
    if before.density == 1:
        raise UserError("the texts must be longer: sparse attention leaves no page out of such short texts")
    errors = search.errors()
    heads = [np.unravel_index(place, errors.shape) for place in np.argsort(-errors, axis=None)[:CANDIDATES]]
    needing = np.argsort(-errors.sum(axis=1))[:CANDIDATES]
    search.improve([*(_dense(int(layer), int(head)) for layer, head in heads),
                    *filter(None, (_budget(int(layer), 2 * sparsity.budget, MAX_BUDGET * sparsity.budget)
                                   for layer in needing))], max_dense=math.ceil(MAX_DENSE * errors.size))
    return Calibration(search.layers, before, search.measure(search.layers, every=1))


def _dense(layer: int, head: int) -> Change:
    return Change(f"head {head} dense", layer,
                  lambda old: replace(old, dense_heads=tuple(sorted((*old.dense_heads, head)))), dense=True)


def _budget(layer: int, budget: float, most: float) -> Change | None:
    if budget > most:
        return None
    return Change(f"budget {budget:g}", layer, lambda old: replace(old, budget=budget),
                  then=_budget(layer, 2 * budget, most))


class _Search:
    """Search for settings of sparse attention on texts, by changes of one layer at a time.

    Attributes:
      layers: the present settings.
    """

    def __init__(self, model: Qwen2, texts: Sequence[Sequence[int]], layers: tuple[Sparsity, ...], measured: Measured):
        self.model, self.layers, self.measured = model, layers, measured
        self._given = layers
        self._texts = [Text(model, tokens) for tokens in texts]
        self._runs: list[SparseRun] = []
        self._errors: np.ndarray | None = None

    def errors(self) -> np.ndarray:
        """Return the mean errors ``[L, K]`` of sparse heads with the given settings (`sparse_fidelity.observe`)."""
        return np.array(self.measured("errors of heads", lambda: self._observe().tolist()))

    def measure(self, layers: tuple[Sparsity, ...], every: int) -> Closeness:
        """Return how close settings are to full attention, mean over the texts."""
        def run() -> list[float]:
            self._observe()
            return np.mean([run.measure(layers, every) for run in self._runs], axis=0).tolist()

        return Closeness(*self.measured(f"every {every}: {_text_of(layers)}", run))

    def improve(self, changes: Sequence[Change], max_dense: int) -> None:
        """Make changes, the best first, of which at most ``max_dense`` leave a head dense.

        A change's value is the logarithm by which it lowers the divergence for a unit of density. It rarely grows by
        other changes, so a change whose earlier value is not the best is not measured again (lazy greedy search:
        Minoux, 1978).
        """
        pending, values = list(changes), dict.fromkeys(changes, math.inf)
        least = -math.log(1 - MIN_GAIN) / 0.01
        first = current = self.measure(self.layers, EVERY)
        fresh: dict[Change, Closeness] = {}
        while True:
            if sum(len(layer.dense_heads) for layer in self.layers) >= max_dense:
                pending = [change for change in pending if not change.dense]
            if not pending:
                return
            best = max(pending, key=values.get)
            if best not in fresh:
                found = fresh[best] = self.measure(self._changed(best), EVERY)
                values[best] = math.log(max(current.divergence, 1e-9) / max(found.divergence, 1e-9)) / max(
                    found.density - current.density, 1e-9)
                self.measured.say(f"layer {best.layer}, {best.what}: divergence {found.divergence:.4f} nats, before "
                                  f"{current.divergence:.4f}; density {found.density:.3f}")
                continue
            if values[best] < least:
                return
            pending.remove(best)
            if current is not first and fresh[best].density - first.density > MAX_ADDED:
                continue  # a cheaper one may still be affordable
            self._make(best)
            self.measured.say(f"layer {best.layer}, {best.what}: kept")
            current, fresh = fresh[best], {}
            if best.then:
                pending.append(best.then)
                values[best.then] = math.inf

    def _make(self, change: Change) -> None:
        """Make a change of the present settings."""
        self.layers = self._changed(change)
        for run in self._runs:
            run.adopt(self.layers)

    def _changed(self, change: Change) -> tuple[Sparsity, ...]:
        """Return the present settings with a change."""
        layers = list(self.layers)
        layers[change.layer] = change.apply(layers[change.layer])
        return tuple(layers)

    def _observe(self) -> np.ndarray:
        """Run the texts with full attention, once; return the mean errors of sparse heads ``[L, K]``."""
        if self._errors is not None:
            return self._errors
        errors = []
        for index, text in enumerate(self._texts, 1):
            full, error = observe(self.model, text, self._given)
            errors.append(error)
            self._runs.append(SparseRun(self.model, text, full, self.layers))
            self.measured.say(f"full attention: text {index} of {len(self._texts)}")
        self._errors = np.mean(errors, axis=0)
        return self._errors


def _text_of(layers: Sequence[Sparsity]) -> str:
    """Return settings of layers in short, as a key: those of the first layer, and what differs from them."""
    plain = replace(layers[0], dense_heads=())
    changed = [f"{index} {layer}" for index, layer in enumerate(layers) if layer != plain]
    return "; ".join([str(plain), *changed])


def default_texts(tokenizer: Any, length: int, seed: int = 0, count: int = len(QUESTIONS)) -> list[list[int]]:
    """Draw the default texts to calibrate with, token ids: a conversation for each of ``count`` families of tasks."""
    return [conversation(family, f"calibration {seed}", length, tokenizer) for family in list(QUESTIONS)[:count]]
