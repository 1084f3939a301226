"""Measure what sparse attention costs a model on long texts: loss, density, and where attention is lost.

    python scripts/bench/sparse_loss.py MODEL FILE... [--tokens 4096] [--policies default budget=2 ...] [--recall]

A policy is `default`, or settings of `Sparsity` that differ from it, such as `budget=4,local=8`; `layers=0+3` leaves
all heads of these layers dense, `heads=3.0+9.1` head 0 of layer 3 and head 1 of layer 9. Each text runs with full
attention and with each policy, in float32, as the middle of a prompt: without a dense tail. Printed are the density,
the loss that the policy adds, in nats per token, and the same by quarter of the text. With `--recall`, also the share
of full attention that a policy's pages cover, the most that as many pages can, and the heads that lose most.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from qwen_kernels.attention import PAGE  # noqa: E402
from qwen_kernels.sparse_attention import Sparsity  # noqa: E402
from workload import say  # noqa: E402

from qwen_jax.checkpoint import load_model, load_tokenizer, resolve  # noqa: E402
from qwen_jax.evaluation.sparse_fidelity import with_dense  # noqa: E402
from qwen_jax.evaluation.sparse_recall import Paged, recall_of, true_shares  # noqa: E402
from qwen_jax.model import Qwen2  # noqa: E402
from qwen_jax.model.rope import rope_tables  # noqa: E402

TYPES = {"selector": str, "sink": int, "local": int}


def policy_of(text: str, layers: int, heads: int) -> tuple[Sparsity, np.ndarray]:
    """Parse a policy: settings of all layers, and which heads are dense, bool ``[layers, heads]``."""
    dense, settings = np.zeros((layers, heads), bool), {}
    for part in text.split(",") if text != "default" else ():
        name, value = part.split("=")
        if name == "layers":
            dense[[int(layer) for layer in value.split("+")]] = True
        elif name == "heads":
            for pair in value.split("+"):
                dense[tuple(map(int, pair.split(".")))] = True
        else:
            settings[name] = TYPES.get(name, float)(value)
    return replace(Sparsity(), **settings), dense


@partial(jax.jit, static_argnames=("graph", "sparsity", "recall"))
def run_layer(graph, params, x, *, rope, sparsity: Sparsity | None, dense, recall: bool):
    """Run a layer on ``x[1, S, D]``, with full attention if there is no sparsity.

    Returns its output, the pages that are read and visible, and the recall of every head, None unless ``recall``.
    """
    length = x.shape[1]
    seen = {}

    def attend(q, k, v):
        pages = Paged(k, v, length)
        selection = pages.select(q, sparsity or Sparsity(budget=0))
        everything = with_dense(selection, True, length)
        selection = everything if sparsity is None else with_dense(selection, dense, length)
        seen["pages"] = jnp.sum(selection.count), jnp.sum(everything.count)
        if recall:
            seen["recall"] = recall_of(true_shares(q, k, length), selection, sparsity, length)
        return pages.attend(q, selection)

    out = nnx.merge(graph, params)(x, *rope, attend)
    return out, seen["pages"], seen.get("recall")


@partial(jax.jit, static_argnums=0)
def token_losses(graph, norm, head, x, targets):
    """Return the loss of each target after the states ``x[1, S, D]``, f32 ``[S]``."""
    def of_page(item):
        states, targets = item
        logits = jax.nn.log_softmax((states @ head.T).astype(jnp.float32), axis=-1)
        return -jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]

    x = nnx.merge(graph, norm)(x)[0]
    return jax.lax.map(of_page, (x.reshape(-1, PAGE, x.shape[-1]), targets.reshape(-1, PAGE))).reshape(-1)


def forward(model: Qwen2, tokens: np.ndarray, sparsity: Sparsity | None, dense: np.ndarray, recall: bool = False):
    """Return the losses ``[S - 1]`` of a text, the density by layer, and the recalls by layer."""
    rope = rope_tables(model.config.rope, model.config.head_dim, jnp.arange(len(tokens))[None])
    x, density, recalls = model.embed.weight[...][jnp.asarray(tokens)][None], [], []
    for layer, dense_heads in zip(model.layers, dense, strict=True):
        x, (read, visible), found = run_layer(*nnx.split(layer), x, rope=rope, sparsity=sparsity, dense=dense_heads,
                                              recall=recall)
        density.append(float(read / visible))
        recalls.append(jax.device_get(found))
    losses = token_losses(*nnx.split(model.norm), model.head_weight, x, jnp.roll(jnp.asarray(tokens), -1))
    return np.asarray(losses[:-1]), np.array(density), recalls


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
    parser.add_argument("--recall", action="store_true", help="print attention covered by layer and head")
    args = parser.parse_args()
    source = resolve(args.model)
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    shape = model.config.num_layers, model.config.num_kv_heads
    added: dict[str, list[np.ndarray]] = {policy: [] for policy in args.policies}
    print(f"{'text':24}{'policy':32}{'density':>8}{'loss':>9}{'added':>9}  by quarter" + " " * 22 + "seconds")
    for path in args.files:
        tokens = np.array(tokenizer.encode(path.read_text())[: args.tokens], np.int32)
        if len(tokens) < args.tokens:
            say(f"{path.name} has {len(tokens)} tokens only: left out")
            continue
        full, _, _ = forward(model, tokens, None, np.ones(shape, bool))
        for policy in args.policies:
            began = time.perf_counter()
            losses, density, recalls = forward(model, tokens, *policy_of(policy, *shape), args.recall)
            difference = losses - full
            added[policy].append(difference)
            quarters = " ".join(f"{part.mean():+.4f}" for part in np.array_split(difference, 4))
            print(f"{path.name[:23]:24}{policy:32}{density.mean():8.3f}{full.mean():9.4f}{difference.mean():+9.4f}  "
                  f"{quarters}  {time.perf_counter() - began:6.0f}", flush=True)
            if args.recall:
                parts = [np.stack(part) for part in zip(*recalls, strict=True)]
                print(f"  covered {parts[0].mean():.4f} of at most {parts[1].mean():.4f}, found {parts[3].sum():,} of "
                      f"{parts[2].sum():,} needed pages; lost by layer and head: "
                      + ", ".join(f"{layer}.{head} {lost:.3f}" for lost, layer, head in worst(parts[1] - parts[0])))
    for policy, differences in added.items():
        if differences:
            means = [difference.mean() for difference in differences]
            print(f"{policy:32} added over {len(means)} texts: mean {np.mean(means):+.4f}, largest {max(means):+.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
