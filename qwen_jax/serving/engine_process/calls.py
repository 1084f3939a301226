"""What else than requests the engine's process is asked for: each a call by name, answered between two steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from qwen_jax.engine.core.weight_update import check_golden, check_policy, golden_requests, switch
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from qwen_jax.serving.engine_process.engine_metrics import EngineMetrics

Post = Callable[[Callable[[], None]], None]
Answer = Callable[[Any, str | None], None]  # a value, or a sentence that says what is wrong


class Operations:
    """
    Args:
      post: has something called on the engine's thread. beside: threads for what need not wait for steps. find: where
        weights are, by the name that an update gives.
    """

    def __init__(self, engine: Engine, metrics: EngineMetrics, post: Post, beside: Executor,
                 find: Callable[[str], str]) -> None:
        self._engine, self._post, self._beside, self._find = engine, post, beside, find
        self._loader = ThreadPoolExecutor(1, "weights")
        self._calls: dict[str, Callable[..., Any]] = {
            "load_adapter": engine.load_adapter, "unload_adapter": engine.unload_adapter, "stats": self._stats,
            "versions": self._versions, "metrics": metrics.text, "rollback": self._rollback}
        self._calls_beside = {"tokenize": self._tokenize, "detokenize": self._detokenize}

    def begin(self, name: str, arguments: list[Any], answer: Answer) -> None:
        """From any thread; ``answer`` is called on the engine's."""
        if name == "update_weights":
            self._loader.submit(self._load_weights, *arguments, answer)
        elif name in self._calls_beside:
            later = lambda *result: self._post(lambda: answer(*result))  # noqa: E731  one thread writes to the socket
            self._beside.submit(_answered, self._calls_beside[name], arguments, later)
        else:
            self._post(lambda: _answered(self._calls[name], arguments, answer))

    def _stats(self) -> dict[str, Any]:
        return {**asdict(self._engine.stats()), "adapters": self._engine.adapters.names}

    def _tokenize(self, prompt: Any) -> list[int]:
        if isinstance(prompt, dict):
            prompt = self._engine.input_processor.conversation(prompt["messages"], prompt.get("tools"))
        return self._engine.input_processor.tokens(prompt)

    def _detokenize(self, tokens: list[int]) -> str:
        if self._engine.tokenizer is None:
            raise UserError("this engine has no tokenizer")
        return self._engine.tokenizer.decode(self._engine.input_processor.tokens(tokens))

    # --- weights, loaded on a thread of their own

    def _versions(self) -> dict[str, Any]:
        weights = self._engine.weights
        return {"version": weights.current, "previous": weights.previous, "versions": weights.versions}

    def _rollback(self) -> dict[str, Any]:
        self._engine.rollback()
        return self._versions()

    def _load_weights(self, source: str, policy: str, golden: list[Any] | None, answer: Answer) -> None:
        engine = self._engine
        try:
            check_policy(policy)
            tried = golden_requests(engine.input_processor, golden)
            leaves = engine.weights.load(self._find(source))
        except Exception as error:
            sentence = sentence_of(error)
            self._post(lambda: answer(None, sentence))
            return
        self._post(lambda: _answered(self._try, [leaves, policy, tried], answer))

    def _try(self, leaves: Any, policy: str, tried: list[Any]) -> dict[str, Any]:
        """Golden prompts run first, before whoever waits; then the new weights are current."""
        engine = self._engine
        version = engine.weights.add(leaves)
        try:
            engine.core.complete([request for request, _ in tried], version)
            check_golden(tried)
        except UserError:
            engine.weights.forget(version)
            raise
        switch(engine.core, version, policy)
        return self._versions()


def _answered(call: Callable[..., Any], arguments: list[Any], answer: Answer) -> None:
    try:
        value = call(*arguments)
    except UserError as error:
        answer(None, str(error))
    else:
        answer(value, None)


def sentence_of(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
