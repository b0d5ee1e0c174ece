"""The command `python -m engine make-dynamic`."""

from pathlib import Path
from typing import Annotated

import typer

from engine.errors import UserError
from engine.model_shape import load_model_shape


def make_dynamic(
    lora: Annotated[
        list[Path], typer.Option(help="PEFT folder of one expert; given once for each, in order.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Annotated[str, typer.Option(help="A catalogue name or a path to a config.json.")] = "llama-3.1-8b",
    router: Annotated[Path | None, typer.Option(help="safetensors file of the router.")] = None,
    random_router: Annotated[
        int | None, typer.Option(min=0, help="Draw the router instead: N(0, 1 / in), from this seed.")
    ] = None,
    style: Annotated[str, typer.Option(help="switch: one router. layerwise: one a layer.")] = "switch",
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 2,
    renormalise: Annotated[bool, typer.Option(help="Divide a token's gates by their sum.")] = False,
) -> None:
    """Make a dynamic adapter of LoRAs of the same base and a router (docs/switch.md)."""
    if style not in ("switch", "layerwise"):
        raise UserError(f"--style {style!r} must be switch or layerwise.")
    if len(lora) < 2:
        raise UserError("--lora must be given at least twice: an adapter of one expert is that LoRA.")
    from engine.combine_experts import RouterSource, combine
    from engine.dynamic_adapter_files import save_dynamic_adapter

    adapter = combine(
        lora,
        RouterSource(file=router, seed=random_router),
        load_model_shape(model),
        name=out.name,
        top_k=top_k,
        router="switch" if style == "switch" else "layerwise",
        renormalise=renormalise,
    )
    print(save_dynamic_adapter(adapter, out))
