"""Adapters while the server runs: which folders may be read, and loading, replacing and unloading by name."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.adapter import AdapterSpec, spec_of_peft
from engine.followers import RankError
from engine.host_store import PreparedAdapter
from engine.replicas import ReplicaError
from engine.server.async_engine import AsyncEngine
from engine.server.errors import ApiError, Scrubber, invalid
from engine.server.limits import ServerLimits

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 2**20
MAX_NAME_CHARS = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+=-]*")

log = logging.getLogger("engine.server")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """An adapter that clients may name. internal_name: the engine's, another one each time it is replaced; root: as /v1/models shows it."""

    name: str
    internal_name: str
    rank: int
    root: str


def check_name(name: str) -> None:
    """Raise ValueError unless a name is fit for an adapter."""
    if len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise ValueError(
            f"must have at most {MAX_NAME_CHARS} letters, digits and ._:/@+=- and begin with a letter or digit"
        )


class AdapterFolder:
    """The one folder that adapters are read from."""

    def __init__(self, root: Path, limits: ServerLimits) -> None:
        self.root = root.resolve(strict=True)
        self._limits = limits

    def find(self, path: str) -> Path:
        """Return the folder of an adapter that a client named. Raises a 400 for what is outside, whatever is there; a 404 for what is not there."""
        outside = invalid("lora_path must be relative to the server's adapter folder, and in it", "lora_path")
        if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
            raise outside
        try:
            folder = (self.root / path).resolve()
            files = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
            if not all(part.resolve().is_relative_to(self.root) for part in (folder, *files)):
                raise outside
            self._check_files(files)
        except (OSError, RuntimeError):  # a name that is too long, a loop of links, no permission
            raise ApiError(404, "no adapter at lora_path", param="lora_path") from None
        return folder

    def _check_files(self, files: list[Path]) -> None:
        for file, most in zip(files, (MAX_CONFIG_BYTES, self._limits.max_adapter_bytes), strict=True):
            if not file.is_file():
                raise ApiError(404, f"no adapter at lora_path: it has no {file.name}", param="lora_path")
            size = file.stat().st_size
            if size > most:
                raise invalid(f"{file.name} has {size} bytes, at most {most} are allowed", "lora_path")


class AdapterStore(Protocol):
    """Where adapters are prepared: one process's, or that of several."""

    def prepare(self, spec: AdapterSpec, /) -> PreparedAdapter:
        """Read, check and pack an adapter. Raises UserError where it cannot be served."""

    def discard(self, prepared: PreparedAdapter, /) -> None:
        """Let a prepared adapter go."""


class AdapterRegistry:
    """What clients may name, and how that changes. Adapters are read, checked and packed on threads of their own."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        store: AdapterStore,
        num_layers: int,
        base_name: str,
        start: Mapping[str, AdapterSpec],
        folder: AdapterFolder | None,
        limits: ServerLimits,
        scrub: Scrubber,
    ) -> None:
        self._engine = engine
        self._store = store
        self._num_layers = num_layers
        self._base_name = base_name
        self._folder = folder
        self._limits = limits
        self._scrub = scrub
        self._served = {
            name: ServedAdapter(name=name, internal_name=name, rank=spec.rank, root=name)
            for name, spec in start.items()
        }
        self._changing: set[str] = set()
        self._reading = asyncio.Semaphore(limits.concurrent_loads)
        self._numbers = itertools.count(1)

    def find(self, name: str) -> ServedAdapter | None:
        """Return an adapter by the name that clients use."""
        return self._served.get(name)

    def all(self) -> list[ServedAdapter]:
        """Return all adapters, in the order they came."""
        return list(self._served.values())

    async def load(self, name: str, path: str, inplace: bool) -> None:
        """Make an adapter of the folder known by a name; `inplace` replaces one. Requests that run keep the old weights to their end."""
        try:
            check_name(name)
        except ValueError as error:
            raise invalid(f"lora_name {error}", "lora_name") from None
        if self._folder is None:
            raise ApiError(403, "this server loads no adapters: it was started without --adapter-dir")
        self._check_free(name, inplace)
        with self._changing_one(name):
            await self._load(name, path, self._folder)

    async def _load(self, name: str, path: str, folder: AdapterFolder) -> None:
        async with self._reading:
            prepared = await asyncio.to_thread(self._read, folder, name, path)
        await self._register(prepared)
        old, spec = self._served.get(name), prepared.spec
        self._served[name] = ServedAdapter(name=name, internal_name=spec.name, rank=spec.rank, root=path)
        if old is not None:
            with suppress(ValueError):  # merged or dynamic: it stays, and nobody can name it
                await self._forget(old)

    def _check_free(self, name: str, inplace: bool) -> None:
        known = name in self._served
        if name == self._base_name or (known and not inplace):
            hint = "" if name == self._base_name else "; load_inplace replaces it"
            raise invalid(f"The lora adapter '{name}' has already been loaded{hint}.", "lora_name")
        coming = sum(other not in self._served for other in self._changing)
        if not known and len(self._served) + coming >= self._limits.max_adapters:
            raise invalid(f"the server has its most adapters already: {self._limits.max_adapters}")

    def _read(self, folder: AdapterFolder, name: str, path: str) -> PreparedAdapter:
        """Read an adapter, on a thread. Its name in the engine is new each time, so that nothing of an old one, KV included, is taken for it."""
        number = next(self._numbers)
        try:
            spec = spec_of_peft(f"{name}#{number}", folder.find(path), self._num_layers)
            return self._store.prepare(spec)
        except ValueError as error:
            raise invalid(self._scrub.error(error), "lora_path") from None
        except (OSError, MemoryError, RankError, ReplicaError) as error:
            log.exception("an adapter could not be read")
            raise ApiError(503, f"the adapter could not be read: {type(error).__name__}") from None

    async def _register(self, prepared: PreparedAdapter) -> None:
        try:
            await self._engine.call(lambda engine: engine.register(prepared.spec.name, prepared))
        except Exception as error:
            self._store.discard(prepared)
            if isinstance(error, ValueError):
                raise invalid(self._scrub.error(error), "lora_path") from None
            raise

    async def unload(self, name: str) -> None:
        """Take a name away; requests that run or wait are served to their end."""
        with self._changing_one(name):
            served = self._served.pop(name, None)
            if served is None:
                raise ApiError(404, f"The lora adapter '{name}' cannot be found.", param="lora_name")
            try:
                await self._forget(served)
            except ValueError as error:  # merged or dynamic
                self._served[name] = served
                raise ApiError(409, self._scrub.error(error), param="lora_name") from None

    async def _forget(self, served: ServedAdapter) -> None:
        await self._engine.call(lambda engine: engine.unregister(served.internal_name))

    @contextmanager
    def _changing_one(self, name: str) -> Iterator[None]:
        """Change a name once at a time."""
        if name in self._changing:
            raise ApiError(409, f"the lora adapter '{name}' is being changed by another request: try again")
        self._changing.add(name)
        try:
            yield
        finally:
            self._changing.discard(name)
