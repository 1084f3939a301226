"""Grammars that are hostile by their depth, width, intersections, ambiguity or damage, each tried under a bound.

    python tests/hostile/grammar_fuzz.py [--count 2000] [--seed 0] [--first 0]

Every grammar is refused in a sentence or followed for a while, in little time and memory; after each of them a schema
compiles as before. The same is run in a short form by test_grammar_fuzz.py.
"""

import argparse
import json
import random
import sys
import time

import numpy as np
import psutil

from qwen_jax import UserError
from qwen_jax.checkpoint import load_tokenizer, resolve
from qwen_jax.engine.api.structured_output import StructuredOutput
from qwen_jax.engine.frontend.grammar import GrammarCompiler, GrammarError
from qwen_jax.serving.http.tool_calls import forced_calls

COMPILE_SECONDS = 3.0  # of this process's processor time; a trial's own is limited to one
WALL_SECONDS = 20.0  # the two together, beside other load
STEP_SECONDS = 0.75  # for a token
ANSWER_SECONDS = 2.0  # for 60 tokens
ANSWER_BYTES = 192 << 20  # what a compilation and an answer may add to this process, the allocator's slack included
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SMALL = StructuredOutput(json_schema={"type": "object", "properties": {"verdict": {"enum": ["fraud", "legit"]}},
                                      "required": ["verdict"], "additionalProperties": False})


def count(rng: random.Random, most: int) -> int:
    """Return a number from 1 to ``most``, as likely below 10 as in any other decade."""
    return int(most ** rng.random())


def reference_chain(rng: random.Random) -> dict:
    """Return a schema of references that go through each other."""
    n = count(rng, 4000)
    step = rng.choice([lambda ref: ref, lambda ref: {"type": "object", "properties": {"a": ref}},
                       lambda ref: {"anyOf": [ref, {"type": "null"}]}, lambda ref: {"allOf": [ref, ref]},
                       lambda ref: {"type": "array", "items": {"oneOf": [{"type": "null"}, ref]}},
                       lambda ref: {"type": "object", "properties": {"a": ref, "b": ref}, "required": ["a"]}])
    last = rng.choice([{"type": "integer"}, {"$ref": "#/$defs/d0"}, {"type": "string", "pattern": "^a*$"}])
    definitions = {f"d{i}": step({"$ref": f"#/$defs/d{i + 1}"}) for i in range(n)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{n}": last}}


def pattern(rng: random.Random, depth: int = 0) -> str:
    """Return a random regular expression."""
    if depth > 4 or rng.random() < 0.3:
        letter = rng.choice(LETTERS)
        return rng.choice([letter, letter * 9, ".", r"\d", r"\w", "[^,]", r"\p{L}", "[a-z]", "é"])
    inner = [pattern(rng, depth + 1) for _ in range(rng.randint(1, 4))]
    high = count(rng, 1000)
    return rng.choice([lambda: "".join(inner), lambda: f"({'|'.join(inner)})", lambda: f"({inner[0]})*",
                       lambda: f"({inner[0]}){{{rng.randint(0, high)},{high}}}", lambda: f".*{inner[0]}.*",
                       lambda: f"({inner[0]})?{''.join(inner[1:])}", lambda: f"({inner[0]}|z.*{inner[-1]}.*)"])()


def intersection(rng: random.Random) -> dict:
    """Return a schema of many conditions on the same value."""
    n = count(rng, 40)
    one = rng.choice([lambda i: {"type": "string", "pattern": f".*{LETTERS[i % 26]}.*"},
                      lambda i: {"type": "string", "pattern": f"^(x|z.*{LETTERS[i % 26]}.*)$", "maxLength": 50 + i},
                      lambda i: {"type": "string", "pattern": pattern(rng)},
                      lambda i: {"type": "integer", "multipleOf": 2 * i + 1, "maximum": 10**9 - i},
                      lambda i: {"type": "number", "multipleOf": rng.choice([0.1, 0.7, 3, 0.001])},
                      lambda i: {"anyOf": [{"properties": {f"a{i}": {"const": j}}, "required": [f"a{i}"]}
                                           for j in range(rng.randint(1, 3))]},
                      lambda i: {"type": "object", "patternProperties": {f"^{LETTERS[i % 26]}+{i}": {"type": "null"}}}])
    return {"allOf": [one(i) for i in range(n)]}


def wide_schema(rng: random.Random) -> dict:
    """Return a schema with many fields, values or alternatives."""
    n = count(rng, 6000)
    required = [f"p{i}" for i in range(n) if rng.random() < rng.choice([0, 0.5, 1])]
    return rng.choice([
        lambda: {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(n)},
                 "required": required, "additionalProperties": rng.random() < 0.5},
        lambda: {"enum": [f"value {i}" for i in range(n)]},
        lambda: {"anyOf": [{"type": "object", "properties": {f"k{i}": {"const": i}}} for i in range(n)]},
        lambda: {"type": "array", "prefixItems": [{"type": "string", "maxLength": i} for i in range(n)]},
        lambda: {"type": "string", "minLength": n, "maxLength": n + count(rng, 10**6)},
        lambda: {"type": "array", "minItems": n, "items": {"type": "array", "minItems": n, "items": {}}}])()


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    """Return a schema of random keywords, in part contradictory."""
    def below() -> dict:
        return random_schema(rng, depth + 1) if depth < 5 else {"type": rng.choice(["string", "integer", "null"])}

    schema: dict = {}
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(["type", "properties", "items", "anyOf", "allOf", "oneOf", "pattern", "format", "enum", "$ref",
                          "minLength", "maximum", "multipleOf", "patternProperties", "additionalProperties",
                          "required"])
        schema[key] = {
            "type": lambda: rng.choice(["object", "array", "string", "number", ["string", "null"]]),
            "properties": lambda: {rng.choice(LETTERS): below() for _ in range(rng.randint(1, 4))},
            "items": below, "additionalProperties": below, "pattern": lambda: pattern(rng), "$ref": lambda: "#",
            "format": lambda: rng.choice(["date-time", "email", "uuid", "ipv6", "uri"]),
            "enum": lambda: [1, "a", None, {"a": [1]}], "minLength": lambda: count(rng, 10**6),
            "maximum": lambda: rng.uniform(-1e12, 1e12), "multipleOf": lambda: rng.choice([3, 0.01, 7919]),
            "patternProperties": lambda: {pattern(rng): below()}, "required": lambda: ["a", "zz"],
        }.get(key, lambda: [below() for _ in range(rng.randint(1, 4))])()
    return schema


def rule_chain(rng: random.Random) -> str:
    """Return a grammar of rules or terminals that go through each other."""
    n, name = count(rng, 5000), rng.choice("rR")
    step = rng.choice(["{}", "{} {}", "({} | \"y\")", "{}?", "{}*", '"x" {}', "{} | {}", "({}){{2,3}}"])
    rules = [f"{name}{i}: {step.format(*[f'{name}{i + 1}'] * 2)}" for i in range(n)]
    return "\n".join([f"start: {name}0", *rules, f'{name}{n}: "a"'])


def random_rules(rng: random.Random) -> str:
    """Return a grammar of random rules, mostly ambiguous, and of terminals with intersections and complements."""
    rules, terminals = [f"r{i}" for i in range(count(rng, 60))], [f"T{i}" for i in range(count(rng, 12))]
    def item() -> str:
        name = rng.choice(rules + terminals + ['"a"', '"b"', "start"])
        return name + rng.choice(["", "", "", "?", "*", "+", f"{{0,{count(rng, 5000)}}}"])

    def terminal(depth: int = 0) -> str:
        if depth > 3 or rng.random() < 0.4:
            return f"/{pattern(rng)}/"
        parts = [terminal(depth + 1) for _ in range(rng.randint(2, 6))]
        return rng.choice([f"({' & '.join(parts)})", f"({' | '.join(parts)})", f"~({parts[0]})", " ".join(parts)])

    lines = [f"{rule}: " + " | ".join(" ".join(item() for _ in range(rng.randint(1, 4))) or '"c"'
                                      for _ in range(rng.randint(1, 4))) for rule in ["start", *rules]]
    return "\n".join(lines + [f"{name}: {terminal()}" for name in terminals])


def ambiguous(rng: random.Random) -> str:
    """Return a grammar whose number of parses grows with the length of the answer."""
    n = rng.randint(1, 30)
    return rng.choice(['start: e\ne: e e e | e e | "a" | "b"', 'start: e\ne: e e | "a"',
                       "start: " + "(" + " ".join(f"x{i}?" for i in range(n)) + ")*\n"
                       + "\n".join(f'x{i}: "a" | "b"' for i in range(n)),
                       "start: e0\n" + "\n".join(f'e{i}: e{i} e{(i + 1) % n} | "a" | e{(i + 2) % n}' for i in range(n)),
                       "start: (A | B | C)*\nA: /a[ab]{0,30}c?/\nB: /[ab]*a[ab]{18}/\nC: /(.*a.{0,40}b.{0,40})+/"])


def other_text(rng: random.Random) -> str:
    """Return a grammar with nested brackets, substrings or schemas in it."""
    n, few = count(rng, 20_000), rng.randint(1, 50)
    return rng.choice([lambda: "start: " + "(" * n + '"a"' + ")" * n,
                       lambda: "start: T\nT: " + "~(" * n + "/a/" + ")" * n,
                       lambda: 'start: %regex {"substring_words": ' + json.dumps("word " * n) + "}",
                       lambda: 'start: %regex {"substring_chars": ' + json.dumps("ab" * n) + "}",
                       lambda: f"start: %json {json.dumps(intersection(rng))}",
                       lambda: "start: " + " ".join(f"%json {json.dumps(random_schema(rng))}" for _ in range(few)),
                       lambda: "start: <[0-" + str(n) + "]>* <|im_end|>",
                       lambda: "start: T\nT: " + " & ".join(f"/.*{LETTERS[i % 26]}{i}.*/" for i in range(few))])()


def tools(rng: random.Random) -> str:
    """Return the grammar of calls of tools with such schemas."""
    makers = [reference_chain, intersection, wide_schema, random_schema]
    schemas = [rng.choice(makers)(rng) for _ in range(rng.randint(1, 5))]
    return forced_calls([{"name": f"tool{i}", "parameters": {"type": "object", "properties": {"a": schema}}}
                         for i, schema in enumerate(schemas)], several=rng.random() < 0.5)


def damaged(rng: random.Random, text: str) -> str:
    """Return the text with a piece deleted, repeated or replaced."""
    for _ in range(rng.randint(0, 3)):
        at, length = rng.randrange(len(text) + 1), count(rng, 40)
        piece = rng.choice(["", text[at : at + length] * count(rng, 20), rng.choice('{}[]()|&~*"\\:\n0é')])
        text = text[:at] + piece + text[at + length :]
    return text


def hostile(rng: random.Random) -> tuple[str, StructuredOutput | None]:
    """Return a kind and a grammar of it; None where damage left no grammar to ask for."""
    makers = {"json_schema": [reference_chain, intersection, wide_schema, random_schema],
              "grammar": [rule_chain, random_rules, ambiguous, other_text, tools],
              "regex": [pattern, lambda rng: "|".join(pattern(rng) for _ in range(count(rng, 2000))),
                        lambda rng: "(" * (n := count(rng, 3000)) + "a" + ")*" * n]}
    kind = rng.choice(["json_schema", "json_schema", "grammar", "grammar", "regex", "choice"])
    if kind == "choice":
        longest = count(rng, 200)
        return kind, StructuredOutput(choice=["".join(rng.choices(LETTERS + ' "\\é', k=rng.randint(1, longest)))
                                              for _ in range(count(rng, 60_000))])
    make = rng.choice(makers[kind])
    text = make(rng)
    text = text if isinstance(text, str) else json.dumps(text)
    if rng.random() < 0.15:
        text = damaged(rng, text)
    try:
        return f"{kind}/{make.__name__}", StructuredOutput(**{kind: text})
    except UserError:
        return kind, None


class Fuzzer:
    """Run of hostile grammars against one compiler, each under the bounds above."""

    def __init__(self, seed: int) -> None:
        tokenizer = load_tokenizer(resolve("bundled"))
        self.compiler = GrammarCompiler(tokenizer, len(tokenizer), (942, 940))
        self.seed, self.rng, self.process = seed, random.Random(seed), psutil.Process()
        self.outcomes: dict[str, int] = {}
        self.follow(SMALL)

    def run(self, number: int) -> None:
        """Try the hostile grammar of this number and then a small one. AssertionError beyond a bound."""
        self.rng = random.Random(f"{self.seed} {number}")
        kind, spec = hostile(self.rng)
        if spec is None:
            return
        memory, began, processor = self.process.memory_info().rss, time.monotonic(), time.process_time()
        outcome = self.follow(spec)
        spent = (f"{number} ({kind}): {outcome}", time.monotonic() - began, time.process_time() - processor,
                 self.process.memory_info().rss - memory >> 20)
        assert spent[1] < WALL_SECONDS and spent[2] < COMPILE_SECONDS + ANSWER_SECONDS, spent
        assert spent[3] < ANSWER_BYTES >> 20, spent
        began = time.monotonic()
        assert self.follow(SMALL) == "followed" and time.monotonic() - began < 6, number
        self.outcomes[outcome.split(":")[0]] = self.outcomes.get(outcome.split(":")[0], 0) + 1

    def follow(self, spec: StructuredOutput) -> str:
        """Compile a grammar and draw 60 tokens from its masks; return what came of it."""
        processor = time.process_time()
        try:
            matcher = self.compiler.matcher(spec)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500, error
            return f"refused: {error}"
        finally:
            assert time.process_time() - processor < COMPILE_SECONDS, spec.kind
        answer = 0.0
        for _ in range(60):
            began = time.thread_time()
            try:
                mask = matcher.mask()
                if matcher.finished:
                    break
                tokens = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
                matcher.accept(int(self.rng.choice(tokens)))
            except GrammarError as error:
                return f"ended: {error}"
            finally:
                step = time.thread_time() - began
                assert step < STEP_SECONDS, step
            answer += step
            assert answer < ANSWER_SECONDS, answer
        return "followed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="grammars to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first grammar (default: %(default)s)")
    options = parser.parse_args()
    fuzzer, began = Fuzzer(options.seed), time.monotonic()
    for number in range(options.first, options.first + options.count):
        try:
            fuzzer.run(number)
        except BaseException:
            print(f"number {number} of seed {options.seed}")
            raise
        if number % 100 == 99:
            print(f"{number + 1} grammars in {time.monotonic() - began:.0f} s: {fuzzer.outcomes}, "
                  f"{fuzzer.process.memory_info().rss >> 20} MB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
