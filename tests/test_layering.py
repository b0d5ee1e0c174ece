"""Imports only fall: every import of every module is held against the table in docs/design.md."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def torch_free_modules() -> set[str]:
    """Read the list of the engine's torch-free modules from the design: its decisions."""
    design = (ROOT / "docs" / "design.md").read_text("utf-8")
    listed = re.search(r"Torch-free modules of the engine: `([^`]+)`", design)
    assert listed is not None
    return set(listed[1].replace(",", " ").split())


TORCH_FREE = torch_free_modules()

# What each folder may import of ours.
FLOORS = {
    "traces": {"traces"},
    "kernels": {"kernels"},
    "engine": {"engine", "traces", "kernels"},
    "sim": {"sim", "traces", "engine"},
    "planner": {"planner", "sim", "traces", "engine"},
    "app": {"planner"},
}

# The two lowest floors may import nothing else at all; command lines also get the option parser.
OUTSIDE = {"traces": {"numpy", "pandas"}, "kernels": {"numpy", "torch", "triton"}}
COMMAND_LINE = {"rich", "typer"}
GPU = {"torch", "triton", "kernels", "transformers", "safetensors"}
WEB_PAGE = {"altair", "streamlit"}


def modules_of(folder: str) -> list[Path]:
    if folder == "app":
        return [path for path in (ROOT / "app.py",) if path.exists()]
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything imported, also in functions and under TYPE_CHECKING."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def engine_module(name: str) -> str | None:
    """Return X if a dotted name is of the module engine.X."""
    parts = name.split(".")
    if parts[0] != "engine" or len(parts) < 2:
        return None
    module = ROOT / "engine" / parts[1]
    return parts[1] if module.is_dir() or module.with_suffix(".py").exists() else None


@cache
def imported_by(module: str) -> frozenset[str]:
    """Return the dotted names that engine.X imports."""
    path = ROOT / "engine" / f"{module}.py"
    return frozenset(name for _, name in imports(path, path.read_text("utf-8")))


@cache
def needs_torch(module: str | None) -> bool:
    """Say whether importing engine.X imports a GPU package, by itself or through another of its modules."""
    seen, left = set[str](), [module]
    while left:
        reached = left.pop()
        if reached is None or reached in seen:
            continue
        seen.add(reached)
        if not (ROOT / "engine" / f"{reached}.py").exists():  # a package of the engine: taken to need it
            return True
        names = imported_by(reached)
        if any(name.split(".")[0] in GPU for name in names):
            return True
        left += [engine_module(name) for name in names]
    return False


def faults(path: Path, source: str) -> list[str]:
    """Return the imports of a module that its folder may not make."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    folder = parts[0]
    in_dashboard = parts[:2] == ("planner", "dashboard")
    torch_free = folder in ("sim", "planner", "app") or (
        folder == "engine" and (parts[1] in TORCH_FREE or parts[1] == "__init__")
    )
    found = []
    for line, name in imports(path, source):
        top = name.split(".")[0]
        ours = top in FLOORS
        stdlib = top in sys.stdlib_module_names or top == "__future__"
        outside = OUTSIDE.get(folder, {top}) | (
            COMMAND_LINE if parts[-1] in ("__main__", "cli", "command_line") else set()
        )
        wrong = (
            (ours and top not in FLOORS[folder])
            or (not ours and not stdlib and top not in outside)
            or (torch_free and (top in GPU or needs_torch(engine_module(name))))
            or (top in WEB_PAGE and not in_dashboard and not (folder == "app" and top == "streamlit"))
        )
        if wrong:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return found


@pytest.mark.parametrize("folder", FLOORS)
def test_imports_only_fall(folder: str) -> None:
    assert [fault for path in modules_of(folder) for fault in faults(path, path.read_text("utf-8"))] == []


def test_kernels_init_is_empty() -> None:
    """Transformers looks for another package of this name: ours must do nothing when it is imported."""
    init = ROOT / "kernels" / "__init__.py"
    assert not init.exists() or init.read_text("utf-8") == ""


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("traces/x.py", "import sim"),
        ("traces/x.py", "import scipy"),
        ("traces/x.py", "import typer"),
        ("kernels/x.py", "from engine.pool import Pool"),
        ("engine/scheduler.py", "import torch"),
        ("engine/scheduler.py", "def f():\n    from torch import nn"),
        ("engine/scheduler.py", "if TYPE_CHECKING:\n    import kernels.lora_shrink"),
        ("engine/__init__.py", "import triton"),
        ("engine/x.py", "from sim import costs"),
        ("engine/x.py", "from ..planner import search"),
        ("sim/x.py", "import app"),
        ("planner/x.py", "importlib.import_module('torch')"),
        ("planner/x.py", "import streamlit"),
        ("app.py", "import sim"),
    ],
)
def test_finds_an_arrow_that_goes_up(path: str, source: str) -> None:
    assert len(faults(ROOT / path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("traces/__main__.py", "import typer, json, numpy as np"),
        ("engine/x.py", "import torch\nfrom kernels import lora_shrink\nfrom traces import load"),
        ("sim/x.py", "import simpy\nfrom engine.scheduler import Scheduler\nfrom .costs import StepCosts"),
        ("planner/dashboard/x.py", "import streamlit, altair"),
        ("app.py", "import streamlit\nfrom planner.dashboard import plan"),
    ],
)
def test_lets_an_arrow_that_falls_pass(path: str, source: str) -> None:
    assert faults(ROOT / path, source) == []


def test_what_needs_torch_by_itself_or_through_another_is_out_of_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {
        "runner": "import torch",
        "replay": "from engine.runner import Runner",
        "tables": "import numpy",
    }
    (tmp_path / "engine").mkdir()
    for module, source in (*sources.items(), ("pool", "from engine.tables import Table")):
        (tmp_path / "engine" / f"{module}.py").write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)

    source = "from engine import pool, replay\nimport engine.runner\nfrom engine.tables import Table"
    for module in ("engine/scheduler.py", "sim/x.py"):
        assert faults(tmp_path / module, source) == [
            f"{module}:1 imports engine.replay",
            f"{module}:2 imports engine.runner",
        ]
