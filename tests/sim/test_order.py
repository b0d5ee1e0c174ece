"""Seven ways to serve one trace, replayed on H200s: the simulator puts them in the order that was measured."""

from itertools import combinations

import pytest

from sim.records import recorded_run
from sim.validate import RUNS, compare, costs_of_records

CONFIGURATIONS = (
    "tp1", "merge-hot", "replicas2", "tp2-block_diagonal", "tp2-replicated", "tp2-slora", "tp2-slora_published",
)  # fmt: skip
CLEARLY = 1.05  # apart


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "metric"),
    [("flood", "throughput_rps"), ("order", "tpot_p50_s"), ("order", "ttft_p50_s"), ("order", "e2e_p95_s")],
)
def test_configurations_are_in_the_order_that_was_measured(kind, metric):
    found = {}
    for name in CONFIGURATIONS:
        rows = compare(recorded_run(RUNS / f"{kind}-{name}"), costs_of_records())
        found[name] = next((row.measured, row.predicted) for row in rows if row.metric == metric)
    for one, other in combinations(found, 2):
        measured, predicted = (found[one][i] / found[other][i] for i in (0, 1))
        if max(measured, 1 / measured) > CLEARLY:
            assert (measured > 1) == (predicted > 1), (one, other, found[one], found[other])
