"""Weights that other tools quantised (GPTQ, AWQ, compressed-tensors, FP8), read as the numbers they stand for."""

from qwen_jax.checkpoint.quantized.scheme import SETTINGS_FILES, Matrix, Scheme, Stored, scheme_of

__all__ = ["SETTINGS_FILES", "Matrix", "Scheme", "Stored", "scheme_of"]
