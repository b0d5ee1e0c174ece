"""Search over serving configurations: what to run on how many GPUs, and what it will do."""
