"""Decoding with one dynamic adapter, one token a sequence and step, along each of the ways there are.

    base            without the adapter
    layerwise       (a) a router a layer, each linear's experts by a chain of small PyTorch operations
    layerwise_loop  (a) the same as published implementations write it: a loop over all experts that asks the host which have tokens
    simple          (b) this token's experts merged in place, one launch for each weight
    sgmm_in_place   (c) the same in one launch
    sgmm_pristine   (c) from a pristine copy, in one launch
    unmerged        (d) gathered experts beside the base product, any batch

Merging needs one route for all layers (`switch`) and a batch of one token. Every path but layerwise_loop is free of host synchronisation and
can be captured. This is a decoder of its own, on the engine's kernels and weights: pages of fixed sequences, greedy tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F

from engine.expert_merge import ExpertMerge, group_weights
from engine.expert_pools import ExpertGroup, ExpertPools
from engine.expert_route import ExpertRoute
from engine.model_shape import ModelShape
from engine.rotary import cos_sin_table
from engine.switch_ops import SwitchOps
from engine.weights import ModelWeights
from kernels.expert_launch import ExpertLaunch, ExpertTuning, expert_launch

Path = Literal["base", "layerwise", "layerwise_loop", "simple", "sgmm_in_place", "sgmm_pristine", "unmerged"]
PATHS: tuple[Path, ...] = get_args(Path)
MERGED: tuple[Path, ...] = ("simple", "sgmm_in_place", "sgmm_pristine")
PAGE_TOKENS = 16
ATTENTION_PROGRAMS = 132 * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """The batch's state on the device: ids [B] int64, positions [B] int32, KV pages, and one attention item a row."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    page_table: torch.Tensor
    pool: torch.Tensor
    items: torch.Tensor
    counts: torch.Tensor  # [2] int32: items, and combine entries
    combine: torch.Tensor
    partial: torch.Tensor
    partial_lse: torch.Tensor


def new_sequences(
    shape: ModelShape, batch: int, max_tokens: int, dtype: torch.dtype, device: torch.device
) -> Sequences:
    """Allocate pages for `batch` sequences of up to `max_tokens` tokens; all begin at position 0."""
    pages = -(-max_tokens // PAGE_TOKENS)
    page_elems = shape.num_layers * 2 * shape.num_kv_heads * PAGE_TOKENS * shape.head_dim
    whole: dict[str, Any] = {"dtype": torch.int32, "device": device}
    items = torch.zeros(batch, 4, **whole)
    items[:, 0], items[:, 2], items[:, 3] = torch.arange(batch), 1, -1
    return Sequences(
        ids=torch.zeros(batch, dtype=torch.int64, device=device),
        positions=torch.zeros(batch, **whole),
        slots=torch.arange(batch, **whole),
        page_table=torch.arange(batch * pages, **whole).view(batch, pages),
        pool=torch.zeros(batch * pages, page_elems, dtype=dtype, device=device),
        items=items,
        counts=torch.tensor([batch, 0], **whole),
        combine=torch.zeros(1, 4, **whole),
        partial=torch.zeros(1, shape.num_heads, shape.head_dim, device=device),
        partial_lse=torch.zeros(1, shape.num_heads, device=device),
    )


class SwitchDecoder:
    """A base model, one dynamic adapter and a batch of sequences; `step` decodes a token of each."""

    def __init__(
        self,
        shape: ModelShape,
        weights: ModelWeights,
        pools: ExpertPools,
        ops: SwitchOps,
        *,
        batch: int,
        max_tokens: int,
        merge: ExpertMerge | None = None,
        tuning: ExpertTuning | None = None,
        side_by_side: bool = True,
    ) -> None:
        self.shape, self.weights, self.pools, self.ops, self.merge = shape, weights, pools, ops, merge
        device, self.dtype = weights.embed.device, weights.embed.dtype
        self.sequences = new_sequences(shape, batch, max_tokens, self.dtype, device)
        self.max_tokens = max_tokens
        self.cos_sin = cos_sin_table(shape, max_tokens).to(device)
        self.route = ExpertRoute(pools.spec, batch, device, ops.route_top_k)
        # Unmerged, the base products run on a stream of their own beside the shrinks.
        self._products = torch.cuda.Stream(device) if device.type == "cuda" and side_by_side else None
        self._tuning = tuning
        groups = [group for group in pools.layers[0] if group is not None]
        self._launches = {
            id(group): self._launch(group) for layer in pools.layers for group in layer if group
        }
        slots = self.route.touched.shape[1]
        most = max(self._launch(g).parts(g.a.shape[2]) * slots * batch * g.a.shape[1] for g in groups)
        self._bridge = torch.zeros(most, device=device)

    def step(self, path: Path) -> torch.Tensor:
        """Decode one token of each sequence and go on to the next position (the last one, once it is reached); return the logits."""
        logits = self.forward(path)
        sequences = self.sequences
        torch.argmax(logits, dim=-1, out=sequences.ids)
        sequences.positions.add_(1).clamp_(max=self.max_tokens - 1)
        return logits

    def forward(self, path: Path) -> torch.Tensor:
        """Return the logits [B, vocabulary] of the sequences' current tokens, whose K and V are written."""
        self._check(path)
        ops, weights, eps = self.ops.base, self.weights, self.shape.rms_norm_eps
        torch.add(self.sequences.positions, 1, out=self.sequences.items[:, 2])
        residual = F.embedding(self.sequences.ids, weights.embed)
        x = ops.rms_norm(residual, weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            x = self._attention(index, self._linear(path, index, 0, x))
            x = self._linear(path, index, 1, x)
            x = ops.add_rms_norm_(x, residual, layer.post_norm, eps)
            x = ops.silu_mul(self._linear(path, index, 2, x))
            x = self._linear(path, index, 3, x)
            last = index + 1 == len(weights.layers)
            norm = weights.norm if last else weights.layers[index + 1].input_norm
            x = ops.add_rms_norm_(x, residual, norm, eps)
        return F.linear(x, weights.lm_head)

    def _check(self, path: Path) -> None:
        if path not in PATHS:
            raise ValueError(f"path(={path!r}) must be one of {', '.join(PATHS)}")
        if path not in MERGED:
            return
        if len(self.sequences.ids) != 1:
            raise ValueError(f"path(={path!r}) merges one token's experts; a batch takes 'unmerged'")
        if self.pools.spec.router != "switch":
            raise ValueError(f"path(={path!r}) needs one route for all layers: router='switch'")
        if self.merge is None or self.merge.plan.in_place != (path != "sgmm_pristine"):
            raise ValueError(f"path(={path!r}) needs an ExpertMerge of its kind")

    def _linear(self, path: Path, layer: int, group: int, x: torch.Tensor) -> torch.Tensor:
        """Return x · Wᵀ with the experts added or merged; route first where a router stands here."""
        weight = group_weights(self.weights.layers[layer])[group]
        bias = self.weights.layers[layer].qkv_bias if group == 0 else None
        experts = self.pools.layers[layer][group]
        spec = self.pools.spec
        routed = group == spec.first_group and (layer == 0 or spec.router == "layerwise")
        if path != "base" and routed:
            if path in MERGED:
                self.route.keep_last()
            self.route.fill(x, self.pools.routers[0 if spec.router == "switch" else layer])
            if path in MERGED and self.merge is not None:
                self.merge.merge_(self.route, one_by_one=path == "simple")
        if path == "base" or path in MERGED or experts is None:
            return F.linear(x, weight, bias)
        if path == "unmerged":
            return self._unmerged(experts, x, weight, bias, settled=not routed)
        y = F.linear(x, weight, bias)
        (add_experts_by_loop if path == "layerwise_loop" else add_experts)(y, x, experts, self.route)
        return y

    def _unmerged(
        self,
        experts: ExpertGroup,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        settled: bool,
    ) -> torch.Tensor:
        """Return the base product with the experts' added: the shrink beside the product, as the engine's LoRA runs."""
        route, launch = self.route, self._launches[id(experts)]
        size = launch.parts(x.shape[1]), route.touched.shape[1], len(x), experts.a.shape[1]
        bridge = self._bridge[: torch.Size(size).numel()].view(size)
        if self._products is None:
            self.ops.expert_shrink(x, experts.a, route.touched, bridge, launch=launch, settled=settled)
            y = F.linear(x, weight, bias)
        else:
            main = torch.cuda.current_stream(x.device)
            self._products.wait_stream(main)
            self.ops.expert_shrink(x, experts.a, route.touched, bridge, launch=launch, settled=settled)
            with torch.cuda.stream(self._products):
                y = F.linear(x, weight, bias)
            main.wait_stream(self._products)
        # The product is an ordinary kernel behind the router, so the route is written by now.
        self.ops.expert_expand_(
            y,
            bridge,
            experts.b,
            route.dense,
            route.touched,
            rank=experts.rank,
            widths=experts.widths,
            targets=experts.targets,
            launch=launch,
            settled=True,
        )
        return y

    def _launch(self, group: ExpertGroup) -> ExpertLaunch:
        return expert_launch(len(self.sequences.ids), group.a.shape[2], sum(group.widths), self._tuning)

    def _attention(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        shape, sequences = self.shape, self.sequences
        common = {
            "layer": layer,
            "num_layers": shape.num_layers,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "page_tokens": PAGE_TOKENS,
        }
        place = (sequences.positions, sequences.slots, sequences.page_table, sequences.pool)
        self.ops.base.rotary_write_kv_(qkv, self.cos_sin, *place, num_heads=shape.num_heads, **common)
        rows, queries = len(qkv), shape.num_heads * shape.head_dim
        out = torch.empty(rows, queries, dtype=qkv.dtype, device=qkv.device)
        self.ops.base.paged_decode_attention(
            qkv[:, :queries].view(rows, shape.num_heads, shape.head_dim),
            sequences.pool,
            sequences.page_table,
            sequences.slots,
            sequences.items,
            sequences.counts[:1],
            sequences.combine,
            sequences.counts[1:],
            sequences.partial,
            sequences.partial_lse,
            out,
            num_programs=ATTENTION_PROGRAMS,
            **common,
        )
        return out


def add_experts(y: torch.Tensor, x: torch.Tensor, experts: ExpertGroup, route: ExpertRoute) -> None:
    """Add each token's experts to y in place by ordinary PyTorch operations, without asking the host: seven for each linear."""
    tokens, top_k = route.indices.shape
    chosen = route.indices.flatten().long()
    inputs = x.repeat_interleave(top_k, dim=0)[:, :, None]
    for first, width, a, b in experts.factors():
        h = torch.bmm(a[chosen], inputs)
        update = torch.bmm(h.transpose(1, 2), b[chosen]).view(tokens, top_k, width)
        y[:, first : first + width] += (update * route.gates[:, :, None].to(y.dtype)).sum(dim=1)


def add_experts_by_loop(y: torch.Tensor, x: torch.Tensor, experts: ExpertGroup, route: ExpertRoute) -> None:
    """Add each token's experts to y in place as implementations of mixtures of LoRA do: for each expert, ask which tokens chose it."""
    for first, width, a, b in experts.factors():
        for expert in range(len(a)):
            tokens, choice = torch.where(route.indices == expert)  # waits for the device
            if len(tokens) == 0:
                continue
            gate = route.gates[tokens, choice, None].to(y.dtype)
            update = F.linear(F.linear(x[tokens], a[expert]), b[expert].T)
            y[:, first : first + width].index_add_(0, tokens, gate * update)
