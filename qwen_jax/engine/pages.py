"""The page allocator: which pages of the KV cache are free.

A page holds `PAGE` tokens of every layer. The pool hands out page ids; the arrays they index live on the device.
"""

from qwen_kernels.attention import PAGE

NULL_PAGE = 0  # never handed out: padding rows and padding tokens write here, and nobody reads it


class OutOfPages(RuntimeError):
    """More pages were asked for than are free. The scheduler asks `can_allocate` first, so users never see this."""


def pages_for(num_tokens: int) -> int:
    """The number of pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE)


class PagePool:
    """Ids of `num_pages` pages, the null page included: the leading axis of the KV arrays. O(1) per page."""

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"a page pool needs the null page and at least one more, not {num_pages} pages")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # a stack: the page freed last is the next one used
        self._used: set[int] = set()

    @property
    def capacity(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def can_allocate(self, n: int) -> bool:
        return n <= len(self._free)

    def allocate(self, n: int) -> list[int]:
        """`n` distinct pages, or OutOfPages and nothing changed."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if not self.can_allocate(n):
            raise OutOfPages(f"{n} pages asked, {self.num_free} of {self.capacity} free")
        pages = [self._free.pop() for _ in range(n)]
        self._used.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Takes `pages` back. ValueError, and nothing changed, when one is not in use (double free, null, foreign)."""
        if len(set(pages)) != len(pages) or not self._used.issuperset(pages):
            raise ValueError(f"pages {pages} are not all in use: freed twice, or never handed out by this pool")
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))
