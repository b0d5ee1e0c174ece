"""Rule R3-gen: tenants send at their own rates, as bursty as they are, with their own lengths."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from traces import TraceError
from traces.__main__ import main
from traces.assign import Assignment
from traces.tenant_traffic import load_tenant_lengths, renewals_s, synthesize_tenants
from traces.tenants import Gaps, load_tenants

HEADER = "client_id,window_start_s,rate_rps,iat_cv,iat_family,iat_shape,iat_scale\n"
RATES = HEADER + "".join(
    f"{client},{window},{rate},1,{family},{shape},1\n"
    for window in range(0, 6000, 600)
    for client, rate, family, shape in ((7, 1.0, "Gamma", 1.0), (3, 3.0, "Weibull", 0.7))
)


def lengths_row(client: int, window: int, prompt: int, output: int) -> str:
    row = {"client_id": client, "window_start_s": window}
    return json.dumps(row | {"input_tokens": {str(prompt): 1.0}, "output_tokens": {str(output): 1.0}}) + "\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rates, lengths = tmp_path / "rates.csv", tmp_path / "lengths.jsonl"
    rates.write_text(RATES)
    lengths.write_text(lengths_row(3, 0, 30, 5) + lengths_row(7, 0, 70, 0))
    return rates, lengths


def made(files: tuple[Path, Path], rate_rps: float = 2.0, seconds: float = 6000.0, **how):
    tenants, lengths = load_tenants(files[0]), load_tenant_lengths(files[1])
    assignment = Assignment(**({"rule": "R3-gen", "adapters": 2, "offset_s": 0.0} | how))
    return synthesize_tenants(tenants, lengths, assignment, rate_rps=rate_rps, duration_s=seconds)


def test_each_tenant_has_its_share_of_the_rate_and_its_own_lengths(files) -> None:
    trace = made(files)
    assert len(trace) == pytest.approx(12_000, rel=0.03)
    uses = Counter(request.adapter for request in trace.requests)
    assert uses["a0000"] / len(trace) == pytest.approx(0.75, abs=0.02)  # client 3: the busiest is the first
    kinds = {(r.adapter, r.prompt_tokens, r.output_tokens) for r in trace.requests}
    assert kinds == {("a0000", 30, 5), ("a0001", 70, 1)}  # no output is taken as one token
    arrivals_s = trace.columns.arrival_s
    assert (np.diff(arrivals_s) >= 0).all() and arrivals_s[0] >= 0 and arrivals_s[-1] < 6000
    assert trace.columns.ids == range(len(trace))


def test_equal_arguments_give_equal_traces(files) -> None:
    one, same, other = made(files), made(files), made(files, seed=7)
    assert one.requests == same.requests and one.requests != other.requests
    shorter = made(files, seconds=1800.0)
    assert shorter.requests == one.requests[: len(shorter)]


@pytest.mark.parametrize("gaps", [Gaps("Gamma", 0.2), Gaps("Weibull", 0.5), Gaps("Gamma", 4.0)])
def test_gaps_keep_their_shape_and_the_expected_number_is_rate_times_time(gaps: Gaps) -> None:
    cv = {0.2: 0.2**-0.5, 0.5: 5**0.5, 4.0: 0.5}[gaps.shape]
    instants_s = renewals_s(gaps, 0.1, (100.0, 5100.0), np.random.default_rng(1))
    gaps_s = np.diff(instants_s)
    assert gaps_s.mean() == pytest.approx(0.1, rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.08)
    assert instants_s.min() >= 100 and instants_s.max() < 5100
    # Met in its midst: spans that hold a request or less on average do so whatever the shape.
    counts = [
        len(renewals_s(gaps, 1.0, (0.0, 0.5), np.random.default_rng([2, number]))) for number in range(3000)
    ]
    assert np.mean(counts) == pytest.approx(0.5, abs=0.07)


def test_lengths_are_the_clients_earlier_ones_else_everybodys(tmp_path: Path, files) -> None:
    later = 6 * 3600
    rows = HEADER + "".join(
        f"{client},{later},{rate},1,Gamma,1,1\n" for client, rate in ((3, 3.0), (7, 1.0), (9, 4.0))
    )
    files[0].write_text(rows)
    files[1].write_text(
        lengths_row(3, 0, 30, 5) + lengths_row(7, later, 70, 9) + lengths_row(3, later * 2, 1, 1)
    )
    trace = made(files, seconds=600.0, rate_rps=20.0, offset_s=float(later), adapters=3)
    seen = {(r.adapter, r.prompt_tokens) for r in trace.requests}
    assert seen == {("a0000", 70), ("a0001", 30), ("a0002", 70)}  # client 9 has none: those of client 7
    files[1].write_text(lengths_row(3, 0, 30, 5))
    with pytest.raises(
        TraceError, match=r"lengths.jsonl: knows nobody's lengths in the six hours from 21600 s"
    ):
        made(files, seconds=600.0, offset_s=float(later), adapters=3)


def test_the_command_makes_so_many_requests(files, tmp_path: Path, capsys) -> None:
    out = tmp_path / "t.jsonl"
    given = ["synth", "--rule", "R3-gen", "--tenants", str(files[0]), "--tenant-lengths", str(files[1])]
    assert (
        main(
            [
                *given,
                "--rate",
                "2",
                "--requests",
                "500",
                "--offset-s",
                "300",
                "--adapters",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 500 and {row["rank"] for row in rows} == {8, 16}
    assert rows[-1]["arrival_s"] == pytest.approx(250, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "R3-gen"], "--tenants and --rule R3 or R3-gen go together"),
        (["--rule", "R3-gen", "--tenants", "rates.csv"], "--tenant-lengths and --rule R3-gen go together"),
        (["--tenants", "rates.csv"], "--tenants and --rule R3 or R3-gen go together"),
        (["GEN", "--like", "azure-conv"], "--rule R3-gen has its own arrivals and lengths"),
        (["GEN", "--adapters", "0"], "--rule R3-gen gives every request its tenant's adapter"),
        (["GEN", "--offset-s", "0", "--duration-s", "7000"], "rates.csv: has no clients at 6000 s"),
        (["GEN", "--offset-s", "0", "--rate", "-1"], "rate must be above 0"),
        (
            ["GEN", "--tenants", "bare.csv", "--offset-s", "0"],
            "bare.csv: rule R3-gen needs its columns iat_family",
        ),
        (["GEN", "--tenants", "odd.csv"], "odd.csv:2: iat_family must be one of Gamma, Weibull, not Pareto"),
        (["GEN", "--tenant-lengths", "bad.jsonl"], "bad.jsonl:1: output_tokens must be an object of lengths"),
    ],
)
def test_bad_input_is_one_line(files, tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare.csv").write_text("client_id,window_start_s,rate_rps\n1,0,2\n")
    Path("odd.csv").write_text(HEADER + "1,0,2,1,Pareto,1,1\n")
    Path("bad.jsonl").write_text(
        '{"client_id": 1, "window_start_s": 0, "input_tokens": {"3": 1}, "output_tokens": {}}\n'
    )
    if arguments[0] == "GEN":
        gen = ["--rule", "R3-gen", "--tenants", "rates.csv", "--tenant-lengths", "lengths.jsonl"]
        arguments = [*gen, *arguments[1:]]
    assert main(["synth", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: {message}") and said.err.count("\n") == 1


def test_assign_says_where_the_rule_belongs(tmp_path: Path, capsys) -> None:
    assert main(["assign", "t.jsonl", "--rule", "R3-gen"]) == 2
    assert "python -m traces synth --rule R3-gen" in capsys.readouterr().err


@pytest.mark.slow
def test_published_tenants(shared_traces: Path) -> None:
    folder = shared_traces / "servegen"
    tenants = load_tenants(folder / "m-large.week1.client_rates.csv.gz")
    lengths = load_tenant_lengths(folder / "m-large.week1.client_lengths.jsonl.gz")
    how = Assignment(rule="R3-gen", adapters=135)
    trace = synthesize_tenants(tenants, lengths, how, rate_rps=8.0, duration_s=1200.0)
    assert trace.rate_rps == pytest.approx(8.0, rel=0.1)
    windows = [36_000, 36_600]
    busiest = sum(float(tenants.rates_rps[w].max()) for w in windows) / sum(
        float(tenants.rates_rps[w].sum()) for w in windows
    )
    uses = Counter(request.adapter for request in trace.requests).most_common(1)[0][1]
    assert uses / len(trace) == pytest.approx(busiest, abs=0.03)
