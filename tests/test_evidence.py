"""The questions of tests/evidence.py, tiny, and what its networks and corpora promise."""
import csv
import importlib
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from test_faults import Cut, cut_at
from test_scripts import read_tables

sys.path.insert(0, str(Path(__file__).resolve().parent))
evidence = importlib.import_module("evidence")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


@pytest.mark.parametrize("question", [pytest.param(
    name, marks=[pytest.mark.slow] * (name in ("models", "time"))) for name in evidence.QUESTIONS])
def test_every_question_yields_its_table(folder, question, capsys, monkeypatch):
    """One row per case, every row as wide as its head."""
    for name, fewer in (("CASES", evidence.CASES[:2]), ("TABLE_3", ("preference pairs",)),
                        ("READINGS", {"one shard a group": 32}),
                        ("CURVES", dict.fromkeys(evidence.CURVES, (8, 16))),
                        ("MODELS", {k: v for k, v in evidence.MODELS.items() if "x" not in k})):
        monkeypatch.setattr(evidence, name, fewer)
    evidence.main([question, "--smoke", "--seeds", "1", "--out", str(folder)])
    tables = read_tables(capsys.readouterr().out)
    assert len(tables) == 1 + (question == "time")
    for head, *rows in tables:
        assert rows and {len(row) for row in rows} == {len(head)}


def test_heuristics_against_plain_loops():
    """Laplacian, Sobel and Otsu by numpy, pixel by pixel; a flat picture has no clarity."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 3, 12, 12)).astype(np.float32)
    x[1] = 0.3
    x[2] = np.where(np.arange(12) < 5, -0.8, 0.9)                            # one clean edge
    found = evidence.heuristics(torch.from_numpy(x)).numpy()
    for image, (clarity, _, edges) in zip(x, found):
        grey = np.pad(image.mean(0), 1, mode="edge")
        at = {(i, j): grey[1 + i:13 + i, 1 + j:13 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)}
        laplace = at[-1, 0] + at[1, 0] + at[0, -1] + at[0, 1] - 4 * at[0, 0]
        dx = sum(w * (at[i, 1] - at[i, -1]) for i, w in ((-1, 1), (0, 2), (1, 1)))
        dy = sum(w * (at[1, j] - at[-1, j]) for j, w in ((-1, 1), (0, 2), (1, 1)))
        assert clarity == pytest.approx(laplace.var(ddof=1), rel=1e-4, abs=1e-9)
        slope = np.hypot(dx, dy)
        levels = np.floor(slope / max(slope.max(), 1e-12) * 63)
        spread = [(levels <= k).mean() * (levels > k).mean()
                  * (levels[levels > k].mean() - levels[levels <= k].mean()) ** 2
                  if (levels <= k).any() and (levels > k).any() else 0 for k in range(63)]
        if slope.max() > 1e-3:
            assert edges == pytest.approx((levels > np.argmax(spread)).mean(), abs=0.01)
    assert found[2, 2] == pytest.approx(2 / 12) and found[1, 0] < 1e-9 < found[2, 0]
    wave = np.cos(np.pi * np.arange(12)) * np.ones((2, 3, 12, 1))            # the fastest there is
    wave[1] = np.cos(2 * np.pi * np.arange(12) / 12)                         # one period
    energy = evidence.heuristics(torch.from_numpy(wave).float())[:, 1]
    assert energy[0] > 1 and energy[1] < 1e-6


def test_a_table_is_stage_5_with_other_arms(chain, tmp_path, capsys, monkeypatch):
    """Three of its arms; cut off in the second it is continued; 05's own results are left alone."""
    for name in ("pairs", "proxy.pt", "proxy.json", "rater.pt", "rater.json", "ratings.npy",
                 "ratings.csv", "ratings.json", "results.csv"):
        (shutil.copytree if name == "pairs" else shutil.copy)(chain / name, tmp_path / name)
    random, *others = few = [evidence.TABLES["main"][k] for k in (1, -3, -1)]
    monkeypatch.setitem(evidence.TABLES, "main", few)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)                  # one after another
    command = ["main", "--smoke", "--seeds", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(evidence.s5, "evaluate", cut_at(evidence.s5.evaluate, 2))
        evidence.main(command)
    evidence.main(command)
    assert f"continuing from {tmp_path}/results-main.progress" in capsys.readouterr().out
    with open(tmp_path / "results-main.csv", newline="") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == [arm.name for arm in few]
    table = (tmp_path / "results-main.md").read_text()
    assert all(f"| {arm.name} | {random.name} |" in table for arm in others)
    assert all((tmp_path / f"results-main{end}.png").exists() for end in ("", "-samples"))
    assert (tmp_path / "results.csv").read_bytes() == (chain / "results.csv").read_bytes()


def test_tables_have_names_of_their_own_and_stand_before_their_options(stage, capsys):
    for name, arms in evidence.TABLES.items():
        assert len({arm.name for arm in arms}) == len(arms), name
        assert {name for arm in arms for name in arm.rank_by.split(",")} <= set(stage(4).RANKINGS)
    with pytest.raises(SystemExit):
        evidence.main(["--out", "elsewhere", "main"])
    assert "main has to stand before its options" in capsys.readouterr().err


def test_lora_learns_few_parameters_and_leaves_the_base_alone():
    torch.manual_seed(0)
    net = evidence.s1.DiT(16, 4, 64, 3, 8)
    torch.nn.init.normal_(net.from_patch.weight)
    for block in net.blocks:                               # or its gates let nothing through
        torch.nn.init.normal_(block.modulation[1].weight, std=0.1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pairs = evidence.collect(evidence.s1.draw_toy(64, 16, 0, "val"))
    x, c = pairs.batch(np.arange(8))
    expected = net(x, torch.full((8,), 0.5), c)
    evidence.add_lora(net, rank=4)
    assert torch.equal(net(x, torch.full((8,), 0.5), c), expected)            # zero at first
    shapes = [(64, 192), (64, 64), (64, 256), (256, 64)]   # qkv, out, and the two of the MLP
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 3 * sum(
        4 * (a + b) for a, b in shapes)
    evidence.s1.train(net, pairs, 6, 16, 1e-2, 0)
    after = {name.replace(".base.", "."): value for name, value in net.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(net(x, torch.full((8,), 0.5), c), expected)


def test_unet_keeps_the_shape_and_reads_the_caption():
    torch.manual_seed(0)
    net = evidence.UNet()
    torch.nn.init.normal_(net.leave[2].weight)
    x, t = torch.randn(4, 3, 16, 16), torch.rand(4)
    c = evidence.s1.tokenize(["a red circle"] * 2 + ["a blue square"] * 2, 8)
    c = torch.from_numpy(c).long()
    assert net(x, t, c).shape == x.shape
    assert not torch.allclose(net(x, t, c)[:2], net(x, t, c.flip(0))[:2])


def test_corpora_are_as_they_are_described():
    pairs = evidence.collect(evidence.draw_preferences(200, 16, 0, "train"))
    good, captions = pairs.strata() == "informative", np.array(pairs.read("caption"))
    assert sorted(captions[good]) == sorted(captions[~good]) and good.sum() == 100
    pairs = evidence.collect(evidence.draw_clean(200, 16, 0, "train"), 16)
    assert max(len(caption.split()) for caption in pairs.read("caption")) <= 16
    assert len(np.unique(pairs.strata())) == 4 and len(np.unique(pairs.entries["pixels"])) == 200
    pairs = evidence.collect(evidence.draw_sharded(800, 16, 0, "train"))
    good = (pairs.strata() == "informative").reshape(20, 40).mean(1)
    assert good.min() < 0.1 and good.max() > 0.9 and len(set(np.round(good, 2))) > 15


def test_shards_are_read_one_by_one_and_validation_as_always():
    read = evidence.read_shards(800, 32)                   # 20 shards of 40
    batch, = read(800, 64, 0, 0, 1)
    first, second = batch[:32] // 40, batch[32:] // 40
    assert len(set(first)) == len(set(second)) == 1 and len(set(batch)) == 64
    usual = evidence.s1.draw_batches(100, 20, 0, 0, 3)
    assert all((a == b).all() for a, b in zip(read(100, 20, 0, 0, 3), usual))


def test_speed_up_is_read_off_between_the_points():
    assert evidence.reach([10, 100], [0.0, 1.0], 0.5, 1) == pytest.approx(10 ** 1.5)
    assert evidence.reach([10, 100], [0.5, 0.4], 0.6, -1) == 10
    assert evidence.reach([10, 100], [0.0, 1.0], 2.0, 1) == np.inf
