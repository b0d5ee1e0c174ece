"""The form beside every page: trace, model, GPUs, what is promised, prices. It is kept in the address, so that a link restores it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict
from typing import Any

import streamlit as st

from engine.budget import GPUS
from engine.errors import UserError
from engine.model_shape import MODEL_CATALOGUE
from planner.dashboard.state import PROBLEM, set_current, uploads
from planner.prices import load_prices
from planner.scenario import MOST_GPUS, MOST_REQUESTS, Scenario
from planner.trace_input import FORMATS, MOST_BYTES, digest, read_upload
from traces.assign import RANK_MIXES

SOURCES = {"sample": "Bundled sample", "upload": "Upload a file", "synthetic": "Make one"}
OBJECTIVES = {"goodput": "Highest rate on these GPUs", "min-gpus": "Fewest GPUs for this rate"}
LENGTHS = {
    "azure-conv": "like Azure's conversations",
    "azure-code": "like Azure's code completion",
    "mooncake": "like Mooncake's conversations",
    "uniform": "uniform between two bounds",
}
LENGTH_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # tokens
FORMAT_NAMES = {
    None: "tell by the content",
    "native": "this project's JSON lines",
    "azure": "Azure LLM CSV",
    "burstgpt": "BurstGPT CSV",
    "mooncake": "Mooncake or AIPerf JSON lines",
    "vidur": "Vidur CSV",
    "blis": "BLIS CSV",
    "vllm": "vLLM timed trace",
}
SLO_HELP = "SLO, service level objective: what is promised for the share of the requests given below."


def show() -> None:
    """Draw the form in the sidebar and make what it holds the current scenario."""
    known, problem = last()
    with st.sidebar:
        if problem:
            st.error(f"The link could not be read: {problem}. These are the defaults.")
        values = asdict(known)
        values |= _trace_part(known)
        values |= _serving_part()
        values |= _promise_part()
        price = _price_part(values["gpu"])
        try:
            scenario = Scenario(**values)
        except UserError as error:
            st.error(str(error))
            st.session_state[PROBLEM] = str(error)
            st.session_state.pop("current", None)
            return
        set_current(scenario, price)
    st.session_state["scenario"] = scenario
    query = scenario.to_query()
    if dict(st.query_params) != query:
        st.query_params.from_dict(query)


def last() -> tuple[Scenario, str]:
    """Return the scenario that this session has, or the one of the link it began with, and what is wrong with that."""
    known = st.session_state.get("scenario")
    if isinstance(known, Scenario):
        return known, str(st.session_state.get("link_problem", ""))
    try:
        found, problem = Scenario.from_query(st.query_params.to_dict()), ""
    except UserError as error:
        found, problem = Scenario(), str(error)
    st.session_state["scenario"] = found
    st.session_state["link_problem"] = problem
    return found, problem


def _key(name: str) -> str:
    """Return the key of a field's widget, which begins with what the scenario has."""
    key = f"field_{name}"
    if key not in st.session_state:
        st.session_state[key] = getattr(st.session_state["scenario"], name)
    return key


def _trace_part(last: Scenario) -> dict[str, Any]:
    st.subheader("Trace", anchor=False)
    source = st.radio(
        "Requests to plan for",
        list(SOURCES),
        format_func=SOURCES.__getitem__,
        key=_key("source"),
        help="A trace says when requests came, how long they were, and which LoRA adapter each asked for.",
    )
    values: dict[str, Any] = {"source": source}
    if source == "upload":
        values["upload"] = _upload(last)
    elif source == "synthetic":
        values |= _synthetic_part()
    values["rate_scale"] = st.number_input(
        "Times the trace's rate",
        0.01,
        100.0,
        step=0.5,
        key=_key("rate_scale"),
        help="2: the same requests in half the time.",
    )
    return values


def _upload(last: Scenario) -> str:
    kind = st.selectbox("Format", (None, *FORMATS), format_func=FORMAT_NAMES.__getitem__, key="upload_format")
    sent = st.file_uploader(
        f"Trace file, plain or .gz, up to {MOST_BYTES // 2**20} MB",
        key="upload_file",
        help="Read in this server's memory and kept until it restarts; nothing is written to disk for good.",
    )
    if sent is None:
        return last.upload
    known = st.session_state.get("upload_read")
    if known is None or known[0] != (sent.file_id, kind):
        known = ((sent.file_id, kind), *_read(sent.name, sent.getvalue(), kind))
        st.session_state["upload_read"] = known
    _, found, problem = known
    if problem:
        st.error(problem)
        return ""
    upload = uploads().find(found)
    for warning in () if upload is None else upload.warnings:
        st.warning(warning)
    return str(found)


def _read(name: str, data: bytes, kind: Any) -> tuple[str, str]:
    """Read what was sent; return its digest, or what is wrong with it."""
    try:
        upload = read_upload(name, data, kind)
    except UserError as error:
        return "", str(error)
    found = digest(upload.trace)
    uploads().keep(found, upload)
    return found, ""


def _synthetic_part() -> dict[str, Any]:
    values: dict[str, Any] = {
        "rate_rps": st.slider("Requests a second", 0.5, 100.0, step=0.5, key=_key("rate_rps")),
        "cv": st.slider(
            "Burstiness (CV of the gaps)",
            0.1,
            8.0,
            step=0.1,
            key=_key("cv"),
            help="CV: standard deviation of the gaps between arrivals over their mean. 1 is Poisson; more is burstier.",
        ),
        "requests": st.slider("Requests", 200, MOST_REQUESTS, step=200, key=_key("requests")),
        "adapters": st.slider("LoRA adapters", 0, 2000, step=10, key=_key("adapters")),
        "zipf_s": st.slider(
            "Skew of their popularity (Zipf exponent)",
            0.0,
            3.0,
            step=0.1,
            key=_key("zipf_s"),
            help="0: all adapters are asked for alike. 1: the second half as often as the first, the third a third as often.",
        ),
        "ranks": st.selectbox("Ranks of the adapters", list(RANK_MIXES), format_func=_mix, key=_key("ranks")),
        "lengths": st.selectbox(
            "Prompt and output lengths", list(LENGTHS), format_func=LENGTHS.__getitem__, key=_key("lengths")
        ),
    }
    if values["lengths"] == "uniform":
        for name, label in (("prompt", "Prompt tokens"), ("output", "Output tokens")):
            ends: Any = st.select_slider(label, LENGTH_STEPS, _ends(name), key=f"field_{name}")
            values[f"{name}_low"], values[f"{name}_high"] = ends
    return values


def _mix(name: str) -> str:
    return ", ".join(map(str, RANK_MIXES[name]))


def _ends(name: str) -> tuple[int, int]:
    """Return the bounds of a length as far as they can be chosen: a link may hold any."""
    scenario = st.session_state["scenario"]
    low, high = (getattr(scenario, f"{name}_{end}") for end in ("low", "high"))
    place = min(bisect_left(LENGTH_STEPS, low), len(LENGTH_STEPS) - 2)
    return LENGTH_STEPS[place], LENGTH_STEPS[
        max(place + 1, min(bisect_left(LENGTH_STEPS, high), len(LENGTH_STEPS) - 1))
    ]


def _serving_part() -> dict[str, Any]:
    st.subheader("Serving", anchor=False)
    return {
        "model": st.selectbox("Base model", list(MODEL_CATALOGUE), key=_key("model")),
        "gpu": st.selectbox(
            "Kind of GPU",
            list(GPUS),
            format_func=str.upper,
            key=_key("gpu"),
            help="Costs were measured on the H200; for other kinds they are scaled by specification and marked extrapolated.",
        ),
        "gpus": st.number_input("GPUs at most", 1, MOST_GPUS, key=_key("gpus")),
        "objective": st.radio(
            "What to look for", list(OBJECTIVES), format_func=OBJECTIVES.__getitem__, key=_key("objective")
        ),
    }


def _promise_part() -> dict[str, Any]:
    st.subheader("Promise (SLO)", anchor=False, help=SLO_HELP)
    return {
        "ttft_ms": st.number_input(
            "Time to first token (TTFT), ms",
            1.0,
            600_000.0,
            step=50.0,
            key=_key("ttft_ms"),
            help="TTFT: from a request's arrival to its first token.",
        ),
        "tpot_ms": st.number_input(
            "Time per output token (TPOT), ms",
            0.1,
            60_000.0,
            step=5.0,
            key=_key("tpot_ms"),
            help="TPOT: mean time between the later tokens of a request.",
        ),
        "e2e_ms": st.number_input(
            "Whole request, ms (0: no bound)", 0.0, 3_600_000.0, step=1000.0, key=_key("e2e_ms")
        ),
        "attainment_pct": st.number_input(
            "Requests that must meet all bounds, %", 1.0, 100.0, step=1.0, key=_key("attainment_pct")
        ),
    }


def price_of(gpu: str) -> float | None:
    """Return what a GPU costs an hour unless the form says otherwise."""
    return load_prices(None).get(gpu)


def _price_part(gpu: str) -> float | None:
    key = f"price_{gpu}"
    if key not in st.session_state:
        st.session_state[key] = price_of(gpu) or 0.0
    price = st.number_input(
        f"US dollars per {gpu.upper()} and hour",
        0.0,
        1000.0,
        step=0.5,
        key=key,
        help="An example to edit, not a quotation. 0: no price is known.",
    )
    return float(price) if price else None
