"""Compare this package with transformers on checkpoints: logits and greedy text; check the round trip of weights.

    python scripts/verify_release.py [MODEL...] [--tokens 32]

Everything is computed in float32 on CPU, so a model needs about 8 bytes of memory per parameter (0.5B: 4 GB; 7B:
61 GB) and twice its size on disk. Exits with 1 when a check fails.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from qwen_jax import Engine, SamplingParams, UserError, convert, export, load_model  # noqa: E402
from qwen_jax.checkpoint import load_tokenizer, resolve  # noqa: E402

TEXTS = ("The capital of France is", "def fibonacci(n):\n", "1, 1, 2, 3, 5, 8,", "请用一句话介绍一下你自己。")
# Released models have activations and logits of up to a few hundred, where float32 itself is good to about 1e-3.
LOGIT_TOLERANCE = 2e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["Qwen/Qwen2.5-0.5B-Instruct"], metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens to compare per prompt")
    args = parser.parse_args()
    rows = []
    for model in args.models:
        began = time.perf_counter()
        try:
            checks = verify(model, args.tokens)
        except UserError as error:
            checks = {"readable": (False, str(error))}
        rows += [(model, name, ok, detail) for name, (ok, detail) in checks.items()]
        print(f"{model}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for model, name, ok, detail in rows:
        print(f"{'ok  ' if ok else 'FAIL'}  {model}  {name}: {detail}")
    return 0 if all(ok for _, _, ok, _ in rows) else 1


def verify(model: str, count: int) -> dict[str, tuple[bool, str]]:
    """Check a model's logits and text against transformers', and its round trip; return (passed, figures) by check."""
    source = resolve(model)
    prompts = token_prompts(source)
    say(f"{model}: transformers, float32, eager")
    logits, texts = reference(source.path, prompts, count)
    say(f"{model}: ours")
    ours = load_model(source, dtype="float32")
    worst, agree, total = 0.0, 0, 0
    for prompt, expected in zip(prompts, logits, strict=True):
        computed = np.asarray(ours(np.array([prompt])))[0]
        scale = max(1.0, float(np.abs(expected).max()) / 10)
        worst = max(worst, float(np.abs(computed - expected).max()) / scale)
        agree += int((computed.argmax(-1) == expected.argmax(-1)).sum())
        total += len(prompt)
    checks = {"logits": (worst <= LOGIT_TOLERANCE and agree == total,
                         f"largest difference {worst:.1e} (bar {LOGIT_TOLERANCE:.0e}, relative to a tenth of the "
                         f"largest logit), argmax equal at {agree} of {total} positions")}
    longest = max(map(len, prompts)) + count + 1
    engine = Engine(ours, warmup="full", max_batch_size=8, max_seq_len=longest, cache_dir=None)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=count, temperature=0.0, repetition_penalty=1.0,
                                                      ignore_eos=True))
    same = sum(output.token_ids == text for output, text in zip(outputs, texts, strict=True))
    checks["greedy text"] = same == len(prompts), f"{same} of {len(prompts)} prompts, {count} tokens each"
    del ours, engine
    gc.collect()
    checks["round trip"] = round_trip(source)
    return checks


def token_prompts(source) -> list[list[int]]:
    """Return the checks' prompts: token ids of `TEXTS`, or fixed random ids for a checkpoint without a tokenizer."""
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, source.config.vocab_size, (4, 12)).tolist()
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


@torch.no_grad()
def reference(path: Path, prompts: list[list[int]], count: int) -> tuple[list[np.ndarray], list[list[int]]]:
    """Return transformers' logits [T, V] of each prompt, and its greedy continuation of `count` tokens."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None  # every answer has the same length
    logits = [model(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
    texts = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False,
                             temperature=None, top_p=None, top_k=None, repetition_penalty=1.0, pad_token_id=0)
        texts.append(out[0, len(prompt):].tolist())
    return logits, texts


def round_trip(source) -> tuple[bool, str]:
    """Convert a checkpoint to our format and export it again; return whether all tensors are the same, and counts."""
    if source.kind != "hf":
        return True, "skipped: already converted"
    with tempfile.TemporaryDirectory() as folder:
        out = export(convert(source.path, Path(folder) / "orbax"), Path(folder) / "hf")
        before, after = tensors(source.path), tensors(out)
        if source.config.tie_word_embeddings:
            before.pop("lm_head.weight", None)
        different = [name for name in before.keys() | after.keys()
                     if name not in before or name not in after or not same(before[name], after[name], name)]
    return not different, f"{len(before)} tensors, {len(different)} differ {different[:3] or ''}"


def tensors(folder: Path) -> dict[str, Path]:
    """Return the safetensors file in which each tensor of a checkpoint lies, by the tensor's name."""
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            files |= dict.fromkeys(handle.keys(), file)
    return files


def same(before: Path, after: Path, name: str) -> bool:
    """Return whether a tensor has the same type, shape and bytes in both files."""
    with safe_open(before, "pt") as a, safe_open(after, "pt") as b:
        x, y = a.get_tensor(name), b.get_tensor(name)
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.contiguous().view(torch.uint8),
                                                                     y.contiguous().view(torch.uint8))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
