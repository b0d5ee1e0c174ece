"""What `plan` does with its options: search, explain or verify; print; write the folder; say how it ended."""

from __future__ import annotations

import hashlib
import json
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from engine.adapter import load_adapters
from engine.budget import gpu_spec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import load_model_shape
from planner import exports
from planner.explain import explain, print_explanation
from planner.html_report import html_report
from planner.options import PlanOptions, numbers
from planner.output import OutputFolder, check_folder, plan_files
from planner.plan import Plan
from planner.prices import load_prices
from planner.progress import ProgressReport
from planner.recommend import Question, recommend
from planner.report import Commands, print_kinds, print_plan, slo_text
from planner.space import TP_DEGREES, Space
from planner.verify import print_verification, verify
from planner.vllm_command import VllmRequest, plan_vllm
from planner.workers import cores, preload
from planner.workload import max_model_len
from sim.profile import Profile, find_profile, load_profile
from traces import Trace, load

INTERRUPTED = 130


def run(options: PlanOptions) -> int:
    """Do what the options ask; return the exit code."""
    slo = options.slo()
    if options.output_dir is not None:
        check_folder(options.output_dir, overwrite=options.overwrite)
    if options.verify is not None:
        return _verify(options)
    assert options.trace is not None
    if options.engine == "ours" and options.cluster is None:
        preload(options.workers or cores())
    trace = load(options.trace, options.raw_arrivals).scaled(options.rate_scale)
    if options.engine == "vllm":
        return plan_vllm(VllmRequest.of(options, trace, slo))
    if options.explain is not None:
        return _explain(options, trace)
    if len(options.kinds) > 1:
        return _kinds(options, trace)
    return _plan(options, trace)


def _plan(options: PlanOptions, trace: Trace) -> int:
    question = question_of(options, trace, options.kinds[0])
    wanted = options.exports()
    _say_defaults(options, question)
    with ExitStack() as stack:
        folder = None
        if options.output_dir is not None:
            request = request_of(options, question)
            folder = stack.enter_context(
                OutputFolder(options.output_dir, request, overwrite=options.overwrite)
            )
            if folder.journal.answers and not options.quiet:
                typer.echo(
                    f"{options.output_dir}: {folder.journal.answers} answers are there already", err=True
                )
        with ProgressReport(quiet=options.quiet) as progress:
            answer = recommend(
                question,
                workers=options.workers,
                timeout_s=options.timeout_s,
                progress=progress,
                journal=None if folder is None else folder.journal,
                cluster=options.cluster,
            )
        exported = _exports(answer, wanted, question, options.trace)
        if folder is not None and not answer.interrupted:
            files = plan_files(answer) | {f"exports/{item.name}": item.text for item in exported}
            folder.finish(answer.to_json(), files | {"report.html": html_report(answer)})
    _show(answer, exported, options)
    if answer.interrupted:
        return INTERRUPTED
    if answer.recommended is None and not options.quiet:
        typer.echo(answer.why_not, err=True)
    return 0 if answer.recommended is not None else 1


def _kinds(options: PlanOptions, trace: Trace) -> int:
    """Plan for one kind of GPU after the other, and compare."""
    questions = {kind: question_of(options, trace, kind) for kind in options.kinds}
    _say_defaults(options, questions[options.kinds[0]])
    answers: dict[str, Plan] = {}
    for kind, question in questions.items():
        if not options.quiet:
            typer.echo(f"planning for {kind}", err=True)
        with ProgressReport(quiet=options.quiet) as progress:
            answers[kind] = recommend(
                question, workers=options.workers, timeout_s=options.timeout_s, progress=progress
            )
        if answers[kind].interrupted:
            break
    if options.form == "json":
        plans = {kind: answer.to_json() for kind, answer in answers.items()}
        typer.echo(json.dumps({"by_gpu": plans}, indent=2, allow_nan=False))
    else:
        print_kinds(answers)
    if any(answer.interrupted for answer in answers.values()):
        return INTERRUPTED
    return 0 if any(answer.recommended is not None for answer in answers.values()) else 1


def _explain(options: PlanOptions, trace: Trace) -> int:
    assert options.explain is not None
    config = ServingConfig.load(options.explain)
    profile = load_profile(options.profile or find_profile(config))
    question = Question(
        trace=trace,
        space=Space(gpus=config.gpus, tp=(config.tp,), base=config),
        slo=options.slo(),
        profile=profile,
        adapters=None if options.adapters is None else load_adapters(options.adapters),
        prices=load_prices(options.prices),
        seed=options.seed,
    )
    _say_defaults(options, question)
    explanation = explain(question, config)
    if options.form == "json":
        typer.echo(json.dumps(explanation.to_json(), indent=2, allow_nan=False))
    else:
        print_explanation(explanation)
    return 0 if explanation.choice.meets_slo else 1


def _verify(options: PlanOptions) -> int:
    assert options.verify is not None
    verification = verify(options.verify, options.config, options.profile)
    if options.form == "json":
        typer.echo(json.dumps(verification.to_json(), indent=2, allow_nan=False))
    else:
        print_verification(verification)
    return 0 if verification.within else 1


def _say_defaults(options: PlanOptions, question: Question) -> None:
    if options.default_slo and not options.quiet:
        typer.echo(f"no SLO given, so the defaults: {slo_text(question.slo)}", err=True)


def question_of(options: PlanOptions, trace: Trace, kind: str) -> Question:
    """Return what is asked for one kind of GPU. Raises UserError."""
    gpu_spec(kind)
    shape = load_model_shape(options.model)
    profile = load_profile(options.profile or find_profile(ServingConfig(model=options.model, gpu=kind)))
    return Question(
        trace=trace,
        space=_space(options, trace, profile, kind, max_model_len(trace, shape)),
        slo=options.slo(),
        profile=profile,
        adapters=None if options.adapters is None else load_adapters(options.adapters),
        objective=options.objective,
        prices=load_prices(options.prices),
        show=options.top,
        seed=options.seed,
    )


def _space(options: PlanOptions, trace: Trace, profile: Profile, kind: str, length: int) -> Space:
    degrees = TP_DEGREES if options.tp is None else numbers("--tp", options.tp)
    if options.tp is not None:
        for degree in degrees:
            load_model_shape(options.model).validate_tp(degree)
    assert options.gpus is not None
    return Space(
        gpus=options.gpus,
        tp=degrees,
        max_num_seqs=numbers("--max-num-seqs", options.max_num_seqs),
        max_num_batched_tokens=numbers("--max-num-batched-tokens", options.max_num_batched_tokens),
        lora_sharding=options.shardings(),
        policies=options.policies(),
        routing=options.routing(),
        base=ServingConfig(
            model=options.model,
            gpu=kind,
            max_model_len=length,
            page_tokens=profile.page_tokens,
            graph_max_tokens=profile.graph_max_tokens,
        ),
    )


def request_of(options: PlanOptions, question: Question) -> dict[str, Any]:
    """Return what is asked, resolved: equal requests have equal plans."""
    slo = question.slo
    specs = repr(sorted(question.specs.items()))
    return {
        "trace": {
            "file": str(options.trace),
            "requests": len(question.trace),
            "sha256": question.trace.digest(),
        },
        "adapters": {
            "file": None if options.adapters is None else str(options.adapters),
            "sha256": _sha(specs),
        },
        "profile": {"source": question.profile.source, "sha256": _file_sha(question.profile.source)},
        "slo": {
            name: getattr(slo, name) for name in ("ttft_s", "tpot_s", "e2e_s", "percentile", "attainment")
        },
        "objective": question.objective,
        "space": question.space.to_json(),
        "prices": dict(question.prices),
        "top": question.show,
        "seed": question.seed,
        "export": list(options.exports()),
    }


def _exports(
    answer: Plan, wanted: tuple[str, ...], question: Question, trace: Path | None
) -> list[exports.Export]:
    if answer.recommended is None:
        return []
    return [exports.export(name, answer.recommended.config, question.specs, str(trace)) for name in wanted]


def _show(answer: Plan, exported: list[exports.Export], options: PlanOptions) -> None:
    if options.form == "json":
        data = answer.to_json()
        if exported:
            data["exports"] = {item.engine: item.text for item in exported}
        typer.echo(json.dumps(data, indent=2, allow_nan=False))
        return
    print_plan(answer, _commands(answer, options))
    for item in exported:
        typer.echo(f"\n--- {item.name}\n{item.text}", nl=False)


def _commands(answer: Plan, options: PlanOptions) -> Commands | None:
    if answer.recommended is None:
        return None
    where = options.output_dir or Path("plan-output")

    def flags(name: str) -> list[str]:
        given = ["--trace", str(options.trace), "--config", str(where / f"{name}.json")]
        return given if options.adapters is None else [*given, "--adapters", str(options.adapters)]

    simulate = ["python", "-m", "sim", "run", *flags("recommended")]
    if options.profile is not None:
        simulate += ["--profile", str(options.profile)]
    hint = "" if options.output_dir is not None else "   # after --output-dir plan-output"
    replay = ["python", "-m", "engine", "replay", *flags("recommended"), "--out", "RUN"]
    verification = ["plan", "--verify", "RUN", "--config", str(where / "recommended.json")]
    return Commands(shlex.join(simulate) + hint, f"{shlex.join(replay)} && {shlex.join(verification)}")


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sha(source: str) -> str | None:
    try:
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
