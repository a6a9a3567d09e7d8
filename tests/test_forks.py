"""The swaps of .assets/forks.md: a corpus of latents, a frozen network with trained adapters."""
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, launch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from evidence import add_lora  # noqa: E402


def adapt(stage, seed=0):
    """A small proxy whose weights are frozen, with adapters; away from its start, where all
    gradients but the last layer's are zero."""
    torch.manual_seed(seed)
    net = stage(1).DiT(16, 4, 16, 1, 8)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return add_lora(net, rank=2)


def split(net):
    """Frozen and trained weights of a network, by name."""
    state = net.state_dict()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    return ({name: value for name, value in state.items() if name not in trained},
            {name: state[name] for name in trained})


def test_every_stage_trains_the_adapters_alone(stage, tmp_path, monkeypatch):
    """A step of each: frozen weights stay as they are to the bit, in the networks and in the
    files; adapters move, and the optimisers hold nothing else."""
    built, held, usual = [], [], stage(1).adamw

    def build(settings, device):
        built.append(adapt(stage))
        return built[-1]

    def adamw(net, lr):
        opt = usual(net, lr)
        if net in built:
            held.append({p for group in opt.param_groups for p in group["params"]}
                        == {p for p in net.parameters() if p.requires_grad})
        return opt
    monkeypatch.setattr(stage(1), "build_proxy", build)
    monkeypatch.setattr(stage(1), "adamw", adamw)
    frozen, start = split(adapt(stage))
    common = ["--smoke", "--out", str(tmp_path)]
    selected = str(tmp_path / "selected-topk-0.5.csv")
    moved = []
    for number, flags in ((1, ["--steps", "1", "--batch-size", "64"]), (2, ["--steps", "1"]),
                          (3, ["--baselines"]), (4, ["--method", "topk"]),
                          (5, ["--batch-size", "128", "--seeds", "1", "--selected", selected])):
        first = len(built)
        launch(stage, number, [*common, *flags])
        moved.append(sum(any(not torch.equal(value, start[name]) for name, value in
                             split(net)[1].items()) for net in built[first:]))
        assert moved[-1] == len(built) - first, f"stage {number}"
    assert moved == [1, 2, 3, 0, 4]            # 05: twice four steps for the time, then three arms
    assert len(held) == 8 and all(held)
    saved = [*torch.load(tmp_path / "proxy.pt", weights_only=True)["snapshots"].values(),
             *(torch.load(tmp_path / "rater.pt", weights_only=True)["weights"][name]
               for name in ("proxy", "ref"))]
    for state in [*(net.state_dict() for net in built), *saved]:
        assert all(torch.equal(state[name], value) for name, value in frozen.items())


def test_the_exact_meta_gradient_goes_through_the_adapters_alone(stage):
    """Against finite differences of training that moves nothing else."""
    def batch(seed, n=4):
        rng = torch.Generator().manual_seed(seed)
        x, eps = torch.randn(2, n, 3, 16, 16, generator=rng, dtype=torch.double)
        return (x, torch.randint(1, 50, (n, 8), generator=rng),
                torch.rand(n, generator=rng, dtype=torch.double), eps)

    def L_val(W):
        net = adapt(stage).double()
        trained = [p for p in net.parameters() if p.requires_grad]
        for _ in range(2):
            loss = (W * stage(1).flow_loss(net, *batch(1))).sum()
            grads = torch.autograd.grad(loss, trained)
            with torch.no_grad():
                for p, g in zip(trained, grads):
                    p -= g
        with torch.no_grad():
            return stage(1).flow_loss(net, *batch(2)).mean().item()
    W = torch.rand(4, dtype=torch.double)
    exact = stage(2).exact_meta_gradient(adapt(stage).double(), batch(1), batch(2), W, 1.0, 2)
    for i, step in enumerate(1e-4 * torch.eye(4, dtype=torch.double)):
        numeric = (L_val(W + step) - L_val(W - step)) / 2e-4
        assert exact[i].item() == pytest.approx(numeric, rel=1e-3)


BLOCKS = re.findall(r"^```(python|diff|sh)\n(.*?)^```", (ROOT / ".assets/forks.md").read_text(),
                    re.M | re.S)


def add_broken(tar):
    """Another shape, not square, not finite, no .npy at all: beside pairs that are whole."""
    for key, value in (("a", np.zeros((4, 4, 4))), ("b", np.zeros((4, 8, 6))),
                       ("c", np.full((4, 8, 8), np.nan)), ("d", None)):
        file = io.BytesIO()
        np.save(file, value) if key != "d" else file.write(b"no array")
        for kind, data in ((".npy", file.getvalue()), (".txt", b"a red circle")):
            member = tarfile.TarInfo(key + kind)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def follow(folder, blocks):
    """Do in a copy of the five files what the page says, tiny; returns what was printed."""
    for file in ROOT.glob("0*.py"):
        shutil.copy(file, folder)
    env, printed = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, []

    def run(words, text=None):
        done = subprocess.run(words, cwd=folder, env=env, input=text, capture_output=True,
                              text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    for language, text in blocks:
        if language == "python":
            (folder / "encode.py").write_text(text)
        elif language == "diff":                           # -F0: what surrounds an edit is there
            run(["patch", "-p1", "-F0"] if shutil.which("patch") else ["git", "apply"], text)
        else:
            for command in text.strip().splitlines():
                tiny = re.sub(r" --(steps|epochs) \d+", "", command).replace("4000", "200")
                run([sys.executable, *shlex.split(tiny)[1:],
                     *["--smoke"] * ("encode.py" not in command)])
                if "encode.py" in command:
                    corpus = folder / shlex.split(command)[2]
                    with tarfile.open(corpus / "train-001.tar", "w") as tar:
                        add_broken(tar)
    return printed


def test_the_diff_of_latents_applies_and_stage_1_learns_from_them(tmp_path):
    script, diff, commands = BLOCKS[:3]
    first = "\n".join(commands[1].splitlines()[:2])        # encode.py, 01_proxy.py
    printed = follow(tmp_path, [script, diff, ("sh", first)])
    saved = torch.load(tmp_path / "out/proxy.pt", weights_only=True)
    assert (saved["settings"]["channels"], saved["settings"]["size"]) == (4, 8)
    assert saved["snapshots"][12]["to_patch.weight"].shape[1] == 4 * 2 * 2
    for shape in ("4 x 4 x 4", "4 x 8 x 6", "4 x 8 x 8"):
        assert f"skipped 1 (unreadable image: latent of {shape} is not finite" in printed[-1]
    assert "skipped 4" not in printed[-1] and "200 train" in printed[-1]


@pytest.mark.slow
def test_the_whole_page_of_forks_runs(tmp_path):
    follow(tmp_path, BLOCKS)
    text = (tmp_path / "out/results.md").read_text()
    assert "distance, score and match need pictures and are left out" in text
    with tarfile.open(next((tmp_path / "half").iterdir())) as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".npy", ".txt", ".json"}
    known = torch.load(tmp_path / "backbone/proxy.pt", weights_only=True)["snapshots"][12]
    for state in torch.load(tmp_path / "lora/proxy.pt", weights_only=True)["snapshots"].values():
        assert sum(name.endswith("outer") for name in state) == 4 * 3
        assert any(value.any() for name, value in state.items() if name.endswith("outer"))
        for name, value in state.items():
            if not name.endswith(("inner", "outer")):
                assert torch.equal(value, known[name.replace(".base.", ".")])
