"""Calibration of a checkpoint for 8 bits: chooses the parts to store in 8 bits, and measures keys and values."""
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from qwen_kernels.attention import PAGE, EightBitPages, causal_attention, eight_bit_dtype

from qwen_jax.config import ModelConfig
from qwen_jax.evaluation.measured import Measured
from qwen_jax.evaluation.sparse_fidelity import token_losses
from qwen_jax.model import Qwen2, build, build_layer, params_of
from qwen_jax.model.rope import apply_rope, rope_tables
from qwen_jax.quantization import Calibrated, Precision, Ranges, page_formats, rows, scales_of
from qwen_jax.quantization.precision import KV_DTYPES

COMPARED = 4096  # tokens at which a measurement compares distributions, spread evenly over the texts
MAX_DIVERGENCE = 0.01  # nats between the next token's distributions in 8 and in 16 bits


@dataclass(frozen=True)
class EightBitCalibration:
    """Result of a calibration for 8 bits: the parts of a checkpoint that may be 8-bit, and the accuracy lost.

    Attributes:
      found: the parts that may be 8-bit, and the ranges of keys and values.
      errors: relative error of each layer's attention output ``[L]``, by element type of the pages.
      divergence: mean Kullback-Leibler divergence of the next token's distribution from the model's own, in nats.
      pages_divergence: the divergence with 8-bit pages alone.
      layer_divergence: the divergences ``[L]`` in the first text, with 8-bit pages and the matrices of a single layer.
      loss: mean negative log-likelihood of the next token in 8 bits, in nats.
      full_loss: the same in full precision.
    """
    found: Calibrated
    errors: dict[str, np.ndarray]
    divergence: float
    pages_divergence: float
    layer_divergence: np.ndarray
    loss: float
    full_loss: float


def calibrate_eight_bit(model: Qwen2, texts: Sequence[Sequence[int]], measured: Measured | None = None
                        ) -> EightBitCalibration:
    """Find the 8-bit settings that lose least, on a model of at least 16 bits and on texts of token ids.

    Ranges are the largest values over all texts. Pages of a layer get the element type with the smaller error. Then
    layers' matrices become 8-bit, in ascending order of the divergence that each causes alone in the first text, as
    many as keep the divergence within `MAX_DIVERGENCE`; last the embedding and the head, if the divergence stays
    within.

    measured: figures of an earlier calibration of the same model that was interrupted, which are not measured again;
    new ones are added.
    """
    runs, count, measured = TextRuns(model, texts), model.config.num_layers, measured or Measured()
    ranges = tuple(Ranges(*map(partial(jnp.asarray, dtype=jnp.float32), layer))
                   for layer in measured("ranges", runs.ranges))
    measured.say("ranges of keys and values: measured")
    errors = {kind: np.array(value) for kind, value in measured("pages", lambda: runs.page_errors(ranges)).items()}
    kinds = tuple(min(KV_DTYPES, key=lambda kind: errors[kind][layer]) for layer in range(count))
    measured.say("pages: " + ", ".join(kinds))

    def measure(layers: Sequence[int], tables: bool = False) -> tuple[float, float, float]:
        precision = Precision(tuple(layer in layers for layer in range(count)), tables, kinds)
        name = f"matrices of {sorted(layers)}{', tables' if tables else ''}"
        found = measured(name, lambda: runs.losses(precision, ranges))
        measured.say(f"8-bit pages, matrices of {len(layers)} of {count} layers{', tables' if tables else ''}: "
                     f"divergence {found[2]:.5f} nats")
        return tuple(found)

    pages = measure(())
    alone = []
    for layer in range(count):
        alone.append(measured(f"layer {layer}", lambda layer=layer: runs.divergence_of_layer(layer, kinds, ranges)))
        measured.say(f"the matrices of layer {layer} of {count} alone: {alone[-1]:.5f} nats in the first text")
    order = [int(layer) for layer in np.argsort(alone)]
    eight_bit, best = 0, pages
    step = 1 << count.bit_length()
    while step := step // 2:  # bisection for the largest number: the divergence grows with the number of layers
        if eight_bit + step <= count and (tried := measure(order[:eight_bit + step]))[2] <= MAX_DIVERGENCE:
            eight_bit, best = eight_bit + step, tried
    tables = (tried := measure(order[:eight_bit], tables=True))[2] <= MAX_DIVERGENCE
    loss, full_loss, divergence = tried if tables else best
    precision = Precision(tuple(layer in order[:eight_bit] for layer in range(count)), tables, kinds)
    return EightBitCalibration(found=Calibrated(precision, ranges), errors=errors, divergence=divergence,
                               pages_divergence=pages[2], layer_divergence=np.array(alone), loss=loss,
                               full_loss=full_loss)


class TextRuns:
    """Runs of a model on texts padded to one length, layer by layer, in full precision or with 8-bit parts."""

    def __init__(self, model: Qwen2, texts: Sequence[Sequence[int]]):
        self.config, self.params, self.dtype = model.config, params_of(model), model.dtype
        width = -(-max(map(len, texts)) // PAGE) * PAGE
        self.texts = [(jnp.asarray(list(text) + [0] * (width - len(text)), jnp.int32), len(text)) for text in texts]
        self.rotations = rope_tables(model.config.rope, model.config.head_dim, jnp.arange(width)[None])
        self.frequencies, self.magnitude = model.config.rope.frequencies(model.config.head_dim)
        self.every = -(-sum(map(len, texts)) // COMPARED)
        self._states: list[jax.Array] = []  # of the first text with 8-bit pages, before each layer

    @cached_property
    def full(self) -> list[jax.Array]:
        """Outputs ``[S, D]`` of the last layer in full precision, by text."""
        plain = Precision((False,) * self.config.num_layers)
        return [_last(self._walk(self._embedded(text, plain), plain, None)) for text in range(len(self.texts))]

    def layer(self, index: int) -> dict[str, jax.Array]:
        """Return the parameters of layer ``index`` by their names within the layer."""
        prefix = f"layers.{index}."
        return {path.removeprefix(prefix): value for path, value in self.params.items() if path.startswith(prefix)}

    def _forms(self, index: int, scales) -> tuple:
        """Return the formats of layer ``index``'s 8-bit pages of keys and of values, with these scales."""
        return page_formats(self.params[f"layers.{index}.attention.bqkv"], scales, self.frequencies, self.magnitude)

    def ranges(self) -> list[list]:
        """Measure the largest absolute keys and values ``[K, H]`` of each layer over all texts, as nested lists."""
        def observe(layer, x, length):
            return _observe(self.config, self.layer(layer), x, self.rotations, length)

        observed = [self._watch(tokens, length, observe) for tokens, length in self.texts]
        return [[(jnp.max(jnp.stack([keys for keys, _ in layer]), axis=0) / self.magnitude).tolist(),
                 jnp.max(jnp.stack([values for _, values in layer]), axis=0).tolist()]
                for layer in zip(*observed, strict=True)]

    def page_errors(self, ranges: tuple[Ranges, ...]) -> dict[str, list[float]]:
        """Measure the relative error that 8-bit pages cause in each layer's attention output, by element type.

        Errors are means over the texts.
        """
        scales = {kind: scales_of(self.params, Precision((), False, (kind,) * self.config.num_layers), ranges)
                  for kind in KV_DTYPES}

        def compare(layer, x, length):
            forms_by_kind = {kind: self._forms(layer, layers[layer]) for kind, layers in scales.items()}
            return _compare(self.config, self.layer(layer), x, rotations=self.rotations, length=length,
                            forms_by_kind=forms_by_kind)

        errors = [self._watch(tokens, length, compare) for tokens, length in self.texts]
        return {kind: np.mean([[float(layer[kind]) for layer in text] for text in errors], axis=0).tolist()
                for kind in KV_DTYPES}

    def losses(self, precision: Precision, ranges: tuple[Ranges, ...]) -> tuple[float, float, float]:
        """Measure next-token loss with 8-bit parts and in full precision, and the divergence of the former model.

        Each is a mean over the texts.
        """
        per_text = [self._compare(_last(self._walk(self._embedded(text, precision), precision, ranges)),
                                  precision.tables, text) for text in range(len(self.texts))]
        return tuple(float(np.mean(values)) for values in zip(*per_text, strict=True))

    def divergence_of_layer(self, layer: int, kinds: tuple[str, ...], ranges: tuple[Ranges, ...]) -> float:
        """Measure the divergence in the first text with 8-bit pages of these types and one layer's 8-bit matrices.

        The layers before it run once for all such measurements.
        """
        if not self._states:
            plain = Precision((False,) * len(kinds), False, kinds)
            x = self._embedded(0, plain)
            self._states = [x, *self._walk(x, plain, ranges)]
        weights = tuple(index == layer for index in range(len(kinds)))
        out = _last(self._walk(self._states[layer], Precision(weights, False, kinds), ranges, layer))
        return self._compare(out, False, 0)[2]

    def _compare(self, rounded: jax.Array, tables: bool, text: int):
        """Return losses and divergence of a text, from its last layer's outputs ``[S, D]`` with 8-bit parts."""
        tokens, length = self.texts[text]
        values = _losses(self.config, tables, self.params, rounded=rounded[:: self.every],
                         full=self.full[text][:: self.every], targets=jnp.roll(tokens, -1)[:: self.every])
        return tuple(float(jnp.mean(value[: -(-(length - 1) // self.every)])) for value in values)

    def _watch(self, tokens: jax.Array, length: int, run_layer: Callable) -> list:
        """Run a text through the layers by ``run_layer(layer, x, length) -> (output, result)``; return the results."""
        x, results = rows(self.params["embed.weight"], tokens, self.dtype)[None], []
        for layer in range(self.config.num_layers):
            x, result = run_layer(layer, x, length)
            results.append(result)
        return results

    def _embedded(self, text: int, precision: Precision) -> jax.Array:
        """Return the first layer's input ``[1, S, D]`` for a text."""
        return rows(precision.store("embed.weight", self.params["embed.weight"]), self.texts[text][0],
                    self.dtype)[None]

    def _walk(self, x: jax.Array, precision: Precision, ranges: tuple[Ranges, ...] | None, first: int = 0
              ) -> Iterator[jax.Array]:
        """Run the layers from ``first`` on, with parts 8-bit as given, on states ``x[1, S, D]``.

        Yields the states after each layer; the last are before the final norm.
        """
        scales = scales_of(self.params, precision, ranges)
        for layer in range(first, self.config.num_layers):
            kind = precision.kv_cache[layer] if precision.kv_cache else None
            x = _layer(self.config, precision.weights[layer], kind, self.layer(layer), x, rotations=self.rotations,
                       kv_forms=self._forms(layer, scales[layer]) if kind else None)
            yield x


def _last(states: Iterator[jax.Array]) -> jax.Array:
    """Return the last of some states ``[1, S, D]`` without its first axis."""
    last, = deque(states, maxlen=1)
    return last[0]


def _bare(config: ModelConfig, params: Mapping[str, jax.Array], k: jax.Array, v: jax.Array, rotations):
    """Return the rotated keys and the values of a layer without the biases of their projections."""
    bias = params["attention.bqkv"]
    cos, sin = (table[:, :, None] for table in rotations)
    return k - apply_rope(jnp.broadcast_to(bias[:, -2], k.shape), cos, sin), v - bias[:, -1]


def rounded_pages(kind: str, form, values: jax.Array) -> jax.Array:
    """Round keys or values without bias, ``[1, S, K, H]``, as 8-bit pages do, and return them with their biases."""
    pages = values.shape[1] // PAGE
    empty = EightBitPages(jnp.zeros((0, values.shape[2], PAGE, values.shape[3]), eight_bit_dtype(kind)), form)
    stored = empty.encode(values[0]).reshape(pages, PAGE, *values.shape[2:]).swapaxes(1, 2)
    ids, heads = jnp.arange(pages)[:, None], jnp.arange(values.shape[2])[None]
    read = EightBitPages(stored, form).read(ids, heads, ids)  # [N, K, PAGE, H]
    return read.swapaxes(1, 2).reshape(values.shape)


@partial(jax.jit, static_argnums=0)
def _observe(config: ModelConfig, params: Mapping[str, jax.Array], x: jax.Array, rotations, length):
    """Run a layer on a text: return its output, and its largest absolute keys and values ``[K, H]``.

    Of keys, the lengths in rotary planes are measured.
    """
    largest = []

    def attend(q, k, v):
        real = (jnp.arange(k.shape[1]) < length)[None, :, None, None]
        keys, values = (jnp.where(real, jnp.abs(x), 0) for x in _bare(config, params, k, v, rotations))
        planes = jnp.tile(jnp.hypot(*jnp.split(keys, 2, axis=-1)), 2)
        largest.append((jnp.max(planes, axis=(0, 1)), jnp.max(values, axis=(0, 1))))
        return causal_attention(q, k, v)

    return build_layer(config, params)(x, *rotations, attend), largest[0]


@partial(jax.jit, static_argnums=0)
def _compare(config: ModelConfig, params: Mapping[str, jax.Array], x: jax.Array, rotations, length,
             forms_by_kind):
    """Run a layer on a text: return its output, and its attention's relative error with 8-bit pages of each type."""
    errors = {}

    def attend(q, k, v):
        exact = causal_attention(q, k, v)
        real = (jnp.arange(k.shape[1]) < length)[None, :, None, None, None]
        for kind, kv_forms in forms_by_kind.items():
            bare = _bare(config, params, k, v, rotations)
            rounded = (rounded_pages(kind, form, x) for form, x in zip(kv_forms, bare, strict=True))
            error = jnp.where(real, causal_attention(q, *rounded) - exact, 0)
            errors[kind] = jnp.linalg.norm(error) / jnp.linalg.norm(jnp.where(real, exact, 0))
        return exact

    return build_layer(config, params)(x, *rotations, attend), errors


@partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(config: ModelConfig, weights: bool, kind: str | None, params: Mapping[str, jax.Array], x: jax.Array,
           rotations, kv_forms) -> jax.Array:
    """Run a layer on hidden states ``x`` and return its output, with matrices or pages in 8 bits as asked.

    weights: whether matrices are 8-bit. kind: element type of 8-bit pages, None for full precision.
    """
    stored = Precision((weights,))
    layer = build_layer(config, {name: stored.store(f"layers.0.{name}", value) for name, value in params.items()})

    def attend(q, k, v):
        if kind:
            k, v = (rounded_pages(kind, form, x) for form, x in zip(kv_forms, (k, v), strict=True))
        return causal_attention(q, k, v)

    return layer(x, *rotations, attend, bare=kind is not None)


@partial(jax.jit, static_argnums=(0, 1))
def _losses(config: ModelConfig, tables: bool, params: Mapping[str, jax.Array], rounded: jax.Array, full: jax.Array,
            targets: jax.Array):
    """Return both models' losses of ``targets[N]`` and their divergences ``[N]``, from outputs of the last layer.

    rounded, full: ``[N, D]``, the outputs with 8-bit parts and in full precision. Only the model's norm and head run.
    """
    precision = Precision((False,) * config.num_layers, tables)
    exact_model = build(config, params)
    rounded_model = build(config, {path: precision.store(path, value) for path, value in params.items()})
    return token_losses((rounded_model.logits, exact_model.logits),
                        (exact_model.norm(rounded), exact_model.norm(full)), targets)
