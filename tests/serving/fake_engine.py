"""A stand-in for the link to an engine, for tests of routes without processes."""

import asyncio
from collections.abc import Callable
from typing import Any

from qwen_jax.serving.ipc.engine_client import Answer
from qwen_jax.serving.ipc.messages import Gauges, Piece, Ready, RequestOptions, Submit, frame
from qwen_jax.serving.ipc.open_answers import OpenAnswers


class FakeEngine:
    """A link whose requests are answered at the next turn of the event loop.

    Attributes:
      asked: options of the requests, in order.
      most: largest number of requests that were open at once.
      calls: functions by the names of calls.
    """

    def __init__(self, max_requests: int = 16, max_adapters: int = 2) -> None:
        self.facts, self.gauges = Ready(256, 4, 0.0, max_adapters), Gauges()
        self.failure = self.refused = None
        self.open_answers, self.most = OpenAnswers(max_requests), 0
        self.asked: list[RequestOptions] = []
        self.calls: dict[str, Callable[..., Any]] = {
            "metrics": lambda: b"", "load_adapter": lambda *_: None, "unload_adapter": lambda *_: None}

    @property
    def requests(self) -> int:
        return self.open_answers.count

    def check_alive(self) -> None:
        pass

    def silent_seconds(self) -> float:
        return 0.0

    def send(self, options: RequestOptions, answer: Answer) -> None:
        """Take a request of a load balancer, which is not answered."""

    def generate(self, options: RequestOptions, answers: int) -> Answer:
        frame(Submit(1, options))  # refuses what cannot be sent
        answer = Answer(answers)
        self.open_answers.add(answer, answers)
        self.most = max(self.most, self.open_answers.count)
        self.asked.append(options)
        asyncio.get_running_loop().call_soon(self._end, answer)
        return answer

    def _end(self, answer: Answer) -> None:
        for index in range(answer.open):
            answer.open -= 1
            answer.put(Piece(0, index, "text", [1], finish_reason="length", tokens=1, prompt_tokens=1, times=(0.0,) * 4,
                             vector=b"\0" * 16))

    def close(self, answer: Answer) -> None:
        self.open_answers.remove(answer)

    async def call(self, name: str, *arguments: Any, patient: bool = False) -> Any:
        await asyncio.sleep(0.01)
        return self.calls[name](*arguments)
