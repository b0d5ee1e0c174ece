"""The table of waste of docs/performance.md: pages that adapters hold against the bytes of their weights.

    python -m docs.measured.waste

Llama-3.1-8B, bf16, one GPU, pages of 16 tokens. Prints Markdown; no torch, no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.model_shape import MODULES
from traces.assign import RANK_MIXES

TARGETS = {"all linears": MODULES, "q,k,v,o": MODULES[:4]}
RANKS = (8, 16, 32, 64, 128)
HEADER = "| ranks | linears | pages | held, MB | used, MB | waste |\n|---|---|---|---|---|---|"


def row(name: str, targets: str, ranks: Sequence[int]) -> str:
    """Return a line: one adapter of each rank, waste as a share of the bytes held."""
    specs = {
        str(rank): AdapterSpec(name=str(rank), rank=rank, target_modules=TARGETS[targets]) for rank in ranks
    }
    footprints = blueprint(ServingConfig(), specs).footprints.values()
    held, used = (
        sum(sizes) for sizes in zip(*((f.copy_bytes, f.weight_bytes) for f in footprints), strict=True)
    )
    pages = " + ".join(str(footprint.pages) for footprint in footprints)
    return f"| {name} | {targets} | {pages} | {held / 1e6:.1f} | {used / 1e6:.1f} | {100 * (1 - used / held):.1f} % |"


def main() -> None:
    """Print the table: single ranks, then an adapter of each rank of a mix."""
    print(HEADER)
    for targets in TARGETS:
        for rank in RANKS:
            print(row(str(rank), targets, [rank]))
        for name, mix in RANK_MIXES.items():
            print(row(f"{name}: {', '.join(map(str, mix))}", targets, mix))


if __name__ == "__main__":
    main()
