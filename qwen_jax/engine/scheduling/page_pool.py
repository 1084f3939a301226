"""The page allocator and the prefix cache: which pages are free, shared, or kept because their contents may be wanted.

A page holds `PAGE` tokens of every layer. The pool hands out page ids; the arrays they index live on the device. A full
page can be kept under a key that says what is in it and before it (`chain`): sequences that need the same contents
share it, and none of them writes to it. A kept page without a user is free like any other, but is handed out last, the
longest unused page first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from qwen_kernels.page import PAGE

NULL_PAGE = 0  # never handed out: padding rows and padding tokens write here, and nothing reads it


class OutOfPages(RuntimeError):
    """More pages were requested than are free. The scheduler asks `can_allocate` first, so users never see this."""


def pages_for(num_tokens: int) -> int:
    """Return the number of pages that hold `num_tokens` tokens."""
    return -(-num_tokens // PAGE)


def chain(before: bytes, tokens: Iterable[int]) -> bytes:
    """Return the prefix-cache key of a page: a hash of its `PAGE` tokens and of `before`, the previous page's key.

    For a first page, `before` stands for everything else that decides its contents (weights, adapter, attention) or who
    may use it. Keys are 128 bits of BLAKE2: two different prefixes never meet.
    """
    return hashlib.blake2b(before + array("i", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Allocator of the ids of KV-cache pages, with a prefix cache of pages whose contents can be used again.

    num_pages: number of pages in the KV arrays, the null page included. Every operation takes O(1) per page.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"a page pool needs the null page and at least one more, not {num_pages} pages")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # a stack: the page freed last is the next one used
        self._users: Counter[int] = Counter()  # users of each page in use
        self._page_of: dict[bytes, int] = {}  # kept pages by key
        self._key_of: dict[int, bytes] = {}  # keys of kept pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept pages without a user, longest unused first
        self._before: dict[bytes, bytes] = {}  # for the key of a kept page, the key before it in its chain
        self._after: dict[bytes, set[bytes]] = {}  # for a key, the keys of kept pages that follow it

    @property
    def capacity(self) -> int:
        """Number of pages that can be handed out: all but the null page."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        """Number of pages that no sequence uses, including those of the prefix cache."""
        return len(self._free) + len(self._idle)

    def can_allocate(self, n: int) -> bool:
        """Return whether `n` pages are free."""
        return n <= self.num_free

    def allocate(self, n: int) -> list[int]:
        """Hand out `n` distinct pages. Raise OutOfPages, and change nothing, when fewer are free."""
        if n < 0:
            raise ValueError(f"cannot allocate {n} pages")
        if not self.can_allocate(n):
            raise OutOfPages(f"{n} pages asked, {self.num_free} of {self.capacity} free")
        pages = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        self._users.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """End one sequence's use of each of `pages`.

        Raise ValueError, and change nothing, when one is not in use (double free, null, foreign).
        """
        if len(set(pages)) != len(pages) or not self._users.keys() >= set(pages):
            raise ValueError(f"pages {pages} are not all in use: freed twice, or never handed out by this pool")
        for page in reversed(pages):  # the end of a chain is evicted before the beginning
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    # --- the prefix cache

    def keep(self, key: bytes, page: int, before: bytes = b"") -> None:
        """Add `page`, which is in use and full, to the prefix cache under `key`, unless the key has a page.

        before: key of the page before it in its sequence; for a first page what stands for this in `chain`.
        """
        if page not in self._users:
            raise ValueError(f"page {page} is not in use")
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key
            self._before[key] = before
            self._after.setdefault(before, set()).add(key)

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Return the prefix cache's pages for `keys`, those of successive pages, up to the first that is missing."""
        pages = []
        for key in keys:
            if key not in self._page_of:
                break
            pages.append(self._page_of[key])
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Record that one more sequence uses each of these pages of the prefix cache."""
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] += 1

    def is_idle(self, page: int) -> bool:
        """Return whether no sequence uses a page of the prefix cache, so that it counts among the free ones."""
        return page in self._idle

    def forget(self, pages: Iterable[int]) -> None:
        """Remove these pages, and those that follow them in a chain, from the prefix cache. Sequences keep them."""
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
        """Remove every page from the prefix cache."""
        self.forget(list(self._key_of))

    def _evict(self) -> int:
        """Remove the page that has been unused for longest from the prefix cache, and return it."""
        page, _ = self._idle.popitem(last=False)
        self._unkeep(page)
        return page

    def _unkeep(self, page: int) -> None:
        """Remove a page and its key from the tables of the prefix cache."""
        key = self._key_of.pop(page)
        del self._page_of[key]
        before = self._before.pop(key)
        self._after[before].discard(key)
        if not self._after[before]:
            del self._after[before]
