"""Ways to cut adapters over GPUs, and what retraining them would gain."""

import pytest

from engine.adapter import AdapterSpec
from planner.retraining import block_diagonal, halved
from planner.space import Space, settings, shardings

DENSE = {"a": AdapterSpec(name="a", rank=16), "b": AdapterSpec(name="b", rank=5)}
BLOCKS = {"c": AdapterSpec(name="c", kind="bd_lora", rank=16, nblocks=4)}


@pytest.mark.parametrize(
    ("adapters", "tp", "expected"),
    [
        (DENSE, 1, ("replicated",)),
        (DENSE, 2, ("replicated", "slora")),
        (BLOCKS, 2, ("block_diagonal", "slora")),
        (BLOCKS, 8, ("replicated", "slora")),  # four blocks cannot be cut over eight GPUs
        (DENSE | BLOCKS, 4, ("block_diagonal", "slora")),
        ({}, 2, ("block_diagonal",)),
    ],
    ids=["one GPU", "dense", "blocks", "too few blocks", "mixed", "no adapters"],
)
def test_ways_that_differ_for_the_adapters(adapters, tp, expected):
    assert shardings(Space(gpus=8), tp, adapters) == expected


def test_only_the_ways_asked_for_are_tried_and_what_cannot_run_is_kept():
    space = Space(gpus=8, tp=(8,), lora_sharding=("block_diagonal",))
    possible, impossible = settings(space, BLOCKS)
    assert not possible
    assert {item.lora_sharding for item in impossible} == {"block_diagonal"}
    assert "nblocks (=4) must be a multiple of tp (=8)" in impossible[0].reason
    possible, _ = settings(Space(gpus=2, tp=(2,), lora_sharding=("slora",)), DENSE)
    assert {config.lora_sharding for config in possible} == {"slora"}


def test_retrained_adapters():
    assert [halved(spec).rank for spec in DENSE.values()] == [8, 2]
    assert halved(BLOCKS["c"]) == AdapterSpec(name="c", kind="bd_lora", rank=8, nblocks=4)
    assert halved(AdapterSpec(name="d", kind="bd_lora", rank=4, nblocks=4)).rank == 4
    retrained = block_diagonal(DENSE["b"])
    assert (retrained.kind, retrained.nblocks, retrained.rank) == ("bd_lora", 8, 8)
    overridden = AdapterSpec(name="e", rank=8, rank_overrides=(("q_proj", 20),))
    assert block_diagonal(overridden).rank_overrides == (("q_proj", 24),)
    assert halved(overridden).rank_overrides == (("q_proj", 10),)
