"""Dense causal attention and attention over paged keys and values."""

from qwen_kernels.attention.api import PAGE, causal_attention, paged_attention, write_pages

__all__ = ["PAGE", "causal_attention", "paged_attention", "write_pages"]
