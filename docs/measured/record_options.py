"""Reads the options of vLLM and SGLang out of a release's wheel, for planner/export_options: names and choices alone.

    python -m pip download vllm==0.33.0 --no-deps -d WHEELS
    python -m docs.measured.record_options vllm WHEELS/vllm-0.33.0-*.whl

Nothing of the wheel is run or installed: the calls that make its parsers are read as text (`ast`). Where vLLM makes options of a class's
fields, as its `get_kwargs` does, a field that may be a bool has a --no- form too and a Literal's values are its choices; a SGLang field has the flag,
aliases and choices of its `Arg`. Choices that only a running process knows are left out: any value passes there.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[2] / "planner" / "export_options"
Options = dict[str, list[Any] | None]  # flag -> its choices, None: any value


class Wheel:
    """The Python files of a wheel, parsed when they are wanted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = zipfile.ZipFile(path)
        self.names = self._file.namelist()

    def tree(self, name: str) -> ast.Module:
        """Return a file's syntax tree."""
        return ast.parse(self._file.read(name))

    @property
    def version(self) -> str:
        """The version in the wheel's name."""
        return self.path.name.split("-")[1]


def vllm(wheel: Wheel) -> dict[str, Any]:
    """Return the options of `vllm serve` and `vllm bench serve`."""
    config = [
        wheel.tree(name) for name in wheel.names if name.startswith("vllm/config/") and name.endswith(".py")
    ]
    known = Known(config)
    engine = wheel.tree("vllm/engine/arg_utils.py")
    known.read(engine)
    serve: Options = {}
    for owner in ("EngineArgs", "AsyncEngineArgs"):
        serve |= _added(_method(engine, owner, "add_cli_args"), known)
    front = wheel.tree("vllm/entrypoints/common/cli_args.py")
    known.read(front)
    for owner in ("BaseFrontendArgs", "FrontendArgs"):
        for field, annotation in known.fields[owner].items():
            serve |= known.options(f"--{field.replace('_', '-')}", annotation)
    serve |= _added(_function(front, "make_arg_parser"), known)
    bench: Options = {}
    for name in ("vllm/benchmarks/serve.py", "vllm/benchmarks/datasets/datasets.py"):
        bench |= _added(wheel.tree(name), known)
    return {"engine": "vLLM", "serve": serve, "bench": bench}


def sglang(wheel: Wheel) -> dict[str, Any]:
    """Return the options of `sglang.launch_server` and `sglang.benchmark.serving`."""
    known = Known([wheel.tree("sglang/srt/arg_groups/choices.py"), wheel.tree("sglang/srt/utils/common.py")])
    serve: Options = {}
    for name in wheel.names:
        if name.startswith("sglang/srt/arg_groups/fields/") and name.endswith(".py"):
            tree = wheel.tree(name)
            known.read(tree)
            for owner in tree.body:
                if isinstance(owner, ast.ClassDef):
                    serve |= _arg_fields(owner, known)
    serve |= _added(_method(wheel.tree("sglang/srt/server_args.py"), "ServerArgs", "add_cli_args"), known)
    return {
        "engine": "SGLang",
        "serve": serve,
        "bench": _added(wheel.tree("sglang/benchmark/serving.py"), known),
    }


class Known:
    """What the files say of names: values of constants and of Literals, and the annotations of classes' fields."""

    def __init__(self, trees: list[ast.Module]) -> None:
        self.values: dict[str, list[Any]] = {}
        self.fields: dict[str, dict[str, ast.expr]] = {}
        self._aliases: dict[str, ast.expr] = {}
        for tree in trees:
            self.read(tree)

    def read(self, tree: ast.Module) -> None:
        """Take in a file's top level."""
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                own = {
                    item.target.id: item.annotation
                    for item in node.body
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                }
                self.fields[node.name] = self.fields.get(node.name, {}) | own
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._aliases[node.targets[0].id] = node.value
                values = self.list_of(node.value)
                if values is not None:
                    self.values[node.targets[0].id] = values

    def list_of(self, node: ast.expr | None) -> list[Any] | None:
        """Return a list's values, where they can be read."""
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = self.list_of(node.left), self.list_of(node.right)
            return None if left is None or right is None else left + right
        if isinstance(node, ast.List | ast.Tuple):
            items: list[Any] = []
            for item in node.elts:
                if isinstance(item, ast.Constant):
                    items.append(item.value)
                elif isinstance(item, ast.Name) and isinstance(self._aliases.get(item.id), ast.Constant):
                    items.append(self._aliases[item.id].value)  # type: ignore[attr-defined]
                else:
                    return None
            return items
        return None

    def options(self, flag: str, annotation: ast.expr | None) -> Options:
        """Return what vLLM makes of a field of this type."""
        kinds = self._kinds(annotation)
        if "bool" in kinds and "str" not in kinds:
            return {flag: None, f"--no-{flag.removeprefix('--')}": None}
        literals = [value for kind in kinds if isinstance(kind, tuple) for value in kind]
        return {flag: literals or None}

    def _kinds(self, node: ast.expr | None) -> list[str | tuple[Any, ...]]:
        """Return the alternatives of a type: names, and a tuple for a Literal's values."""
        if isinstance(node, ast.BinOp):
            return [*self._kinds(node.left), *self._kinds(node.right)]
        if isinstance(node, ast.Name):
            alias = self._aliases.get(node.id)
            return self._kinds(alias) if isinstance(alias, ast.Subscript | ast.BinOp) else [node.id]
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            if node.value.id == "Literal":
                if all(isinstance(item, ast.Constant) for item in inner):
                    return [tuple(item.value for item in inner if isinstance(item, ast.Constant))]
                return [kind for item in inner for kind in self._kinds(item)]
            if node.value.id in ("Optional", "Union", "SkipValidation"):
                return [kind for item in inner for kind in self._kinds(item)]
            return [node.value.id]
        return []


def _added(node: ast.AST, known: Known) -> Options:
    """Return the options of all calls of add_argument in a piece of code."""
    owners = {
        item.targets[0].id: item.value.args[0].id
        for item in ast.walk(node)
        if isinstance(item, ast.Assign)
        and isinstance(item.targets[0], ast.Name)
        and isinstance(item.value, ast.Call)
        and getattr(item.value.func, "id", "") == "get_kwargs"
        and isinstance(item.value.args[0], ast.Name)
    }
    found: Options = {}
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            given = {item.arg: item.value for item in call.keywords}
            for flag in _flags(call.args):
                found |= known.options(flag, _field_of(given.get(None), owners, known))
                if "BooleanOptionalAction" in ast.dump(given.get("action", ast.Constant(None))):
                    found |= {flag: None, f"--no-{flag.removeprefix('--')}": None}
                if known.list_of(given.get("choices")) is not None:
                    found[flag] = known.list_of(given["choices"])
    return found


def _field_of(spread: ast.expr | None, owners: dict[str, str], known: Known) -> ast.expr | None:
    """Return the type of the field that `**owner_kwargs["field"]` is made of."""
    if isinstance(spread, ast.Dict):  # {**owner_kwargs["field"], "default": ...}
        spread = next(
            (value for key, value in zip(spread.keys, spread.values, strict=True) if key is None), None
        )
    if not (isinstance(spread, ast.Subscript) and isinstance(spread.value, ast.Name)):
        return None
    field = spread.slice.value if isinstance(spread.slice, ast.Constant) else None
    return known.fields.get(owners.get(spread.value.id, ""), {}).get(str(field))


def _arg_fields(owner: ast.ClassDef, known: Known) -> Options:
    """Return the options of SGLang's `field: A[type, "help" or Arg(...)]`."""
    found: Options = {}
    for item in owner.body:
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        if not (isinstance(item.annotation, ast.Subscript) and isinstance(item.annotation.slice, ast.Tuple)):
            continue
        told = item.annotation.slice.elts[1:]
        args = [meta for meta in told if isinstance(meta, ast.Call) and getattr(meta.func, "id", "") == "Arg"]
        helped = any(isinstance(meta, ast.Constant | ast.JoinedStr | ast.BinOp) for meta in told)
        if not args and not helped:
            continue  # worked out, not given
        given = {word.arg: word.value for meta in args for word in meta.keywords}
        if isinstance(given.get("no_cli"), ast.Constant):
            continue
        named = given.get("cli_name")
        flag = named.value if isinstance(named, ast.Constant) else f"--{item.target.id.replace('_', '-')}"
        for name in (str(flag), *(known.list_of(given.get("aliases")) or ())):
            if name.startswith("--"):
                found[name] = known.list_of(given.get("choices"))
    return found


def _flags(nodes: list[ast.expr]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("--"):
            yield node.value


def _method(tree: ast.Module, owner: str, name: str) -> ast.AST:
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)
    return next(item for item in found.body if isinstance(item, ast.FunctionDef) and item.name == name)


def _function(tree: ast.Module, name: str) -> ast.AST:
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)


def main() -> int:
    """Read one wheel and write its list."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=["vllm", "sglang"])
    parser.add_argument("wheel", type=Path)
    given = parser.parse_args()
    wheel = Wheel(given.wheel)
    found = {"vllm": vllm, "sglang": sglang}[given.engine](wheel)
    options, bench = found["serve"], found["bench"]
    record = {
        "engine": found["engine"],
        "version": wheel.version,
        "sources": [
            {
                "what": f"the parsers of {wheel.path.name} of PyPI, read by docs/measured/record_options.py (nothing of it was run)",
                "read": date.today().isoformat(),
            }
        ],
        "options": sorted(options),
        "choices": {flag: values for flag, values in sorted(options.items()) if values},
        "bench_options": sorted(bench),
        "bench_choices": {flag: values for flag, values in sorted(bench.items()) if values},
    }
    (OUT / f"{given.engine}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{given.engine} {wheel.version}: {len(options)} options, {len(bench)} of its benchmark")
    return 0


if __name__ == "__main__":
    sys.exit(main())
