"""Stage 5: the metrics against closed forms, the statistics, the choice of rows."""
import shutil

import numpy as np
import pytest
import torch

from conftest import launch


def test_frechet_distance_closed_forms(stage):
    rng = np.random.default_rng(0)
    distance, d = stage(5).frechet_distance, 6
    A, B = rng.standard_normal((2, 50, d))
    mu1, S1, mu2, S2 = A.mean(0), np.cov(A.T), B.mean(0), np.cov(B.T)
    assert distance(mu1, S1, mu2, S1) == pytest.approx(((mu1 - mu2) ** 2).sum())
    a, b = rng.uniform(0.1, 2, (2, d))
    diagonal = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance(mu1, np.diag(a), mu2, np.diag(b)) == pytest.approx(diagonal)
    roots = np.sqrt(np.linalg.eigvals(S1 @ S2).real).sum()          # tr of the matrix square root
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * roots
    assert distance(mu1, S1, mu2, S2) == pytest.approx(expected)
    assert distance(mu1, S1, mu2, S2) == pytest.approx(distance(mu2, S2, mu1, S1))
    low = np.cov(A[:4].T)                                           # singular: 4 samples, 6 numbers
    assert distance(mu1, low, mu1, low) == pytest.approx(0, abs=1e-6)


def test_judge_learns_clean_pairs_and_sees_wrong_captions_and_noise(stage):
    val, test = (stage(1).draw_toy(600, 16, 5, split) for split in ("val", "test"))
    judge = stage(3).train_contrast(val, 200, seed=0)
    x, captions = test.batch(range(256))[0], test.captions[:256]
    reference = stage(5).moments(judge.embed_images(x)[0])
    real = stage(5).judge_images(judge, x, captions, reference)
    swapped = stage(5).judge_images(judge, x, captions[7:] + captions[:7],
                                    reference)
    noisy = stage(5).judge_images(judge, (x + 0.4 * torch.randn(x.shape)).clamp(-1, 1), captions,
                                  reference)
    assert real["match"] > 80 and real["distance"] == pytest.approx(0, abs=1e-4)
    assert swapped["match"] < 20 and swapped["score"] < real["score"] - 20
    assert noisy["distance"] > 0.1


def test_interval_and_verdict(stage):
    mean, half = stage(5).interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / 3 ** 0.5)
    assert stage(5).verdict(2, half, 1) == "tie" and stage(5).verdict(3, half, 1) == "wins"
    assert stage(5).verdict(3, half, -1) == "loses"
    assert np.isnan(stage(5).interval([1.0])[1])


def test_arms_share_seeds_but_draw_anew(stage, chain):
    pairs = stage(1).draw_toy(256, 16, 0, "train")
    arm = next(arm for arm in stage(5).ARMS if "Shift" in arm.name)
    first, second = (stage(5).choose_rows(arm, pairs, chain, seed) for seed in (0, 1))
    assert len(first) == len(second) == 128 and set(first) != set(second)
    assert set(first) == set(stage(5).choose_rows(arm, pairs, chain, 0))


def test_a_selection_of_other_pairs_is_refused(stage, tmp_path):
    (tmp_path / "other.csv").write_text("key\nnobody\n")
    pairs = stage(1).draw_toy(256, 16, 0, "train")
    with pytest.raises(SystemExit, match="nobody"):
        stage(5).choose_rows(stage(5).Arm("x", file=str(tmp_path / "other.csv")), pairs, "", 0)


def test_arms_are_told_apart_by_name(stage):
    arms = stage(5).ARMS
    assert len({arm.name for arm in arms}) == len(arms) == 10


def keep_few(folder, name="selected-topk-0.5.csv", keys=range(32)):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("key\n" + "".join(f"train{k:06d}\n" for k in keys))
    return folder / name


def test_selections_of_one_name_are_two_arms(stage, tmp_path):
    """Same names in two folders, and names of the two baselines."""
    pairs = stage(1).draw_toy(256, 16, 0, "train")
    files = [keep_few(tmp_path / "A"), keep_few(tmp_path / "B", keys=range(9, 41)),
             keep_few(tmp_path / "C", "full.csv"), keep_few(tmp_path / "C", "random 32.csv"),
             keep_few(tmp_path / "C", "real.csv"), keep_few(tmp_path / "C", "mine.csv")]
    args = stage(5).parse_args(["--selected", *map(str, files)])
    arms = stage(5).list_arms(args, pairs)
    names = [arm.name for arm in arms]
    assert names == ["full", "random 32", *map(str, files[:-1]), "mine"]
    assert [len(stage(5).choose_rows(arm, pairs, "", 0)) for arm in arms] == [256] + [32] * 7
    again = stage(5).parse_args(["--selected", str(files[0]), f"{tmp_path}/B/../A/{files[0].name}"])
    with pytest.raises(SystemExit, match="twice"):
        stage(5).list_arms(again, pairs)


@pytest.mark.parametrize("content,message", [
    ("key\n", "no line follows"), ("", "key"), ("train000001\ntrain000002\n", "columns key"),
    ("key\ntrain000001\ntrain000001\n", "more than once, again in row 2"),
    ("key\ntrain000001\nnobody\n", "key nobody is not among"), (None, "directory"),
    ("key\ntrain000001\n", "fewer than --batch-size"),
    (np.arange(0), "no .npy"), (np.arange(20.0), "no .npy"), (np.arange(250, 270), "row numbers"),
    (np.ones(255, bool), "row numbers")])
def test_selections_are_checked_before_anything_is_trained(
        stage, chain, tmp_path, monkeypatch, content, message):
    """The judge would be the first to train."""
    monkeypatch.setattr(stage(3), "train_contrast", None)
    shutil.copy(chain / "proxy.pt", tmp_path)
    file = tmp_path / f"s.{'npy' if isinstance(content, np.ndarray) else 'csv'}"
    if content is None:
        file.mkdir()
    elif isinstance(content, str):
        file.write_text(content)
    else:
        np.save(file, content)
    good = keep_few(tmp_path)
    with pytest.raises(SystemExit, match=message) as stop:
        launch(stage, 5, ["--smoke", "--out", str(tmp_path), "--selected", str(good), str(file)])
    assert "\n" not in stop.value.code


def test_an_arm_without_its_ratings_is_left_out_with_the_command(stage, tmp_path, capsys):
    (tmp_path / "ratings.csv").write_text("key,rating\n")
    arms = [arm for arm in stage(5).ARMS if arm.keep == 0.5]
    contrast = stage(5).Arm("contrast", "ratings", "topk", 0.5, rank_by="contrast")
    found = stage(5).list_arms(stage(5).parse_args(["--out", str(tmp_path)]), [], [*arms, contrast])
    assert [arm.name for arm in found] == [arm.name for arm in arms if arm.ratings != "ratings-loss"]
    said = capsys.readouterr().out
    assert "no column rating (03_score.py --signal loss writes it)" in said
    assert "no column contrast (03_score.py --baselines writes it)" in said


def test_a_dollar_in_a_name_is_no_formula(stage, tmp_path):
    results = [{"arm": "a$b_$", "seed": 0, "held-out": 1.0, "distance": 1.0, "match": 1.0}]
    stage(5).draw_results(tmp_path / "r.png", results, [stage(5).Arm("a$b_$")])
    assert (tmp_path / "r.png").exists()


def test_the_column_key_counts_wherever_it_stands(stage, tmp_path):
    pairs = stage(1).draw_toy(256, 16, 0, "train")
    (tmp_path / "s.csv").write_text("\ufeffrank,key\n1,train000007\n2,train000003\n")
    arm = stage(5).Arm("x", file=str(tmp_path / "s.csv"))
    assert stage(5).choose_rows(arm, pairs, "", 0).tolist() == [7, 3]


@pytest.mark.slow
def test_each_ratings_file_is_read_once(stage, chain, tmp_path, monkeypatch, capsys):
    """By 10 arms under two seeds; and the cost of the comparison is said before it."""
    read, files = stage(4).np.loadtxt, []
    for name in ("proxy.pt", "ratings.csv", "ratings-loss.csv"):
        shutil.copy(chain / name, tmp_path)
    monkeypatch.setattr(stage(4).np, "loadtxt", lambda file, *args, **kwargs: (
        files.append(file.name), read(file, *args, **kwargs))[1])
    monkeypatch.setattr(stage(1).Progress, "tell_every", 0)
    launch(stage, 5, ["--smoke", "--out", str(tmp_path)])
    assert sorted(files) == [str(tmp_path / f"ratings{end}.csv") for end in ("-loss", "")]
    before, after = capsys.readouterr().out.split("real images", 1)
    assert "20 models, 136 steps in all, about 0 minutes" in before and "fewer --seeds" in before
    assert "step 1 of 136   " in after and "pairs a second" in after and "left" in after


def test_what_is_typed_beside_smoke_counts(stage):
    for number, flags in ((1, ["--steps", "60"]), (2, ["--group-size", "4"]), (5, ["--seeds", "1"])):
        usual, smoke = stage(number).parse_args([]), stage(number).parse_args(["--smoke"])
        typed = stage(number).parse_args([*flags, "--smoke"])
        name = flags[0][2:].replace("-", "_")
        assert getattr(typed, name) == int(flags[1]) != getattr(smoke, name)
        assert {k: v for k, v in vars(typed).items() if k != name} == {
            k: v for k, v in vars(smoke).items() if k != name}
        assert typed.batch_size == 16 != usual.batch_size


@pytest.mark.parametrize("flags", ["--seed -1", "--seed 1.5", "--seed 99999999999999999999",
                                   "--reference x", "--save-statistics x.npz",
                                   "--evaluate x --save-statistics x"])
def test_options_that_cannot_be_meant_are_refused(stage, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        stage(5).parse_args(flags.split())
    assert stop.value.code == 2 and flags.split()[-2] in capsys.readouterr().err


def test_a_selection_that_is_not_there_is_one_line_before_anything_else(stage, chain, capsys):
    with pytest.raises(SystemExit, match="^nowhere.csv is missing: 04_select.py"):
        launch(stage, 5, ["--smoke", "--out", str(chain), "--selected", "nowhere.csv"])
    assert "carries no record" not in capsys.readouterr().out
