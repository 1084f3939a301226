"""The page allocator and the prefix cache: which pages are free, shared, or kept because their contents may be wanted.

A page holds `PAGE` tokens of every layer. The pool hands out page ids; the arrays they index live on the device. A full
page can be kept under a key that says what is in it and before it (`chain`): whoever needs the same contents shares it,
and nobody writes to it. A kept page that nobody uses is free like any other, but is handed out last, the one used
longest ago first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

from qwen_kernels.attention import PAGE

NULL_PAGE = 0  # never handed out: padding rows and padding tokens write here, and nobody reads it


class OutOfPages(RuntimeError):
    """More pages were asked for than are free. The scheduler asks `can_allocate` first, so users never see this."""


def pages_for(num_tokens: int) -> int:
    """The number of pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE)


def chain(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page with these `PAGE` tokens after the pages that `before` is the key of.

    Of a first page, `before` says whatever else decides its contents: weights, adapter, attention. 128 bits of BLAKE2:
    two different prefixes never meet.
    """
    return hashlib.blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Ids of `num_pages` pages, the null page included: the leading axis of the KV arrays. O(1) per page."""

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"a page pool needs the null page and at least one more, not {num_pages} pages")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # a stack: the page freed last is the next one used
        self._users: Counter[int] = Counter()  # of pages in use
        self._page_of: dict[bytes, int] = {}   # kept pages
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept pages without a user, longest unused first
        self._before: dict[bytes, bytes] = {}  # of kept pages, the key before theirs in the chain
        self._after: dict[bytes, set[bytes]] = {}  # and back

    @property
    def capacity(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._idle)

    def can_allocate(self, n: int) -> bool:
        return n <= self.num_free

    def allocate(self, n: int) -> list[int]:
        """`n` distinct pages of the caller's own, or OutOfPages and nothing changed."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if not self.can_allocate(n):
            raise OutOfPages(f"{n} pages asked, {self.num_free} of {self.capacity} free")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        self._users.update(pages)
        return pages

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._unkeep(page)
        return page

    def _unkeep(self, page: int) -> bytes:
        key = self._key_of.pop(page)
        del self._page_of[key]
        before = self._before.pop(key)
        self._after[before].discard(key)
        if not self._after[before]:
            del self._after[before]
        return key

    def free(self, pages: list[int]) -> None:
        """One user of each of `pages` less. ValueError, and nothing changed, when one is not in use (double free, null,
        foreign)."""
        if len(set(pages)) != len(pages) or not self._users.keys() >= set(pages):
            raise ValueError(f"pages {pages} are not all in use: freed twice, or never handed out by this pool")
        for page in reversed(pages):  # of a chain, the end is evicted before the beginning
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    # --- the prefix cache

    def keep(self, key: bytes, page: int, before: bytes = b"") -> None:
        """From now on `page`, which is in use and full, is what `match` finds under `key`; the first one stays.

        before: the key before it in its chain.
        """
        if page not in self._users:
            raise ValueError(f"page {page} is not in use")
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key
            self._before[key] = before
            self._after.setdefault(before, set()).add(key)

    def forget(self, pages: Sequence[int]) -> None:
        """These pages, and kept ones that come after them in a chain, are not found any more. Their users keep them."""
        lost = [self._key_of[page] for page in pages if page in self._key_of]
        while lost:
            key = lost.pop()
            page = self._page_of.get(key)
            if page is None:
                continue
            lost += self._after.get(key, ())
            self._unkeep(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def forget_all(self) -> None:
        """No page is found any more."""
        self.forget(list(self._key_of))

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The kept pages of the longest beginning of a chain."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One user of each of these kept pages more."""
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] += 1

    def is_idle(self, page: int) -> bool:
        """Whether a kept page counts among the free ones."""
        return page in self._idle
