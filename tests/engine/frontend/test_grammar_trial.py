"""Trials of grammars: what would end or freeze the engine's process is refused in seconds, and compiles as before."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from qwen_jax import UserError
from qwen_jax.checkpoint import load_tokenizer, resolve
from qwen_jax.engine.api.structured_output import StructuredOutput
from qwen_jax.engine.frontend import grammar
from qwen_jax.engine.frontend.grammar import GrammarCompiler
from qwen_jax.engine.frontend.grammar_trial import GrammarTrial

EOS = (942, 940)
TOO_MUCH = "compiling it takes more than"


def chain(length, step=lambda ref: ref):
    """Schema of references that go through each other."""
    definitions = {f"d{i}": step({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{length}": {"type": "integer"}}}


def rules(length):
    return "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(length)), f'r{length}: "a"'])


def small(number):
    return StructuredOutput(json_schema={"type": "object", "properties": {f"p{number}": {"type": "integer"}}})


def all_of(*schemas):
    return StructuredOutput(json_schema={"allOf": list(schemas)})


@pytest.fixture(scope="module")
def compiler():
    tokenizer = load_tokenizer(resolve("bundled"))
    return GrammarCompiler(tokenizer, len(tokenizer), EOS)


def process(compiler):
    compiler.matcher(small(-1))
    return psutil.Process(compiler._trial.process.pid)


@pytest.mark.parametrize("spec, message", [
    (StructuredOutput(json_schema=chain(3000)), "at most 2000, not 3001"),
    (StructuredOutput(grammar=rules(4000)), "at most 2000, not 4002"),
    (StructuredOutput(json_schema=chain(1990, lambda ref: {"anyOf": [{"allOf": [ref]}, {"type": "null"}]})), TOO_MUCH),
    (StructuredOutput(grammar="start: %json " + str(chain(9000)).replace("'", '"')), TOO_MUCH),
    (all_of(*({"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(26))), TOO_MUCH),
    (all_of(*({"type": "integer", "multipleOf": prime} for prime in (2, 3, 5, 7, 11, 13, 17, 19))), TOO_MUCH),
    (StructuredOutput(choice=[f"option {i}" for i in range(50_000)]), "choice must have at most 524288 bytes"),
    (StructuredOutput(regex="a" * 600_000), "regex must have at most"),
], ids=range(8))
def test_what_would_end_or_freeze_the_engine_is_refused(compiler, spec, message):
    before, began, processor = process(compiler), time.monotonic(), time.process_time()
    with pytest.raises(UserError, match=message):
        compiler.matcher(spec)
    assert time.monotonic() - began < 12 and time.process_time() - processor < 1
    assert process(compiler).pid == before.pid
    assert psutil.wait_procs(before.children(), timeout=5)[1] == [], "a trial goes on"


def test_deep_grammars_compile_whatever_the_stack_of_the_caller(compiler):
    """A thread as small as threads may be asks for them, and follows them."""
    deep = chain(600, lambda ref: {"type": "array", "items": {"type": "object", "properties": {"a": ref}}})
    specs = [StructuredOutput(json_schema=chain(1900)), StructuredOutput(json_schema=deep),
             StructuredOutput(grammar=rules(1900))]
    before = threading.stack_size(256 << 10)
    try:
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(lambda: [compiler.matcher(spec).copy().mask().any() for spec in specs])
    finally:
        threading.stack_size(before)
    assert all(asked.result())


def test_many_choices_are_followed(compiler):
    """As rules of their own they fill the parser: more than 2000 of them ended the answer."""
    options = [f"number {i}" for i in range(20_000)]
    matcher, tokenizer = compiler.matcher(StructuredOutput(choice=options)), load_tokenizer(resolve("bundled"))
    for token in tokenizer.encode("number 19999"):
        matcher.accept(token)
        matcher.mask()
    assert matcher.finished


def test_a_process_that_was_killed_is_replaced(compiler):
    before = process(compiler)
    before.kill()
    compiler.matcher(small(0))
    assert process(compiler).pid != before.pid


def test_a_process_that_cannot_run_is_an_error_and_no_mistake_of_the_user_s(monkeypatch):
    monkeypatch.setattr("qwen_jax.engine.frontend.grammar_trial.COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
    trial = GrammarTrial({"size": 300, "special": {}, "eos": [0]})
    with pytest.raises(RuntimeError, match="process that tries grammars") as error:
        trial.check("{}")
    assert not isinstance(error.value, ValueError)


def test_the_process_ends_with_its_compiler_and_imports_little():
    code = """
import sys
import qwen_jax.engine.frontend.trial_process
print(*(name for name in ("jax", "numpy", "transformers", "tokenizers") if name in sys.modules))"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
    tokenizer = load_tokenizer(resolve("bundled"))
    compiler = GrammarCompiler(tokenizer, len(tokenizer), EOS)
    started = process(compiler)
    del compiler
    assert psutil.wait_procs([started], timeout=10)[1] == []


def test_a_grammar_is_compiled_once_while_the_cache_holds_it(compiler, monkeypatch):
    tried, check = [], GrammarTrial.check
    monkeypatch.setattr(GrammarTrial, "check", lambda self, definition: tried.append(1) or check(self, definition))
    first, second = compiler.matcher(small(2)), compiler.matcher(small(2))
    assert len(tried) == 1
    first.accept(load_tokenizer(resolve("bundled")).encode("{")[0])
    assert (first.mask() != second.mask()).any()
    monkeypatch.setattr(grammar, "CACHE_BYTES", 300_000)
    for number in range(3, 10):
        compiler.matcher(small(number))
    assert sum(size for _, size in compiler._cache.values()) <= 300_000
    compiler.matcher(small(2))
    assert len(tried) == 9
