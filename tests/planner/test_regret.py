"""The search's choice against trying everything, on small spaces."""

import pytest

from docs.measured.regret import cases, measure
from engine.config import ServingConfig
from sim.profile import find_profile, load_profile
from tests.planner.fake import capacity_rps, find


@pytest.fixture(scope="module")
def profile():
    return load_profile(find_profile(ServingConfig()))


def test_twenty_spaces_of_twenty_names() -> None:
    assert len({case.name for case in cases()}) == len(cases()) == 20


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("tp", [(1,), (1, 2)])
def test_the_choice_among_all_of_a_made_up_simulator(gpus, tp) -> None:
    """Every configuration's capacity is known: the choice is within the ties of the highest."""
    space = {"tp": tuple(degree for degree in tp if degree <= gpus), "max_num_seqs": (64, 128)}
    found = find(rate_rps=5.0, gpus=gpus, **space)
    highest = max(
        capacity_rps(
            ServingConfig(
                tp=degree, replicas=gpus // degree, max_num_seqs=seqs, max_num_batched_tokens=tokens
            )
        )
        for degree in space["tp"]
        for seqs in (64, 128)
        for tokens in (512, 1024, 2048)
    )
    assert capacity_rps(found.ranked[0].config) >= highest * 0.99


@pytest.mark.slow
def test_twenty_small_spaces(profile) -> None:
    """Median 0 %, worst 2 %."""
    found = sorted(measure(case, profile, 300).regret for case in cases())
    assert found[len(found) // 2] == pytest.approx(0.0, abs=1e-9)
    assert found[-1] <= 0.02
