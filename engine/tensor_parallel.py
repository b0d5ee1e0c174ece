"""What the ranks of one replica exchange within a step: the ends of row-parallel linears, and under S-LoRA's sharding parts of h.

Two mechanisms. *Peers*: kernels that read the other GPUs' memory over NVLink, each doing the exchange and what follows it in one launch.
*Collectives*: NCCL between GPUs, gloo between CPUs; for steps too large for the first, wherever there is no GPU, and to compare
(`collectives: "nccl"`).
"""

from __future__ import annotations

from typing import Any

import torch

from engine.batch import DeviceBatch
from engine.communicator import Communicator
from engine.config import ServingConfig
from engine.ops import Ops
from engine.peer_limits import MOST_PEER_BYTES
from engine.peer_memory import PeerBuffer, peer_buffer
from kernels.lora_plan import COLUMN_PARALLEL, GROUPS, bridge_width

COLLECT_PROGRAMS = 132


class TensorParallel:
    """One rank's part in the exchanges. Row-parallel groups are 1 (o) and 3 (down).

    rows: the most rows of a step. bridge_elems: of the shrink's bridge. `slora`: adapters are cut S-LoRA's way.
    """

    def __init__(
        self,
        communicator: Communicator,
        config: ServingConfig,
        ops: Ops,
        *,
        hidden: int,
        rows: int,
        max_rank: int,
        bridge_elems: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.communicator = communicator
        self.rank, self.size = communicator.rank, communicator.size
        self.slora = max_rank > 0 and config.exchanges_lora
        self._published = config.lora_sharding == "slora_published"
        self._ops, self._hidden, self._max_rank, self._dtype = ops, hidden, max_rank, dtype
        self._sums: list[PeerBuffer] = []
        self._bridges: list[PeerBuffer] = []
        self._pads: PeerBuffer | None = None
        self._most_rows = 0
        width = bridge_width(max_rank) if max_rank else 0
        self._h = torch.zeros(1, rows, width, device=device) if self.slora else None
        if device.type == "cuda" and config.collectives == "fast":
            row_bytes = hidden * dtype.itemsize
            self._most_rows = min(rows, MOST_PEER_BYTES.get(self.size, 0) // row_bytes)
            if not self._most_rows:
                return
            programs = max(self._most_rows, COLLECT_PROGRAMS)
            self._pads = peer_buffer(programs * self.size, torch.int32, device)
            self._sums = [peer_buffer(self._most_rows * hidden, dtype, device) for _ in range(2)]
            if self.slora and not self._published:
                self._bridges = [peer_buffer(bridge_elems, torch.float32, device) for _ in range(2)]

    # ---- ends of row-parallel linears ----

    def output(self, group: int, rows: int) -> torch.Tensor | None:
        """Return where a row-parallel linear's partial sums [rows, H] must go, if the peers are to read them; two buffers take turns."""
        if rows > self._most_rows:
            return None
        return self._sums[group // 2].data[: rows * self._hidden].view(rows, self._hidden)

    def add_rms_norm_(
        self, group: int, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add the ranks' x to the residual stream, in place, and return the norm of it. x: what `output` gave, where it gave something."""
        normed: torch.Tensor
        if len(x) > self._most_rows:
            normed = self._ops.add_rms_norm_(self.communicator.all_reduce_(x), residual, weight, eps)
            return normed
        assert self._pads is not None
        normed = self._ops.peer_add_rms_norm_(
            x,
            self._sums[group // 2].addresses,
            self._pads.addresses,
            0,
            residual,
            weight,
            eps,
            rank=self.rank,
            ranks=self.size,
        )
        return normed

    # ---- parts of h ----

    def bridge(self, group: int, elems: int) -> torch.Tensor | None:
        """Return where the shrink must write, flat, if the peers are to read it; two buffers take turns."""
        return self._bridges[group % 2].data[:elems] if self._bridges else None

    def collect_h(self, batch: DeviceBatch, group: int, bridge: torch.Tensor) -> torch.Tensor:
        """Return all of a group's h, as a bridge of one plane, from this rank's part of it."""
        assert self._h is not None
        views, launch = batch.views, batch.layout.lora[group]
        lists = (views["tiles"], views["num_tiles"], views["lora_headers"])
        out = self._h[:, : bridge.shape[1]]
        common: dict[str, Any] = {
            "group": group,
            "ranks": self.size,
            "tile_tokens": launch.tile_tokens,
            "num_programs": COLLECT_PROGRAMS,
        }
        h: torch.Tensor
        if self._bridges:
            assert self._pads is not None
            peers = self._bridges[group % 2].addresses, self._pads.addresses
            h = self._ops.lora_collect_peers(bridge, *peers, 0, *lists, out, rank=self.rank, **common)
            return h
        column_parallel = COLUMN_PARALLEL[GROUPS[group][0]]
        modules = GROUPS[group][1] - GROUPS[group][0]
        part = -(-self._max_rank // self.size) if column_parallel else self._max_rank
        message = torch.empty(modules, bridge.shape[1], part, dtype=self._dtype, device=bridge.device)
        self._ops.lora_pack_part(bridge, *lists, message, **common)
        h = self._ops.lora_collect(self._exchange(message, column_parallel), *lists, out, **common)
        return h

    def _exchange(self, message: torch.Tensor, column_parallel: bool) -> torch.Tensor:
        """Return all ranks' messages [modules, ranks, T, part], or their sum [1, 1, T, rank]. S-LoRA as published asks for each module by itself."""
        if not column_parallel:
            return self.communicator.all_reduce_(message)[:, None]
        if self._published:
            return torch.stack([self.communicator.all_gather(part) for part in message])
        return self.communicator.all_gather(message).transpose(0, 1)
