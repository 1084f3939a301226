"""FP8 weights: e4m3 values beside scales to multiply them with.

transformers' "fp8" stores ``weight_scale_inv`` for blocks of 128 x 128; compressed-tensors stores ``weight_scale`` for
the tensor or for every output channel. Scales of activations (``input_scale``) and of KV caches are not read: the
engine determines its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwen_jax.checkpoint.quantized.scheme import Matrix, Stored, refuse
from qwen_jax.errors import UserError

BLOCK = 128
CODE = "F8_E4M3"
SCALES = (".weight_scale", ".weight_scale_inv")


class Blocks:
    """The scheme of e4m3 matrices, with a scale for blocks of 128 x 128, for output channels, or for the tensor."""

    passed_over = (".input_scale", ".k_scale", ".v_scale", ".output_scale")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError when ``settings``, a ``quantization_config``, names blocks of another size."""
        if list(settings.get("weight_block_size") or [BLOCK, BLOCK]) != [BLOCK, BLOCK]:
            raise refuse(f"FP8 weights with blocks of {settings['weight_block_size']}")

    def matrices(self, stored: Mapping[str, Stored]) -> dict[str, Matrix]:
        return {name: Matrix(tensor.shape, {"values": name, "scale": scale_name(name, stored)})
                for name, tensor in stored.items() if tensor.code == CODE}

    def dequantize(self, name: str, parts: Mapping[str, np.ndarray], dtype: np.dtype) -> np.ndarray:
        return dequantized(name, parts["values"], parts["scale"]).astype(dtype, copy=False)


def scale_name(name: str, stored: Mapping[str, Stored]) -> str:
    """Return the name of the tensor that scales the FP8 tensor ``name``.

    Raises UserError when there is none, or two, or its shape does not fit.
    """
    stem = name.removesuffix(".weight")
    scales = [stem + ending for ending in SCALES if stem + ending in stored]
    if len(scales) != 1:
        raise UserError(f"{name} is FP8 and has {'no scale' if not scales else 'two scales'} "
                        f"({' or '.join(stem + ending for ending in SCALES)}): its values mean nothing without it")
    shape, scaled = stored[scales[0]].shape, stored[name].shape
    blocks = tuple(-(-size // BLOCK) for size in scaled)
    if len(scaled) != 2 or shape not in ((), (1,), (scaled[0],), (scaled[0], 1), blocks):
        raise UserError(f"{scales[0]} is {list(shape)}, which scales neither {name} {list(scaled)}, nor its rows, nor "
                        f"its blocks of {BLOCK} x {BLOCK}")
    return scales[0]


def dequantized(name: str, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return FP8 ``values[out, in]`` times their scales, as float32.

    Raises UserError for values that are NaN and for scales that are not positive and finite.
    """
    scale = scale.astype(np.float32)
    check_scale(name, scale)
    if (values.view(np.uint8) & 0x7F == 0x7F).any():  # e4m3's NaN; it has no infinity
        raise UserError(f"{name} holds NaN: the checkpoint is damaged")
    wide, (rows, columns) = values.astype(np.float32), values.shape
    if scale.ndim == 2 and scale.shape[1] > 1 or scale.ndim == 2 and scale.shape[0] != rows:
        scale = np.repeat(np.repeat(scale, BLOCK, axis=0)[:rows], BLOCK, axis=1)[:, :columns]
    elif scale.size == rows:
        scale = scale.reshape(rows, 1)
    return wide * scale


def check_scale(name: str, scale: np.ndarray) -> None:
    """Raise UserError when a matrix's scales are not all positive and finite."""
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise UserError(f"the scale of {name} holds zero, a negative number, NaN or Inf: the checkpoint is damaged")
