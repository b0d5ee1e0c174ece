"""Which configuration a page is about: one of the plan's, or the engine's defaults where nothing has been planned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from engine.config import ServingConfig
from planner.chart_rows import choices, shape
from planner.dashboard.answers import peek
from planner.dashboard.state import Current, told_in_place
from planner.default_config import default_config

DEFAULTS = "Engine defaults"


def choose_config(current: Current, page: str) -> ServingConfig:
    """Return the configuration to look at: the plan's recommendation unless another is chosen."""
    answer = peek(current.task("plan"))
    named = {} if answer is None else choices(answer["plan"])
    if not named:
        st.caption(
            "Nothing is planned for this scenario yet (page Plan): these are the engine's defaults on all GPUs."
        )
        with told_in_place():
            return default_config(current.scenario, current.trace)
    name = st.selectbox(
        "Configuration",
        list(named),
        format_func=lambda known: f"{known}: {words(named[known]['config'])}" if known in named else known,
        key=f"choice_{page}",
    )
    return ServingConfig.from_json(named[name]["config"])


def words(config: Mapping[str, Any]) -> str:
    """Return a configuration in a line."""
    gpus = config["tp"] * config["replicas"]
    return (
        f"{gpus} × {config['gpu'].upper()}, {shape(config)}, {config['max_num_seqs']} requests at once, "
        f"{config['max_num_batched_tokens']} tokens a step"
    )
