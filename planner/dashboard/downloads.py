"""What can be taken away from a plan: its JSON, its trials, the configuration, the report, and the commands that run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import streamlit as st

from planner.chart_rows import choice_table
from planner.table import csv_text

NAMES = {
    "ours": "This project's engine",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "lorax": "LoRAX",
    "kserve": "KServe",
}
HTML = "text/html"


def draw(plan: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Draw the downloads of a plan that recommends something."""
    st.subheader("Take it away", anchor=False)
    files = {
        "Plan (JSON)": ("plan.json", "application/json", _text(plan)),
        "Choices (CSV)": ("choices.csv", "text/csv", csv_text(choice_table(plan))),
        "All trials (CSV)": ("trials.csv", "text/csv", csv_text(plan["trials"])),
        "Configuration (JSON)": (
            "recommended.json",
            "application/json",
            _text(plan["recommended"]["config"]),
        ),
        "Report (HTML)": ("report.html", HTML, answer["report_html"]),
    }
    for column, (label, (name, mime, text)) in zip(st.columns(len(files)), files.items(), strict=True):
        column.download_button(
            label, text, name, mime, width="stretch", on_click="ignore", key=f"file_{name}"
        )
    _launch({str(item["engine"]): item for item in answer["exports"]})


@st.fragment
def _launch(exports: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the commands of the engine that is chosen. None is at first: what colours them keeps a browser busy for 0.4 s."""
    engine = st.pills(
        "Show how to launch it with", list(exports), format_func=NAMES.__getitem__, key="launch"
    )
    if engine is not None:
        _commands(exports[engine])


def _commands(item: Mapping[str, Any]) -> None:
    for warning in item["warnings"]:
        st.caption(f":material/warning: {warning}")
    language = "yaml" if item["file"].endswith((".yaml", ".yml")) else "bash"
    st.code(item["text"], language=language, height=220)
    st.download_button(
        f"Download {item['file']}",
        item["text"],
        item["file"],
        on_click="ignore",
        key=f"export_{item['engine']}",
    )


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
