"""Messages between the HTTP process and the engine's process."""
import pickle
import socket
import subprocess
import sys

import pytest

from qwen_jax.serving.ipc.messages import (
    LENGTH,
    Abort,
    Call,
    Computes,
    Failed,
    Gauges,
    Launch,
    Piece,
    Ready,
    Refused,
    RequestOptions,
    Result,
    Step,
    Submit,
    TokenLogprob,
    Withdraw,
    decode_from_engine,
    decode_to_engine,
    frame,
    read_frame,
)

TO_ENGINE = [
    Launch("bundled", {"dtype": "float32"}), Launch("bundled", {}, "json", True, ("host:1", 2, 1)),
    Submit(1, RequestOptions(prompt="hello", params={"max_tokens": 4, "stop": ["x"]}, adapter="a", priority=-3,
                             timeout=1.5, stream=True, arrived=12.25, user={"id": 7})),
    Submit(2, RequestOptions(prompt=[1, 2, 3], arrived=0.5, continuation=[4], on_trial=True)),
    Submit(3, RequestOptions(prompt={"messages": [{"role": "user", "content": "hi"}], "tools": None}, arrived=0.5,
                             pooling="mean", normalize=True)),
    Abort(1), Withdraw(4, 8), Call(5, "update_weights", ["new", "restart", [["hello", [1, 2]]]])]
FROM_ENGINE = [
    Ready(4096, 64, 3.5), Refused("max_seq_len is too large"), Failed("RuntimeError: the device is gone"),
    Step([Piece(1, 0, "wo", [7, 8], [[TokenLogprob(7, b"w", -0.5)] * 2, [TokenLogprob(8, b"\xc3", -1.0)]]),
          Piece(2, 1, finish_reason="stop", tokens=3, prompt_tokens=9, times=(0.5, 1.5, None, 2.0), score=[-1.0])],
         Gauges(9, 2, 0, 3, 15)),
    Step([Piece(3, 0, error="no", kind="user", finish_reason="error", vector=b"1234")]),
    Computes(None, {}), Computes("weights", {"one": "1"}),
    Result(5, {"version": 1}), Result(6, error="it is refused")]


@pytest.mark.parametrize("message", TO_ENGINE, ids=lambda message: type(message).__name__)
def test_messages_to_the_engine(message):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame(message))
        assert read_frame(theirs) == message
        ours.shutdown(socket.SHUT_WR)
        assert read_frame(theirs) is None
    assert pickle.loads(pickle.dumps(message)) == message  # Ray carries `Launch`


@pytest.mark.parametrize("message", FROM_ENGINE, ids=lambda message: type(message).__name__)
def test_messages_from_the_engine(message):
    assert decode_from_engine(frame(message)[LENGTH.size:]) == message


@pytest.mark.parametrize("options, error", [
    (RequestOptions(prompt="half \ud800", arrived=0.0), UnicodeEncodeError),
    (RequestOptions(prompt=[2**70], arrived=0.0), OverflowError)])
def test_values_that_messagepack_cannot_hold(options, error):
    with pytest.raises(error):
        frame(Submit(1, options))


def test_a_step_is_small():
    assert len(frame(Step([Piece(1, 0, "word ", [7])], Gauges(1, 1, 0, 1, 15)))) < 48


def test_gauges_add_up():
    assert Gauges.total([Gauges(1, 2, 3, 4, 5), Gauges(10, 20, 30, 40, 50)]) == Gauges(11, 22, 33, 44, 55)
    assert Gauges.total([]) == Gauges()


def test_the_http_process_needs_no_jax():
    code = "import sys, qwen_jax.serving.ipc.engine_client, qwen_jax.serving.server; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert decode_to_engine(frame(Abort(1))[LENGTH.size:]) == Abort(1)
