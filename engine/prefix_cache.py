"""Which pages hold the KV of which prompt pages, so that a later request of the same adapter that starts alike need not compute it.

A page is known by a key that stands for all tokens up to its end, and the adapter (`Request.page_keys`). It is kept when nobody holds it any
more: first as *cold*, which costs nobody anything, since cold pages count as free; once it was found again as *warm*, which is worth as much as an
idle adapter, the one unused for longer going first. KV of an adapter that leaves the GPU is the next to go.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from engine.pool import PagePool

# Of the pool at most: what was found once, long ago, must not crowd out what may be found next. Hit rates on Mooncake's conversations with 0.5, 0.1
# and 0: 8.7, 7.9 and 6.7 % with 3,000 blocks of 512 tokens; 20.4, 21.8, 21.0 with 10,000; 31.8, 33.2, 32.4 with 30,000 (simulated, 2026-11-22).
WARM_SHARE = 0.1
WARM_PAGES = 4  # so many in any case


class PrefixCache:
    """Keys of pages of one pool."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        pool.on_reuse = self._forget
        self._page_of: dict[Hashable, int] = {}
        self._of_page: dict[int, tuple[Hashable, str | None]] = {}
        self._pages_of_adapter: dict[str, dict[int, None]] = {}
        self.queried_tokens = 0
        self.hit_tokens = 0

    def match(self, keys: Sequence[Hashable], most: int) -> list[int]:
        """Return the pages of the longest known run from the start of `keys`, at most `most`."""
        pages = []
        for key in keys[:most]:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def take(self, pages: Sequence[int]) -> None:
        """Hold pages that `match` returned. They were found again, so they are warm when they become idle."""
        self._pool.share(pages)
        for page in pages:
            self._pool.keep(page, warm=True)

    def insert(self, key: Hashable, page: int, adapter: str | None) -> None:
        """Note what is in a page that is held. Where another page holds the same already, that one stays."""
        if key in self._page_of:
            return
        self._page_of[key] = page
        self._of_page[page] = key, adapter
        if adapter is not None:
            self._pages_of_adapter.setdefault(adapter, {})[page] = None
        self._pool.keep(page)

    def trim(self) -> None:
        """Hold warm pages to their share of the pool."""
        while self._pool.num_warm > max(WARM_PAGES, self._pool.num_pages * WARM_SHARE):
            self._pool.cool_oldest()

    def adapter_left(self, adapter: str) -> None:
        """Note that an adapter's weights left the GPU."""
        for page in self._pages_of_adapter.get(adapter, {}):
            self._pool.demote(page)

    def forget_adapter(self, adapter: str) -> None:
        """Forget the KV of an adapter whose weights are no more."""
        for page in list(self._pages_of_adapter.get(adapter, {})):
            self._pool.forget(page)

    def _forget(self, page: int) -> None:
        key, adapter = self._of_page.pop(page)
        del self._page_of[key]
        if adapter is not None:
            pages = self._pages_of_adapter[adapter]
            del pages[page]
            if not pages:
                del self._pages_of_adapter[adapter]

    def check_integrity(self) -> None:
        """Raise AssertionError unless keys and pages are one to one."""
        assert {page: key for key, page in self._page_of.items()} == {
            page: key for page, (key, _) in self._of_page.items()
        }
        named = {page for page, (_, adapter) in self._of_page.items() if adapter is not None}
        assert named == {page for pages in self._pages_of_adapter.values() for page in pages}
