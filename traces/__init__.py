"""Traces: what is asked (requests, adapters) and what was observed (run records, in `traces.run_record`)."""

from traces.columns import BASE_MODEL, TraceColumns, TraceRequest
from traces.errors import TraceError
from traces.native import load, save
from traces.trace import Trace, sample_path

__all__ = ["BASE_MODEL", "Trace", "TraceColumns", "TraceError", "TraceRequest", "load", "sample_path", "save"]
