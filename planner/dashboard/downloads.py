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
    exports = answer["exports"]
    st.markdown("**Launch it** with")
    for tab, item in zip(st.tabs([NAMES[item["engine"]] for item in exports]), exports, strict=True):
        with tab:
            for warning in item["warnings"]:
                st.caption(f":material/warning: {warning}")
            st.code(
                item["text"],
                language="yaml" if item["file"].endswith((".yaml", ".yml")) else "bash",
                height=220,
            )
            st.download_button(
                f"Download {item['file']}",
                item["text"],
                item["file"],
                on_click="ignore",
                key=f"export_{item['engine']}",
            )


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
