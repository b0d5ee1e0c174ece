"""The page accounts of the unified pool: which pages are free, who shares the others. No memory is touched here.

KV cache and adapter weights take pages from one index space. Pages are reference-counted, so that KV prefixes can be shared.
"""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Pages 0 … num_pages − 1, each free or held by one or more owners."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1")
        self.num_pages = num_pages
        # A stack: the page freed last is taken first; a fresh pool hands out 0, 1, 2, …
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference. Raises ValueError if fewer are free: callers look first."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} free")
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to pages that are held."""
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference of each page; a page without references is free."""
        for page in pages:
            count = self._references[page]
            if count == 0:
                raise ValueError(f"page {page} is released twice")
            self._references[page] = count - 1
            if count == 1:
                self._free.append(page)

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError unless every page is free exactly once or referenced as often as `holders` hold it."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is twice in the free list"
        for page, count in enumerate(self._references):
            assert (count == 0) == (page in free), f"page {page}: {count} references, free: {page in free}"
        if holders is not None:
            held = [0] * self.num_pages
            for pages in holders:
                for page in pages:
                    held[page] += 1
            assert held == self._references, "holders and reference counts disagree"
