"""Compare llama.cpp's greedy tokens on an exported GGUF file with this engine's: the share of equal answers.

    python scripts/bench/gguf_agreement.py --python ENV/bin/python [--model bundled] [--dtype float16] [--prompts 50]

Prompts are card transactions to judge (`qwen_jax.evaluation.fraud.task`), in the model's chat template. Both programs
get the same token ids; a second count says for how many prompts llama.cpp's tokenizer makes the same ids of the text.
ENV is an environment with llama-cpp-python (`llama_cpp.py` says how to make it). Exits with 1 when the share is below
`--bar`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from workload import Peer  # noqa: E402

from qwen_jax import Engine, SamplingParams  # noqa: E402
from qwen_jax.checkpoint import export_gguf, load_generation_config, load_tokenizer, resolve  # noqa: E402
from qwen_jax.evaluation.fraud.task import generate  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="the Python of an environment with llama-cpp-python")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--dtype", default="float16", help="of the GGUF file: float16, bfloat16 or q8_0")
    parser.add_argument("--engine-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--bar", type=float, default=0.95, help="the smallest share that passes")
    args = parser.parse_args()
    source = resolve(args.model)
    tokenizer, stop = load_tokenizer(source), load_generation_config(source).eos_token_ids
    texts = [tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
             for example in generate(seed=2, split="heldout", count=args.prompts)]
    prompts = [tokenizer(text).input_ids for text in texts]
    context = max(map(len, prompts)) + args.max_tokens
    engine = Engine.from_pretrained(source.path, warmup="full", dtype=args.engine_dtype, max_batch_size=8,
                                    max_seq_len=context)
    ours = engine.generate(prompts, SamplingParams(max_tokens=args.max_tokens, temperature=0.0))
    with tempfile.TemporaryDirectory() as scratch:
        peer = Peer(args.python, "gguf_runner.py")
        peer.ask(gguf=str(export_gguf(source, Path(scratch) / "model.gguf", args.dtype)), context=context)
        theirs = [peer.ask(text=text, tokens=tokens, stop=stop, max_tokens=args.max_tokens)
                  for text, tokens in zip(texts, prompts)]
        peer.close()
    same = [output.token_ids == peer_output["continued"] for output, peer_output in zip(ours, theirs)]
    split = sum(tokens == peer_output["tokenized"] for tokens, peer_output in zip(prompts, theirs))
    for index, (output, peer_output) in enumerate(zip(ours, theirs)):
        if not same[index]:
            print(f"prompt {index}: ours {output.text!r}, llama.cpp {tokenizer.decode(peer_output['continued'])!r}")
    tokens = sum(len(output.token_ids) for output in ours)
    print(f"same greedy tokens: {sum(same)} of {len(same)} prompts ({tokens} tokens), GGUF {args.dtype} against the "
          f"engine in {args.engine_dtype}; same token ids of the text: {split} of {len(same)}")
    sys.exit(sum(same) < args.bar * len(same))


if __name__ == "__main__":
    main()
