"""Teach the bundled model a new fraud pattern through a LoRA adapter of less than 1 % of its parameters.

    python scripts/bench/new_pattern.py [--steps 200] [--rank 3]

The pattern: users can be *suspended*, a word that no training example contains. In a fraud's twin the suspended user
and the valid user are exchanged. The adapter learns from accounts of the training split, half of them with the new
pattern; the scores are those of the held-out split before and after training, for the new pattern and for the eight old
patterns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jax

from qwen_jax.checkpoint import load_params, load_tokenizer, resolve
from qwen_jax.checkpoint.adapters import load_adapter
from qwen_jax.evaluation.fraud.score import answers_in_one_pass, score
from qwen_jax.evaluation.fraud.task import Example, generate
from qwen_jax.model import build
from qwen_jax.model.lora import merge_adapter, num_parameters
from qwen_jax.training.finetune import train
from qwen_jax.training.recipe import Lora, Optimizer, Recipe

NEW, BASE = "R09", "R08"  # the new pattern takes the place of the deleted user


def suspended(examples: list[Example]) -> list[Example]:
    """Return those of the examples that are about a deleted user, changed so that the user is suspended instead."""
    changed = []
    for example in examples:
        if example.pattern == BASE:
            system, user = example.messages
            user = {**user, "content": user["content"].replace(" deleted", " suspended")}
            answer = example.answer.replace(BASE, NEW).replace(" deleted", " suspended")
            reason = NEW if example.reason == BASE else example.reason
            changed.append(replace(example, messages=[system, user], answer=answer, reason=reason))
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--examples", type=int, default=1600, help="held-out examples of the old patterns")
    args = parser.parse_args()
    source = resolve("bundled")
    config, tokenizer = source.config, load_tokenizer(source).backend_tokenizer
    params = load_params(source, config, "float32")
    forward = jax.jit(lambda params, tokens: build(config, params)(tokens))
    new, old = suspended(generate(21, "heldout", args.examples * 2)), generate(22, "heldout", args.examples)

    def accuracy(params, examples):
        return score(answers_in_one_pass(lambda tokens: forward(params, tokens), tokenizer, examples), examples)

    before = accuracy(params, new), accuracy(params, old)
    with tempfile.TemporaryDirectory() as folder:
        examples = suspended(generate(31, "train", 16_000)) + generate(32, "train", 2_000)
        with open(Path(folder) / "train.jsonl", "w", encoding="utf-8") as file:
            for example in examples:
                messages = [*example.messages, {"role": "assistant", "content": example.answer}]
                file.write(json.dumps({"messages": messages}) + "\n")
        result = train(Recipe(
            model="bundled", data=(str(Path(folder) / "train.jsonl"),), output=str(Path(folder) / "run"),
            steps=args.steps, sequence_length=256, batch_size=16, compute_dtype="float32", checkpoint_every=args.steps,
            optimizer=Optimizer(learning_rate=args.learning_rate, warmup_steps=20),
            lora=Lora(args.rank, 2.0 * args.rank, ("q_proj", "v_proj"))))
        lora, adapter = load_adapter(result, config)
    merged = merge_adapter(config, params, adapter, lora)
    after = accuracy(merged, new), accuracy(merged, old)
    share = num_parameters(config, lora) / config.num_parameters
    print(f"{num_parameters(config, lora):,} parameters trained, {share:.2%} of the model's", file=sys.stderr)
    print(f"{'':24} {'before':>8} {'after':>8}\n"
          f"{'suspended user':24} {before[0].accuracy:8.4f} {after[0].accuracy:8.4f}   of {len(new)}\n"
          f"{'the eight old patterns':24} {before[1].accuracy:8.4f} {after[1].accuracy:8.4f}   of {len(old)}\n"
          f"parameters trained: {share:.2%}")


if __name__ == "__main__":
    main()
