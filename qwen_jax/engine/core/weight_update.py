"""Updates of a running engine's weights: load them, try them on prompts with known answers, then switch or forget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from math import isfinite
from typing import Any

from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.core.engine_core import EngineCore
from qwen_jax.engine.core.engine_thread import EngineThread
from qwen_jax.engine.frontend.input_processor import InputProcessor, Prompt
from qwen_jax.engine.frontend.request import Request
from qwen_jax.errors import UserError

POLICIES = ("finish_old", "restart")
GOLDEN_PRIORITY = -2**31  # golden prompts run before all requests that wait, so that an update ends under load too
GOLDEN_LENGTHS = (1, 17, 50)  # tokens of the default golden prompts
Golden = Sequence[tuple[Prompt, Prompt]]  # prompts, each with the beginning of its greedy answer ("" or () for any)


def update_weights(core: EngineCore, input_processor: InputProcessor, source: Any, policy: str = "finish_old",
                   golden: Golden | None = None, thread: EngineThread | None = None,
                   cancelled: Callable[[], bool] = lambda: False) -> int:
    """Load other weights, try them on golden prompts (with known answers) and let new requests run with them.

    Args:
      source, policy, golden: see `Engine.update_weights`.
      thread: the thread that owns the engine, where that is not the caller's. Other requests go on meanwhile.
      cancelled: tells whether the update is to be given up; asked before the golden prompts and before the switch.
    Returns:
      The number of the new version of the weights.
    Raises:
      UserError: the weights cannot be loaded, or fail on a golden prompt.
      CancelledError: the update was given up.

    After any error the new version is forgotten and the old weights stay.
    """
    check_policy(policy)
    complete = thread.complete if thread else core.complete
    between_steps = thread.between_steps if thread else _at_once
    golden_runs = _golden_requests(input_processor, golden)
    loaded = core.weights.load(source)
    version = between_steps(lambda: core.weights.add(loaded))
    try:
        _check_not_cancelled(cancelled)
        complete([request for request, _ in golden_runs], version)
        _check_golden(golden_runs)
        _check_not_cancelled(cancelled)
        between_steps(lambda: switch(core, version, policy))
    except BaseException:
        between_steps(lambda: _forget(core, version))
        raise
    return version


def check_policy(policy: str) -> None:
    """Raise UserError unless ``policy``, for running requests at a change of weights, is one of POLICIES."""
    if policy not in POLICIES:
        raise UserError(f"policy must be {' or '.join(POLICIES)}, not {policy!r}")


def switch(core: EngineCore, version: int, policy: str) -> None:
    """Make a version of the weights current: new requests and those that have not begun run with it.

    With "finish_old", requests that have begun keep their version. With "restart" they begin again with the new one,
    except those whose answers are being streamed.
    """
    core.weights.make_current(version)
    core.restart(core.untouched(only_waiting=policy == "finish_old"), version)
    core.weights.drop_unused(core.versions_in_use())


def replace_in_place(core: EngineCore, source: str, policy: str) -> int:
    """Replace the parameters one by one, without a second copy, once no request runs; return the new version."""
    schedulers, weights = [replica.scheduler for replica in core.replicas], core.weights
    if policy == "restart":
        core.restart(core.untouched(only_waiting=False), weights.current)
    for scheduler in schedulers:
        scheduler.paused = True
    try:
        while any(scheduler.running or any(sequence.output for sequence in scheduler.waiting)
                  for scheduler in schedulers):
            core.step()
        core.settle()
        version = weights.replace(source)
    except RuntimeError as error:
        core.fail(error)
        raise
    finally:
        for scheduler in schedulers:
            scheduler.paused = False
    core.restart(core.untouched(only_waiting=False), version)
    return version


def _golden_requests(input_processor: InputProcessor, golden: Golden | None) -> list[tuple[Request, list[int]]]:
    """Return a request for each golden prompt, with the tokens that its answer must begin with."""
    if golden is None:
        longest = max(1, input_processor.max_seq_len - 4)
        golden = [([position * 7919 % input_processor.vocab_limit for position in range(min(length, longest))], ())
                  for length in GOLDEN_LENGTHS]
    runs = []
    for prompt, answer in golden:
        expected = input_processor.tokens(answer) if len(answer) else []
        params = SamplingParams(max_tokens=max(len(expected), 4), temperature=0.0, repetition_penalty=1.0, logprobs=0,
                                prompt_logprobs=0, ignore_eos=True)
        request, = input_processor.requests(prompt, params, priority=GOLDEN_PRIORITY)
        runs.append((request, expected))
    return runs


def _check_golden(runs: Iterable[tuple[Request, list[int]]]) -> None:
    """Raise UserError when a golden prompt's answer does not begin as expected, or a log-probability is not finite."""
    for request, expected in runs:
        output = request.output
        problem = output.error
        if not problem:
            logprobs = [value for by_token in [*output.prompt_logprobs[1:], *output.logprobs]
                        for value in by_token.values()]
            problem = None if all(map(isfinite, logprobs)) else "they give NaN or Inf"
        if problem:
            raise UserError(f"the new weights fail on a golden prompt: {problem}; the old ones stay")
        if output.token_ids[:len(expected)] != expected:
            raise UserError(f"the new weights answer a golden prompt with tokens {output.token_ids[:len(expected)]} "
                            f"where {expected} is expected; the old ones stay")


def _check_not_cancelled(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledError("the update of the weights was given up; the old ones stay")


def _forget(core: EngineCore, version: int) -> None:
    if version != core.weights.current:  # current when the engine failed after the switch: then it is lost anyway
        core.weights.forget(version)


def _at_once(function: Callable[[], Any]) -> Any:
    return function()
