"""How networks are run changes nothing that is computed; precision, who is waited for."""
import os
import signal

import pytest
import torch

from common import collect
from test_faults import begin, wait_for
from test_processes import find_ranks


def test_bf16_is_of_the_forward_passes_alone(stage):
    """Loss and drawing change a little and stay float32; so do parameters and gradients."""
    torch.manual_seed(0)
    net = stage(1).DiT(16, 4, 16, 1, 8)
    for p in net.parameters():                             # the zeros of the start let nothing out
        torch.nn.init.normal_(p, std=0.1)
    x, c = collect(stage(1).draw_toy(40, 16, 0, "val")).batch()
    t, eps = stage(1).draw_noise(x, stage(1).seeded("cpu", 1))
    found = []
    for half in (False, True):
        if half:
            net.forward = torch.autocast("cpu", torch.bfloat16)(net.forward)   # as in build_proxy
        net.zero_grad()
        L = stage(1).flow_loss(net, x, c, t, eps)
        L.sum().backward()
        assert {L.dtype} | {p.grad.dtype for p in net.parameters()} == {torch.float32}
        found.append((L.detach(), stage(1).sample(net, c, eps, 2)))
    for whole, half in zip(*found):
        assert half.dtype == torch.float32 and not torch.equal(whole, half)
        assert (whole - half).abs().max() < 0.03 * whole.abs().max()


@pytest.mark.parametrize("flags,supported", [([], True), ([], False), (["--fp32"], True)])
def test_bf16_is_on_where_the_gpu_has_it_and_fp32_was_not_asked_for(stage, monkeypatch, flags,
                                                                    supported):
    asked = []
    monkeypatch.setattr(stage(1).DiT, "to", lambda net, device: net)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda **how: asked.append(how) or supported)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: lambda forward: (kind, dtype))
    net = stage(1).build_proxy(stage(1).parse_args(flags), torch.device("cuda"))
    half = supported and not flags
    assert vars(net).get("forward") == (("cuda", torch.bfloat16) if half else None)
    assert asked == [{"including_emulation": False}]


@pytest.mark.parametrize("name,group", [("TORCHELASTIC_RUN_ID", ["group"]),
                                        ("SLURM_JOB_ID", [])])
def test_a_group_is_made_under_torchrun_alone_after_the_device_is_chosen(
        stage, tmp_path, monkeypatch, name, group):
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda k: made.append(f"device {k}"))
    monkeypatch.setattr(stage(1).dist, "init_process_group", lambda **_: made.append("group"))
    for variable, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "3", name: "x"}.items():
        monkeypatch.setenv(variable, value)
    stage(1).launch(lambda args, device: made.append(device.type),
                    stage(1).parse_args(["--out", str(tmp_path)]))
    assert made == ["device 3"] * len(group) + group + ["cuda"]
