"""8-bit weights and KV caches: element types, scales, and what a checkpoint bears."""

from qwen_jax.quantization.fp8 import E4M3, FP8Tensor, matrix, product, quantize, quantize_host, rows, saturate, widened

__all__ = ["E4M3", "FP8Tensor", "matrix", "product", "quantize", "quantize_host", "rows", "saturate", "widened"]
