"""Every kernel against its reference, in processes of their own, before anything is timed."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, wait

import torch

from docs.measured.switch.run import Run, candidates
from engine.model_shape import ModelShape
from engine.switch_check import check_decoder
from kernels.compile_ahead import Job
from kernels.expert_launch import TILE_CANDIDATES, TOKEN_CANDIDATES
from kernels.sgmm_bench import compile_jobs

CHECK_S = 110.0  # for all checks together


def check_kernels(run: Run, shapes: list[ModelShape], ranks: list[int]) -> None:
    """Check everything in processes of their own, which also compile it: what fails or hangs there is not timed, and cannot take this one along."""
    jobs: list[tuple[str, Job]] = [
        (f"sgmm {job[1][0].name}", job) for job in compile_jobs(ranks, candidates(run))
    ]
    if run.tiny:
        for name, (check, arguments) in jobs:
            with run.guarded(name):
                run.result.setdefault("checks", []).append([name, check(*arguments, run.dtype, "cpu")])
        return
    for shape in shapes:
        for rank in ranks:
            for batch in (1, 8, 32):
                for tuning in TOKEN_CANDIDATES if batch == 1 else TILE_CANDIDATES:
                    name = f"experts {batch > 1} {tuning.name}"
                    jobs.append((name, (check_decoder, (shape.name, rank, batch, tuning))))
    with run.guarded("checks apart"):
        run.wrong = check_apart(run, jobs)
    with run.guarded("copy rate"):
        source = torch.randn(2**28, device=run.device).to(torch.bfloat16).repeat(4)
        target = torch.empty_like(source)
        ms = run.ms(run.capture(lambda: target.copy_(source)))
        run.add("ceilings", {"copy_gb_per_s": round(2 * source.numel() * 2 / ms / 1e6, 1)})


def check_apart(run: Run, jobs: list[tuple[str, Job]]) -> set[str]:
    """Run the jobs in processes; return the names of which one failed or did not end in time."""
    wrong: set[str] = set()
    pool = ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn"))
    futures = {pool.submit(check, *arguments): (name, arguments) for name, (check, arguments) in jobs}
    done, late = wait(futures, timeout=CHECK_S)
    for future in done:
        name, arguments = futures[future]
        if error := future.exception():
            wrong.add(name)
            run.failed(f"check {name} {arguments}", error)
        else:
            run.result.setdefault("checks", []).append([name, repr(arguments), future.result()])
    for future in late:
        wrong.add(futures[future][0])
        run.result["errors"].append({"what": f"check {futures[future]}", "error": "did not end in time"})
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes if late else []:
        process.terminate()
    run.log(f"checked {len(done)} of {len(jobs)}, wrong: {sorted(wrong)}")
    run.write()
    return wrong
