"""Measure what sparse attention costs a model on long texts: loss, density, and where attention is lost.

    python scripts/bench/sparse_loss.py MODEL FILE... [--tokens 4096] [--policies default budget=2 ...] [--recall]

A policy is `default`, `calibrated` (the model's own file), or settings of `Sparsity` that differ from the default, such
as `budget=4,local=8`; `layers=0+3` leaves all heads of these layers dense, `heads=3.0+9.1` head 0 of layer 3 and head 1
of layer 9, and `budget@0+2=2` changes the setting in layers 0 and 2 only. Each text runs with full attention and with
each policy, in float32, as the middle of a prompt: without a dense tail. Printed are the density, the loss that the
policy adds, in nats per token, and the same by quarter of the text. With `--recall`, also the share of full attention
that a policy's pages cover, the most that as many pages can, and the heads that lose most.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from qwen_kernels.sparse_attention import Sparsity  # noqa: E402
from workload import say  # noqa: E402

from qwen_jax import ModelConfig  # noqa: E402
from qwen_jax.checkpoint import Source, load_model, load_tokenizer, read_sparsity, resolve  # noqa: E402
from qwen_jax.evaluation.sparse_fidelity import Text, fidelity  # noqa: E402
from qwen_jax.model import Qwen2  # noqa: E402

TYPES = {"selector": str, "sink": int, "local": int}


def policy_of(text: str, folder: Path | Source, config: ModelConfig) -> tuple[Sparsity, ...]:
    """Parse a policy: return the settings of every layer. folder: where a calibration's file is, or the model."""
    if text == "calibrated":
        found = read_sparsity(folder, config)
        if found is None:
            raise SystemExit(f"{folder} has no calibration: run `qwen-jax calibrate`")
        return found
    dense, settings = [()] * config.num_layers, [{} for _ in range(config.num_layers)]
    for part in text.split(",") if text != "default" else ():
        name, value = part.split("=")
        if name == "layers":
            for layer in value.split("+"):
                dense[int(layer)] = tuple(range(config.num_kv_heads))
        elif name == "heads":
            for layer, head in (map(int, pair.split(".")) for pair in value.split("+")):
                dense[layer] += (head,)
        else:
            name, _, only = name.partition("@")
            for layer in map(int, only.split("+")) if only else range(config.num_layers):
                settings[layer][name] = TYPES.get(name, float)(value)
    return tuple(replace(Sparsity(), **own, dense_heads=heads) for own, heads in zip(settings, dense, strict=True))


def forward(model: Qwen2, text: Text, layers: tuple[Sparsity, ...]):
    """Run a text with each layer's settings; return final states ``[1, S, D]``, and the density."""
    x, counts = text.embedded(model), []
    for layer, sparsity in zip(model.layers, layers, strict=True):
        x, count = text.run(layer, x, sparsity)
        counts.append(count)
    attended, visible = np.sum(jax.device_get(counts), axis=0)
    return x, float(attended / visible)


def worst(lost: np.ndarray) -> list[tuple[float, int, int]]:
    """Return the eight heads that lose most, as (lost, layer, head)."""
    order = np.argsort(-lost, axis=None)[:8]
    return [(lost.flat[place], *map(int, np.unravel_index(place, lost.shape))) for place in order]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=4096, help="of each text, whole pages (default: %(default)s)")
    parser.add_argument("--policies", nargs="+", default=["default"],
                        help="settings of " + ", ".join(field.name for field in fields(Sparsity)))
    parser.add_argument("--calibration", type=Path, help="folder of the calibration's file (default: the model's)")
    parser.add_argument("--recall", action="store_true", help="print attention covered by layer and head")
    args = parser.parse_args()
    source = resolve(args.model)
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    folder = args.calibration or source
    added: dict[str, list[np.ndarray]] = {policy: [] for policy in args.policies}
    print(f"{'text':24}{'policy':32}{'density':>8}{'loss':>9}{'added':>9}  by quarter" + " " * 22 + "seconds")
    for path in args.files:
        tokens = np.array(tokenizer.encode(path.read_text())[: args.tokens], np.int32)
        if len(tokens) < args.tokens:
            say(f"{path.name} has {len(tokens)} tokens only: left out")
            continue
        text = Text(model, tokens)
        everything = Sparsity(dense_heads=tuple(range(model.config.num_kv_heads)))
        full, _ = forward(model, text, (everything,) * model.config.num_layers)
        for policy in args.policies:
            began, layers = time.perf_counter(), policy_of(policy, folder, model.config)
            states, density = forward(model, text, layers)
            losses, full_losses, _ = text.compare(model, states, full)
            difference = losses - full_losses
            added[policy].append(difference)
            quarters = " ".join(f"{part.mean():+.4f}" for part in np.array_split(difference, 4))
            print(f"{path.name[:23]:24}{policy:32}{density:8.3f}{full_losses.mean():9.4f}{difference.mean():+9.4f}  "
                  f"{quarters}  {time.perf_counter() - began:6.0f}", flush=True)
            if args.recall:
                recall = fidelity(model, tokens, layers).recall
                print(f"  covered {recall.recall.mean():.4f} of at most {recall.reachable.mean():.4f}, found "
                      f"{recall.found.sum():,} of {recall.needed.sum():,} needed pages; lost by layer and head: "
                      + ", ".join(f"{layer}.{head} {lost:.3f}"
                                  for lost, layer, head in worst(recall.reachable - recall.recall)))
    for policy, differences in added.items():
        if differences:
            means = [difference.mean() for difference in differences]
            print(f"{policy:32} added over {len(means)} texts: mean {np.mean(means):+.4f}, largest {max(means):+.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
