"""Sampling options of a request, validated. No JAX here.

Names, meanings and ranges are vLLM's and OpenAI's (https://docs.vllm.ai/en/stable/api/vllm/sampling_params.html).
"""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np

from qwen_jax.engine.api.structured_output import StructuredOutput
from qwen_jax.errors import UserError

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP = 16  # stop strings; stop_token_ids likewise, so that they fit beside a full logit_bias in the sampler's rows

MAX_STOP_LENGTH = 1024  # characters of a stop string

# Values of options that neither the caller nor the checkpoint's generation_config sets.
NEUTRAL = dict(
    max_tokens=256, min_tokens=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
    presence_penalty=0.0, frequency_penalty=0.0, ignore_eos=False, stop=(), stop_token_ids=(), logit_bias={},
)  # fmt: skip
FROM_CHECKPOINT = ("temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of a request. ``None`` is "unset": then the checkpoint's generation_config or else a neutral
    value applies.

    Attributes:
      max_tokens: maximum number of tokens to generate, >= 1 (unset: 256).
      min_tokens: number of tokens before which the answer does not end, 0..max_tokens: end-of-sequence and
        ``stop_token_ids`` are not drawn, and stop strings are text.
      temperature: >= 0; 0 is greedy (the most likely token after penalties and bias).
      top_k: number of most likely tokens to draw among; 0 or -1 is off.
      top_p: probability in [0, 1] that the most likely tokens to draw among, as few as possible, add up to; with 0 the
        most likely token is taken.
      min_p: share in [0, 1] of the most likely token's probability below which tokens are not drawn.
      repetition_penalty: > 0; divides (if positive) or multiplies (if negative) the logit of a token seen in the prompt
        or the output. 1 is off.
      presence_penalty: in [-2, 2]; subtracted once from the logit of a token that was generated.
      frequency_penalty: in [-2, 2]; subtracted as often as the token was generated.
      logit_bias: {token id: value in [-100, 100]}, added to logits, at most 300 ids. Ids may be strings, as in JSON.
      seed: a 64-bit integer. The same seed gives the same draws beside any other requests. Unset: picked by the engine,
        differently for each request.
      stop: a string or up to 16 strings, each of up to 1024 characters; the text ends before the first of them that
        appears. The name of a control token, such as ``<|im_end|>``, also stands for the token.
      stop_token_ids: up to 16 ids that end the text like end-of-sequence does.
      ignore_eos: whether to go on at end-of-sequence.
      logprobs: number of most likely tokens, 0..20, whose log-probabilities are returned beside that of each generated
        token. They are the model's own: before penalties, bias and temperature.
      prompt_logprobs: the same for the prompt's tokens, 0..20.
      structured_output: form that the answer must have (`StructuredOutput`); it ends where nothing may follow.
      n: number of answers to draw, >= 1; greedy ones are all the same.

    Raises:
      UserError: a value of the wrong kind or out of range; the sentence names the field.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_output: StructuredOutput | None = None
    n: int = 1

    def __post_init__(self):
        clean = {
            "max_tokens": _integer(self, "max_tokens", 1, 2**31 - 1),
            "min_tokens": _integer(self, "min_tokens", 0, 2**31 - 1),
            "temperature": _number(self, "temperature", lambda x: x >= 0, "at least 0 (0 is greedy)"),
            "top_k": _integer(self, "top_k", -1, 2**31 - 1),
            "top_p": _number(self, "top_p", lambda x: 0 <= x <= 1, "in [0, 1]"),
            "min_p": _number(self, "min_p", lambda x: 0 <= x <= 1, "in [0, 1]"),
            "repetition_penalty": _number(self, "repetition_penalty", lambda x: x > 0, "greater than 0 (1 is off)"),
            "presence_penalty": _number(self, "presence_penalty", lambda x: -2 <= x <= 2, "in [-2, 2]"),
            "frequency_penalty": _number(self, "frequency_penalty", lambda x: -2 <= x <= 2, "in [-2, 2]"),
            "logit_bias": _logit_bias(self.logit_bias),
            "seed": _integer(self, "seed", -(2**63), 2**64 - 1),
            "stop": _stop(self.stop),
            "stop_token_ids": _stop_token_ids(self.stop_token_ids),
            "ignore_eos": _flag(self, "ignore_eos"),
            "logprobs": _integer(self, "logprobs", 0, MAX_LOGPROBS),
            "prompt_logprobs": _integer(self, "prompt_logprobs", 0, MAX_LOGPROBS),
            "n": _integer(self, "n", 1, 2**31 - 1),
        }
        for name, value in clean.items():
            object.__setattr__(self, name, value)
        if not isinstance(self.structured_output, StructuredOutput | None):
            raise UserError(f"structured_output must be a StructuredOutput, not {self.structured_output!r}")
        if self.n is None:
            raise UserError("n must be an integer of at least 1, not None")
        if None not in (self.min_tokens, self.max_tokens) and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})")

    def resolved(self, generation_defaults: Any = None) -> "SamplingParams":
        """Return a copy whose unset options are filled in from ``generation_defaults``, else with a neutral value.

        ``seed`` and the log-probability counts may stay None.

        Args:
          generation_defaults: any object; its attributes ``temperature``, ``top_k``, ``top_p``,
            ``repetition_penalty`` set unset options, where present and not None. ``do_sample`` False means greedy.
        """
        values = dict(NEUTRAL)
        for name in FROM_CHECKPOINT:
            default = getattr(generation_defaults, name, None)
            if default is not None:
                values[name] = default
        if getattr(generation_defaults, "do_sample", None) is False:
            values["temperature"] = 0.0
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})

    def check(self, vocab_size: int) -> "SamplingParams":
        """Return self if all ids in ``logit_bias`` and ``stop_token_ids`` are below vocab_size; UserError otherwise."""
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise UserError(f"{name}: token id {token} is not in the vocabulary (0..{vocab_size - 1})")
        return self

    @property
    def uses_counts(self) -> bool:
        """True when a penalty is on: the sampler then needs counts of the tokens seen. Options must be `resolved`."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @cached_property
    def scalars(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Sampling options as numbers, floats and then integers, in the order of ``padded_batch.pack_rows``."""
        # A share that vanishes in the sampler's float32 leaves the most likely token.
        top_p, top_k = (self.top_p, max(self.top_k, 0)) if np.float32(self.top_p) else (1.0, 1)
        floats = (self.temperature, top_p, self.min_p, self.repetition_penalty, self.presence_penalty,
                  self.frequency_penalty)  # fmt: skip
        seed = (self.seed or 0) & (2**64 - 1)
        seed = ((seed & 0xFFFFFFFF) + (seed >> 32) * 0x9E3779B1) & 0xFFFFFFFF  # 64 to 32 bits; -1 must not become 0
        logprobs = -1 if self.logprobs is None else self.logprobs
        return floats, (top_k, seed, logprobs)

    @cached_property
    def bias(self) -> tuple[np.ndarray, np.ndarray]:
        """``logit_bias`` as two arrays: token ids int32[n] and values float32[n]."""
        bias = self.logit_bias or {}
        return np.fromiter(bias.keys(), np.int32, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))


def _as_int(name: str, value: Any) -> int:
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise UserError(f"{name} must be an integer, not {value!r}")


def _integer(params: SamplingParams, name: str, low: int, high: int) -> int | None:
    value = getattr(params, name)
    if value is None:
        return None
    value = _as_int(name, value)
    if not low <= value <= high:
        bounds = f"at least {low}" if value < low else f"at most {high}"
        raise UserError(f"{name} must be {bounds}, not {value}")
    return value


def _number(params: SamplingParams, name: str, ok, bounds: str) -> float | None:
    value = getattr(params, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name} must be a number, not {value!r}")
    value = float(value)
    # The sampler works in float32: a value that is infinite or vanishes there would change its meaning.
    single = float(np.float32(value)) if abs(value) <= float(np.finfo(np.float32).max) else math.inf
    if not math.isfinite(single) or not ok(value) or not ok(single):
        raise UserError(f"{name} must be a finite number {bounds}, not {value}")
    return value


def _flag(params: SamplingParams, name: str) -> bool | None:
    value = getattr(params, name)
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return None if value is None else bool(value)


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UserError(f"logit_bias must be a mapping of token id to value, not {type(value).__name__}")
    if len(value) > MAX_LOGIT_BIAS:
        raise UserError(f"logit_bias must have at most {MAX_LOGIT_BIAS} entries, not {len(value)}")
    bias = {}
    for token, amount in value.items():
        if isinstance(token, str) and token.isascii() and token.isdigit():
            token = int(token)
        token = _as_int("logit_bias: a token id", token)
        if not 0 <= token < 2**31:
            raise UserError(f"logit_bias: token id {token} is not in the vocabulary")
        if isinstance(amount, bool) or not isinstance(amount, Real) or not -100 <= amount <= 100:
            raise UserError(f"logit_bias: the value for token {token} must be a number in [-100, 100], not {amount!r}")
        bias[token] = float(amount)
    return bias


def _stop(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise UserError(f"stop must be a non-empty string or a list of them, not {value!r}")
    if len(strings) > MAX_STOP:
        raise UserError(f"stop must have at most {MAX_STOP} strings, not {len(strings)}")
    if (longest := max(map(len, strings), default=0)) > MAX_STOP_LENGTH:
        raise UserError(f"stop must have strings of at most {MAX_STOP_LENGTH} characters, not {longest}")
    return tuple(strings)


def _stop_token_ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray | set | frozenset):
        raise UserError(f"stop_token_ids must be a list of token ids, not {value!r}")
    ids = tuple(dict.fromkeys(_as_int("stop_token_ids: a token id", token) for token in value))
    if len(ids) > MAX_STOP:
        raise UserError(f"stop_token_ids must have at most {MAX_STOP} ids, not {len(ids)}")
    for token in ids:
        if not 0 <= token < 2**31:
            raise UserError(f"stop_token_ids: token id {token} is not in the vocabulary")
    return ids
