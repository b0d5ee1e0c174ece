"""One GPU's pages under one account: KV of running requests, KV kept for later ones, and adapters, each giving way to the others.

When pages run out, cold KV goes first (it counts as free), then warm KV and idle adapters, whichever is unused for longer. With `adapter_pages`
the pool is split instead: adapters and KV have their own pages and never trade.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping
from itertools import chain

from engine.config import AdapterEviction
from engine.pool import PagePool
from engine.prefix_cache import PrefixCache
from engine.requests import Request
from engine.residency import AdapterFootprint, Residency, ResidentAdapter


class UnifiedPool:
    """Pages for KV (`kv`) and adapters (`residency`), with the prefix cache (`prefixes`, None where it is off).

    shared: whether the two take pages from each other.
    names_pages: whether every page of KV is told by name, as the engine's page tables need it. Where it is false, only those are that the
    prefix cache can know, and the others are counted: nothing that is decided depends on their names.
    """

    def __init__(
        self,
        num_pages: int,
        footprints: Mapping[str, AdapterFootprint],
        *,
        adapter_pages: int | None = None,
        max_adapters: int | None = None,
        eviction: AdapterEviction = "lru",
        prefix_caching: bool = True,
    ) -> None:
        self.shared = adapter_pages is None
        self.names_pages = True
        self.kv = PagePool(num_pages if adapter_pages is None else num_pages - adapter_pages)
        self._adapters = (
            self.kv if adapter_pages is None else PagePool(adapter_pages, first=num_pages - adapter_pages)
        )
        self.prefixes = PrefixCache(self.kv) if prefix_caching else None
        self.residency = Residency(
            self._adapters,
            footprints,
            max_adapters=max_adapters,
            eviction=eviction,
            on_evict=self._adapter_left,
        )
        self.kv.set_clock(self.residency.tick)

    # ---- what there is ----

    @property
    def kv_pages(self) -> int:
        """Pages that requests hold."""
        kv = self.kv
        return kv.num_pages - kv.num_free - kv.num_warm - (self.residency.pages_held if self.shared else 0)

    @property
    def evictable_pages(self) -> int:
        """Pages that KV can have beyond the free ones."""
        return self.kv.num_warm + (self.residency.evictable_pages if self.shared else 0)

    def available(self, adapter: str | None) -> int:
        """Return the pages that KV of a request of `adapter` can have."""
        evictable = self.residency.evictable_pages_without(adapter) if self.shared else 0
        return self.kv.num_free + self.kv.num_warm + evictable

    def why_never(self, tokens: int, kv_pages: int, adapter: str | None) -> str | None:
        """Return why a request of so many tokens, in so many pages, with this adapter can never run, or None."""
        adapter_pages = 0 if adapter is None else self.residency.footprints[adapter].pages
        if not self.shared:
            if adapter_pages > self._adapters.num_pages:
                return (
                    f"{adapter_pages} pages needed for the adapter, adapters have {self._adapters.num_pages}"
                )
            adapter_pages = 0
        wanted = kv_pages + adapter_pages
        if wanted > self.kv.num_pages:
            return (
                f"{wanted} pages needed for {tokens} tokens and the adapter, the pool has {self.kv.num_pages}"
            )
        return None

    # ---- KV ----

    def match(self, request: Request, most: int) -> list[int]:
        """Return kept or shared pages with the KV of a request's first tokens, at most `most` pages."""
        if self.prefixes is None or request.page_keys is None:
            return []
        return self.prefixes.match(request.page_keys, most)

    def missing_pages(self, wanted: int, matched: Iterable[int]) -> int:
        """Return how many available pages a request of `wanted` pages takes: those not matched, and those matched that nobody holds now."""
        return wanted - sum(not self.kv.is_idle(page) for page in matched)

    def admit(self, request: Request, wanted: int, matched: list[int]) -> list[int]:
        """Take the pages of a request: the matched ones and new ones behind them. Return those that are named, which come first."""
        keys = request.page_keys
        if keys is not None and self.prefixes is not None:
            self.prefixes.take(matched)
        self.take(wanted - len(matched))
        if self.names_pages:
            return matched + self.kv.name(wanted - len(matched))
        if keys is None or self.prefixes is None:
            return []
        return matched + self.kv.name(min(wanted, len(keys)) - len(matched))

    def looked_up(self, request: Request, found_tokens: int) -> None:
        """Count a new request's prompt, and what of it was there."""
        if self.prefixes is not None and request.page_keys is not None:
            self.prefixes.queried_tokens += request.prompt_tokens
            self.prefixes.hit_tokens += found_tokens

    def filled(self, request: Request, pages: list[int], first: int, last: int) -> None:
        """Note that pages `first` … `last` − 1 of a request's prompt are written, as far as it has keys for them."""
        if self.prefixes is None or request.page_keys is None:
            return
        for number in range(first, min(last, len(request.page_keys))):
            self.prefixes.insert(request.page_keys[number], pages[number], request.adapter)

    def note(self, key: Hashable, page: int, adapter: str | None) -> None:
        """Note what is in one page that is held."""
        if self.prefixes is not None:
            self.prefixes.insert(key, page, adapter)

    def take(self, count: int) -> None:
        """Take `count` pages for KV by number; so many must be available."""
        if self.kv.num_free < count:
            self.make_room(count)
        self.kv.reserve(count)

    def release(self, pages: list[int], nameless: int) -> None:
        """Give back the pages of a request: the named ones, and so many others."""
        self.kv.give_back(nameless)
        if pages:
            self.kv.release(pages)
            if self.prefixes is not None:
                self.prefixes.trim()

    def make_room(self, count: int) -> None:
        """Evict until `count` pages are free for KV, or nothing is left to evict."""
        while self.kv.num_free < count and self._evict_one(self.kv):
            pass

    def _evict_one(self, pool: PagePool, keep: Container[str | None] = ()) -> bool:
        """Give up what is unused for longest among a pool's warm pages and its idle adapters but those in `keep`; False where there is nothing."""
        warm_at = pool.oldest_warm_at
        victim = self.residency.next_victim(keep) if pool is self._adapters else None
        if victim is None and warm_at is None:
            return False
        if victim is None or (warm_at is not None and warm_at < victim.idle_at):
            pool.cool_oldest()
        else:
            self.residency.drop(victim.name)
        return True

    # ---- adapters ----

    def start_load(
        self, name: str, now_s: float, *, spare: int, keep: Container[str | None]
    ) -> ResidentAdapter | None:
        """Take pages for an absent adapter if `spare` more are left beside them; None where they cannot be had.

        keep: idle adapters that are not evicted for it.
        """
        residency, pool = self.residency, self._adapters
        wanted = residency.footprints[name].pages + (spare if self.shared else 0)
        if wanted > pool.num_free + pool.num_warm + residency.evictable_pages:
            return None
        if wanted > pool.num_free and wanted > pool.num_free + pool.num_warm + residency.evictable_pages_but(
            keep
        ):
            return None
        while pool.num_free < wanted and self._evict_one(pool, keep):
            pass
        if residency.full:
            victim = residency.next_victim(keep)
            if victim is None:
                return None
            residency.drop(victim.name)
        return residency.start_load(name, now_s)

    def forget_adapter(self, name: str) -> None:
        """Give back all that is kept of an adapter that is no more: its pages, which nobody uses, and the KV it made."""
        if self.residency.is_idle(name):
            self.residency.drop(name)
        if self.prefixes is not None:
            self.prefixes.forget_adapter(name)

    def _adapter_left(self, name: str) -> None:
        if self.prefixes is not None:
            self.prefixes.adapter_left(name)

    # ---- integrity ----

    def check_integrity(self, kv_holders: Iterable[list[int]], nameless: int) -> None:
        """Raise AssertionError unless pages are conserved and every account agrees."""
        self.residency.check_integrity()
        if self.prefixes is not None:
            self.prefixes.check_integrity()
        if self.shared:
            self.kv.check_integrity(chain(kv_holders, self.residency.holders()), nameless)
        else:
            self.kv.check_integrity(kv_holders, nameless)
            self._adapters.check_integrity(self.residency.holders())
