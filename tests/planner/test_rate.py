"""The rate search against curves whose crossing is known; the pieces it runs on; the abort rule."""

import numpy as np
import pytest

from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import MODEL_CATALOGUE
from planner.bounds import bounds
from planner.probe import Probe, out_of_reach
from planner.rate import highest_scale
from planner.workload import Workload, busiest, max_model_len, repeated
from sim.simulate import Progress
from tests.planner.fake import even_trace
from tests.sim.constant import ConstantCosts
from traces import Trace, TraceRequest
from traces.metrics import Slo


def answer(scale: float, crossing: float, slope: float = 25.0, aborts_at: float = np.inf) -> Probe:
    attainment = 1 / (1 + np.exp(slope * np.log(scale / crossing) - np.log(19.0)))  # 0.95 at the crossing
    return Probe(
        scale=scale,
        wanted=0.95,
        attainment=float(attainment),
        aborted=scale > aborts_at,
        metrics={},
        missed={"TTFT": 1.0},
        bottleneck="none",
        kv_pages_max=0.0,
        adapter_pages_max=0.0,
        step_share=0.0,
    )


@pytest.mark.parametrize("slope", [5.0, 25.0, 100.0])
@pytest.mark.parametrize("guess", [0.3, 2.0, 2.7, 20.0])
@pytest.mark.parametrize("aborts_at", [np.inf, 3.0])
def test_finds_the_crossing(guess: float, slope: float, aborts_at: float) -> None:
    found = highest_scale(
        lambda scale: answer(scale, 2.5, slope, aborts_at), guess, 50.0, tolerance=0.01, reach=0.1
    )
    assert found.scale <= 2.5 + 1e-9
    assert found.scale == pytest.approx(2.5, rel=0.011)


def test_a_good_guess_is_cheap() -> None:
    found = highest_scale(lambda scale: answer(scale, 2.5), 2.6, 50.0, tolerance=0.01, reach=0.05)
    assert found.probes <= 5


def test_the_ceiling_ends_it() -> None:
    found = highest_scale(lambda scale: answer(scale, 1e9), 1.0, 8.0, tolerance=0.01, reach=0.1)
    assert found.scale == 8.0 and found.failed is None


def test_what_never_holds_is_zero() -> None:
    found = highest_scale(
        lambda scale: answer(scale, 1e-9, aborts_at=0.0), 1.0, 8.0, tolerance=0.01, reach=0.5
    )
    assert found.scale == 0.0 and found.passed is None


def test_the_busiest_stretch() -> None:
    times = [*np.arange(0, 300, 3.0), *np.arange(300, 310, 0.1), *np.arange(310, 500, 2.0)]
    trace = Trace(
        TraceRequest(id=i, arrival_s=float(at), prompt_tokens=1, output_tokens=1)
        for i, at in enumerate(times)
    )
    part = busiest(trace, 100)
    assert len(part) == 100 and part.columns.arrival_s[0] == 0.0
    assert part.rate_rps == pytest.approx(10.0, rel=0.01)
    assert busiest(trace, 250) is trace  # hardly shorter


def test_a_trace_repeated_keeps_its_rate() -> None:
    trace = even_trace(4.0, count=50)
    thrice = repeated(trace, 3)
    assert len(thrice) == 150
    assert thrice.rate_rps == pytest.approx(4.0)
    assert np.all(np.diff(thrice.columns.arrival_s) > 0)


def shared_prompts() -> Trace:
    blocks = [(0, 1), (0, 2), None, (0, 1)]
    return Trace(
        TraceRequest(id=i, arrival_s=float(i), prompt_tokens=1024, output_tokens=1, prefix_blocks=row)
        for i, row in enumerate(blocks)
    )


def test_copies_of_a_trace_share_no_prefix() -> None:
    twice = repeated(shared_prompts(), 2).columns.prefix_blocks
    assert twice is not None
    assert twice[:4] == tuple(shared_prompts().columns.prefix_blocks or ())
    assert twice[4:] == ((3, 4), (3, 5), None, (3, 4))


def test_a_bound_counts_no_tokens_that_may_be_in_the_prefix_cache() -> None:
    trace, costs, slo = shared_prompts(), ConstantCosts(step=0.0, token=0.001), Slo(attainment=0.5)
    on, off = (bounds(trace, ServingConfig(prefix_caching=wanted), costs, slo) for wanted in (True, False))
    assert off.rate_rps == pytest.approx(1 / 1.024)
    assert on.rate_rps == pytest.approx(
        4 / (1.024 + 0.512 + 1.024 + 0.001)
    )  # the last is there but for a token
    assert off.ttft_s == pytest.approx(1.024)
    assert on.ttft_s == pytest.approx(0.512)


def test_requests_at_one_instant_have_no_rate() -> None:
    trace = Trace([TraceRequest(id=0, arrival_s=1.0, prompt_tokens=1, output_tokens=1)])
    with pytest.raises(UserError, match="one instant"):
        Workload.of(trace)


def test_the_context_is_what_the_longest_request_needs() -> None:
    model = MODEL_CATALOGUE["llama-2-7b"]
    assert max_model_len(even_trace(1.0, prompt=1000, output=24), model) == 1024
    assert max_model_len(even_trace(1.0, prompt=1001, output=24), model) == 2048
    assert max_model_len(even_trace(1.0, prompt=9000), model) == 4096


def test_a_simulation_is_broken_off_only_when_the_slo_is_lost() -> None:
    trace, slo = even_trace(1.0, count=100, output=1), Slo(ttft_s=0.5, attainment=0.95)
    over = out_of_reach(trace, slo)
    # At 10.6 s eleven requests are due: with six finished, five have missed, which 0.95 allows.
    assert not over(Progress(10.6, 11, 6, 0))
    assert over(Progress(10.6, 11, 5, 0))
