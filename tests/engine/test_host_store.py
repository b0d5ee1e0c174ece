"""Adapters in bounded host memory with disk behind it, and their loads, on the reference backend."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapter import AdapterSpec, spec_of_peft
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from engine.host_pages import Extent, HostPages, new_slab
from engine.runner import Runner
from engine.step import Load
from engine.weights import load_weights
from sim.loads import LoadQueue
from tests.engine.test_engine import World, check, requests
from tests.engine.tiny import save_adapter, save_model, tiny_model

CPU = torch.device("cpu")
TARGETS = {
    "f0": ("q_proj", "v_proj"),
    "f1": ("q_proj", "v_proj"),
    "f2": ("down_proj",),
    "f3": ("q_proj", "v_proj"),
}
WAIT_S = 60.0


class Store:
    """A runner on a tiny model: four adapters with files, four random ones, in a bounded store."""

    def __init__(self, folder, bound=None, specs=None, **changes):
        self.specs = specs or all_specs(folder)
        config = ServingConfig(
            model=str(folder / "model"),
            backend="reference",
            dtype="float32",
            max_num_seqs=4,
            max_num_batched_tokens=64,
            max_model_len=128,
            page_tokens=8,
            num_pages=200,
            **changes,
        )
        free = blueprint(config, self.specs)
        self.sizes = {name: footprint.copy_bytes for name, footprint in free.footprints.items()}
        bound = bound(self.sizes) if callable(bound) else bound
        self.plan = blueprint(config.with_changes(host_memory_bytes=bound), self.specs)
        weights = load_weights(folder / "model", self.plan.model, torch.float32, CPU)
        self.runner = Runner(self.plan, weights, CPU, seed=7)
        self.store, self.loader = self.runner.store, self.runner.loader
        self.names = list(self.store.register_all())
        self.store.check_integrity()

    def load(self, name, slot=0, spread=False):
        """Return a load into the pages from slot · 20 on; `spread`: every second one, from the last."""
        count = self.store[name].layout.num_pages
        pages = range(slot * 20, slot * 20 + count)
        if spread:
            pages = [slot * 20 + 2 * page for page in reversed(range(count))]
        return Load(name, slot, tuple(pages), self.store[name].num_bytes)

    def settle(self):
        """Wait for all loads; return the names that finished and what failed."""
        finished, failed = [], []
        until = time.monotonic() + WAIT_S
        while self.loader.num_loading:
            finished += self.loader.finished()
            failed += self.loader.failed()
            assert time.monotonic() < until
            time.sleep(1e-4)
        finished += self.loader.finished()
        failed += self.loader.failed()
        self.store.check_integrity()
        return finished, failed

    def on_gpu(self, load):
        """Return the pages that a load filled, in the adapter's order."""
        return self.runner.buffers.pool[list(load.pages)].clone()

    def where(self, name):
        return self.store.cache.where(self.store[name])


def all_specs(folder):
    specs = {name: spec_of_peft(name, folder / name, num_layers=2) for name in TARGETS}
    for number in range(4):
        specs[f"r{number}"] = AdapterSpec(
            name=f"r{number}", rank=8 + number, target_modules=("q_proj", "o_proj")
        )
    return specs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    model = tiny_model(seed=3)
    save_model(model, folder / "model")
    for seed, (name, targets) in enumerate(TARGETS.items()):
        save_adapter(model, folder / name, targets=targets, seed=seed)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy", dirs_exist_ok=True)


@pytest.fixture(scope="module")
def images(saved):
    """The page images of all adapters, from a store without a bound."""
    world = Store(saved)
    assert all(world.where(name) == "host" for name in world.names)
    assert world.sizes["f0"] > 2 * world.plan.geometry.page_bytes
    return {name: world.store.image(name) for name in world.names}


def expected(world, images, load):
    image = images[load.adapter].clone()
    table = world.store[load.adapter].layout.table(load.pages)
    image[0].view(torch.int32)[: len(table)] = torch.from_numpy(table)
    return image


def two(sizes):
    return 2 * sizes["f0"]


def test_the_first_adapters_fill_the_bound_and_the_others_stay_on_disk(saved):
    world = Store(saved, two)
    assert world.names == [*TARGETS, "r0", "r1", "r2", "r3"]
    assert [world.where(name) for name in ("f0", "f1", "f2", "f3")] == ["host", "host", "disk", "disk"]
    assert world.store.pinned_bytes <= two(world.sizes)


@pytest.mark.parametrize("spread", [False, True], ids=["neighbours", "spread"])
@pytest.mark.parametrize("bound", [None, two, lambda sizes: max(sizes.values())], ids=["all", "two", "one"])
def test_whatever_the_bound_the_same_bytes_arrive(saved, images, bound, spread):
    world = Store(saved, bound)
    rng = np.random.default_rng(0)
    for _ in range(6):
        names = rng.permutation(world.names).tolist()[:5]
        loads = [world.load(name, slot, spread) for slot, name in enumerate(names)]
        for load in loads:
            world.loader.start(load)
        finished, failed = world.settle()
        assert (sorted(finished), failed) == (sorted(names), [])
        for load in loads:
            assert torch.equal(world.on_gpu(load), expected(world, images, load)), load
            assert (
                world.loader.adapter_meta[load.slot, 0] == load.pages[0] * world.plan.geometry.units_per_page
            )
    assert bool(world.store.cache.evictions) == (bound is not None)


def test_the_least_recently_loaded_is_replaced(saved):
    world = Store(saved, two)
    for name in ("f0", "f3"):
        world.loader.start(world.load(name))
        world.settle()
    assert [world.where(name) for name in ("f0", "f1", "f3")] == ["host", "disk", "host"]


def test_more_loads_than_host_memory_holds_wait_for_each_other(saved):
    world = Store(saved, lambda sizes: max(sizes.values()))
    for slot, name in enumerate(world.names):
        world.loader.start(world.load(name, slot))
    finished, failed = world.settle()
    assert (sorted(finished), failed) == (sorted(world.names), [])


def test_random_adapters_depend_on_seed_and_name_alone(saved, images):
    specs = all_specs(saved)
    other = {name: specs[name] for name in ("r2", "f0", "r0")}
    world = Store(saved, specs=other)
    assert all(torch.equal(world.store.image(name), images[name]) for name in other)
    assert not torch.equal(images["r0"][0, 1000:2000], images["r1"][0, 1000:2000])


def test_the_simulator_sees_the_same_hits(saved):
    world = Store(saved, lambda sizes: 3 * sizes["f0"])
    host = world.plan.new_host_cache()
    simulated = LoadQueue(lambda num_bytes: 1.0, host)
    hits = []
    for name in np.random.default_rng(0).choice(world.names, 40).tolist():
        assert [world.where(name) for name in world.names] == [host.where(name) for name in world.names]
        hits.append(world.where(name) == "host")
        load = world.load(name)
        world.loader.start(load)
        assert world.settle() == ([name], [])
        simulated.add([load], 0.0)
        assert simulated.ended(inf) == [name]
    assert 5 < sum(hits) < 35
    assert simulated.disk_reads == len(hits) - sum(hits)


# ---- what can go wrong ----


def rewrite(path, change):
    """Change a file's tensors, but neither its size nor its time."""
    before = path.stat()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def set_nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")


FAULTS = {
    "gone": (lambda path: path.unlink(), "no such file"),
    "truncated": (lambda path: os.truncate(path, 500), "changed since"),
    "longer": (lambda path: os.truncate(path, 2**28), "changed since"),
    "not finite": (lambda path: rewrite(path, set_nan), "not finite"),
    "folder gone": (lambda path: shutil.rmtree(path.parent), "no such file"),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_a_load_that_cannot_be_read_is_told_without_paths_and_may_be_tried_again(
    folder, images, damage, message
):
    world = Store(folder, two)
    kept = shutil.copytree(folder / "f3", folder / "kept")
    damage(folder / "f3" / "adapter_model.safetensors")
    world.loader.start(world.load("f3", 0))
    world.loader.start(world.load("f2", 1))
    finished, failed = world.settle()
    assert finished == ["f2"] and [name for name, _ in failed] == ["f3"]
    reason = failed[0][1]
    assert message in reason and str(folder) not in reason and "\n" not in reason
    assert world.where("f3") == "disk"
    shutil.rmtree(folder / "f3", ignore_errors=True)
    shutil.copytree(kept, folder / "f3")  # with its times
    load = world.load("f3", 2)
    world.loader.start(load)
    assert world.settle() == (["f3"], [])
    assert torch.equal(world.on_gpu(load), expected(world, images, load))


def test_an_unknown_adapter_fails_its_load(saved):
    world = Store(saved)
    world.loader.start(Load("nobody", 0, (0,), 1))
    assert world.loader.failed() == [("nobody", "the adapter is not registered")]
    assert world.loader.num_loading == 0


def test_a_file_that_is_gone_before_the_start_is_an_error_even_if_it_is_not_read(folder):
    specs = all_specs(folder)
    (folder / "f3" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        Store(folder, two, specs)


def test_an_adapter_that_alone_exceeds_the_bound_is_refused(saved):
    with pytest.raises(
        UserError, match=r"adapter 'f0' takes \d+ bytes of host memory, host_memory_bytes=1000"
    ):
        Store(saved, 1000)


def test_refuses_to_prepare_what_can_never_be_served(folder):
    world = Store(folder, max_adapter_rank=16)
    path = folder / "f0" / "adapter_model.safetensors"
    random = AdapterSpec(name="x", rank=17)
    with pytest.raises(UserError, match="rank 17 exceeds 16"):
        world.store.prepare(random)
    with pytest.raises(UserError, match=r"ranks .* are not those"):
        world.store.prepare(replace(world.specs["f0"], rank=4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="truncated") as refusal:
        world.store.prepare(world.specs["f0"])
    assert refusal.value.path == path and str(folder) not in refusal.value.reason
    with path.open("wb") as file:
        file.truncate(2**40)  # a sparse terabyte: it is not read
    with pytest.raises(UserError, match="at most"):
        world.store.prepare(world.specs["f0"])
    world.store.check_integrity()
    with pytest.raises(UserError, match="rank 64 exceeds max_adapter_rank=16"):
        Store(
            folder,
            specs={"x": AdapterSpec(name="x", rank=64, target_modules=("q_proj",))},
            max_adapter_rank=16,
        )


# ---- while serving ----


def test_an_adapter_is_prepared_put_loaded_and_removed(saved, images):
    specs = all_specs(saved)
    world = Store(saved, specs={"f0": specs["f0"]}, max_adapters=4)
    prepared = world.store.prepare(specs["f1"])
    assert "f1" not in world.store and prepared.spec == specs["f1"]
    world.store.put("f1", prepared)
    load = world.load("f1", 3)
    world.loader.start(load)
    assert world.settle() == (["f1"], [])
    assert torch.equal(world.on_gpu(load), expected(world, images, load))
    world.store.remove("f1")
    assert "f1" not in world.store and len(list(world.store.cache)) == 1
    world.store.check_integrity()


def test_what_is_prepared_and_not_put_gives_its_memory_back(saved):
    specs = all_specs(saved)
    world = Store(saved, specs={"f0": specs["f0"]})
    world.store.discard(world.store.prepare(specs["f1"]))
    assert [adapter.spec.name for adapter in world.store.cache] == ["f0"]
    world.store.check_integrity()


def test_an_adapter_removed_while_it_loads_still_arrives_and_then_leaves(saved, images):
    world = Store(saved, two)
    loads = [world.load("f3", 0), world.load("f0", 1)]
    adapters = [world.store[load.adapter] for load in loads]
    wanted = [expected(world, images, load) for load in loads]
    for load in loads:
        world.loader.start(load)
        world.store.remove(load.adapter)
    finished, failed = world.settle()
    assert (sorted(finished), failed) == (["f0", "f3"], [])
    assert all(torch.equal(world.on_gpu(load), image) for load, image in zip(loads, wanted, strict=True))
    assert [world.store.cache.where(adapter) for adapter in adapters] == ["disk", "disk"]


def test_a_name_may_be_given_to_other_weights_while_the_old_ones_load(saved, images):
    world = Store(saved, two)
    old = world.load("f3", 0)
    wanted = expected(world, images, old)
    other = replace(world.specs["f1"], name="f3")
    prepared = world.store.prepare(other)
    world.loader.start(old)
    world.store.put("f3", prepared)
    new = world.load("f3", 1)
    world.loader.start(new)
    assert world.settle() == (["f3", "f3"], [])
    assert torch.equal(world.on_gpu(old), wanted)
    assert torch.equal(world.on_gpu(new)[1:], images["f1"][1:])
    assert world.store["f3"].spec is other


def test_adapters_are_prepared_from_threads_while_others_load(saved, images):
    world = Store(saved, lambda sizes: 3 * max(sizes.values()), max_adapters=8)
    specs = all_specs(saved)
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(world.store.prepare, replace(specs["f1"], name=f"n{i}")) for i in range(12)]
        for turn in range(10):
            names = [world.names[(turn + offset) % len(world.names)] for offset in range(4)]
            for slot, name in enumerate(names):
                world.loader.start(world.load(name, slot))
            while world.loader.num_loading:
                assert world.loader.failed() == []
            world.loader.finished()
        prepared = [future.result() for future in futures]
    world.store.check_integrity()
    for number, ready in enumerate(prepared):
        world.store.put(ready.spec.name, ready)
        load = world.load(ready.spec.name, number % 8)
        world.loader.start(load)
        assert world.settle() == ([ready.spec.name], [])
        assert torch.equal(world.on_gpu(load)[1:], images["f1"][1:])


def test_after_a_reset_nothing_is_pinned_and_loads_work_again(saved):
    world = Store(saved, two)
    for slot, name in enumerate(("f3", "f0", "f2", "r1")):
        world.loader.start(world.load(name, slot))
    world.loader.reset()
    world.store.check_integrity()
    assert world.loader.num_loading == 0 and world.loader.finished() == [] and world.loader.failed() == []
    assert not any(world.store.cache.is_pinned(adapter) for adapter in world.store.cache)
    world.loader.start(world.load("f3"))
    assert world.settle() == (["f3"], [])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return World("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("share", [1.0, 1.25])
def test_outputs_are_the_same_under_a_tight_bound(llama, share):
    footprints = llama.engine().blueprint.footprints
    largest = max(footprint.copy_bytes for footprint in footprints.values())
    pages = max(footprint.pages for footprint in footprints.values()) + 8
    engine = llama.engine(num_pages=pages, max_num_seqs=2, host_memory_bytes=int(share * largest))
    check(llama, engine, requests(16, seed=1))
    assert engine.runner.store.cache.evictions > 0
    engine.runner.store.check_integrity()


# ---- pages ----


def test_pages_are_neighbours_where_there_are_enough_and_runs_else():
    pages = HostPages()
    for count in (4, 6):
        pages.add(new_slab(count, 8, torch.float32, CPU))
    first = pages.allocate(3)
    assert first == (Extent(0, 0, 3),)
    assert pages.allocate(1) == (Extent(0, 3, 1),)  # the smallest run that is long enough
    assert pages.allocate(6) == (Extent(1, 0, 6),)
    assert pages.allocate(1) is None
    pages.release([Extent(1, 1, 2), Extent(1, 4, 1), *first])
    assert pages.allocate(5) == (Extent(0, 0, 3), Extent(1, 1, 2))
    pages.release([Extent(0, 0, 3), Extent(1, 1, 2)])
    pages.release([Extent(0, 3, 1)])
    pages.check_integrity([(Extent(1, 0, 1), Extent(1, 3, 1), Extent(1, 5, 1))])
    assert pages.allocate(4) == (Extent(0, 0, 4),)
