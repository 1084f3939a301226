"""Measure the accuracy that 8 bits cost: an engine in 16 bits and engines in 8 bits get the same questions.

    python scripts/bench/fp8_accuracy.py [--prompts 200] [--lengths 1024,4096] [--answers 100] [--parts ...]

The bundled model judges payments; then all engines score the 16-bit engine's answers: how often their most likely token
is the same, and the difference of the losses. The yardstick model retrieves from long documents.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
from workload import say  # noqa: E402

from qwen_jax import Engine, SamplingParams  # noqa: E402
from qwen_jax.engine.scheduling.buckets import Limits  # noqa: E402
from qwen_jax.evaluation.fraud.score import score  # noqa: E402
from qwen_jax.evaluation.fraud.task import generate  # noqa: E402
from qwen_jax.evaluation.fraud.text import format_messages  # noqa: E402
from qwen_jax.evaluation.longcontext.suite import RETRIEVAL, found, samples_of  # noqa: E402

GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}
VARIANTS = {"16 bits": {}, "8-bit weights": {"fp8_enabled": True, "kv_cache_dtype": None},
            "e4m3 pages": {"kv_cache_dtype": "e4m3"}, "all, e4m3": {"fp8_enabled": True, "kv_cache_dtype": "e4m3"},
            "8 bits": {"fp8_enabled": True}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lengths", default="1024,4096")
    parser.add_argument("--families", default=",".join(RETRIEVAL))
    parser.add_argument("--answers", type=int, default=100, help="minimum for every family and length")
    parser.add_argument("--parts", default="bundled,yardstick")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    args = parser.parse_args()
    names = args.variants.split(",")
    parts = args.parts.split(",")
    if "bundled" in parts:
        bundled(names, args.prompts, args.tokens)
    if "yardstick" in parts:
        yardstick(names, [int(length) for length in args.lengths.split(",")], args.families.split(","), args.answers)
    return 0


def engines_of(model: str, names: list[str], max_seq_len: int) -> dict[str, Engine]:
    """Make an engine of the model for each of `names`, the combinations of 8 and 16 bits in `VARIANTS`."""
    limits = Limits(max_batch_size=8, max_seq_len=max_seq_len, prefill_shapes=((8, 64), (1, 512)), recompute_shapes=(),
                    decode_rows=(8,), decode_steps=8)
    engines = {name: Engine.from_pretrained(model, warmup="full", limits=limits, progress=False, **VARIANTS[name])
               for name in names}
    say(f"{len(engines)} engines ready")
    return engines


def bundled(names: list[str], count: int, tokens: int) -> None:
    """Print, for variants of the bundled model, agreement with the first, loss and accuracy on held-out payments."""
    engines = engines_of("bundled", names, 1024)
    examples = generate(1, "heldout", count)
    prompts = [engines[names[0]].tokenizer.encode(format_messages(example.messages), add_special_tokens=False)
               for example in examples]
    outputs = engines[names[0]].generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True, **GREEDY))
    whole = [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)]
    agrees, losses, scores = {}, {}, {}
    for name, engine in engines.items():
        scored = engine.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=1, **GREEDY))
        places = [(row, place) for row, prompt in enumerate(prompts) for place in range(len(prompt), len(whole[row]))]
        agrees[name] = np.array([max(logprobs, key=logprobs.get) == whole[row][place] for row, place in places
                                 for logprobs in [scored[row].prompt_logprobs[place]]])
        losses[name] = np.array([-scored[row].prompt_logprobs[place][whole[row][place]] for row, place in places])
        answers = engine.generate(prompts, SamplingParams(max_tokens=tokens, **GREEDY))
        scores[name] = score([answer.text for answer in answers], examples)
        say(f"{name}: {engine.stats().guard_trips} trips")
    print(f"bundled model, {count} prompts, {len(places)} tokens")
    for name in names:
        print(f"{name:>14}: same token {agrees[name].mean():.2%}, loss {losses[name].mean():.4f} "
              f"({losses[name].mean() - losses[names[0]].mean():+.4f}), judgement {scores[name].accuracy:.3f}, "
              f"with reason {scores[name].reason:.3f} ({scores[name].reason / scores[names[0]].reason:.3f})",
              flush=True)


def yardstick(names: list[str], lengths: list[int], families: list[str], answers: int) -> None:
    """Print the share of right answers of the yardstick model's variants, by document length and family of tasks."""
    engines = engines_of("yardstick", names, lengths[-1])
    print(f"{'':30}{'answers':>8}" + "".join(f"{name:>15}" for name in names))
    for length in lengths:
        for family in families:
            right = {name: [] for name in names}
            for document in itertools.count():
                if len(right[names[0]]) >= answers:
                    break
                samples = samples_of(family, f"fp8 {document}", length, engines[names[0]].tokenizer, 8)
                for name, engine in engines.items():
                    params = [SamplingParams(max_tokens=sample.max_tokens, **GREEDY) for sample in samples]
                    outputs = engine.generate([sample.prompt for sample in samples], params)
                    right[name] += [found(output.text, sample.expected) == 1
                                    for output, sample in zip(outputs, samples, strict=True)]
            shares = {name: np.mean(verdicts) for name, verdicts in right.items()}
            print(f"{length:>7,} {family:<22}{len(right[names[0]]):>8}" + "".join(
                f"{share:>7.1%} ({share / shares[names[0]]:.3f})" for share in shares.values()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
