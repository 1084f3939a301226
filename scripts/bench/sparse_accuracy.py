"""Compare the number of right answers with full and with sparse attention on the long-context suite.

    python scripts/bench/sparse_accuracy.py [MODEL] [--lengths 4096,8192] [--answers 200] [--json FILE]

Every document is followed by several questions, each a prompt of its own; the engine finds the document in its prefix
cache. Three engines answer the same prompts: full attention; sparse attention with default settings; and sparse
attention without a dense tail (the last tokens of a prompt, which otherwise attend to everything), as if the question
stood in the middle of the prompt. Then come answers of 512 tokens that keep referring back to the prompt: a grammar
dictates all of a list of notes but their values. Ratios are sparse to full, with the 95 % interval of a bootstrap over
documents.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402
from qwen_kernels.sparse_attention import Sparsity  # noqa: E402
from workload import say  # noqa: E402

from qwen_jax import Engine, SamplingParams, StructuredOutput  # noqa: E402
from qwen_jax.checkpoint import read_sparsity, resolve  # noqa: E402
from qwen_jax.engine.scheduling.schedule_policy import SchedulePolicy
from qwen_jax.evaluation.longcontext.samples import draw  # noqa: E402
from qwen_jax.evaluation.longcontext.suite import RETRIEVAL, Sample, found, samples_of  # noqa: E402
from qwen_jax.evaluation.longcontext.tasks import Document  # noqa: E402

QUESTIONS = {"single_needle": 12, "many_keys": 16, "many_values": 8, "many_queries": 12, "variable_tracking": 4,
             "account_history": 16}  # per document
LONG = "long answers"
NOTES, LONG_TOKENS, LONG_DOCUMENTS = 80, 512, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="yardstick")
    parser.add_argument("--lengths", default="4096,8192")
    parser.add_argument("--answers", type=int, default=200, help="minimum for every family and length")
    parser.add_argument("--questions", type=int, help="questions to each document; by default as many as fit a family")
    parser.add_argument("--families", default=",".join((*RETRIEVAL, LONG)))
    parser.add_argument("--engines", default="full,sparse,middle")
    parser.add_argument("--selector", help="selector that replaces the default")
    parser.add_argument("--budget", type=float, help="budget that replaces the one stored with the model")
    parser.add_argument("--json", help="file to append one line to for every family and length")
    args = parser.parse_args()
    lengths = sorted(int(length) for length in args.lengths.split(","))
    names = args.engines.split(",")
    began = time.perf_counter()
    engines = {name: engine_of(args.model, name, lengths[-1], selector=args.selector, budget=args.budget)
               for name in names}
    say(f"{len(names)} engines ready after {time.perf_counter() - began:.0f} s")
    print(f"{'':>28}{'answers':>9}" + "".join(f"{name:>9}" for name in names)
          + "".join(f"{name + ' / full':>26}" for name in names[1:]))
    for length in lengths:
        for family in args.families.split(","):
            measured = (long_answers(engines, family, length, args.answers) if family == LONG else
                        short_answers(engines, family, length, args.answers, args.questions or QUESTIONS[family]))
            row = {"family": family, "length": length, "answers": sum(len(verdicts) for verdicts in measured["full"]),
                   **{name: float(np.mean(np.concatenate(right))) for name, right in measured.items()}}
            cells = ""
            for name in names[1:]:
                ratio, low, high = row[f"{name} / full"] = ratio_of(measured[name], measured["full"])
                cells += f"{ratio:>11.3f} [{low:.3f}, {high:.3f}]"
            print(f"{length:>6,} {family:<21}{row['answers']:>9}" + "".join(f"{row[name]:>9.1%}" for name in names)
                  + cells, flush=True)
            if args.json:
                with open(args.json, "a") as file:
                    file.write(json.dumps(row) + "\n")
    print("density: " + ", ".join(f"{name} {engine.stats().sparse_density:.3f}" for name, engine in engines.items()))
    say(f"{time.perf_counter() - began:.0f} s")
    return 0


def engine_of(model: str, name: str, length: int, **overrides) -> Engine:
    """Make an engine with full attention ("full"), with sparse ("sparse"), or with sparse and no dense tail ("middle").

    overrides: fields of `Sparsity` that replace those stored with the model; None keeps the stored value.
    """
    source = resolve(model)
    layers = read_sparsity(source, source.config) or (Sparsity(),) * source.config.num_layers
    changed = {field: value for field, value in overrides.items() if value is not None}
    if name == "middle":
        changed["dense_tail"] = 0
    layers = tuple(dataclasses.replace(layer, **changed) for layer in layers)
    policy = SchedulePolicy(sparse_above_tokens=1 << 30) if name == "full" else SchedulePolicy(sparse_above_tokens=1024)
    return Engine.from_pretrained(model, warmup="full", dtype="float32", max_seq_len=length, max_batch_size=4,
                                  policy=policy, sparsity=layers, progress=False)


def short_answers(engines: dict[str, Engine], family: str, length: int, answers: int, questions: int
                  ) -> dict[str, list[list[bool]]]:
    """Ask engines at least `answers` questions of a task family; return, by engine and document, which are right."""
    documents: list[list[Sample]] = []
    while sum(map(len, documents)) < answers:
        documents.append(samples_of(family, f"accuracy {len(documents)}", length,
                                    next(iter(engines.values())).tokenizer, questions))
    right = {name: [] for name in engines}
    for index, document in enumerate(documents):
        for name, engine in engines.items():
            # The first question runs alone, so that the others find its pages in the prefix cache.
            outputs = [output for part in (document[:1], document[1:]) if part for output in engine.generate(
                [sample.prompt for sample in part], [SamplingParams(
                    max_tokens=sample.max_tokens, temperature=0.0, repetition_penalty=1.0) for sample in part])]
            right[name].append([found(output.text, sample.expected) == 1
                                for output, sample in zip(outputs, document, strict=True)])
        say(f"{family} at {length}: document {index + 1} of {len(documents)}, right "
            + ", ".join(f"{name} {sum(map(sum, verdicts))}" for name, verdicts in right.items()))
    return right


def long_answers(engines: dict[str, Engine], family: str, length: int, answers: int) -> dict[str, list[list[bool]]]:
    """Let engines list a document's notes in `LONG_TOKENS` tokens; return, by engine and document, which are right."""
    tokenizer = next(iter(engines.values())).tokenizer

    def prompt_of(document: Document) -> list[int]:
        text = tokenizer.apply_chat_template([{"role": "user", "content": document.text}], add_generation_prompt=True,
                                             tokenize=False)
        return tokenizer.encode(text, add_special_tokens=False)

    right = {name: [] for name in engines}
    index = 0
    while index < LONG_DOCUMENTS or sum(map(len, right["full"])) < answers:
        document = draw("many_keys", f"{family} {index}", length - LONG_TOKENS,
                        lambda document: len(prompt_of(document)), NOTES)
        form = StructuredOutput(regex="\n".join(f"{re.escape(note.prefix)} [a-z]+\\." for note in document.questions))
        params = SamplingParams(max_tokens=LONG_TOKENS, temperature=0.0, repetition_penalty=1.0, structured_output=form)
        for name, engine in engines.items():
            output, = engine.generate([prompt_of(document)], params)
            lines = output.text.split("\n")[:-1] if output.finish_reason == "length" else output.text.split("\n")
            right[name].append([line == note.prefix + note.answer for line, note in zip(lines, document.questions)])
        shortest = min(len(verdicts[-1]) for verdicts in right.values())  # compare the notes that all engines wrote
        for verdicts in right.values():
            verdicts[-1] = verdicts[-1][:shortest]
        index += 1
        say(f"{family} at {length}: {sum(map(len, right['full']))} notes, right "
            + ", ".join(f"{name} {sum(map(sum, verdicts))}" for name, verdicts in right.items()))
    return right


def ratio_of(ours: list[list[bool]], theirs: list[list[bool]], draws: int = 10_000) -> tuple[float, float, float]:
    """Return the number of right answers in `ours` over that in `theirs`, and the ends of its 95 % interval."""
    counts = np.array([[sum(our), sum(their)] for our, their in zip(ours, theirs, strict=True)], np.float64)
    chosen = np.random.default_rng(0).integers(len(counts), size=(draws, len(counts)))
    sums = counts[chosen].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / np.maximum(sums[:, 1], 1), [.025, .975])
    total = counts.sum(axis=0)
    return float(total[0] / max(total[1], 1)), float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())
