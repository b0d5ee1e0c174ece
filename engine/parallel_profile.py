"""`python -m engine profile --tp N`: whole steps under tensor parallelism, in every way that adapters can be cut, and what the exchanges take.

All ranks build the same runners one after the other on one set of weights, and time the same made-up steps in lockstep; rank 0 reports.
Operators at TP N need no second profile: the profile of one GPU has them for the shapes of a shard.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from engine.adapter import AdapterSpec
from engine.blueprint import Blueprint, blueprint
from engine.budget import gpu_spec
from engine.build import Progress, device_for
from engine.communicator import Communicator
from engine.config import Collectives, LoraSharding, ServingConfig
from engine.engine import Engine
from engine.followers import Followers, free_port, serve_rank
from engine.model_shape import ModelShape, load_model_shape
from engine.peer_memory import peer_buffer
from engine.provenance import provenance
from engine.requests import Request
from engine.runner import DTYPES, GraphKey, Runner
from engine.step_profile import MadeUpStep, StepBench
from engine.timing import captured_us
from engine.weights import ModelWeights, random_weights

SCHEMA_VERSION = 1
BATCHES = (1, 16, 32, 64)
PREFILL_TOKENS = 1024
EXCHANGE_BYTES = (8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
CALLS = 16  # exchanges in a captured graph
DENSE = "dense"  # group names start with it, or with "bd", which are block-diagonal


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """How adapters are cut and by what the ranks exchange."""

    lora_sharding: LoraSharding
    collectives: Collectives

    @property
    def dense_label(self) -> str:
        """What dense adapters run as in this mode."""
        return "replicated" if self.lora_sharding == "block_diagonal" else self.lora_sharding


MODES = (
    Mode(lora_sharding="block_diagonal", collectives="fast"),
    Mode(lora_sharding="slora", collectives="fast"),
    Mode(lora_sharding="slora_published", collectives="nccl"),
    Mode(lora_sharding="slora_published", collectives="fast"),
    Mode(lora_sharding="slora", collectives="nccl"),
    Mode(lora_sharding="block_diagonal", collectives="nccl"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """What is measured. adapters: of each group; grid: random steps of each mode for the cost model; requests: of a burst; bursts: how many of the
    modes, from the first, serve them."""

    modes: tuple[Mode, ...] = MODES
    batches: tuple[int, ...] = BATCHES
    ranks: tuple[int, ...] = (16, 64)
    adapters: int = 64
    grid: int = 100
    requests: int = 0
    bursts: int = 3
    burst_adapters: int = 32
    burst_tokens: tuple[int, int] = (8, 512)
    kv_tokens: int = 256  # of a decode row of the table: the middle of a reply


def parallel_adapters(plan: ParallelPlan, tp: int) -> dict[str, AdapterSpec]:
    """Return the adapters: dense ones, and block-diagonal ones of their rank and of multiples of it, and with eight blocks."""
    factors = (1, 1.5, 2) if tp == 2 else (1, 2, 4)  # 1.5: equal parameters at two GPUs
    specs = {}
    for rank in plan.ranks:
        groups = {f"{DENSE}{rank}": (rank, 1)}
        groups |= {f"bd{rank}x{factor:g}": (int(rank * factor), tp) for factor in factors}
        if tp < 8:
            groups[f"bd{rank}x1-8blocks"] = (rank, 8)
        for group, (group_rank, nblocks) in groups.items():
            for number in range(plan.adapters):
                name = f"{group}-{number}"
                options: dict[str, Any] = {"kind": "bd_lora", "nblocks": nblocks} if nblocks > 1 else {}
                specs[name] = AdapterSpec(name=name, rank=group_rank, **options)
    return specs


def profile_parallel(
    config: ServingConfig,
    plan: ParallelPlan,
    target: Path,
    *,
    progress: Progress,
    shape: ModelShape | None = None,
) -> None:
    """Measure and write `target`, anew after every mode, so that an end by force loses little. Starts config.tp processes and is none of them."""
    model = shape or load_model_shape(config.model)
    device_for(config)  # what stands in the way is said before processes start
    blueprint(config, parallel_adapters(plan, config.tp), model)
    context = torch.multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(config.tp - 1)]
    address = f"tcp://127.0.0.1:{free_port()}"
    arguments = (config, plan, model, address, pipes, str(target))
    progress(f"{config.tp} ranks of {model.name}")
    spawn(_rank, args=arguments, nprocs=config.tp)


def _rank(
    rank: int,
    config: ServingConfig,
    plan: ParallelPlan,
    model: ModelShape,
    address: str,
    pipes: list[tuple[Connection, Connection]],
    target: str,
) -> None:
    device = device_for(config, rank)
    communicator = Communicator.join(rank, config.tp, address, device)
    tell: Progress = partial(print, flush=True) if rank == 0 else lambda _: None
    tell("weights")
    weights = random_weights(model, DTYPES[config.dtype], device, 0, config.tp, rank)
    rows: list[dict[str, Any]] = []
    exchanges = _exchanges(communicator, model, device, DTYPES[config.dtype])
    for number, mode in enumerate(plan.modes):
        tell(f"{mode.lora_sharding}, {mode.collectives}")
        changed = config.with_changes(lora_sharding=mode.lora_sharding, collectives=mode.collectives)
        adapters = parallel_adapters(plan, config.tp)
        if mode.lora_sharding != "block_diagonal":
            adapters = {name: spec for name, spec in adapters.items() if spec.kind == "lora"}
        followers = Followers([ours for ours, _ in pipes]) if rank == 0 else None
        ranks = _Rank(
            mode, blueprint(changed, adapters, model), weights, device, communicator, followers, tell
        )
        rows += ranks.table(plan)
        rows += ranks.grid(plan)
        if plan.requests and number < plan.bursts:
            rows += ranks.bursts(plan, None if rank == 0 else pipes[rank - 1][1])
        if rank == 0:
            _write(Path(target), config, model, rows, exchanges)
        del ranks
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.destroy_process_group()


class _Rank:
    """One rank in one mode."""

    def __init__(
        self,
        mode: Mode,
        plan: Blueprint,
        weights: ModelWeights,
        device: torch.device,
        communicator: Communicator,
        followers: Followers | None,
        tell: Progress,
    ) -> None:
        self.mode, self.tell, self.followers = mode, tell, followers
        self.runner = Runner(plan, weights, device, communicator=communicator, followers=followers)
        self.bench = StepBench(self.runner)

    def table(self, plan: ParallelPlan) -> Iterator[dict[str, Any]]:
        """Yield decode of steady batches of distinct adapters, and prefill of one prompt, by group of adapters."""
        groups = dict.fromkeys(name.rpartition("-")[0] for name in self.runner.blueprint.adapters)
        for group in (None, *groups):
            for batch in plan.batches:
                names = [None if group is None else f"{group}-{row % plan.adapters}" for row in range(batch)]
                step = MadeUpStep(decodes=tuple((plan.kv_tokens, name) for name in names))
                yield self._row("decode", group, step) | {"batch": batch}
            name = None if group is None else f"{group}-0"
            tokens = min(PREFILL_TOKENS, self.runner.blueprint.config.max_num_batched_tokens)
            yield self._row("prefill", group, MadeUpStep(chunks=((0, tokens, name),)))

    def grid(self, plan: ParallelPlan) -> Iterator[dict[str, Any]]:
        """Yield random steps: decodes, and decodes with a prefill chunk, each with some adapters of one group, alike or some far ahead of others."""
        config = self.runner.blueprint.config
        groups = dict.fromkeys(name.rpartition("-")[0] for name in self.runner.blueprint.adapters)
        rng = np.random.default_rng(5)
        for number in range(plan.grid):
            group = [None, *groups][int(rng.integers(1 + len(groups)))]
            count = round(np.exp(rng.uniform(0, np.log(plan.adapters))))
            shares = np.arange(1, count + 1) ** -(rng.uniform(0, 2.0) if number % 4 < 2 else 0.0)
            rows = int(np.exp(rng.uniform(0, np.log(config.max_num_seqs - 1))))
            kv = (
                (np.exp(rng.uniform(3.5, 6.5)) * rng.lognormal(0, 0.5, rows))
                .clip(8, config.max_model_len // 2)
                .astype(int)
            )
            chosen = rng.choice(count, size=rows + 1, p=shares / shares.sum())
            names = [None if group is None else f"{group}-{index}" for index in chosen.tolist()]
            decodes = tuple((int(tokens), name) for tokens, name in zip(kv, names, strict=False))
            room = config.max_num_batched_tokens - rows
            chunk = int(np.exp(rng.uniform(np.log(8), np.log(room))))
            chunks = ((0, chunk, names[-1]),) if number % 2 else ()
            yield self._row("grid", group, MadeUpStep(decodes=decodes, chunks=chunks))

    def _row(self, case: str, group: str | None, wanted: MadeUpStep) -> dict[str, Any]:
        step, _ = self.bench.prepare(wanted)
        for _ in self.runner.capture([self.runner.key(step)]):
            pass  # it empties the metadata, which measure_us writes again
        shape, us = self.bench.measure_us(wanted)
        row = self._label(case, group) | {"gpu_us": round(us, 1), "shape": shape.to_json()}
        if case != "grid":
            self.tell(f"{case:8} {group or 'base':14} {shape.tokens:5} tokens {us / 1e3:8.3f} ms")
        return row

    def _label(self, case: str, group: str | None) -> dict[str, Any]:
        sharding = "base"
        if group is not None:
            sharding = self.mode.dense_label if group.startswith(DENSE) else "block_diagonal"
        config = self.runner.blueprint.config
        return {
            "case": case,
            "tp": config.tp,
            "lora_sharding": sharding,
            "collectives": self.mode.collectives,
            "group": group,
        }

    # ---- whole bursts ----

    def bursts(self, plan: ParallelPlan, pipe: Connection | None) -> Iterator[dict[str, Any]]:
        """Serve bursts of S-LoRA's length mix: rank 0 by its engine, the others by what it tells. Yields rows on rank 0 alone."""
        groups = [
            group
            for group in dict.fromkeys(name.rpartition("-")[0] for name in self.runner.blueprint.adapters)
            if group in (f"{DENSE}{plan.ranks[0]}", f"bd{plan.ranks[0]}x1", f"bd{plan.ranks[0]}x2")
        ]
        store = self.runner.store
        for group in groups:
            for number in range(min(plan.burst_adapters, plan.adapters)):
                spec = self.runner.blueprint.adapters[f"{group}-{number}"]
                store.put(spec.name, store.prepare(spec))
        self.tell("capturing graphs of the bursts")
        for _ in self.runner.capture([key for key in self.runner.graph_keys() if _wanted(key)]):
            pass
        if pipe is not None:
            serve_rank(self.runner, pipe)
            return
        assert self.followers is not None
        first = self.mode == plan.modes[0]
        served: list[str | None] = [None, *groups] if first else [*groups]
        for adapters in served:
            yield self._burst(plan, adapters)
        self.followers.close()

    def _burst(self, plan: ParallelPlan, group: str | None) -> dict[str, Any]:
        runner = self.runner
        runner.reset()
        engine = Engine(runner.blueprint, runner)
        rng = np.random.default_rng(9)
        low, high = plan.burst_tokens
        outputs = 0
        began_s = engine.clock()
        for number in range(plan.requests):
            prompt = rng.integers(0, runner.blueprint.model.vocab_size, int(rng.integers(low, high + 1)))
            output_tokens = int(rng.integers(low, high + 1))
            chosen = int(rng.integers(min(plan.burst_adapters, plan.adapters)))  # drawn for the base as well
            request = Request(
                request_id=number,
                arrival_s=0.0,
                prompt_tokens=len(prompt),
                output_tokens=output_tokens,
                adapter=None if group is None else f"{group}-{chosen}",
            )
            outputs += request.output_tokens
            engine.add(request, prompt.astype(np.int32))
        engine.drain()
        elapsed_s = engine.clock() - began_s
        gpu_s = sum(step.gpu_s for step in engine.steps)
        row = self._label("burst", group) | {
            "requests": plan.requests,
            "rps": round(plan.requests / elapsed_s, 3),
            "output_tokens_per_s": round(outputs / elapsed_s, 1),
            "gpu_share": round(gpu_s / elapsed_s, 4),
            "steps": len(engine.steps),
        }
        self.tell(f"burst    {group or 'base':14} {row['rps']:.2f} req/s, GPU {row['gpu_share']:.1%}")
        return row


def _wanted(key: GraphKey) -> bool:
    """Return whether a burst is likely to need a graph: nearly all sizes of decodes, and mixed steps as full as can be."""
    return key.decode_only or key.tokens > 256


# ---- the exchanges alone ----


def _exchanges(
    communicator: Communicator, model: ModelShape, device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Time NCCL's all-reduce and all-gather by bytes, and the sum over peers with residual and norm beside NCCL's, by rows."""
    rows: list[dict[str, Any]] = []
    if device.type != "cuda":
        return rows
    size = communicator.size

    def add(op: str, num_bytes: int, call: Callable[[int], object]) -> None:
        us = captured_us(lambda: [call(number) for number in range(CALLS)], device) / CALLS
        rows.append({"ranks": size, "op": op, "bytes": num_bytes, "us": round(us, 2)})

    for num_bytes in EXCHANGE_BYTES:
        x = torch.zeros(num_bytes // dtype.itemsize, dtype=dtype, device=device)
        add("all_reduce", num_bytes, lambda _, x=x: dist.all_reduce(x))  # type: ignore[misc]
        out = torch.empty(size * x.numel(), dtype=dtype, device=device)
        add("all_gather", num_bytes, lambda _, x=x, out=out: dist.all_gather_into_tensor(out, x))  # type: ignore[misc]
    from kernels.peer_add_rms_norm import peer_add_rms_norm_
    from kernels.rms_norm import add_rms_norm_

    hidden = model.hidden_size
    most = EXCHANGE_BYTES[-1] // (hidden * dtype.itemsize)
    sums = [peer_buffer(most * hidden, dtype, device) for _ in range(2)]
    pads = peer_buffer(most * size, torch.int32, device)
    weight = torch.ones(hidden, dtype=dtype, device=device)
    for num_bytes in EXCHANGE_BYTES:
        count = max(1, num_bytes // (hidden * dtype.itemsize))
        residual = torch.zeros(count, hidden, dtype=dtype, device=device)
        own = torch.zeros(count, hidden, dtype=dtype, device=device)

        def peers(number: int, count: int = count, residual: torch.Tensor = residual) -> None:
            shared = sums[number % 2]
            peer_add_rms_norm_(
                shared.data[: count * hidden].view(count, hidden),
                shared.addresses,
                pads.addresses,
                0,
                residual,
                weight,
                1e-5,
                rank=communicator.rank,
                ranks=size,
            )

        def nccl(_: int, own: torch.Tensor = own, residual: torch.Tensor = residual) -> None:
            dist.all_reduce(own)
            add_rms_norm_(own, residual, weight, 1e-5)

        add("peer_add_norm", count * hidden * dtype.itemsize, peers)
        add("nccl_add_norm", count * hidden * dtype.itemsize, nccl)
    return rows


def _write(
    target: Path,
    config: ServingConfig,
    model: ModelShape,
    rows: list[dict[str, Any]],
    exchanges: list[dict[str, Any]],
) -> None:
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "gpu": gpu_spec(config.gpu).name,
        "model": config.model,
        "model_name": model.name,
        "tp": config.tp,
        "dtype": config.dtype,
        "page_tokens": config.page_tokens,
        "graph_max_tokens": config.graph_max_tokens,
        "max_num_seqs": config.max_num_seqs,
        **provenance(),
        "collective": exchanges,
        "steps": rows,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    lines = {
        name: ",\n".join(f"  {json.dumps(row)}" for row in data.pop(name)) for name in ("collective", "steps")
    }
    head = json.dumps(data, indent=1)[:-2]
    parts = "".join(f',\n "{name}": [\n{text}\n ]' for name, text in lines.items())
    temporary.write_text(f"{head}{parts}\n}}\n", encoding="utf-8")
    temporary.replace(target)
