"""Random requests of every sort that an engine takes, for a tiny model whose tokens are bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_jax import Engine, SamplingParams, StructuredOutput
from qwen_jax.checkpoint.adapters import save_adapter
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.engine.frontend.input_processor import EMBEDDING_PARAMS, SCORING_PARAMS
from qwen_jax.engine.frontend.request import Request
from qwen_jax.model import Qwen2, build, init, params_of
from qwen_jax.model.lora import TARGETS, LoraConfig, init_adapter

MERGES = ("th", "er", "an", "ab", "ba", "in", "on", "re")  # two bytes in one token
END, STOP = 264, 265  # ids of <|im_end|>, which ends answers, and <|stop|>, which does not
VOCAB = 266  # of the tokenizer; the model has a few ids more, which do not exist
CONFIG = ModelConfig(vocab_size=270, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
                     head_dim=8, max_position_embeddings=1024, rope=Rope(10_000.0), dtype="float32", eos_token_id=END)
ADAPTERS = ("narrow", "wide", "loud")  # values of the last one can leave the range of 8 bits
PRINTABLE = [chr(code) for code in range(33, 127)]
FORMS = (
    StructuredOutput(regex=r"[A-C]{2}-[0-9]{3}"), StructuredOutput(regex=r"(ab|ba){2,14}!"),
    StructuredOutput(regex=r"[a-z ]{0,40}\."), StructuredOutput(choice=("yes", "no", "another thing", "an")),
    StructuredOutput(json_object=True),
    StructuredOutput(json_schema={"type": "object", "additionalProperties": False, "required": ["verdict", "score"],
                                  "properties": {"verdict": {"enum": ["fraud", "legit"]}, "score": {"type": "integer"},
                                                 "why": {"type": "string", "maxLength": 8}}}),
)


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, a few pairs of letters, and two control tokens."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {pair: 256 + index for index, pair in enumerate(MERGES)}
    backend = Tokenizer(models.BPE(vocab, [tuple(pair) for pair in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>",
                                        additional_special_tokens=["<|stop|>"])
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|stop|>"]) == [END, STOP] and len(tokenizer) == VOCAB
    return tokenizer


@cache
def peaked_model() -> Qwen2:
    """A random model whose logits are well apart, and whose text often repeats itself."""
    rng = np.random.default_rng(3)
    params = {path: rng.normal(size=value.shape).astype(np.float32) if path.endswith("bqkv") else value
              for path, value in params_of(init(CONFIG, 3, "float32")).items()}
    return build(CONFIG, {**params, "head.weight": 4 * params["head.weight"]})


@cache
def near_model() -> Qwen2:
    """A model that often says what `peaked_model` says: its draft model."""
    rng = np.random.default_rng(0)
    return build(CONFIG, {path: np.asarray(value) + 0.01 * rng.normal(size=value.shape).astype(np.float32)
                          for path, value in params_of(peaked_model()).items()})


def save_adapters(folder: Path) -> None:
    """Save the LoRA adapters named by `ADAPTERS` into folders of their names."""
    rng = np.random.default_rng(1)
    sizes = (2, 0.1, ("q_proj", "down_proj")), (4, 0.1, TARGETS), (1, 1.0, ("v_proj",))
    for name, (rank, scale, targets) in zip(ADAPTERS, sizes, strict=True):
        lora = LoraConfig(rank, 2.0 * rank, targets)
        adapter = {key: jnp.asarray(scale * rng.normal(size=value.shape), jnp.float32)
                   for key, value in init_adapter(CONFIG, lora).items()}
        save_adapter(adapter, CONFIG, lora, folder / name)


@dataclass(frozen=True)
class Case:
    """A random request as a client gives it.

    Attributes:
      pooling: embedding that is wanted instead of an answer. continuation: tokens whose score is wanted instead.
      abort_after: length of the answer, in tokens, at which the client leaves; None for a client who stays.
    """

    number: int
    prompt: list[int] | str
    params: SamplingParams
    adapter: str | None = None
    priority: int = 0
    cache_salt: str = ""
    pooling: str | None = None
    continuation: tuple[int, ...] = ()
    abort_after: int | None = None

    @property
    def sorts(self) -> list[str]:
        """Names of the options that it sets, and of what else is special about it."""
        if self.pooling or self.continuation:
            return ["an embedding" if self.pooling else "a score"]
        special = {"sampling": self.params.temperature > 0, "n > 1": self.params.n > 1, "an adapter": self.adapter,
                   "a priority": self.priority, "a salt": self.cache_salt, "a text": isinstance(self.prompt, str),
                   "a client who leaves": self.abort_after is not None}
        usual = ("max_tokens", "seed", "temperature", "n")
        options = {name: value not in (None, False) for name, value in vars(self.params).items() if name not in usual}
        return [name for name, value in (special | options).items() if value]

    def requests(self, engine: Engine) -> list[Request]:
        """Return the engine's requests for it, ``params.n`` of them."""
        options = {"adapter": self.adapter, "priority": self.priority, "cache_salt": self.cache_salt}
        if self.continuation:
            return engine.input_processor.score_requests(self.prompt, self.continuation, **options)
        return engine.input_processor.requests(self.prompt, self.params, pooling=self.pooling, **options)


class Cases:
    """Generator of random cases, which are the same for the same seed.

    Args:
      longest: maximum number of tokens of a prompt and its answer. long: chance that three cases follow with
        short prompts and long answers that nothing ends early: they need further pages while they run.
    """

    def __init__(self, seed: int | str, longest: int, long: float) -> None:
        self._random, self._longest, self._long, self._number = random.Random(seed), longest, long, 0
        self._long_ones = 0  # that follow
        self._documents = [self._tokens(longest) for _ in range(2)]  # whose beginnings prompts share

    def draw(self, count: int) -> list[Case]:
        """Return further random cases."""
        return [self._case() for _ in range(count)]

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(VOCAB - 2) for _ in range(count)]

    def _case(self) -> Case:
        self._number += 1
        pick, chance = self._random, self._chance
        case = Case(self._number, self._prompt(), self._params(), priority=pick.choice((0, 0, 0, 1, -1)),
                    adapter=pick.choice((None, None, None, *ADAPTERS)), cache_salt="tenant" if chance(0.1) else "",
                    abort_after=pick.randrange(25) if chance(0.1) else None)
        if self._long_ones or chance(self._long):
            self._long_ones = (self._long_ones or 3) - 1
            params = SamplingParams(max_tokens=pick.randrange(80, 140), ignore_eos=True, logprobs=2, seed=self._number,
                                    temperature=pick.choice((0.0, 1.0)), frequency_penalty=pick.choice((0.0, 0.4)))
            return replace(case, prompt=self._tokens(pick.randrange(40, 64)), params=params, abort_after=None)
        if chance(0.06):
            return replace(case, pooling=pick.choice(("mean", "last")), params=EMBEDDING_PARAMS)
        if chance(0.06) and not isinstance(case.prompt, str):
            cut = pick.randrange(1, len(case.prompt) + 1)
            return replace(case, prompt=case.prompt[:cut], params=SCORING_PARAMS,
                           continuation=tuple(case.prompt[cut:] or (5,))[:self._longest - 1 - cut] or (),
                           abort_after=None)
        return case

    def _prompt(self) -> list[int] | str:
        pick = self._random
        room = self._longest - 1
        kind, length = pick.random(), round(room ** pick.random())
        if kind < 0.45:  # shared with others, often up to a page's border
            cut = pick.choice((64, 128, 192, 256, pick.randrange(room)))
            return (pick.choice(self._documents)[:cut] + self._tokens(pick.randrange(1, 30)))[:room]
        if kind < 0.7:
            phrase = self._tokens(pick.randrange(1, 12))
            return (phrase * length)[:length]
        if kind < 0.8:
            words = ("the ", "another ", "né", "漢", "🎈", "ab", "x")
            return "".join(pick.choices(words, k=length // 8 + 1))
        return self._tokens(room if kind < 0.83 else length)

    def _params(self) -> SamplingParams:
        """Return sampling options; each of them is set in some of the requests."""
        pick, chance = self._random, self._chance
        options = {"max_tokens": pick.choice((1, 2, 5, 12, 25, 50)), "seed": pick.randrange(2**63),
                   "temperature": pick.choice((0.0, 0.0, 0.3, 0.7, 1.0, 1.5))}
        likely = {
            "top_k": pick.choice((1, 5, 40, 100)), "top_p": pick.choice((0.3, 0.9)), "min_p": pick.choice((0.02, 0.2)),
            "repetition_penalty": pick.choice((0.8, 1.3)), "presence_penalty": pick.uniform(-1, 1),
            "frequency_penalty": pick.uniform(-1, 1), "logit_bias": self._bias(), "ignore_eos": True,
            "stop_token_ids": [*self._tokens(8), STOP], "stop": self._stops(),
            "min_tokens": pick.randrange(options["max_tokens"] + 1), "prompt_logprobs": pick.choice((0, 3)),
        }
        options |= {name: value for name, value in likely.items() if chance(0.13)}
        if chance(0.5):
            options["logprobs"] = pick.choice((0, 2, 20))
        if chance(0.1):  # texts of two letters, which stop where several tokens make a string
            options |= {"logit_bias": dict.fromkeys(byte_tokenizer().encode("a b", add_special_tokens=False), 12.0),
                        "stop": [pick.choice(("aab", "bb", "abba", "b a"))], "temperature": 1.0}
        elif chance(0.12):
            options["structured_output"] = pick.choice(FORMS)
        if options["temperature"] > 0 and chance(0.1):
            options["n"] = pick.choice((2, 3))
        return SamplingParams(**options)

    def _bias(self) -> dict[int, float]:
        pick = self._random
        return {token: pick.choice((-100.0, -3.0, 2.0, 6.0)) for token in self._tokens(pick.choice((1, 5, 40)))}

    def _stops(self) -> list[str]:
        return self._random.sample(PRINTABLE, 8) + ["the end"]
