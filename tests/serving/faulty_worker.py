"""The engine's process with faults, which certain prompts cause."""

import time

from qwen_jax.engine.core.engine_core import EngineCore
from qwen_jax.engine.frontend.request import Request
from qwen_jax.serving.engine_process import process

DEVICE, TEXT, FREEZE = [13, 13], [14, 14], [15, 15]


def step(self, begin=EngineCore.step):
    prompts = [request.sequence.prompt for request in self._requests.values()]
    if DEVICE in prompts:
        raise RuntimeError("the device is gone")
    if FREEZE in prompts:
        time.sleep(3600)
    return begin(self)


def add_tokens(self, *arguments, add=Request.add_tokens):
    if self.sequence.prompt == TEXT:
        raise ValueError("a text that cannot be")
    return add(self, *arguments)


if __name__ == "__main__":
    EngineCore.step, Request.add_tokens = step, add_tokens
    process.main()
