"""Time other engines' LoRA kernels on the cases of `kernels.lora_bench`, in the same process and run.

They are not part of this project: shared/peers/build puts them, behind one interface, into a folder that is imported from where it lies.
Same tokens, adapters, ranks, groups, assignment of tokens to adapters, and rotation of weights. What a peer cannot do is null with the reason.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from kernels.graph_time import ROTATED_BYTES, relative_error, replay_us
from kernels.lora_bench import pool_ranks
from kernels.lora_cases import GROUP_NAMES, Case
from kernels.lora_pack import LLAMA_8B
from kernels.lora_plan import GROUPS

PACKAGE = "peer_kernels"
PEERS: dict[str, tuple[str, dict[str, object]]] = {  # name here: (name there, options of its plan)
    "vllm": ("vllm", {}),
    "vllm_specialized": ("vllm", {"specialize_active_lora": True}),
    "sglang_csgmv": ("sglang", {"max_chunk_size": 16}),
    "sglang_v2": ("sglang_v2", {}),
    "sglang_triton": ("sglang_triton", {}),
}
DEVICE, DTYPE = "cuda", torch.bfloat16
MAX_PEER_ERROR = 3e-2  # some round the bridge to bf16
DECODE_TOKENS = 256  # up to which a batch counts as decode for them, as in their own bench


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """The peers' kernels as imported, and from where."""

    folder: str
    kernels: ModuleType

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the engines."""
        return dict(getattr(self.kernels, "VERSIONS", {}))


def load_peers(folder: str) -> Peers:
    """Import the peers' kernels. Raises ValueError where the folder holds none, or they do not import."""
    if not (Path(folder) / PACKAGE / "__init__.py").is_file():
        raise ValueError(
            f"--peers {folder}: no folder made by shared/peers/build ({PACKAGE}/__init__.py is missing)"
        )
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        return Peers(folder=folder, kernels=importlib.import_module(PACKAGE))
    except Exception as error:
        raise ValueError(f"--peers {folder}: {_reason(error)}") from error
    finally:
        sys.path.pop(0)


def bench_peers(
    peers: Peers, cases: Sequence[Case], *, quick: bool = False, log: Callable[[str], object] = print
) -> list[dict]:
    """Time every peer on every case: rows of {peer, layer, the case, us, rel_err, reason}, us or reason null."""
    rows = []
    for case in cases:
        ranks = pool_ranks(case, cases)
        for group in range(len(GROUPS)):
            rows += bench_group(peers, case, ranks, group, replays=10 if quick else 20)
        log(
            f"peers {' '.join(f'{k}={v}' for k, v in case.shape.items())}: "
            + _shown(rows[-len(PEERS) * len(GROUPS) :])
        )
    return rows


def add_to_layers(layers: list[dict], rows: list[dict]) -> None:
    """Add to each layer row `peers` {name: µs of the four groups or null}, `peer_errors` {name: reason} and `best_peer`."""
    for layer in layers:
        key = [layer[field] for field in ("case", "rank", "tokens", "adapters")]
        own = [row for row in rows if [row[field] for field in ("case", "rank", "tokens", "adapters")] == key]
        layer["peers"], layer["peer_errors"] = {}, {}
        for name in PEERS:
            parts = [row for row in own if row["peer"] == name]
            failed = [f"{row['layer']}: {row['reason']}" for row in parts if row["us"] is None]
            layer["peers"][name] = None if failed else round(sum(row["us"] for row in parts), 2)
            if failed:
                layer["peer_errors"][name] = failed[0]
        times = {name: us for name, us in layer["peers"].items() if us is not None}
        layer["best_peer"] = min(times, key=lambda name: times[name]) if times else None


def bench_group(
    peers: Peers,
    case: Case,
    ranks: Sequence[int],
    group: int,
    *,
    replays: int,
    num_sets: int | None = None,
) -> list[dict]:
    """Check and time every peer on one group of one case. num_sets: weight sets instead of those that fill ROTATED_BYTES."""
    batch: PeerBatch | None = None
    reason: str | None = None
    try:
        batch = PeerBatch(peers, case, ranks, group, num_sets)
    except Exception as error:  # such as no memory for the padded ranks
        reason = _reason(error)
    rows = []
    for name, (peer, options) in PEERS.items():
        row = {"peer": name, "layer": GROUP_NAMES[group], **case.shape, "us": None, "rel_err": None}
        try:
            if batch is not None:
                row |= batch.measure(peer, options, replays)
                reason = None
        except Exception as error:  # a peer that fails is a result
            reason = _reason(error)
        rows.append({**row, "reason": reason})
    return rows


class PeerBatch:
    """One group of one case for every peer: weight sets, and the slots of the tokens for each first adapter."""

    def __init__(
        self, peers: Peers, case: Case, ranks: Sequence[int], group: int, num_sets: int | None
    ) -> None:
        self.kernels, self.case = peers.kernels, case
        modules = range(*GROUPS[group])
        width, widths = LLAMA_8B[modules[0]][0], [LLAMA_8B[m][1] for m in modules]
        row_bytes = 2 * sum(sum(LLAMA_8B[m]) for m in modules)
        counts = torch.tensor(case.row_counts)
        self.slots = [
            ((first + torch.arange(case.adapters)) % len(ranks)).repeat_interleave(counts).int()
            for first in range(0, len(ranks), case.adapters)
        ]
        self.num_sets = num_sets or -(-int(ROTATED_BYTES) // (sum(case.adapter_ranks) * row_bytes))
        # They serve ranks that are powers of two; others are padded.
        padded = max(8, 1 << (max(ranks) - 1).bit_length())
        self.weights = [
            self.kernels.random_weights(
                len(ranks), padded, width, widths, dtype=DTYPE, device=DEVICE, ranks=ranks, scalings=[0.5] * len(ranks), seed=seed
            )
            for seed in range(-(-self.num_sets // len(self.slots)))
        ]  # fmt: skip
        self.x = torch.randn(case.tokens, width, device=DEVICE).to(DTYPE)
        self.y = torch.randn(case.tokens, sum(widths), device=DEVICE).to(DTYPE)
        self.expected = self.kernels.reference(self.x, self.weights[0], self.slots[0], self.y)

    def measure(self, peer: str, options: dict[str, object], replays: int) -> dict[str, float]:
        """Return the error and the time of one call. Raises whatever the peer raises, RuntimeError where it is wrong."""
        peers = self.kernels
        packed = [peers.pack(peer, weights) for weights in self.weights]
        phase = "decode" if self.case.tokens <= DECODE_TOKENS else "prefill"
        plans = [peers.plan(peer, packed[0], slots, phase, **options) for slots in self.slots]
        shrink, expand = peers.SHRINK[peer], peers.EXPAND[peer]

        def call(weights: object, plan: object, y: torch.Tensor) -> torch.Tensor:
            return expand(shrink(self.x, weights, plan), weights, plan, y)

        error = relative_error(call(packed[0], plans[0], self.y.clone()), self.expected)
        if not error < MAX_PEER_ERROR:
            raise RuntimeError(f"relative error {error:.2e}")
        y, sets = self.y.clone(), list(itertools.islice(itertools.product(packed, plans), self.num_sets))

        def run() -> None:
            for weights, plan in sets:
                call(weights, plan, y)

        us = replay_us(peers.capture(run, warmup=1), replays) / len(sets)
        return {"us": round(us, 2), "rel_err": error}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _shown(rows: list[dict]) -> str:
    totals = []
    for name in PEERS:
        times = [row["us"] for row in rows if row["peer"] == name]
        totals.append(f"{name} " + ("failed" if None in times else f"{sum(times):.1f}"))
    return ", ".join(totals)
