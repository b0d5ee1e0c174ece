"""The routes of a step: device buffers that a dynamic adapter's router fills and the kernels read, and the router itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from engine.dynamic_adapter import DynamicAdapterSpec
from engine.ops import Op
from kernels.expert_launch import tile_tokens_of
from kernels.route_top_k import touched_slots


class ExpertRoute:
    """Experts and gates of a batch of tokens.

    indices [T, k] int32, gates [T, k] fp32, dense [T, N] fp32, touched [tiles, slots] int32: as `kernels.route_top_k` writes them. segments
    [2k] int32, for merging a single token's experts: its own, then those of the token before.
    """

    def __init__(self, spec: DynamicAdapterSpec, tokens: int, device: torch.device, route_top_k: Op) -> None:
        self.spec = spec
        self.tile_tokens = tile_tokens_of(tokens)
        whole: dict[str, Any] = {"dtype": torch.int32, "device": device}
        tiles, slots = (
            -(-tokens // self.tile_tokens),
            touched_slots(spec.num_experts, spec.top_k, self.tile_tokens),
        )
        self.segments = torch.zeros(2 * spec.top_k, **whole)
        one = tokens == 1
        # One token's experts are where merging reads them.
        self.indices = self.segments[None, : spec.top_k] if one else torch.zeros(tokens, spec.top_k, **whole)
        self.gates = torch.zeros(tokens, spec.top_k, device=device)
        self.dense = torch.zeros(tokens, spec.num_experts, device=device)
        self.touched = torch.full((tiles, slots), -1, **whole)
        self._route_top_k = route_top_k

    def keep_last(self) -> None:
        """Make what a single token chose the token before's, for merging in place."""
        self.segments[self.spec.top_k :].copy_(self.segments[: self.spec.top_k])

    def fill(self, x: torch.Tensor, router: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """Route the tokens x [T, in] by a router's weight [N, in]. active: int32 [T]; a token with 0 is routed nowhere."""
        self._route_top_k(
            F.linear(x, router),
            self.indices,
            self.gates,
            self.dense,
            self.touched,
            renormalise=self.spec.renormalise,
            tile_tokens=self.tile_tokens,
            active=active,
        )
