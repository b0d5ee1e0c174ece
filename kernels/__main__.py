"""`python -m kernels bench`: every kernel against its reference, its bound, and other engines' kernels, on the GPU."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.lora_cases import Case
    from kernels.lora_peers import Peers

PARTS = ("lora", "attention", "small", "switch")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status (1 where a kernel is wrong, 2 for what the user can mend)."""
    options = parser().parse_args(arguments)
    try:
        cases, peers = read(options)
    except ValueError as error:
        print(f"error: kernels bench: {error}", file=sys.stderr)
        return 2
    from kernels.bench_report import provenance, report
    from kernels.graph_time import WrongResultError

    parts = [options.only] if options.only else list(PARTS)
    try:
        measured = run_parts(parts, cases, peers, quick=options.quick, log=progress())
    except WrongResultError as error:
        print(f"error: kernels bench: {error}", file=sys.stderr)
        return 1
    result = {"provenance": provenance(), **measured}
    print(report(result))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="check and time the kernels at Llama-3.1-8B shapes")
    bench.add_argument("--only", choices=PARTS, help="time these kernels only")
    bench.add_argument("--out", metavar="F", help="write the results as JSON")
    bench.add_argument("--quick", action="store_true", help="fewer replays")
    bench.add_argument("--ranks", default="16,64", help="LoRA ranks, comma-separated (default %(default)s)")
    bench.add_argument(
        "--cases",
        default="1:1,32:32,128:32,1024:1,1024:32,mixed,saturated,popular",
        help="LoRA batches: tokens:adapters for each rank, mixed (ranks 8 to 128 in one batch), "
        "saturated (256 decode rows of 200 adapters and a prompt of 256 tokens), popular (64 decode rows, their adapters by Zipf's law, alone "
        "and with a prompt of 192 tokens); default %(default)s",
    )
    bench.add_argument(
        "--peers",
        metavar="DIR",
        help="time vLLM's and SGLang's LoRA kernels too; DIR is made by shared/peers/build",
    )
    return top


def read(options: argparse.Namespace) -> tuple[list[Case], Peers | None]:
    """Return the LoRA cases and the peers' kernels. Raises ValueError naming the option that is wrong."""
    import torch

    from kernels.lora_cases import cases_of, parse_cases, parse_ranks
    from kernels.lora_peers import load_peers

    cases = cases_of(parse_ranks(options.ranks), *parse_cases(options.cases))
    if options.peers and options.only not in (None, "lora"):
        raise ValueError(f"--peers times LoRA kernels, and --only {options.only} leaves them out")
    if options.out and not Path(options.out).absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: no such folder")
    if not torch.cuda.is_available():
        raise ValueError("needs an NVIDIA GPU, and torch sees none")
    return cases, load_peers(options.peers) if options.peers else None


def run_parts(
    parts: list[str], cases: list[Case], peers: Peers | None, *, quick: bool, log: Callable[[str], None]
) -> dict:
    """Check and time the parts; return what they return. Raises WrongResultError."""
    from kernels import compile_ahead as ahead
    from kernels.attention_bench import bench_attention
    from kernels.elementwise_bench import bench_elementwise
    from kernels.lora_bench import bench_lora
    from kernels.lora_peers import add_to_layers, bench_peers
    from kernels.switch_bench import bench_switch

    jobs = ahead.lora_jobs(cases) if "lora" in parts else []
    jobs += ahead.attention_jobs() if "attention" in parts else []
    jobs += ahead.peer_jobs(peers.folder, cases) if peers else []
    ahead.compile_ahead(jobs, log)
    log(f"compiled ahead: {len(jobs)} jobs")
    result: dict = {}
    if "lora" in parts:
        result = bench_lora(cases, quick=quick, log=log)
    if "attention" in parts:
        result["attention"] = bench_attention(quick=quick, log=log)
    if "small" in parts:
        result["small"] = bench_elementwise(quick=quick, log=log)
    if "switch" in parts:
        result["switch"] = bench_switch(quick=quick, log=log)
    if peers:  # last: what one of them breaks, even the GPU's context, is not ours
        result["peers"] = bench_peers(peers, cases, quick=quick, log=log)
        result["peer_versions"] = peers.versions
        add_to_layers(result["layer"], result["peers"])
    return result


def progress() -> Callable[[str], None]:
    """Return what prints a line to stderr with the seconds since now."""
    start = time.monotonic()
    return lambda line: print(f"{time.monotonic() - start:5.0f} s  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
