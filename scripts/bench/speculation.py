"""Measure n-gram speculation against none: tokens per second on answers that copy text, bundled model, float32.

    python scripts/bench/speculation.py [--rounds 5] [--tokens 256] [--draft-tokens 8]

Each conversation asks the model to explain a payment that it has explained before, so its answer copies the earlier
one. Rounds alternate between both engines; the texts must be the same.
"""
import argparse
import itertools
import statistics
import sys
import time

from qwen_jax import Engine, SamplingParams
from qwen_jax.checkpoint import load_model, load_tokenizer, resolve
from qwen_jax.evaluation.fraud.task import conversations

BAR = 1.8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1, help="prompts answered at once")
    parser.add_argument("--draft-tokens", type=int, default=8)
    args = parser.parse_args()
    source = resolve("bundled")
    model, tokenizer = load_model(source, "float32"), load_tokenizer(source)
    options = dict(tokenizer=tokenizer, max_batch_size=max(args.rows, 2))
    engines = {"none": Engine(model, warmup="full", **options),
               "n-gram": Engine(model, warmup="full", speculation="ngram", draft_tokens=args.draft_tokens, **options)}
    prompts = []
    for opening, turns in itertools.islice(conversations(0, "heldout", 8, 1.0), args.prompts):
        turn = next(turn for turn in turns if not turn.verdict)
        first = f"{opening[-1]['content']}\n{turn.request}"
        prompts.append(engines["none"].input_processor.tokens([
            *opening[:-1], {"role": "user", "content": first}, {"role": "assistant", "content": turn.answer},
            {"role": "user", "content": turn.request}]))
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0)
    speeds, texts = {name: [] for name in engines}, {}
    for round_ in range(args.rounds + 1):
        for name, engine in engines.items():
            began, answers = time.perf_counter(), []
            for start in range(0, len(prompts), args.rows):
                answers += engine.generate(prompts[start:start + args.rows], params)
            seconds = time.perf_counter() - began
            texts.setdefault(name, [answer.token_ids for answer in answers])
            if round_:  # the first round fills the prefix cache
                speeds[name].append(sum(len(answer.token_ids) for answer in answers) / seconds)
            print(f"round {round_} {name}: {seconds:.2f} s", file=sys.stderr)
    stats = engines["n-gram"].stats()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = medians["n-gram"] / medians["none"]
    for name, value in medians.items():
        print(f"{name:7} {value:8.0f} tokens/s")
    print(f"acceptance {stats.accepted_tokens / max(stats.drafted_tokens, 1):.2f} of {stats.drafted_tokens} guesses; "
          f"same text: {texts['none'] == texts['n-gram']}; compiles after warm-up: {stats.compiles_after_warmup}")
    met = ratio >= BAR and texts["none"] == texts["n-gram"]
    print(f"ratio {ratio:.2f}, bar {BAR}: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
