"""Traces like real ones have the published statistics: shared/traces/README.md, sections 1.1 and 3, copied here."""

import numpy as np
import pytest

from traces import TraceError, load
from traces.__main__ import main
from traces.describe import describe
from traces.like import LIKE, Reuse, Source, bursts_of, cut, repeated_share, synthesize_like, with_prefixes
from traces.synth import S_LORA, synthesize

# p10, p50, p90, p95, p99 and mean of prompts and outputs; rate; CV of gaps
PUBLISHED = {
    "azure-conv": ((220, 1015, 4074, 4085, 4122, 1195), (50, 115, 421, 448, 598, 202), 5.91, 1.08),
    "azure-code": ((150, 1465, 5177, 7168, 7436, 2040), (7, 13, 55, 88, 249, 28), 3.13, 12.6),
    "mooncake": ((974, 7284, 27991, 40411, 89869, 12428), (24, 356, 606, 712, 1170, 347), 3.28, 1.0),
}


@pytest.fixture(scope="module", params=PUBLISHED)
def drawn(request):
    return request.param, synthesize_like(
        LIKE[request.param], 8_000 if request.param == "mooncake" else 20_000, seed=0
    )


def test_quantiles_means_rate_and_cv_are_the_published_ones(drawn):
    name, trace = drawn
    prompts, outputs, rate_rps, cv = PUBLISHED[name]
    near = 3 * np.sqrt(0.25 / len(trace))  # of a share of so many
    for published, tokens in ((prompts, trace.columns.prompt_tokens), (outputs, trace.columns.output_tokens)):
        for p, quantile in zip((0.1, 0.5, 0.9, 0.95, 0.99), published[:-1], strict=True):
            assert np.mean(tokens < quantile) - near <= p <= np.mean(tokens <= quantile) + near
        assert tokens.mean() == pytest.approx(published[-1], rel=0.05)  # of heavy tails
    summary = describe(trace)
    assert summary.rate_rps == pytest.approx(rate_rps, rel=0.2 if cv > 2 else 0.02)
    assert summary.arrival_cv == pytest.approx(cv, rel=0.2 if cv > 2 else 0.02)


def test_code_comes_in_bursts_of_the_published_idc(drawn):
    name, trace = drawn
    wanted = {"azure-conv": 1.3, "azure-code": 12.9, "mooncake": 1.0}[name]
    assert describe(trace).idc == pytest.approx(wanted, rel=0.15)


def test_bursts_have_the_rate_the_cv_and_the_idc_asked_for():
    bursts = bursts_of(3.13, 12.6, 12.9)
    gaps_s = bursts.gaps_s(1_500_000, np.random.default_rng(0))
    assert gaps_s.mean() == pytest.approx(1 / 3.13, rel=0.03)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(12.6, rel=0.02)
    counts = np.bincount(gaps_s.cumsum().astype(int))
    assert counts.var() / counts.mean() == pytest.approx(12.9, rel=0.02)


def test_mooncakes_prompts_repeat_as_much_as_published(drawn):
    name, trace = drawn
    if name != "mooncake":
        assert trace.columns.prefix_blocks is None
        return
    assert repeated_share(trace) == pytest.approx(0.366, abs=0.01)
    assert len(set(trace.columns.sessions)) / len(trace) == pytest.approx(7373 / 12031, abs=0.02)


@pytest.mark.parametrize("max_model_len", [None, 8192])
def test_blocks_fit_prompts_and_a_conversation_keeps_its_start(max_model_len):
    trace = synthesize_like(LIKE["mooncake"], 600, seed=1, max_model_len=max_model_len)
    columns = trace.columns
    assert repeated_share(trace) == pytest.approx(0.366, abs=0.01)
    first = {}
    for session, blocks, prompt in zip(
        columns.sessions, columns.prefix_blocks, columns.prompt_tokens, strict=True
    ):
        assert len(blocks) == -(-prompt // 512)
        assert blocks[0] == 0  # the system prompt
        first.setdefault(session, blocks)
        shared = [a == b for a, b in zip(blocks, first[session], strict=False)]
        assert shared == sorted(shared, reverse=True)
    if max_model_len:
        assert (columns.prompt_tokens + columns.output_tokens <= max_model_len).all()


def test_what_nobody_goes_on_with_repeats_the_first_block_alone():
    trace = with_prefixes(
        synthesize(S_LORA, 50, seed=0), Reuse(going_on=0.0, hits=0.5), np.random.default_rng(0)
    )
    assert repeated_share(trace) == pytest.approx(49 / 50)  # all but a few prompts have one block
    assert len(set(trace.columns.sessions)) == 50


def test_a_rate_is_another_pace_of_the_same_arrivals():
    slow, fast = (synthesize_like(LIKE["azure-code"], 500, seed=2, rate_rps=rate) for rate in (3.13, 12.52))
    assert slow.columns.arrival_s / 4 == pytest.approx(fast.columns.arrival_s, abs=1e-5)
    assert (slow.columns.prompt_tokens == fast.columns.prompt_tokens).all()


def test_cutting_leaves_outputs_half():
    trace = cut(synthesize(S_LORA, 200, seed=0), 100)
    assert trace.columns.output_tokens.max() == 50
    assert (trace.columns.prompt_tokens + trace.columns.output_tokens).max() == 100
    with pytest.raises(TraceError, match="max_model_len must be at least 2"):
        cut(trace, 1)


def test_an_idc_that_cannot_be_is_told():
    source = Source(workload=LIKE["azure-conv"].workload, idc=3.0)  # more than the square of the CV
    with pytest.raises(TraceError, match="idc must be in"):
        synthesize_like(source, 5, seed=0)


def test_the_command_line(tmp_path):
    out = tmp_path / "m.jsonl.gz"
    arguments = ["synth", "--like", "mooncake", "--max-model-len", "8192", "--requests", "80", "--seed", "1"]
    assert main([*arguments, "--adapters", "10", "--out", str(out)]) == 0
    trace = load(out)
    assert len(trace) == 80 and repeated_share(trace) > 0.3
    by_session = {}
    for request in trace.requests:  # sticky, so that reuse survives
        by_session.setdefault(request.session, set()).add(request.adapter)
    assert all(len(adapters) == 1 for adapters in by_session.values())
    again = tmp_path / "again.jsonl.gz"
    assert main([*arguments, "--adapters", "10", "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
