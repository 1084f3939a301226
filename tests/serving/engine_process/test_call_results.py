"""Results of calls on their way to the HTTP process."""
from concurrent.futures import Future
from types import SimpleNamespace

from qwen_jax.serving.engine_process.process import Worker
from qwen_jax.serving.ipc.messages import frame


def test_a_result_that_cannot_be_encoded_is_an_error():
    """Else the client would wait for ever, and the engine would be taken for one that hangs."""
    sent, worker, result = [], Worker.__new__(Worker), Future()
    worker._outbox = SimpleNamespace(send=lambda message: (frame(message), sent.append(message)))
    result.set_result({"model_flops": 2**64})
    worker._send_result(7, result)
    answer, = sent
    assert answer.id == 7 and "cannot be sent" in answer.error
