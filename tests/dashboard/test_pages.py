"""Every page and widget of the dashboard, without a browser."""

import json
import time
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from planner.dashboard import state, trace_section
from planner.dashboard.pages import PAGES
from planner.dashboard.warm_up import warm_up
from planner.scenario import Scenario
from planner.task import ROOT
from planner.trace_input import digest, read_upload
from tests.dashboard.test_trace_input import FILES

CHARTS = {  # how many each page draws for the default scenario
    "plan": 4,
    "attainment": 3,
    "memory": 3,
    "trust": 6,
    "pareto": 2,
    "adapters": 1,
    "traffic": 2,
    "compare": 4,
}


def charts(page) -> list[Any]:
    return list(page.get("vega_lite_chart"))


def texts(page) -> str:
    shown = [
        *page.markdown,
        *page.caption,
        *page.info,
        *page.error,
        *page.warning,
        *page.success,
        *page.title,
    ]
    return " ".join(str(item.value) for item in shown)


def link_of(page) -> dict[str, str]:
    values = dict(page.query_params)
    return {name: value if isinstance(value, str) else value[0] for name, value in values.items()}


def widget(kind, label: str):
    return next(item for item in kind if label in item.label)


@pytest.mark.parametrize("path", CHARTS)
def test_a_page_shows_the_default_scenario_at_once(open_page, path) -> None:
    page = open_page(path)
    assert not page.exception and not page.error
    assert page.title[0].value == next(item.title for item in PAGES if item.path == path)
    drawn = charts(page)
    assert len(drawn) == CHARTS[path]
    for chart in drawn:
        spec = json.loads(chart.proto.spec)
        assert any(field in spec for field in ("mark", "layer"))
    assert link_of(page) == {}


def test_the_first_screen_is_a_worked_answer(open_page) -> None:
    page = open_page("plan")
    assert page.success[0].value.startswith("**Recommended:**")
    numbers = {metric.label: metric.value for metric in page.metric}
    assert set(numbers) >= {"GPUs", "Sustains", "TTFT, p95", "TPOT, p95", "Meet the SLO"}
    assert numbers["Cost an hour"].startswith("$")
    labels = [button.proto.label for button in page.get("download_button")]
    assert labels[:5] == [
        "Plan (JSON)",
        "Choices (CSV)",
        "All trials (CSV)",
        "Configuration (JSON)",
        "Report (HTML)",
    ]


@pytest.mark.parametrize(
    ("engine", "said"),
    {"ours": "engine serve", "vllm": "vllm serve", "kserve": "LLMInferenceService"}.items(),
)
def test_the_commands_of_the_engine_that_is_chosen_are_shown(open_page, engine, said) -> None:
    page = open_page("plan")
    assert not page.code
    page.button_group[0].set_value(engine).run()
    assert len(page.code) == 1 and said in page.code[0].value


def visit(**query: str) -> AppTest:
    page = AppTest.from_file(str(ROOT / "planner" / "dashboard" / "navigation.py"), default_timeout=60)
    for name, value in query.items():
        page.query_params[name] = value
    return page.run()


def test_a_visitor_sees_the_recommendation_before_the_form_and_the_charts(open_page) -> None:
    page = visit()
    assert page.success[0].value.startswith("**Recommended:**")
    assert "Sustains" in [metric.label for metric in page.metric]
    assert not charts(page) and not page.sidebar.number_input
    before = texts(page)
    page.run()  # a browser asks for it by itself
    assert len(charts(page)) == CHARTS["plan"] and widget(page.sidebar.number_input, "GPUs at most")
    assert page.success[0].value in before


@pytest.mark.parametrize("query", [{"gpus": "0"}, {"gpus": "3"}, {"source": "upload", "upload": "gone"}])
def test_a_visitor_whose_answer_is_not_known_sees_the_whole_page_at_once(open_page, query) -> None:
    page = visit(**query)
    assert not page.exception and widget(page.sidebar.number_input, "GPUs at most")


def test_the_server_draws_once_before_it_takes_visitors(open_page, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(trace_section, "draw", drawn.append)
    warm_up()
    assert [len(trace) for trace in drawn] == [len(state.trace_of(Scenario()))]


def test_a_price_changes_the_cost_and_nothing_else(open_page) -> None:
    page = open_page("plan")
    before = {metric.label: metric.value for metric in page.metric}
    widget(page.sidebar.number_input, "US dollars").set_value(8.0).run()
    after = {metric.label: metric.value for metric in page.metric}
    assert float(after.pop("Cost an hour")[1:]) == 2 * float(before.pop("Cost an hour")[1:])
    assert after == before


def test_another_scenario_is_in_the_link_and_has_no_answer_yet(open_page) -> None:
    page = open_page("plan")
    widget(page.sidebar.number_input, "GPUs at most").set_value(3).run()
    widget(page.sidebar.selectbox, "Kind of GPU").set_value("h100").run()
    widget(page.sidebar.radio, "What to look for").set_value("min-gpus").run()
    widget(page.sidebar.number_input, "first token").set_value(750.0).run()
    assert not page.exception
    query = link_of(page)
    assert query == {"gpus": "3", "gpu": "h100", "objective": "min-gpus", "ttft_ms": "750"}
    assert [button.label for button in page.main.button] == ["Search for a plan"]
    again = open_page("plan", **query)
    assert widget(again.sidebar.number_input, "GPUs at most").value == 3
    assert "at most 3 × H100" in texts(again)


def test_a_synthetic_trace_is_made_by_sliders(open_page) -> None:
    page = open_page("plan", source="synthetic", requests="400", adapters="20", lengths="uniform")
    numbers = {metric.label: metric.value for metric in page.metric}
    assert (numbers["Requests"], numbers["Adapters"]) == ("400", "20")
    widget(page.sidebar.slider, "LoRA adapters").set_value(0).run()
    widget(page.sidebar.slider, "Burstiness").set_value(3.0).run()
    widget(page.sidebar.slider, "Zipf").set_value(1.5).run()
    widget(page.sidebar.selectbox, "Ranks").set_value("S2").run()
    widget(page.sidebar.select_slider, "Prompt tokens").set_value((16, 64)).run()
    assert not page.exception
    numbers = {metric.label: metric.value for metric in page.metric}
    assert numbers["Adapters"] == "0" and float(numbers["Prompt tokens"]) < 64
    assert "No request of this trace asks for an adapter" in texts(page)
    assert link_of(page)["zipf_s"] == "1.5"


@pytest.mark.parametrize("path", [path for path in CHARTS if path not in ("plan", "pareto")])
def test_pages_can_be_used_before_anything_is_planned(open_page, path) -> None:
    page = open_page(path, source="synthetic", requests="400", gpus="2")
    assert not page.exception and not page.error
    if path != "compare":
        assert "engine's defaults" in texts(page)


def test_an_uploaded_trace_is_found_by_its_digest(open_page) -> None:
    page = open_page("plan", source="upload")
    assert "choose a file to upload" in page.info[0].value
    upload = read_upload("mine.csv", FILES["azure"])
    state.uploads().keep(digest(upload.trace), upload)
    page = open_page("plan", source="upload", upload=digest(upload.trace))
    assert "mine: 2 requests" in texts(page)
    lost = open_page("plan", source="upload", upload="gone")
    assert lost.title[0].value == "Plan"
    assert "not on this server (any more)" in lost.info[0].value


def test_a_bad_link_is_told_and_the_defaults_taken(open_page) -> None:
    page = open_page("plan", gpus="0", model="/etc/passwd")
    assert "The link could not be read" in page.sidebar.error[0].value
    assert page.success[0].value.startswith("**Recommended:**")


def test_a_model_that_does_not_fit_is_told_where_it_matters(open_page) -> None:
    page = open_page("memory", model="llama-3.1-70b", gpu="a10g", gpus="1")
    assert "does not fit a10g" in page.main.error[0].value and not page.exception


def wait_for(page, until, most_s: float = 30.0):
    ends_at_s = time.monotonic() + most_s
    while not until(page) and time.monotonic() < ends_at_s:
        time.sleep(0.1)
        page.run()
    return page


def test_a_search_shows_its_progress_and_can_be_cancelled(open_page) -> None:
    page = open_page("plan", source="synthetic", requests="400", seed="2")
    page.main.button[0].click().run()
    wait_for(page, lambda page: any("Counting: 1 of 4" in bar.proto.text for bar in page.get("progress")))
    assert any("Counting: 1 of 4" in bar.proto.text for bar in page.get("progress"))
    widget(page.main.button, "Cancel").click().run()
    wait_for(page, lambda page: page.info)
    assert page.info[0].value == "The search was cancelled."
    assert [button.label for button in page.main.button] == ["Search again"]


def test_a_search_that_fails_says_why(open_page) -> None:
    page = open_page("plan", source="synthetic", requests="400", seed="1")
    page.main.button[0].click().run()
    wait_for(page, lambda page: page.main.error)
    assert page.main.error[0].value == "trace.jsonl:3: not JSON"


def test_two_choices_are_compared_and_a_scenario_can_be_put_aside(open_page) -> None:
    page = open_page("compare")
    left, right = (widget(page.main.selectbox, side) for side in ("Left", "Right"))
    assert left.value != right.value
    rows = page.dataframe[0].value
    assert {"metric", "left", "right", "change", "better"} <= set(rows.columns)
    costs = page.dataframe[1].value
    assert (costs["$ per million output tokens"] > 0).all()
    widget(page.main.button, "Put this scenario aside").click().run()
    assert "Put aside: sample at 8.15 requests a second" in texts(page)
    left, right = (widget(page.main.selectbox, side) for side in ("Left", "Right"))
    assert left.value.startswith("This scenario · Recommended")
    assert right.value.startswith("Put aside · Recommended")
    widget(page.main.number_input, "Right").set_value(9.0).run()
    assert not page.exception
    widget(page.sidebar.number_input, "GPUs at most").set_value(2).run()
    assert "Nothing is planned for the form's scenario yet" in texts(page)


def test_another_configuration_can_be_looked_at(open_page) -> None:
    page = open_page("memory")
    choice = widget(page.main.selectbox, "Configuration")
    choice.set_value(choice.options[1].split(":")[0]).run()
    page.main.select_slider[0].set_value(128).run()
    assert not page.exception and len(charts(page)) == 3


def test_a_plan_that_is_infeasible_names_the_nearest_miss(open_page) -> None:
    open_page("plan")
    shipped = state.background().find(
        state.Current(scenario=Scenario(), trace=state.trace_of(Scenario()), usd_per_gpu_hour=None)
        .task("plan")
        .key
    )
    found = json.loads(json.dumps(shipped.answer))
    found["plan"] |= {
        "recommended": None,
        "fewest_gpus": None,
        "nearest_miss": found["plan"]["recommended"] | {"misses": "TTFT"},
    }
    current = state.Current(
        scenario=Scenario(gpus=2), trace=state.trace_of(Scenario()), usd_per_gpu_hour=None
    )
    state.background().put(current.task("plan"), found)
    page = open_page("plan", gpus="2")
    assert "keeps the promise. The nearest" in page.main.error[0].value
    assert "What most requests miss: TTFT" in page.main.error[0].value


@pytest.mark.slow
def test_no_path_of_the_server_is_shown(open_page) -> None:
    for path in CHARTS:
        page = open_page(path)
        frames = " ".join(table.value.to_csv() for table in page.dataframe)
        specs = " ".join(chart.proto.spec for chart in charts(page))
        assert "/work/" not in texts(page) + frames + specs and "sim/profiles" not in texts(page) + frames
