"""The swaps of .assets/forks.md: a corpus of latents, a frozen network with trained adapters."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, launch

BLOCKS = re.findall(r"^```(python|diff|sh)\n(.*?)^```", (ROOT / ".assets/forks.md").read_text(),
                    re.M | re.S)


@pytest.fixture()
def adapt(stage):
    """adapt(seed): a small proxy whose weights are frozen, with the adapters of the page; away from
    its start, where all gradients but the last layer's are zero."""
    added = "".join(line[1:] for line in BLOCKS[5][1].splitlines(True) if line[0] == "+")
    names = dict(vars(stage(1)))
    exec(added[added.index("class LoRA"):], names)

    def make(seed=0):
        torch.manual_seed(seed)
        net = stage(1).DiT(16, 4, 16, 1, 8)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
        return names["add_lora"](net, rank=2)
    return make


def test_every_stage_trains_the_adapters_alone(stage, adapt, chain, tmp_path, monkeypatch):
    """A step of each: frozen weights stay as they are to the bit, in the networks and in the
    files; adapters move."""
    built = []

    def build(settings, device):
        built.append(adapt())
        return built[-1]
    monkeypatch.setattr(stage(1), "build_proxy", build)
    stage(5).open_lab.cache_clear()
    start, selected, moved = adapt(), str(tmp_path / "selected-topk-0.5.csv"), []
    for number, flags in ((1, ["--smoke", "--steps", "1", "--batch-size", "64"]),
                          (2, ["--smoke", "--steps", "1"]), (3, ["--baselines"]), (4, ["--method", "topk"]),
                          (5, ["--smoke", "--batch-size", "128", "--seeds", "1", "--selected",
                               selected])):
        first = len(built)
        launch(stage, number, ["--out", str(tmp_path), *flags])
        moved.append(sum(any(not torch.equal(*pair) for pair in zip(
            net.parameters(), start.parameters())) for net in built[first:]))
        assert moved[-1] == len(built) - first, f"stage {number}"
    assert moved == [1, 2, 2, 0, 3]
    rater = torch.load(tmp_path / "rater.pt", weights_only=True)
    saved = [torch.load(tmp_path / "proxy.pt", weights_only=True), rater["proxy"], rater["ref"]]
    for state in [*(net.state_dict() for net in built), *saved]:
        for name, p in start.named_parameters():
            assert p.requires_grad == name.endswith(("inner", "outer"))
            assert p.requires_grad or torch.equal(state[name], p), name


def follow(folder, blocks, runs):
    """Do in a copy of the five files what the page says, tiny; without `runs` the edits alone."""
    for file in ROOT.glob("0*.py"):
        shutil.copy(file, folder)

    def run(words, text=None):
        done = subprocess.run(words, cwd=folder, env={**os.environ, "PYTHONPATH": ""}, input=text,
                              capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    for language, text in blocks:
        if language == "python":
            (folder / "encode.py").write_text(text)
        elif language == "diff":                           # -F0: what surrounds an edit is there
            run(["patch", "-p1", "-F0"] if shutil.which("patch") else ["git", "apply"], text)
        for line in text.splitlines() * (language == "sh" and runs):
            file, *flags = shlex.split(re.sub(r" --(steps|epochs) \d+", "", line))[1:]
            smoke = ["--smoke"] * file.startswith(("01", "02", "05"))
            run([sys.executable, file, *flags, *smoke])


@pytest.mark.parametrize("blocks", [BLOCKS[:4], BLOCKS[4:]], ids=["latents", "adapters"])
def test_the_diffs_apply(tmp_path, blocks):
    follow(tmp_path, blocks, runs=False)
    for file in tmp_path.glob("*.py"):
        compile(file.read_text(), file.name, "exec")


@pytest.mark.slow
def test_the_stages_learn_from_latents(tmp_path):
    follow(tmp_path, BLOCKS[:4], runs=True)
    images = np.load(tmp_path / "latents/pairs/images.npy")
    assert (images.shape, images.dtype) == ((384, 4, 8, 8), np.float16)
    assert 0.3 < images.astype(float).std() < 1.5
    assert "selected-topk" in (tmp_path / "latents/results.md").read_text()


@pytest.mark.slow
def test_the_stages_train_the_adapters_of_the_page(tmp_path):
    follow(tmp_path, BLOCKS[4:], runs=True)
    known, state = (torch.load(tmp_path / f"{name}/proxy.pt", weights_only=True)
                    for name in ("backbone", "lora"))
    assert sum(name.endswith("outer") and value.any() for name, value in state.items()) == 4 * 3
    for name, value in state.items():
        assert name.endswith(("inner", "outer")) or torch.equal(
            value, known[name.replace(".base.", ".")])
    assert (tmp_path / "lora/results.md").exists()
