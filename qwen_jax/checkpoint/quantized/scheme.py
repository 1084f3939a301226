"""The choice of a quantisation scheme from a checkpoint's ``quantization_config``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen_jax.errors import UserError

SETTINGS_FILES = ("quantize_config.json", "quant_config.json")  # of GPTQ and AWQ, where config.json says nothing


class Stored(NamedTuple):
    """Element type, as safetensors spells it, and shape of a tensor in a file."""

    code: str
    shape: tuple[int, ...]


class Matrix(NamedTuple):
    """A quantised matrix: its shape ``(out, in)``, and the stored tensors that it consists of, by the role of each."""

    shape: tuple[int, int]
    parts: Mapping[str, str]  # role, such as "scale" -> name of the tensor


class Scheme(Protocol):
    """A way in which a tool stores quantised matrices.

    Attributes:
      passed_over: endings of the names of tensors that the numbers do not depend on.
    """

    passed_over: tuple[str, ...]

    def matrices(self, stored: Mapping[str, Stored]) -> dict[str, Matrix]:
        """Find the quantised matrices among a checkpoint's tensors, by the names that they have unquantised.

        Raises UserError for a matrix whose tensors are missing or do not fit each other.
        """

    def dequantize(self, name: str, parts: Mapping[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
        """Return a matrix's numbers, ``[out, in]``, from its parts. Raises UserError for damaged parts."""


def scheme_of(hf: Mapping[str, Any], folder: Path | None = None) -> Scheme:
    """Return the scheme that a parsed ``config.json`` names, or that of FP8 tensors when it names none.

    folder: the model's folder, where older tools of GPTQ and AWQ wrote their settings into files of their own.

    Raises UserError for methods and settings that are not read.
    """
    from qwen_jax.checkpoint.quantized.compressed import Compressed
    from qwen_jax.checkpoint.quantized.fp8 import Blocks
    from qwen_jax.checkpoint.quantized.integers import Awq, Gptq

    settings = hf.get("quantization_config") or _beside(folder) or {"quant_method": "fp8"}
    schemes = {"fp8": Blocks, "gptq": Gptq, "awq": Awq, "compressed-tensors": Compressed}
    method = settings.get("quant_method", "unknown")
    if method not in schemes:
        raise UserError(f"checkpoints quantised with {method} are not supported: use the model's 16-bit release, or "
                        "one in FP8, GPTQ, AWQ, compressed-tensors or GGUF")
    return schemes[method](settings)


def refuse(what: str) -> UserError:
    """Return the error for quantised weights that are not read; ``what`` names them."""
    return UserError(f"{what} are not supported: use another release of this model")


def _beside(folder: Path | None) -> dict[str, Any]:
    """Return settings from the files of older tools, in the words of a ``quantization_config``; else ``{}``."""
    if folder is None:
        return {}
    names = {"w_bit": "bits", "q_group_size": "group_size"}
    for file, method in zip(SETTINGS_FILES, ("gptq", "awq"), strict=True):
        if (folder / file).is_file():
            try:
                found = json.loads((folder / file).read_text())
                return {"quant_method": method} | {names.get(key, key): value for key, value in found.items()}
            except (ValueError, AttributeError):
                raise UserError(f"{folder / file} is not a JSON object: download it again") from None
    return {}
