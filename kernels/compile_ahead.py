"""Compile what a benchmark will launch, in several processes at once: they leave it in Triton's cache on disk, where the benchmark finds it.

Each process runs small cases of what is to come. One after the other the compiler takes longer than the measurements do.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from kernels.attention_bench import DECODE_CASES, bench_decode, bench_prefill
from kernels.lora_bench import Batch, Weights, pool_ranks
from kernels.lora_cases import Case
from kernels.lora_launch import lora_launch_config
from kernels.lora_peers import bench_group, load_peers
from kernels.lora_plan import NUM_GROUPS

MAX_PROCESSES = 14
Job = tuple[Callable, tuple]


def compile_ahead(jobs: Sequence[Job], log: Callable[[str], object]) -> None:
    """Run jobs in processes of their own. One that fails is logged: the benchmark itself will say what is wrong."""
    processes = min(MAX_PROCESSES, os.cpu_count() or 1, len(jobs))
    if processes < 2:
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(function, *arguments): (function, arguments) for function, arguments in jobs}
        for future in as_completed(futures):
            if error := future.exception():
                function, arguments = futures[future]
                log(
                    f"compiling ahead, {function.__name__}{arguments}: {type(error).__name__}: {str(error)[:200]}"
                )


def lora_jobs(cases: Sequence[Case]) -> list[Job]:
    """Our LoRA kernels: a launch depends on the tokens alone, a compiled kernel on little of it."""
    tokens = [tokens for tokens in (1, 32) if any((case.tokens <= 16) == (tokens <= 16) for case in cases)]
    return [(run_lora, (count, group)) for count in tokens for group in range(NUM_GROUPS)]


def peer_jobs(folder: str, cases: Sequence[Case]) -> list[Job]:
    """The peers' kernels: what they compile can depend on all of a case. Large ones first."""
    ordered = sorted(cases, key=lambda case: -case.rank * case.adapters)
    return [
        (run_peers, (folder, case, pool_ranks(case, cases), group))
        for case in ordered
        for group in range(NUM_GROUPS)
    ]


def attention_jobs() -> list[Job]:
    """Decode attention of each shape of heads, and prefill."""
    heads = dict.fromkeys(heads for _, heads in DECODE_CASES)
    decode: list[Job] = [(bench_decode, (((2, 1024),), shape, 1)) for shape in heads]
    return [*decode, (run_prefill, ())]


def run_lora(tokens: int, group: int) -> None:
    """Launch shrink and expand of one group once."""
    weights = Weights((4, 4), num_layers=1)
    batch = Batch(Case(rank=4, tokens=tokens, adapters=1), weights, group, lora_launch_config(tokens, group))
    batch.shrink(0, batch.lists[0])
    batch.expand(0, batch.lists[0])
    torch.cuda.synchronize()


def run_peers(folder: str, case: Case, ranks: tuple[int, ...], group: int) -> None:
    """Launch every peer's kernels once or twice."""
    bench_group(load_peers(folder), case, ranks, group, replays=1, num_sets=1)


def run_prefill() -> None:
    """Launch prefill attention a few times."""
    bench_prefill(1, 128, 0, replays=1)
