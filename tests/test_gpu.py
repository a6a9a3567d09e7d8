"""What only a CUDA GPU shows; skipped without one. No GPU has run it yet (README, "Not tested").

    python -m pytest -q tests/test_gpu.py
"""
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import GPU_ALONE, GPUS, launch, run

DEVICE = torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden from this run")
NNODES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--")


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
        for name in ("proxy", "ref"):
            for p in found[name].parameters():
                torch.nn.init.normal_(p, std=0.05)
        found["rater"] = stage(2).Rater(16, 4, 8, 16, 1)
        return {name: net.to(device) for name, net in found.items()}
    yield make
    stage(1).Machine.bf16 = stage(1).Machine.compiled = False
    torch.set_float32_matmul_precision("highest")


def batch_of(stage, split, device, n=64):
    """x, c, t, eps of n toy pairs, drawn on the CPU."""
    x, c = stage(1).draw_toy(n, 16, 0, split).batch(range(n))
    noise = stage(1).draw_noise(x, stage(1).seeded("cpu", 1))
    return [v.to(device) for v in (x, c, *noise)]


@on_gpu
@pytest.mark.parametrize("precision,tolerance", [("highest", 1e-3), ("high", 2e-2)])
def test_a_step_of_01_and_05(stage, nets, precision, tolerance):
    torch.set_float32_matmul_precision(precision)
    found = []
    for device in ("cpu", DEVICE):
        net, (x, *rest) = nets(device)["proxy"], batch_of(stage, "train", device)
        L, norm = stage(1).descend_flow(net, torch.optim.SGD(net.parameters(), 0.1),
                                        x.new_full((len(x),), 1 / len(x)), x, *rest)
        found.append([L.cpu(), norm.cpu(), *(p.detach().cpu() for p in net.parameters())])
    for a, b in zip(*found):
        assert (a - b).abs().max() < tolerance * a.abs().max().clamp_min(0.1)


@on_gpu
def test_a_step_of_02_and_scores_of_03(stage, nets, monkeypatch):
    args, numbers, ratings = stage(2).parse_args([]), [], []
    draw = stage(1).draw_noise
    monkeypatch.setattr(stage(1), "draw_noise", lambda x, rng, shift=0.0: [
        v.to(x.device) for v in draw(x.cpu(), rng, shift)])
    for device in ("cpu", DEVICE):
        made = nets(device)
        opts = {name: torch.optim.SGD(net.parameters(), 0.1) for name, net in made.items()}
        batches = [batch_of(stage, split, device)[:2] for split in ("train", "val")]
        numbers.append(stage(2).meta_step(made, opts, *batches, stage(1).seeded("cpu", 0),
                                          args).cpu())
        pairs = stage(1).draw_toy(600, 16, 0, "train").to(device)
        companions = stage(3).draw_companions(made["rater"], 32, pairs, 0)
        ratings.append(stage(3).score_chunk(made, pairs, companions, 0, 0).cpu())
    assert torch.allclose(*numbers, rtol=1e-2, atol=1e-3)
    assert torch.allclose(*ratings, atol=1e-3)


@on_gpu
def test_the_judge_of_05(stage):
    pairs, found = stage(1).draw_toy(200, 16, 0, "test"), []
    torch.backends.cudnn.allow_tf32 = False
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        judge = stage(3).Contrast(16, 8).to(device).requires_grad_(False)
        x = pairs.to(device).batch(range(200))[0]
        reference = stage(5).moments(judge.embed_images(x.flip(0)[:150])[0])
        found.append(stage(5).judge_images(judge, x, pairs.captions, reference))
    assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-2)


@on_gpu
def test_bf16_keeps_the_order_of_the_gaps(stage, nets):
    made, batch, gaps = nets(DEVICE), batch_of(stage, "train", DEVICE, 512), []
    for stage(1).Machine.bf16 in (False, True):
        with torch.no_grad():
            L_theta, L_hat = (stage(1).flow_loss(made[name], *batch) for name in ("proxy", "ref"))
        assert L_theta.dtype == torch.float32
        gaps.append((L_theta - L_hat).cpu().numpy().argsort().argsort())
    assert np.corrcoef(*gaps)[0, 1] > 0.99 and (gaps[0] != gaps[1]).any()


@on_gpu
def test_no_step_waits_for_the_device(stage, nets):
    """Between two fetches nothing is copied back; a copy that waits is an error here."""
    pairs, net = stage(1).draw_toy(256, 16, 0, "train").to(DEVICE), nets(DEVICE)["proxy"]
    progress, stage(1).Machine.fetch_every = stage(1).Progress(), 1000
    stage(1).train(net, pairs, 2, 64, 1e-3, 0)
    try:
        stage(1).train(net, pairs, 6, 64, 1e-3, 0, progress=progress, after=lambda step:
                       torch.cuda.set_sync_debug_mode("error" if step in (2, 3, 4) else "default"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stage(1).Machine.fetch_every, stage(1).Progress.running = 1, False
    assert len(progress.log) == 6


@on_gpu
def test_a_run_that_was_stopped_continues(stage, tmp_path, monkeypatch):
    """01 to 1e-3; its snapshots lie in the CPU's memory."""
    step_down, calls, losses = stage(1).step_down, [], []
    for name in ("whole", "broken"):
        flags = ["--smoke", "--precision", "fp32", "--out", str(tmp_path / name)]
        if name == "broken":
            def stopping(net, opt):
                calls.append(0)
                stage(1).Progress.stop = 15 * (len(calls) == 5)
                return step_down(net, opt)
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                patch.setattr(stage(1), "step_down", stopping)
                launch(stage, 1, flags)
            kept = torch.load(tmp_path / name / "proxy.progress", weights_only=True)
            assert kept["step"] == 5 and {v.device.type for one in kept["kept"].values()
                                          for v in one.values()} == {"cpu"}
            stage(1).Progress.stop, stage(1).Progress.running = 0, False
        launch(stage, 1, flags)
        losses.append(np.loadtxt(tmp_path / name / "proxy.csv", delimiter=",", skiprows=1)[:, 1])
    assert np.allclose(*losses, rtol=1e-3)


@on_gpu
def test_compiled_blocks(stage):
    """Forward and backward to bf16's rounding, for two networks and both sizes of batch."""
    settings, found = stage(1).parse_args(["--width", "64", "--depth", "2"]), []
    for stage(1).Machine.compiled in (False, True):
        torch.manual_seed(0)
        net = stage(1).build_proxy(settings, DEVICE)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.05)
        L = stage(1).flow_loss(net, *batch_of(stage, "train", DEVICE))
        L.mean().backward()
        found.append([L.detach(), net.word.weight.grad])
    assert all(torch.allclose(*pair, rtol=2e-2, atol=1e-3) for pair in zip(*found))
    stage(1).Machine.compiled = False


@on_gpu
@pytest.mark.parametrize("file", ["01_proxy.py", "02_meta_rater.py", "03_score.py --baselines",
                                  "05_train_eval.py --seeds 1"])
def test_stages_under_torchrun(tmp_path_factory, file):
    """A group of NCCL and gloo, of one process; every stage on what those before it left."""
    out = tmp_path_factory.getbasetemp() / "nccl"
    done = run(f"{file} --smoke --out {out}", NNODES)
    assert done.returncode == 0, done.stdout + done.stderr
