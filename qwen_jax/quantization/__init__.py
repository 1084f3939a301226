"""8-bit weights and KV caches: element types, scales, and which parts of a model are 8-bit."""

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
from qwen_jax.quantization.quantized_tensor import (
    E4M3,
    INT4,
    INT8,
    QuantizedTensor,
    TrainedInFP8,
    matrix,
    quantize,
    quantize_host,
    rows,
    saturate,
    widened,
)

__all__ = ["E4M3", "INPUTS", "INT4", "INT8", "Calibrated", "Precision", "QuantizedTensor", "Ranges", "TrainedInFP8",
           "default_precision", "matrix", "multiplies_fp8", "page_formats", "product", "quantize", "quantize_host",
           "rows", "saturate", "scales_of", "widened"]
