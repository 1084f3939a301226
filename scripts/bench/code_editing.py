"""Measure decoding of a released instruct model on code: guesses by n-grams, JSON by a schema, calls of tools.

    python scripts/bench/code_editing.py MODEL [--parts edit,json,tools] [--count 12] [--dtype float32] [--rounds 2]

edit: the model renames an argument of functions of Python's standard library; answers copy most of the prompt. Engines
with n-gram speculation and without it alternate: tokens per second, the share of guesses accepted, and whether the ids
are the same.
json: the model describes functions as a JSON object of a schema, with the schema as grammar and without: how many
answers are valid, and what a grammar adds to the time of a token where both write as many.
tools: the model gets a tool in its chat format and a question for it: how many answers are calls with valid arguments,
freely and with the call forced by a grammar.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import sys
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jsonschema  # noqa: E402
from workload import say  # noqa: E402

from qwen_jax import Engine, SamplingParams, StructuredOutput  # noqa: E402
from qwen_jax.checkpoint import load_model, load_tokenizer, resolve  # noqa: E402
from qwen_jax.serving.http.tool_calls import forced_calls, parse_tool_calls  # noqa: E402

SCHEMA = {"type": "object", "additionalProperties": False, "required": ["name", "arguments", "returns", "pure"],
          "properties": {"name": {"type": "string"}, "arguments": {"type": "array", "items": {"type": "string"}},
                         "returns": {"type": "string"}, "pure": {"type": "boolean"}}}
TOOL = {"type": "function", "function": {
    "name": "search_code", "description": "Search a repository for a symbol.",
    "parameters": {"type": "object", "required": ["symbol", "language"], "additionalProperties": False,
                   "properties": {"symbol": {"type": "string"},
                                  "language": {"type": "string", "enum": ["python", "c", "rust"]}}}}}
MODULES = ("textwrap", "shutil", "calendar", "statistics", "difflib", "fnmatch", "heapq", "bisect", "random", "string")


def functions(count: int) -> list[tuple[str, str, str]]:
    """Return functions of the standard library of 6 to 20 lines: source, name, first argument but ``self``."""
    found = []
    for module in MODULES:
        source = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and 6 <= node.end_lineno - node.lineno <= 20:
                names = [arg.arg for arg in node.args.args if arg.arg not in ("self", "cls")]
                if names:
                    found.append((ast.get_source_segment(source, node), node.name, names[0]))
    return found[:: max(1, len(found) // count)][:count]


def prompts_of(tokenizer, questions: list[str], **options) -> list[list[int]]:
    return [tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                          return_dict=False, **options) for question in questions]


def greedy(tokens: int, **options) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, repetition_penalty=1.0, **options)


def edit(model, tokenizer, count: int, rounds: int) -> None:
    """Print the speed of renamed functions with and without guesses, and the share of guesses accepted."""
    prompts = prompts_of(tokenizer, [f"Rename the argument `{argument}` to `{argument}_value` in this function. Answer "
                                     f"with the whole function.\n```python\n{source}\n```"
                                     for source, _, argument in functions(count)])
    options = {"tokenizer": tokenizer, "max_batch_size": 2, "max_seq_len": 1024, "warmup": "full"}
    engines = {"none": Engine(model, **options), "n-gram": Engine(model, speculation="ngram", **options)}
    times, ids = {name: [] for name in engines}, {}
    for round_ in range(rounds):
        for name, engine in engines.items():
            began = time.perf_counter()
            ids[name] = [engine.generate([prompt], greedy(192))[0].token_ids for prompt in prompts]
            times[name].append(time.perf_counter() - began)
            say(f"round {round_} {name}: {times[name][-1]:.1f} s")
    stats = engines["n-gram"].stats()
    total = sum(map(len, ids["none"]))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    print(f"edit: {len(prompts)} functions, {total} tokens; {total / seconds['none']:.1f} tokens/s without guesses, "
          f"{total / seconds['n-gram']:.1f} with: {seconds['none'] / seconds['n-gram']:.2f} times; "
          f"{stats.accepted_tokens / max(1, stats.drafted_tokens):.1%} of {stats.drafted_tokens} guesses accepted; "
          f"same ids in {sum(map(list.__eq__, ids['none'], ids['n-gram']))} of {len(prompts)}", flush=True)
    for engine in engines.values():
        engine.close()


def valid(text: str, schema: dict) -> bool:
    """Return whether a text, or the code block in it, is JSON of a schema."""
    body = text.split("```json")[-1].split("```")[0] if "```json" in text else text
    try:
        jsonschema.validate(json.loads(body), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def json_answers(engine, tokenizer, count: int, rounds: int) -> None:
    """Print how many answers are valid JSON of the schema with a grammar and without, and the grammar's cost."""
    prompts = prompts_of(tokenizer, ["Describe this function as a JSON object with the keys name (string), arguments "
                                     "(list of strings), returns (string) and pure (boolean). Answer with JSON only.\n"
                                     f"```python\n{source}\n```" for source, _, _ in functions(count)])
    kinds = {"free": {}, "schema": {"structured_output": StructuredOutput(json_schema=SCHEMA)}}
    texts = {kind: [out.text for out in engine.generate(prompts, greedy(160, **options))]
             for kind, options in kinds.items()}
    for kind, answers in texts.items():
        print(f"json, {kind}: {sum(valid(text, SCHEMA) for text in answers)} of {len(answers)} valid", flush=True)
    kinds["schema"] = {"structured_output": StructuredOutput(regex=r"(.|\n){200,}")}  # as long as without
    per_token = {kind: [] for kind in kinds}
    for _ in range(max(3, rounds)):
        for kind, options in kinds.items():
            began = time.perf_counter()
            engine.generate(prompts[:4], greedy(64, ignore_eos=True, **options))
            per_token[kind].append((time.perf_counter() - began) / 64)
    free, masked = (statistics.median(values) for values in per_token.values())
    print(f"a step of four rows: {1e3 * free:.1f} ms without a grammar, {1e3 * masked:.1f} ms with: "
          f"{masked / free:.2f} times", flush=True)


def tools(engine, tokenizer, count: int) -> None:
    """Print how many answers call the tool with valid arguments, freely and with the call forced."""
    questions = [f"Find where `{name}` is defined in our Python repository." for _, name, _ in functions(count)]
    prompts = prompts_of(tokenizer, questions, tools=[TOOL])
    grammar = StructuredOutput(grammar=forced_calls([TOOL["function"]], False))
    for kind, options in (("free", {}), ("forced", {"structured_output": grammar})):
        outs = engine.generate(prompts, greedy(96, **options))
        print(f"tools, {kind}: {sum(called(out.text) for out in outs)} of {len(outs)} call the tool with valid "
              "arguments", flush=True)


def called(text: str) -> bool:
    calls = parse_tool_calls(text).tool_calls
    return bool(calls) and calls[0].name == TOOL["function"]["name"] and valid(calls[0].arguments,
                                                                              TOOL["function"]["parameters"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--parts", default="edit,json,tools")
    parser.add_argument("--count", type=int, default=12, help="functions (default: %(default)s)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    parts, source = args.parts.split(","), resolve(args.model)
    model, tokenizer = load_model(source, args.dtype), load_tokenizer(source)
    if "edit" in parts:
        edit(model, tokenizer, args.count, args.rounds)
    if {"json", "tools"} & set(parts):
        engine = Engine(model, tokenizer=tokenizer, max_batch_size=8, max_seq_len=1024, warmup="full")
        if "json" in parts:
            json_answers(engine, tokenizer, args.count, args.rounds)
        if "tools" in parts:
            tools(engine, tokenizer, args.count)


if __name__ == "__main__":
    sys.exit(main())
