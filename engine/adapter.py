"""What an adapter is before its weights are read: a name, a method, its ranks, the linears it changes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from engine.dynamic_adapter import CONFIG_FILE, DynamicAdapterSpec, read_dynamic_config
from engine.errors import UserError
from engine.json_files import parse_json
from engine.model_shape import MAX_RANK as MAX_RANK
from engine.model_shape import MODULES
from engine.peft_config import read_peft_config

AdapterKind = Literal["lora", "bd_lora", "dynamic"]

DEFAULT_RANK = 16
"""Rank of an adapter that nobody gave one: an assumption, to be said where results are shown."""

DEFAULT_EXPERTS, DEFAULT_TOP_K = 8, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """One adapter. ``rank`` is that of every target, but for those that ``rank_overrides`` names, as (module,
    rank).

    nblocks: diagonal blocks of a ``bd_lora``; dense LoRA has 1. path: its PEFT folder, or that of a dynamic adapter (docs/switch.md); None
    means random weights. num_experts, top_k: of a ``dynamic`` one; 0 is what `expert_counts` says.
    """

    name: str
    kind: AdapterKind = "lora"
    rank: int = DEFAULT_RANK
    nblocks: int = 1
    target_modules: tuple[str, ...] = MODULES
    path: Path | None = None
    rank_overrides: tuple[tuple[str, int], ...] = ()
    num_experts: int = 0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UserError(f"adapter name (={self.name!r}) must be a non-empty string.")
        if self.kind not in get_args(AdapterKind):
            raise UserError(f"kind (={self.kind!r}) must be one of {', '.join(get_args(AdapterKind))}.")
        _check_integer("rank", self.rank, 1, MAX_RANK)
        _check_integer("nblocks", self.nblocks, 1, MAX_RANK)
        if self.kind != "bd_lora" and self.nblocks != 1:
            raise UserError(f"nblocks (={self.nblocks}) must be 1 unless kind is bd_lora.")
        if not isinstance(self.target_modules, tuple) or not self.target_modules:
            raise UserError("target_modules must be a tuple that names at least one linear.")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.rank_overrides):
            raise UserError("rank_overrides must be pairs of a linear and a rank.")
        for module in (*self.target_modules, *(module for module, _ in self.rank_overrides)):
            if module not in MODULES:
                raise UserError(f"target_modules has {module!r}; it must be one of {', '.join(MODULES)}.")
        if len(set(self.target_modules)) != len(self.target_modules):
            raise UserError("target_modules names a linear twice.")
        for module, rank in self.rank_overrides:
            _check_integer(f"rank of {module}", rank, 1, MAX_RANK)
        if self.kind == "dynamic":
            experts, top_k = self.expert_counts
            DynamicAdapterSpec(name=self.name, num_experts=experts, top_k=top_k, rank=self.rank)
        elif self.num_experts or self.top_k:
            raise UserError("num_experts and top_k are of kind dynamic alone.")
        if any(rank % self.nblocks for rank in self.module_ranks):
            raise UserError(f"nblocks (={self.nblocks}) must divide rank (={self.rank}).")

    @property
    def module_ranks(self) -> tuple[int, ...]:
        """The seven ranks that LoRA's kernels see, in the order of MODULES, 0 where a linear is not a target: all of a dynamic adapter's."""
        if self.kind == "dynamic":
            return (0,) * len(MODULES)
        overrides = dict(self.rank_overrides)
        return tuple(
            overrides.get(module, self.rank) if module in self.target_modules else 0 for module in MODULES
        )

    @property
    def expert_counts(self) -> tuple[int, int]:
        """Experts of a dynamic adapter, and how many a token has: 8 and 2 unless it says otherwise."""
        return self.num_experts or DEFAULT_EXPERTS, self.top_k or DEFAULT_TOP_K


def load_adapters(path: str | Path) -> dict[str, AdapterSpec]:
    """Read adapters.jsonl: one adapter a line, by name, in the file's order.

    A relative ``path`` starts at the file's own folder and must be a PEFT folder: what its
    adapter_config.json says fills missing keys and must agree with given ones. Raises UserError naming file
    and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read: {reason}.") from None
    adapters: dict[str, AdapterSpec] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            spec = _parse(line, path.parent)
            if spec.name in adapters:
                raise UserError(f"name (={spec.name!r}) is used twice.")
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        adapters[spec.name] = spec
    if not adapters:
        raise UserError(f"{path}: holds no adapter.")
    return adapters


def adapters_of_trace(
    names_to_ranks: Mapping[str, int | None], given: Mapping[str, AdapterSpec] | None = None
) -> dict[str, AdapterSpec]:
    """Return the adapters that a trace asks for, in the trace's order.

    Without ``given``, each is dense LoRA on all seven linears, of the trace's rank, else DEFAULT_RANK. With
    it, raises UserError for a name that is not in it or whose rank there is another than the trace's.
    """
    if given is None:
        return {
            name: AdapterSpec(name=name, rank=DEFAULT_RANK if rank is None else rank)
            for name, rank in names_to_ranks.items()
        }
    adapters = {}
    for name, rank in names_to_ranks.items():
        spec = given.get(name)
        if spec is None:
            raise UserError(f"adapter {name!r} of the trace is not among the adapters given.")
        if rank is not None and rank != spec.rank:
            raise UserError(
                f"adapter {name!r} has rank {rank} in the trace and rank {spec.rank} where it is given."
            )
        adapters[name] = spec
    return adapters


_KEYS = ("name", "kind", "rank", "nblocks", "target_modules", "path", "num_experts", "top_k")


def _parse(line: str, folder: Path) -> AdapterSpec:
    record = parse_json(line)
    if not isinstance(record, dict):
        raise UserError("must be a JSON object.")
    for key in record:
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r}; known keys: {', '.join(_KEYS)}.")
    if "name" not in record:
        raise UserError("name is missing.")
    given = {key: value for key, value in record.items() if value is not None}
    targets = given.get("target_modules", MODULES)
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise UserError("target_modules must be a list of strings.")
    given["target_modules"] = tuple(targets)
    if "path" not in given:
        return AdapterSpec(**given)
    if not isinstance(given["path"], str):
        raise UserError(f"path (={given['path']!r}) must be a string.")
    given["path"] = adapter_folder = folder / given["path"]
    if given.get("kind", "dynamic") == "dynamic" and (adapter_folder / CONFIG_FILE).is_file():
        spec = spec_of_dynamic(given["name"], adapter_folder)
        found = {key: getattr(spec, key) for key in ("rank", "kind", "num_experts", "top_k")}
        _check_agreement(AdapterSpec(**{**found, **given}), spec, record)
        return spec
    # One layer stands for all here; the loader, who knows how many there are, checks that they agree.
    spec = spec_of_peft(given["name"], adapter_folder, num_layers=1)
    found = {"rank": spec.rank, "kind": spec.kind, "nblocks": spec.nblocks}
    _check_agreement(AdapterSpec(**{**found, **given}), spec, record)
    return spec


def spec_of_peft(name: str, folder: Path, num_layers: int) -> AdapterSpec:
    """Return what a PEFT folder's adapter_config.json describes. Raises UserError for unsupported methods."""
    config = read_peft_config(folder)
    ranks = config.module_ranks(num_layers)
    rank = max(ranks.values())
    return AdapterSpec(
        name=name,
        kind="lora" if config.nblocks == 1 else "bd_lora",
        nblocks=config.nblocks,
        rank=rank,
        target_modules=tuple(ranks),
        path=folder,
        rank_overrides=tuple((module, other) for module, other in ranks.items() if other != rank),
    )


def spec_of_dynamic(name: str, folder: Path) -> AdapterSpec:
    """Return what a dynamic adapter's folder describes. Raises UserError naming file and field where it is not known."""
    config = read_dynamic_config(folder, name)
    return AdapterSpec(
        name=name,
        kind="dynamic",
        rank=config.rank,
        target_modules=config.targets,
        path=folder,
        num_experts=config.num_experts,
        top_k=config.top_k,
    )


def _check_agreement(given: AdapterSpec, folder: AdapterSpec, record: Mapping[str, Any]) -> None:
    """Raise UserError where a key written in the file says something else than the adapter's own folder."""
    for key in ("kind", "rank", "nblocks", "target_modules", "num_experts", "top_k"):
        wanted, found = getattr(given, key), getattr(folder, key)
        if key == "target_modules":
            wanted, found = set(wanted), set(found)
        if record.get(key) is not None and wanted != found:
            raise UserError(
                f"{key} (={record[key]!r}) is not what {folder.path} says ({getattr(folder, key)!r})."
            )


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name} (={value!r}) must be an integer in {low}..{high}.")
