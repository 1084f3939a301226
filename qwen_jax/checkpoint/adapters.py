"""LoRA adapters in PEFT's format: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import regex
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qwen_jax.atomic import new_folder
from qwen_jax.checkpoint.safetensors_io import check_finite
from qwen_jax.checkpoint.source import read_json
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError
from qwen_jax.model.lora import SITES, TARGETS, LoraConfig, target_sizes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULES = {target: "self_attn" if site in ("qkv", "o") else "mlp" for site, targets in SITES.items()
            for target in targets}
# Settings of PEFT that `_parse` reads, or that change nothing in what a trained adapter computes. Any other one,
# also one that is not known here, must be as if it were absent.
_READ_OR_FREE = frozenset((
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "init_lora_weights", "layers_pattern",
    "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying"))
_ABSENT = (None, False, "none", "", [], {})
# Initial values that leave the base model as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take a part out of
# its weights, so that the adapter fits the rest alone.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_MAX_SIZE = 1 << 24  # of r and lora_alpha
_PATTERN_SECONDS = 0.2  # for matching a pattern of target_modules, which may take exponential time


def save_adapter(adapter: Mapping[str, jax.Array], config: ModelConfig, lora: LoraConfig, dst: str | Path,
                 base_model: str = "") -> Path:
    """Write a LoRA adapter in float32 as a new folder in PEFT's format, and return ``dst``.

    adapter: arrays with ``init_adapter``'s names and shapes. base_model: recorded as the model that the adapter belongs
    to. Raises UserError when ``dst`` exists or the disk is full; the folder appears complete or not at all.
    """
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "r": lora.rank,
                "lora_alpha": lora.alpha, "lora_dropout": 0.0, "target_modules": list(lora.targets), "bias": "none",
                "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "use_dora": False,
                "use_rslora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
                "layers_to_transform": None, "layers_pattern": None, "revision": None}
    tensors = {}
    for name, value in adapter.items():
        target, factor = name.rsplit(".", 1)
        for layer, matrix in enumerate(np.asarray(value, np.float32)):
            tensors[_peft_name(layer, target, factor)] = np.ascontiguousarray(matrix)
    with new_folder(dst, sum(tensor.nbytes for tensor in tensors.values())) as folder:
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return Path(dst)


def load_adapter(folder: str | Path, config: ModelConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """Read a LoRA adapter that PEFT or `save_adapter` wrote for a model of this architecture.

    Returns its configuration and float32 host arrays (``{target}.a`` ``[L, r, I]``, ``{target}.b`` ``[L, O, r]``).
    rsLoRA's scale, alpha / sqrt(rank), is expressed through alpha. Raises UserError for other kinds of adapter, for an
    adapter of another architecture, and for missing, unexpected, misshapen or non-finite tensors.
    """
    folder = Path(folder)
    try:
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]  # a pipe would be waited for
    except OSError as error:
        raise UserError(f"the folder of an adapter cannot be read: {error.strerror}: {str(folder):.80}") from None
    if missing:
        raise UserError(f"{folder} is not a PEFT adapter: it has no {missing[0]}")
    lora = _parse(read_json(folder / CONFIG), folder)
    sizes, rank, layers = target_sizes(config), lora.rank, config.num_layers
    expected = {_peft_name(layer, target, factor): (rank, sizes[target][0]) if factor == "a" else
                (sizes[target][1], rank) for target in lora.targets for layer in range(layers) for factor in "ab"}
    try:
        with safe_open(folder / WEIGHTS, framework="flax") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check(expected, found, folder)
            tensors = {name: np.asarray(file.get_tensor(name)) for name in expected}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / WEIGHTS}: {error}") from None
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    adapter = {f"{target}.{factor}": np.stack([tensors[_peft_name(layer, target, factor)] for layer in range(layers)]
                                              ).astype(np.float32)
               for target in lora.targets for factor in "ab"}
    return lora, adapter


def _peft_name(layer: int, target: str, factor: str) -> str:
    return f"base_model.model.model.layers.{layer}.{_MODULES[target]}.{target}.lora_{factor.upper()}.weight"


def _parse(settings: Mapping, folder: Path) -> LoraConfig:
    """Return the LoRA configuration in PEFT's settings; UserError for settings with which it is not plain LoRA."""
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds a {settings.get('peft_type')} adapter: only LORA is implemented")
    for name, value in settings.items():
        if name not in _READ_OR_FREE and value not in _ABSENT:
            raise UserError(f"{folder} uses {name}={value!r}, which is not implemented")
    init = settings.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        raise UserError(f"{folder} uses init_lora_weights={init!r}, with which an adapter fits a changed base model: "
                        "save it with PEFT's path_initial_model_for_weight_conversion, as a plain adapter")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise UserError(f"{folder / CONFIG}: r and lora_alpha must be numbers, not {rank!r} and {alpha!r}")
    if max(rank, alpha) > _MAX_SIZE:
        raise UserError(f"{folder / CONFIG}: r and lora_alpha must be at most {_MAX_SIZE}, not {rank!r:.40} and "
                        f"{alpha!r:.40}")
    if settings.get("use_rslora") and rank > 0:
        alpha = alpha * math.sqrt(rank)
    names = [str(name).rsplit(".", 1)[-1] for name in _modules(settings.get("target_modules"), folder)]
    return LoraConfig(rank, float(alpha), tuple(target for target in TARGETS if target in names) +
                      tuple(name for name in names if name not in TARGETS))


def _modules(given: Any, folder: Path) -> list[Any]:
    """Return the names of modules that ``target_modules`` in PEFT's settings stands for: a list, or a pattern."""
    if given == "all-linear":
        return list(TARGETS)
    if not isinstance(given, str | list):
        raise UserError(f"{folder / CONFIG}: target_modules must be a list of names or a pattern, not {given!r:.40}")
    if isinstance(given, list):
        return given
    try:  # PEFT reads a string as a pattern for whole module names
        return [target for target in TARGETS
                if regex.fullmatch(given, f"model.layers.0.{_MODULES[target]}.{target}", timeout=_PATTERN_SECONDS)]
    except (regex.error, TimeoutError, RecursionError, MemoryError, OverflowError) as error:
        raise UserError(f"{folder / CONFIG}: target_modules must be a pattern that can be matched, not {given!r:.40}: "
                        f"{error}") from None


def _check(expected: Mapping[str, tuple], found: Mapping[str, tuple], folder: Path) -> None:
    """Raise UserError when the names or shapes of an adapter's tensors are not those that the model expects."""
    problems = [f"lacks {name}" for name in expected if name not in found]
    problems += [f"has an unexpected {name}" for name in found if name not in expected]
    problems += [f"has {name} as {list(found[name])}, should be {list(shape)}" for name, shape in expected.items()
                 if name in found and found[name] != shape]
    if problems:
        more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise UserError(f"the adapter in {folder} does not fit this model: it {'; '.join(problems[:3])}{more}")
