"""Block-sparse attention over paged keys and values: selection of pages, and exact attention to them."""

from qwen_kernels.sparse_attention.api import attend, sparse_attention, visible_pages
from qwen_kernels.sparse_attention.selection import Selection, Sparsity, select
from qwen_kernels.sparse_attention.selectors import SELECTORS
from qwen_kernels.sparse_attention.summaries import new_summaries, nodes_per_page, update_summaries

__all__ = ["SELECTORS", "Selection", "Sparsity", "attend", "new_summaries", "nodes_per_page", "select",
           "sparse_attention", "update_summaries", "visible_pages"]
