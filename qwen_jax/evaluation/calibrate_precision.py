"""What of a checkpoint may be 8-bit: element types of pages, ranges of keys and values, layers, the tables."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from qwen_kernels.attention import PAGE, EightBitPages, causal_attention, eight_bit_dtype

from qwen_jax.config import ModelConfig
from qwen_jax.evaluation.sparse_fidelity import losses
from qwen_jax.model import Qwen2, build, build_layer, params_of
from qwen_jax.model.rope import apply_rope, rope_tables
from qwen_jax.quantization import Calibrated, Precision, Ranges, forms, rows, scales_of
from qwen_jax.quantization.precision import KV_DTYPES

MOST = 0.01  # nats: how far the next token's distribution may be from the one in 16 bits


@dataclass(frozen=True)
class EightBitCalibration:
    """What may be 8-bit, and what it costs.

    Attributes:
      found: what may be.
      errors: by element type ``[L]``, of each layer's attention: the error's norm over the output's.
      divergence: mean Kullback-Leibler divergence of the next token's distribution from the model's own, in nats;
        pages_divergence: with 8-bit pages alone; layer_divergence ``[L]``: with them and one layer's matrices.
      loss, full_loss: mean negative log-likelihood of the next token in nats, in 8 bits and in full precision.
    """
    found: Calibrated
    errors: dict[str, np.ndarray]
    divergence: float
    pages_divergence: float
    layer_divergence: np.ndarray
    loss: float
    full_loss: float


def calibrate_eight_bit(model: Qwen2, texts: Sequence[Sequence[int]],
                        progress: Callable[[str], None] = lambda _: None) -> EightBitCalibration:
    """Looks for what loses least, on a model in full precision.

    Ranges are the largest values over all texts. Pages of a layer have the element type whose attention is closer. Then
    layers' matrices become 8-bit, those that change least alone first, as many as keep the divergence within `MOST`;
    last the embedding and the head, if it stays within.
    """
    one, count = _Texts(model, texts), model.config.num_layers
    ranges = one.ranges()
    progress("ranges of keys and values: measured")
    errors = one.page_errors(ranges)
    kinds = tuple(min(KV_DTYPES, key=lambda kind: errors[kind][layer]) for layer in range(count))
    progress("pages: " + ", ".join(kinds))

    def measure(layers: Sequence[int], tables: bool = False) -> tuple[float, float, float]:
        precision = Precision(tuple(layer in layers for layer in range(count)), tables, kinds)
        return one.losses(precision, ranges)

    pages = measure(())
    progress(f"8-bit pages: divergence {pages[2]:.5f} nats")
    alone = []
    for layer in range(count):
        alone.append(measure((layer,))[2])
        progress(f"and the matrices of layer {layer} of {count}: {alone[-1]:.5f}")
    order = [int(layer) for layer in np.argsort(alone)]
    some, best = 0, pages
    step = 1 << count.bit_length()
    while step := step // 2:  # as many as possible, by bisection: more layers cost more
        if some + step <= count and (tried := measure(order[:some + step]))[2] <= MOST:
            some, best = some + step, tried
            progress(f"the matrices of {some} layers: {best[2]:.5f}")
    tables = (tried := measure(order[:some], tables=True))[2] <= MOST
    progress(f"embedding and head: {tried[2]:.5f}")
    loss, full_loss, divergence = tried if tables else best
    precision = Precision(tuple(layer in order[:some] for layer in range(count)), tables, kinds)
    return EightBitCalibration(Calibrated(precision, ranges), errors, divergence, pages[2], np.array(alone), loss,
                               full_loss)


class _Texts:
    """The model on all texts, padded to the same length, a layer at a time: layers that are alike share a program."""

    def __init__(self, model: Qwen2, texts: Sequence[Sequence[int]]):
        self.config, self.params = model.config, params_of(model)
        width = -(-max(map(len, texts)) // PAGE) * PAGE
        self.texts = [(jnp.asarray(list(text) + [0] * (width - len(text)), jnp.int32), len(text)) for text in texts]
        self.turns = rope_tables(model.config.rope, model.config.head_dim, jnp.arange(width)[None])
        self.frequencies, self.magnitude = model.config.rope.frequencies(model.config.head_dim)
        self.full = [self._final(tokens, Precision((False,) * self.config.num_layers), None)
                     for tokens, _ in self.texts]

    def layer(self, index: int) -> dict[str, jax.Array]:
        here = f"layers.{index}."
        return {path.removeprefix(here): value for path, value in self.params.items() if path.startswith(here)}

    def _forms(self, index: int, scales) -> tuple:
        return forms(self.params[f"layers.{index}.attention.bqkv"], scales, self.frequencies, self.magnitude)

    def ranges(self) -> tuple[Ranges, ...]:
        def observe(layer, x, length):
            return _observe(self.config, self.layer(layer), x, self.turns, length)

        seen = [self._walk(tokens, length, observe) for tokens, length in self.texts]
        return tuple(Ranges(jnp.max(jnp.stack([keys for keys, _ in layer]), axis=0) / self.magnitude,
                            jnp.max(jnp.stack([values for _, values in layer]), axis=0))
                     for layer in zip(*seen, strict=True))

    def page_errors(self, ranges: tuple[Ranges, ...]) -> dict[str, np.ndarray]:
        """By element type, each layer's mean over the texts."""
        scales = {kind: scales_of(self.params, Precision((), False, (kind,) * self.config.num_layers), ranges)
                  for kind in KV_DTYPES}

        def compare(layer, x, length):
            ways = {kind: self._forms(layer, of[layer]) for kind, of in scales.items()}
            return _compare(self.config, self.layer(layer), x, self.turns, length, ways)

        seen = [self._walk(tokens, length, compare) for tokens, length in self.texts]
        return {kind: np.mean([[float(layer[kind]) for layer in text] for text in seen], axis=0) for kind in KV_DTYPES}

    def losses(self, precision: Precision, ranges: tuple[Ranges, ...]) -> tuple[float, float, float]:
        """Loss in 8 bits and in full precision, and the divergence: means over the texts."""
        found = [_losses(self.config, precision.tables, self.params, self._final(tokens, precision, ranges), full,
                         tokens, length)
                 for (tokens, length), full in zip(self.texts, self.full, strict=True)]
        return tuple(float(np.mean(values)) for values in zip(*found, strict=True))

    def _walk(self, tokens: jax.Array, length: int, of_layer: Callable) -> list:
        """What ``of_layer(layer, x, length)``, which also gives the next x, says of every layer in full precision."""
        x, seen = rows(self.params["embed.weight"], tokens, jnp.float32)[None], []
        for layer in range(self.config.num_layers):
            x, said = of_layer(layer, x, length)
            seen.append(said)
        return seen

    def _final(self, tokens: jax.Array, precision: Precision, ranges: tuple[Ranges, ...] | None) -> jax.Array:
        """The last layer's output ``[S, D]``."""
        scales = scales_of(self.params, precision, ranges)
        x = rows(precision.store("embed.weight", self.params["embed.weight"]), tokens, jnp.float32)[None]
        for layer in range(self.config.num_layers):
            kind = precision.kv_cache[layer] if precision.kv_cache else None
            x = _layer(self.config, precision.weights[layer], kind, self.layer(layer), x, self.turns,
                       self._forms(layer, scales[layer]) if kind else None)
        return x[0]


def _bare(config: ModelConfig, params: Mapping[str, jax.Array], k: jax.Array, v: jax.Array, turns):
    """Rotated keys and values without their biases."""
    bias = params["attention.bqkv"]
    cos, sin = (table[:, :, None] for table in turns)
    return k - apply_rope(jnp.broadcast_to(bias[:, -2], k.shape), cos, sin), v - bias[:, -1]


def _rounded(kind: str, form, values: jax.Array) -> jax.Array:
    """``values[1, S, K, H]``, rotated and bare, as pages hold them, with their biases."""
    pages = values.shape[1] // PAGE
    empty = EightBitPages(jnp.zeros((0, values.shape[2], PAGE, values.shape[3]), eight_bit_dtype(kind)), form)
    stored = empty.encode(values[0]).reshape(pages, PAGE, *values.shape[2:]).swapaxes(1, 2)
    ids, heads = jnp.arange(pages)[:, None], jnp.arange(values.shape[2])[None]
    read = EightBitPages(stored, form).read(ids, heads, ids)  # [N, K, PAGE, H]
    return read.swapaxes(1, 2).reshape(values.shape)


@partial(jax.jit, static_argnums=0)
def _observe(config: ModelConfig, params: Mapping[str, jax.Array], x: jax.Array, turns, length):
    seen = []

    def attend(q, k, v):
        known = (jnp.arange(k.shape[1]) < length)[None, :, None, None]
        keys, values = (jnp.where(known, jnp.abs(x), 0) for x in _bare(config, params, k, v, turns))
        planes = jnp.tile(jnp.hypot(*jnp.split(keys, 2, axis=-1)), 2)
        seen.append((jnp.max(planes, axis=(0, 1)), jnp.max(values, axis=(0, 1))))
        return causal_attention(q, k, v)

    return build_layer(config, params)(x, *turns, attend), seen[0]


@partial(jax.jit, static_argnums=0)
def _compare(config: ModelConfig, params: Mapping[str, jax.Array], x: jax.Array, turns, length, ways):
    """The error of attention over rounded keys and values, for each way to round them."""
    errors = {}

    def attend(q, k, v):
        exact = causal_attention(q, k, v)
        known = (jnp.arange(k.shape[1]) < length)[None, :, None, None, None]
        for kind, of in ways.items():
            rounded = (_rounded(kind, form, x) for form, x in zip(of, _bare(config, params, k, v, turns), strict=True))
            error = jnp.where(known, causal_attention(q, *rounded) - exact, 0)
            errors[kind] = jnp.linalg.norm(error) / jnp.linalg.norm(jnp.where(known, exact, 0))
        return exact

    return build_layer(config, params)(x, *turns, attend), errors


@partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(config: ModelConfig, weights: bool, kind: str | None, params: Mapping[str, jax.Array], x: jax.Array, turns,
           of) -> jax.Array:
    stored = Precision((weights,))
    layer = build_layer(config, {name: stored.store(f"layers.0.{name}", value) for name, value in params.items()})

    def attend(q, k, v):
        if kind:
            k, v = (_rounded(kind, form, x) for form, x in zip(of, (k, v), strict=True))
        return causal_attention(q, k, v)

    return layer(x, *turns, attend, bare=kind is not None)


@partial(jax.jit, static_argnums=(0, 1))
def _losses(config: ModelConfig, tables: bool, params: Mapping[str, jax.Array], ours: jax.Array, full: jax.Array,
            tokens: jax.Array, length):
    """Loss and divergence of final states before the norm; of the model only its two ends are used."""
    precision = Precision((False,) * config.num_layers, tables)
    exact = build(config, params)
    rounded = build(config, {path: precision.store(path, value) for path, value in params.items()})
    return losses((rounded.logits, exact.logits), (exact.norm(ours), exact.norm(full)), tokens, length)
