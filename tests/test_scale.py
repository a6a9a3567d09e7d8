"""Corpora of tars: read as WebDataset's rule says, rated elsewhere than trained, taken home as new
tars."""
import io
import json
import tarfile
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from conftest import encode, launch, prepare, write, write_pictures, write_tar


def read_by_webdataset(paths):
    """[(key, {suffix: bytes})] of tars by WebDataset's rule, written anew from its description: the
    key ends at the first dot of the base name, a pair is a run of members of one key."""
    runs = []
    for path in paths:
        last = None
        with tarfile.open(path) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                head, _, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                key = f"{head}/{key}" if head else key
                if key != last:
                    runs.append((key, {}))
                runs[-1][1][kind], last = tar.extractfile(member).read(), key
    return runs


def picture(rng):
    file = io.BytesIO()
    Image.fromarray(rng.integers(256, size=(*rng.integers(16, 40, 2), 3), dtype=np.uint8)).save(
        file, rng.choice(["PNG", "WEBP"]), **{"lossless": True})
    return file.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """300 pairs in three tars, with other files, files without a picture, and suffixes of two
    words."""
    folder, rng = tmp_path_factory.mktemp("tars"), np.random.default_rng(0)
    for number in range(3):
        files = {}
        for k in range(100):
            key = f"{rng.choice(['', 'a/', 'v1.0/b c/'])}{number}{k:03d}"
            kinds = {"jpg": picture(rng), "txt": f"caption {rng.integers(100)}".encode(),
                     "cls": b"7", "seg.png": encode(colour=(k, 0, 0)), "json": b'{"caption": "no"}'}
            for name in {3: ("txt", "json"), 4: ("jpg", "seg.png")}.get(k % 50, ()):
                del kinds[name]
            files |= {f"{key}.{kind}": kinds[kind] for kind in rng.permutation(list(kinds))}
        write_tar(folder / f"train-{number}.tar", files)
    return folder


def test_tars_are_read_as_webdataset_says(stage, tars, tmp_path, capsys, monkeypatch):
    """All pairs in their order, whole pictures and captions, for one reader and for two."""
    right = {key: (stage(1).decode_image(files["jpg"], 16), files["txt"].decode())
             for key, files in read_by_webdataset(sorted(tars.iterdir()))
             if {"jpg", "txt"} <= files.keys()}
    assert len(right) == 288
    monkeypatch.setattr(stage(1), "LEAST", 4)
    for n, place in ((1, tars), (2, f"{tars}/train-*.tar")):
        monkeypatch.setattr(stage(1).torch, "get_num_threads", lambda n=n: n)
        splits = prepare(stage, tmp_path / f"{n}", "--data", place, "--batch-size", "8")
        said = capsys.readouterr().out
        for number, reason in ((6, "no caption"), (6, "no picture beside"), (294, "further pic")):
            assert f"skipped {number} ({reason}" in said
        found = {key: (pairs.images[row], caption) for pairs in splits.values()
                 for key, row, caption in zip(pairs.read("key"), pairs.rows, pairs.read("caption"))}
        assert found.keys() == right.keys()
        for key, (image, caption) in right.items():
            assert caption == found[key][1] and np.array_equal(image, found[key][0]), key
        keys = splits["train"].read("key")
        assert len(keys) > 230 and keys == [key for key in right if key in {*keys}]


def take_home(stage, out, flags, keep="1"):
    """The training pairs of these options, and those of the tars that stage 4 writes of the last
    of them by foreign ratings, which rise; and these tars."""
    pairs = prepare(stage, out, *flags, "--batch-size", "8")["train"]
    np.save(out / "ratings.npy", np.arange(float(len(pairs))))
    for again in (False, True):                            # no tar is overwritten
        with pytest.raises(SystemExit, match="holds tars") if again else nullcontext():
            launch(stage, 4, ["--out", str(out), "--keep", keep, "--method", "topk",
                              "--write-shards", f"{out}/new"])
    new = prepare(stage, out / "again", "--data", out / "new", "--val", flags[-1],
                  "--batch-size", "8")["train"]
    rows = np.arange(len(pairs))[-len(new):]
    assert new.read("caption") == pairs.read("caption", rows)
    assert (new.images[new.rows] == pairs.images[pairs.rows[rows]]).all()
    return pairs, new, sorted((out / "new").iterdir())


def test_new_shards_hold_the_selected_pairs_byte_for_byte(stage, tars, tmp_path, monkeypatch):
    """All files of a pair, in tars of 10,000, here of 40."""
    monkeypatch.setattr(stage(4).write_shards, "__defaults__", (40,))
    pairs, new, paths = take_home(stage, tmp_path, ["--data", tars, "--val", tars], "100")
    old, found = dict(read_by_webdataset(sorted(tars.iterdir()))), read_by_webdataset(paths)
    assert [path.name for path in paths] == ["000000.tar", "000001.tar", "000002.tar"]
    assert [key for key, _ in found] == pairs.read("key")[-100:] == new.read("key")
    assert all(files == old[key] for key, files in found)


def test_new_shards_of_folders_and_tables(stage, tmp_path):
    """Names with dots, folders, letters and marks of every kind; captions with commas and lines."""
    rng = np.random.default_rng(0)
    names = {"img.1": "one", "img.2": 'two, or "2"', "deep/v1.0/3.4": "three\nlines", "50%": "four",
             "a%2Eb": "five", "ü 红": "six", **{f"rest/{k}": f"rest {k}" for k in range(30)}}
    right = {text: picture(rng) for text in names.values()}
    write(tmp_path / "table", {f"{name}.webp": right[text] for name, text in names.items()} | {
        "all.jsonl": "\n".join(json.dumps({"file_name": f"{name}.webp", "caption": [text, "more"]})
                               for name, text in names.items()).encode()})
    for name, text in names.items():                       # a dot ends a key there
        write(tmp_path / "loose", {f"{name.replace('.', '-')}.webp": right[text],
                                   f"{name.replace('.', '-')}.txt": text.encode()})
    write_pictures(stage, tmp_path / "val", 50)
    for data in ("table", "loose"):
        pairs, new, paths = take_home(stage, tmp_path / f"of {data}", [
            "--data", tmp_path / data, "--val", tmp_path / "val"])
        assert [key.replace("%2E", ".") for key in new.read("key")] == [
            key.replace("%2E", ".") for key in pairs.read("key")]
        captions = dict(zip(new.read("key"), new.read("caption")))
        assert {captions[key]: files["webp"] for key, files in read_by_webdataset(paths)} == right
