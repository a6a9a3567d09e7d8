"""Stage 3: a pair's score belongs to the pair, and every corpus keeps its own ratings."""
import csv
import json
import os
import re
import shutil
from argparse import Namespace
from unittest import mock

import numpy as np
import pytest
import torch

from common import collect
from conftest import launch, write_pictures

SIZE, CHUNK, N = 8, 128, 320                               # pairs of a group, a chunk, the corpus


@pytest.fixture(scope="module")
def rated(stage):
    """(nets, pairs): untrained nets and a corpus of two and a half chunks."""
    torch.manual_seed(0)
    pairs = collect(stage(1).draw_toy(N, 16, 0, "train"))
    nets = {name: stage(1).DiT(16, 4, 16, 1, 8) for name in ("proxy", "ref")}
    for net in nets.values():
        torch.nn.init.normal_(net.from_patch.weight, std=0.1)
        torch.nn.init.normal_(net.blocks[0].modulation[1].weight, std=0.1)  # captions matter
    return nets | {"rater": stage(2).Rater(16, 4, 8, 16, 1)}, pairs


def rate(stage, nets, pairs, path):
    """Numbers (N, K) as stage 3 writes them."""
    progress = stage(1).Progress(path.with_suffix(".progress"), {}, ["pairs"])
    companions = stage(3).draw_companions(nets["rater"], SIZE, pairs, 3)
    with mock.patch.object(stage(3), "CHUNK", CHUNK):
        stage(3).score(nets, companions, pairs, path, 3, progress)
    os.replace(f"{path}.npy.part", f"{path}.npy")          # as `main` does
    table = np.load(f"{path}.npy")
    assert list(table.dtype.names[:-1]) == stage(3).NUMBERS + stage(3).BASELINES * (len(nets) == 3)
    assert (table["stratum"].astype(str) == pairs.strata()).all()
    return np.stack([table[name] for name in table.dtype.names[:-1]], 1)


# ---- the score ---------------------------------------------------------------------------------
def test_scores_ignore_the_order_of_work(stage, rated, tmp_path):
    nets, pairs = rated
    whole = rate(stage, nets, pairs, tmp_path / "r")
    assert whole.shape == (N, 7) and np.ptp(whole, axis=0).min() > 1e-6   # no column is constant
    companions = stage(3).draw_companions(nets["rater"], SIZE, pairs, 3)
    for first in (2 * CHUNK, 0, CHUNK):
        rows = np.arange(first, min(first + CHUNK, N))
        part = stage(3).score_chunk(nets, *pairs.batch(rows), companions,
                                    stage(1).seeded("cpu", 3, "score", first))
        assert np.allclose(part, whole[rows], atol=1e-5)
    only = {"rater": nets["rater"]}
    one = stage(3).score_chunk(only, *pairs.batch([200]), companions, None)
    assert np.allclose(one, whole[200:201, :4], atol=1e-5)               # nor batch-mates


def test_the_group_s_part_is_the_mean_over_groups_that_the_pair_joins(stage, rated):
    """Against eq. 7's own weights of groups put together pair by pair."""
    nets, pairs = rated
    x, c = pairs.batch(range(3 + stage(3).GROUPS * (SIZE - 1)))
    with torch.no_grad():
        f = nets["rater"].features(x, c)
        companions = f[3:].view(stage(3).GROUPS, SIZE - 1, -1)
        instance, group, rating, _ = stage(3).score_chunk(
            {"rater": nets["rater"]}, x[:3], c[:3], companions, None).T
        for i in range(3):
            rows = [torch.tensor([i, *range(k, k + SIZE - 1)]) for k in range(3, len(x), SIZE - 1)]
            W = [stage(2).weigh(nets["rater"], x[row], c[row], SIZE)[1] for row in rows]
            assert torch.allclose(torch.stack(W).mean(), group[i], atol=1e-5)
    assert torch.allclose(instance, nets["rater"].logits(f[:3]), atol=1e-5)
    assert torch.allclose(rating, instance + group.log(), atol=1e-5)


@pytest.mark.parametrize("bias", [-300, 300])
def test_a_collapsed_group_head_leaves_finite_ratings(stage, rated, tmp_path, bias):
    """W_batch of exactly 0 or 1: the ranking is the Instance MLP's, and its figure is drawn."""
    nets, pairs = rated
    rater = stage(2).Rater(16, 4, 8, 16, 1)
    rater.group[-1].bias.data.fill_(bias)
    instance, group, rating, _ = rate(stage, {"rater": rater}, pairs, tmp_path / "r").T
    assert group == pytest.approx(float(bias > 0)) and np.isfinite(rating).all()
    assert (instance - rating).std() < 1e-4 < rating.std()
    for strata in (pairs.strata(), np.array([""] * N)):
        stage(3).draw_histogram(tmp_path / "r.png", rating, strata)


def test_baselines_are_the_losses_of_the_two_proxies(stage, rated):
    """With theta = theta_hat the difference is exactly 0: both see the same noise."""
    nets, pairs = rated
    x, c = pairs.batch(range(10))

    def baselines(name, c):
        with torch.no_grad():
            return stage(3).baselines(nets[name], nets["ref"], x, c, stage(1).seeded("cpu", 1))
    loss, difference, gain = baselines("ref", c)
    without, _, none = baselines("ref", 0 * c)
    assert difference.abs().max() == 0 and loss.min() > 0
    assert none.abs().max() == 0 and gain.abs().max() > 1e-4           # what the caption is worth
    assert torch.allclose(gain, without - loss, atol=1e-5)
    rng = stage(1).seeded("cpu", 1)
    noises = [stage(1).draw_noise(x, rng, stage(2).T_SHIFT) for _ in range(stage(3).DRAWS)]
    with torch.no_grad():
        L_theta, L_hat = (sum(stage(1).flow_loss(nets[name], x, c, *noise) for noise in noises)
                          / len(noises) for name in ("proxy", "ref"))
    loss, difference, _ = baselines("proxy", c)
    assert torch.allclose(loss, L_hat, atol=1e-5)
    assert torch.allclose(difference, L_theta - L_hat, atol=1e-5)


# ---- rankings ----------------------------------------------------------------------------------
def test_places_and_auc_count_ties_half(stage):
    assert stage(3).places(np.array([1.0, 3.0, 2.0, 0.0])).tolist() == [0.5, 0.0, 0.25, 0.75]
    assert stage(3).places(np.array([5.0, 7.0, 5.0, 5.0])).tolist() == [0.5, 0.0, 0.5, 0.5]
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 9, 40) + 1, rng.integers(0, 9, 30)
    brute = np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low])
    assert stage(3).auc(high, low) == pytest.approx(brute)
    strata = np.array(["informative"] * 40 + ["plain"] * 30 + ["", "mine"])
    column = np.concatenate([high, low, [99, 99]])         # unknown strata are no known dirt
    assert stage(3).areas(strata, column) == {
        "plain": pytest.approx((40 * brute + 2) / 42)}
    assert stage(3).areas(strata[40:70], column[40:70]) == {}


def test_a_constant_column_in_a_joined_ranking_changes_nothing(stage):
    """Neither the order nor an AUC; of two columns each counts alike, and low may be good."""
    rng, n = np.random.default_rng(0), 200
    strata = np.array(["informative", "plain"])[rng.integers(0, 2, n)]
    columns = {"rating": rng.integers(0, 40, n) + 9.0 * (strata == "plain"), "constant": np.ones(n),
               "ref_loss": -rng.random(n), "instance": rng.random(n)}
    for names in ("rating,constant", "constant,rating,constant"):
        joined = stage(3).rank_by(columns, names)
        for key in (lambda rating: np.argsort(rating, kind="stable").tolist(),
                    lambda rating: stage(3).areas(strata, rating)):
            assert key(joined) == key(columns["rating"])
    assert np.allclose(stage(3).rank_by(columns, "ref_loss,instance"), -(
        stage(3).places(-columns["ref_loss"]) + stage(3).places(columns["instance"])) / 2)


def test_the_verdict_is_that_of_the_kind_found_worst(stage, capsys):
    """It names the ranking that does better, and none where there is none, or nothing known."""
    strata = np.array(["informative"] * 4 + ["plain"] * 4 + ["chaotic-noise"] * 4)
    low, mixed = np.repeat([2.0, 1, 0], 4), np.repeat([1.0, 0, 1], 4)
    for rating, contrast, verdict, cure in (
            (low, mixed, "finds every kind of known dirt: 1.00", ""),
            (mixed, low, "does not find every kind of known dirt: 0.50", "--rank-by contrast, 1.00"),
            (mixed, -low, "does not find every kind of known dirt: 0.50", "pairs may help\n")):
        stage(3).report(strata, {"rating": rating, "contrast": contrast}, ["rating", "contrast"])
        said = capsys.readouterr().out
        assert f"the rating {verdict} at worst" in said and cure in said
        assert ("may help" in said) == (cure != "")
    stage(3).report(np.array([""] * 12), {"rating": low}, ["rating"])
    assert "is not known: 01_proxy.py --plant" in capsys.readouterr().out


# ---- the stage ---------------------------------------------------------------------------------
def test_the_stage_writes_a_table_twice_and_says_what_it_found(stage, chain, tmp_path, capsys):
    """The same in both files, by row and key; AUCs of the order in which stage 4 would rank."""
    out = shutil.copytree(chain, tmp_path / "out")
    launch(stage, 3, ["--baselines", "--out", str(out)])
    said = capsys.readouterr().out
    table, pairs = np.load(out / "ratings.npy"), stage(1).open_pairs(out / "pairs")
    with open(out / "ratings.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(int(line["row"]), line["key"], line["stratum"]) for line in lines] == list(
        zip(range(256), pairs.read("key"), pairs.strata()))
    for name in stage(3).NUMBERS + stage(3).BASELINES:
        assert np.allclose([float(line[name]) for line in lines], table[name], rtol=1e-4)
    rating = stage(4).read_ratings(out / "ratings.csv", "contrast", pairs)
    assert "AUC by contrast: " + ", ".join(f"{name} {area:.2f}" for name, area in stage(
        3).areas(pairs.strata(), rating).items()) in said
    worst = min(stage(3).areas(pairs.strata(), table["rating"]).values())
    assert re.search(f"the rating .* every kind of known dirt: {worst:.2f} at worst", said)
    assert (table["rating"] == np.load(chain / "ratings.npy")["rating"]).all()


@pytest.mark.parametrize("names, alike", [
    (("photos/2023", "photos-2023"), True), (("photos-2023", "../photos-2023"), True),
    (("a.tar", "a"), True), ((".", ".."), True), (("été", "étè"), False), (("写真", "像"), False),
    (("x" * 90, "y" + "x" * 89), True), (("e\u0301t", "ét"), False),
    (("写" * 85, "像" * 85), False), (("photos-*.tar", "photos-?.tar"), True)])
def test_no_corpus_takes_the_pairs_of_another(stage, tmp_path, monkeypatch, names, alike):
    """Both are kept, or the second is refused and told of; the first again is no other."""
    def prepare(folder, args):
        folder.mkdir(exist_ok=True)
        (folder / "made.json").write_text(json.dumps({"data": args.data}))
    monkeypatch.setattr(stage(1), "prepare", prepare)
    monkeypatch.chdir(tmp_path)
    first, same = (stage(3).prepare_other(name, tmp_path, Namespace(size=8, words=4))
                   for name in (names[0], f"./{names[0]}"))
    assert same == first
    assert len(f"{first.name}.progress.part".encode()) < 240           # what stands before it fits
    if alike:
        with pytest.raises(SystemExit, match="holds the pairs of .*: name another --out"):
            stage(3).prepare_other(names[1], tmp_path, Namespace(size=8, words=4))
    else:
        assert stage(3).prepare_other(names[1], tmp_path, Namespace(size=8, words=4)) != first


def test_other_data_that_are_mistyped_are_said_before_anything_is_rated(stage, chain, monkeypatch):
    """Neither pairs are opened nor networks loaded."""
    for module, name in ((1, "open_pairs"), (2, "train_contrast"), (3, "draw_companions")):
        monkeypatch.setattr(stage(module), name, None)
    with pytest.raises(SystemExit, match="no such file or folder"):
        launch(stage, 3, ["--out", str(chain), "--data", "nowhere/*.tar"])


def test_a_corpus_of_few_pairs_is_rated_and_drawn_and_anew_when_it_grew(stage, chain, tmp_path):
    """Beside the first one, whose ratings stay; with fewer pairs than its bands have places."""
    out = shutil.copytree(chain, tmp_path / "out")
    write_pictures(stage, tmp_path / "few", 16)
    for n in (16, 25):
        launch(stage, 3, ["--out", str(out), "--data", str(tmp_path / "few")])
        stem, = (path.with_suffix("") for path in out.glob("ratings-of-*few.npy"))
        assert len(np.load(f"{stem}.npy")) == n
        if n == 16:
            write_pictures(stage, tmp_path / "few/more", 9, "test")
    assert all((out / f"{stem.name}{end}").exists() for end in (".csv", ".json", ".png"))
    assert (out / "ratings.npy").read_bytes() == (chain / "ratings.npy").read_bytes()
