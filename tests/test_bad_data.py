"""Every kind of broken input: skipped and counted, or refused; no key gets another's rating."""
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import launch, run, write_pictures


def encode(mode="RGB", kind="PNG", size=(20, 14), colour=None, **settings):
    image, file = Image.new(mode, size, colour if colour is not None else 0), io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def bomb():
    """A PNG of a few bytes whose header promises 60,000 x 60,000 pixels."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x")
            + chunk(b"IEND", b""))


PNG, JPEG = encode(colour=(200, 40, 40)), encode(kind="JPEG", colour=(40, 200, 40))
FRAMES = [Image.new("P", (8, 8), k) for k in range(3)]
GIF = io.BytesIO()
FRAMES[0].save(GIF, "GIF", save_all=True, append_images=FRAMES[1:])
UNREADABLE, SILENT = "unreadable image", "no caption"

# name: (image file, its bytes, caption as .txt or .json bytes, reason or None where it is kept)
KINDS = {
    "good": (".jpg", JPEG, b"a green field", None),
    "truncated jpeg": (".jpg", JPEG[:200], b"x", UNREADABLE),
    "empty jpeg": (".jpg", b"", b"x", UNREADABLE),
    "html": (".jpg", b"<html>404 not found</html>", b"x", UNREADABLE),
    "bomb": (".png", bomb(), b"x", UNREADABLE),
    "broken chunk": (".png", PNG.replace(b"IDATx", b"IDATy"), b"x", UNREADABLE),
    "cmyk": (".jpg", encode("CMYK", "JPEG"), b"x", None),
    "sixteen bit": (".png", encode("I;16", colour=40000), b"x", None),
    "grey": (".png", encode("L", colour=90), b"x", None),
    "palette": (".png", encode("P"), b"x", None),
    "transparent": (".png", encode("RGBA", colour=(0, 0, 255, 9)), b"x", None),
    "one pixel": (".png", encode(size=(1, 1)), b"x", None),
    "long and thin": (".png", encode(size=(30000, 2)), b"x", None),
    "gif": (".gif", GIF.getvalue(), b"x", "no image"),
    "animated": (".png", GIF.getvalue(), b"x", None),
    "png as jpg": (".jpg", PNG, b"x", None),
    "capitals": (".JPG", JPEG, b"x", None),
    "no caption file": (".png", PNG, None, SILENT),
    "empty caption": (".png", PNG, b"  \n", SILENT),
    "huge caption": (".png", PNG, b"word " * 20000, None),
    "control characters": (".png", PNG, b"a\x07b\x1b[31m \x00 red", None),
    "right to left": (".png", PNG, "قطة على الطاولة".encode(), None),
    "emoji": (".png", PNG, "😀🐈".encode(), None),
    "not utf-8": (".png", PNG, b"caf\xe9", None),
    "mathematics": (".png", PNG, b"it costs $5 \\alpha or $6_{", None),
    "json": (".png", PNG, b'{"caption": "from json"}', None),
    "json number": (".png", PNG, b'{"caption": 5}', SILENT),
    "json list": (".png", PNG, b'["caption"]', SILENT),
    "json broken": (".png", PNG, b'{"caption": ', SILENT),
    "json deep": (".png", PNG, b"[" * 100000, SILENT),
    'comma, "quote"': (".png", PNG, b"x", None),
    "Ünï/cøde": (".png", PNG, b"x", None),
}
KEPT = [key for key, (*_, reason) in KINDS.items() if reason is None]


def add(tar, name, data=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def text_kind(key):
    return ".json" if key.startswith("json") else ".txt"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of tars: all KINDS, then what only a tar can do wrong, then a truncated tar."""
    folder = tmp_path_factory.mktemp("bad data")
    with tarfile.open(folder / "a.tar", "w") as tar:
        add(tar, "./", type=tarfile.DIRTYPE)
        for key, (kind, image, text, _) in KINDS.items():
            add(tar, key + kind, image)
            if text is not None:
                add(tar, key + text_kind(key), text)
    with tarfile.open(folder / "b.tar", "w") as tar:
        for name in ("/absolute", "../above", "a/../../b", "bell\a"):
            add(tar, f"{name}.png", PNG)
            add(tar, f"{name}.txt", b"x")
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.png", type=tarfile.LNKTYPE, linkname="good.jpg")
        add(tar, "good.png", PNG)
        add(tar, "good.txt", b"the key good is there already")
        add(tar, "last.png", PNG)
        add(tar, "last.txt", b"x")
    whole = (folder / "b.tar").read_bytes()
    cut = whole.replace(b"last.", b"lost.")
    (folder / "c.tar").write_bytes(cut[:cut.index(b"lost.png") + 512 + 20])
    (folder / "d.tar").write_bytes(b"<html>rate limited</html>")
    (folder / "e.tar").write_bytes(b"")
    return folder


def expected_keys():
    return KEPT + ["last"]


def test_thirty_kinds_of_broken_pairs(stage, corpus, capsys):
    """Exactly the good ones are read, in order, each with its own picture and caption."""
    assert len(KINDS) >= 30
    shards = stage(1).open_pairs(corpus, 16, 8)
    pairs = stage(1).keep_resident(shards)
    assert pairs.keys == expected_keys()
    for key, image, caption in zip(pairs.keys, pairs.images, pairs.captions):
        if key in KINDS:
            _, data, text, _ = KINDS[key]
            assert np.array_equal(image.numpy(), stage(1).decode(data, 16)), key
            files = {text_kind(key): text}
            assert caption == stage(1).read_caption(files), key
    said = capsys.readouterr().out
    for reason, count in ((SILENT, 6), ("no image", 1), ("link or device in a tar", 4),
                          ("unsafe name in a tar", 8 * 2), ("key seen before", 2)):
        assert f"skipped {count} ({reason})" in said, said
    bad = sum(reason == UNREADABLE for *_, reason in KINDS.values())
    assert sum(int(line.split()[1]) for line in said.splitlines() if UNREADABLE in line) == bad
    assert said.count("damaged shard") + said.count("cut off at the end") >= 2


def test_ratings_of_a_bad_corpus_belong_to_their_keys(stage, corpus, tmp_path, monkeypatch):
    """01 and 03 on it, resident and read from the shards: the same keys, the same baselines."""
    flags = ["--smoke", "--out", str(tmp_path)]
    write_pictures(stage, tmp_path / "trusted", 64)
    places = ["--data", str(corpus), "--val", str(tmp_path / "trusted"), "--batch-size", "8"]
    found = []
    for resident in (2e9, 0):
        monkeypatch.setattr(stage(1), "RESIDENT", resident)
        for number, extra in ((1, places), (2, []), (3, ["--baselines"])):
            launch(stage, number, flags + extra)
        text = np.loadtxt(tmp_path / "ratings.csv", str, delimiter=",", skiprows=1, quotechar='"')
        assert text[:, 0].tolist() == expected_keys()
        found.append(text[:, 4].astype(float))
    assert np.ptp(found[0]) > 0 and np.isfinite(found).all()


def test_folders_and_tables(stage, tmp_path, capsys):
    rows = ["file_name,caption"]
    for k, (key, (kind, image, text, _)) in enumerate(KINDS.items()):
        if kind != ".gif":
            (tmp_path / f"{k} picture{kind}").write_bytes(image)
            (tmp_path / f"{k} picture{text_kind(key)}").write_bytes(text or b"")
            rows.append(f"{k} picture{kind},from the table")
    pairs = stage(1).keep_resident(stage(1).open_pairs(tmp_path, 16, 8))
    assert len(pairs) == len(KEPT) and "unreadable" in capsys.readouterr().out
    (tmp_path / "metadata.csv").write_text("\ufeff" + "\n".join([*rows, "gone.png,x", rows[1]]))
    pairs = stage(1).keep_resident(stage(1).open_pairs(tmp_path, 16, 8))
    said = capsys.readouterr().out
    assert set(pairs.captions) == {"from the table"}               # .txt and .json do not count now
    assert "skipped 1 (image file missing)" in said and "skipped 1 (key seen before)" in said
    (tmp_path / "metadata.csv").write_text("name,words\na.png,x\n")
    with pytest.raises(SystemExit, match="needs columns file_name and one of caption"):
        stage(1).open_pairs(tmp_path, 16, 8)


def test_odd_captions_can_be_drawn(stage, tmp_path):
    captions = [text.decode("utf-8", "replace") for *_, text, _ in KINDS.values() if text]
    figure, axes = stage(1).plt.subplots(4, 8)
    stage(1).show_pictures(axes, torch.zeros(len(captions), 3, 4, 4), captions)
    stage(1).save_figure(figure, tmp_path / "captions.png")
    assert (tmp_path / "captions.png").stat().st_size > 1000


@pytest.mark.parametrize("files", [{}, {"x.txt": b"x"}, {"x.tar": b""}, {"x.png": b""}])
def test_a_corpus_without_pairs_ends_in_one_line(tmp_path, files):
    (tmp_path / "data").mkdir()
    for name, data in files.items():
        (tmp_path / "data" / name).write_bytes(data)
    done = run(f"01_proxy.py --smoke --data {tmp_path}/data --out {tmp_path}/out")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "no readable pair" in done.stderr or "fewer than" in done.stderr


def test_json_fixture_is_what_it_says():
    """The wrong JSON captions are wrong for the reason that their names give."""
    assert json.loads(KINDS["json number"][2]) == {"caption": 5}
    with pytest.raises((ValueError, RecursionError)):
        json.loads(KINDS["json broken"][2])
