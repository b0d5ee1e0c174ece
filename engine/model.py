"""The forward pass of a Llama-like decoder over the paged pool, with LoRA added after every base product.

One pass takes a batch of decode rows and prefill chunks and leaves the next tokens on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.batch import DeviceBatch
from engine.budget import ATTENTION_PARTIAL_ROWS
from engine.config import ServingConfig
from engine.expert_layers import ExpertLayers
from engine.layout import PageGeometry
from engine.model_shape import GROUPS, ModelShape
from engine.ops import Ops
from engine.rotary import cos_sin_table
from engine.tensor_parallel import TensorParallel
from engine.weights import ModelWeights
from kernels.lora_plan import COLUMN_PARALLEL, bridge_width
from kernels.lora_plan import GROUPS as MODULE_RANGES

DECODE_PROGRAMS = 132 * 4  # fill an H200 at head_dim 128
PREFILL_PROGRAMS = 132 * 3
ROW_GROUPS = tuple(group for group, (first, _) in enumerate(MODULE_RANGES) if not COLUMN_PARALLEL[first])


@dataclass(slots=True)
class Buffers:
    """Device memory that all steps share.

    pool [num_pages, page_elems]; page_table [max_num_seqs + 1, max_pages_per_seq] int32; last_token [max_num_seqs + 1] int64;
    scales [adapters, 7] fp32; bridge [planes · rows · width] fp32, cut to shape by each group; sample_arrivals [max_num_seqs] int32, zero
    between steps.
    """

    pool: torch.Tensor
    page_table: torch.Tensor
    last_token: torch.Tensor
    scales: torch.Tensor
    bridge: torch.Tensor
    partial: torch.Tensor
    partial_lse: torch.Tensor
    sample_arrivals: torch.Tensor


class Model:
    """A base model on one GPU. `forward` is free of host synchronisation and of shapes that depend on data, so it can be captured."""

    def __init__(
        self,
        shape: ModelShape,
        config: ServingConfig,
        geometry: PageGeometry,
        weights: ModelWeights,
        ops: Ops,
        buffers: Buffers,
        max_rank: int,
        parallel: TensorParallel | None = None,
        experts: ExpertLayers | None = None,
    ) -> None:
        self.parallel = parallel
        self.experts = experts
        self.communicator = None if parallel is None else parallel.communicator
        self.shape = shape
        self.weights = weights
        self.buffers = buffers
        self.ops = ops
        self.geometry = geometry
        self.num_heads = shape.heads_per_rank(config.tp)
        self.num_kv_heads = shape.kv_heads_per_rank(config.tp)
        self.max_rank = max_rank
        device = buffers.pool.device
        self._products = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.cos_sin = cos_sin_table(shape, config.max_model_len).to(buffers.pool.device)
        self.widths = lora_widths(shape, config)

    def forward(self, batch: DeviceBatch) -> torch.Tensor:
        """Run one step; return the sampled tokens [sample rows] int64, which also become their sequences' last tokens."""
        ops, weights, eps, views = self.ops, self.weights, self.shape.rms_norm_eps, batch.views
        ids = torch.empty_like(views["host_tokens"])
        ops.gather_tokens(views["host_tokens"], self.buffers.last_token, views["sequence_slots"], out=ids)
        residual = self._embed(ids)
        x = ops.rms_norm(residual, weights.layers[0].input_norm, eps)
        for index, layer in enumerate(weights.layers):
            qkv = self._linear(batch, index, 0, x, layer.qkv, layer.qkv_bias)
            attended = self._attention(batch, index, qkv)
            x = self._linear(batch, index, 1, attended, layer.o)
            x = self._add_norm(1, x, residual, layer.post_norm)
            x = ops.silu_mul(self._linear(batch, index, 2, x, layer.gate_up))
            x = self._linear(batch, index, 3, x, layer.down)
            last = index + 1 == len(weights.layers)
            norm = weights.norm if last else weights.layers[index + 1].input_norm
            x = self._add_norm(3, x, residual, norm)
        return self._sample(batch, x)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [T, H] of token ids; each rank has its slice of the vocabulary."""
        embed, communicator = self.weights.embed, self.communicator
        if communicator is None:
            return F.embedding(ids, embed)
        first, last = self.shape.vocab_range(communicator.size, communicator.rank)
        mine = (ids >= first) & (ids < last)
        rows = F.embedding(torch.where(mine, ids - first, 0), embed)
        return communicator.all_reduce_(rows.masked_fill_(~mine[:, None], 0))

    def _add_norm(
        self, group: int, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Add a row-parallel linear's output to the residual stream, in place, and return the norm of it."""
        if self.parallel is not None:
            return self.parallel.add_rms_norm_(group, x, residual, weight, self.shape.rms_norm_eps)
        normed: torch.Tensor = self.ops.add_rms_norm_(x, residual, weight, self.shape.rms_norm_eps)
        return normed

    def _linear(
        self,
        batch: DeviceBatch,
        layer: int,
        group: int,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return x · Wᵀ (+ bias) with each row's adapter added, its experts included."""
        y = self._with_lora(batch, layer, group, x, weight, bias)
        if batch.with_experts and self.experts is not None:
            self.experts.add_(batch.views["expert_rows"], layer, group, x, y)
        return y

    def _with_lora(
        self,
        batch: DeviceBatch,
        layer: int,
        group: int,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return x · Wᵀ (+ bias) with each row's ordinary adapter added."""
        if not batch.with_lora:
            return self._product(group, x, weight, bias)
        if self._products is None:
            bridge, y = self.lora_shrink(batch, layer, group, x), self._product(group, x, weight, bias)
            if self.parallel is not None and self.parallel.slora:
                bridge = self.parallel.collect_h(batch, group, bridge)
        else:
            # Side by side; the shrink stays in the main stream, where it starts under the kernel ahead. Both streams wait for each other
            # at every product, so memory freed in one is free in the other.
            main = torch.cuda.current_stream(x.device)
            self._products.wait_stream(main)
            bridge = self.lora_shrink(batch, layer, group, x)
            with torch.cuda.stream(self._products):
                y = self._product(group, x, weight, bias)
            if self.parallel is not None and self.parallel.slora:
                bridge = self.parallel.collect_h(batch, group, bridge)
            main.wait_stream(self._products)
        self.lora_expand_(batch, layer, group, bridge, y)
        return y

    def _product(
        self, group: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self.parallel is not None and group in ROW_GROUPS:
            out = self.parallel.output(group, len(x))
            if out is not None:
                return torch.mm(x, weight.t(), out=out)
        return F.linear(x, weight, bias)

    def lora_shrink(self, batch: DeviceBatch, layer: int, group: int, x: torch.Tensor) -> torch.Tensor:
        """Return what each row's adapter's A makes of x, for one group of linears, as the bridge's planes."""
        launch, views, buffers = batch.layout.lora[group], batch.views, self.buffers
        width = bridge_width(self.max_rank)
        planes = launch.max_splits * len(x) * width
        flat = None if self.parallel is None else self.parallel.bridge(group, planes)
        bridge: torch.Tensor = self.ops.lora_shrink(
            x,
            buffers.pool,
            views["lora_headers"],
            views["lora_items"],
            (buffers.bridge[:planes] if flat is None else flat).view(launch.max_splits, len(x), width),
            group=group,
            layer=layer,
            tile_tokens=launch.tile_tokens,
            num_programs=launch.shrink_programs,
            tuning=launch.shrink,
        )
        return bridge

    def lora_expand_(
        self, batch: DeviceBatch, layer: int, group: int, bridge: torch.Tensor, y: torch.Tensor
    ) -> None:
        """Add to y, in place, what each row's adapter's B makes of the bridge, for one group of linears."""
        launch, views, buffers = batch.layout.lora[group], batch.views, self.buffers
        slora = self.parallel is not None and self.parallel.slora
        if (
            self.parallel is not None and slora and group in ROW_GROUPS
        ):  # B gives this rank's columns of the sum
            (width,) = self.widths[group]
            y = y[:, self.parallel.rank * width : (self.parallel.rank + 1) * width]
        self.ops.lora_expand_(
            y,
            bridge,
            buffers.scales,
            buffers.pool,
            views["tiles"],
            views["num_tiles"],
            views["lora_headers"],
            group=group,
            layer=layer,
            widths=self.widths[group],
            tile_tokens=launch.tile_tokens,
            num_programs=launch.expand_programs,
            tuning=launch.expand,
            summed=slora,
        )

    def _attention(self, batch: DeviceBatch, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        views, buffers, geometry = batch.views, self.buffers, self.geometry
        common = {
            "layer": layer,
            "num_layers": self.shape.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.shape.head_dim,
            "page_tokens": geometry.page_tokens,
        }
        self.ops.rotary_write_kv_(
            qkv,
            self.cos_sin,
            views["positions"],
            views["sequence_slots"],
            buffers.page_table,
            buffers.pool,
            num_heads=self.num_heads,
            **common,
        )
        rows = len(qkv)
        queries = self.num_heads * self.shape.head_dim
        q = qkv[:, :queries].view(rows, self.num_heads, self.shape.head_dim)
        out = torch.empty(rows, queries, dtype=qkv.dtype, device=qkv.device)
        self.ops.paged_decode_attention(
            q,
            buffers.pool,
            buffers.page_table,
            views["sequence_slots"],
            views["decode_items"],
            views["num_decode_items"],
            views["combine"],
            views["num_combine"],
            buffers.partial,
            buffers.partial_lse,
            out,
            num_programs=DECODE_PROGRAMS,
            **common,
        )
        if not batch.decode_only:
            self.ops.paged_prefill_attention(
                q,
                buffers.pool,
                buffers.page_table,
                views["prefill_items"],
                views["num_prefill_items"],
                out,
                block_q=batch.layout.block_q,
                num_programs=PREFILL_PROGRAMS,
                **common,
            )
        return out

    def _sample(self, batch: DeviceBatch, x: torch.Tensor) -> torch.Tensor:
        views, buffers = batch.views, self.buffers
        slots, params = views["sample_slots"], views["sample_params"]
        # Without prefill the rows are the samples, in order, unless padding makes them more than max_num_seqs.
        if not batch.decode_only or len(x) != len(slots):
            x = x.index_select(0, views["sample_rows"])
        logits = self.logits(x)
        thresholds = self.ops.top_p_threshold(logits, params)
        tokens: torch.Tensor = self.ops.sample(
            logits, slots, params, thresholds, buffers.last_token, buffers.sample_arrivals
        )
        return tokens

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the logits [rows, vocabulary] of normalised hidden rows [rows, H]."""
        logits = F.linear(rows, self.weights.lm_head)
        communicator = self.communicator
        if communicator is None:
            return logits
        ranges = [self.shape.vocab_range(communicator.size, rank) for rank in range(communicator.size)]
        return communicator.gather_columns(logits, [last - first for first, last in ranges])


def lora_widths(shape: ModelShape, config: ServingConfig) -> tuple[tuple[int, ...], ...]:
    """Return how many outputs B gives on one rank, of the modules of each group."""
    linears = shape.linear_shapes(config.tp)
    return tuple(
        tuple(
            linears[module][0] // (config.tp if config.exchanges_lora and group in ROW_GROUPS else 1)
            for module in modules
        )
        for group, modules in enumerate(GROUPS)
    )


def new_buffers(
    config: ServingConfig,
    shape: ModelShape,
    geometry: PageGeometry,
    *,
    num_pages: int,
    num_adapters: int,
    bridge_elems: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Buffers:
    """Allocate the shared device memory; the page table's last row and the last token's last entry belong to padding."""
    heads = shape.heads_per_rank(config.tp)
    rows = config.max_num_seqs + 1
    pages_per_seq = -(-config.max_model_len // config.page_tokens)
    return Buffers(
        pool=torch.zeros(num_pages, geometry.page_elems, dtype=dtype, device=device),
        page_table=torch.zeros(rows, pages_per_seq, dtype=torch.int32, device=device),
        last_token=torch.zeros(rows, dtype=torch.int64, device=device),
        scales=torch.ones(max(1, num_adapters), 7, dtype=torch.float32, device=device),
        bridge=torch.zeros(max(1, bridge_elems), dtype=torch.float32, device=device),
        partial=torch.zeros(
            ATTENTION_PARTIAL_ROWS, heads, shape.head_dim, dtype=torch.float32, device=device
        ),
        partial_lse=torch.zeros(ATTENTION_PARTIAL_ROWS, heads, dtype=torch.float32, device=device),
        sample_arrivals=torch.zeros(config.max_num_seqs, dtype=torch.int32, device=device),
    )
