"""Stage 1: the loss and the sampler against closed forms, the toy pairs, the readers."""
import io
import json
import pickle
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image


def test_flow_loss_closed_forms(stage):
    """t = 0 shows the net x, t = 1 shows it eps; the error is measured against eps - x."""
    x, eps, seen = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), []

    def net(x_t, t, c):
        seen.append(x_t)
        return torch.full_like(x_t, 0.5)

    loss = stage(1).flow_loss(net, x, None, torch.tensor([0.0, 1.0]), eps)
    assert torch.equal(seen[0][0], x[0]) and torch.equal(seen[0][1], eps[1])
    by_hand = [((0.5 - (eps[i] - x[i])) ** 2).sum() / x[i].numel() for i in range(2)]
    assert torch.allclose(loss, torch.stack(by_hand))


def test_sampler_reaches_data_with_the_true_velocity(stage):
    x0, eps, c = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.ones(4, 5).long()

    def net(x, t, c):                                # along the straight path the velocity is this
        return (eps - x0).repeat(2, 1, 1, 1)
    assert torch.allclose(stage(1).sample(net, c, eps, steps=3), x0, atol=1e-5)


def test_guidance_extrapolates_from_the_empty_caption(stage):
    def net(x, t, c):
        return torch.where(c[:, :1, None, None] > 0, 0.1, 0.02).expand_as(x)
    drawn = stage(1).sample(net, torch.ones(1, 5).long(), torch.zeros(1, 3, 8, 8), 4, guidance=3.0)
    assert torch.allclose(drawn, torch.tensor(-(0.02 + 3 * (0.1 - 0.02))))


def test_patches_round_trip_and_the_untrained_net_is_zero(stage):
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(stage(1).unpatchify(stage(1).patchify(x, 4), 4, 12), x)
    net = stage(1).DiT(12, 4, 16, 1, 5)
    assert net(x, torch.rand(2), torch.ones(2, 5).long()).abs().max() == 0


def test_the_proxy_reads_picture_time_and_caption(stage):
    """Whatever takes its place (README, "Fork it") has to, or eq. 6 compares two blind models."""
    torch.manual_seed(0)
    proxy = stage(1)
    net = proxy.build_proxy(proxy.parse_args([]), "cpu")
    for p in net.parameters():                             # the zeros of the start let nothing out
        torch.nn.init.normal_(p, std=0.1)
    x, t, c = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.6]), torch.randint(1, 99, (2, 8))
    v = net(x, t, c)
    assert v.shape == x.shape
    for other in ((x + 1, t, c), (x, t + 0.2, c), (x, t, c + 1)):
        assert not torch.allclose(net(*other), v, rtol=1e-3)
    assert torch.allclose(net(x[1:], t[1:], c[1:]), v[1:], atol=1e-5)         # pair by pair


def test_noise_is_shifted_and_repeatable(stage):
    x = torch.zeros(20000, 3, 1, 1)
    t, eps = stage(1).draw_noise(x, stage(1).seeded("cpu", 1), shift=1.2)
    again, _ = stage(1).draw_noise(x, stage(1).seeded("cpu", 1), shift=1.2)
    assert torch.equal(t, again) and abs(torch.logit(t).mean() - 1.2) < 0.03
    assert abs(eps.std() - 1) < 0.02


def test_toy_strata_and_captions(stage):
    """Captions name what is in the picture; every word of a wrong one but the grammar is false."""
    proxy = stage(1)
    pairs = proxy.draw_toy(2000, 16, 3, "train")
    counts = {name: pairs.strata.count(name) / 2000 for name in proxy.STRATA}
    assert counts == pytest.approx(proxy.STRATA, abs=1e-3)
    palette = torch.tensor(list(proxy.COLOURS.values()))
    nearest = ((pairs.images[:, :, 8, 8].int()[:, None] - palette) ** 2).sum(2).argmin(1)
    for stratum, right in (("informative", 1.0), ("chaotic-caption", 0.0)):
        rows = [i for i, name in enumerate(pairs.strata) if name == stratum]
        named = [list(proxy.COLOURS)[nearest[i]] in pairs.captions[i] for i in rows]
        assert np.mean(named) == pytest.approx(right, abs=0.03)


def test_toy_splits_share_no_picture_and_follow_the_seed(stage):
    train, val = (stage(1).draw_toy(300, 16, 0, split) for split in ("train", "val"))
    assert set(val.strata) <= {"informative"}
    assert not set(map(bytes, train.images.numpy())) & set(map(bytes, val.images.numpy()))
    assert torch.equal(train.images, stage(1).draw_toy(300, 16, 0, "train").images)
    assert not torch.equal(train.images, stage(1).draw_toy(300, 16, 1, "train").images)


@pytest.mark.parametrize("caption", ["a red cat", "ein Käse", "红色的猫", "قط أحمر", "😀 😀", "!!!"])
def test_captions_of_any_language_get_words(stage, caption):
    ids = stage(1).find_word_rows(caption)
    assert ids and all(0 < i < stage(1).VOCABULARY for i in ids)
    assert len(stage(1).find_word_rows("红色的猫")) == 4
    assert stage(1).tokenize([caption * 30], 8).shape == (1, 8)


def test_every_epoch_shows_every_pair_once(stage):
    for epoch in range(2):
        rows = np.concatenate([*stage(1).draw_batches(12, 4, 0, epoch * 3, epoch * 3 + 3)])
        assert sorted(rows) == list(range(12))


def encode(mode, kind="PNG", size=(20, 14), colour=None):
    """Bytes of a picture; `colour` where its pixels are to be checked."""
    image = Image.new(mode, size, colour) if colour is not None else Image.new(mode, size)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


GOOD = {"rgb.jpg": encode("RGB", "JPEG"), "grey.png": encode("L"), "palette.png": encode("P"),
        "clear.png": encode("RGBA", colour=(255, 0, 0, 0)), "cmyk.jpg": encode("CMYK", "JPEG"),
        "deep.png": encode("I;16", colour=65535), "web.webp": encode("RGB", "WEBP")}
BAD = {"cut.jpg": GOOD["rgb.jpg"][:300], "empty.png": b"", "page.jpg": b"<html>not found</html>"}


def write_folder(folder):
    """Seven good pictures and three broken ones with captions, and one good one without."""
    for name, data in (GOOD | BAD).items():
        file = folder / f"a {name}"
        file.write_bytes(data)
        file.with_suffix(".txt").write_text(f"caption of {name}", encoding="utf-8")
    (folder / "silent.png").write_bytes(GOOD["grey.png"])
    (folder / "silent.txt").write_text("  ")


def write_tar(folder):
    source = folder / "loose"
    source.mkdir()
    write_folder(source)
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for file in sorted(source.iterdir()):
            tar.add(file, file.name)
        note = json.dumps({"caption": "from json", "stratum": "plain"}).encode()
        for name, data in (("j.png", GOOD["grey.png"]), ("j.json", note)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder / "shard.tar"


def write_table(folder, kind):
    write_folder(folder)
    rows = [(f"a {name}", f"table, {name}") for name in GOOD | BAD] + [("gone.png", "x")]
    if kind == "csv":
        lines = ["file_name,text", *(f'{name},"{text}"' for name, text in rows)]
        (folder / "metadata.csv").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    else:
        lines = [json.dumps({"file_name": name, "prompt": text}) for name, text in rows]
        (folder / "metadata.jsonl").write_text("\n".join(lines + ["not json"]), encoding="utf-8")


def read_pairs(stage, path):
    return stage(1).keep_resident(stage(1).open_pairs(path, 16, 8))


def test_reader_of_tar_shards(stage, tmp_path, capsys):
    pairs = read_pairs(stage, write_tar(tmp_path))
    assert len(pairs) == len(GOOD) + 1 and pairs.images.shape == (8, 3, 16, 16)
    assert pairs.captions[pairs.keys.index("j")] == "from json"
    assert pairs.strata[pairs.keys.index("j")] == "plain"
    said = capsys.readouterr().out
    assert said.count("unreadable image") == 2 and "skipped 1 (no caption)" in said


def test_reader_of_a_folder_and_colour_modes(stage, tmp_path):
    write_folder(tmp_path)
    pairs = read_pairs(stage, tmp_path)
    assert len(pairs) == len(GOOD)
    colour = {key: image[:, 8, 8].tolist() for key, image in zip(pairs.keys, pairs.images)}
    assert colour["a clear"] == [255] * 3            # transparent: white below
    assert colour["a deep"] == [255] * 3             # 16 bit: the upper eight


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_reader_of_tables(stage, tmp_path, capsys, kind):
    write_table(tmp_path, kind)
    pairs = read_pairs(stage, tmp_path)
    assert len(pairs) == len(GOOD) and pairs.captions[1] == "table, grey.png"
    assert "image file missing" in capsys.readouterr().out


def test_damaged_shard_keeps_what_came_before(stage, tmp_path, capsys):
    path = write_tar(tmp_path)
    path.write_bytes(path.read_bytes()[:6000])
    assert len(read_pairs(stage, path)) >= 1
    assert "damaged" in capsys.readouterr().out


def test_clear_errors(stage, tmp_path):
    args = SimpleNamespace(data=str(tmp_path), val=None, size=16, words=8, seed=0, batch_size=64,
                           smoke=False, out=None, pairs=None, plant="")
    write_folder(tmp_path)
    for change, part in (({"data": "nowhere"}, "nowhere: no such file"), ({}, "fewer than")):
        with pytest.raises(SystemExit, match=part):
            stage(1).load_data(SimpleNamespace(**{**vars(args), **change}), "cpu")
    with pytest.raises(SystemExit, match="run 01_proxy.py"):
        stage(1).load(tmp_path / "proxy.pt", "01_proxy.py")


def test_checkpoints_never_run_code(stage, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))
    (tmp_path / "proxy.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(SystemExit, match="cannot be read"):
        stage(1).load(tmp_path / "proxy.pt", "01_proxy.py")
    assert not (tmp_path / "sprung").exists()


def test_every_epoch_has_an_order_of_its_own_and_any_step_can_be_drawn_by_itself(stage):
    batches = [rows.tolist() for rows in stage(1).draw_batches(10, 3, 0, 0, 9)]
    epochs = [sum(batches[k:k + 3], []) for k in (0, 3, 6)]
    assert all(len(set(rows)) == 9 for rows in epochs)     # the short rest is left out
    assert len({tuple(rows) for rows in epochs}) == 3
    for first in range(9):
        assert [rows.tolist() for rows in stage(1).draw_batches(10, 3, 0, first, 9)] == batches[
            first:]
