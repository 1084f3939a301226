"""Tool calls: what is a call, what stays text, and that the pieces a text arrives in make no difference."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_jax.serving.http.tool_calls import ParsedAnswer, ToolCall, ToolCallStream, new_call_id, parse_tool_calls

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
BROKEN = [
    '<tool_call>\n{"name": "weather", "arguments": {"city": }}\n</tool_call>',
    "<tool_call></tool_call>",
    "<tool_call>[1]</tool_call>",
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "not json"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "{\\"x\\": NaN}"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": ' + "[" * 100_000 + "}</tool_call>",
]


def ids():
    """call_0, call_1, ..."""
    numbers = itertools.count()
    return lambda: f"call_{next(numbers)}"


def parse(text):
    return parse_tool_calls(text, ids())


def streamed(pieces):
    """(answer put together from the events, events of each feed and of the flush)."""
    stream = ToolCallStream(ids())
    events = [stream.feed(piece) for piece in pieces] + [stream.flush()]
    flat = list(itertools.chain(*events))
    assert all(isinstance(event, ToolCall) or event for event in flat)
    calls = tuple(event for event in flat if isinstance(event, ToolCall))
    content = "".join(event for event in flat if isinstance(event, str))
    return ParsedAnswer(None if calls and not content else content, calls), events


def test_one_call_and_nothing_else():
    assert parse(WEATHER) == ParsedAnswer(None, (ToolCall("call_0", "weather", '{"city": "Zürich"}'),))


def test_text_without_calls_is_untouched():
    for text in ("", " \n", "two < three\n ", "a <tool_cal", "</tool_call>"):
        assert parse(text) == ParsedAnswer(text, ())


def test_several_calls_and_the_text_around_them():
    answer = parse(f"I look.\n\n{WEATHER}\n{CLOCK}\nDone. \n")
    assert answer.content == "I look.\n\nDone. \n"
    assert [(call.id, call.name) for call in answer.tool_calls] == [("call_0", "weather"), ("call_1", "clock")]
    assert parse(f"I look.\n{WEATHER}\n").content == "I look."
    assert parse(f"\n{WEATHER}\n{CLOCK}\n").content is None


def test_arguments_as_text_or_left_out():
    def arguments(body):
        (call,) = parse(f"<tool_call>{body}</tool_call>").tool_calls
        return call.arguments

    assert arguments('{"name": "f", "arguments": "{\\"a\\": 1}"}') == '{"a": 1}'
    assert arguments('{"name": "f"}') == "{}"
    assert arguments('{"arguments": {"a": ["\\u4e16", 1.5, null]}, "name": "f"}') == '{"a": ["世", 1.5, null]}'


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_block_stays_text_and_the_next_call_is_found(broken):
    answer = parse(f"Now:\n{broken}\n{CLOCK}")
    assert answer.content == f"Now:\n{broken}" and [call.name for call in answer.tool_calls] == ["clock"]


def test_a_cut_block_stays_text_unless_only_its_end_is_missing():
    complete = WEATHER.index("}}") + 2
    for end in range(1, len(WEATHER)):
        answer = parse(CLOCK + "\nand " + WEATHER[:end])
        if "\n" not in WEATHER[complete:end].rstrip("\n") and end >= complete:
            assert answer.content == "and" and [call.name for call in answer.tool_calls] == ["clock", "weather"]
        else:
            assert answer.content == "and " + WEATHER[:end]


@pytest.mark.parametrize("arguments", ["false", "0", "[]"])
def test_other_empty_values_are_no_arguments(arguments):
    assert not parse(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>').tool_calls


@pytest.mark.parametrize("arguments", ["", ', "arguments": null', ', "arguments": ""', ', "arguments": {}'])
def test_a_call_may_have_no_arguments(arguments):
    call, = parse('<tool_call>{"name": "f"' + arguments + "}</tool_call>").tool_calls
    assert (call.name, call.arguments) == ("f", "{}")


def test_nothing_follows_a_single_call():
    stream = ToolCallStream(ids(), single=True)
    text = f"Now:\n{WEATHER} and\n{CLOCK}"
    events = [event for letter in text for event in stream.feed(letter)] + stream.flush()
    content = "".join(event for event in events if isinstance(event, str))
    assert content == "Now:" and [event.name for event in events if isinstance(event, ToolCall)] == ["weather"]


def test_a_block_that_is_never_closed_does_not_swallow_the_next():
    for cut in ('<tool_call>{"name": "a", ', '<tool_call>{"name": "a\n', '<tool_call>{"name": "a\\\n'):
        answer = parse(cut + CLOCK)
        assert answer.content == cut.rstrip() and [call.name for call in answer.tool_calls] == ["clock"]


def test_tags_inside_a_string_are_not_tags():
    arguments = {"code": 'print("</tool_call><tool_call>\\")\n'}
    answer = parse(f'<tool_call>{json.dumps({"name": "run", "arguments": arguments})}</tool_call>!')
    assert json.loads(answer.tool_calls[0].arguments) == arguments and answer.content == "!"


def test_what_is_certain_is_not_held_back():
    _, events = streamed(["Hi <b", "> ", "there", "\n<tool", "_call>", CLOCK[11:], "\n", "ok"])
    kinds = [[event if isinstance(event, str) else event.name for event in some] for some in events]
    assert kinds == [["Hi <b"], [">"], [" there"], [], [], ["clock"], [], ["\nok"], []]


PIECES = st.sampled_from([WEATHER, CLOCK, *BROKEN[:-1], "<tool_call>", "</tool_call>", '{"name": "f"}', "text", " ",
                          "\n", '"', "\\", "<", "é", '"</tool_call>"'])


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PIECES, max_size=8), data=st.data())
@example(parts=[WEATHER, "\n", CLOCK], data=None)
def test_however_it_is_cut_the_answer_is_the_same(parts, data):
    text = "".join(parts)
    whole = parse(text)
    assert streamed(text)[0] == whole  # a character at a time
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        assert streamed(text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]))[0] == whole


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from([WEATHER, CLOCK, *BROKEN[:-1], "some text", ".", "\n", "  "]), max_size=8))
def test_nothing_is_lost(parts):
    answer = parse("".join(parts))
    calls = [{WEATHER: "weather", CLOCK: "clock"}[part] for part in parts if part in (WEATHER, CLOCK)]
    content = "".join(part for part in parts if part not in (WEATHER, CLOCK))
    assert [call.name for call in answer.tool_calls] == calls
    assert "".join((answer.content or "").split()) == "".join(content.split())
    if not calls:
        assert answer.content == content


def test_ids_differ():
    assert new_call_id().startswith("call_") and len({new_call_id() for _ in range(100)}) == 100
    first, second = parse_tool_calls(CLOCK + CLOCK).tool_calls
    assert first.id != second.id
