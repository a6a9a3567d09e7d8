"""The questions of tests/evidence.py, tiny, and what its networks and corpora promise."""
import csv
import shutil

import numpy as np
import pytest
import torch

import evidence
from test_faults import Cut, cut_at
from test_scripts import read_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence")


SLOW = "models", "time", "corpora"


@pytest.mark.parametrize("question", [pytest.param(
    name, marks=[pytest.mark.slow] * (name in SLOW)) for name in evidence.QUESTIONS])
def test_every_question_yields_its_table(folder, question, capsys, monkeypatch):
    """One row per case, every row as wide as its head."""
    monkeypatch.setattr(evidence, "CURVES", dict.fromkeys(evidence.CURVES, (8, 16)))
    monkeypatch.delitem(evidence.MODELS, "DiT, 8x")
    evidence.main([question, "--smoke", "--seeds", "1", "--out", str(folder)])
    tables = read_tables(capsys.readouterr().out)
    assert len(tables) == 1 + (question == "time")
    for head, *rows in tables:
        assert rows and {len(row) for row in rows} == {len(head)}


def test_a_table_is_stage_5_with_other_arms(chain, tmp_path, capsys, monkeypatch):
    """Three of its arms; cut off in the second it is continued; 05's own results are left alone."""
    for name in ("pairs", "proxy.pt", "proxy.json", "rater.pt", "rater.json", "ratings.npy",
                 "ratings.csv", "ratings.json", "results.csv"):
        (shutil.copytree if name == "pairs" else shutil.copy)(chain / name, tmp_path / name)
    random, *others = few = [evidence.TABLES["main"][k] for k in (1, -2, -1)]
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
    assert (tmp_path / "results-main-samples.png").exists()
    assert (tmp_path / "results.csv").read_bytes() == (chain / "results.csv").read_bytes()


def test_tables_have_names_of_their_own_and_stand_before_their_options(stage, capsys):
    for name, arms in evidence.TABLES.items():
        assert len({arm.name for arm in arms}) == len(arms), name
        assert {name for arm in arms for name in arm.rank_by.split(",")} <= set(stage(4).RANKINGS)
    with pytest.raises(SystemExit):
        evidence.main(["--out", "elsewhere", "main"])
    assert "main has to stand before its options" in capsys.readouterr().err


def test_unet_keeps_the_shape_and_reads_the_caption():
    torch.manual_seed(0)
    net = evidence.UNet()
    torch.nn.init.normal_(net.leave[2].weight)
    x, t = torch.randn(4, 3, 16, 16), torch.rand(4)
    c = evidence.s1.tokenize(["a red circle"] * 2 + ["a blue square"] * 2, 8)
    c = torch.from_numpy(c).long()
    assert net(x, t, c).shape == x.shape
    assert not torch.allclose(net(x, t, c)[:2], net(x, t, c.flip(0))[:2])


def test_the_clean_corpus_is_as_it_is_described():
    pairs = evidence.collect(evidence.draw_clean(200, 16, 0, "train"), 16)
    assert max(len(caption.split()) for caption in pairs.read("caption")) <= 16
    assert len(np.unique(pairs.strata())) == 4 and len(np.unique(pairs.entries["pixels"])) == 200


def test_speed_up_is_read_off_between_the_points():
    assert evidence.reach([10, 100], [0.0, 1.0], 0.5, 1) == pytest.approx(10 ** 1.5)
    assert evidence.reach([10, 100], [0.5, 0.4], 0.6, -1) == 10
    assert evidence.reach([10, 100], [0.0, 1.0], 2.0, 1) == np.inf
