"""Functions of the engine's process that the HTTP process calls by name: adapters, statistics, tokens, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qwen_jax.checkpoint import resolve
from qwen_jax.engine.api.stats import stats_as_dict
from qwen_jax.engine.core.engine_thread import EngineThread
from qwen_jax.engine.core.weight_update import Golden, update_weights
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.frontend.input_processor import check_token_ids
from qwen_jax.errors import UserError
from qwen_jax.serving.engine_process.engine_metrics import EngineMetrics
from qwen_jax.serving.engine_process.identity import AnswerIdentity


class EngineCalls:
    """Functions of the engine's process that the HTTP process may call by name, such as ``stats`` or ``load_adapter``.

    Functions that use the engine run on its thread, between two of its steps. Tokenising and updates of the weights,
    which take longer, run on other threads while the engine makes steps.

    Args:
      thread: the thread that owns the engine.
      identity: is told of every change of weights and adapters.
      find: returns the path of the checkpoint to load for the reference that an update of the weights names.
    """

    def __init__(self, engine: Engine, thread: EngineThread, metrics: EngineMetrics, identity: AnswerIdentity,
                 find: Callable[[str], str]) -> None:
        self._engine, self._thread, self._identity, self._find = engine, thread, identity, find
        self._between_steps: dict[str, Callable[..., Any]] = {
            "load_adapter": self._load_adapter, "unload_adapter": self._unload_adapter, "stats": self._stats,
            "versions": self._versions, "metrics": metrics.text, "rollback": self._rollback}
        tokenizing, updating = ThreadPoolExecutor(1, "tokenize"), ThreadPoolExecutor(1, "weights")
        self._beside = {"tokenize": (tokenizing, self._tokenize), "detokenize": (tokenizing, self._detokenize),
                        "update_weights": (updating, self._update_weights)}

    def start(self, name: str, arguments: Sequence[Any]) -> Future:
        """Start the function called ``name``, from any thread; the future has its result or its error."""
        if name in self._beside:
            pool, function = self._beside[name]
            return pool.submit(function, *arguments)
        return self._thread.call(lambda: self._between_steps[name](*arguments))

    def _load_adapter(self, name: str, folder: str) -> None:
        self._engine.load_adapter(name, folder)
        self._identity.send()

    def _unload_adapter(self, name: str) -> None:
        self._engine.unload_adapter(name)
        self._identity.send()

    def _stats(self) -> dict[str, Any]:
        return stats_as_dict(self._engine.stats())

    def _versions(self) -> dict[str, Any]:
        weights = self._engine.weights
        return {"version": weights.current, "previous": weights.previous, "versions": weights.versions}

    def _rollback(self) -> dict[str, Any]:
        self._engine.rollback()
        self._identity.send()
        return self._versions()

    def _tokenize(self, prompt: str | dict[str, Any], allow_special_tokens: bool = True) -> list[int]:
        if isinstance(prompt, dict):
            return self._engine.input_processor.conversation(prompt["messages"], prompt.get("tools"),
                                                              prompt.get("continues", False))
        return self._engine.input_processor.tokens(prompt, allow_special_tokens)

    def _detokenize(self, tokens: list[int]) -> str:
        if self._engine.tokenizer is None:
            raise UserError("this engine has no tokenizer")
        return self._engine.tokenizer.decode(check_token_ids(tokens, self._engine.input_processor.vocab_limit))

    def _update_weights(self, source: str, policy: str, golden: Golden | None) -> dict[str, Any]:
        engine, path = self._engine, self._find(source)
        files = resolve(path).files
        version = update_weights(engine.core, engine.input_processor, path, policy, golden, thread=self._thread)
        self._identity.note_weights(version, files)
        return self._thread.between_steps(self._versions)


def sentence_of(error: BaseException) -> str:
    """Return the message about an error that a client gets: a UserError's own, others with the name of their class."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
