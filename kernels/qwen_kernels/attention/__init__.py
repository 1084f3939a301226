"""Dense causal attention and attention over paged keys and values."""

from qwen_kernels.attention.api import causal_attention, check_page_table, paged_attention, write_pages
from qwen_kernels.attention.eight_bit import EightBitPages, PageFormat, eight_bit_dtype
from qwen_kernels.attention.storage import page_dtype
from qwen_kernels.page import PAGE

__all__ = ["PAGE", "EightBitPages", "PageFormat", "causal_attention", "check_page_table", "eight_bit_dtype",
           "page_dtype", "paged_attention", "write_pages"]
