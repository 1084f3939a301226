"""8-bit weights and KV caches: element types, scales, and which parts of a model are 8-bit."""

from qwen_jax.quantization.fp8 import (
    E4M3,
    EightBitTensor,
    TrainedInFP8,
    matrix,
    quantize,
    quantize_host,
    rows,
    saturate,
    widened,
)
from qwen_jax.quantization.precision import (
    INPUTS,
    Calibrated,
    Precision,
    Ranges,
    default_precision,
    page_formats,
    scales_of,
)
from qwen_jax.quantization.product import multiplies_fp8, product

__all__ = ["E4M3", "INPUTS", "Calibrated", "EightBitTensor", "Precision", "Ranges", "TrainedInFP8", "default_precision",
           "matrix", "multiplies_fp8", "page_formats", "product", "quantize", "quantize_host", "rows", "saturate",
           "scales_of", "widened"]
