"""A configuration to look at where nothing has been planned yet: the engine's defaults on as few GPUs a replica as hold the model."""

from __future__ import annotations

from engine.adapter import adapters_of_trace
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import load_model_shape
from planner.scenario import Scenario
from planner.space import TP_DEGREES
from planner.workload import max_model_len
from traces import Trace


def default_config(scenario: Scenario, trace: Trace) -> ServingConfig:
    """Return defaults that can run on the scenario's GPUs. Raises UserError, the reason for the most GPUs a replica, where none can."""
    base = ServingConfig(
        model=scenario.model,
        gpu=scenario.gpu,
        max_model_len=max_model_len(trace, load_model_shape(scenario.model)),
    )
    adapters, reason = adapters_of_trace(trace.adapters), UserError(f"gpus={scenario.gpus} is too few")
    for tp in (degree for degree in TP_DEGREES if degree <= scenario.gpus):
        try:
            config = base.with_changes(tp=tp, replicas=scenario.gpus // tp)
            blueprint(config, adapters)
            return config
        except UserError as error:
            reason = error
    raise reason
