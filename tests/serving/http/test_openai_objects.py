"""Answers in OpenAI's format, made from pieces without a server."""
import pytest

from qwen_jax.serving.http.openai_objects import Reply
from qwen_jax.serving.ipc.messages import Piece, TokenLogprob

CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("text, ended, reason", [
    (CALL, "stop", "tool_calls"), (CALL + "\n" + CALL, "stop", "tool_calls"), ("no call", "stop", "stop"),
    (CALL + CALL[:20], "length", "length"), (CALL[:20], "length", "length"), (CALL, "abort", "abort")])
def test_an_answer_that_was_cut_says_so(text, ended, reason):
    reply = Reply("it", chat=True, count=1, tools=True, logprobs=False)
    chunks = [*reply.add(Piece(1, 0, text[:30])), *reply.add(Piece(1, 0, text[30:], finish_reason=ended))]
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    whole, = reply.whole()["choices"]
    assert whole["finish_reason"] == reason and len(whole["message"].get("tool_calls", [])) == text.count(CALL)


@pytest.mark.parametrize("chat", [True, False])
def test_every_token_has_its_own_bytes_and_name(chat):
    """Also where two tokens have the same text, or none as without a tokenizer."""
    tokens = [TokenLogprob(5, "é".encode()[:1], -0.1), TokenLogprob(5, "é".encode()[:1], -0.1),
              TokenLogprob(6, "é".encode()[1:], -1.0), TokenLogprob(7, b"a", -2.0), TokenLogprob(8, b"a", -3.0),
              TokenLogprob(9, b"", -4.0)]
    reply = Reply("it", chat=chat, count=1, tools=False, logprobs=True)
    list(reply.add(Piece(1, 0, "", logprobs=[tokens], finish_reason="stop")))
    shown = reply.whole()["choices"][0]["logprobs"]
    if chat:
        first, = shown["content"]
        assert (first["token"], first["bytes"]) == (r"bytes:\xc3", [0xC3])
        assert [top["bytes"] for top in first["top_logprobs"]] == [[0xC3], [0xA9], [97], [97], []]
        assert [top["logprob"] for top in first["top_logprobs"]] == [-0.1, -1.0, -2.0, -3.0, -4.0]
    else:
        assert shown["tokens"] == [r"bytes:\xc3"] and shown["token_logprobs"] == [-0.1]
        assert shown["top_logprobs"] == [{r"bytes:\xc3": -0.1, r"bytes:\xa9": -1.0, "a": -2.0, "token_id:8": -3.0,
                                          "token_id:9": -4.0}]
