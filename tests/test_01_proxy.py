"""Stage 1: the loss and the sampler against closed forms, words, toy pairs, known data sets, the
dials."""
import pickle
import unicodedata

import numpy as np
import pytest
import torch
from torchvision import datasets

from common import collect
from conftest import launch, prepare, write, write_fashion


# ---- the loss, its noise, the sampler, the network -----------------------------------------------
def test_flow_loss_closed_forms(stage):
    """t = 0 shows the net x, t = 1 shows it eps; the error is measured against eps - x."""
    x, eps, seen = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), []
    loss = stage(1).flow_loss(lambda x_t, t, c: seen.append(x_t) or torch.full_like(x_t, 0.5),
                              x, None, torch.tensor([0.0, 1.0]), eps)
    assert torch.equal(seen[0][0], x[0]) and torch.equal(seen[0][1], eps[1])
    by_hand = [((0.5 - (eps[i] - x[i])) ** 2).sum() / x[i].numel() for i in range(2)]
    assert torch.allclose(loss, torch.stack(by_hand))


def test_sampler_reaches_data_and_guidance_extrapolates_from_the_empty_caption(stage):
    x0, eps, c = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.ones(4, 5).long()
    drawn = stage(1).sample(lambda x, t, c: (eps - x0).repeat(2, 1, 1, 1), c, eps, steps=3)
    assert torch.allclose(drawn, x0, atol=1e-5)            # along the straight path
    drawn = stage(1).sample(lambda x, t, c: torch.where(
        c[:, :1, None, None] > 0, 0.1, 0.02).expand_as(x), c, 0 * eps, 4, guidance=3.0)
    assert torch.allclose(drawn, torch.tensor(-(0.02 + 3 * (0.1 - 0.02))))


def test_the_proxy_reads_picture_time_and_caption(stage):
    """Whatever takes its place (README, "Fork it") has to, or eq. 6 compares two blind models."""
    torch.manual_seed(0)
    proxy = stage(1)
    net = proxy.build_proxy(proxy.parse_args([]), torch.device("cpu"))
    x, t, c = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.6]), torch.randint(1, 99, (2, 8))
    assert net(x, t, c).abs().max() == 0                   # untrained
    for p in net.parameters():                             # the zeros of the start let nothing out
        torch.nn.init.normal_(p, std=0.1)
    v = net(x, t, c)
    assert v.shape == x.shape
    for other in ((x + 1, t, c), (x, t + 0.2, c), (x, t, c + 1)):
        assert not torch.allclose(net(*other), v, rtol=1e-3)
    assert torch.allclose(net(x[1:], t[1:], c[1:]), v[1:], atol=1e-5)         # pair by pair


def test_noise_is_shifted_and_repeatable_and_captions_are_dropped(stage):
    x, s1 = torch.zeros(20000, 3, 1, 1), stage(1)
    t, eps = s1.draw_noise(x, s1.seeded("cpu", 1), shift=1.2)
    again, _ = s1.draw_noise(x, s1.seeded("cpu", 1), shift=1.2)
    assert torch.equal(t, again) and abs(torch.logit(t).mean() - 1.2) < 0.03
    assert abs(eps.std() - 1) < 0.02
    kept = s1.drop_captions(torch.ones(20000, 3).long(), s1.seeded("cpu", 0))
    assert (kept == kept[:, :1]).all() and abs(kept.float().mean() - 0.9) < 0.01


def test_every_epoch_has_an_order_of_its_own_and_any_step_can_be_drawn_by_itself(stage):
    batches = [rows.tolist() for rows in stage(1).draw_batches(10, 3, 0, 0, 9)]
    epochs = [sum(batches[k:k + 3], []) for k in (0, 3, 6)]
    assert all(len(set(rows)) == 9 for rows in epochs)     # the short rest is left out
    assert len({tuple(rows) for rows in epochs}) == 3
    for k in (1, 3, 8):
        assert next(stage(1).draw_batches(10, 3, 0, k, 9)).tolist() == batches[k]


def test_checkpoints_never_run_code(stage, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))
    s1, path = stage(1), tmp_path / "proxy.pt"
    path.write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(SystemExit, match="was changed: run 01_proxy.py"):
        s1.load(path, "01_proxy.py")
    s1.record(path, "01_proxy.py", [], settings={})        # even one whose record fits
    with pytest.raises((SystemExit, pickle.UnpicklingError)):
        s1.load(path, "01_proxy.py")
    assert not (tmp_path / "sprung").exists()


# ---- words --------------------------------------------------------------------------------------
WORDS = {                  # that differ in vowel signs, tones or points alone
    "Hindi": "कमल कमाल कमली कमला कि की कु कू के", "Bengali": "কি কী কা কু কে",
    "Thai": "กิน กัน กีน กึน มี มิ มื", "Khmer": "កា កិ កី កុ កែ", "Burmese": "ကာ ကိ ကီ ကု ကေ",
    "Hebrew": "סֵפֶר סַפָּר סְפָר", "Yoruba": "ọ̀kọ ọ́kọ ọkọ", "Latin": "cat cut cot 12 ½",
}


@pytest.mark.parametrize("script", WORDS)
def test_words_of_every_script_have_rows_of_their_own(stage, script):
    words = WORDS[script].split()
    rows = stage(1).tokenize(words, 4)
    assert (rows[:, 0] > 0).all() and (rows[:, 1:] == 0).all()                # one word each
    assert len(set(rows[:, 0])) == len(words)
    for form in ("NFC", "NFD"):
        other = [unicodedata.normalize(form, word).upper() for word in words]
        assert (stage(1).tokenize(other, 4) == rows).all()


def test_captions_of_any_kind_get_words(stage):
    rows = stage(1).tokenize(["红色的猫", "赤いネコ", "빨간", "!!!", "a ❤️ cat", "word " * 30, ""], 4)
    assert rows.dtype == np.int16 and ((0 <= rows) & (rows < stage(1).VOCABULARY)).all()
    assert (rows > 0).sum(1).tolist() == [4, 4, 2, 1, 2, 4, 0]


# ---- toy pairs -----------------------------------------------------------------------------------
def test_toy_strata_and_captions(stage):
    """Captions name what is in the picture; every word of a wrong one but the grammar is false."""
    proxy = stage(1)
    pairs = collect(proxy.draw_toy(2000, 16, 3, "train"))
    strata, captions = pairs.strata(), pairs.read("caption")
    shares = {name: (strata == name).mean() for name in proxy.STRATA}
    assert shares == pytest.approx(proxy.STRATA, abs=1e-3)
    palette = np.array(list(proxy.COLOURS.values()))
    nearest = ((pairs.images[:, None, :, 8, 8] - palette) ** 2.0).sum(2).argmin(1)
    for stratum, right in (("informative", 1.0), ("chaotic-caption", 0.0)):
        named = [list(proxy.COLOURS)[nearest[k]] in captions[k]
                 for k in np.flatnonzero(strata == stratum)]
        assert np.mean(named) == pytest.approx(right, abs=0.03)
    assert {captions[k] for k in np.flatnonzero(strata == "plain")} == {proxy.PLAIN_CAPTION}
    spread = pairs.images.std((1, 2, 3))
    assert spread[strata == "plain"].max() < 20 and spread[strata == "chaotic-noise"].min() > 40


# ---- data sets that everyone knows ---------------------------------------------------------------
@pytest.fixture
def offline(monkeypatch):
    def unreachable(*args, **how):
        raise OSError("no network\nat all")
    for module in ("mnist", "cifar"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive",
                            unreachable)


GARMENTS = ["a t-shirt", "a trouser", "a pullover", "a dress", "a coat", "a sandal", "a shirt",
            "a sneaker", "a bag", "an ankle boot"]


def test_a_data_set_gives_captions_from_classes_and_splits_that_share_nothing(stage, tmp_path):
    write_fashion(tmp_path)
    found = prepare(stage, tmp_path / "out", "--data", "FashionMNIST", "--root", tmp_path,
                    "--batch-size", "8")
    keys = {split: pairs.read("key") for split, pairs in found.items()}
    assert [len(keys[split]) for split in ("train", "val", "test")] == [208, 52, 60]
    assert not set(keys["train"]) & set(keys["val"])
    assert all(key.startswith("test") for key in keys["test"])
    for split, pairs in found.items():
        for key, row, caption in zip(keys[split], pairs.rows, pairs.read("caption")):
            label = int(key.lstrip("trainest")) % 10
            assert (pairs.images[row] == 20 * label).all()             # picture and caption agree
            assert caption == f"a photo of {GARMENTS[label]}"


def test_a_wrong_file_of_a_data_set_ends_in_one_line(stage, tmp_path, offline):
    write_fashion(tmp_path)
    (tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte").write_bytes(b"<html>404</html>")
    with pytest.raises(SystemExit, match="FashionMNIST could not be read or downloaded") as stop:
        prepare(stage, tmp_path, "--data", "FashionMNIST", "--root", tmp_path)
    assert "\n" not in stop.value.code and str(tmp_path) in stop.value.code
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize("name, labels", [("CIFAR10", "labels"), ("CIFAR100", "fine_labels")])
def test_cifar_in_its_own_files(stage, tmp_path, monkeypatch, name, labels):
    kind = getattr(datasets, name)
    blob = pickle.dumps({"data": np.repeat(np.arange(120, dtype=np.uint8)[:, None], 3072, axis=1),
                         labels: [k % 10 for k in range(120)],
                         kind.meta["key"]: ["orchid", *["aquarium_fish"] * 9]})
    names = [name for name, _ in kind.train_list + kind.test_list] + [kind.meta["filename"]]
    write(tmp_path / kind.base_folder, dict.fromkeys(names, blob))
    monkeypatch.setattr(kind, "_check_integrity", lambda _: True)             # of their check sums
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    pairs = prepare(stage, tmp_path, "--data", name, "--root", tmp_path, "--batch-size",
                    "8")["train"]
    for key, row, caption in zip(pairs.read("key"), pairs.rows, pairs.read("caption")):
        number = int(key.removeprefix("train")) % 120
        assert (pairs.images[row] == number).all()
        assert caption.endswith("aquarium fish" if number % 10 else "orchid")


def test_a_cache_that_cannot_be_written_is_one_line_with_the_cure(stage, tmp_path, monkeypatch,
                                                                  offline):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_HOME", f"{tmp_path}/file")
    for flags in (["FashionMNIST"], ["CIFAR10", "--root", f"{tmp_path}/file/root"]):
        with pytest.raises(SystemExit, match="could not be read or downloaded.*--root") as stop:
            launch(stage, 1, ["--out", str(tmp_path), "--data", *flags])
        assert "\n" not in str(stop.value)
