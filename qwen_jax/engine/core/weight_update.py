"""Other weights into a running engine: tried on golden prompts first, then current between two steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.core.engine_core import EngineCore
from qwen_jax.engine.frontend.input_processor import InputProcessor, Prompt
from qwen_jax.engine.frontend.request import Request
from qwen_jax.errors import UserError

POLICIES = ("finish_old", "restart")
FIRST = -2**31  # priority of golden prompts: an update under load does not wait for the queue
Golden = Sequence[tuple[Prompt, Prompt]]  # a prompt, and how its greedy answer has to begin ("" or () for anything)


def check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise UserError(f"unknown policy {policy!r} for running requests: use {' or '.join(POLICIES)}")


def golden_requests(input_processor: InputProcessor, golden: Golden | None) -> list[tuple[Request, list[int]]]:
    """Requests to try a version of the weights on, with the tokens that their answers have to begin with."""
    if golden is None:
        longest = max(1, input_processor.max_seq_len - 4)
        golden = [([place * 7919 % input_processor.vocab_limit for place in range(min(length, longest))], ())
                  for length in (1, 17, 50)]
    tried = []
    for prompt, answer in golden:
        expected = input_processor.tokens(answer) if len(answer) else []
        params = SamplingParams(max_tokens=max(len(expected), 4), temperature=0.0, repetition_penalty=1.0, logprobs=0,
                                prompt_logprobs=0, ignore_eos=True)
        request, = input_processor.requests(prompt, params, priority=FIRST)
        tried.append((request, expected))
    return tried


def check_golden(tried: Iterable[tuple[Request, list[int]]]) -> None:
    """UserError when an answer is not what it has to be, or a probability is not a number."""
    for request, expected in tried:
        output = request.output
        values = [value for among in [*output.prompt_logprobs[1:], *output.logprobs] for value in among.values()]
        if output.error or not all(map(isfinite, values)):
            raise UserError(f"the new weights fail on a golden prompt: {output.error or 'they give NaN or Inf'}; the "
                            "old ones stay")
        if output.token_ids[:len(expected)] != expected:
            raise UserError(f"the new weights answer a golden prompt with tokens {output.token_ids[:len(expected)]} "
                            f"where {expected} is expected; the old ones stay")


def switch(core: EngineCore, version: int, policy: str) -> None:
    """`version` becomes current: new requests run with it, and those that have not begun.

    "finish_old": those that have begun keep their version. "restart": they begin again with the new one, except those
    whose answers somebody is already reading.
    """
    core.weights.make_current(version)
    core.restart(core.untouched(only_waiting=policy == "finish_old"), version)
    core.weights.drop_unused(core.versions_in_use())


def replace_in_place(core: EngineCore, source: str, policy: str) -> int:
    """Without a second copy of the weights: the engine runs dry, then its parameters are replaced one by one."""
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
        core.failure = core.failure or error
        raise
    finally:
        for scheduler in schedulers:
            scheduler.paused = False
    core.restart(core.untouched(only_waiting=False), version)
    return version
