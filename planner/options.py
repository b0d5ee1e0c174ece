"""What `plan` may be given: its flags, and the same as one value."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer

from engine.config import LoraSharding
from engine.errors import UserError
from planner.exports import ENGINES
from planner.plan import Objective
from planner.space import (
    LORA_SHARDINGS,
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    POLICIES,
    ROUTING,
    TP_DEGREES,
    Values,
)
from planner.vllm import MAX_LORAS
from traces.metrics import Slo

DEFAULT = Slo()
DEFAULT_GPU = "h200"


def shown(values: tuple[Any, ...]) -> str:
    """Return values as a flag takes them."""
    return ",".join("none" if value is None else str(value) for value in values)


def _flag(kind: Any, text: str, *names: str, **more: Any) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, **more)]


Trace = _flag(Path | None, "Trace to plan for: native JSONL, plain or gzip.")
Gpus = _flag(int | None, "Most GPUs there are.", min=1)
Model = _flag(str, "Base model: a known name, or a config.json or its folder.")
Gpu = _flag(str, "Kind of GPU; several, with commas, are planned for one after the other.")
TtftMs = _flag(float | None, "Bound on the time to the first token, ms.  [default: 500]")
TpotMs = _flag(float | None, "Bound on the time per further token, ms.  [default: 50]")
E2eMs = _flag(float | None, "Bound on the whole request, ms; none unless given.")
Percentile = _flag(float, "Percentile at which latencies are shown.")
Attainment = _flag(float, "Share of requests that must meet every bound.")
Adapters = _flag(Path | None, "adapters.jsonl: what the trace's adapters are.")
Goal = _flag(Objective, "goodput: the highest rate; min-gpus: the fewest GPUs; pareto: both, and the front.")
Tp = _flag(str | None, f"TP degrees to try.  [default: {shown(TP_DEGREES)}]")
Seqs = _flag(str, "Limits on running requests to try.")
Tokens = _flag(str, "Limits on a step's tokens to try.")
Sharding = _flag(str, "Ways to try to cut adapters over the GPUs of a replica.")
Scheduler = _flag(str, "Scheduling policies to try.")
Cap = _flag(str, "Limits on distinct adapters among the running requests to try; none is no limit.")
Merge = _flag(str, "Ways to merge adapters into the weights to try.")
Router = _flag(str, "Routers over replicas to try.")
Placement = _flag(str, "Placements of adapters on replicas to try.")
RateScale = _flag(float, "Plan for so many times the trace's rate.")
RawArrivals = _flag(bool, "Use `arrival_s` even where `arrival_spread_s` is given.", "--raw-arrivals")
ProfileFile = _flag(Path | None, "Measured profile; else the one shipped for model and GPU.")
Engine = _flag(Literal["ours", "vllm"], "What serves; vllm with a profile of `sim calibrate`.")
MaxLoras = _flag(str, "vLLM's adapter slots to try.")
Utilization = _flag(str, "vLLM's shares of memory to try.")
Prices = _flag(Path | None, "US dollars per GPU-hour, as planner/prices.json.")
Top = _flag(int, "Alternatives to show.", min=0)
Seed = _flag(int, "Seed of randomness.", min=0)
TimeoutS = _flag(float | None, "Give the best so far after so many seconds.")
WorkerCount = _flag(int | None, "Processes; all cores unless given. Changes nothing but time.", min=1)
Cluster = _flag(str | None, "Run the trials on the Dask cluster at this address, as tcp://HOST:PORT.")
OutputDir = _flag(
    Path | None, "Folder to write: plan, trials, configurations, report. Resumes what was killed."
)
Overwrite = _flag(bool, "Replace an earlier plan in the output folder.", "--overwrite")
Export = _flag(str | None, f"Write launch commands for {', '.join(ENGINES)} (a list) beside the plan.")
Explain = _flag(Path | None, "Explain this one configuration instead of searching.")
Verify = _flag(Path | None, "Hold the prediction of --config against this run record instead of searching.")
Config = _flag(Path | None, "With --verify: the configuration; else the run's own.")
Form = _flag(Literal["table", "json"], "How to print the plan.", "--format")
Quiet = _flag(bool, "Nothing on standard error but errors.", "--quiet")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What `plan` was given, flag by flag. Raises UserError for flags that contradict each other or make no sense."""

    trace: Path | None
    gpus: int | None
    model: str
    gpu: str
    ttft_ms: float | None
    tpot_ms: float | None
    e2e_ms: float | None
    percentile: float
    attainment: float
    adapters: Path | None
    objective: Objective
    tp: str | None
    max_num_seqs: str
    max_num_batched_tokens: str
    lora_sharding: str
    scheduler: str
    max_adapters_per_step: str
    merge: str
    router: str
    placement: str
    rate_scale: float
    raw_arrivals: bool
    profile: Path | None
    engine: Literal["ours", "vllm"]
    max_loras: str
    gpu_memory_utilization: str
    prices: Path | None
    top: int
    seed: int
    timeout_s: float | None
    workers: int | None
    cluster: str | None
    output_dir: Path | None
    overwrite: bool
    export: str | None
    explain: Path | None
    verify: Path | None
    config: Path | None
    form: Literal["table", "json"]
    quiet: bool

    def __post_init__(self) -> None:
        if self.timeout_s is not None:
            above_zero("--timeout-s", self.timeout_s)
        above_zero("--rate-scale", self.rate_scale)
        self._check_modes()
        if self.cluster is not None and self.workers is not None:
            raise UserError("--cluster and --workers exclude each other: the cluster says how many there are")
        if self.overwrite and self.output_dir is None:
            raise UserError("--overwrite needs --output-dir")
        if self.export is not None and self.engine == "vllm":
            raise UserError("--export is for --engine ours: --engine vllm prints vLLM's own command")
        if len(self.kinds) > 1 and (self.profile is not None or self.engine == "vllm"):
            raise UserError("--gpu with several kinds takes neither --profile nor --engine vllm")
        if len(self.kinds) > 1 and (self.output_dir is not None or self.cluster is not None):
            raise UserError("--gpu with several kinds takes neither --output-dir nor --cluster")

    def _check_modes(self) -> None:
        if self.explain is not None and self.verify is not None:
            raise UserError("--explain and --verify exclude each other")
        if self.config is not None and self.verify is None:
            raise UserError("--config is for --verify: a plan chooses the configuration, --explain names one")
        if self.verify is None and self.trace is None:
            raise UserError("--trace is missing")
        if self.verify is None and self.explain is None and self.gpus is None:
            raise UserError("--gpus is missing")
        for name in ("output_dir", "export", "cluster"):
            if getattr(self, name) is not None and (self.explain or self.verify):
                mode = "--explain" if self.explain else "--verify"
                raise UserError(f"--{name.replace('_', '-')} and {mode} exclude each other")
        if self.engine == "vllm" and (self.explain or self.verify or self.cluster):
            raise UserError("--engine vllm takes neither --explain, --verify nor --cluster")
        if self.engine == "vllm" and self.objective == "pareto":
            raise UserError("--objective pareto is for --engine ours")
        self._check_engine()

    def _check_engine(self) -> None:
        """Raise UserError for a flag that the other engine alone has: it would change nothing."""
        ours = ("lora_sharding", *POLICIES, *ROUTING)
        theirs = ("max_loras", "gpu_memory_utilization")
        for name in ours if self.engine == "vllm" else theirs:
            if getattr(self, name) != DEFAULTS[name]:
                other = "ours" if self.engine == "vllm" else "vllm"
                raise UserError(f"--{name.replace('_', '-')} is for --engine {other}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of GPU."""
        return tuple(dict.fromkeys(self.gpu.split(",")))

    @property
    def default_slo(self) -> bool:
        """Whether no bound was given."""
        return self.ttft_ms is None and self.tpot_ms is None and self.e2e_ms is None

    def slo(self) -> Slo:
        """Return what is promised. Raises UserError."""
        return Slo(
            ttft_s=_seconds("--ttft-ms", self.ttft_ms, DEFAULT.ttft_s),
            tpot_s=_seconds("--tpot-ms", self.tpot_ms, DEFAULT.tpot_s),
            e2e_s=None if self.e2e_ms is None else _seconds("--e2e-ms", self.e2e_ms, 0.0),
            percentile=_in_range("--percentile", self.percentile, 100),
            attainment=_in_range("--attainment", self.attainment, 1),
        )

    def policies(self) -> Values:
        """Return the policies to try. Raises UserError."""
        return {name: self._values(name, known) for name, known in POLICIES.items()}

    def routing(self) -> Values:
        """Return the routers and placements to try. Raises UserError."""
        return {name: self._values(name, known) for name, known in ROUTING.items()}

    def shardings(self) -> tuple[LoraSharding, ...]:
        """Return the ways to cut adapters. Raises UserError."""
        known = get_args(LoraSharding)
        for way in self.lora_sharding.split(","):
            if way not in known:
                raise UserError(f"--lora-sharding: {way!r} must be one of {', '.join(known)}")
        return tuple(cast(LoraSharding, way) for way in self.lora_sharding.split(","))

    def exports(self) -> tuple[str, ...]:
        """Return the engines to export to. Raises UserError."""
        wanted = () if self.export is None else tuple(self.export.split(","))
        for name in wanted:
            if name not in ENGINES:
                raise UserError(f"--export: {name!r} must be one of {', '.join(ENGINES)}")
        return wanted

    def _values(self, name: str, known: tuple[Any, ...]) -> tuple[Any, ...]:
        flag, text = f"--{name.replace('_', '-')}", getattr(self, name)
        if name == "max_adapters_per_step":
            parts = text.split(",")
            return tuple(None if part == "none" else numbers(flag, part)[0] for part in parts)
        for part in text.split(","):
            if part not in known:
                raise UserError(f"{flag}: {part!r} must be one of {', '.join(known)}")
        return tuple(text.split(","))


DEFAULTS: dict[str, str] = {
    "max_num_seqs": shown(MAX_NUM_SEQS),
    "max_num_batched_tokens": shown(MAX_NUM_BATCHED_TOKENS),
    "lora_sharding": shown(LORA_SHARDINGS),
    "max_loras": shown(MAX_LORAS),
    "gpu_memory_utilization": "0.9",
    **{name: shown(values) for name, values in (*POLICIES.items(), *ROUTING.items())},
}


def option_names() -> tuple[str, ...]:
    """Return the names of all options."""
    return tuple(item.name for item in fields(PlanOptions))


def numbers(flag: str, text: str) -> tuple[int, ...]:
    """Return a list of whole numbers. Raises UserError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag}={text} must be whole numbers, such as 1,2,4") from None


def shares(flag: str, text: str) -> tuple[float, ...]:
    """Return a list of numbers. Raises UserError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag}={text} must be numbers, such as 0.9,0.95") from None


def above_zero(flag: str, value: float) -> float:
    """Return a number that is finite and above 0. Raises UserError."""
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{flag}={value:g} must be a finite number above 0")
    return value


def _seconds(flag: str, milliseconds: float | None, default_s: float) -> float:
    return default_s if milliseconds is None else above_zero(flag, milliseconds) * 1e-3


def _in_range(flag: str, value: float, most: float) -> float:
    if not 0 < value <= most:
        raise UserError(f"{flag}={value:g} must be above 0 and at most {most:g}")
    return value
