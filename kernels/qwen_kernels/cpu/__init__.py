"""Kernels in C++ for CPUs, compiled when they are first used."""

from qwen_kernels.cpu.build import instruction_set, library, product_targets
from qwen_kernels.cpu.products import GROUP, MOST_ROWS, dequantize_int4, int4_product, int8_product, pack_int4

__all__ = ["GROUP", "MOST_ROWS", "dequantize_int4", "instruction_set", "int4_product", "int8_product", "library",
           "pack_int4", "product_targets"]
