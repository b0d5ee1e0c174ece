"""Builds an engine from a configuration: weights, adapters in host memory, captured graphs; tells its progress on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from engine import torchrun
from engine.adapter import AdapterSpec
from engine.blueprint import Blueprint, blueprint
from engine.communicator import Communicator
from engine.config import ServingConfig
from engine.errors import UserError
from engine.followers import Followers, FollowerTask, free_port
from engine.group_store import GroupStore
from engine.host_store import HostStore
from engine.model_shape import ModelShape
from engine.runner import DTYPES, Runner
from engine.weights import load_weights, random_weights

Progress = Callable[[str], None]


def device_for(config: ServingConfig, rank: int = 0) -> torch.device:
    """Return the device that a rank of a configuration's backend needs. Raises UserError when there is none."""
    if config.backend == "triton":
        if not torch.cuda.is_available():
            raise UserError(
                "backend 'triton' needs a GPU and none is visible; use backend 'reference' on a CPU"
            )
        if torch.cuda.device_count() < config.tp:
            raise UserError(f"tp={config.tp} needs as many GPUs, {torch.cuda.device_count()} are visible")
        return torch.device("cuda", rank)
    return torch.device("cpu")


def build_runner(
    config: ServingConfig,
    adapters: Mapping[str, AdapterSpec],
    *,
    seed: int = 0,
    progress: Progress = lambda _: None,
    register: bool = True,
    shape: ModelShape | None = None,
) -> Runner:
    """Build a runner. Weights come from `config.model` where that is a folder with safetensors, else they are random.

    register: pack all adapters into host memory; the profiler does without. shape: of a model that `config.model` only names.
    Raises UserError when something does not fit.
    """
    here = torchrun.world()
    if here is not None:
        here.check(config)
    blueprint(
        config, adapters, shape
    )  # what is wrong with the configuration itself is said before processes start
    device = device_for(config)
    if config.tp == 1:
        return _build(config, adapters, device, seed, progress, register, shape)
    task = FollowerTask(
        rank=0,
        config=config,
        adapters=adapters,
        seed=seed,
        address="env://" if here is not None else f"tcp://127.0.0.1:{free_port()}",
        register=register,
        shape=shape,
    )
    followers = Followers.start(task) if here is None else torchrun.gather(here, task)
    try:
        communicator = Communicator.join(0, config.tp, task.address, device)
        runner = _build(config, adapters, device, seed, progress, register, shape, communicator, followers)
        followers.await_ready()
    except BaseException:
        followers.close()
        raise
    assert isinstance(runner.store, HostStore)
    runner.store = GroupStore(runner.store, followers)
    return runner


def build_rank(task: FollowerTask) -> Runner:
    """Build the runner of another rank than the first."""
    config = task.config
    device = device_for(config, task.rank)
    communicator = Communicator.join(task.rank, config.tp, task.address, device)
    return _build(
        config, task.adapters, device, task.seed, lambda _: None, task.register, task.shape, communicator
    )


def _build(
    config: ServingConfig,
    adapters: Mapping[str, AdapterSpec],
    device: torch.device,
    seed: int,
    progress: Progress,
    register: bool,
    shape: ModelShape | None,
    communicator: Communicator | None = None,
    followers: Followers | None = None,
) -> Runner:
    plan = blueprint(config, adapters, shape)
    _check_memory(plan, device)
    folder = Path(config.model)
    dtype = DTYPES[config.dtype]
    rank = 0 if communicator is None else communicator.rank
    if folder.is_dir():
        progress(f"loading weights from {folder}")
        weights = load_weights(folder, plan.model, dtype, device, config.tp, rank)
    else:
        progress(f"drawing random weights of {plan.model.name}")
        weights = random_weights(plan.model, dtype, device, seed, config.tp, rank)
    runner = Runner(plan, weights, device, seed=seed, communicator=communicator, followers=followers)
    if register:
        for number, name in enumerate(runner.store.register_all(), start=1):
            if number % 50 == 0 or number == len(adapters):
                progress(f"packed {number} of {len(adapters)} adapters ({name})")
    for number, key in enumerate(runner.capture(), start=1):
        if number % 20 == 0:
            progress(f"captured {number} graphs ({key.tokens} tokens)")
    return runner


def _check_memory(plan: Blueprint, device: torch.device) -> None:
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    wanted = plan.memory.total_bytes - plan.memory.unused_bytes
    if wanted > free:
        raise UserError(
            f"the configuration wants {wanted / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} GB free of {total / 1e9:.1f} GB: "
            "lower gpu_memory_utilization or num_pages"
        )
