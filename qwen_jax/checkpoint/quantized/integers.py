"""Weights in 4 or 8 bits with a scale, and often a zero point, for each group of inputs: GPTQ and AWQ.

A matrix is ``weight[o, i] = scale[o, g] * (code[o, i] - zero[o, g])``, where input ``i`` belongs to group ``g``. The
tools differ in how they lay codes into 32-bit words (GPTQ: https://arxiv.org/abs/2210.17323, files as AutoGPTQ and
GPTQModel write them; AWQ: https://arxiv.org/abs/2306.00978, files as AutoAWQ's "gemm" version writes them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.checkpoint.quantized.fp8 import check_scale
from qwen_jax.checkpoint.quantized.scheme import Matrix, Stored, refuse
from qwen_jax.errors import UserError

QWEIGHT = ".qweight"
ROLES = {"codes": QWEIGHT, "zero": ".qzeros", "scale": ".scales", "groups": ".g_idx"}
AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # where in a word AWQ puts the code of each of eight outputs
_CHUNK = 1 << 22  # codes that are widened at a time


class Gptq:
    """GPTQ's scheme: ``qweight[in / n, out]`` has n codes of one output in a word, and ``qzeros[groups, out / n]``."""

    passed_over = ()

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Read a ``quantization_config``; UserError for one that is not implemented."""
        self.bits = bits_of(settings, (4, 8), "GPTQ")
        kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if kind not in ("gptq", "gptq_v2"):
            raise refuse(f"GPTQ weights in the layout {kind!r}")
        if any(not pattern.startswith("-") for pattern in settings.get("dynamic") or {}):
            raise refuse("GPTQ weights with other bits in some layers (dynamic)")
        # The first layout stores a zero point less one.
        self.offset = 1 if kind == "gptq" else 0

    def matrices(self, stored: Mapping[str, Stored]) -> dict[str, Matrix]:
        per_word = 32 // self.bits
        return grouped(stored, lambda codes: (codes[1], codes[0] * per_word),
                       lambda groups, out: (groups, out // per_word))

    def dequantize(self, name: str, parts: Mapping[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
        mask = (1 << self.bits) - 1
        zero = unpacked(parts["zero"], self.bits).T.astype(np.int32)
        zero = zero + self.offset & mask
        return dequantized(name, parts["codes"].T, self.bits, scale=parts["scale"].T, zero=zero, dtype=dtype,
                           groups=parts.get("groups"))


class Awq:
    """AWQ's scheme: ``qweight[in, out / 8]`` and ``qzeros[groups, out / 8]``, eight outputs in a word."""

    passed_over = ()

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Read a ``quantization_config``; UserError for one that is not implemented."""
        self.bits = bits_of(settings, (4,), "AWQ")
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm" or not settings.get("zero_point", True):
            raise refuse(f"AWQ weights in the layout {version!r}"
                         + ("" if settings.get("zero_point", True) else " without zero points"))

    def matrices(self, stored: Mapping[str, Stored]) -> dict[str, Matrix]:
        return grouped(stored, lambda codes: (codes[1] * 8, codes[0]), lambda groups, out: (groups, out // 8))

    def dequantize(self, name: str, parts: Mapping[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
        def in_order(words: np.ndarray) -> np.ndarray:
            codes = unpacked(words, 4)
            return codes.reshape(len(codes), -1, 8)[..., AWQ_PLACES].reshape(len(codes), -1).T

        codes = np.ascontiguousarray(in_order(parts["codes"]))
        return dequantized(name, codes, None, scale=parts["scale"].T, zero=in_order(parts["zero"]).astype(np.int32),
                           dtype=dtype)


def bits_of(settings: Mapping[str, Any], read: tuple[int, ...], method: str) -> int:
    """Return the bits of a code; UserError when they are none of those that are ``read``."""
    if settings.get("bits") not in read:
        raise refuse(f"{method} weights of {settings.get('bits')} bits")
    return settings["bits"]


def grouped(stored: Mapping[str, Stored], shape_of: Any, zeros_of: Any) -> dict[str, Matrix]:
    """Find the matrices that consist of ``qweight``, ``qzeros``, ``scales`` and perhaps ``g_idx``.

    shape_of: function of the shape of ``qweight`` that returns the matrix's. zeros_of: function of the numbers of
    groups and of outputs that returns the shape of ``qzeros``.
    """
    found = {}
    for name in stored:
        if not name.endswith(QWEIGHT):
            continue
        stem = name.removesuffix(QWEIGHT)
        parts = {role: stem + ending for role, ending in ROLES.items() if stem + ending in stored}
        lacking = [ROLES[role] for role in ("zero", "scale") if role not in parts]
        if lacking:
            raise UserError(f"{name} lacks {stem}{lacking[0]}: download the checkpoint again")
        out, inputs = shape_of(stored[name].shape) if len(stored[name].shape) == 2 else (0, 0)
        groups = stored[parts["scale"]].shape[0] if stored[parts["scale"]].shape else 0
        fits = {"zero": zeros_of(groups, out), "scale": (groups, out), "groups": (inputs,)}
        wrong = [part for role, part in parts.items() if role != "codes" and stored[part].shape != fits[role]]
        if wrong or not groups or "groups" not in parts and inputs % groups:
            part = wrong[0] if wrong else parts["scale"]
            raise UserError(f"{part} is {list(stored[part].shape)}, which does not fit {name} "
                            f"{list(stored[name].shape)}: the checkpoint is damaged, or its config.json of another")
        found[stem + ".weight"] = Matrix((out, inputs), parts)
    return found


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes in 32-bit words ``[..., n]``, the lowest bits first, as uint8 ``[..., n * 32 / bits]``."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return octets
    return np.stack((octets & 15, octets >> 4), axis=-1).reshape(*octets.shape[:-1], -1)


def dequantized(name: str, codes: np.ndarray, bits: int | None, *, scale: np.ndarray, zero: np.ndarray | int,
                dtype: np.dtype, groups: np.ndarray | None = None, inputs: int | None = None) -> np.ndarray:
    """Return ``scale * (codes - zero)``, computed in float32, a few rows at a time.

    Args:
      codes: ``[out, in]``, or where ``bits`` is given words ``[out, ...]`` of codes.
      scale: ``[out, groups]`` or ``[1, 1]``. zero: ``[out, groups]`` or a number.
      groups: group of each input, ``[in]``; by default neighbours, as many in each.
      inputs: the number of inputs, where the last word of a row is not full.

    Raises UserError for damaged scales and groups.
    """
    scale = np.asarray(scale, np.float32)
    check_scale(name, scale)
    width = codes.shape[1] * (32 // bits if bits else 1) if inputs is None else inputs
    count = scale.shape[1]
    if groups is not None and (groups.min() < 0 or groups.max() >= count):
        raise UserError(f"{name} has inputs of group {groups.max()}, and scales of {count} groups: the checkpoint is "
                        "damaged")
    result = np.empty((len(codes), width), dtype)
    step = max(1, _CHUNK // width)
    for start in range(0, len(codes), step):
        rows = slice(start, start + step)
        part = unpacked(codes[rows], bits)[:, :width] if bits else codes[rows]
        scales = scale if len(scale) == 1 else scale[rows]
        zeros = zero if np.ndim(zero) == 0 else zero[rows]
        if groups is not None:
            scales, zeros = scales[:, groups], zeros if np.ndim(zeros) == 0 else zeros[:, groups]
        else:
            part = part.reshape(len(part), count, width // count)
            scales, zeros = scales[..., None], zeros if np.ndim(zeros) == 0 else zeros[..., None]
        values = (part.astype(np.float32) - zeros) * scales
        with np.errstate(over="ignore"):  # what does not fit is found where values are checked
            result[rows] = values.reshape(len(part), width)
    return result
