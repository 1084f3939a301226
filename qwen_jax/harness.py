"""Adapter with which EleutherAI's lm-evaluation-harness evaluates a model on an engine.

    import lm_eval
    from qwen_jax import Engine
    from qwen_jax.harness import QwenJaxLM

    lm_eval.simple_evaluate(model=QwenJaxLM(Engine.from_pretrained("path")), tasks=["hellaswag"], limit=100)

Needs the package ``lm-eval``. Importing this module registers the model under the name ``qwen-jax``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qwen_jax.engine.api.sampling_params import SamplingParams
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError

MAX_GEN_TOKENS = 256  # default for tasks without a limit, as in the harness' own models


@register_model("qwen-jax")
class QwenJaxLM(TemplateLM):
    """Model class of lm-evaluation-harness that scores and generates with an engine, which must have a tokenizer.

    The engine's ``max_seq_len`` bounds context and continuation together. Contexts that are too long lose their
    beginning, as with the harness' own models.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        if engine.tokenizer is None:
            raise UserError("the harness needs an engine with a tokenizer: load the model with one")
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.max_length = engine.limits.max_seq_len

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> QwenJaxLM:
        """Make the model from ``--model_args pretrained=PATH,...``, the arguments of ``Engine.from_pretrained``."""
        arguments = dict(arg_dict)
        if "pretrained" not in arguments:
            raise UserError("the model must be named: --model_args pretrained=PATH")
        return cls(Engine.from_pretrained(arguments.pop("pretrained"), **arguments))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> QwenJaxLM:
        """Make the model from the text of the harness' ``--model_args``; see `create_from_arg_obj`."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string))

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt,
                                                  continue_final_message=not add_generation_prompt)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
                              ) -> list[tuple[float, bool]]:
        """Return each continuation's log-probability after its context, and whether greedy decoding gives it."""
        prompts, continuations = [], []
        for _text, context, continuation in requests:
            room = self.max_length - 1  # the engine also generates a token, which is discarded
            if len(continuation) >= room:
                raise UserError(f"a continuation of {len(continuation)} tokens does not fit into max_seq_len="
                                f"{self.max_length}: raise max_seq_len")
            prompts.append(context[len(continuation) - room:])
            continuations.append(continuation)
        nonempty = [index for index, continuation in enumerate(continuations) if continuation]
        scores = self.engine.score([prompts[index] for index in nonempty],
                                   [continuations[index] for index in nonempty])
        results = [(0.0, True)] * len(prompts)
        for index, score in zip(nonempty, scores, strict=True):
            results[index] = score.logprob, score.greedy
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each request's whole text; long ones are scored in windows, each token once."""
        windows, owners = [], []
        for index, request in enumerate(requests):
            text, = request.args
            tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 2, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for (score, _), owner in zip(self._loglikelihood_tokens(windows), owners, strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the generated continuation of each request's prompt.

        Options of a request: until, max_gen_toks (also as max_new_tokens), do_sample, temperature, top_p, top_k.
        ``do_sample=False`` is greedy at any temperature.
        """
        prompts, params = [], []
        for request in requests:
            context, options = request.args
            options = dict(options)
            stop = options.pop("until", None) or []
            limits = [options.pop(name, None) for name in ("max_gen_toks", "max_new_tokens")]
            max_tokens = int(next((limit for limit in limits if limit is not None), MAX_GEN_TOKENS))
            temperature = options.pop("temperature", None)
            sampled = options.pop("do_sample", bool(temperature))
            temperature = float(1.0 if temperature is None else temperature) if sampled else 0.0
            sampling = {name: options.pop(name) for name in ("top_p", "top_k") if name in options}
            if options:
                raise UserError(f"unknown generation option {', '.join(sorted(options))}: remove it from the task")
            if max_tokens >= self.max_length:
                raise UserError(f"max_gen_toks must be less than max_seq_len={self.max_length}, not {max_tokens}")
            prompts.append(self.tok_encode(context)[-(self.max_length - max_tokens):])
            params.append(SamplingParams(max_tokens=max_tokens, temperature=temperature, repetition_penalty=1.0,
                                         stop=[stop] if isinstance(stop, str) else list(stop) or None, **sampling))
        return [output.text for output in self.engine.generate(prompts, params)]
