"""The recorded runs that `python -m sim validate` judges the simulator by, in visits of at most nine minutes to a GPU machine.

    python -m docs.measured.record_runs prepare DIR [--visits 1,2]      here: traces, configurations and adapters into DIR; predictions
    python -m docs.measured.record_runs visit N DIR --out OUT           there: replay them, a tar a group into OUT
    python -m docs.measured.record_runs collect TAR … [--runs sim/runs] here: records as they are committed, steps thinned

`prepare` writes what the simulator says of each run into docs/measured/predictions_runs.json before any is made. Loads are shares of
the simulated throughput of a flood of the same traffic. Runs named …-again repeat a trace that another visit (or the same) has recorded:
their difference is the noise floor. Visit 5 replays slices of real traces (`prepare --visits 5 --real FOLDER`): its records are not for committing,
only what `python -m sim validate --runs DIR --format json` says of them, which `sim validate --docs docs --also THAT.json` shows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from docs.measured.run_matrix import VISITS, Group, Run, Traffic

HERE = Path(__file__).parent
PREDICTIONS = HERE / "predictions_runs.json"
RUNS = HERE.parents[1] / "sim" / "runs"
MAX_MODEL_LEN = 8192
FLOOD = 1500  # requests of the flood that tells a capacity; of long prompts a third
MOST_STEPS = 1200  # of a record are kept


# ---- here, before: traces and predictions ----


def prepare(
    folder: Path, visits: Sequence[int], real: Path | None, gpu: str, profile: Path | None, predictions: Path
) -> None:
    """Write traces, configurations and adapters, and what the simulator says of each run."""
    from engine.config import ServingConfig
    from sim.costs import costs_for
    from sim.profile import find_profile, load_profile

    capacities: dict[Any, float] = {}
    rows: list[dict[str, Any]] = []
    for visit in visits:
        for group in VISITS[visit]:
            wanted = {"max_model_len": MAX_MODEL_LEN, "gpu": gpu, **group.config}
            config = ServingConfig.from_json(wanted)
            costs = costs_for(load_profile(profile or find_profile(config)), config)
            place = folder / f"visit{visit}" / group.name
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            (place / "config.json").write_text(json.dumps(wanted), encoding="utf-8")
            for row in _prepare_group(group, place, config, costs, capacities, real):
                rows.append({"run": row.pop("run"), "visit": visit} | row)
        seconds = sum(group.seconds for group in VISITS[visit])
        print(f"visit {visit}: about {seconds:.0f} s on the machine", file=sys.stderr)
    _write_predictions(rows, predictions)


def _prepare_group(
    group: Group, place: Path, config: Any, costs: Any, capacities: dict[Any, float], real: Path | None
) -> Iterator[dict[str, Any]]:
    from sim.simulate import simulate
    from sim.validate import METRICS, at_once
    from traces import save

    specs: dict[str, Any] = {}
    loads: dict[str, float] = {}
    for run in group.runs:
        key = json.dumps([group.config, group.adapter], sort_keys=True), run.traffic
        if key not in capacities:
            flood = at_once(draw(run, 100.0, _flood(run.traffic), real))
            found = simulate(flood, config, costs, adapters=_specs(flood, group))
            capacities[key] = found.metrics["throughput_rps"]
        rate_rps = run.rate_rps or run.load * capacities[key]
        load = rate_rps / capacities[key]
        trace = draw(run, rate_rps, run.requests or max(1, round(rate_rps * run.seconds)), real)
        trace = at_once(trace) if run.requests else trace
        save(trace, place / f"{run.folder}.jsonl.gz")
        specs |= _specs(trace, group)
        loads[run.folder] = load
        predicted = simulate(trace, config, costs, adapters=specs).metrics
        shown = f"{len(trace)} requests, {rate_rps:.2f} of {capacities[key]:.2f} req/s"
        print(f"{run.folder}: {shown}", file=sys.stderr)
        yield {
            "run": run.folder,
            "load": round(load, 3),
            "capacity_rps": capacities[key],
            "offered_rps": trace.rate_rps,
            "requests": len(trace),
            "predicted": {name: round(predicted[name], 6) for name in METRICS},
        }
    _write_adapters(place / "adapters.jsonl", specs.values())
    (place / "loads.json").write_text(json.dumps(loads), encoding="utf-8")


def draw(run: Run, rate_rps: float, count: int, real: Path | None) -> Any:
    """Draw a run's trace, the same each time; its arrivals last count / rate seconds."""
    from traces import Trace, load
    from traces.assign import Assignment, assign
    from traces.like import LIKE, cut, synthesize_like
    from traces.synth import S_LORA, synthesize

    traffic, seed = run.traffic, zlib.crc32((run.drawn_as or run.name).encode())
    if traffic.real is not None:
        if real is None:
            raise SystemExit("error: visit 5 needs --real FOLDER, of the real traces with adapters")
        trace = load(real / traffic.real).head(count)
        trace = cut(trace, MAX_MODEL_LEN)
    elif traffic.like is None:
        trace = synthesize(replace(S_LORA, rate_rps=rate_rps), count, seed)
    else:
        trace = synthesize_like(LIKE[traffic.like], count, seed, max_model_len=MAX_MODEL_LEN)
    if trace.rate_rps > 0 and (traffic.like or traffic.real):
        trace = trace.scaled(rate_rps / trace.rate_rps)
        columns = replace(trace.columns, arrival_s=trace.columns.arrival_s.round(6), raw_arrival_s=None)
        trace = Trace.from_columns(columns, trace.name)
    if traffic.adapters:
        how = Assignment(
            rule="R2" if trace.columns.sessions is not None else "R1",
            adapters=traffic.adapters,
            zipf_s=traffic.zipf_s or 0.0,
            rank_mix=traffic.ranks,
            seed=seed,
        )
        trace = assign(trace, how)
    return Trace.from_columns(trace.columns, run.folder)


def _flood(traffic: Traffic) -> int:
    return FLOOD // 3 if traffic.like or traffic.real else FLOOD


def _specs(trace: Any, group: Group) -> dict[str, Any]:
    from engine.adapter import AdapterSpec

    more = {key: tuple(value) if isinstance(value, list) else value for key, value in group.adapter.items()}
    return {name: AdapterSpec(name=name, rank=rank, **more) for name, rank in trace.adapters.items()}


def _write_adapters(path: Path, specs: Any) -> None:
    keys = ("name", "kind", "rank", "nblocks", "target_modules")
    lines = [json.dumps({key: getattr(spec, key) for key in keys}) for spec in specs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_predictions(rows: list[dict[str, Any]], path: Path) -> None:
    """Write predictions; those of other visits that are there stay."""
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    visits = {row["visit"] for row in rows}
    rows = sorted([row for row in known if row["visit"] not in visits] + rows, key=lambda row: row["visit"])
    text = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    command = "python -m docs.measured.record_runs prepare"
    path.write_text(f'{{\n "command": "{command}",\n "rows": [\n{text}\n ]\n}}\n', encoding="utf-8")


# ---- there: the replays ----


def visit(number: int, folder: Path, out: Path, budget_s: float, only: str | None = None) -> int:
    """Replay a visit's groups, or only one, one engine start each; those that do not fit into what is left of the budget are passed over."""
    begun_s, failed = time.monotonic(), 0
    for group in VISITS[number]:
        if only is not None and group.name != only:
            continue
        left_s = budget_s - (time.monotonic() - begun_s)
        if group.seconds > left_s:
            print(f"{group.name}: passed over, takes {group.seconds:.0f} s of {left_s:.0f}", flush=True)
            failed += 1
            continue
        limit_s = min(left_s, 1.4 * group.seconds)
        failed += not _replay(group, folder / f"visit{number}" / group.name, out, limit_s)
    return 1 if failed else 0


def _replay(group: Group, place: Path, out: Path, limit_s: float) -> bool:
    """Replay a group and pack its records, also those made before something went wrong."""
    with tempfile.TemporaryDirectory() as scratch:
        records = Path(scratch) / "records"
        traces = [part for run in group.runs for part in ("--trace", str(place / f"{run.folder}.jsonl.gz"))]
        command = [sys.executable, "-m", "engine", "replay", *traces]
        command += ["--config", str(place / "config.json"), "--adapters", str(place / "adapters.jsonl")]
        # With one trace the record is the folder itself.
        command += ["--out", str(records if len(group.runs) > 1 else records / group.runs[0].folder)]
        begun_s = time.monotonic()
        try:
            code: int | str = subprocess.run(command, timeout=limit_s, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "timed out"
        made = sorted(path.parent for path in records.glob("*/run.json"))
        print(f"{group.name}: {code}, {len(made)} records, {time.monotonic() - begun_s:.0f} s", flush=True)
        loads = json.loads((place / "loads.json").read_text(encoding="utf-8"))
        for record in made:
            file = record / "run.json"
            run = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(run | {"load": loads[record.name]}), encoding="utf-8")
        if made:
            with tarfile.open(out / f"{group.name}.tar.gz", "w:gz") as tar:
                for record in made:
                    tar.add(record, record.name)
        return code == 0


# ---- here, after: records as they are committed ----


def collect(tars: Sequence[Path], runs: Path) -> None:
    """Unpack records: steps thinned to MOST_STEPS, adapters without what is usual. Replaces nothing; real traffic's are refused."""
    for path in tars:
        with tempfile.TemporaryDirectory() as scratch, tarfile.open(path) as tar:
            tar.extractall(scratch, filter="data")
            for record in sorted(file.parent for file in Path(scratch).glob("*/run.json")):
                if record.name.startswith("real-") and runs.resolve() == RUNS.resolve():
                    raise SystemExit(f"error: {record.name}: rows of real traces are not for sim/runs")
                if (runs / record.name).exists():
                    raise SystemExit(f"error: {runs / record.name}: is there already")
                _slim(record)
                runs.mkdir(parents=True, exist_ok=True)
                shutil.copytree(record, runs / record.name)
                size = sum(file.stat().st_size for file in (runs / record.name).iterdir())
                print(f"{runs / record.name}: {size / 1e3:.0f} kB")


def _slim(record: Path) -> None:
    from engine.adapter import AdapterSpec

    file = record / "run.json"
    run = json.loads(file.read_text(encoding="utf-8"))
    usual = {item.name: item.default for item in fields(AdapterSpec)}
    usual = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    run["adapters"] = [
        {key: value for key, value in item.items() if usual.get(key, ...) != value}
        for item in run["adapters"]
    ]
    head, *rows = _lines(record / "steps.jsonl.gz")
    every = max(1, math.ceil(len(rows) / MOST_STEPS))
    run["steps_kept_every"] = every
    _write_gz(record / "steps.jsonl.gz", [head, *rows[::every]])
    _write_gz(record / "requests.jsonl.gz", _lines(record / "requests.jsonl.gz"))
    adapters = ",\n".join(f"  {json.dumps(item)}" for item in run.pop("adapters"))
    text = json.dumps(run, indent=1).rstrip("}\n")
    file.write_text(f'{text},\n "adapters": [\n{adapters}\n ]\n}}\n', encoding="utf-8")


def _lines(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def _write_gz(path: Path, lines: Sequence[str]) -> None:
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _visits(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    before = commands.add_parser("prepare")
    before.add_argument("folder", type=Path)
    before.add_argument("--visits", type=_visits, default=[1, 2, 3, 4])
    before.add_argument("--real", type=Path, help="folder of the real traces with adapters, for visit 5")
    before.add_argument("--gpu", default="h200", help="as in a configuration")
    before.add_argument("--profile", type=Path, help="else the one shipped for model and GPU")
    before.add_argument("--predictions", type=Path, default=PREDICTIONS)
    there = commands.add_parser("visit")
    there.add_argument("number", type=int, choices=VISITS)
    there.add_argument("folder", type=Path)
    there.add_argument("--out", type=Path, required=True)
    there.add_argument("--budget-s", type=float, default=560.0)
    there.add_argument("--only", help="this group alone")
    after = commands.add_parser("collect")
    after.add_argument("tars", type=Path, nargs="+")
    after.add_argument("--runs", type=Path, default=RUNS)
    return parser.parse_args()


def main() -> int:
    """Run the command line."""
    asked = arguments()
    if asked.command == "prepare":
        prepare(asked.folder, asked.visits, asked.real, asked.gpu, asked.profile, asked.predictions)
    elif asked.command == "collect":
        collect(asked.tars, asked.runs)
    else:
        return visit(asked.number, asked.folder, asked.out, asked.budget_s, asked.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
