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
    for net.bf16 in (False, True):
        net.zero_grad()
        L = stage(1).flow_loss(net, x, c, t, eps)
        L.sum().backward()
        assert {L.dtype} | {p.grad.dtype for p in net.parameters()} == {torch.float32}
        found.append((L.detach(), stage(1).sample(net, c, eps, 2)))
    for whole, half in zip(*found):
        assert half.dtype == torch.float32 and not torch.equal(whole, half)
        assert (whole - half).abs().max() < 0.03 * whole.abs().max()


@pytest.mark.parametrize("left,group,waits", [
    ({"RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, ["cpu:gloo,cuda:nccl"], False),    # torchrun
    ({"RANK": "1"}, ["cpu:gloo,cuda:nccl"], True),
    ({"RANK": ""}, [], False), ({"RANK": "1", "WORLD_SIZE": ""}, [], False)])
def test_a_group_is_made_after_the_device_is_chosen(stage, tmp_path, monkeypatch, capsys, left,
                                                    group, waits):
    """What is waited for is said before the wait; what a launcher left empty makes no group."""
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda k: made.append(f"device {k}"))
    monkeypatch.setattr(stage(1).dist, "init_process_group", lambda name, timeout: made.append(
        (name, capsys.readouterr().out)))
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": "1", **left}.items():
        monkeypatch.setenv(name, value)
    stage(1).launch(lambda args, device: made.append(device.type),
                    stage(1).parse_args(["--out", str(tmp_path)]))
    assert (made[0], made[-1]) == ("device 3", "cuda") and [name for name, _ in made[1:-1]] == group
    assert waits == any("waiting for 2 processes, this is number 1; without torchrun, unset RANK "
                        "and WORLD_SIZE" in said for _, said in made[1:-1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wait_for_other_processes_ends_with_ctrl_c(tmp_path, rank):
    process, said = begin(tmp_path / "out", 2, env=find_ranks()[rank])
    assert wait_for(lambda: "waiting for 2 processes" in said.read_text())
    os.kill(process.pid, signal.SIGINT)
    ended = wait_for(lambda: process.exitcode is not None, 20)
    process.kill()
    assert ended and "Traceback" not in said.read_text()
