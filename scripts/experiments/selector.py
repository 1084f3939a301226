"""Compare a new rule that selects pages for sparse attention with the existing rules: recall and right answers.

    python scripts/experiments/selector.py [configs/experiments/selector.toml] [--picture FILE.png]

The function `gaussian`, below, is a complete new selector: it ranks the pages (blocks of keys and values) for a block
of queries. No file of the package is changed. In all layers, every block of queries, at the end of a prompt too,
attends to the pages that the selector ranks highest, as many as a budget allows. Prints a table and draws a picture.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx
from qwen_kernels.attention import PAGE
from qwen_kernels.sparse_attention import SELECTORS, Sparsity
from qwen_kernels.sparse_attention.selectors import page_shares

from qwen_jax.checkpoint import load_model, load_tokenizer, resolve
from qwen_jax.errors import UserError
from qwen_jax.evaluation.longcontext.samples import FAMILIES, draw
from qwen_jax.evaluation.sparse_recall import Paged, recall_of, true_shares
from qwen_jax.training.recipe import Names, Table, load_recipe

# --- the new selector


def gaussian(q, view, first, last, wanted):
    """Estimate each page's share of the attention by taking its keys for draws from a normal distribution.

    With mean m and variance s² of q . k over the page, the mean of exp(q . k) is exp(m + s² / 2). But a page of 64 keys
    has no draws far out in the tail: if s² > 2 ln 64 the largest draw decides, about m + s (2 ln 64)^½.
    """
    keys = view.keys()  # [B, K, N, PAGE, H]
    mean = jnp.einsum("bkrh,bknh->bkrn", q, keys.mean(axis=3))
    variance = jnp.einsum("bkrh,bknh->bkrn", q * q, keys.var(axis=3))
    limit = 2 * math.log(PAGE)
    mass = jnp.where(variance > limit, jnp.sqrt(limit * variance), (limit + variance) / 2)
    return view.pages(), page_shares(mean + mass, view)


SELECTORS["gaussian"] = gaussian

# --- the experiment


class Recipe(Table):
    """Settings of the experiment: a model, its documents, and the selectors and budgets of pages to compare."""
    model: str
    families: Names             # families of the long-context suite
    documents: int              # number of documents of each family
    tokens: int                 # length of a document with its question and answer
    selectors: Names
    budgets: Annotated[tuple[float, ...], msgspec.Meta(min_length=1)]


class Prompt(NamedTuple):
    """The tokens of a document, a question and its right answer, and which of them are the answer's."""
    tokens: list[int]
    answer: list[int]  # indices of the answer's tokens


class Point(NamedTuple):
    """Pages, recall and right answers of a selector of pages with a budget, as means over all prompts."""
    selector: str
    budget: float
    density: float  # pages attended to, as a share of the pages before the queries
    recall: float   # share of full attention that falls on these pages
    right: float    # share of answers of which every token is the most likely token


def ask(family: str, seed: int, length: int, tokenizer) -> Prompt:
    """Draw a document of a task family, a question and its right answer, as one text of at most `length` tokens."""
    def chat(document) -> str:
        question, = document.questions
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{document.text}\n{question.text}"},
             {"role": "assistant", "content": question.prefix + question.answer}], tokenize=False)

    document = draw(family, f"experiment {seed}", length,
                    lambda drawn: len(tokenizer.encode(chat(drawn), add_special_tokens=False)))
    text, answer = chat(document), document.questions[0].answer
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begin = text.rindex(answer)
    places = [index for index, (start, stop) in enumerate(encoded["offset_mapping"])
              if stop > begin and start < begin + len(answer)]
    return Prompt(encoded["input_ids"], places)


@partial(jax.jit, static_argnums=(0, 1))
def observe(graph, sparsity: Sparsity, params, tokens: jax.Array, length) -> tuple[jax.Array, ...]:
    """Run a model on a text with sparse attention in all layers; measure how much of full attention it covers.

    Returns the most likely next tokens ``[S]``, the number of pages attended to, the number of all pages before the
    queries, and the mean recall over layers and KV heads.
    """
    model, per_layer = nnx.merge(graph, params), []

    def attend(layer, q, k, v):
        pages = Paged(k, v, length)
        selection = pages.select(q, sparsity)
        recall = recall_of(true_shares(q, k, length), selection, sparsity, length).recall
        per_layer.append((jnp.sum(selection.count), jnp.mean(recall)))
        return pages.attend(q, selection)

    hidden = model.hidden(tokens[None], jnp.arange(len(tokens))[None], attend)
    blocks = jnp.arange(len(tokens) // PAGE)
    visible = jnp.sum(jnp.where(blocks * PAGE < length, blocks + 1, 0)) * model.config.num_kv_heads * len(per_layer)
    attended, recall = (sum(values) for values in zip(*per_layer, strict=True))
    return model.logits(hidden)[0].argmax(-1), attended, visible, recall / len(per_layer)


def measure(model, prompts: Sequence[Prompt], selector: str, budget: float) -> Point:
    """Measure the pages, recall and right answers of a selector of pages with a budget, on all prompts."""
    sparsity = Sparsity(selector=selector, budget=budget, dense_tail=0)
    graph, params = nnx.split(model)
    width = -(-max(len(prompt.tokens) for prompt in prompts) // PAGE) * PAGE
    right, sums = [], np.zeros(3)
    for prompt in prompts:
        tokens = np.zeros(width, np.int32)
        tokens[:len(prompt.tokens)] = prompt.tokens
        likely, *counted = observe(graph, sparsity, params, tokens, len(prompt.tokens))
        likely, sums = np.asarray(likely), sums + np.array(counted, np.float64)
        right.append(all(likely[at - 1] == tokens[at] for at in prompt.answer))
    return Point(selector, budget, sums[0] / sums[1], sums[2] / len(prompts), float(np.mean(right)))


def run(recipe: Recipe, progress=lambda _: None) -> tuple[list[Point], Point, int]:
    """Measure all selectors of pages at all budgets; return results, full attention's, and the number of prompts."""
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
    """Draw the recall and the right answers of each selector, over the share of pages attended to, as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name in dict.fromkeys(point.selector for point in points):
        curve = [point for point in points if point.selector == name]
        style = dict(marker="o", ms=5, lw=2.6 if name == "gaussian" else 1.3, zorder=3 if name == "gaussian" else 2)
        left.plot([p.density for p in curve], [p.recall for p in curve], label=name, **style)
        right.plot([p.density for p in curve], [p.right for p in curve], label=name, **style)
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
