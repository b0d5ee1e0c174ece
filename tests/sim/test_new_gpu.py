"""A GPU that nobody knows, from its description and its profile: no code is edited (docs/calibration.md)."""

import json

import pytest

from engine.budget import gpu_spec, plan_memory
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import load_model_shape
from sim.__main__ import main
from sim.costs import costs_for
from sim.profile import load_profile
from tests.sim import synthetic
from tests.sim.constant import trace_of
from traces import save

SPEC = {
    "name": "gh200",
    "memory_bytes": 101_500_000_000,
    "memory_bandwidth_bytes_per_s": 3.5e12,
    "bf16_flops_per_s": 7.9e14,
    "host_bandwidth_bytes_per_s": 3.8e11,
    "link_bandwidth_bytes_per_s": 4.5e11,
}


@pytest.fixture
def gpu(tmp_path):
    path = tmp_path / "gh200.json"
    path.write_text(json.dumps(SPEC))
    return str(path)


def test_a_described_gpu_is_profiled_fitted_and_simulated(gpu, tmp_path, capsys):
    profile = tmp_path / "llama-3.1-8b.gh200.json"
    told = {"gpu": SPEC["name"], "gpu_spec": SPEC}
    profile.write_text(json.dumps(synthetic.profile_json(tps=(1,)) | told))
    config = ServingConfig(gpu=gpu)
    costs = costs_for(load_profile(profile), config)
    assert costs.setting.gpu is None  # the profile is of this very GPU: nothing is scaled
    assert costs.provenance(synthetic.shape(rows=8)) != "extrapolated"
    other = costs_for(load_profile(profile), ServingConfig())
    assert other.setting.gpu == "h200"  # scaled, by both descriptions
    assert other.step_s(synthetic.shape(rows=8)) < costs.step_s(synthetic.shape(rows=8))
    assert other.provenance(synthetic.shape(rows=8)) == "extrapolated"
    pages = plan_memory(config, load_model_shape(config.model)).num_pages
    assert pages < plan_memory(ServingConfig(), load_model_shape(config.model)).num_pages
    save(trace_of(*((0.1 * i, 50, 20) for i in range(10))), tmp_path / "t.jsonl")
    (tmp_path / "c.json").write_text(json.dumps({"gpu": gpu}))
    files = ["--trace", tmp_path / "t.jsonl", "--config", tmp_path / "c.json", "--profile", profile]
    assert main(["run", *map(str, files), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["requests"] == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, "name='../x' must be of"),
        ({"memory_bytes": 0}, "memory_bytes=0 must be a number above 0"),
        ({"bf16_flops_per_s": True}, "bf16_flops_per_s=True must be"),
        ({"extra": 1}, "a GPU must be an object of name, memory_bytes"),
    ],
)
def test_a_bad_description_is_told_by_its_place(tmp_path, change, message):
    path = tmp_path / "g.json"
    path.write_text(json.dumps(SPEC | change))
    with pytest.raises(UserError, match=f"g.json: {message}"):
        gpu_spec(str(path))


def test_a_profile_of_nobodys_gpu_is_told(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(synthetic.profile_json(tps=(1,)) | {"gpu": "gh200"}))
    with pytest.raises(UserError, match=r"p.json: gpu 'gh200' is not known"):
        load_profile(path)
    path.write_text(json.dumps(synthetic.profile_json(tps=(1,)) | {"gpu_spec": {}}))
    with pytest.raises(UserError, match=r"p.json: gpu_spec: a GPU must be an object"):
        load_profile(path)


def test_an_unknown_name_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"known: .*h200.*docs/calibration.md"):
        gpu_spec("gh200")
    with pytest.raises(UserError, match=r"none.json: cannot be read"):
        gpu_spec(str(tmp_path / "none.json"))
