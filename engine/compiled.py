"""Compiled twins of the modules in which a simulation spends its time, used where they are of these very sources.

`make compiled` (`engine/compile.py`) makes them with mypyc. They lie beside the packages in `.compiled/<digest of the sources>/`: sources that were
edited have another digest, so a stale twin is never run; what is not compiled runs as it is, and the results are the same.
"""

from __future__ import annotations

import sys
from functools import cache
from hashlib import blake2b
from pathlib import Path

MODULES = (
    "engine.admission",
    "engine.decode_set",
    "engine.idle_order",
    "engine.merge_mode",
    "engine.merge_policy",
    "engine.pool",
    "engine.prefills",
    "engine.prefix_cache",
    "engine.queue_clustered",
    "engine.queue_fair",
    "engine.queue_slo",
    "engine.queue_view",
    "engine.queues",
    "engine.registered_adapters",
    "engine.requests",
    "engine.residency",
    "engine.router",
    "engine.running_set",
    "engine.scheduler",
    "engine.sequence",
    "engine.step",
    "engine.step_shape",
    "engine.unified_pool",
    "sim.costs",
    "sim.heating",
    "sim.loads",
    "sim.observe",
    "sim.price",
    "sim.segment",
    "sim.step_sum",
)
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".compiled"


def sources() -> list[Path]:
    """Return the files of the modules, in order."""
    return [ROOT / f"{name.replace('.', '/')}.py" for name in MODULES]


def digest() -> str:
    """Return what the sources and the interpreter are known by."""
    found = blake2b(f"{sys.implementation.cache_tag} {' '.join(MODULES)}".encode(), digest_size=10)
    for path in sources():
        text = path.read_bytes()
        found.update(f" {len(text)} ".encode() + text)
    return found.hexdigest()


@cache
def folder() -> Path | None:
    """Return where the twins of these sources are; None where there are none. Looked up once a process."""
    if not FOLDER.is_dir():
        return None
    path = FOLDER / digest()
    return path if path.is_dir() else None


def find_compiled(package: str, places: list[str]) -> None:
    """Let the modules of a package be found compiled first. places: the package's `__path__`."""
    path = folder()
    if path is None:
        return
    places.insert(0, str(path / package))
    if str(path) not in sys.path:
        sys.path.append(str(path))  # for the library that the twins share


def state() -> str:
    """Say in a few words whether compiled modules run."""
    if folder() is not None:
        return "compiled modules in use"
    if FOLDER.is_dir():
        return "compiled modules are of other sources and not used: `make compiled` makes them anew"
    return "no compiled modules (`make compiled`)"
