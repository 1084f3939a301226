"""Weights as compressed-tensors stores them (https://github.com/vllm-project/compressed-tensors): e4m3, int8 and int4.

Integers are ``scale * (code - zero)`` with a scale for the tensor, for every output, or for groups of inputs. In the
format "pack-quantized" codes of 4 or 8 bits fill 32-bit words, stored as unsigned numbers; elsewhere they are int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.checkpoint.quantized.fp8 import Blocks
from qwen_jax.checkpoint.quantized.integers import dequantized, unpacked
from qwen_jax.checkpoint.quantized.scheme import Matrix, Stored, refuse
from qwen_jax.errors import UserError

PACKED, SHAPE = ".weight_packed", ".weight_shape"
ROLES = {"scale": ".weight_scale", "zero": ".weight_zero_point", "groups": ".weight_g_idx"}


class Compressed(Blocks):
    """The scheme of compressed-tensors: e4m3 as in `Blocks`, int8, and packed integers of 4 or 8 bits."""

    passed_over = (*Blocks.passed_over, SHAPE, ".input_zero_point", ".output_zero_point", ".k_zero_point",
                   ".v_zero_point")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Read a ``quantization_config``; UserError for one that is not implemented."""
        groups = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]
        kinds = {(weights.get("type"), weights.get("num_bits")) for weights in groups}
        unread = kinds - {("float", 8), ("int", 8), ("int", 4)}
        if not groups or unread:
            kind, bits = min(unread, default=(None, None), key=str)
            raise refuse(f"compressed-tensors weights of {bits} bits ({kind})" if unread else
                         "compressed-tensors without config_groups")
        bits = {count for kind, count in kinds if kind == "int"}
        if len(bits) > 1:
            raise refuse("compressed-tensors with integers of 4 bits in some layers and of 8 in others")
        if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
            raise refuse("compressed-tensors with sparse weights")
        self.bits = next(iter(bits), 8)

    def matrices(self, stored: Mapping[str, Stored]) -> dict[str, Matrix]:
        found = super().matrices(stored)
        for name, tensor in stored.items():
            if name.endswith(PACKED):
                stem = name.removesuffix(PACKED)
            elif tensor.code == "I8" and name.endswith(".weight"):
                stem = name.removesuffix(".weight")
            else:
                continue
            parts = {role: stem + ending for role, ending in ROLES.items() if stem + ending in stored}
            found[stem + ".weight"] = self._matrix(name, parts, stored)
        return found

    def _matrix(self, name: str, parts: dict[str, str], stored: Mapping[str, Stored]) -> Matrix:
        """Return the matrix of integers that the tensor ``name`` holds, and check that its parts fit each other."""
        if "scale" not in parts:
            raise UserError(f"{name} has no scale: its values mean nothing without it")
        packed, shape = name.endswith(PACKED), stored[name].shape
        if len(shape) != 2:
            raise UserError(f"{name} is {list(shape)}, not a matrix: the checkpoint is damaged")
        out, inputs = shape[0], shape[1] * (32 // self.bits if packed else 1)
        groups = stored[parts["scale"]].shape[1:] or (1,)
        fits = {"scale": [(), (1,), (out,), (out, *groups)],
                "zero": [(), (1,), (out, *groups), (-(-out * self.bits // 32), *groups)], "groups": [(inputs,)]}
        for role, part in parts.items():
            if stored[part].shape not in fits[role] or "groups" not in parts and inputs % groups[0]:
                raise UserError(f"{part} is {list(stored[part].shape)}, which does not fit {name} {list(shape)}: the "
                                "checkpoint is damaged, or its config.json of another")
        return Matrix((out, inputs), {"packed" if packed else "codes": name, **parts})

    def dequantize(self, name: str, parts: Mapping[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
        if "values" in parts:
            return super().dequantize(name, parts, dtype)
        packed, scale = "packed" in parts, np.asarray(parts["scale"], np.float32)
        scale = scale.reshape(1, 1) if scale.size == 1 else scale.reshape(len(scale), -1)
        # Packed codes are unsigned, with a zero point in the middle.
        zero: Any = 1 << (self.bits - 1) if packed else 0
        if "zero" in parts:
            stored = parts["zero"]
            if len(stored) != len(scale):  # zero points of outputs, packed as codes are
                zero = unpacked(np.ascontiguousarray(stored.T), self.bits).T[:len(parts["packed"])].astype(np.int32)
            else:
                zero = zero + stored.astype(np.int32).reshape(scale.shape)
        groups = parts.get("groups")
        if groups is not None and (groups == -1).all():  # as written where the order of inputs is not used
            groups = None
        return dequantized(name, parts["packed" if packed else "codes"], self.bits if packed else None, scale=scale,
                           zero=zero, dtype=dtype, groups=groups)
