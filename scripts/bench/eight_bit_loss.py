"""Measure what 8 or 4 bits cost a model on texts: loss, most likely tokens, and values that do not fit.

    python scripts/bench/eight_bit_loss.py MODEL FILE... [--tokens 2048] [--variants "auto" "all, e4m3" ...]

Each text runs in float32 and in each variant, layer by layer, with the numbers that an engine would store rounded to 8
bits. Printed are the loss that a variant adds, in nats per token, the divergence of its distributions, how often its
most likely token is that of float32, and how many tokens of 100,000 would trip the guard, because a key or a value of
theirs is too large for its page.

`auto` and `int8 pages` need a calibrated checkpoint (`qwen-jax calibrate --fp8`; `--calibration FOLDER` names another
place of the file). `cast` stores plain casts to e4m3, keys with their biases; `per tensor` gives every matrix, and all
keys and all values of a layer, one scale. `--kernels` computes products of integers as engines do for up to 64 rows.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from qwen_kernels.attention import EightBitPages, causal_attention, eight_bit_dtype  # noqa: E402
from qwen_kernels.cpu import products  # noqa: E402
from tqdm import tqdm  # noqa: E402

from qwen_jax.checkpoint import load_params, load_tokenizer, read_calibrated, resolve  # noqa: E402
from qwen_jax.evaluation.calibrate_precision import rounded_pages  # noqa: E402
from qwen_jax.model import build, build_layer  # noqa: E402
from qwen_jax.model.rope import rope_tables  # noqa: E402
from qwen_jax.quantization import Precision, QuantizedTensor, default_precision, page_formats, rows, scales_of  # noqa: E402
from qwen_jax.quantization.quantized_tensor import E4M3_MAX, saturate  # noqa: E402

CHUNK = 128  # tokens whose logits exist at a time
NAIVE = ("cast", "per tensor")
VARIANTS = ("int8 weights", "int4 weights", "e4m3 weights", "e4m3 pages", "int8 pages", "all, e4m3", "auto",
            "cast weights", "cast pages", "per tensor weights", "per tensor pages")


class Variant(NamedTuple):
    """Parameters of a model in 8 bits, and how each layer's keys and values are stored."""

    params: dict[str, Any]
    kinds: tuple[str | None, ...]
    scales: tuple


def variant_of(name: str, config, params, calibrated) -> Variant:
    """Return a variant's parameters, and the kinds and scales of its pages."""
    plain, none = (None,) * config.num_layers, (None,) * config.num_layers
    if name.startswith(NAIVE):
        naive = next(kind for kind in NAIVE if name.startswith(kind))
        if name.endswith("pages"):
            return Variant(params, (naive,) * config.num_layers, none)
        precision = default_precision(config, True, None)
        return Variant({path: naive_weight(value, inputs, naive) if (inputs := precision.inputs(path)) else value
                        for path, value in params.items()}, plain, none)
    if name in ("auto", "int8 pages") and calibrated is None:
        raise SystemExit("the checkpoint is not calibrated: run `qwen-jax calibrate --fp8`")
    layers = (True,) * config.num_layers
    precision = {"int8 weights": lambda: Precision(layers, True, (None,) * config.num_layers, "int8"),
                 "int4 weights": lambda: Precision(layers, True, (None,) * config.num_layers, "int4"),
                 "e4m3 weights": lambda: default_precision(config, True, None),
                 "e4m3 pages": lambda: default_precision(config, False, "e4m3"),
                 "int8 pages": lambda: default_precision(config, False, "int8"),
                 "all, e4m3": lambda: default_precision(config, True, "e4m3"),
                 "auto": lambda: calibrated.precision}[name]()
    stored = {path: precision.store(path, value) for path, value in params.items()}
    return Variant(stored, precision.kv_cache, scales_of(params, precision, calibrated and calibrated.ranges))


def naive_weight(value: jax.Array, inputs: int, kind: str) -> QuantizedTensor:
    """Round a matrix, whose last ``inputs`` axes are contracted, to e4m3 with one scale: 1 for a plain cast."""
    scale = jnp.max(jnp.abs(value)) / E4M3_MAX if kind == "per tensor" else jnp.ones(())
    return QuantizedTensor(saturate(value / scale), jnp.broadcast_to(scale, value.shape[: value.ndim - inputs]))


@partial(jax.jit, static_argnames=("config", "kind"))
def run_layer(config, kind, params, x, *, rotations, forms):
    """Run a layer on ``x[1, S, D]`` with keys and values rounded as their pages would hold them.

    Returns its output, and which tokens have a key or a value that their page cannot hold, bool ``[S]``.
    """
    ours, seen = kind not in (None, *NAIVE), {"outside": jnp.zeros(x.shape[1], bool)}

    def attend(q, k, v):
        if ours:
            for form, value in zip(forms, (k, v), strict=True):
                pages = EightBitPages(jnp.zeros((0, 0, 0, 0), eight_bit_dtype(kind)), form)
                seen["outside"] |= jnp.any(pages.out_of_range(value[0]), axis=(1, 2))
            k, v = (rounded_pages(kind, form, value) for form, value in zip(forms, (k, v), strict=True))
        elif kind:
            scales = [jnp.max(jnp.abs(value)) / E4M3_MAX if kind == "per tensor" else 1.0 for value in (k, v)]
            k, v = (saturate(value / scale).astype(value.dtype) * scale
                    for value, scale in zip((k, v), scales, strict=True))
        return causal_attention(q, k, v)

    return build_layer(config, params)(x, *rotations, attend, bare=ours), seen["outside"]


@partial(jax.jit, static_argnames="config")
def compare(config, params, variant, *, states, exact, targets):
    """Return losses, losses in float32, divergences and equal most likely tokens, each ``[S]``, from final states."""
    models = build(config, variant), build(config, params)

    def of_chunk(item):
        *states, targets = item
        first, second = (jax.nn.log_softmax(model.logits(model.norm(x)), axis=-1)
                         for model, x in zip(models, states, strict=True))
        losses = [-jnp.take_along_axis(x, targets[:, None], axis=1)[:, 0] for x in (first, second)]
        return *losses, jnp.sum(jnp.exp(second) * (second - first), axis=-1), first.argmax(-1) == second.argmax(-1)

    chunks = [x.reshape(-1, CHUNK, *x.shape[1:]) for x in (states, exact, targets)]
    return tuple(x.reshape(-1) for x in jax.lax.map(of_chunk, tuple(chunks)))


def final_states(config, variant: Variant, tokens, rotations):
    """Return a text's states ``[S, D]`` before the final norm in a variant, and the tokens outside of their ranges."""
    frequencies, magnitude = config.rope.frequencies(config.head_dim)
    x, outside = rows(variant.params["embed.weight"], tokens, jnp.float32)[None], False
    for layer, (kind, scales) in enumerate(zip(variant.kinds, variant.scales, strict=True)):
        prefix = f"layers.{layer}."
        params = {path.removeprefix(prefix): value for path, value in variant.params.items() if path.startswith(prefix)}
        forms = page_formats(params["attention.bqkv"], scales, frequencies, magnitude) if scales else None
        x, some = run_layer(config, kind, params, x, rotations=rotations, forms=forms)
        outside |= some
    return x[0], outside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=2048, help="of each part of a text (default: %(default)s)")
    parser.add_argument("--most", type=int, default=1 << 30, help="tokens in all")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--calibration", type=Path, help="folder of the calibration's file")
    parser.add_argument("--kernels", action="store_true", help="use the CPU kernels for all products of integers")
    args = parser.parse_args()
    if args.kernels:
        products.MOST_ROWS = args.tokens
    source = resolve(args.model)
    config, tokenizer = source.config, load_tokenizer(source)
    params = load_params(source, config, "float32")
    calibrated = read_calibrated(args.calibration or source, config)
    parts = [tokens[start: start + args.tokens] for path in args.files
             for tokens in [tokenizer.encode(path.read_text())]
             for start in range(0, len(tokens) - args.tokens + 1, args.tokens)][: args.most // args.tokens]
    rotations = rope_tables(config.rope, config.head_dim, jnp.arange(args.tokens)[None])
    none = (None,) * config.num_layers
    exact = Variant(params, none, none)
    variants = {name: variant_of(name, config, params, calibrated) for name in args.variants}
    found: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    for part in tqdm(parts, unit="text"):
        tokens = jnp.asarray(part, jnp.int32)
        reference, _ = final_states(config, exact, tokens, rotations)
        for name, variant in variants.items():
            states, outside = final_states(config, variant, tokens, rotations)
            values = compare(config, params, variant.params, states=states, exact=reference,
                             targets=jnp.roll(tokens, -1))
            found[name].append(np.stack([np.asarray(value, np.float64)[:-1] for value in (*values, outside)]))
    print(f"{len(parts)} texts of {args.tokens} tokens")
    print(f"{'variant':20}{'added loss':>12}{'divergence':>12}{'same token':>12}{'trips in 100,000':>18}")
    for name, values in found.items():
        losses, exact_losses, divergence, same, outside = np.concatenate(values, axis=1).mean(axis=1)
        print(f"{name:20}{losses - exact_losses:+12.4f}{divergence:12.4f}{same:12.2%}{1e5 * outside:18.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
