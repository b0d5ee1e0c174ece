"""The published traces, for the simulator too."""

from tests.traces.conftest import shared_traces

__all__ = ["shared_traces"]
