"""What the shipped profile says of the runs of `python -m engine profile --tp N` before they are made.

    python -m docs.measured.parallel_predictions N OUT.json


The table's steps of both models in every mode, by the same adapters and shapes, and the 70B model's bursts (8B serves whole traces: record_runs).
"""

import json
import sys

from docs.measured.many_gpus import LIMITS, PLANS
from docs.measured.tp2_bursts import burst
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.model_shape import load_model_shape
from engine.parallel_profile import DENSE, PREFILL_TOKENS, parallel_adapters
from engine.provenance import provenance
from engine.step_profile import MadeUpStep, made_up_shape
from sim.costs import costs_for
from sim.profile import find_profile, load_profile
from sim.simulate import simulate


def steps(profile, model, tp):
    """Yield the table's rows with their predicted microseconds."""
    plan = PLANS[model]
    adapters = parallel_adapters(plan, tp)
    for mode in plan.modes:
        config = ServingConfig(
            model=model,
            tp=tp,
            lora_sharding=mode.lora_sharding,
            collectives=mode.collectives,
            **LIMITS[model],
        )
        dense_only = mode.lora_sharding != "block_diagonal"
        known = {name: spec for name, spec in adapters.items() if spec.kind == "lora" or not dense_only}
        footprints = blueprint(config.with_changes(max_model_len=4096), known).footprints
        costs = costs_for(profile, config)
        for group in (None, *dict.fromkeys(name.rpartition("-")[0] for name in known)):
            names = [None if group is None else f"{group}-{row % plan.adapters}" for row in range(64)]
            cases = {f"decode {batch}": batch for batch in plan.batches} | {"prefill": 0}
            for case, batch in cases.items():
                wanted = MadeUpStep(decodes=tuple((plan.kv_tokens, name) for name in names[:batch]))
                if not batch:
                    wanted = MadeUpStep(chunks=((0, PREFILL_TOKENS, names[0]),))
                shape = made_up_shape(wanted, footprints)
                sharding = "base" if group is None else mode.lora_sharding
                if group is not None and group.startswith(DENSE):
                    sharding = mode.dense_label
                yield {
                    "model": model,
                    "lora_sharding": sharding,
                    "collectives": mode.collectives,
                    "group": group,
                    "case": case,
                    "predicted_us": round(costs.step_s(shape) * 1e6, 1),
                    "provenance": costs.provenance(shape),
                }


def bursts(profile, model, tp):
    """Yield the bursts of the modes that serve them."""
    vocabulary = load_model_shape(model).vocab_size
    plan = PLANS[model]
    everyone = parallel_adapters(plan, tp)
    for mode in plan.modes[: plan.bursts]:
        groups = [None, f"{DENSE}16"] if mode == plan.modes[0] else [f"{DENSE}16"]
        groups += ["bd16x1", "bd16x2"] if mode.lora_sharding == "block_diagonal" else []
        for group in groups:
            config = ServingConfig(
                model=model,
                tp=tp,
                lora_sharding=mode.lora_sharding,
                collectives=mode.collectives,
                **LIMITS[model],
            )
            trace = burst(vocabulary, group is not None, plan.requests, plan.adapters)
            specs = {f"a{n}": everyone[f"{group or DENSE + '16'}-{n}"] for n in range(plan.adapters)}
            renamed = {name: type(spec)(**_fields(spec) | {"name": name}) for name, spec in specs.items()}
            result = simulate(trace, config, costs_for(profile, config), adapters=renamed)
            yield {
                "model": model,
                "lora_sharding": mode.lora_sharding,
                "collectives": mode.collectives,
                "group": group,
                "predicted_rps": round(result.metrics["throughput_rps"], 2),
            }


def _fields(spec):
    return {name: getattr(spec, name) for name in spec.__slots__}


def main():
    """Write the predictions."""
    tp, out = int(sys.argv[1]), sys.argv[2]
    profile = load_profile(find_profile(ServingConfig()))
    rows = [row for model in PLANS for row in steps(profile, model, tp)]
    data = {
        "tp": tp,
        "commit": provenance()["commit"],
        "steps": rows,
        "bursts": list(bursts(profile, "llama-3.1-70b", tp)),
    }
    with open(out, "w", encoding="utf-8") as file:
        file.write(
            json.dumps(data).replace('{"model"', '\n{"model"').replace('{"lora_sh', '\n{"lora_sh') + "\n"
        )


if __name__ == "__main__":
    main()
