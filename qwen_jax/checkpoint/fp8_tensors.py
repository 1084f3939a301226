"""FP8 weights of other tools' Hugging Face folders: e4m3 values beside scales to multiply them with.

transformers' "fp8" keeps ``weight_scale_inv`` for blocks of 128 x 128; compressed-tensors keeps ``weight_scale`` for
the tensor or for every output channel. Scales of activations (``input_scale``) and of KV caches are passed over: both
are found here anew.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from qwen_jax.errors import UserError

BLOCK = 128
CODE = "F8_E4M3"
SCALES = (".weight_scale", ".weight_scale_inv")
PASSED_OVER = (".input_scale", ".k_scale", ".v_scale", ".output_scale")


def scale_name(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The tensor that scales the FP8 tensor ``name``. UserError when there is none, or one of another shape."""
    stem = name.removesuffix(".weight")
    found = [stem + ending for ending in SCALES if stem + ending in shapes]
    if len(found) != 1:
        raise UserError(f"{name} is FP8 and has {'no scale' if not found else 'two scales'} "
                        f"({' or '.join(stem + ending for ending in SCALES)}): its values mean nothing without it")
    shape, of = shapes[found[0]], shapes[name]
    blocks = tuple(-(-size // BLOCK) for size in of)
    if len(of) != 2 or shape not in ((), (1,), (of[0],), (of[0], 1), blocks):
        raise UserError(f"{found[0]} is {list(shape)}, which scales neither {name} {list(of)}, nor its rows, nor its "
                        f"blocks of {BLOCK} x {BLOCK}")
    return found[0]


def dequantized(name: str, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """FP8 ``values[out, in]`` times their scales, float32. UserError for scales and values that are no numbers."""
    scale = scale.astype(np.float32)
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise UserError(f"the scale of {name} holds zero, a negative number, NaN or Inf: the checkpoint is damaged")
    if (values.view(np.uint8) & 0x7F == 0x7F).any():  # e4m3's NaN; it has no infinity
        raise UserError(f"{name} holds NaN: the checkpoint is damaged")
    wide, (rows, columns) = values.astype(np.float32), values.shape
    if scale.ndim == 2 and scale.shape[1] > 1 or scale.ndim == 2 and scale.shape[0] != rows:
        scale = np.repeat(np.repeat(scale, BLOCK, axis=0)[:rows], BLOCK, axis=1)[:, :columns]
    elif scale.size == rows:
        scale = scale.reshape(rows, 1)
    return wide * scale
