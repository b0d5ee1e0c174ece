"""`python -m kernels bench`: every kernel against its reference and its byte bound, on the GPU."""

from __future__ import annotations

import argparse
import json
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status (2 for what the user can mend)."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("bench", help="check and time the kernels at Llama-3.1-8B shapes")
    bench.add_argument("--out", metavar="F", help="write the results as JSON")
    bench.add_argument("--quick", action="store_true", help="fewer replays")
    bench.add_argument("--ranks", default="16,64", help="LoRA ranks, comma-separated (default %(default)s)")
    bench.add_argument("--cases", help="tokens:adapters, comma-separated (default: the table of issue 3)")
    options = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        print("error: kernels bench: needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    from kernels.lora_bench import CASES, bench_lora

    try:
        ranks = tuple(int(rank) for rank in options.ranks.split(","))
        cases: tuple[tuple[int, int], ...] = CASES
        if options.cases:
            cases = tuple((int(t), int(a)) for t, a in (case.split(":") for case in options.cases.split(",")))
    except ValueError:
        print("error: kernels bench: --ranks takes 16,64 and --cases takes 32:32,1024:1", file=sys.stderr)
        return 2
    result = bench_lora(ranks=ranks, cases=cases, quick=options.quick)
    result["device"] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    if options.out:
        with open(options.out, "w") as file:
            json.dump(result, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
