import numpy as np
import pytest

from traces import TraceError
from traces.like import LIKE, Like
from traces.synth import S_LORA, Quantiles, Uniform, Workload, gamma_gaps_s, synthesize


def test_equal_seeds_give_equal_traces() -> None:
    assert synthesize(S_LORA, 50, seed=3).requests == synthesize(S_LORA, 50, seed=3).requests
    assert synthesize(S_LORA, 50, seed=3).requests != synthesize(S_LORA, 50, seed=4).requests


def test_a_longer_trace_begins_with_the_shorter_one() -> None:
    assert synthesize(S_LORA, 80, seed=3).head(50).requests == synthesize(S_LORA, 50, seed=3).requests


def test_s_loras_lengths_are_uniform_and_its_arrivals_poisson() -> None:
    columns = synthesize(S_LORA, 40_000, seed=0).columns
    for tokens in (columns.prompt_tokens, columns.output_tokens):
        assert (tokens.min(), tokens.max()) == (8, 511)
        assert tokens.mean() == pytest.approx((8 + 511) / 2, rel=0.01)
    gaps_s = np.diff(columns.arrival_s)
    assert gaps_s.mean() == pytest.approx(0.5, rel=0.02)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, rel=0.02)
    assert abs(np.corrcoef(columns.prompt_tokens, columns.output_tokens)[0, 1]) < 0.02


@pytest.mark.parametrize("cv", [0.5, 1.08, 4.0])
def test_gamma_gaps_have_the_rate_and_the_cv(cv: float) -> None:
    gaps_s = gamma_gaps_s(8.0, cv, 400_000, np.random.default_rng(1))
    assert gaps_s.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.03)


@pytest.mark.parametrize("like", LIKE)
def test_published_quantiles_and_means_are_met(like: Like) -> None:
    workload = LIKE[like].workload
    columns = synthesize(workload, 100_000, seed=0).columns
    drawn = ((workload.prompt, columns.prompt_tokens), (workload.output, columns.output_tokens))
    for published, tokens in drawn:
        assert isinstance(published, Quantiles)
        assert tokens.mean() == pytest.approx(published.mean, rel=0.02)
        assert tokens.min() >= published.tokens[0]
        assert tokens.max() <= published.tokens[-1]
        for p, quantile in zip((0.1, 0.5, 0.9, 0.95), published.tokens[1:5], strict=True):
            share = np.mean(tokens <= quantile)  # of rounded lengths, so at least p
            assert np.mean(tokens < quantile) - 0.006 <= p <= share + 0.006


def test_the_quantile_function_goes_through_its_table() -> None:
    lengths = Quantiles(tokens=(1, 10, 100, 1000, 1000, 2000, 4000), mean=400)
    x = np.array([0.0, 0.1, 0.5, 0.9, 0.95, 0.99])
    for bend in (0.5, 1.0, 3.0):
        assert lengths.at(x, bend).tolist() == pytest.approx([1, 10, 100, 1000, 1000, 2000])
    assert lengths.at(np.array([0.3]), 1.0)[0] == pytest.approx(10**1.5)
    fine = lengths.at(np.linspace(0, 0.9999, 5000), 2.0)
    assert (np.diff(fine) >= 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(low=0, high=5), "lengths must be LOW,HIGH"),
        (lambda: Uniform(low=5, high=5), "lengths must be LOW,HIGH"),
        (lambda: Quantiles(tokens=(1, 2, 3), mean=2), "quantiles must be 7 ascending"),
        (lambda: Quantiles(tokens=(1, 9, 3, 4, 5, 6, 7), mean=2), "quantiles must be 7 ascending"),
        (
            lambda: Workload(rate_rps=0, cv=1, prompt=S_LORA.prompt, output=S_LORA.output),
            "rate must be above 0",
        ),
        (lambda: Workload(rate_rps=1, cv=0, prompt=S_LORA.prompt, output=S_LORA.output), "cv must be in"),
        (lambda: synthesize(S_LORA, 0, seed=0), "requests must be in"),
        (lambda: synthesize(S_LORA, 1, seed=-1), "seed must be at least 0"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(TraceError, match=f"^{message}"):
        make()
