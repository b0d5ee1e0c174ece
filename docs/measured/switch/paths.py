"""Whole tokens along every decode path, of one model with one dynamic adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from docs.measured.switch.run import EXPERTS, TOP_K, Run, candidates, ops_of
from engine.dynamic_adapter import DynamicAdapterSpec
from engine.expert_merge import ExpertMerge
from engine.expert_pools import ExpertPools, random_expert_pools
from engine.model_shape import ModelShape
from engine.switch_ops import SwitchOps
from engine.switch_paths import SwitchDecoder
from engine.weights import ModelWeights, random_weights
from kernels.expert_launch import TILE_CANDIDATES, TOKEN_CANDIDATES, ExpertTuning
from kernels.sgmm import Sgmm
from kernels.sgmm_bench import sweep
from kernels.sgmm_launch import CANDIDATES, SgmmTuning
from kernels.sgmm_plan import SgmmPlan

CONTEXT, MAX_TOKENS = 128, 512
AGREEMENT = 0.1  # 32 layers in bf16: the same computed by PyTorch differs by 0.06, without experts by 1.3
HELD = (8, 16, 32, 48, 64)  # tokens that a route is held for


def measure_model(run: Run, shape: ModelShape, ranks: list[int]) -> None:
    """Measure one model's shapes at every rank."""
    weights = random_weights(shape, run.dtype, run.device, seed=0)
    for rank in ranks:
        with run.guarded(f"{shape.name} r={rank}: pools"):
            spec = DynamicAdapterSpec(name="d", num_experts=EXPERTS, top_k=TOP_K, rank=rank)
            pools = random_expert_pools(spec, shape, seed=rank, dtype=run.dtype, device=run.device)
            Model(run, shape, weights, pools).measure()
            del pools
        run.free()


class Model:
    """One model with one dynamic adapter."""

    def __init__(self, run: Run, shape: ModelShape, weights: ModelWeights, pools: ExpertPools) -> None:
        self.run, self.shape, self.weights, self.pools = run, shape, weights, pools
        self.ops = ops_of(run)
        self.key = {"model": shape.name, "rank": pools.spec.rank}
        self.best: dict[bool, SgmmTuning | None] = {}
        self.times: dict[tuple[str, int], float] = {}
        self.switch_ms: dict[str, float] = {}
        self.logits: dict[str, torch.Tensor] = {}

    @property
    def what(self) -> str:
        return f"{self.shape.name} r={self.pools.spec.rank}"

    def measure(self) -> None:
        """Measure all; each part guarded by itself."""
        run = self.run
        for batch in (1, 3) if run.tiny else (1, 8, 32):
            with run.guarded(f"{self.what} base batch {batch}"):
                self.captured("base", batch)
            with run.guarded(f"{self.what} unmerged batch {batch}"):
                self.unmerged(batch)
        for in_place in (False, True):
            with run.guarded(f"{self.what} sgmm in_place={in_place}"):
                self.sgmm(in_place)
            run.free()
        with run.guarded(f"{self.what} layerwise"):
            self.layerwise()
        with run.guarded(f"{self.what} agreement"):
            self.agreement()
        with run.guarded(f"{self.what} break-even"):
            self.break_even()
        with run.guarded(f"{self.what} targets"):
            self.targets()
        run.free()

    def decoder(self, batch: int, *, pools: ExpertPools | None = None, **options: Any) -> SwitchDecoder:
        """Return a decoder whose sequences have some context already."""
        max_tokens = 32 if self.run.tiny else MAX_TOKENS
        options = {"ops": self.ops, "batch": batch, "max_tokens": max_tokens, **options}
        decoder = SwitchDecoder(self.shape, self.weights, pools or self.pools, **options)
        self.rewind(decoder)
        decoder.sequences.pool.normal_(generator=torch.Generator(self.run.device).manual_seed(1))
        return decoder

    def rewind(self, decoder: SwitchDecoder) -> None:
        """Put the sequences back to where they start: the same tokens at the same positions for every path."""
        decoder.sequences.positions.fill_(4 if self.run.tiny else CONTEXT)
        decoder.sequences.ids.copy_(torch.arange(len(decoder.sequences.ids)) * 37 + 5)

    def keep(self, path: str, batch: int, ms: float, **more: Any) -> None:
        """Keep a path's time."""
        self.times[path, batch] = ms
        base = self.times.get(("base", batch))
        over = {} if base is None else {"over_base": round(ms / base, 3)}
        self.run.add("paths", {**self.key, "path": path, "batch": batch, "ms": round(ms, 4), **over, **more})

    def captured(
        self,
        path: Any,
        batch: int,
        decoder: SwitchDecoder | None = None,
        name: str | None = None,
        **more: Any,
    ) -> None:
        """Time a captured path; keep the logits of its first token where the batch is one."""
        decoder = decoder or self.decoder(batch)
        self.rewind(decoder)
        if batch == 1:
            self.logits[name or path] = decoder.forward(path).float().clone()
            self.rewind(decoder)
        replay = self.run.capture(lambda: decoder.step(path))
        self.rewind(decoder)
        self.keep(name or path, batch, self.run.ms(replay), **more)

    def unmerged(self, batch: int) -> None:
        """Time (d) with every tuning, keep the fastest, and time that also without a second stream."""
        run, best = self.run, (float("inf"), ExpertTuning())
        tried: list[dict[str, Any]] = []
        for tuning in () if run.tiny else TOKEN_CANDIDATES if batch == 1 else TILE_CANDIDATES:
            if f"experts {batch > 1} {tuning.name}" in run.wrong:
                continue
            with run.guarded(f"{self.what} unmerged batch {batch} {tuning.name}"):
                decoder = self.decoder(batch, tuning=tuning)
                ms = run.ms(run.capture(lambda decoder=decoder: decoder.step("unmerged")), 10)
                tried.append({"tuning": tuning.name, "ms": round(ms, 4)})
                best = min(best, (ms, tuning), key=lambda pair: pair[0])
        self.captured(
            "unmerged", batch, self.decoder(batch, tuning=best[1]), tuning=best[1].name, tunings=tried
        )
        alone = self.decoder(batch, tuning=best[1], side_by_side=False)
        self.captured("unmerged", batch, alone, "unmerged one stream")

    def sgmm(self, in_place: bool) -> None:
        """Time the segmented product alone with every tuning, then the paths that merge with the fastest."""
        run, form = self.run, "in_place" if in_place else "pristine"
        ops = replace(self.ops, merge_of=lambda plan: self.merge_of(plan, in_place))
        merge = ExpertMerge(self.pools, self.weights, ops, in_place=in_place)
        try:
            self.sweep(merge.plan, form, in_place)
        finally:
            merge.restore()
            del merge
            run.free()
        merge = ExpertMerge(self.pools, self.weights, ops, in_place=in_place)
        try:
            self.merged(merge, ops, form)
        finally:
            merge.restore()

    def sweep(self, plan: SgmmPlan, form: str, in_place: bool) -> None:
        """Time the segmented product alone with every tuning; keep which is the fastest."""
        run = self.run
        if run.tiny:
            return
        route = torch.randint(0, EXPERTS, (plan.segments,), device=run.device).int()
        gates = torch.tensor([0.6, 0.2], device=run.device)
        rows = sweep(
            plan,
            route,
            gates,
            tunings=[tuning for tuning in CANDIDATES if f"sgmm {tuning.name}" not in run.wrong],
            failed=lambda name, error: run.failed(f"{self.what} {form} {name}", error),
        )
        self.best[in_place] = next(t for t in CANDIDATES if t.name == rows[0]["tuning"])
        bound = {"bytes_gb": round(plan.moved_bytes / 1e9, 2), "tflop": round(plan.flops / 1e12, 3)}
        run.add("sgmm", {**self.key, "form": form, **rows[0], **bound, "tunings": rows})

    def merged(self, merge: ExpertMerge, ops: SwitchOps, form: str) -> None:
        """Time the paths that merge, the merge alone, and routes that are held."""
        run = self.run
        decoder = self.decoder(1, merge=merge, ops=ops)
        self.captured(f"sgmm_{form}", 1, decoder)
        if form == "in_place":
            merge.restore()
            self.captured("simple", 1, decoder)
        merge.restore()
        switch = run.capture(lambda: merge.merge_(decoder.route))
        self.switch_ms[form] = run.ms(switch)
        with run.guarded(f"{self.what} held {form}"):
            self.held(form, switch)

    def merge_of(self, plan: SgmmPlan, in_place: bool) -> Sgmm:
        """Return a plan's merge with the fastest tuning known."""
        return Sgmm(plan, self.best.get(in_place) or (candidates(self.run)[0] if self.run.tiny else None))

    def held(self, form: str, switch: Callable[[], object]) -> None:
        """Time tokens of which every so many share a route: one merge, then base steps."""
        decoder = self.decoder(1)
        base = self.run.capture(lambda: decoder.step("base"))
        for tokens in HELD[:1] if self.run.tiny else HELD:

            def turn(tokens: int = tokens) -> None:
                switch()
                for _ in range(tokens):
                    base()

            self.rewind(decoder)
            ms = self.run.wall_ms(turn, 1, warm=1) / tokens
            row = {**self.key, "form": form, "tokens_per_switch": tokens, "ms_per_token": round(ms, 4)}
            self.run.add(
                "held", {**row, "unmerged_ms": round(self.times.get(("unmerged", 1), float("nan")), 4)}
            )

    def layerwise(self) -> None:
        """Time (a): eager and captured, and the loop over experts; beside it (d) with a router a layer."""
        run, shape, spec = self.run, self.shape, self.pools.spec
        layerwise = replace(spec, router="layerwise")
        generator = torch.Generator(run.device).manual_seed(7)
        routers = tuple(
            torch.randn(EXPERTS, shape.hidden_size, generator=generator, device=run.device).mul_(shape.hidden_size**-0.5).to(run.dtype)
            for _ in range(shape.num_layers)
        )  # fmt: skip
        pools = replace(self.pools, spec=layerwise, routers=routers)
        steps = 1 if run.tiny else 10
        with run.guarded(f"{self.what} base eager"):
            decoder = self.decoder(1)
            self.keep("base eager", 1, run.wall_ms(lambda: decoder.step("base"), steps))
        decoder = self.decoder(1, pools=pools)
        with run.guarded(f"{self.what} layerwise eager"):
            self.rewind(decoder)
            self.keep("layerwise eager", 1, run.wall_ms(lambda: decoder.step("layerwise"), steps))
        with run.guarded(f"{self.what} layerwise loop eager"):
            self.rewind(decoder)
            self.keep(
                "layerwise_loop eager",
                1,
                run.wall_ms(lambda: decoder.step("layerwise_loop"), max(1, steps // 3)),
            )
        with run.guarded(f"{self.what} layerwise captured"):
            self.captured("layerwise", 1, decoder, "layerwise captured")
        with run.guarded(f"{self.what} unmerged, a router a layer"):
            self.captured("unmerged", 1, decoder, "unmerged layerwise")
        with run.guarded(f"{self.what} layerwise by one router"):
            self.logits["layerwise by one router"] = self.decoder(1).forward("layerwise").float().clone()

    def agreement(self) -> None:
        """Hold every path's logits of one token against the unmerged ones."""
        wanted = self.logits["unmerged"]
        for path, logits in self.logits.items():
            if path in (
                "base",
                "layerwise captured",
                "unmerged layerwise",
            ):  # another route or none: must differ
                continue
            error = ((logits - wanted).norm() / wanted.norm()).item()
            self.run.add("agreement", {**self.key, "path": path, "rel_diff_to_unmerged": round(error, 5)})
            if not error < (1e-4 if self.run.tiny else AGREEMENT):
                self.run.failed(
                    f"{self.what} {path}", ValueError(f"logits differ from unmerged by {error:.3e}")
                )
        apart = ((self.logits["base"] - wanted).norm() / wanted.norm()).item()
        self.run.add("agreement", {**self.key, "path": "base", "rel_diff_to_unmerged": round(apart, 5)})

    def targets(self) -> None:
        """Hold the issue's targets: merged over layer-wise eager at least 2.4, unmerged over base at most 1.20 (r=64) or 1.25 (r=128)."""
        ms = {path: time_ms for (path, batch), time_ms in self.times.items() if batch == 1}
        merged = min(ms.get("sgmm_pristine", float("inf")), ms.get("sgmm_in_place", float("inf")))
        rows = {
            f"{path} over sgmm": ms.get(path)
            for path in ("layerwise eager", "layerwise_loop eager", "layerwise captured", "unmerged")
        }
        found = {name: None if value is None else round(value / merged, 3) for name, value in rows.items()}
        for batch in (1, 8, 32):
            if ("unmerged", batch) in self.times and ("base", batch) in self.times:
                found[f"unmerged over base, batch {batch}"] = round(
                    self.times["unmerged", batch] / self.times["base", batch], 3
                )
        self.run.add("targets", {**self.key, **found})

    def break_even(self) -> None:
        """Say how many tokens a route must hold for merged decode to win: switch / (unmerged − base), by batch."""
        for form, switch in self.switch_ms.items():
            for (path, batch), ms in list(self.times.items()):
                if path != "unmerged" or ("base", batch) not in self.times:
                    continue
                gain = ms - self.times["base", batch]
                row = {
                    **self.key,
                    "form": form,
                    "batch": batch,
                    "switch_ms": round(switch, 4),
                    "gain_ms": round(gain, 4),
                }
                self.run.add("break_even", {**row, "tokens": round(switch / gain, 1) if gain > 0 else None})
