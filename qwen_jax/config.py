"""Architecture of a Qwen2.5 model, read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.errors import UserError


@dataclass(frozen=True)
class Yarn:
    """Parameters of YaRN context extension (https://arxiv.org/abs/2309.00071), with transformers' names."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def scale(self) -> float:
        """Return YaRN's factor on cos and sin: the configured one, or else the paper's ``0.1 ln(factor) + 1``."""

        def magnitude(mscale: float = 1.0) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all_dim:
            return magnitude(self.mscale) / magnitude(self.mscale_all_dim)
        return magnitude()


@dataclass(frozen=True)
class Rope:
    """Parameters of rotary position embedding: base ``theta``, and ``yarn`` if the context is extended by YaRN."""

    theta: float = 1_000_000.0
    yarn: Yarn | None = None

    def frequencies(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Return rotary embedding's inverse frequencies, float32 ``[head_dim / 2]``, and the factor on cos and sin.

        The arithmetic is done in float32 in transformers' order (``_compute_yarn_parameters``), because at long
        positions one unit in the last place of a frequency is visible in the logits.
        """
        dims = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        wavelengths = np.float32(self.theta) ** dims
        extrapolated = np.float32(1.0) / wavelengths
        if self.yarn is None:
            return extrapolated, 1.0
        yarn = self.yarn

        def correction_dim(rotations: float) -> float:
            periods = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
            return head_dim * math.log(periods) / (2 * math.log(self.theta))

        low, high = correction_dim(yarn.beta_fast), correction_dim(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # the ramp would divide by zero
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        keep = np.float32(1) - np.clip(ramp, 0, 1)
        interpolated = np.float32(1.0) / (np.float32(yarn.factor) * wavelengths)
        return interpolated * (1 - keep) + extrapolated * keep, yarn.scale()


# Fields of a model's configuration on which no program depends, with values that stand for any.
UNTRACED = {"dtype": "", "bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a Qwen2.5 model. Sizes are element counts; ``dtype`` is the checkpoint's element type."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    # Dual Chunk Attention settings of Qwen2.5-1M checkpoints, which change nothing up to one chunk (262,144 tokens).
    # They are kept for export, and `max_context` ends where they would begin to matter.
    dual_chunk_attention: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_dim", "max_position_embeddings")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"config: {name} must be a positive integer, not {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"config: {self.num_heads} query heads do not divide into {self.num_kv_heads} KV heads")
        if self.head_dim % 2:
            raise UserError(f"config: head_dim must be even for rotary embeddings, not {self.head_dim}")

    @property
    def group_size(self) -> int:
        """Number of query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def max_context(self) -> int:
        """Largest number of tokens of a sequence that the model supports here, YaRN included."""
        limit = self.max_position_embeddings
        if self.rope.yarn:
            limit = max(limit, int(self.rope.yarn.factor * self.rope.yarn.original_max_position_embeddings))
        if self.dual_chunk_attention:
            limit = min(limit, int(self.dual_chunk_attention.get("original_max_position_embeddings", 262_144)))
        return limit

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model; an embedding that is also the output head counts once."""
        attention = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * (self.hidden_size + 1)
        attention += self.num_heads * self.head_dim * self.hidden_size
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * layer + self.hidden_size

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """Return the configuration of a released model, such as ``qwen2.5-7b`` or ``qwq-32b``."""
        key = name.lower().removeprefix("qwen/")
        if key not in PRESETS:
            raise UserError(f"unknown preset {name!r}; known presets: {', '.join(sorted(PRESETS))}")
        return PRESETS[key]

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> ModelConfig:
        """Read a Hugging Face ``config.json`` (its path, its folder, or the parsed mapping).

        Both spellings of rope are read: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``.
        Raises UserError for another architecture and for any setting that is not implemented here.
        """
        if isinstance(source, Mapping):
            hf = dict(source)
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            if not path.is_file():
                raise UserError(f"no config.json in {path.parent}: give a folder that holds a Hugging Face checkpoint")
            try:
                hf = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise UserError(f"{path} is not valid JSON: {error}") from None
        return _from_hf(hf)

    def to_hf(self) -> dict[str, Any]:
        """Return a ``config.json`` mapping that transformers 4 and 5 read as this model."""
        hf: dict[str, Any] = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "attention_dropout": 0.0,
            "torch_dtype": self.dtype,
        }
        if self.head_dim * self.num_heads != self.hidden_size:
            hf["head_dim"] = self.head_dim
        if self.rope.yarn:
            yarn = {k: v for k, v in vars(self.rope.yarn).items() if v is not None and v != _YARN_DEFAULTS.get(k)}
            hf["rope_scaling"] = {"rope_type": "yarn", **yarn}
        if self.bos_token_id is not None:
            hf["bos_token_id"] = self.bos_token_id
        if self.eos_token_id is not None:
            hf["eos_token_id"] = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        if self.dual_chunk_attention:
            hf["dual_chunk_attention_config"] = dict(self.dual_chunk_attention)
        return hf


_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def _from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Return the model's architecture from a parsed ``config.json``; raises as `ModelConfig.from_hf`."""
    architectures = hf.get("architectures") or []
    model_type = hf.get("model_type")
    if model_type != "qwen2" or any(name != "Qwen2ForCausalLM" for name in architectures):
        found = ", ".join(architectures) or model_type or "none named"
        raise UserError(f"this is not a Qwen2.5 checkpoint: architecture {found}; only Qwen2ForCausalLM is supported")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if name not in hf]
    if missing:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    if hf.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {hf['hidden_act']!r} is not implemented; Qwen2.5 uses silu")
    _refuse_sliding_window(hf)
    heads = hf["num_attention_heads"]
    eos = hf.get("eos_token_id")
    max_positions = hf.get("max_position_embeddings", 32768)
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        max_position_embeddings=max_positions,
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=_read_rope(hf, max_positions),
        tie_word_embeddings=hf.get("tie_word_embeddings", False),
        dtype=str(hf.get("dtype") or hf.get("torch_dtype") or "float32").removeprefix("torch."),
        bos_token_id=hf.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        dual_chunk_attention=hf.get("dual_chunk_attention_config"),
    )


def _refuse_sliding_window(hf: Mapping[str, Any]) -> None:
    """Raise UserError when a layer of the model has sliding-window attention.

    In transformers the layers from ``max_window_layers`` on have one; where that is no layer, the settings have no
    effect.
    """
    first = hf.get("max_window_layers", 28)
    slides = hf.get("use_sliding_window") and hf.get("sliding_window") and first < hf["num_hidden_layers"]
    if hf.get("layer_types") is not None:
        slides = any(kind != "full_attention" for kind in hf["layer_types"])
    if slides:
        raise UserError(
            f"sliding-window attention is not implemented (use_sliding_window with sliding_window="
            f"{hf.get('sliding_window')} from layer {first}); set use_sliding_window to false for full attention"
        )


def _read_rope(hf: Mapping[str, Any], max_positions: int) -> Rope:
    """Return the rotary-embedding settings of a parsed ``config.json``, in either of transformers' spellings.

    UserError for a type or setting that is not implemented.
    """
    rope = dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = float(rope.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0)  # transformers' default base
    if rope.pop("partial_rotary_factor", hf.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise UserError("partial_rotary_factor is not implemented: Qwen2.5 rotates whole heads")
    if kind == "default":
        return Rope(theta)
    if kind != "yarn":
        raise UserError(f"rope type {kind!r} is not implemented; known types: default, yarn")
    rope.setdefault("original_max_position_embeddings", max_positions)
    unknown = set(rope) - set(Yarn.__dataclass_fields__)
    if unknown:
        raise UserError(f"yarn settings not implemented: {', '.join(sorted(unknown))}")
    if rope.get("factor") is None:
        rope["factor"] = max_positions / rope["original_max_position_embeddings"]
    defaults = {k: v for k, v in _YARN_DEFAULTS.items() if rope.get(k) is None}
    return Rope(theta, Yarn(**{**rope, **defaults}))


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults and special tokens from ``generation_config.json``; None for options that it does not have."""

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], config: ModelConfig) -> GenerationDefaults:
        """Read the parsed ``generation_config.json`` (``{}`` when absent); EOS falls back to the model's config."""
        eos = hf.get("eos_token_id", config.eos_token_id)
        eos = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        names = ("pad_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return cls(eos_token_ids=eos, **{name: hf.get(name) for name in names})


def _presets() -> dict[str, ModelConfig]:
    """Return every released Qwen2.5 architecture by name."""
    shapes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
              "tie_word_embeddings", "vocab_size")
    sizes = {
        "0.5b": (896, 4864, 24, 14, 2, 64, True, 151_936),
        "1.5b": (1536, 8960, 28, 12, 2, 128, True, 151_936),
        "3b": (2048, 11_008, 36, 16, 2, 128, True, 151_936),
        "7b": (3584, 18_944, 28, 28, 4, 128, False, 152_064),
        "14b": (5120, 13_824, 48, 40, 8, 128, False, 152_064),
        "32b": (5120, 27_648, 64, 40, 8, 128, False, 152_064),
        "72b": (8192, 29_568, 80, 64, 8, 128, False, 152_064),
    }
    presets = {}
    for size, values in sizes.items():
        large = size in ("7b", "14b", "32b", "72b")
        eps = 1e-5 if size in ("14b", "32b", "72b") else 1e-6
        end_of_text, im_end = 151_643, 151_645
        base = ModelConfig(**dict(zip(shapes, values, strict=True)), rms_norm_eps=eps, bos_token_id=end_of_text,
                           eos_token_id=end_of_text,
                           max_position_embeddings=131_072 if large or size == "1.5b" else 32_768)
        instruct = replace(base, max_position_embeddings=32_768, rms_norm_eps=1e-6, eos_token_id=im_end)
        presets[f"qwen2.5-{size}"] = base
        presets[f"qwen2.5-{size}-instruct"] = instruct
        if size != "72b":  # Coder: the general model's shapes, always a 32k window
            presets[f"qwen2.5-coder-{size}"] = replace(base, max_position_embeddings=32_768, rms_norm_eps=1e-6)
            presets[f"qwen2.5-coder-{size}-instruct"] = instruct
        if size in ("1.5b", "7b", "72b"):  # Math: 4k window and the smaller rope base
            math_base = replace(base, max_position_embeddings=4096, rope=Rope(10_000.0))
            presets[f"qwen2.5-math-{size}"] = math_base
            presets[f"qwen2.5-math-{size}-instruct"] = replace(instruct, max_position_embeddings=4096,
                                                               rope=Rope(10_000.0))
        if size in ("7b", "14b"):  # 1M: a larger rope base, and Dual Chunk Attention beyond 262,144 tokens
            chunks = {"chunk_size": 262_144, "local_size": 8192, "original_max_position_embeddings": 262_144}
            presets[f"qwen2.5-{size}-instruct-1m"] = replace(
                instruct, max_position_embeddings=1_010_000, rms_norm_eps=1e-5, rope=Rope(10_000_000.0),
                dual_chunk_attention=chunks)
    presets["qwq-32b"] = replace(presets["qwen2.5-32b-instruct"], max_position_embeddings=40_960, rms_norm_eps=1e-5)
    return presets


PRESETS = _presets()
