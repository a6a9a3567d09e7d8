"""What only a CUDA GPU shows; skipped without one.

    python -m pytest -q tests/test_gpu.py
"""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import collect
from conftest import GPU_ALONE, GPUS, TORCHRUN, launch, run
from test_faults import Cut, cut_at

DEVICE = torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden from this run")


@pytest.mark.skipif(GPU_ALONE or not shutil.which("nvidia-smi"), reason="no GPU, or at work")
def test_this_file_in_a_process_that_sees_the_gpu():
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", __file__], text=True,
                          env=env | GPUS, capture_output=True, timeout=1200)
    assert done.returncode == 0, done.stdout


@pytest.fixture()
def nets(stage):
    """make(device): theta, theta_hat and mu, the same weights on every device."""
    def make(device):
        torch.manual_seed(0)
        found = {name: stage(1).DiT(16, 4, 64, 2, 8) for name in ("proxy", "ref")}
        for net in found.values():
            for p in net.parameters():
                torch.nn.init.normal_(p, std=0.05)
        found["rater"] = stage(2).Rater(16, 4, 8, 16, 1)
        return {name: net.to(device) for name, net in found.items()}
    yield make
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def same_noise(stage, monkeypatch):
    """Random numbers of the CPU on every device."""
    drawn = {name: getattr(stage(1), name) for name in ("draw_noise", "drop_captions")}
    monkeypatch.setattr(stage(1), "draw_noise", lambda x, rng, shift=0.0: [
        v.to(x.device) for v in drawn["draw_noise"](x.cpu(), on_cpu(rng), shift)])
    monkeypatch.setattr(stage(1), "drop_captions", lambda c, rng: drawn["drop_captions"](
        c.cpu(), on_cpu(rng)).to(c.device))


def on_cpu(rng):
    return torch.Generator().manual_seed(rng.initial_seed())


def draw_pairs(stage, split, device, n=64):
    return stage(1).replace(collect(stage(1).draw_toy(n, 16, 0, split)), device=device)


@on_gpu
@pytest.mark.parametrize("precision,tolerance", [("highest", 1e-3), ("high", 2e-2)])
def test_a_step_of_every_stage(stage, nets, precision, tolerance):
    """Steps of 01 and 02, scores of 03 and numbers of 05 are those of the CPU, to rounding."""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"
    args, found = stage(2).parse_args([]), []
    for device in ("cpu", DEVICE):
        made = nets(device)
        opts = {name: torch.optim.SGD(net.parameters(), 0.1) for name, net in made.items()}
        train, val, test = (draw_pairs(stage, split, device, 200)
                            for split in ("train", "val", "test"))
        x, c = train.batch()
        t, eps = stage(1).draw_noise(x, stage(1).seeded(device, 1))
        loss = stage(1).flow_loss(made["proxy"], x, c, t, eps).mean()
        norm = stage(1).descend(loss, made["proxy"], opts["proxy"])
        numbers = stage(2).meta_step(made, opts, train.batch(np.arange(64)),
                                     val.batch(np.arange(64)), stage(1).seeded(device, 0), args)
        companions = stage(3).draw_companions(made["rater"], 32, train, 0)
        torch.manual_seed(0)
        judge = made["rater"].contrast
        scores = stage(3).score_chunk(made, x, c, companions, stage(1).seeded(device, 2))
        x, _ = test.batch()
        reference = stage(5).moments(judge.embed_images(x.flip(0)[:150])[0])
        judged = stage(5).judge_images(judge, x, test.read("caption"), reference)
        drawn = stage(1).sample(made["proxy"], c, eps, 4)
        found.append([v.detach().cpu().double() for v in (
            loss, norm, torch.stack(numbers), scores, drawn, torch.tensor([*judged.values()]),
            *made["proxy"].parameters())])
    for one, two in zip(*found):
        assert (one - two).abs().max() < tolerance * one.abs().max().clamp_min(0.1)


@on_gpu
def test_bf16_keeps_the_order_of_the_gaps(stage, nets):
    """It is on by itself, unless --fp32 was asked for; losses and gradients are float32."""
    made, gaps = nets(DEVICE), []
    x, c = draw_pairs(stage, "train", DEVICE, 512).batch()
    noise = stage(1).draw_noise(x, stage(1).seeded(DEVICE, 1))
    for flags in (["--fp32"], []):
        built = stage(1).build_proxy(stage(1).parse_args(flags), DEVICE)
        half = not flags and torch.cuda.get_device_capability()[0] >= 8
        assert built(x, noise[0], c).dtype == (torch.bfloat16 if half else torch.float32)
        for net in (made["proxy"], made["ref"]) if half else ():
            net.forward = torch.autocast("cuda", torch.bfloat16)(net.forward)
        L_theta, L_hat = (stage(1).flow_loss(made[name], x, c, *noise) for name in ("proxy", "ref"))
        L_theta.sum().backward()
        assert {L_theta.dtype, made["proxy"].word.weight.grad.dtype} == {torch.float32}
        gaps.append((L_theta - L_hat).detach().cpu().numpy().argsort().argsort())
    assert np.corrcoef(*gaps)[0, 1] > 0.99 and (gaps[0] != gaps[1]).any()


@on_gpu
def test_a_run_that_was_stopped_continues(stage, tmp_path, monkeypatch):
    """01 to 1e-3, in bf16 as it began."""
    monkeypatch.setattr(stage(1), "SAVE_EVERY", 0)
    flags = ["--smoke", "--steps", "25", "--out"]
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(stage(1), "descend", cut_at(stage(1).descend, 15))
        launch(stage, 1, [*flags, str(tmp_path / "broken")])
    assert (tmp_path / "broken/proxy.progress").exists()
    for name in ("broken", "whole"):
        launch(stage, 1, [*flags, str(tmp_path / name)])
    assert np.allclose(*(np.loadtxt(tmp_path / name / "proxy.csv", delimiter=",", skiprows=1)[:, 1]
                         for name in ("broken", "whole")), rtol=1e-3)


@on_gpu
@pytest.mark.parametrize("command", ["01_proxy.py --smoke", "02_meta_rater.py --smoke",
                                     "03_score.py --baselines", "04_select.py",
                                     "05_train_eval.py --smoke --seeds 1"])
def test_stages_under_torchrun(tmp_path_factory, command):
    """A group of NCCL and gloo, of one process; every stage on what those before it left."""
    launcher = [word.replace("2", "1") for word in TORCHRUN]
    done = run(f"{command} --out {tmp_path_factory.getbasetemp() / 'nccl'}", launcher)
    assert done.returncode == 0, done.stdout + done.stderr
