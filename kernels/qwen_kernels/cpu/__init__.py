"""Kernels in C++ for CPUs, compiled when they are first used."""

from qwen_kernels.cpu.build import instruction_set, int8_targets, library
from qwen_kernels.cpu.products import MOST_ROWS, int8_product

__all__ = ["MOST_ROWS", "instruction_set", "int8_product", "int8_targets", "library"]
