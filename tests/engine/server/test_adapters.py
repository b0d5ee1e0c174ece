"""Adapters while the server runs: loading, replacing and unloading under traffic, and everything that may be wrong with one."""

import json
import os
import threading

import httpx2 as httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.server.world import running
from tests.engine.tiny import save_adapter

PROMPT = "Tell me"


@pytest.fixture(scope="module")
def process(world):
    with running(world.server(limits={"max_adapters": 6, "max_adapter_bytes": 200_000})) as server:
        yield server


@pytest.fixture
def http(process):
    with httpx.Client(base_url=process.url, timeout=30) as client:
        yield client


def load(http, name, path, **options):
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **options})


def unload(http, name):
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def text(process, model, count=8):
    answer = process.client().completions.create(model=model, prompt=PROMPT, max_tokens=count, temperature=0)
    return answer.choices[0].text


def test_an_adapter_comes_and_goes(world, process, http):
    answer = load(http, "new", "green")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert text(process, "new") == world.text("green", PROMPT, 8)
    cards = {card.id: card.model_dump() for card in process.client().models.list()}
    assert (cards["new"]["root"], cards["new"]["parent"]) == ("green", "tiny-base")
    assert "already been loaded" in load(http, "new", "green").json()["error"]["message"]
    answer = unload(http, "new")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    with pytest.raises(openai.NotFoundError):
        text(process, "new")
    assert unload(http, "new").status_code == 404
    names = process.inspect(lambda engine: set(engine.scheduler.residency.footprints))
    assert names == {"red", "blue"}


def test_replacing_switches_new_requests_and_leaves_running_ones_alone(world, process, http):
    load(http, "mine", "red").raise_for_status()
    client = process.client()
    with client.completions.create(
        model="mine", prompt=PROMPT, max_tokens=200, temperature=0, stream=True
    ) as stream:
        pieces = [next(iter(stream)).choices[0].text]
        load(http, "mine", "green", load_inplace=True).raise_for_status()
        assert text(process, "mine") == world.text("green", PROMPT, 8)
        pieces += [chunk.choices[0].text for chunk in stream]
    assert "".join(pieces) == world.text("red", PROMPT, 200)
    unload(http, "mine").raise_for_status()
    assert process.leaked_pages() == 0
    assert process.inspect(lambda engine: len(engine.runner.store)) == 2


def test_traffic_goes_on_while_adapters_come_and_go(world, process, http):
    expected = {model: world.text(model, PROMPT, 8) for model in ("red", "blue", "tiny-base")}
    done, wrong = threading.Event(), []

    def ask(model):
        while not done.is_set():
            if (got := text(process, model)) != expected[model]:
                wrong.append((model, got))

    threads = [threading.Thread(target=ask, args=(model,)) for model in expected]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            load(http, "guest", "green").raise_for_status()
            assert text(process, "guest") == world.text("green", PROMPT, 8)
            load(http, "guest", "blue", load_inplace=True).raise_for_status()
            assert text(process, "guest") == expected["blue"]
            unload(http, "guest").raise_for_status()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert process.leaked_pages() == 0


def refused(process, http, path, status=400, name="bad"):
    answer = load(http, name, path)
    assert answer.status_code == status, answer.text
    message = answer.json()["error"]["message"]
    assert "/" not in message.replace("and/or", "")
    assert text(process, "red")
    assert process.inspect(lambda engine: set(engine.scheduler.residency.footprints)) == {"red", "blue"}
    return message


def broken(world, target, change):
    folder = world.copy_adapter("green", target)
    weights = folder / "adapter_model.safetensors"
    change(weights)
    return target


def change_tensor(change):
    def apply(weights):
        tensors = load_file(weights)
        name = sorted(tensors)[0]
        tensors[name] = change(tensors[name])
        save_file(tensors, weights)

    return apply


def huge(tensor):
    return torch.full_like(tensor, 3e38)


def not_a_number(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: os.truncate(weights, weights.stat().st_size - 100), "truncated or corrupt"),
        (lambda weights: os.truncate(weights, 4), "truncated or corrupt"),
        (lambda weights: os.truncate(weights, 0), "truncated or corrupt"),
        (lambda weights: weights.write_bytes(b"\xff" * 1000), "truncated or corrupt"),
        (lambda weights: weights.write_bytes(b"PK\x03\x04" * 100), "truncated or corrupt"),
        (change_tensor(lambda tensor: tensor[:, :-1].contiguous()), "has shape"),
        (change_tensor(lambda tensor: tensor[:-1].contiguous()), "has shape"),
        (change_tensor(not_a_number), "not finite"),
        (change_tensor(lambda tensor: tensor.to(torch.int32)), "only 16-bit and wider floats"),
        (lambda weights: weights.write_bytes(b"0" * 200_001), "at most 200000 are allowed"),
        (lambda weights: weights.rename(weights.with_suffix(".bin")), "no adapter_model.safetensors"),
        (lambda weights: weights.with_name("adapter_config.json").write_text("{"), "not JSON"),
        (lambda weights: weights.with_name("adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda weights: weights.with_name("adapter_config.json").write_text(" " * 2**20 + "{}"), "bytes"),
    ],
)
def test_an_adapter_that_is_broken_is_refused_and_harms_nobody(world, process, http, change, said):
    path = broken(world, "broken-copy", change)
    try:
        status = 404 if "no adapter_" in said else 400
        assert said in refused(process, http, path, status)
    finally:
        for file in (world.adapter_dir / path).iterdir():
            file.unlink()


def test_an_adapter_of_another_shape_or_a_rank_too_large_is_refused(world, process, http):
    save_adapter(world.model, world.adapter_dir / "wide", rank=128, targets=("q_proj",))
    assert "128" in refused(process, http, "wide")
    config = json.loads((world.copy_adapter("green", "liar") / "adapter_config.json").read_text())
    (world.adapter_dir / "liar" / "adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    assert "has shape" in refused(process, http, "liar")


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../x",
        "green/../../x",
        "/etc",
        "/",
        "a\0b",
        "outside-link",
        "outside-link/x",
        "weights-link",
        ".",
    ],
)
def test_there_is_no_way_out_of_the_folder(world, process, http, path, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    for file in (world.adapter_dir / "green").iterdir():
        (outside / file.name).write_bytes(file.read_bytes())
    link = world.adapter_dir / "outside-link"
    inner = world.copy_adapter("green", "weights-link") / "adapter_model.safetensors"
    inner.unlink()
    link.symlink_to(outside)
    inner.symlink_to(outside / "adapter_model.safetensors")
    try:
        refused(process, http, path, 404 if path == "." else 400)
    finally:
        link.unlink()
        inner.unlink()


@pytest.mark.parametrize("path", ["nothing", "x" * 5000, "green/adapter_config.json"])
def test_what_is_not_there_is_a_404(process, http, path):
    assert "no adapter" in refused(process, http, path, 404)


@pytest.mark.parametrize("name", ["a b", "x#1", "../x", "a\nb", "x" * 129, "é", "tiny-base"])
def test_names_are_held_to_letters_and_a_length(process, http, name):
    assert load(http, name, "green").status_code == 400
    assert text(process, "red")


def test_there_is_a_most_number_of_adapters(process, http):
    for number in range(4):
        load(http, f"many-{number}", "green").raise_for_status()
    assert "most adapters" in load(http, "many-4", "green").json()["error"]["message"]
    load(http, "many-3", "blue", load_inplace=True).raise_for_status()
    for number in range(4):
        unload(http, f"many-{number}").raise_for_status()


def test_without_a_folder_no_adapter_is_loaded(world):
    with (
        running(world.server(options={"adapter_dir": None})) as process,
        httpx.Client(base_url=process.url) as http,
    ):
        assert load(http, "x", "green").status_code == 403
        assert text(process, "red") == world.text("red", PROMPT, 8)


def test_files_removed_after_registration_harm_only_their_own_requests(world):
    """Host memory has room for one adapter of three, so that a load must go to the disk again."""
    from engine.blueprint import Blueprint

    folders = [world.copy_adapter("green", f"copy-{number}") for number in range(3)]
    pages = 0

    def look(engine):
        plan: Blueprint = engine.blueprint
        return max(f.pages for f in plan.footprints.values()) * plan.geometry.page_bytes

    with running(world.server()) as probe:
        pages = probe.inspect(look)
    server = world.server(adapters=(), host_memory_bytes=pages, num_pages=40, max_adapters=2)
    with running(server) as process, httpx.Client(base_url=process.url, timeout=30) as http:
        for number in range(3):
            load(http, f"copy-{number}", f"copy-{number}").raise_for_status()
        expected = world.text("green", PROMPT, 8)
        for number in (0, 1, 2, 0):
            assert text(process, f"copy-{number}") == expected
        for file in folders[1].iterdir():
            file.unlink()
        for number in (2, 0, 2, 0):
            assert text(process, f"copy-{number}") == expected
        with pytest.raises(openai.InternalServerError) as caught:
            text(process, "copy-1")
        assert caught.value.status_code == 503
        assert "cannot be loaded" in caught.value.body["message"]
        assert str(world.folder) not in caught.value.body["message"]
        assert text(process, "copy-2") == expected
        unload(http, "copy-1").raise_for_status()
        assert process.leaked_pages() == 0
