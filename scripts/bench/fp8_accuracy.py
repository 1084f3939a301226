"""What 8 bits cost in accuracy: the same questions to an engine in 16 bits and to one in 8.

    python scripts/bench/fp8_accuracy.py [--prompts 200] [--lengths 1024,4096] [--answers 100] [--parts ...]

Bundled model: judgements of payments; and, with the 16-bit engine's own answers given, how often the 8-bit engine's
most likely token is the same, and the difference of the losses. Yardstick: retrieval from long documents.
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
    parser.add_argument("--answers", type=int, default=100, help="at least so many of every family at every length")
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
    limits = Limits(max_batch_size=8, max_seq_len=max_seq_len, prefill_shapes=((8, 64), (1, 512)), recompute_shapes=(),
                    decode_rows=(8,), decode_steps=8)
    engines = {name: Engine.from_pretrained(model, limits=limits, progress=False, **VARIANTS[name]) for name in names}
    say(f"{len(engines)} engines ready")
    return engines


def bundled(names: list[str], count: int, tokens: int) -> None:
    engines = engines_of("bundled", names, 1024)
    examples = generate(1, "heldout", count)
    prompts = [engines[names[0]].tokenizer.encode(format_messages(one.messages), add_special_tokens=False)
               for one in examples]
    said = engines[names[0]].generate(prompts, SamplingParams(max_tokens=tokens, ignore_eos=True, **GREEDY))
    whole = [prompt + output.token_ids for prompt, output in zip(prompts, said, strict=True)]
    right, losses, judged = {}, {}, {}
    for name, engine in engines.items():
        given = engine.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=1, **GREEDY))
        places = [(row, place) for row, prompt in enumerate(prompts) for place in range(len(prompt), len(whole[row]))]
        right[name] = np.array([max(among, key=among.get) == whole[row][place] for row, place in places
                                for among in [given[row].prompt_logprobs[place]]])
        losses[name] = np.array([-given[row].prompt_logprobs[place][whole[row][place]] for row, place in places])
        answers = engine.generate(prompts, SamplingParams(max_tokens=tokens, **GREEDY))
        judged[name] = score([answer.text for answer in answers], examples)
        say(f"{name}: {engine.stats().guard_trips} trips")
    print(f"bundled model, {count} prompts, {len(places)} tokens")
    for name in names:
        print(f"{name:>14}: same token {right[name].mean():.2%}, loss {losses[name].mean():.4f} "
              f"({losses[name].mean() - losses[names[0]].mean():+.4f}), judgement {judged[name].accuracy:.3f}, "
              f"with reason {judged[name].reason:.3f} ({judged[name].reason / judged[names[0]].reason:.3f})",
              flush=True)


def yardstick(names: list[str], lengths: list[int], families: list[str], answers: int) -> None:
    engines = engines_of("yardstick", names, lengths[-1])
    print(f"{'':30}{'answers':>8}" + "".join(f"{name:>15}" for name in names))
    for length in lengths:
        for family in families:
            right = {name: [] for name in names}
            for document in itertools.count():
                if len(right[names[0]]) >= answers:
                    break
                asked = samples_of(family, f"fp8 {document}", length, engines[names[0]].tokenizer, 8)
                for name, engine in engines.items():
                    params = [SamplingParams(max_tokens=one.max_tokens, **GREEDY) for one in asked]
                    outputs = engine.generate([one.prompt for one in asked], params)
                    right[name] += [found(output.text, one.expected) == 1
                                    for output, one in zip(outputs, asked, strict=True)]
            shares = {name: np.mean(some) for name, some in right.items()}
            print(f"{length:>7,} {family:<22}{len(right[names[0]]):>8}" + "".join(
                f"{share:>7.1%} ({share / shares[names[0]]:.3f})" for share in shares.values()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
