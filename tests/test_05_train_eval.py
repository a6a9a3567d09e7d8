"""Stage 5: the metrics against closed forms, the statistics, the choice of rows, the comparison."""
import csv
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from common import collect
from conftest import launch
from test_faults import Cut, cut_at


# ---- metrics and statistics ------------------------------------------------------------------
def test_frechet_distance_closed_forms(stage):
    rng = np.random.default_rng(0)
    distance, d = stage(5).frechet_distance, 6
    A, B = rng.standard_normal((2, 50, d))
    mu1, S1, mu2, S2 = A.mean(0), np.cov(A.T), B.mean(0), np.cov(B.T)
    assert distance(mu1, S1, mu2, S1) == pytest.approx(((mu1 - mu2) ** 2).sum())
    roots = np.sqrt(np.linalg.eigvals(S1 @ S2).real).sum()          # tr of the matrix square root
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * roots
    assert distance(mu1, S1, mu2, S2) == pytest.approx(expected)
    assert distance(mu1, S1, mu2, S2) == pytest.approx(distance(mu2, S2, mu1, S1))
    mean, S = stage(5).moments(torch.tensor(A))
    assert mean == pytest.approx(mu1) and S == pytest.approx(S1)


def test_judge_learns_clean_pairs_and_sees_wrong_captions_and_noise(stage):
    val, test = (collect(stage(1).draw_toy(n, 16, 5, split)) for n, split in (
        (300, "val"), (128, "test")))
    judge = stage(2).train_contrast(val, 120, 0, 64)
    x, captions = test.batch()[0], test.read("caption")
    reference = stage(5).moments(judge.embed_images(x)[0])
    noisy = (x + 0.4 * torch.randn(x.shape)).clamp(-1, 1)
    real, swapped, noisy = (stage(5).judge_images(judge, images, texts, reference) for images, texts
                            in ((x, captions), (x, captions[7:] + captions[:7]), (noisy, captions)))
    assert real["match"] > 60 and real["distance"] == pytest.approx(0, abs=1e-4)
    assert swapped["match"] < 20 and swapped["score"] < real["score"] - 20
    assert noisy["distance"] > 0.1
    loud = stage(5).judge_images(judge, x, [text.upper() for text in captions[:64]] + captions[64:],
                                 reference)                # to the judge the same captions
    assert loud["match"] == pytest.approx(real["match"])


def test_interval_and_verdict(stage):
    mean, half = stage(5).interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** 0.5)
    for shift, sign, verdict in ((0, 1, "tie"), (1, 1, "wins"), (1, -1, "loses")):
        said = stage(5).show_difference(shift + np.array([1.0, 2, 3]), sign)
        assert said == f"+{2 + shift} ± 2.5 {verdict}"
    assert stage(5).show_difference([1.0], 1) == "+1"
    assert np.isnan(stage(5).interval([1.0])[1])


def test_differences_are_paired_by_seed_and_taken_to_no_smaller_baseline(stage):
    """Losses that vary by 100 from seed to seed and differ by 1 in each. A $ is no formula."""
    Arm = stage(5).Arm
    arms = [Arm("full"), Arm("random 5", keep=5), Arm("a$b_$", file="a.csv")]
    results = [{"arm": arm.name, "seed": seed, "pairs": pairs, "seconds": 1.0,
                **dict.fromkeys(stage(5).METRICS, 100.0 * seed + plus), "plain": 0.5}
               for seed in (1, 2, 3) for arm, pairs, plus in zip(arms, (10, 5, 7), (1, 0, 2))]
    table = stage(5).tabulate(results, arms, "FLOOR").splitlines()
    assert "over 3 paired seeds; FLOOR" in table[0]
    assert "| a$b_$ | full | +1 ± 0 loses | +1 ± 0 loses | +1 ± 0 wins | +1 ± 0 wins |" in table
    assert "| random 5 | 5 | 50 | 1 | 200 ± 2.5e+02 |" in "".join(table).replace("||", "|")
    assert not any(line.startswith("| a$b_$ | random 5") for line in table)
    for row in results:
        row["steps"] = 10 * row["pairs"]
    results += [{**row, "arm": "poor", "match": row["match"] - 9} for row in results[2::3]]
    said = stage(5).sum_up(results, [*arms, Arm("poor", file="b.csv")], {"match": 39.0})
    assert "Best selection: a$b_$, match 202 % after 70% of the steps of full" in said
    assert "full +1 ± 0 wins, random 5 +2 ± 0 wins" in said and "Better than full: a$b_$" in said
    assert "39 % of real images: it says little here" in said and "Worse than full: poor" in said


# ---- arms ------------------------------------------------------------------------------------
def write_rows(file, rows, pairs=None):
    """A selection like stage 4's."""
    file.parent.mkdir(exist_ok=True)
    keys = pairs.read("key", rows) if pairs else [""] * len(rows)
    file.write_text("".join(f"{row},{key}\n" for row, key in [("row", "key"), *zip(rows, keys)]))
    return str(file)


def test_arms_choose_as_stage_4_does_and_draw_anew_for_each_seed(stage, chain):
    pairs, arms = stage(1).open_pairs(chain / "pairs"), {arm.name: arm for arm in stage(5).ARMS}
    assert len(arms) == len(stage(5).ARMS) == 5

    def choose(name, seed, pool=np.arange(256)):
        return stage(5).choose_rows(arms[name], pool, pairs, chain, seed).tolist()
    arms["eq. 6, drawn"] = stage(5).Arm("", stage(5).EQ6, "shift-gsample", 0.5)
    for name, file in (("eq. 6, Top-K 50%", "topk"), ("eq. 6, drawn", "shift-gsample")):
        file = chain / f"selected-{file}-0.5.csv"
        assert choose(name, 0) == stage(4).read_rows(file, pairs).tolist()
    for name, n in (("eq. 9, Shift-Gsample 50%", 128), ("random 50%", 128)):
        first, second, again = (choose(name, seed) for seed in (0, 1, 0))
        assert len(first) == len(second) == n and first == again and set(first) != set(second)
    pool = np.arange(0, 256, 3)                            # none is chosen outside
    assert choose("full", 0, pool) == pool.tolist()
    assert set(choose("contrast, Top-K 50%", 0, pool)) < set(pool.tolist())


def test_selections_of_one_name_are_refused(stage, tmp_path):
    """Also those that have the name of a baseline; others are arms under their own."""
    pairs, pool = collect(stage(1).draw_toy(256, 16, 0, "train")), np.arange(256)
    files = [write_rows(tmp_path / name, np.arange(k, k + 32), pairs) for k, name in enumerate(
        ("A/topk.csv", "B/topk.csv", "C/full.csv", "C/real.csv", "C/mine.csv"))]

    def choose(*files):
        return stage(5).list_arms(stage(5).parse_args(["--selected", *files]), pairs, pool, ())
    arms = choose(files[0], files[-1])
    assert [arm.name for arm in arms] == ["full", "random 32", "topk", "mine"]
    chosen = [stage(5).choose_rows(arm, pool, pairs, "", 0) for arm in arms]
    assert [len(rows) for rows in chosen] == [256] + [32] * 3 and chosen[3][0] == 4
    for taken in (files[:2], files[2:3], files[3:4], files[:1] * 2):
        with pytest.raises(SystemExit, match="names are not distinct, or taken"):
            choose(*taken)
    small = write_rows(tmp_path / "D/small.csv", np.arange(16), pairs)        # a rival of each size
    assert [arm.name for arm in choose(files[0], small)][:3] == ["full", "random 16", "random 32"]
    pool = np.arange(1, 256)                               # pair 0 is planted dirt
    with pytest.raises(SystemExit, match="lists pairs with planted dirt"):
        choose(files[0])


TEN = "".join(f"{row}\n" for row in range(10))
SELECTIONS = {             # what a file of row numbers of 256 pairs may not hold
    "empty": ("", "no column row"), "few": (f"row\n{TEN}", "10 pairs are fewer than --batch-size"),
    "twice": (f"row\n{TEN}9\n", "each once at most"), "beyond": (f"row\n{TEN}256\n", "0 to 255"),
    "negative": (f"row\n-1\n{TEN}", "0 to 255"), "half": (f"row\n{TEN}10.5\n", "s.csv"),
    "other keys": ("row,key\n3,train000003\n5,train000006\n",
                   "another corpus: train000006 is not the key")}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_checked_before_all_training(stage, chain, tmp_path, monkeypatch, name):
    """The judge would be the first to train."""
    monkeypatch.setattr(stage(2), "train_contrast", None)
    content, message = SELECTIONS[name]
    (tmp_path / "s.csv").write_text(content)
    good = write_rows(tmp_path / "good.csv", range(20))
    with pytest.raises(SystemExit, match=message) as stop:
        launch(stage, 5, ["--smoke", "--out", str(chain), "--selected", good, f"{tmp_path}/s.csv"])
    assert "\n" not in stop.value.code


# ---- the comparison --------------------------------------------------------------------------
def compare(stage, out, *flags):
    """Rows of results.csv after stage 5 has compared the files of stage 4 in `out`."""
    files = sorted(map(str, out.glob("selected-*.csv")))
    launch(stage, 5, ["--smoke", "--out", str(out), *flags, "--selected", *files])
    with open(out / "results.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"}
                for row in csv.DictReader(file)]


def test_a_comparison_that_was_killed_goes_on_with_the_next_arm(
        stage, chain, tmp_path, monkeypatch, capsys):
    """To the same numbers, a row an arm and seed; what is drawn is saved with its captions."""
    whole, out = (shutil.copytree(chain, tmp_path / name) for name in ("whole", "out"))
    for folder in (whole, out):
        (folder / "selected-shift-gsample-0.5.csv").unlink()
    expected, arms = compare(stage, whole), ["full", "random 128", "selected-topk-0.5"]
    assert [(row["seed"], row["arm"]) for row in expected] == [(s, a) for s in "01" for a in arms]
    assert [(row["pairs"], row["steps"]) for row in expected[:3]] == [
        ("256", "16"), ("128", "8"), ("128", "8")]         # half the pairs, half the steps
    assert len({row["held-out"] for row in expected}) == 6
    drawn, judged, flags = [], [], ["--save-images", f"{tmp_path}/im"]
    evaluate, judge = stage(5).evaluate, stage(5).judge_images
    monkeypatch.setattr(stage(5), "evaluate", lambda *given: drawn.append(evaluate(*given))
                        or drawn[-1])
    monkeypatch.setattr(stage(5), "judge_images", lambda sees, images, *rest: judged.append(images)
                        or judge(sees, images, *rest))
    with mock.patch.object(stage(1), "train", cut_at(stage(1).train, 3)), pytest.raises(Cut):
        compare(stage, out, *flags)
    assert len((out / "results.csv").read_text().split("\n")) == 4
    listed = stage(5).list_arms
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="begun with other arms"):
        patch.setattr(stage(5), "list_arms", lambda *given: listed(*given)[::-1])
        compare(stage, out, *flags)
    assert compare(stage, out, *flags) == expected and len(drawn) == 2 + 4
    assert all(map(torch.equal, (images for _, images in drawn[-4:]), judged[-4:]))
    said, table = capsys.readouterr().out, (out / "results.md").read_text()
    assert "6 models, 64 steps" in said and table in said and not list(out.glob("*.progress"))
    assert table.count("| selected-topk-0.5 | full |") == 1
    test = stage(1).open_pairs(out / "pairs", "test")
    folders = sorted(path.name for path in (tmp_path / "im").iterdir())
    assert len(folders) == 2 * (1 + 6) and {"real-captions", "random-128-seed-1"} < {*folders}
    for folder, n in (("real", 64), ("full-seed-0", 16)):
        pictures, texts = tmp_path / "im" / folder, tmp_path / "im" / f"{folder}-captions"
        assert len(list(pictures.iterdir())) == n and len(list(texts.iterdir())) == n
        assert (texts / "000005.txt").read_text() == test.read("caption", [5])[0]
    real = np.asarray(Image.open(tmp_path / "im/real/000005.png")).transpose(2, 0, 1)
    assert (real == test.images[test.rows[5]]).all()


def test_planted_pairs_are_in_no_arm(stage, chain, tmp_path, monkeypatch, capsys):
    """Neither in those of stage 4 nor in full and random, which stand beside them."""
    out, shown, train = shutil.copytree(chain, tmp_path / "out"), [], stage(1).train
    entries, rows = np.load(out / "pairs/entries.npy"), np.load(out / "pairs/train.npy")
    entries["stratum"][rows[:100]] = b"planted-noise"
    np.save(out / "pairs/entries.npy", entries)
    for file in out.glob("selected*.csv"):
        file.unlink()
    launch(stage, 4, ["--out", str(out), "--keep", "50"])
    monkeypatch.setattr(stage(1), "train", lambda net, pairs, *rest, **how: (
        shown.append(pairs.rows), train(net, pairs, *rest, **how))[1])
    monkeypatch.setattr(stage(1), "TELL_EVERY", 0)
    compare(stage, out, "--seeds", "1")
    assert [len(rows) for rows in shown] == [156, 50, 50]
    assert not set(np.concatenate(shown)) & set(rows[:100])
    said = capsys.readouterr().out
    assert "100 pairs with planted dirt are in no arm" in said
    assert re.search(r"^step 3 of 3 .*   selected-topk-50$", said, re.M)      # how far an arm is


@pytest.mark.slow
def test_arms_side_by_side_give_the_numbers_of_arms_in_turn(stage, chain, tmp_path, monkeypatch,
                                                            capsys):
    """Each with the 512 images that the other processes draw. The end is foretold when as many arms
    are done as began together."""
    found = []
    monkeypatch.setattr(stage(5), "DRAWN", 512)
    for cores in (1, 2):
        out = shutil.copytree(chain, tmp_path / str(cores))
        monkeypatch.setattr(torch, "get_num_threads", lambda cores=cores: cores)
        found.append(compare(stage, out, "--seeds", "1"))
        told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("seed 0")]
        assert ["min left" in line for line in told] == [k >= cores for k in range(1, 5)]
    assert found[0] == found[1] and len(found[0]) == 4
