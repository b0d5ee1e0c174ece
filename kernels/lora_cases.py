"""The batches that the LoRA kernels are timed on: adapters, their ranks, and how many rows each has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.graph_time import bytes_us
from kernels.lora_pack import LLAMA_8B
from kernels.lora_plan import GROUPS

GROUP_NAMES = ("qkv", "o", "gate_up", "down")
CASES = ((1, 1), (32, 32), (128, 32), (1024, 1), (1024, 32))  # (tokens, adapters), issue 3
SPECIAL = ("mixed", "saturated", "popular")
MAX_RANK, MAX_TOKENS, MAX_ADAPTERS = 256, 65536, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One batch: `tokens` rows spread evenly over `adapters` adapters of one rank, unless `ranks` and `counts` say otherwise."""

    rank: int  # the largest
    tokens: int
    adapters: int
    name: str = "uniform"
    ranks: tuple[int, ...] = ()  # of each adapter
    counts: tuple[int, ...] = ()  # rows of each adapter

    @property
    def adapter_ranks(self) -> tuple[int, ...]:
        """The rank of each adapter."""
        return self.ranks or (self.rank,) * self.adapters

    @property
    def row_counts(self) -> tuple[int, ...]:
        """The rows of each adapter; they follow each other in the batch."""
        return self.counts or spread(self.tokens, self.adapters)

    @property
    def shape(self) -> dict[str, object]:
        """What names the case in a row: its name, rank (smallest-largest where they differ), tokens and adapters."""
        low = min(self.adapter_ranks)
        rank = self.rank if low == self.rank else f"{low}-{self.rank}"
        return {"case": self.name, "rank": rank, "tokens": self.tokens, "adapters": self.adapters}

    def moved_bytes(self, group: int) -> int:
        """Bytes of each adapter row in use, x once, and y in and out."""
        modules = range(*GROUPS[group])
        weights = sum(self.adapter_ranks) * sum(sum(LLAMA_8B[m]) for m in modules)
        activations = self.tokens * (LLAMA_8B[modules[0]][0] + 2 * sum(LLAMA_8B[m][1] for m in modules))
        return 2 * (weights + activations)

    def bound_us(self, group: int) -> float:
        """Time to move these bytes."""
        return bytes_us(self.moved_bytes(group))


def spread(tokens: int, adapters: int) -> tuple[int, ...]:
    """Return the rows of each adapter when they are spread evenly: (5, 2) gives (2, 3)."""
    return tuple(np.diff(np.linspace(0, tokens, adapters + 1).astype(int)).tolist())


def by_popularity(tokens: int, adapters: int) -> tuple[int, ...]:
    """Return the rows of each adapter, at least one, the rest by Zipf's law: (8, 3) gives (5, 2, 1)."""
    shares = 1 / np.arange(1, adapters + 1)
    counts = 1 + np.floor(shares / shares.sum() * (tokens - adapters)).astype(int)
    counts[0] += tokens - counts.sum()
    return tuple(counts.tolist())


# 40 tokens, each of an adapter of its own: five ranks in turn, against one rank of nearly the same bytes (1984 to 1920 ranks in all).
MIXED_RANKS = (8, 16, 32, 64, 128)
MIXED = Case(name="mixed", rank=128, tokens=40, adapters=40, ranks=MIXED_RANKS * 8)
MIXED_UNIFORM = Case(name="as mixed", rank=48, tokens=40, adapters=40)
# An engine with all it can hold: 256 decode rows over 200 adapters and a chunk of 256 prompt tokens of another.
SATURATED = Case(name="saturated", rank=16, tokens=512, adapters=201, counts=(*spread(256, 200), 256))
# What an engine decodes where some adapters are popular: each row's adapter by Zipf's law; and such rows with a chunk of a prompt.
POPULAR = (
    Case(name="popular", rank=16, tokens=64, adapters=32, counts=by_popularity(64, 32)),
    Case(name="popular, chunk", rank=16, tokens=256, adapters=17, counts=(*by_popularity(64, 16), 192)),
)


def cases_of(
    ranks: tuple[int, ...], cases: tuple[tuple[int, int], ...], special: tuple[str, ...]
) -> list[Case]:
    """Return the cases in the order in which they are timed: those of one rank together, they share their weights."""
    named = {"mixed": (MIXED, MIXED_UNIFORM), "saturated": (SATURATED,), "popular": POPULAR}
    uniform = [
        Case(rank=rank, tokens=tokens, adapters=adapters) for rank in ranks for tokens, adapters in cases
    ]
    return [*uniform, *(case for name in special for case in named[name])]


def parse_ranks(text: str) -> tuple[int, ...]:
    """Read `16,64`. Raises ValueError naming what is wrong."""
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--ranks takes numbers as in 16,64, not {text!r}") from None
    for rank in ranks:
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"--ranks: {rank} must be between 1 and {MAX_RANK}")
    return ranks


def parse_cases(text: str) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """Read `32:32,1024:1,mixed` into (tokens, adapters) pairs and names of special cases. Raises ValueError naming what is wrong."""
    pairs, special = [], []
    for part in text.split(","):
        if part in SPECIAL:
            special.append(part)
            continue
        try:
            tokens, adapters = map(int, part.split(":"))
        except ValueError:
            known = " and ".join(SPECIAL)
            raise ValueError(
                f"--cases takes tokens:adapters as in 32:32,1024:1, and {known}, not {part!r}"
            ) from None
        if not 1 <= adapters <= tokens <= MAX_TOKENS or adapters > MAX_ADAPTERS:
            raise ValueError(
                f"--cases: {part} must have at most {MAX_TOKENS} tokens, and adapters from 1 to the tokens, at most {MAX_ADAPTERS}"
            )
        pairs.append((tokens, adapters))
    return tuple(pairs), tuple(special)
