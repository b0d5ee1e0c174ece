"""The page accounts of the unified pool: which pages are free, who shares the others. No memory is touched here.

KV cache and adapter weights take pages from one index space. Pages are reference-counted, so that KV prefixes can be shared. A page that nobody
holds may still be *kept* for what is in it:

    cold   counts as free, and is taken, oldest first, when no plain free page is left
    warm   was wanted again before; it counts as taken until `cool` says otherwise

Pages may also be taken by number alone (`reserve`) and be given names later (`name`), or never: the engine needs to know which page a token
is written to, a simulation only how many are taken. Who is free, kept or overwritten does not depend on it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain


class PagePool:
    """Pages `first` … `first + num_pages` − 1, each free, kept or held by one or more owners.

    num_free: pages that `reserve` and `allocate` can take, cold ones included. on_reuse: called with a kept page whose contents are about to go.
    """

    def __init__(
        self, num_pages: int, *, first: int = 0, on_reuse: Callable[[int], None] = lambda _page: None
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1")
        self.num_pages = num_pages
        self.num_free = num_pages
        self.on_reuse = on_reuse
        self._first = first
        # Who takes a page gets the one freed last, then fresh ones: first, first + 1, first + 2, … A simulation makes thousands of pools, most of
        # whose pages it never names, so nothing is written down of fresh ones.
        self._free: list[int] = []
        self._fresh = first
        self._plain = num_pages  # pages that are neither cold nor taken; some of those taken have no name yet
        self._references: dict[int, int] = {}  # of pages that somebody holds
        self._worth: dict[
            int, bool
        ] = {}  # pages to keep when nobody holds them -> whether they go to the warm ones
        self._cold: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._warm: OrderedDict[int, int] = OrderedDict()  # oldest first -> when it became idle
        self._clock: Callable[[], int] = lambda: 0

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - self.num_free - len(self._warm)

    @property
    def num_warm(self) -> int:
        return len(self._warm)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds and whose contents may be wanted again."""
        return len(self._cold) + len(self._warm)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, each with one reference. Raises ValueError if fewer are free: callers look first."""
        self.reserve(count)
        return self.name(count)

    def reserve(self, count: int) -> None:
        """Take `count` free pages by number. Raises ValueError if fewer are free: callers look first."""
        if count > self._plain:
            if count > self.num_free:
                raise ValueError(f"{count} pages wanted, {self.num_free} free")
            self._empty_cold(count - self._plain)
        self._plain -= count
        self.num_free -= count

    def give_back(self, count: int) -> None:
        """Give back pages that were reserved and never named."""
        if count > self._nameless:
            raise ValueError(f"{count} nameless pages given back, {self._nameless} are taken")
        self._plain += count
        self.num_free += count

    def name(self, count: int) -> list[int]:
        """Say which pages `count` of the reserved ones are; each has one reference."""
        if count == 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        fresh = count - len(pages)
        if fresh:
            pages.extend(range(self._fresh, self._fresh + fresh))
            self._fresh += fresh
        references = self._references
        for page in pages:
            references[page] = 1
        return pages

    @property
    def _nameless(self) -> int:
        """Pages that are taken and have no name."""
        return len(self._free) + self._first + self.num_pages - self._fresh - self._plain

    def _empty_cold(self, count: int) -> None:
        for _ in range(count):
            self.forget(next(iter(self._cold)))

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to pages that are held or kept."""
        for page in pages:
            count = self._references.get(page, 0)
            if count == 0:
                if page not in self._worth:
                    raise ValueError(f"page {page} is free and cannot be shared")
                if self._warm.pop(page, None) is None:
                    del self._cold[page]
                    self.num_free -= 1
            self._references[page] = count + 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page, the last first; a page without references is kept where it is worth it, else free."""
        for page in reversed(pages):
            count = self._references.get(page, 0)
            if count == 0:
                raise ValueError(f"page {page} is released twice")
            if count > 1:
                self._references[page] = count - 1
                continue
            del self._references[page]
            warm = self._worth.get(page)
            if warm:
                self._warm[page] = self._clock()
                continue
            self.num_free += 1
            if warm is None:
                self._free.append(page)
                self._plain += 1
            else:
                self._cold[page] = None

    # ---- what is worth keeping ----

    def keep(self, page: int, *, warm: bool = False) -> None:
        """Say that a held page's contents are worth keeping when nobody holds it; `warm`: more so than a cold one's."""
        self._worth[page] = warm

    def is_idle(self, page: int) -> bool:
        """Whether nobody holds a page."""
        return page not in self._references

    def is_warm(self, page: int) -> bool:
        """Whether a page is idle and warm."""
        return page in self._warm

    @property
    def oldest_warm_at(self) -> int | None:
        """When the warm page that is idle for longest became so; None where there is none."""
        return next(iter(self._warm.values()), None)

    def set_clock(self, clock: Callable[[], int]) -> None:
        """Take the clock by which warm pages are told from when on they are idle."""
        self._clock = clock

    def cool_oldest(self) -> None:
        """Make the oldest warm page the newest cold one."""
        page, _at = self._warm.popitem(last=False)
        self._worth[page] = False
        self._cold[page] = None
        self.num_free += 1

    def demote(self, page: int) -> None:
        """Make a kept page cold, and an idle one the next to go."""
        self._worth[page] = False
        if page in self._references:
            return
        if self._warm.pop(page, None) is not None:
            self.num_free += 1
        self._cold[page] = None
        self._cold.move_to_end(page, last=False)

    def forget(self, page: int) -> None:
        """Take it that a kept page's contents are worth nothing: where nobody holds it, it is plain free."""
        del self._worth[page]
        self.on_reuse(page)
        if page in self._references:
            return
        if self._warm.pop(page, None) is None:
            del self._cold[page]
        else:
            self.num_free += 1
        self._free.append(page)
        self._plain += 1

    # ---- integrity ----

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None, nameless: int = 0) -> None:
        """Raise AssertionError unless every page is free exactly once, kept exactly once, or referenced as often as `holders` hold it,
        and `nameless` ones are taken by number.
        """
        assert self.num_free == self._plain + len(self._cold)
        assert self._nameless == nameless, f"{self._nameless} pages without a name, not {nameless}"
        end = self._first + self.num_pages
        idle = list(chain(self._free, range(self._fresh, end), self._cold, self._warm))
        assert len(set(idle)) == len(idle), "a page is free twice"
        free = set(idle)
        assert 0 not in self._references.values()
        for page in range(self._first, end):
            held = page in self._references
            assert held != (page in free), f"page {page}: held: {held}, free: {page in free}"
        assert all(page in self._worth for page in chain(self._cold, self._warm)), (
            "a kept page is worth nothing"
        )
        assert not any(page in self._worth for page in self._free), "a free page is worth keeping"
        if holders is not None:
            assert Counter(chain.from_iterable(holders)) == self._references, (
                "holders and reference counts disagree"
            )
