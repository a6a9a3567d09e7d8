"""Known data sets, planted dirt, and the four dials: each where it must be good and where bad."""
import hashlib
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import datasets

from conftest import launch, write_fashion, write_pictures


def write_cifar(root, monkeypatch, kind, n=60):
    """A tiny CIFAR10 or CIFAR100 in the real file format, under its own check sums."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key = kind.meta["key"]
    names = [f"{'aquarium_fish' if k == 1 else 'orchid'}" for k in range(100)]
    for attribute in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(kind, attribute):
            labels = [k % 10 for k in range(n)]
            data = np.repeat(np.array(labels, np.uint8)[:, None] * 20, 3072, axis=1)
            blob = pickle.dumps({"data": data, "labels" if key == "label_names" else
                                 "fine_labels": labels})
            (folder / name).write_bytes(blob)
            entries.append([name, hashlib.md5(blob).hexdigest()])
        monkeypatch.setattr(kind, attribute, entries)
    blob = pickle.dumps({key: names})
    (folder / kind.meta["filename"]).write_bytes(blob)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": hashlib.md5(blob).hexdigest()})


def load(stage, *flags):
    return stage(1).load_data(stage(1).parse_args([*flags, "--batch-size", "8"]), "cpu")


# ---- data sets that everyone knows -------------------------------------------------------------
def test_a_data_set_gives_captions_from_classes_and_splits_that_share_nothing(stage, tmp_path):
    write_fashion(tmp_path)
    train, val, test = load(stage, "--data", "FashionMNIST", "--root", str(tmp_path))
    assert (len(train), len(val), len(test)) == (208, 52, 60)
    assert not set(train.keys) & set(val.keys) and all(key.startswith("test") for key in test.keys)
    for pairs in (train, val, test):
        assert pairs.images.shape[1:] == (3, 16, 16) and set(pairs.strata) == {"informative"}
        for key, image, caption in zip(pairs.keys, pairs.images, pairs.captions):
            label = int(key.lstrip("trainest")) % 10
            assert (image == 20 * label).all()                         # picture and caption agree
            assert caption == stage(1).name_class(datasets.FashionMNIST.classes[label])
    part = load(stage, "--data", "FashionMNIST", "--root", str(tmp_path), "--pairs", "100")
    assert len(part[0]) == 100 and part[1].keys == val.keys and set(part[0].keys) <= set(train.keys)


@pytest.mark.parametrize("name, words", [
    ("T-shirt/top", "a photo of a t-shirt"), ("Ankle boot", "a photo of an ankle boot"),
    ("8 - eight", "a photo of an eight"), ("1 - one", "a photo of a one"),
    ("aquarium_fish", "a photo of an aquarium fish"), ("airplane", "a photo of an airplane")])
def test_class_names_are_read_as_a_person_says_them(stage, name, words):
    assert stage(1).name_class(name) == words


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_in_its_own_files(stage, tmp_path, monkeypatch, name):
    write_cifar(tmp_path, monkeypatch, getattr(datasets, name))
    train, val, test = load(stage, "--data", name, "--root", str(tmp_path))
    for key, image, caption in zip(train.keys, train.images, train.captions):
        label = int(key.removeprefix("train")) % 60 % 10
        assert (image == 20 * label).all()
        assert caption.endswith("aquarium fish" if label == 1 else "orchid")


@pytest.mark.parametrize("name, file", [("FashionMNIST", "train-images-idx3-ubyte"),
                                        ("CIFAR10", "data_batch_1")])
def test_without_network_and_files_one_line_names_them(stage, tmp_path, monkeypatch, name, file):
    def unreachable(*args, **how):
        raise OSError("no network")
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", unreachable)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(SystemExit) as error:
        load(stage, "--data", name, "--root", str(tmp_path))
    text = str(error.value)
    assert file in text and str(tmp_path) in text and "\n" not in text


def test_a_cut_data_set_is_named(stage, tmp_path):
    write_fashion(tmp_path)
    file = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="FashionMNIST could not be read"):
        load(stage, "--data", "FashionMNIST", "--root", str(tmp_path))


@pytest.mark.parametrize("data", ["toy", "FashionMNIST"])
def test_a_part_is_taken_and_trusted_files_are_not_ignored(stage, tmp_path, data):
    write_fashion(tmp_path)
    flags = "--data", data, "--root", str(tmp_path), "--smoke"
    assert len(load(stage, *flags, "--pairs", "40")[0]) == 40
    with pytest.raises(SystemExit, match="--val goes with files"):
        load(stage, *flags, "--val", str(tmp_path))


# ---- planted dirt -----------------------------------------------------------------------------
PLANT = "captions=0.2,noise=0.1,plain=0.05"


def test_planted_dirt_is_what_its_mark_says(stage, tmp_path):
    write_fashion(tmp_path)
    flags = "--data", "FashionMNIST", "--root", str(tmp_path)
    clean, (dirty, *others) = load(stage, *flags)[0], load(stage, *flags, "--plant", PLANT)
    counts = {name: dirty.strata.count(name) for name in set(dirty.strata)}
    assert counts == {"informative": 135, "planted-caption": 42, "planted-noise": 20,
                      "planted-plain": 11}
    assert all("planted" not in stratum for pairs in others for stratum in pairs.strata)
    for k, stratum in enumerate(dirty.strata):
        same_image = torch.equal(clean.images[k], dirty.images[k])
        same_caption = clean.captions[k] == dirty.captions[k]
        spread = dirty.images[k].float().std()
        assert same_image == (stratum in ("informative", "planted-caption"))
        assert same_caption == (stratum in ("informative", "planted-noise"))
        assert (spread > 40) == (stratum == "planted-noise")
        assert torch.equal(dirty.tokens[k], stage(1).tokenize([dirty.captions[k]], 8)[0])
        if stratum == "planted-caption":
            assert dirty.captions[k] in clean.captions


def test_planting_leaves_what_it_was_given(stage):
    pairs = stage(1).draw_toy(64, 16, 0, "val")
    before = pairs.images.clone(), list(pairs.captions)
    stage(1).plant_pairs(pairs, {"noise": 0.5, "captions": 0.4}, 0)
    assert torch.equal(pairs.images, before[0]) and pairs.captions == before[1]


@pytest.mark.parametrize("text", ["captions", "captions=x", "words=0.1", "captions=0.6,noise=0.5",
                                  "captions=-0.1", "captions=nan", "captions=10"])
def test_wrong_shares_are_named(stage, text):
    with pytest.raises(SystemExit, match="--plant"):
        stage(1).parse_args(["--plant", text])


def test_wrong_captions_need_two_captions(stage):
    pairs = stage(1).draw_toy(64, 16, 0, "val")
    pairs.captions = ["one"] * 64
    with pytest.raises(SystemExit, match="one caption"):
        stage(1).plant_pairs(pairs, {"captions": 0.2}, 0)


def test_plant_asks_for_pairs_in_memory(stage, tmp_path, monkeypatch):
    write_pictures(stage, tmp_path / "pictures", 40)
    monkeypatch.setattr(stage(1).Machine, "memory", 0)
    with pytest.raises(SystemExit, match="--pairs"):
        load(stage, "--data", str(tmp_path / "pictures"), "--out", str(tmp_path), "--plant",
             "noise=0.1", "--val", str(tmp_path / "pictures"))


def write_ratings(path, stratum="planted-noise"):
    """Twenty ratings, rising; every fourth pair is planted dirt."""
    lines = [f"key{k:02d},{k},{-k},{stratum if k % 4 == 3 else ''}" for k in range(20)]
    path.write_text("\n".join(["key,rating,gain,stratum", *lines]) + "\n")


def test_shares_of_dirt_leave_some_pairs_clean(stage, capsys):
    for text in ("plain=0.7,noise=0.2,captions=0.1", "plain=1.5", "rain=0.1", "plain=0.1,plain=0.2"):
        with pytest.raises(SystemExit, match="shares of 0.99 at most"):
            stage(1).read_plant(text)
    stage(1).plant_pairs(stage(1).draw_toy(120, 16, 0, "val"), {"captions": 0.001, "noise": 0.1}, 0)
    assert capsys.readouterr().out == "planted: noise 12, captions 0\n"


def test_planted_pairs_are_in_no_selection_and_counted(stage, tmp_path, capsys):
    write_ratings(tmp_path / "ratings.csv")
    for method in ("topk", "random", "shift-gsample"):
        launch(stage, 4, ["--method", method, "--out", str(tmp_path), "--keep", "9"])
        text = capsys.readouterr().out
        assert "9 of 15 pairs" in text and "5 pairs with planted dirt are left out" in text
        keys = (tmp_path / f"selected-{method}-9.csv").read_text().split()[1:]
        assert len(keys) == 9 and all(int(key[3:]) % 4 != 3 for key in keys)
    assert keys != []
    write_ratings(tmp_path / "ratings.csv", "chaotic-noise")           # known, but not planted
    launch(stage, 4, ["--method", "topk", "--out", str(tmp_path), "--keep", "5"])
    assert "key19" in (tmp_path / "selected-topk-5.csv").read_text()
    assert "left out of the ranking" not in capsys.readouterr().out


def test_several_columns_are_ranked_by_their_mean_place(stage, tmp_path):
    one, two = np.array([4.0, 3, 2, 1]), np.array([1.0, 4, 3, 2])
    joined = stage(4).join([one, two])          # places 0 1 2 3 and 3 0 1 2: sums 3, 1, 3, 5
    assert stage(4).sort_rows(joined).tolist() == [1, 0, 2, 3]
    write_ratings(tmp_path / "ratings.csv", "")
    launch(stage, 4, ["--method", "topk", "--out", str(tmp_path), "--rank-by", "rating,gain"])
    kept = (tmp_path / "selected-by-rating-gain-topk-0.5.csv").read_text().split()[1:]
    assert kept == [f"key{k:02d}" for k in range(10)]                  # all alike: in their order
    with pytest.raises(SystemExit):
        stage(4).parse_args(["--rank-by", "rating,beauty"])


# ---- the dials ---------------------------------------------------------------------------------
def test_captions_read_at_a_proxy_that_reads_them_and_at_one_that_does_not(stage):
    class Proxy(torch.nn.Module):
        """Knows from the caption alone how bright the picture is, or ignores the caption."""

        def __init__(self, reads):
            super().__init__()
            self.reads = reads

        def forward(self, x_t, t, c):
            level = (c[:, 0] if self.reads else 0 * c[:, 0]).float()[:, None, None, None] / 10
            return (x_t - level) / t[:, None, None, None]

    c = torch.randint(1, 10, (64, 1))
    images = (127.5 * (c.float()[:, :, None, None] / 10 + 1)).expand(-1, 3, 4, 4).to(torch.uint8)
    pairs = stage(1).Pairs(images, c, [str(k) for k in range(64)], [""] * 64, [""] * 64)
    assert stage(1).read_captions(Proxy(True), pairs, 0) == 1
    assert stage(1).read_captions(Proxy(False), pairs, 0) == 0         # no loss differs at all
    pairs.tokens = torch.ones(64, 1, dtype=torch.int64)
    assert np.isnan(stage(1).read_captions(Proxy(True), pairs, 0))


@pytest.mark.parametrize("value, words", [(0.9, "are found"), (0.7, "are hardly found"),
                                          (0.51, "are not found"), (0.0, "are not found"),
                                          (float("nan"), "cannot be told")])
def test_a_verdict_says_the_number_its_chance_and_below_the_mark_the_cure(stage, value, words):
    text = stage(1).say("they are {}found", value, 0.5, 0.8, "look closer")
    assert words in text and ("look closer" in text) == (value < 0.8)
    assert np.isnan(value) or f"{value:.2f} (0.5 is chance)" in text


def test_a_dial_does_not_depend_on_the_number_of_processes(stage, monkeypatch):
    """Every process has the whole batch: under the noise that one alone would draw."""
    s1, x = stage(1), torch.zeros(40, 3, 4, 4)
    alone = s1.draw_noise(x, s1.seeded("cpu", 0), s1.T_SHIFT)
    monkeypatch.setattr(s1, "world", lambda: 2)
    monkeypatch.setattr(s1, "rank", lambda: 1)
    both = s1.draw_noise(x, s1.seeded("cpu", 0), s1.T_SHIFT, whole=True)
    assert all(map(torch.equal, alone, both))
    asked, draw = [], s1.draw_noise
    monkeypatch.setattr(s1, "draw_noise", lambda *args, whole=False: (
        asked.append(whole), draw(*args, whole=whole))[1])
    pairs, net = s1.draw_toy(16, 4, 0, "val"), lambda x, t, c: x
    s1.read_captions(net, pairs, 0, draws=1)
    rater = SimpleNamespace(features=lambda x, c: x, logits=lambda f: f.mean((1, 2, 3)))
    stage(2).follow({"proxy": net, "ref": net, "rater": rater}, *pairs.batch(range(16)),
                    stage(2).parse_args([]), draws=1)
    assert asked == [True, True]


@pytest.mark.parametrize("signal", ["difference", "loss"])
def test_the_rater_follows_its_signal_or_does_not(stage, signal, monkeypatch):
    x, c = torch.zeros(32, 3, 4, 4), torch.arange(32)[:, None]
    args = stage(2).parse_args(["--signal", signal])
    monkeypatch.setattr(stage(1), "flow_loss", lambda net, x, c, t, eps: net * c[:, 0].float())

    class Rater:
        def __init__(self, sign):
            self.sign = sign

        def features(self, x, c):
            return self.sign * c[:, 0].float()

        def logits(self, f):
            return f
    for sign in (1, -1):                     # theta's loss rises from pair to pair: low is good
        nets = {"proxy": 1.0, "ref": 0.5, "rater": Rater(sign)}
        found, logits = stage(2).follow(nets, x, c, args)
        assert found == pytest.approx(-sign) and torch.equal(logits, sign * c[:, 0].float())


def test_following_is_judged_by_its_course(stage):
    rising, flat, none = ([0.1, 0.2, 0.4, 0.6], [0.1, 0.6, 0.6, 0.6], [0.0, 0.01, 0.0, 0.02])
    assert "more --steps would help" in stage(2).judge_following(rising)
    assert "more --steps would not help" in stage(2).judge_following(flat)
    assert "not following" in stage(2).judge_following(none)
    assert "more --steps" not in stage(2).judge_following([0.5, 0.6])  # of too few there is none


def test_stage_3_says_which_dirt_is_found_and_whether_trusted_pairs_stand_out(stage, capsys):
    strata = np.array(["informative"] * 50 + ["planted-caption"] * 50 + ["planted-noise"] * 50)
    rng = np.random.default_rng(0)
    rating = np.concatenate([rng.normal(1, 0.2, 50), rng.normal(1, 0.2, 50),
                             rng.normal(-1, 0.2, 50)])
    stage(3).judge_rating(strata, rating, rng.normal(3, 0.2, 40), "difference")
    text = capsys.readouterr().out
    assert re.search(r"trusted pairs are rated above the corpus: 1\.00", text)
    assert re.search(r"noisy pictures are found: 1\.00", text)
    assert re.search(r"wrong captions are not found: 0\.\d\d .*if 01 says that captions are read", text)
    stage(3).judge_rating(np.array([""] * 150), rating, rating, "difference")
    text = capsys.readouterr().out
    assert "trusted pairs are not rated above the corpus: 0.50" in text and "found" not in text
    stage(3).judge_rating(strata, rating, -rating, "loss")             # more steps are no cure
    text = capsys.readouterr().out
    assert text.count("eq. 9 rates low loss high") == 2 and "would help" not in text


@pytest.mark.slow
def test_ratings_do_not_depend_on_the_marks(stage, tmp_path, monkeypatch):
    """The whole of stages 1 to 3 under shuffled marks gives the ratings of the true ones."""
    write_fashion(tmp_path)
    found, plant_pairs = {}, stage(1).plant_pairs
    for shuffled in (False, True):
        out = tmp_path / str(shuffled)

        def plant(pairs, planted, seed):
            pairs = plant_pairs(pairs, planted, seed)
            if shuffled:
                pairs.strata = list(np.random.default_rng(1).permutation(pairs.strata))
            return pairs
        monkeypatch.setattr(stage(1), "plant_pairs", plant)
        launch(stage, 1, ["--smoke", "--out", str(out), "--data", "FashionMNIST", "--root",
                          str(tmp_path), "--plant", PLANT])
        for number in (2, 3):
            launch(stage, number, ["--smoke", "--out", str(out)]
                   + ["--baselines"] * (number == 3))
        table = stage(3).read_table(out / "ratings.csv")
        found[shuffled] = {name: values for name, values in table.items() if name != "stratum"}
        marks = table["stratum"]
    for name, values in found[False].items():
        assert (found[True][name] == values).all(), name
    launch(stage, 4, ["--method", "topk", "--out", str(out)])
    kept = (out / "selected-topk-0.5.csv").read_text().split()[1:]
    planted = {key for key, mark in zip(table["key"], marks) if mark.startswith("planted-")}
    assert len(planted) == 73 and len(kept) == round((208 - 73) / 2) and not planted & set(kept)
    shown = []
    monkeypatch.setattr(stage(1), "train",
                        lambda net, pairs, *args, **how: shown.append(pairs.keys))
    launch(stage, 5, ["--smoke", "--seeds", "1", "--out", str(out), "--selected",
                      str(out / "selected-topk-0.5.csv")])
    assert {len(keys) for keys in shown[1:]} == {135, 68}             # full, random and the half
    assert not any(planted & set(keys) for keys in shown)
