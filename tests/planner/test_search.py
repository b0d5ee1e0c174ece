"""The search finds the known optimum of a made-up simulator."""

from dataclasses import replace

import pytest

from engine.config import ServingConfig
from planner.space import Space, settings
from planner.trial import Trial, fewest_gpus, most_rate
from tests.planner.fake import capacity_rps, find
from traces.metrics import Slo


def trial(rate_rps: float, **changes: int) -> Trial:
    return Trial(config=ServingConfig(**changes), piece="trace", sustainable_rps=rate_rps)


def test_finds_the_highest_rate_and_the_fewest_gpus() -> None:
    found = find(rate_rps=25.0, gpus=8)
    best = found.ranked[0]
    assert (best.config.tp, best.config.replicas) == (1, 8)
    assert best.config.max_num_batched_tokens == 2048
    assert best.config.max_num_seqs == 128  # 256 is no better: ties to the smaller
    assert best.sustainable_rps == pytest.approx(80.0, rel=0.015)
    assert found.fewest is not None
    assert (found.fewest.tp, found.fewest.replicas) == (1, 3)
    assert found.trials[found.fewest].sustainable_rps == pytest.approx(30.0, rel=0.06)


def test_every_shape_is_judged_near_its_capacity() -> None:
    found = find(rate_rps=5.0, gpus=8)
    judged = [trial for trial in found.trials.values() if trial.piece in ("window", "stretch", "trace")]
    assert {(item.config.tp, item.config.replicas) for item in judged} >= {
        (1, 8),
        (2, 4),
        (4, 2),
        (8, 1),
        (1, 1),
    }
    for item in (item for item in judged if item.sustainable_rps and item.piece == "trace"):
        assert capacity_rps(item.config) * 0.94 <= item.sustainable_rps <= capacity_rps(item.config) * 1.01


def test_what_no_shape_can_serve_has_no_fewest() -> None:
    found = find(rate_rps=100.0, gpus=8)
    assert found.fewest is None
    assert found.ranked[0].sustainable_rps < 100.0


def test_arithmetic_rules_out_what_is_too_slow_for_any_rate() -> None:
    found = find(rate_rps=5.0, gpus=2, second=0.06)
    assert not found.trials
    assert all("a decode step of one sequence takes 60.0 ms" in item.reason for item in found.impossible)
    slow = find(rate_rps=5.0, gpus=2, second=0.06, slo=Slo(tpot_s=1.0, ttft_s=0.05))
    assert all("TTFT may be 50 ms" in item.reason for item in slow.impossible)


def test_the_answer_does_not_depend_on_the_number_of_workers() -> None:
    one, two = (find(rate_rps=25.0, gpus=4, workers=count) for count in (1, 2))
    assert list(one.trials) == list(two.trials)
    for config, known in one.trials.items():
        assert known.to_json() == two.trials[config].to_json()
    assert one.fewest == two.fewest


def test_ties_go_to_fewer_gpus_and_then_to_the_higher_rate() -> None:
    eight, seven, six = trial(100.0, replicas=8), trial(99.5, replicas=7), trial(98.0, replicas=6)
    assert most_rate([six, eight, seven])[0] is seven
    low, high = trial(10.0, max_num_seqs=64), trial(12.0)
    assert fewest_gpus([eight, low, high]) == [high, low, eight]


def test_settings_that_do_not_fit_are_kept_with_the_reason() -> None:
    space = Space(gpus=2, base=ServingConfig(model="llama-3.1-70b"), tp=(1, 2))
    possible, impossible = settings(space, {})
    assert {config.tp for config in possible} == {2}
    assert {item.tp for item in impossible} == {1}
    assert "does not fit h200" in impossible[0].reason


def test_a_chunk_below_the_batch_is_no_setting() -> None:
    space = Space(gpus=1, max_num_seqs=(256,), max_num_batched_tokens=(128, 512))
    possible, impossible = settings(space, {})
    assert [config.max_num_batched_tokens for config in possible] == [512]
    assert "must be at least max_num_seqs=256" in impossible[0].reason


def test_replicas_go_up_to_the_gpus_given() -> None:
    space = Space(gpus=6, tp=(4, 1, 8, 1))
    assert space.degrees == (1, 4)
    assert space.most_replicas(4) == 1
    assert replace(ServingConfig(), replicas=6).gpus == 6
