"""The multi-LoRA engine: torch-free decisions (scheduler, pool, residency, router) and their execution on a GPU."""

from engine.compiled import find_compiled

find_compiled(__name__, __path__)
