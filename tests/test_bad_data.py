"""Every kind of broken or odd input: read as a person would, or skipped and counted by its cause.

The kinds stand in tables: KINDS (a picture with its caption each), LAYOUTS (files that make pairs,
as a folder and as a tar) and TABLES (rows of a metadata file).
"""
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import launch, write_pictures


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
UNREADABLE, SILENT, LOSSY = "unreadable image", "no caption", "caption is not UTF-8"

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
    "gif": (".gif", GIF.getvalue(), b"x", None),
    "animated": (".png", GIF.getvalue(), b"x", None),
    "png as jpg": (".jpg", PNG, b"x", None),
    "capitals": (".JPG", JPEG, b"x", None),
    "no caption file": (".png", PNG, None, SILENT),
    "empty caption": (".png", PNG, b"  \n", SILENT),
    "huge caption": (".png", PNG, b"word " * 20000, None),
    "control characters": (".png", PNG, b"a\x07b\x1b[31m \x00 red", None),
    "right to left": (".png", PNG, "قطة على الطاولة".encode(), None),
    "emoji": (".png", PNG, "😀🐈".encode(), None),
    "not utf-8": (".png", PNG, b"caf\xe9", LOSSY),
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
            assert caption == stage(1).list_captions(files)[0][0], key
    said = capsys.readouterr().out
    for reason, count in ((SILENT, 6), (LOSSY, 1), ("link or device in a tar", 4),
                          ("unsafe name in a tar", 8 * 2), ("key seen before", 2)):
        assert f"skipped {count} ({reason})" in said, said
    bad = sum(reason == UNREADABLE for *_, reason in KINDS.values())
    assert sum(int(line.split()[1]) for line in said.splitlines() if UNREADABLE in line) == bad
    assert said.count("damaged shard") + said.count("cut off at the end") >= 2


def test_ratings_of_a_bad_corpus_belong_to_their_keys(stage, corpus, tmp_path):
    """01 and 03 on it, resident and read from the shards: the same keys, the same baselines."""
    flags = ["--smoke", "--out", str(tmp_path)]
    write_pictures(stage, tmp_path / "trusted", 64)
    places = ["--data", str(corpus), "--val", str(tmp_path / "trusted"), "--batch-size", "8"]
    found = []
    for memory in ("2", "0"):
        for number, extra in ((1, places), (2, []), (3, ["--baselines"])):
            launch(stage, number, [*flags, "--memory", memory, *extra])
        text = np.loadtxt(tmp_path / "ratings.csv", str, delimiter=",", skiprows=1, quotechar='"')
        assert text[:, 0].tolist() == expected_keys()
        found.append(text[:, 4].astype(float))
    assert np.ptp(found[0]) > 0 and np.isfinite(found).all()


def test_folders_and_tables(stage, tmp_path, capsys):
    rows = ["file_name,caption"]
    for k, (key, (kind, image, text, _)) in enumerate(KINDS.items()):
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


RED, GREEN, BLUE = (encode(colour=colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
COLOURS = {(255, 0, 0): RED, (0, 255, 0): GREEN, (0, 0, 255): BLUE}
FORMATS = {"avif": "AVIF", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "jfif": "JPEG",
           "webp": "WEBP"}

ORDINARY = ("Shot 3\u202fPM", "\u0645\u06cc\u200c\u062e", "a\u200db", "\u3000", "a.b/c  d", "50%")


def pairs_of(*keys):
    return {f"{key}.{kind}": data for key in keys for kind, data in (("jpg", RED), ("txt", b"x"))}


# {name: bytes} in a tar's order; {key: (picture, caption)} as read; {beginning of reason: count}
LAYOUTS = {
    "photo and mask": ({"0.png": BLUE, "0.jpg": RED, "0.txt": b"x"}, {"0": (RED, "x")},
                       {"another image of a pair": 1}),
    "mask with its own suffix": ({"0.jpg": RED, "0.seg.png": BLUE, "0.txt": b"x"},
                                 {"0": (RED, "x")}, {"another image of a pair": 1}),
    "mask first": ({"0.depth.png": BLUE, "0.txt": b"x", "0.webp": RED}, {"0": (RED, "x")},
                   {"another image of a pair": 1}),
    "extra JSON and classes": ({"0.jpg": RED, "0.meta.json": b"[1]", "0.txt": b"x", "0.cls": b"7",
                                "0.npy": b"7"}, {"0": (RED, "x")}, {}),
    "two words of suffix": ({"a.b/0.rgb.jpg": RED, "a.b/0.txt": b"x"}, {"a.b/0": (RED, "x")}, {}),
    "dots in names": ({"photo.v2.jpg": RED, "photo.v2.txt": b"x", "photo.v3.jpg": BLUE,
                       "photo.v3.txt": b"y"}, {"photo.v2": (RED, "x"), "photo.v3": (BLUE, "y")},
                      {"first dot as the end of a key": 1}),
    "a dot in one of two": ({"p.jpg": RED, "p.txt": b"x", "p.V2.jpg": BLUE, "p.V2.jpg.txt": b"y"},
                            {"p": (RED, "x"), "p.V2": (BLUE, "y")},
                            {"first dot as the end of a key": 1}),
    "capitals": ({"IMG.JPG": RED, "IMG.TXT": b"x", "B.Png": BLUE, "B.Json": b'{"caption": "y"}'},
                 {"IMG": (RED, "x"), "B": (BLUE, "y")}, {}),
    "a Mac's companions": ({"._0.jpg": b"Mac", "0.jpg": RED, "._0.txt": b"Mac", ".DS_Store": b"",
                            "0.txt": b"x", "__MACOSX/._0.jpg": b"Mac"}, {"0": (RED, "x")},
                           {"hidden file": 4}),
    "hidden folders": ({".thumbs/0.jpg": RED, ".thumbs/0.txt": b"x", "0.jpg": BLUE, "0.txt": b"y"},
                       {"0": (BLUE, "y")}, {"": None}),
    "Windows' companions": ({"0.jpg": RED, "Thumbs.db": b"", "desktop.ini": b"", "0.txt": b"x",
                             "1.txt": b"x"}, {"0": (RED, "x")},
                            {"neither image nor caption: .db": 1,
                             "neither image nor caption: .ini": 1, "no image": 1}),
    "kinds of pictures": ({f"{kind}.{suffix}": data for kind, pillow in FORMATS.items()
                           for suffix, data in ((kind, encode(kind=pillow, colour=(255, 0, 0))),
                                                ("txt", b"x"))},
                          {kind: (RED, "x") for kind in FORMATS}, {}),
    "kinds that Pillow does not open": ({"0.heic": b"?", "1.svg": b"?", "2": b"?", "3.jpg": RED,
                                         "3.caption": b"x"}, {"3": (RED, "x")},
                                        {"neither image nor caption: .heic": 1,
                                         "neither image nor caption: .svg": 1,
                                         "neither image nor caption: no suffix": 1}),
    "spaces and joiners in names": (pairs_of(*ORDINARY, "a%2Eb"), {
        key: (RED, "x") for key in (*ORDINARY, "a.b")}, {}),
    "names that break a line": (pairs_of("0", *(f"a{sign}b" for sign in
                                                "\n\r\x0b\x85\u2028\u2029\x1b\x7f")),
                                {"0": (RED, "x")}, {"unsafe name": 16}),
    "a name that is not UTF-8": ({"caf\udce9.png": RED, "caf\udce9.txt": b"x"},
                                 {"caf\\udce9": (RED, "x")}, {}),
    "marks and encodings": ({name + kind: data for name, text in {
        "utf-16": "caf\u00e9".encode("utf-16"), "big": b"\xfe\xff\0x",
        "utf-32": "x".encode("utf-32"), "mark": b"\xef\xbb\xbfx", "cp1252": b"caf\xe9 x",
        "gbk": "\u7ea2\u8272\u7684\u732b".encode("gbk"),
        "odd": b"\xff\xfea", "json": b'\xef\xbb\xbf{"caption": "x"}'}.items() for kind, data in (
            (".png", RED), (".json" if name == "json" else ".txt", text))},
        {"utf-16": (RED, "caf\u00e9"), "big": (RED, "x"), "utf-32": (RED, "x"), "mark": (RED, "x"),
         "json": (RED, "x")}, {LOSSY: 3}),
    "captions with nothing to see": ({f"{k}.{kind}": data for k, text in enumerate((
        "\0\0", "\u200b\u200d\ufeff", " \n\t ", "\u3164", "\ufe0f", "nan", "NaN ", "None", "N/A",
        "\u2800", "a \u200d"))
        for kind, data in (("png", RED), ("txt", text.encode()))}, {"10": (RED, "a \u200d")},
        {SILENT: 10}),
    "fields of JSON": ({f"{k}.{kind}": data for k, record in enumerate((
        {"caption": "", "text": "x"}, {"caption": ["", "x", "y", "z"]},
        {"caption": None, "text": ["x"]},
        {"prompt": "x", "stratum": "a\nb"}, {"caption": "nan", "text": "x"},
        {"caption": "a \ud800 x"}, {"caption": {"a": 1}}, {"title": "x"}))
        for kind, data in (("png", RED), ("json", json.dumps(record).encode()))},
        {"0": (RED, "x"), "1": (RED, "x"), "2": (RED, "x"), "3": (RED, "x"), "4": (RED, "x"),
         "5": (RED, "a \\ud800 x")}, {"further caption of a pair": 2, SILENT: 2}),
}


def colour_of(image):
    """The picture of one of three colours that an image (3, H, W) shows."""
    return COLOURS[tuple(255 * int(value > 127) for value in image[:, 8, 8])]


def read(stage, place, out=None):
    """{key: (picture, caption)} of a corpus, as training sees it."""
    pairs = stage(1).keep_resident(stage(1).open_pairs(place, 16, 64, out))
    return {key: (colour_of(image), caption) for key, image, caption in zip(
        pairs.keys, pairs.images, pairs.captions)}


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            add(tar, name, data)
    return path


def count(said, reason):
    """How many were skipped for reasons that begin so."""
    return sum(int(line.split()[1]) for line in said.splitlines()
               if line.startswith("skipped") and line.split(" (", 1)[1].startswith(reason))


@pytest.mark.parametrize("place", ["tar", "folder"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_files_give_the_same_pairs(stage, tmp_path, capsys, layout, place):
    files, expected, reasons = LAYOUTS[layout]
    path = write_tar(tmp_path / "0.tar", files) if place == "tar" else write(tmp_path / "d", files)
    found = read(stage, path)
    said = capsys.readouterr().out
    assert found == expected, said
    for reason, number in reasons.items():
        assert count(said, reason) == number or number is None and count(said, reason), said
    assert reasons or "skipped" not in said.replace("first dot", ""), said


def test_what_a_folder_can_hold(stage, tmp_path, capsys, monkeypatch):
    """Links once, broken ones counted; class folders, by a pattern too; loose files beside tars."""
    data = write(tmp_path / "photos [2023]", pairs_of("cats/0", "dogs/0"))
    (data / "b.png").mkdir()
    (data / "gone.png").symlink_to(data / "nowhere.png")
    (data / "again").symlink_to(data, target_is_directory=True)
    write(tmp_path / "other", pairs_of("1"))
    (data / "other").symlink_to(tmp_path / "other", target_is_directory=True)
    found = read(stage, data)
    said = capsys.readouterr().out
    assert {"cats/0", "dogs/0", "other/1"} <= set(found) and len(found) == 3, said
    assert count(said, "hidden file, broken link") == 1
    assert count(said, "folder that is hidden, of results, or read already") >= 1
    assert set(read(stage, data / "[cd]*s")) == {"cats/0", "dogs/0"}
    assert "key seen before" not in capsys.readouterr().out
    assert set(read(stage, f"{data}/c*")) == {"cats/0"}
    monkeypatch.chdir(tmp_path)
    assert set(read(stage, "photos [2023]")) == set(found)
    write_tar(tmp_path / "a[1].tar", pairs_of("3"))
    assert set(read(stage, "a[1].tar")) == {"3"}
    write(data, {".ipynb_checkpoints/metadata.csv": b"file_name,text\n0.jpg,x",
                 ".ipynb_checkpoints/0.jpg": RED})
    write_tar(data / ".ipynb_checkpoints" / "b.tar", pairs_of("4"))
    assert set(read(stage, data)) == set(found)
    write_tar(tmp_path / "other" / "a.TAR", pairs_of("2"))
    write_tar(tmp_path / "other" / "._a.tar", {})
    capsys.readouterr()
    assert set(read(stage, "other")) == {"2"}
    assert count(capsys.readouterr().out, "file beside tars") == 2
    assert set(read(stage, "o*r/**/*.TAR")) == {"2"}
    for path in ("{00000..00012}.tar", "s3://bucket/x.tar", "pipe:cat x.tar", "", "photos [2024]"):
        with pytest.raises(SystemExit, match="no such file or folder"):
            stage(1).open_pairs(path, 16, 8)


TAR_END = "damaged shard"


def test_a_tar_is_read_to_its_end_or_the_rest_is_said(stage, tmp_path, capsys):
    """A header damaged at any place, zeros, a missing end, a second tar behind the first."""
    path = write_tar(tmp_path / "0.tar", pairs_of(*range(20)))
    whole = path.read_bytes()
    assert len(whole) == 51200 and len(read(stage, path)) == 20
    assert "skipped" not in capsys.readouterr().out

    def after(data):
        path.write_bytes(data)
        found = len(stage(1).index_shard(path)[0])
        reasons = [reason for reason, _ in stage(1).index_shard(path)[1]]
        return found, [reason for reason in reasons if reason.startswith(TAR_END)]
    for number in (0, 1, 9, 39):
        at = number * 1024
        broken = whole[:at] + b"?" + whole[at + 1:]
        found, reasons = after(broken)
        assert found == (number + 1) // 2 and f"{51200 - at} of 51200 bytes" in reasons[0]
    assert after(whole[:10240] + bytes(len(whole) - 10240)) == (5, [
        f"{TAR_END}, cut off, compressed or no tar: 40960 of 51200 bytes not read"])
    assert after(whole + whole)[1] and after(whole[:40960] + b"x" * 1024)[1]
    assert after(whole[:40960])[0] == 20 and after(whole[:40960])[1]          # no end mark
    found, reasons = after(whole[:40960 - 1024 + 300])                        # within 19.txt
    assert found == 19 or reasons
    for good in (whole, whole[:40960] + bytes(1024), whole[:40960] + bytes(512), bytes(10240)):
        assert not after(good)[1]
    for bad in (b"", b"<html>", zlib.compress(whole), b"\x1f\x8b" + whole[2:]):
        assert after(bad)[0] == 0 and after(bad)[1]


def test_files_of_a_key_that_are_apart(stage, tmp_path, capsys):
    names = [f"{k}.{kind}" for kind in ("jpg", "txt") for k in range(4)]
    files = {name: RED if name.endswith("jpg") else b"x" for name in names}
    with pytest.raises(SystemExit, match="no readable pair"):
        read(stage, write_tar(tmp_path / "0.tar", files))
    said = capsys.readouterr().out
    assert count(said, "files of a key are apart in a tar: sort it as tar --sort=name does, without dots in names") == 4
    assert len(read(stage, write(tmp_path / "d", files))) == 4


def test_a_key_that_comes_twice_in_one_tar(stage, tmp_path, capsys):
    """The first is read, wherever the second stands."""
    for order in ("0.jpg 0.txt 0.jpg 0.txt 1.jpg 1.txt", "0.jpg 0.txt 1.jpg 1.txt 0.txt 0.JPG"):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for k, name in enumerate(order.split()):
                data = b"x" if name.endswith("txt") else BLUE if k > 1 and name[0] == "0" else RED
                add(tar, name, data)
        assert read(stage, tmp_path / "0.tar") == {"0": (RED, "x"), "1": (RED, "x")}
        assert count(capsys.readouterr().out, "key seen before") == 1


def test_a_pair_of_more_than_two_gigabytes(stage, tmp_path):
    """A member that is not needed for training may be of any size; the file is sparse."""
    with open(tmp_path / "0.tar", "wb") as file:
        for name, data, size in (("0.jpg", RED, 0), ("0.npy", b"", 9 << 28), ("0.txt", b"x", 0)):
            member = tarfile.TarInfo(name)
            member.size = len(data) + size
            file.write(member.tobuf(tarfile.GNU_FORMAT) + data)
            file.seek(size + -len(data) % 512, 1)
        file.truncate(file.tell() + 1024)
    types = stage(1).IMAGE_TYPES + stage(1).TEXT_TYPES
    _, files = stage(1).open_pairs(tmp_path / "0.tar", 16, 8).read(0, types)
    assert files.keys() == {".jpg", ".txt"}                # the rest is not read into memory
    assert read(stage, tmp_path / "0.tar") == {"0": (RED, "x")}


# What a table says; {key: caption}; {reason: count}. The pictures 0.jpg to 9.jpg lie beside it.
NEXT = 'file_name,caption\n{}\n1.jpg,"one, with a comma"\n2.jpg,two\n'
REST = {"1": "one, with a comma", "2": "two"}
TABLES = {
    "plain": (NEXT.format('0.jpg,"zero\nof two lines, ""quoted"""'),
              REST | {"0": 'zero\nof two lines, "quoted"'}, {}),
    "quote not closed": (NEXT.format('0.jpg,"never closed') + "3.jpg,x\n" * 6000,
                         REST | {"3": "x"}, {"row that does not fit": 1, "key seen before": 5999}),
    "two not closed": (NEXT.format('0.jpg,"never\n3.jpg,"never, too'), REST,
                       {"row that does not fit": 2}),
    "comma without quotes": (NEXT.format("0.jpg,a red, round ball"), REST,
                             {"row that does not fit": 1}),
    "too few, empty lines": (NEXT.format("0.jpg\n\n  \n"), REST, {"row that does not fit": 1}),
    "quotes behind a blank": (NEXT.format('0.jpg, "a red, round ball"'),
                              REST | {"0": "a red, round ball"}, {}),
    "an inch": (NEXT.format('0.jpg,a 5" nail'), REST | {"0": 'a 5" nail'}, {}),
    "columns swapped": (NEXT.format("word " * 100 + ",0.jpg"), REST, {"image file missing": 1}),
    "empty, nan": (NEXT.format("0.jpg,\n3.jpg,nan"), REST, {SILENT: 2}),
    "lines of Windows": (NEXT.format("0.jpg,x").replace("\n", "\r\n"), REST | {"0": "x"}, {}),
    "utf-16": (NEXT.format("0.jpg,caf\u00e9").encode("utf-16"), REST | {"0": "caf\u00e9"}, {}),
    "cp1252": (NEXT.format("0.jpg,caf\u00e9").encode("cp1252"), REST, {LOSSY: 1}),
    "other columns": ('text,file_name,caption\nx,0.jpg,\ny,1.jpg,z\n', {"0": "x", "1": "z"}, {}),
    "lines of JSON": ("\n".join(['{"file_name": "0.jpg", "caption": ["x", "y", "z"]}', "",
                                 "{broken", "[1]",
                                 '{"file_name": "1.jpg", "caption": "", "text": "y"}',
                                 '{"caption": "x"}', '{"file_name": 2, "caption": "x"}',
                                 '{"file_name": "4.jpg", "caption": "a \\ud83d b"}']),
                      {"0": "x", "1": "y", "4": "a \\ud83d b"},
                      {"row that does not fit": 4, "further caption": 2}),
}


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_tables(stage, tmp_path, capsys, table):
    text, expected, reasons = TABLES[table]
    write(tmp_path, {f"{k}.jpg": RED for k in range(10)})
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / ("metadata.jsonl" if "JSON" in table else "metadata.csv")).write_bytes(data)
    found = read(stage, tmp_path)
    said = capsys.readouterr().out
    assert {key: caption for key, (_, caption) in found.items()} == expected, said
    for reason, number in reasons.items():
        assert count(said, reason) == number, said
    if "row that does not fit" in reasons and "JSON" not in table:
        assert "metadata.csv, line 2" in said
    assert "file that no table names" in said


def test_tables_in_class_folders_and_of_other_names(stage, tmp_path, capsys):
    write(tmp_path / "d", {"train/0.jpg": RED, "train/metadata.csv": b"file_name,text\n0.jpg,x\n",
                           "val/metadata.jsonl": b'{"file_name": "0.jpg", "text": "y"}',
                           "val/0.jpg": RED, "captions.csv": b"0.jpg,x"})
    assert read(stage, tmp_path / "d") == {"train/0": (RED, "x"), "val/0": (RED, "y")}
    assert count(capsys.readouterr().out, "file that no table names") == 1
    write(tmp_path / "e", {"0.jpg": RED, "1.tar.gz": b"",
                           "captions.csv": b"file_name,text\n0.jpg,x"})
    read(stage, tmp_path / "e")
    said = capsys.readouterr().out
    assert count(said, "neither image nor caption: .csv") == 1 == count(said, SILENT)
    assert count(said, "neither image nor caption: .tar.gz") == 1


def pixels_of(image):
    return np.asarray(image).astype(int)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_metadata_of_a_sound_picture_costs_no_pixels(stage):
    """Broken EXIF, texts and profiles of any size."""
    for broken in (None, 0x0100, 0x011A):                  # a width, a resolution: text
        exif = Image.Exif()
        exif[0x0112] = 6
        data = exif.tobytes()
        if broken:                                         # by hand: Pillow would not write it
            head, entry = data[:14], struct.pack(">HHL4s", broken, 2, 4, b"abc\0")
            turn = struct.pack(">HHLHH", 0x0112, 3, 1, 6, 0)
            data = head + struct.pack(">H", 2) + entry + turn + bytes(4)
        image = stage(1).open_image(encode(kind="JPEG", size=(20, 10), exif=data))
        assert image.size == (10, 20), broken
    text = zlib.compress(bytes(3 << 20))
    for kind, data in ((b"zTXt", b"Comment\0\0" + text), (b"iTXt", b"Comment\0\1\0\0\0" + text),
                       (b"iCCP", b"icc\0\0" + text)):
        for at in (33, len(RED) - 12):                     # before and behind the pixels
            image = stage(1).open_image(RED[:at] + chunk(kind, data) + RED[at:])
            assert image.getpixel((3, 3)) == (255, 0, 0), kind


@pytest.mark.parametrize("mode,white,kind", [
    ("F", 1.0, "TIFF"), ("F", 255.0, "TIFF"), ("I", 1, "TIFF"), ("I", 255, "TIFF"),
    ("I;16", 4095, "PNG"), ("I;16", 65535, "PNG"), ("I", 2 ** 31 - 1, "TIFF")])
def test_pictures_of_any_depth_are_neither_black_nor_white(stage, mode, white, kind):
    """Half black, a quarter grey, a quarter white."""
    values = np.repeat([0, 0, white / 2, white], 4)[None].repeat(16, 0)
    dtype = {"F": np.float32, "I": np.int32, "I;16": np.uint16}[mode]
    data = io.BytesIO()
    Image.fromarray(values.astype(dtype)).save(data, kind)
    found = np.asarray(stage(1).open_image(data.getvalue()))[0, ::4, 0]
    assert found[:2].tolist() == [0, 0] and found[3] >= 254
    assert 100 < found[2] < 140 or white == 1 and dtype == np.int32           # half of 1 is 0


def test_reasons_are_phrases(stage):
    reasons = {stage(1).decode_pair({".png": data, ".txt": b"x"}, 16, {"seen": False}) for data in
               (b"", b"<html>", RED[:50], bomb(), JPEG[:300])}
    assert all(reason.startswith(UNREADABLE) for reason in reasons)
    assert not any("Error" in reason or "<" in reason for reason in reasons), reasons


def test_odd_captions_can_be_drawn(stage, tmp_path):
    captions = [text.decode("utf-8", "replace") for *_, text, _ in KINDS.values() if text]
    figure, axes = stage(1).plt.subplots(4, 8)
    stage(1).show_pictures(axes, torch.zeros(len(captions), 3, 4, 4), captions)
    stage(1).save_figure(figure, tmp_path / "captions.png")
    assert (tmp_path / "captions.png").stat().st_size > 1000


def names_by_webdataset(folder):
    """{key: {suffix: bytes}} of tars by WebDataset's rule, written anew from its description: the
    key ends at the first dot of the base name, a pair is a run of members of one key."""
    runs, last = [], None
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                head, _, base = member.name.rpartition("/")
                key, _, kind = base.partition(".")
                key = f"{head}/{key}" if head else key
                if key != last:
                    runs.append((key, {}))
                runs[-1][1][kind], last = tar.extractfile(member).read(), key
    assert len(dict(runs)) == len(runs)
    return dict(runs)


def test_new_shards_are_read_back_as_the_same_pairs(stage, tmp_path, monkeypatch):
    """By stage 1 and by WebDataset's rule, from tables and folders with names of every kind."""
    data = write(tmp_path / "a" / "data", {"img.1.jpg": RED, "img.2.jpg": BLUE,
                                           "deep/v1.0/3.4.png": GREEN})
    write(tmp_path, {"a/up.jpg": GREEN, "b/far.PNG": RED})
    rows = {"img.1.jpg": "one", "img.2.jpg": "two", "deep/v1.0/3.4.png": "three",
            "../up.jpg": "four", f"{tmp_path}/b/far.PNG": "five"}
    lines = [json.dumps({"file_name": name, "caption": [text, "more"]})
             for name, text in rows.items()]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    loose = write(tmp_path / "loose", pairs_of("photo.v2", "photo.v3", "x/0", "y/0", "50%", "a%2Eb")
                  | {"photo.v3.jpg": BLUE, "x/0.cls": b"7", "x/0.seg.png": BLUE})
    for number, place in enumerate((data, loose)):
        pairs = stage(1).open_pairs(place, 16, 8)
        keys = pairs.name(range(len(pairs)))
        settings = stage(1).parse_args(["--data", str(place), "--out", str(tmp_path)])
        monkeypatch.setattr(stage(1), "load_proxy", lambda out, settings=settings: (settings, {}))
        new = tmp_path / f"new-{number}"
        stage(4).write_shards(new, tmp_path, None, keys, None, 0)
        assert read(stage, new) == read(stage, place) and len(keys) == (5, 6)[number]
        known = {caption: image for image, caption in read(stage, place).values()}
        found = names_by_webdataset(new)
        assert len(found) == len(keys)
        if number == 0:
            assert {files["txt"].decode() for files in found.values()} == set(rows.values())
            assert known == {"one": RED, "two": BLUE, "three": GREEN, "four": GREEN, "five": RED}
            for files in found.values():
                image = files.get("jpg", files.get("png"))
                assert image == known[files["txt"].decode()]
        else:
            assert found["x/0"] == {"jpg": RED, "txt": b"x", "cls": b"7", "seg.png": BLUE}


def test_a_table_without_a_usable_row_is_still_the_table(stage, tmp_path, capsys):
    write(tmp_path, pairs_of("0", "1") | {"metadata.csv": b"file_name,text\nimgs/0.png,x\n"})
    with pytest.raises(SystemExit, match="no readable pair"):
        read(stage, tmp_path)
    assert count(capsys.readouterr().out, "file that no table names") == 4


def corpus_of(stage, folder, n, first=0):
    """n toy pictures with captions in a folder."""
    pairs = stage(1).draw_toy(first + n, 16, 3, "val")
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(first, first + n):
        Image.fromarray(pairs.images[k].permute(1, 2, 0).numpy()).save(folder / f"{k:04d}.png")
        (folder / f"{k:04d}.txt").write_text(pairs.captions[k])
    return folder


def options(stage, *words):
    args = stage(1).parse_args(["--smoke", *map(str, words)])
    args.batch_size = 4
    return args


def split_of(stage, args):
    return {key: k for k, pairs in enumerate(stage(1).load_data(args, "cpu"))
            for key in pairs.name(range(len(pairs)))}


def test_a_pair_stays_in_its_split(stage, tmp_path):
    """Whatever is added; half of --val each way; other seeds, other splits; at most HELD_OUT."""
    data = corpus_of(stage, tmp_path / "data", 200)
    before = split_of(stage, options(stage, "--data", data))
    assert len(before) == 200
    counts = np.bincount(list(before.values()))
    assert counts.sum() == 200 and abs(counts[1:] - 10).max() <= 8
    corpus_of(stage, data, 40, first=200)
    after = split_of(stage, options(stage, "--data", data))
    assert len(after) == 240 and all(after[key] == k for key, k in before.items())
    other = split_of(stage, options(stage, "--data", data, "--seed", 1))
    assert other != after
    with_val = split_of(stage, options(stage, "--data", data, "--val", corpus_of(
        stage, tmp_path / "val", 60, first=240)))
    assert sum(k == 0 for k in with_val.values()) == 240 and len(with_val) == 300
    many = stage(1).Shards([], np.zeros(10 ** 6, stage(1).ENTRY), 16, 8)
    many.entries["hash"] = np.random.default_rng(0).integers(2 ** 64, size=10 ** 6, dtype="u8")
    val, test, rest = stage(1).deal(many, 0.1, 0)
    assert 10 ** 6 == len(val) + len(test) + len(rest) and 10000 < len(val) + len(test) < 20000
    assert abs(len(val) / len(test) - 1) < 0.1


def test_later_stages_refuse_a_corpus_that_changed(stage, tmp_path, capsys):
    """A picture more, one less, another one, half of --val: one line from 02, 03, 04 and 05."""
    data, val = corpus_of(stage, tmp_path / "d", 48), corpus_of(stage, tmp_path / "v", 48, first=48)
    flags = ["--smoke", "--out", str(data / "out")]
    launch(stage, 1, [*flags, "--data", str(data), "--val", str(val), "--batch-size", "8"])
    assert "48 train" in capsys.readouterr().out
    launch(stage, 2, flags)                                # --out inside --data changes nothing
    said = capsys.readouterr().out
    assert "48 train" in said and "of results" in said
    (data / "out" / "ratings.csv").write_text("key,rating\n0001,1\n0002,2\n")
    launch(stage, 4, [*flags, "--method", "topk", "--write-shards", str(tmp_path / "new")])

    def refused():
        for number in (2, 3, 4, 5):
            more = ["--write-shards", str(tmp_path / "no")] if number == 4 else []
            with pytest.raises(SystemExit, match="changed after 01_proxy.py.*run 01") as stop:
                launch(stage, number, [*flags, *more])
            assert "\n" not in str(stop.value)
    new = corpus_of(stage, tmp_path / "more", 1, first=99)
    for name in ("0099.png", "0099.txt"):
        (data / name).write_bytes((new / name).read_bytes())
    refused()
    for kind in ("png", "txt"):                            # as many pairs, another key
        (data / f"0007.{kind}").unlink()
    refused()
    for kind in ("png", "txt"):
        (data / f"0099.{kind}").rename(data / f"0007.{kind}")
    stage(1).load_data(stage(1).load_proxy(data / "out")[0], "cpu")           # the same keys
    for k in range(48, 60):
        (val / f"{k:04d}.txt").write_text("")
    for number in (2, 3, 5):
        with pytest.raises(SystemExit, match="changed after 01_proxy.py"):
            launch(stage, number, flags)


def test_a_pair_that_cannot_be_read_changes_the_corpus_under_no_memory(stage, tmp_path, capsys):
    """Nor does `~` mean another folder in a later stage."""
    data, val = corpus_of(stage, tmp_path / "d", 40), corpus_of(stage, tmp_path / "v", 40, first=48)
    (data / "0007.png").write_bytes(RED[:50])
    flags = ["--smoke", "--out", str(tmp_path / "out")]
    launch(stage, 1, [*flags, "--data", str(data), "--val", str(val), "--batch-size", "8"])
    for memory in ("0", "2"):
        launch(stage, 2, [*flags, "--batch-size", "8", "--group-size", "4", "--memory", memory])
    launch(stage, 3, [*flags, "--memory", "0"])
    assert "three figures: 39 pairs" in capsys.readouterr().out


def test_a_planted_corpus_stays_in_memory_in_later_stages(stage, tmp_path, monkeypatch):
    """Stage 1 was given the --memory that it takes; the others need not be told again."""
    data, val = corpus_of(stage, tmp_path / "d", 40), corpus_of(stage, tmp_path / "v", 40, first=48)
    args = options(stage, "--data", data, "--val", val, "--plant", "noise=0.2")
    monkeypatch.setattr(stage(1).Machine, "memory", 1000)
    with pytest.raises(SystemExit, match="--plant works on pairs that fit into --memory"):
        stage(1).load_data(args, "cpu")
    monkeypatch.setattr(stage(1).Machine, "memory", 2e9)
    args = options(stage, "--data", data, "--val", val, "--plant", "noise=0.2")
    first = stage(1).load_data(args, "cpu")[0]
    monkeypatch.setattr(stage(1).Machine, "memory", 1000)
    assert stage(1).load_data(args, "cpu")[0].strata == first.strata


def test_a_home_folder_is_one_for_every_stage(stage, tmp_path, monkeypatch):
    corpus_of(stage, tmp_path / "data", 80)
    monkeypatch.setenv("HOME", str(tmp_path))
    args = options(stage, "--data", "~/data", "--root", "~/root")
    stage(1).load_data(args, "cpu")
    assert (args.data, args.root) == (str(tmp_path / "data"), str(tmp_path / "root"))


def test_fewer_trusted_pairs_than_a_figure_shows(stage, tmp_path):
    """Ten in both halves of --val; the figures of 01 and 05 have eight columns."""
    data, val = corpus_of(stage, tmp_path / "d", 40), corpus_of(stage, tmp_path / "v", 10, first=48)
    flags = ["--smoke", "--out", str(tmp_path / "out"), "--batch-size", "2"]
    launch(stage, 1, [*flags, "--data", str(data), "--val", str(val)])
    (tmp_path / "s.csv").write_text("key\n" + "".join(f"{k:04d}\n" for k in range(8)))
    launch(stage, 5, [*flags, "--seeds", "1", "--selected", str(tmp_path / "s.csv")])
    assert (tmp_path / "out/results-samples.png").exists()


def test_results_are_no_pairs(stage, tmp_path, capsys):
    data = corpus_of(stage, tmp_path / "d", 8)
    with pytest.raises(SystemExit, match="name another --out"):
        read(stage, data, data)
    for name in ("out", "old"):
        (data / name).mkdir()
        (data / name / "proxy.png").write_bytes(RED)
    (data / "old" / ".lock").write_text("")
    assert len(stage(1).open_pairs(data, 16, 8, data / "out")) == 8


@pytest.mark.parametrize("resident", [True, False])
def test_trusted_pairs_that_are_trained_on_are_said(stage, tmp_path, capsys, monkeypatch, resident):
    data = corpus_of(stage, tmp_path / "d", 48)
    val = corpus_of(stage, tmp_path / "v", 40, first=48)
    for k, name in ((0, "0000"), (1, "1000"), (2, "1001")):
        (val / f"{name}.png").write_bytes((data / f"{k:04d}.png").read_bytes())
        (val / f"{name}.txt").write_text("x")
    monkeypatch.setattr(stage(1).Machine, "memory", 2e9 if resident else 0)
    split_of(stage, options(stage, "--data", data, "--val", val))
    said = capsys.readouterr().out
    assert "1 trusted pairs have the keys of training pairs, first 0000" in said
    assert ("3 trusted pairs have the pixels of training pairs" in said) == resident
    split_of(stage, options(stage, "--data", data, "--val", corpus_of(
        stage, tmp_path / "w", 40, first=60)))
    assert "trusted pairs have" not in capsys.readouterr().out


@pytest.mark.parametrize("files", [{}, {"x.txt": b"x"}, {"x.tar": b""}, {"x.png": b""}])
def test_a_corpus_without_pairs_ends_in_one_line(stage, tmp_path, files):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", files)
    with pytest.raises(SystemExit, match="no readable pair|fewer than") as stop:
        launch(stage, 1, ["--smoke", "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/out"])
    assert "\n" not in str(stop.value)


def test_json_fixture_is_what_it_says():
    """The wrong JSON captions are wrong for the reason that their names give."""
    assert json.loads(KINDS["json number"][2]) == {"caption": 5}
    with pytest.raises((ValueError, RecursionError)):
        json.loads(KINDS["json broken"][2])
