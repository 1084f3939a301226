"""Dense causal attention and attention over paged keys and values."""

from qwen_kernels.attention.api import PAGE, causal_attention, paged_attention, write_pages
from qwen_kernels.attention.eight_bit import EightBit, EightBitPages, eight_bit_dtype
from qwen_kernels.attention.storage import page_dtype

__all__ = ["PAGE", "EightBit", "EightBitPages", "causal_attention", "eight_bit_dtype", "page_dtype", "paged_attention",
           "write_pages"]
