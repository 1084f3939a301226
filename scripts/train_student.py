"""Trains the bundled model's student from its teacher's probabilities and writes its Hugging Face folder.

    python scripts/train_student.py [configs/train/student.toml] [--run runs/student] [--out qwen_jax/student]

As scripts/train_bundled.py, on the same kind of material and from initial values that already copy, with the teacher's
tokenizer and the loss of `qwen_jax.training.recipe.Distill`. Run again with the same folder, it continues after an
interruption. About twice as fast with jemalloc (see there).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from qwen_kernels.attention import causal_attention
from tokenizers import Tokenizer

from qwen_jax.checkpoint import load_params, resolve
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.evaluation.fraud.score import answers_in_one_pass, score
from qwen_jax.evaluation.fraud.task import conversations, generate
from qwen_jax.evaluation.fraud.text import format_messages
from qwen_jax.model import build, init, params_of
from qwen_jax.training.curves import plot_curves
from qwen_jax.training.initial import prepare_for_retrieval
from qwen_jax.training.loop import Run, fit
from qwen_jax.training.loss import distillation
from qwen_jax.training.new_model import model_config, write_folder
from qwen_jax.training.recipe import Distill, ModelShape, Optimizer, load_recipe
from qwen_jax.training.stacked import hidden, stack, unstack
from qwen_jax.training.step import Loss, init_state, make_optimizer, make_train_step
from qwen_jax.training.turns import OPENING, batches


@dataclass(frozen=True)
class StudentRecipe:
    """As `qwen_jax.training.recipe.BundledRecipe`; the vocabulary is the teacher's."""
    seed: int
    sequence_length: int
    batch_size: int
    turns: int
    explain: float
    steps: int
    lm_weight: float
    evaluate_every: int
    distill: Distill
    optimizer: Optimizer
    model: ModelShape


def student_loss(student: ModelConfig, teacher: ModelConfig, distill: Distill) -> Loss:
    """`qwen_jax.training.step.distillation_loss` of rows in which many turns share an opening."""
    def loss(trainable, frozen, batch):
        def attend(q, k, v):
            return causal_attention(q, k, v, segment_ids=batch.segment_ids, shared_segment=OPENING)

        (states, model), (wanted, guide) = (
            hidden(config, params, batch.tokens, batch.positions, attend, compute_dtype="float32")
            for config, params in ((student, trainable), (teacher, jax.lax.stop_gradient(frozen))))
        weights = batch.weights[:, 1:]
        total, right, kl = distillation(states[:, :-1], model.head_weight, wanted[:, :-1], guide.head_weight,
                                        batch.tokens[:, 1:], weights, distill.temperature, distill.kl_weight)
        return total, (weights.sum(), {"accuracy": right, "kl": kl})

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="configs/train/student.toml")
    parser.add_argument("--run", type=Path, default=Path("runs/student"), help="checkpoints and metrics")
    parser.add_argument("--out", type=Path, default=Path("qwen_jax/student"), help="the finished Hugging Face folder")
    parser.add_argument("--examples", type=int, default=4000, help="held-out examples of the final table")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists: move it away, or name another folder with --out")
    recipe = load_recipe(args.recipe, StudentRecipe)
    source = resolve(recipe.distill.teacher)
    tokenizer = Tokenizer.from_file(str(source.path / "tokenizer.json"))
    teacher = stack(load_params(source, source.config, "float32"))
    config = model_config(recipe.model, tokenizer)
    initial = prepare_for_retrieval(params_of(init(config, recipe.seed, "float32")), config, recipe.seed)
    print(f"{config.num_parameters:,} parameters learn from {source.config.num_parameters:,}", file=sys.stderr)

    def batch_of(step: int):
        openings = conversations(recipe.seed + 1_000_003 * step, "train", recipe.turns, recipe.explain)
        rows = ((format_messages(opening, False).removesuffix("<|im_end|>\n") + "\n",
                 [(turn.request, turn.answer) for turn in turns]) for opening, turns in openings)
        return next(batches(tokenizer, rows, recipe.batch_size, recipe.sequence_length, recipe.lm_weight))

    forward = jax.jit(lambda params, tokens: build(config, params)(tokens))

    def judge(params, examples):
        return score(answers_in_one_pass(lambda tokens: forward(params, tokens), tokenizer, examples), examples)

    held_out = generate(1, "heldout", 400)

    def evaluate(state) -> dict[str, float]:
        result = judge(unstack(state.trainable), held_out)
        patterns = {name: (p.fraud + p.twin) / 2 for name, p in result.patterns.items()}
        return {"accuracy": result.accuracy, "reason": result.reason, **patterns}

    optimizer = make_optimizer(recipe.optimizer, recipe.steps)
    step = make_train_step(student_loss(config, source.config, recipe.distill), optimizer)
    state = init_state(stack({path: jnp.asarray(value) for path, value in initial.items()}), optimizer)
    run = Run(args.run, recipe.steps, recipe.evaluate_every, keep=1, max_skipped=10, facts=asdict(recipe))
    trained = unstack(fit(state, step, teacher, batch_of, run, evaluate).trainable)
    plot_curves(args.run / "metrics.jsonl", args.run / "curves.png")
    rounded = {path: value.astype(jnp.bfloat16) for path, value in trained.items()}
    write_folder(rounded, config, tokenizer, args.out)
    result = judge({path: value.astype(jnp.float32) for path, value in rounded.items()},
                   generate(2, "heldout", args.examples))
    print(f"{args.examples} held-out examples, weights as written to {args.out}:\n{result.table()}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
