"""Pairs are prepared once: what is made anew and why, kills at any moment, splits, planted dirt,
and a chain that no longer needs its files."""
import itertools
import multiprocessing
import os
import select
import shutil
import signal

import numpy as np
import pytest
import torch

from common import collect, s1
from conftest import encode, launch, prepare, write, write_pictures, write_tar

PLANT = ["--plant", "0.05", "0.1", "0.2"]                  # plain, noise, captions


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_both(stage, folder, n, trusted):
    """Folders data and val of pictures, and the options that name them."""
    write_pictures(stage, folder / "data", n, "test")
    write_pictures(stage, folder / "val", trusted)
    return ["--data", f"{folder}/data", "--val", f"{folder}/val", "--batch-size", "8"]


def test_mapped_pairs_are_those_in_memory(stage, tmp_path):
    """Pictures, words, keys, captions and strata, and those of a part of a part."""
    mapped = prepare(stage, tmp_path, "--smoke")
    for split, (_, n) in s1.TOY_PAIRS.items():
        memory = collect(s1.draw_toy(n, 16, 0, split))
        some = np.random.default_rng(0).permutation(n)[:20]
        for a, b in ((memory, mapped[split]), (memory.take(some), mapped[split].take(some)),
                     (memory.take(some).take([3, 1]), mapped[split].take(some[[3, 1]]))):
            assert len(a) == len(b) and all(map(torch.equal, a.batch(), b.batch()))
            assert a.read("key") == b.read("key") and a.read("caption") == b.read("caption")
            assert (a.strata() == b.strata()).all() and (a.strata([0]) == b.strata([0])).all()
            assert torch.equal(a.batch([1, 0])[0], b.batch()[0][[1, 0]])
    assert abs(mapped["val"].batch()[0]).max() <= 1


def test_prepared_pairs_serve_until_an_option_or_a_file_changes(stage, tmp_path, capsys,
                                                                monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    monkeypatch.setattr(stage(1), "LEAST", 4)
    write_pictures(stage, data, 200)
    flags = ["--data", data, "--batch-size", "4"]
    first = prepare(stage, out, *flags)["train"].read("key")
    assert "no --val" in capsys.readouterr().out
    before = contents(out / "pairs")
    prepare(stage, out, *flags, "--steps", "3", "--lr", "1", "--width", "32")
    assert capsys.readouterr().out == "" and contents(out / "pairs") == before
    for kind in ("png", "txt"):
        (data / f"{first[0]}.{kind}").unlink()
    (data / f"{first[1]}.txt").write_text("another caption")
    changes = {"files": [], "size": ["--size", "8"], "words": ["--words", "3"],
               "pairs": ["--pairs", "50"], "plant": PLANT, "seed": ["--seed", "1"],
               "val": ["--val", data]}
    for name, more in changes.items():
        again = prepare(stage, out, *flags, *more)["train"]
        said = capsys.readouterr().out
        assert name in said.partition("is made anew, with other ")[2].split("\n")[0], said
        if name == "files":
            assert first[0] not in again.read("key") and "another caption" in again.read("caption")
        prepare(stage, out, *flags, *more)
        assert capsys.readouterr().out == "" and contents(out / "pairs") != before
    os.utime(data / f"{first[2]}.png", ns=(1, 1))
    prepare(stage, out, *flags, *changes["val"])
    assert "other files" in capsys.readouterr().out


@pytest.mark.parametrize("moment, old", [
    ("append", None), ("plant_pictures", None), ("json.dumps", "another"), ("os.sync", "another"),
    ("shutil.rmtree", "another")])
def test_a_run_killed_while_it_prepares_is_never_taken_for_whole(stage, tmp_path, monkeypatch,
                                                                  moment, old):
    """Its readers end; the same command then gives the bytes of an undisturbed run, also where
    pairs of other options stood there before."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_pictures(stage, data, 300)
    monkeypatch.setattr(s1, "TASK", 100)                   # three tasks, more than a pipe holds
    monkeypatch.setattr(s1, "LEAST", 4)
    flags = ["--data", data, "--batch-size", "4", *PLANT]
    prepare(stage, tmp_path / "sound", *flags)
    if old:
        prepare(stage, out, *flags, "--size", "8")
    owner, _, name = moment.rpartition(".")
    place = getattr(s1, owner) if owner else s1
    undisturbed, calls = getattr(place, name), itertools.count()

    def last_words(*args, **how):
        if moment == "shutil.rmtree":                      # in the midst of taking a folder away
            if args[0].name != "pairs" or not args[0].exists():
                return
            (args[0] / "images.npy").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if next(calls) == 3 * (moment == "append"):        # the second of three tasks
            os.kill(os.getpid(), signal.SIGKILL)
        return undisturbed(*args, **how)
    alive, held = os.pipe()                                # `held` by the child and its readers
    with monkeypatch.context() as patch:
        patch.setattr(place, name, last_words)
        child = multiprocessing.get_context("fork").Process(
            target=prepare, args=(stage, out, *flags))
        child.start()
    child.join()
    os.close(held)
    assert select.select([alive], [], [], 60)[0] and os.read(alive, 1) == b""   # nobody is left
    os.close(alive)
    assert child.exitcode == -signal.SIGKILL
    if old is None:
        with pytest.raises(SystemExit, match="run 01_proxy.py"):
            s1.open_pairs(out / "pairs")
    prepare(stage, out, *flags)
    assert contents(out / "pairs") == contents(tmp_path / "sound/pairs")
    assert not (out / "pairs.part").exists()


def test_after_stage_1_no_stage_needs_the_files(stage, tmp_path, monkeypatch):
    """One snapshot: moved away or changed in place, they change nothing in 02 to 05."""
    monkeypatch.chdir(tmp_path)
    flags = ["--out", "out", "--smoke", "--batch-size", "16"]
    files = [*write_both(stage, tmp_path, 60, 40), *flags]
    launch(stage, 1, files)
    before = contents(tmp_path / "out/pairs")
    for name in ("data", "val"):
        (tmp_path / name).rename(tmp_path / f"{name}, once")
    monkeypatch.setattr(stage(3), "draw_bands", print)     # which takes its time
    for number, more in ((2, flags), (3, flags[:2]), (4, [*flags[:2], "--keep", "20"])):
        launch(stage, number, more)
    stage(1).launch(lambda args, device: stage(5).main(args, device, stage(5).ARMS[:1]),
                    stage(5).parse_args([*flags, "--seeds", "1"]))
    shards = ["--out", "out", "--keep", "20", "--write-shards", "new"]
    for number, more in ((1, files), (4, shards)):
        with pytest.raises(SystemExit, match="data: no such file or folder"):
            launch(stage, number, more)
    for name in ("data", "val"):
        shutil.copytree(f"{name}, once", name)
        for path in (tmp_path / name).iterdir():
            path.write_bytes(b"x" if path.suffix == ".txt" else encode())
    launch(stage, 4, ["--out", "out", "--keep", "20"])
    with pytest.raises(SystemExit, match="has changed since"):
        launch(stage, 4, shards)
    assert contents(tmp_path / "out/pairs") == before


@pytest.mark.parametrize("n, words", [(20, "the val split has .*less than 16"),
                                      (500, "lower --batch-size")])
def test_too_few_pairs_are_refused_before_any_work(stage, tmp_path, n, words):
    write_pictures(stage, tmp_path / "data", n)
    with pytest.raises(SystemExit, match=words) as stop:
        launch(stage, 1, ["--data", f"{tmp_path}/data", "--out", f"{tmp_path}/out",
                          *["--batch-size", "8"] * (n < 500)])
    assert "\n" not in str(stop.value) and not (tmp_path / "out/pairs").exists()


def test_a_pair_stays_in_its_split(stage, tmp_path, monkeypatch):
    """Whatever is added; half of --val each way; other seeds, other splits."""
    def split_of(folder, *more):
        found = prepare(stage, tmp_path / "out", "--data", folder, "--batch-size", "1", *more)
        return {key: split for split, pairs in found.items() for key in pairs.read("key")}
    monkeypatch.setattr(s1, "LEAST", 4)
    write_pictures(stage, tmp_path / "all", 240)
    files = contents(tmp_path / "all")
    before = split_of(write(tmp_path / "data", dict(list(files.items())[80:])))
    assert len(before) == 200 and 160 < list(before.values()).count("train")
    after = split_of(write(tmp_path / "data", files))
    assert len(after) == 240 and all(after[key] == split for key, split in before.items())
    assert split_of(tmp_path / "data", "--seed", "1") != after
    val = write(tmp_path / "val", {f"w{name}": data for name, data in list(files.items())[:200]})
    trusted = split_of(tmp_path / "data", "--val", val)
    assert all((split == "train") != key.startswith("w") for key, split in trusted.items())
    assert len(trusted) == 340 and 30 < list(trusted.values()).count("val") < 70
    for split in ("val", "test"):                          # mixed: stage 5 takes the first 512
        rows = np.load(tmp_path / f"out/pairs/{split}.npy")
        assert (np.diff(rows) < 0).any() and len(set(rows)) == len(rows)
    part = split_of(tmp_path / "data", "--val", val, "--pairs", "100")
    assert part.items() < trusted.items() and list(part.values()).count("train") == 100
    keys = np.random.default_rng(0).integers(2 ** 64, size=10 ** 6, dtype="u8")
    val, test, rest = s1.deal(np.arange(10 ** 6), keys, 0.1, 0)
    assert sorted([*val, *test, *rest]) == list(range(10 ** 6))
    assert abs(len(val) - 50000) < 1000 and abs(len(test) - 50000) < 1000


def test_what_comes_twice_is_read_once_and_trusted_pictures_in_the_corpus_are_said(
        stage, tmp_path, capsys):
    write_pictures(stage, tmp_path / "val", 60)
    files = contents(tmp_path / "val")
    again = {name: data if "png" in name else b"other words" for name, data in files.items()}
    write_tar(write(tmp_path / "data", {"readme.md": b"x"}) / "a.tar", files)
    write_tar(tmp_path / "data/b.tar", again | {"new.png": encode(), "new.txt": b"x"})
    found = prepare(stage, tmp_path / "out", "--data", tmp_path / "data", "--val",
                    tmp_path / "val", "--batch-size", "8")
    said = capsys.readouterr().out
    assert len(found["train"]) == 61 and "other words" not in found["train"].read("caption")
    assert "skipped 60 (comes twice), the first of them pair 61" in said, said
    assert f"{len(found['val'])} pictures of the val split are training pictures" in said


# ---- planted dirt -----------------------------------------------------------------------------
def test_planted_dirt_is_what_its_mark_says(stage, tmp_path, capsys):
    flags = write_both(stage, tmp_path, 200, 50)
    clean = prepare(stage, tmp_path / "clean", *flags)
    dirty = prepare(stage, tmp_path / "dirty", *flags, *PLANT)
    said = capsys.readouterr().out
    assert "planted-plain: 10 pairs\nplanted-noise: 20 pairs\nplanted-caption: 40 pairs\n" in said
    for split in ("val", "test"):
        assert contents(tmp_path / "clean/pairs")[f"{split}.npy"] == contents(
            tmp_path / "dirty/pairs")[f"{split}.npy"]
        assert torch.equal(clean[split].batch()[0], dirty[split].batch()[0])
        assert set(dirty[split].strata()) == {""}
    clean, dirty = clean["train"], dirty["train"]
    assert clean.read("key") == dirty.read("key")
    captions, words = clean.read("caption"), dirty.read("caption")
    assert (dirty.batch()[1].numpy() == s1.tokenize(words, 8)).all()
    for k, stratum in enumerate(dirty.strata()):
        spread = dirty.images[dirty.rows[k]].std()
        same = (clean.images[clean.rows[k]] == dirty.images[dirty.rows[k]]).all()
        assert same == (stratum in ("", "planted-caption")), stratum
        assert (words[k] == captions[k]) == (stratum in ("", "planted-noise")), stratum
        assert (words[k] == s1.PLAIN_CAPTION) == (stratum == "planted-plain")
        assert spread < 20 if stratum == "planted-plain" else words[k] in captions
        assert spread > 40 or stratum != "planted-noise"


PLANTED = "--plant.*together 0.99 at most"


@pytest.mark.parametrize("flags, message", [
    ("--plant 0.1 0.1", PLANTED), ("--plant nan", PLANTED), ("--plant 0.4", PLANTED),
    ("--plant 0 0.6 0.5", PLANTED), ("--plant=-0.1", PLANTED),
    ("--data toy --val a", "--data toy takes no --val"),
    ("--data own --pairs 9", "own takes no .*--pairs"), ("--data own --plant 0.1", "--plant")])
def test_options_that_cannot_be_meant_are_refused(stage, flags, message):
    with pytest.raises(SystemExit, match=message):
        stage(1).parse_args(flags.split())
