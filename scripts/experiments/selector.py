"""A selector of one's own against those that exist: what it finds, and how many answers stay right, by budget.

    python scripts/experiments/selector.py [configs/experiments/selector.toml] [--picture FILE.png]

`gaussian`, below, is all that a new selector takes; no file of the package is changed. Every block of queries attends
to the pages that the selector chooses, in all layers, the ends of prompts too. Prints a table and draws a picture.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import SELECTORS, Sparsity
from qwen_kernels.sparse_attention.selectors import page_shares

from qwen_jax.checkpoint import load_model, load_tokenizer, resolve
from qwen_jax.errors import UserError
from qwen_jax.evaluation.longcontext.samples import FAMILIES, draw
from qwen_jax.evaluation.sparse_recall import Paged, recall_of, true_shares
from qwen_jax.training.recipe import load_recipe

# --- the idea: about twenty lines


def gaussian(q, view, first, last, most):
    """Takes a page's keys for draws from a normal distribution, whose mean and variance are known.

    Then q . k is normal too, and the mean of exp(q . k) is exp(m + s² / 2). A page of 64 keys has no draws far out in
    the tail, though: where s² > 2 ln 64 the largest of them decides, about m + s (2 ln 64)^½.
    """
    keys = view.keys()  # [B, K, N, PAGE, H]
    mean = jnp.einsum("bkrh,bknh->bkrn", q, keys.mean(axis=3))
    variance = jnp.einsum("bkrh,bknh->bkrn", q * q, keys.var(axis=3))
    most_of = 2 * math.log(PAGE)
    mass = jnp.where(variance > most_of, jnp.sqrt(most_of * variance), (most_of + variance) / 2)
    return view.pages(), page_shares(mean + mass, view)


SELECTORS["gaussian"] = gaussian

# --- the experiment


@dataclass(frozen=True)
class Recipe:
    model: str
    families: tuple[str, ...]   # of the long-context suite
    documents: int              # of each
    tokens: int                 # of a document with its question and answer
    selectors: tuple[str, ...]
    budgets: tuple[float, ...]


class Asked(NamedTuple):
    tokens: list[int]
    answer: list[int]  # where the answer's tokens are


class Point(NamedTuple):
    selector: str
    budget: float
    density: float  # pages attended to, of those before the queries
    recall: float   # share of full attention on them
    right: float    # answers of which every token is the most likely one


def ask(family: str, seed: int, length: int, tokenizer) -> Asked:
    """A document, a question about it, and the right answer."""
    def chat(document) -> str:
        question, = document.questions
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{document.text}\n{question.text}"},
             {"role": "assistant", "content": question.prefix + question.answer}], tokenize=False)

    document = draw(family, f"experiment {seed}", length,
                    lambda one: len(tokenizer.encode(chat(one), add_special_tokens=False)))
    text, answer = chat(document), document.questions[0].answer
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin = text.rindex(answer)
    places = [index for index, (start, stop) in enumerate(encoded["offset_mapping"])
              if stop > begin and start < begin + len(answer)]
    return Asked(encoded["input_ids"], places)


@partial(jax.jit, static_argnums=(0, 1))
def observe(graph, sparsity: Sparsity, params, tokens: jax.Array, length) -> tuple[jax.Array, ...]:
    """The most likely next tokens ``[S]`` with sparse attention in all layers; pages attended to, pages there are; the
    mean recall over layers and KV heads."""
    model, seen = nnx.merge(graph, params), []

    def attend(layer, q, k, v):
        pages = Paged(k, v, length)
        selection = pages.select(q, sparsity)
        recall = recall_of(true_shares(q, k, length), selection, sparsity, length).recall
        seen.append((jnp.sum(selection.count), jnp.mean(recall)))
        return pages.attend(q, selection)

    hidden = model.hidden(tokens[None], jnp.arange(len(tokens))[None], attend)
    blocks = jnp.arange(len(tokens) // PAGE)
    visible = jnp.sum(jnp.where(blocks * PAGE < length, blocks + 1, 0)) * model.config.num_kv_heads * len(seen)
    attended, recall = (sum(values) for values in zip(*seen, strict=True))
    return model.logits(hidden)[0].argmax(-1), attended, visible, recall / len(seen)


def measure(model, prompts: Sequence[Asked], selector: str, budget: float) -> Point:
    sparsity = Sparsity(selector=selector, budget=budget, dense_tail=0)
    graph, params = nnx.split(model)
    width = -(-max(len(one.tokens) for one in prompts) // PAGE) * PAGE
    right, sums = [], np.zeros(3)
    for one in prompts:
        tokens = np.zeros(width, np.int32)
        tokens[:len(one.tokens)] = one.tokens
        likely, *counted = observe(graph, sparsity, params, tokens, len(one.tokens))
        likely, sums = np.asarray(likely), sums + np.array(counted, np.float64)
        right.append(all(likely[at - 1] == tokens[at] for at in one.answer))
    return Point(selector, budget, sums[0] / sums[1], sums[2] / len(prompts), float(np.mean(right)))


def run(recipe: Recipe, progress=lambda _: None) -> tuple[list[Point], Point, int]:
    """Every selector at every budget; full attention; the number of answers."""
    unknown = sorted(set(recipe.selectors) - SELECTORS.keys()) + sorted(set(recipe.families) - FAMILIES.keys())
    if unknown:
        raise UserError(f"unknown selector or family {unknown[0]}: selectors are {', '.join(SELECTORS)}, families "
                        f"{', '.join(FAMILIES)}")
    source = resolve(recipe.model)
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    prompts = [ask(family, seed, recipe.tokens, tokenizer)
               for family in recipe.families for seed in range(recipe.documents)]
    everything = float(recipe.tokens)  # a budget that no row exhausts
    full, points = measure(model, prompts, "window", everything), []
    for selector in recipe.selectors:
        for budget in recipe.budgets:
            points.append(measure(model, prompts, selector, budget))
            progress(f"{len(points)} of {len(recipe.selectors) * len(recipe.budgets)}: {selector}, budget {budget:g}, "
                     f"{points[-1].right:.1%} right")
    return points, full, len(prompts)


def draw_picture(points: Sequence[Point], full: Point, title: str, path: str) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in dict.fromkeys(point.selector for point in points):
        some = [point for point in points if point.selector == name]
        style = dict(marker="o", ms=5, lw=2.6 if name == "gaussian" else 1.3, zorder=3 if name == "gaussian" else 2)
        left.plot([p.density for p in some], [p.recall for p in some], label=name, **style)
        right.plot([p.density for p in some], [p.right for p in some], label=name, **style)
    right.axhline(full.right, color="0.4", ls="--", lw=1, label="full attention")
    left.set(ylabel="share of full attention on the selected pages")
    right.set(ylabel="answers right", ylim=(None, 1.02))
    for panel in (left, right):
        panel.set(xlabel="pages attended to, as a share of all")
        panel.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        panel.grid(alpha=.25)
        panel.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="configs/experiments/selector.toml")
    parser.add_argument("--picture", default="selector.png", metavar="FILE.png")
    args = parser.parse_args(arguments)
    recipe = load_recipe(args.recipe, Recipe)
    points, full, answers = run(recipe, lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    print(f"{'selector':<12}{'budget':>7}{'pages':>8}{'recall':>8}{'right':>8}   of {answers} answers")
    for point in points:
        print(f"{point.selector:<12}{point.budget:>7g}{point.density:>8.1%}{point.recall:>8.3f}{point.right:>8.1%}")
    print(f"{'full':<12}{'':>7}{full.density:>8.1%}{full.recall:>8.3f}{full.right:>8.1%}")
    draw_picture(points, full, f"{recipe.model}, {answers} questions about documents of {recipe.tokens:,} tokens",
                 args.picture)
    print(args.picture, file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
