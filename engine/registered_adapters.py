"""Adapters that come and go while requests are served."""

from __future__ import annotations

from engine.residency import AdapterFootprint, AdapterState
from engine.unified_pool import UnifiedPool


class RegisteredAdapters:
    """Which adapters requests may name. One that is unregistered serves the requests that it has, and then leaves the pool."""

    def __init__(self, memory: UnifiedPool) -> None:
        self._memory = memory
        self._footprints = memory.residency.footprints
        self._unfinished: dict[str, int] = {}  # requests by adapter
        self._retired: set[str] = set()  # those that go when their last request has ended

    def register(self, name: str, footprint: AdapterFootprint) -> None:
        """Let requests name an adapter. Raises ValueError where the name is taken."""
        if name in self._footprints:
            raise ValueError(f"adapter {name!r} is registered already")
        self._footprints[name] = footprint

    def unregister(self, name: str) -> None:
        """Take no more requests for an adapter. Those that are there are served; then its pages go, and it is not in here any more."""
        if not self.may_be_named(name):
            raise ValueError(f"adapter {name!r} is not registered")
        self._retired.add(name)
        self.retire_if_unused(name)

    def __contains__(self, name: str) -> bool:
        """Whether an adapter's weights may still be asked for."""
        return name in self._footprints

    def may_be_named(self, name: str) -> bool:
        """Whether a new request may name an adapter."""
        return name in self._footprints and name not in self._retired

    def request_came(self, name: str) -> None:
        """Count a request of an adapter."""
        self._unfinished[name] = self._unfinished.get(name, 0) + 1

    def request_ended(self, name: str) -> None:
        """Note that nothing more will come of a request of an adapter."""
        count = self._unfinished[name] - 1
        if count:
            self._unfinished[name] = count
        else:
            del self._unfinished[name]
            if self._retired:
                self.retire_if_unused(name)

    def retire_if_unused(self, name: str) -> None:
        """Let an unregistered adapter go if no request needs it any more and no load of it is under way."""
        if name not in self._retired or name in self._unfinished:
            return
        if self._memory.residency.state(name) is AdapterState.LOADING:
            return  # when it has ended
        self._memory.forget_adapter(name)
        self._retired.discard(name)
        del self._footprints[name]
