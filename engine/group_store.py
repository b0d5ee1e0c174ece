"""The adapters of a tensor-parallel replica: each rank has its own part of each in a host store of its own, and all change together.

Reading and packing is slow, so every rank does it on threads beside its steps. The rest is quick, and told by the pipe that tells steps and loads:
all ranks do it between the same two of those.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.adapter import AdapterSpec
from engine.errors import UserError
from engine.host_cache import HostCache, Place
from engine.host_store import HostAdapter, HostStore, PreparedAdapter

if TYPE_CHECKING:
    from engine.followers import Followers

PREPARERS = 2  # adapters that one process prepares at a time

log = logging.getLogger("engine")


@dataclass(frozen=True, slots=True)
class SharedAdapter(PreparedAdapter):
    """An adapter that several processes have prepared under this number."""

    number: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a process says of an adapter it was to prepare: what its files were like, or why it cannot be served."""

    source: tuple[int, ...] = ()
    refusal: UserError | None = None


def objection(verdicts: Mapping[int, Verdict], who: str) -> UserError | None:
    """Return why an adapter cannot be served everywhere, or None. who: what the processes are called."""
    for member, verdict in verdicts.items():
        if verdict.refusal is not None:
            return UserError(f"{who} {member}: {verdict.refusal.reason}", path=verdict.refusal.path)
    if len({verdict.source for verdict in verdicts.values()}) > 1:
        return UserError("the adapter's files changed while they were read")
    return None


class GroupStore:
    """Rank 0's store and the other ranks': what HostStore is to one rank. `own` is rank 0's part, which answers what is asked about adapters."""

    def __init__(self, own: HostStore, followers: Followers) -> None:
        self.own = own
        self._followers = followers

    def __getitem__(self, name: str) -> HostAdapter:
        return self.own[name]

    def __contains__(self, name: object) -> bool:
        return name in self.own

    def __len__(self) -> int:
        return len(self.own)

    @property
    def cache(self) -> HostCache[HostAdapter]:
        """As of HostStore."""
        return self.own.cache

    def where(self, name: str) -> Place:
        """As of HostStore."""
        return self.own.where(name)

    def register_all(self) -> Iterator[str]:
        """Register rank 0's part of every adapter of the blueprint: each rank registers its own when it is built."""
        return self.own.register_all()

    def prepare(self, spec: AdapterSpec) -> SharedAdapter:
        """Have all ranks read, check and pack their parts; slow, from any thread. Where one cannot, all let theirs go.

        Raises UserError with the first reason, and RankError where a rank is gone.
        """
        number = self._followers.ask("prepare", spec)
        own, failure = None, None
        try:
            own = self.own.prepare(spec)
        except BaseException as error:
            failure = error
        verdicts = self._followers.questions.wait(number)
        if own is not None:
            failure = objection({0: Verdict(own.adapter.source), **verdicts}, "rank")
            if failure is None:
                return SharedAdapter(own.adapter, number)
            self.own.discard(own)
        self._followers.tell_store("discard", number)
        assert failure is not None
        raise failure

    def put(self, name: str, prepared: PreparedAdapter) -> None:
        """Register a prepared adapter everywhere; one that had the name before is removed."""
        assert isinstance(prepared, SharedAdapter)
        self.own.put(name, prepared)
        self._followers.tell_store("put", prepared.number, name)

    def discard(self, prepared: PreparedAdapter) -> None:
        """Give back the memory of a prepared adapter that is not put."""
        assert isinstance(prepared, SharedAdapter)
        self.own.discard(prepared)
        self._followers.tell_store("discard", prepared.number)

    def remove(self, name: str) -> None:
        """Forget an adapter everywhere. Loads of it that are under way still end as they would. Raises KeyError."""
        self.own.remove(name)
        self._followers.tell_store("remove", name)

    def check_integrity(self) -> None:
        """As of HostStore, for rank 0's part."""
        self.own.check_integrity()


class StoreServant:
    """Does to this process's store what another process says; that is told by `tell` what came of preparing."""

    def __init__(self, store: HostStore | GroupStore, tell: Callable[[tuple[Any, ...]], None]) -> None:
        self._store = store
        self._tell = tell
        self._prepared: dict[int, PreparedAdapter] = {}
        self._preparers = ThreadPoolExecutor(PREPARERS, thread_name_prefix="adapter-preparer")

    def obey(self, kind: str, *rest: Any) -> None:
        """Do one thing: `prepare` (number, spec), which takes place on a thread, `put` (number, name), `discard` (number) or `remove` (name)."""
        if kind == "prepare":
            self._preparers.submit(self._prepare, *rest)
        elif kind == "put":
            self._store.put(rest[1], self.take(rest[0]))
        elif kind == "discard":
            self._discard(rest[0])
        elif kind == "remove":
            self._store.remove(rest[0])
        else:
            raise ValueError(f"kind(={kind!r}) is no message to a store")

    def take(self, number: int) -> PreparedAdapter:
        """Return a prepared adapter, for the caller to register."""
        return self._prepared.pop(number)

    def _discard(self, number: int) -> None:
        prepared = self._prepared.pop(number, None)  # None: it was refused here
        if prepared is not None:
            self._store.discard(prepared)

    def _prepare(self, number: int, spec: AdapterSpec) -> None:
        self._tell(("answer", number, self._verdict(number, spec)))

    def _verdict(self, number: int, spec: AdapterSpec) -> Verdict:
        try:
            prepared = self._store.prepare(spec)
        except UserError as error:
            return Verdict(refusal=error)
        except Exception as error:
            log.exception("adapter %s could not be prepared", spec.name)
            return Verdict(refusal=UserError(f"the adapter could not be read: {type(error).__name__}"))
        self._prepared[number] = prepared
        return Verdict(source=prepared.adapter.source)
