"""Stage 3: a pair's score belongs to the pair."""
import json
import shutil

import numpy as np
import pytest
import torch

from conftest import launch, write_pictures


@pytest.fixture()
def rated(stage):
    """(nets, pairs): untrained nets and a corpus of two and a half chunks."""
    torch.manual_seed(0)
    pairs = stage(1).draw_toy(1280, 16, 0, "train")
    nets = {name: stage(1).DiT(16, 4, 16, 1, 8) for name in ("proxy", "ref")}
    for net in nets.values():
        torch.nn.init.normal_(net.from_patch.weight, std=0.1)
        torch.nn.init.normal_(net.blocks[0].modulation[1].weight, std=0.1)  # captions matter
    return nets | {"rater": stage(2).Rater(16, 4, 8, 16, 1), "contrast": stage(3).Contrast(16, 8)}, pairs


def rate(stage, nets, pairs, path, stop_after=None):
    """Numbers (N, 10) as stage 3 writes them; ends early where a chunk count is given."""
    progress = stage(1).Progress(f"{path}.progress", "03_score.py", {}, save_every=0)
    if stop_after:
        stage(1).Progress.stop = 15 if stop_after == progress.step + 1 else 0
    stage(3).score(nets, 8, pairs, path, 3, progress, with_baselines=True)
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, 8))


def test_scores_ignore_the_order_of_work(stage, rated, tmp_path):
    nets, pairs = rated
    whole = rate(stage, nets, pairs, tmp_path / "r.csv")
    assert len(whole) == 1280 and np.ptp(whole, axis=0).min() > 1e-6     # no column is constant
    companions = stage(3).draw_companions(nets["rater"], 8, pairs, 3)
    parts = {k: stage(3).score_chunk(nets, pairs.take(range(512 * k, min(512 * k + 512, 1280))),
                                     companions, k, 3, True).numpy() for k in (2, 0, 1)}
    assert np.allclose(whole, np.concatenate([parts[k] for k in (0, 1, 2)]), atol=1e-5)
    one = stage(3).score_chunk(nets, pairs.take([700]), companions, 0, 3).numpy()
    assert np.allclose(one, whole[700:701, :3], atol=1e-5)               # nor batch-mates
    mixed = np.random.default_rng(1).permutation(1280)
    again = rate(stage, nets, pairs.take(mixed), tmp_path / "mixed.csv")
    assert np.allclose(again[:, :3], whole[mixed, :3], atol=1e-5)        # nor the corpus' order


def test_scoring_continues_where_it_was_stopped(stage, rated, tmp_path):
    """Stopped after the first chunk, and with half a line written after the last save."""
    nets, pairs = rated
    whole = rate(stage, nets, pairs, tmp_path / "whole.csv")
    with pytest.raises(SystemExit) as stop:
        rate(stage, nets, pairs, tmp_path / "r.csv", stop_after=1)
    stage(1).Progress.stop = 0
    assert stop.value.code == 128 + 15
    with open(tmp_path / "r.csv", "a") as file:
        file.write("train000512,0.1,0.")
    assert np.array_equal(rate(stage, nets, pairs, tmp_path / "r.csv"), whole)
    assert (tmp_path / "r.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_group_rating_is_the_mean_over_groups_that_the_pair_joins(stage, rated):
    """Against eq. 7's own weights of groups put together pair by pair."""
    nets, pairs = rated
    size = 8
    x, c = pairs.batch(range(3 + stage(3).GROUPS * (size - 1)))
    with torch.no_grad():
        f = nets["rater"].features(x, c)
        companions = f[3:].view(stage(3).GROUPS, size - 1, -1)
        rating = stage(3).group_rating(nets["rater"], f[:3], companions)
        for i in range(3):
            rows = [torch.tensor([i, *range(k, k + size - 1)]) for k in range(3, len(x), size - 1)]
            W = [stage(2).weigh(nets["rater"], x[row], c[row], size)[1] for row in rows]
            assert torch.allclose(torch.stack(W).mean(), rating[i], atol=1e-5)
    drawn = stage(3).draw_companions(nets["rater"], size, pairs, 0)
    assert drawn.shape == companions.shape and len(drawn.flatten(0, 1).unique(dim=0)) > size


@pytest.mark.parametrize("bias", [-300, 300])
def test_a_collapsed_group_head_leaves_finite_ratings(stage, rated, tmp_path, bias):
    """W_batch of exactly 0 or 1: the ranking is the Instance MLP's, and its figure is drawn."""
    nets, pairs = rated
    nets["rater"].group[-1].bias.data.fill_(bias)
    instance, group, rating = rate(stage, nets, pairs, tmp_path / "r.csv").T[:3]
    assert group == pytest.approx(float(bias > 0)) and np.isfinite(rating).all()
    assert (instance - rating).std() < 1e-4 and rating.std() > 1e-3
    stage(3).draw_histogram(tmp_path / "r.png", rating, stage(3).percentiles(rating),
                            np.array(pairs.strata),
                            stage(3).rate(nets["rater"], 8, pairs, pairs.take(range(64)), 3))


def test_progress_is_told(stage, rated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage(1).Progress, "tell_every", 0)
    rate(stage, *rated, tmp_path / "r.csv")
    said = capsys.readouterr().out
    assert all(f"step {k} of 3   " in said for k in (1, 2, 3)) and "pairs a second" in said
    assert "0:00:00 left" in said


def test_baselines_are_the_losses_of_the_two_proxies(stage, rated):
    """With theta = theta_hat the difference is exactly 0: both see the same noise."""
    nets, pairs = rated
    x, c = pairs.batch(range(10))
    with torch.no_grad():
        loss, difference, gain = stage(3).baselines(nets["ref"], nets["ref"], x, c,
                                                    stage(1).seeded("cpu", 1))
        without, _, none = stage(3).baselines(nets["ref"], nets["ref"], x, 0 * c,
                                              stage(1).seeded("cpu", 1))
    assert difference.abs().max() == 0 and loss.min() > 0
    assert none.abs().max() == 0 and gain.abs().max() > 1e-4           # what the caption is worth
    assert torch.allclose(gain, without - loss, atol=1e-5)


def test_numbers_that_wait_for_a_device_are_fetched_at_the_end(stage, rated, tmp_path, monkeypatch):
    """Of three chunks, fewer than the ten after which a GPU is asked."""
    nets, pairs = rated
    monkeypatch.setattr(stage(1).Machine, "fetch_every", 10)
    progress = stage(1).Progress()
    stage(3).score(nets, 8, pairs, tmp_path / "r.csv", 3, progress)
    assert progress.seconds > 0 and progress.log == [[512], [512], [256]]


def test_all_processes_have_the_first_ones_contrastive_network(stage, monkeypatch):
    """GPUs add in another order: each would train one of its own."""
    monkeypatch.setattr(stage(1), "from_first", lambda state: {
        name: torch.full_like(value, 7) for name, value in state.items()})
    net = stage(3).train_contrast(stage(1).draw_toy(32, 16, 0, "val"), 1, 0)
    assert all((p == 7).all() for p in net.parameters())


def test_other_data_get_a_name_of_their_own(stage):
    assert [stage(3).name_data(data) for data in (None, "shards/train-*.tar", ".", "../")] == [
        "", "-of-shards-train", "-of-here", "-of-here"]


def test_too_few_pairs_to_rate_are_said_first(stage, chain, tmp_path):
    out = shutil.copytree(chain, tmp_path / "out")
    write_pictures(stage, tmp_path / "five", 5)
    with pytest.raises(SystemExit, match="five has 5 readable pairs: 10 are needed"):
        launch(stage, 3, ["--smoke", "--out", str(out), "--data", f"{tmp_path}/five"])
    assert not list(out.glob("*five*"))


def test_percentiles_and_auc(stage):
    assert stage(3).percentiles(np.array([1.0, 3.0, 2.0, 0.0])).tolist() == [50, 0, 25, 75]
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 9, 40) + 1, rng.integers(0, 9, 30)
    brute = np.mean([(a > b) + 0.5 * (a == b) for a in high for b in low])
    assert stage(3).auc(high, low) == pytest.approx(brute)


def test_a_joined_ranking_is_reported_too(stage, chain, tmp_path, capsys):
    """With the AUC of the order in which stage 4 would rank."""
    out = shutil.copytree(chain, tmp_path / "out")
    launch(stage, 3, ["--smoke", "--baselines", "--out", str(out)])
    said = capsys.readouterr().out
    _, joined = stage(4).read_ratings(out / "ratings.csv", "rating,contrast")
    found = stage(3).areas(stage(3).read_table(out / "ratings.csv")["stratum"], joined)
    assert "AUC over (rating,contrast): " + ", ".join(
        f"{name} {area:.3f}" for name, area in found.items()) in said


def test_the_record_names_the_whole_command(chain):
    """It is what a later stage tells to run again."""
    said = {name: json.loads((chain / f"{name}.json").read_text())["written_by"]
            for name in ("ratings", "ratings-loss")}
    assert said == {"ratings": "03_score.py --signal difference --baselines",
                    "ratings-loss": "03_score.py --signal loss"}
