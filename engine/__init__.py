"""The multi-LoRA engine: torch-free decisions (scheduler, pool, residency, router) and their execution on a GPU."""
