"""Compile the modules of `engine/compiled.py` for this interpreter: `make compiled`. Needs mypy, setuptools and a C compiler."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from engine.compiled import FOLDER, ROOT, digest, sources

OPTIMISATION = "1"  # 2 takes a third longer to build and runs no faster (2026-11-22)
# A multiplication and an addition that are fused, as on some processors, are rounded once: results must not depend on what is compiled.
C_FLAGS = ["-ffp-contract=off", "-Wno-error"]
MYPY_FLAGS = (
    "--config-file=",
    "--explicit-package-bases",
    "--ignore-missing-imports",
    "--cache-dir=/dev/null",
)


def compile_modules() -> Path:
    """Build what is not built yet and remove what is stale; return where it lies."""
    name = digest()
    target = FOLDER / name
    if not target.is_dir():
        FOLDER.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=FOLDER) as scratch:
            _build(Path(scratch))
            if digest() != name:
                raise SystemExit("error: the sources changed while they were compiled; start again")
            (Path(scratch) / "out").rename(target)
    for other in FOLDER.iterdir():
        if other != target:
            shutil.rmtree(other)
    return target


def _build(scratch: Path) -> None:
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    os.chdir(ROOT)  # mypy names modules by their paths from here
    paths = [str(path.relative_to(ROOT)) for path in sources()]
    extensions = mypycify(
        [*MYPY_FLAGS, *paths],
        opt_level=OPTIMISATION,
        debug_level="0",
        group_name="loraplan",
        target_dir=str(scratch / "c"),
    )
    for extension in extensions:
        extension.extra_compile_args = [*extension.extra_compile_args, *C_FLAGS]
    command = build_ext(Distribution({"name": "loraplan", "ext_modules": extensions}))
    command.build_lib, command.build_temp = str(scratch / "out"), str(scratch / "objects")
    command.finalize_options()
    command.run()


def main() -> None:
    """Build, and say where."""
    if any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        print(f"compiled modules are in {compile_modules()}")
    else:
        sys.exit("error: no C compiler is here; everything runs without, at about half the speed")


if __name__ == "__main__":
    main()
