"""Compare this package with transformers on checkpoints: logits and greedy text; check the round trip of weights.

    python scripts/verify_release.py [MODEL...] [--tokens 32] [--prompts 100]

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
from release_prompts import release_prompts  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from qwen_jax import Engine, SamplingParams, UserError, convert, export, load_model  # noqa: E402
from qwen_jax.checkpoint import load_tokenizer, resolve  # noqa: E402
from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy  # noqa: E402

# Released models have activations and logits of up to a few hundred, where float32 itself is good to about 1e-3.
LOGIT_TOLERANCE = 2e-3
TIE = 1e-4  # logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["Qwen/Qwen2.5-0.5B-Instruct"], metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens to compare per prompt")
    parser.add_argument("--prompts", type=int, default=100, help="prompts to compare, of up to 3,000 tokens")
    args = parser.parse_args()
    rows = []
    for model in args.models:
        began = time.perf_counter()
        try:
            checks = verify(model, args.tokens, args.prompts)
        except UserError as error:
            checks = {"readable": (False, str(error))}
        rows += [(model, name, ok, detail) for name, (ok, detail) in checks.items()]
        print(f"{model}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for model, name, ok, detail in rows:
        print(f"{'ok  ' if ok else 'FAIL'}  {model}  {name}: {detail}")
    return 0 if all(ok for _, _, ok, _ in rows) else 1


def verify(model: str, count: int, prompts: int) -> dict[str, tuple[bool, str]]:
    """Check a model's logits and text against transformers', and its round trip; return (passed, figures) by check."""
    source = resolve(model)
    texts = token_prompts(source, prompts)
    ours = load_model(source, dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32, attn_implementation="eager").eval()
    checks = {"logits": same_logits(ours, theirs, sorted(texts, key=len)[:64:10])}
    say(f"{model}: logits compared; {len(texts)} greedy answers of {count} tokens")
    checks["greedy text"] = same_text(answers(ours, texts, count), theirs, texts)
    del ours, theirs
    gc.collect()
    checks["round trip"] = round_trip(source)
    return checks


def token_prompts(source, count: int) -> list[list[int]]:
    """Return the checks' prompts, evenly chosen of all, or fixed random ids for a checkpoint without a tokenizer."""
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, source.config.vocab_size, (4, 12)).tolist()
    prompts = release_prompts(tokenizer)
    chosen = [prompts[place] for place in np.linspace(0, len(prompts) - 1, min(count, len(prompts))).astype(int)]
    return [prompt for prompt in chosen if len(prompt) < source.config.max_position_embeddings]


@torch.no_grad()
def same_logits(ours, theirs, prompts: list[list[int]]) -> tuple[bool, str]:
    """Compare the logits of all positions of prompts; return whether they are close enough, and figures."""
    worst, agree, total = 0.0, 0, 0
    for prompt in prompts:
        expected = theirs(torch.tensor([prompt])).logits[0].numpy()
        computed = np.asarray(ours(np.array([prompt])))[0]
        scale = max(1.0, float(np.abs(expected).max()) / 10)
        worst = max(worst, float(np.abs(computed - expected).max()) / scale)
        agree += int((computed.argmax(-1) == expected.argmax(-1)).sum())
        total += len(prompt)
    return (worst <= LOGIT_TOLERANCE and agree == total,
            f"largest difference {worst:.1e} (bar {LOGIT_TOLERANCE:.0e}, relative to a tenth of the largest logit), "
            f"argmax equal at {agree} of {total} positions")


def answers(model, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return our engine's greedy answers of `count` tokens, with full attention at any length."""
    engine = Engine(model, max_batch_size=8, max_seq_len=max(map(len, prompts)) + count + 1,
                    policy=SchedulePolicy(sparse_above_tokens=1 << 30))
    outs = engine.generate(prompts, SamplingParams(max_tokens=count, temperature=0.0, repetition_penalty=1.0,
                                                   ignore_eos=True))
    engine.close()
    return [out.token_ids for out in outs]


@torch.no_grad()
def same_text(texts: list[list[int]], theirs, prompts: list[list[int]]) -> tuple[bool, str]:
    """Return whether transformers would have chosen every token of our greedy answers, and figures.

    A forward pass over prompt and answer shows its choice after every token. Where it first chooses another token than
    ours, its two logits must be within `TIE` of each other.
    """
    equal = ties = tokens = 0
    worst = 0.0
    for prompt, text in tqdm(list(zip(prompts, texts, strict=True)), desc="transformers", unit="prompt"):
        logits = theirs(torch.tensor([prompt + text[:-1]]), logits_to_keep=len(text)).logits[0]
        different = (logits.argmax(-1) != torch.tensor(text)).nonzero()
        tokens += len(text)
        if not len(different):
            equal += 1
            continue
        place = int(different[0])
        gap = float(logits[place].max() - logits[place, text[place]])
        worst, ties = max(worst, gap), ties + (gap <= TIE)
        say(f"a prompt of {len(prompt)} tokens differs at token {place} of its answer: a gap of {gap:.1e}")
    return equal + ties == len(prompts), (
        f"{equal} of {len(prompts)} answers equal, {tokens} tokens; {ties} differ at a tie within {TIE:.0e}"
        + (f", largest gap {worst:.1e}" if worst else ""))


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
