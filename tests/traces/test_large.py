"""A million lines take what their columns take: the peak grows by some tens of bytes a line, not by a line's text and objects."""

import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from traces import load

MOST_BYTES_A_LINE = (
    150  # five columns of 8 bytes, twice while they are made, and what a session's number takes
)
PROGRAM = """
import resource, sys
from traces.__main__ import main
assert main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
"""


def native(path: Path, count: int) -> Path:
    rng, arrival_s = random.Random(1), 0.0
    with path.open("w") as file:
        for j in range(count):
            arrival_s += rng.expovariate(30)
            adapter = f"a{rng.randint(0, 99):04d}"
            file.write(
                f'{{"id":{j},"arrival_s":{arrival_s:.6f},"prompt_tokens":{rng.randint(1, 2000)},"output_tokens":9,'
                f'"adapter":"{adapter}","session":"s{j // 50}"}}\n'
            )
    return path


def azure(path: Path, count: int) -> Path:
    with path.open("w") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for j in range(count):
            at = f"2023-11-16 {j // 108_000:02d}:{j // 1800 % 60:02d}:{j // 30 % 60:02d}.{j % 30 * 333_333:07d}"
            file.write(f"{at},{j % 2000 + 1},9\n")
    return path


def burstgpt(path: Path, count: int) -> Path:
    with path.open("w") as file:
        file.write("Timestamp,Session ID,Model,Request tokens,Response tokens\n")
        file.writelines(f"{j / 30:.3f},s{j // 50},ChatGPT,{j % 2000 + 1},9\n" for j in range(count))
    return path


def test_loading_takes_some_tens_of_bytes_a_line(tmp_path: Path) -> None:
    path = native(tmp_path / "t.jsonl", 20_000)
    load(path).head(10)  # what is imported at the first use is no line's
    tracemalloc.start()
    try:
        trace = load(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(trace) == 20_000
    assert kept / len(trace) < 70 and peak / len(trace) < MOST_BYTES_A_LINE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (native, ["describe"]),
        (native, ["assign", "--rule", "R2", "--out", "out.jsonl"]),
        (native, ["assign", "--out", "out.jsonl.gz"]),
        (native, ["export", "vllm", "--out", "out.jsonl"]),
        (azure, ["import", "azure", "--out", "out.jsonl"]),
        (burstgpt, ["import", "burstgpt", "--out", "out.jsonl"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_peak_memory_grows_by_columns(tmp_path: Path, make, arguments: list[str]) -> None:
    counts = (20_000, 200_000)
    few, many = (_peak_bytes(tmp_path, make(tmp_path / f"in{count}", count), arguments) for count in counts)
    assert (many - few) / (counts[1] - counts[0]) < MOST_BYTES_A_LINE


def _peak_bytes(folder: Path, file: Path, arguments: list[str]) -> int:
    options = arguments.index("--out") if "--out" in arguments else len(arguments)
    given = [*arguments[:options], str(file), *arguments[options:]]
    if arguments[0] == "assign":
        given = ["assign", str(file), *arguments[1:]]
    command = [sys.executable, "-c", PROGRAM, *given, *(["--overwrite"] if "--out" in given else [])]
    run = subprocess.run(
        command,
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return int(run.stderr.rsplit("peak ", 1)[1])
