"""Stage 5: the metrics against closed forms, the statistics, the choice of rows."""
import numpy as np
import pytest
import torch


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
    arm = next(arm for arm in stage(5).ARMS["default"] if "Shift" in arm.name)
    first, second = (stage(5).choose_rows(arm, pairs, chain, seed) for seed in (0, 1))
    assert len(first) == len(second) == 128 and set(first) != set(second)
    assert set(first) == set(stage(5).choose_rows(arm, pairs, chain, 0))


def test_a_selection_of_other_pairs_is_refused(stage, tmp_path):
    (tmp_path / "other.csv").write_text("key\nnobody\n")
    pairs = stage(1).draw_toy(256, 16, 0, "train")
    with pytest.raises(SystemExit, match="nobody"):
        stage(5).choose_rows(stage(5).Arm("x", file=str(tmp_path / "other.csv")), pairs, "", 0)


def test_arms_are_told_apart_by_name(stage):
    for name, arms in stage(5).ARMS.items():
        assert len({arm.name for arm in arms}) == len(arms), name
        assert {arm.rank_by for arm in arms} <= set(stage(4).RANKINGS)
