"""Answers that follow a grammar, beside others that do not."""
import dataclasses
import json
import re

import pytest
from test_engine_adapters import CONFIG

from qwen_jax import Engine, SamplingParams, StructuredOutput, UserError
from qwen_jax.checkpoint import load_tokenizer, resolve
from qwen_jax.engine.frontend.grammar import Matcher
from qwen_jax.engine.scheduling.buckets import Limits
from qwen_jax.engine.scheduling.speculation import NGRAM
from qwen_jax.model import init

SCHEMA = {"type": "object", "properties": {"verdict": {"enum": ["fraud", "legit"]}, "score": {"type": "integer"},
                                           "why": {"type": "string", "maxLength": 12}},
          "required": ["verdict", "score", "why"], "additionalProperties": False}
JSON = SamplingParams(max_tokens=150, temperature=1.0, seed=0, structured_output=StructuredOutput(json_schema=SCHEMA))
CODE = StructuredOutput(regex=r"[A-C]{2}-\d{3}")
FREE = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
LIMITS = Limits(max_batch_size=4, max_seq_len=256, prefill_shapes=((4, 64),), recompute_shapes=(), decode_rows=(4,),
                decode_steps=4, draft_tokens=3)


@pytest.fixture(scope="module")
def engine():
    tokenizer = load_tokenizer(resolve("bundled"))
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer) + 7, eos_token_id=tokenizer.eos_token_id)
    return Engine(init(config, 0, "float32"), tokenizer=tokenizer, limits=LIMITS, speculation=NGRAM, progress=False)


def test_a_random_model_answers_in_json(engine):
    params = [dataclasses.replace(JSON, seed=seed) for seed in range(8)]
    for output in engine.generate(["verdict:"] * 8, params):
        answer = json.loads(output.text)
        assert output.finish_reason == "stop" and set(answer) == {"verdict", "score", "why"}
        assert answer["verdict"] in ("fraud", "legit") and isinstance(answer["score"], int)
    assert engine.stats().compiles_after_warmup == 0


def test_others_in_the_batch_say_what_they_say_alone(engine):
    alone = [engine.generate(prompt, FREE)[0].token_ids for prompt in ("one", "two and three")]
    coded = dataclasses.replace(FREE, structured_output=CODE)
    outputs = engine.generate(["one", "x", "two and three", "y"], [FREE, coded, FREE, JSON])
    assert [outputs[0].token_ids, outputs[2].token_ids] == alone
    assert re.fullmatch(CODE.regex, outputs[1].text) and outputs[1].finish_reason == "stop"
    assert json.loads(outputs[3].text)


@pytest.mark.parametrize("options", [
    dict(temperature=0.0, min_tokens=20), dict(temperature=0.0, repetition_penalty=1.5), dict(n=3, seed=5),
    dict(temperature=0.7, top_p=0.5, logprobs=3)])
def test_with_other_options(engine, options):
    choice = StructuredOutput(choice=("yes", "no", "maybe so"))
    params = SamplingParams(max_tokens=60, structured_output=choice, **options)
    outputs = engine.generate("decide:", params)
    assert len(outputs) == params.n
    assert {output.text for output in outputs} <= {"yes", "no", "maybe so"}, "the end of the grammar ends the answer"
    assert {output.finish_reason for output in outputs} == {"stop"}


def test_an_answer_that_is_cut_follows_the_grammar_so_far(engine):
    output, = engine.generate("x", dataclasses.replace(JSON, max_tokens=3))
    assert output.finish_reason == "length" and output.text.startswith("{")


@pytest.mark.parametrize("spec, message", [
    (StructuredOutput(regex="(a"), "regex cannot be used"),
    (StructuredOutput(json_schema={"type": "nothing"}), "json_schema cannot be used"),
    (StructuredOutput(grammar="start: nowhere"), "grammar cannot be used")])
def test_a_bad_grammar_is_refused_before_anything_runs(engine, spec, message):
    steps = sum(bucket.steps for bucket in engine.stats().buckets)
    with pytest.raises(UserError, match=message):
        engine.generate(["a", "b"], [FREE, dataclasses.replace(FREE, structured_output=spec)])
    assert sum(bucket.steps for bucket in engine.stats().buckets) == steps and not engine.scheduler.has_work


def test_what_is_no_structured_output():
    with pytest.raises(UserError, match="structured_output must be a StructuredOutput"):
        SamplingParams(structured_output={"regex": "a"})


def test_without_a_tokenizer_it_is_refused():
    engine = Engine(init(CONFIG, 0, "float32"), limits=LIMITS, speculation=NGRAM, warmup=False)
    with pytest.raises(UserError, match="needs a tokenizer"):
        engine.generate([[1]], JSON)


def test_a_grammar_that_fails_midway_ends_that_request_alone(engine, monkeypatch):
    accept, accepted = Matcher.accept, []

    def failing(self, token):
        if len(accepted) == 4:
            raise ValueError("lost")
        accepted.append(token)
        accept(self, token)

    expected = engine.generate("one", FREE)[0].token_ids
    monkeypatch.setattr(Matcher, "accept", failing)
    bad, good = engine.generate(["x", "one"], [JSON, FREE])
    assert (bad.finish_reason, bad.error) == ("error", "ValueError: lost")
    assert good.token_ids == expected and engine.stats().pages_used == 0


def test_a_grammar_that_allows_only_what_min_tokens_forbids(engine):
    """Is refused before it runs, or ends the answer where it gets there; with less of either it runs."""
    z, q = engine.tokenizer.encode("zq")
    params = SamplingParams(max_tokens=9, temperature=0.0, min_tokens=2, structured_output=StructuredOutput(regex="zq"))
    with pytest.raises(UserError, match="min_tokens=2"):
        engine.generate("x", dataclasses.replace(params, stop_token_ids=[z]))
    with pytest.raises(UserError, match="min_tokens=2"):
        engine.generate("x", dataclasses.replace(params, structured_output=StructuredOutput(regex="()")))
    expected = engine.generate("one", FREE)[0].token_ids
    bad, good = engine.generate(["x", "one"], [dataclasses.replace(params, stop_token_ids=[q]), FREE])
    assert bad.finish_reason == "error" and bad.refused and "min_tokens=2" in bad.error and bad.token_ids == [z]
    assert good.token_ids == expected
    cut, = engine.generate("x", dataclasses.replace(params, stop_token_ids=[q], min_tokens=1))
    assert (cut.finish_reason, cut.token_ids) == ("stop", [z, q])


def test_a_text_with_a_token_that_the_model_lacks():
    tokenizer = load_tokenizer(resolve("bundled"))
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer) - 1)
    engine = Engine(init(config, 0, "float32"), tokenizer=tokenizer, limits=LIMITS, speculation=NGRAM,
                    warmup=False)
    with pytest.raises(UserError, match="not in the model's vocabulary"):
        engine.generate("hello" + tokenizer.convert_ids_to_tokens(len(tokenizer) - 1))


def test_a_restarted_answer_begins_its_grammar_again(engine):
    request, = engine.input_processor.requests("x", JSON)
    engine.core.submit([request])
    while len(request.sequence.output) < 5:
        engine.core.step()
    engine.core.restart([request], engine.weight_version)
    while not request.closed:
        engine.core.step()
    assert json.loads(request.output.text)
