"""Which launches start early."""

import pytest
import torch

from kernels.launch import launch_options


@pytest.mark.parametrize(
    ("device", "capability", "options"),
    [
        ("cpu", None, {"PDL": False}),
        ("cuda", (8, 9), {"PDL": False}),
        ("cuda", (9, 0), {"PDL": True, "launch_pdl": True}),
        ("cuda", (10, 0), {"PDL": True, "launch_pdl": True}),
    ],
)
def test_launches_start_early_from_hopper_on(monkeypatch, device, capability, options):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert launch_options(torch.device(device)) == options
