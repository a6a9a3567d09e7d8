"""Every kind of broken or odd input: read as a person would, or skipped and counted by its cause.

The kinds stand in tables: PICTURES and TEXTS (one of a pair), LAYOUTS (files that make pairs, as a
folder and as a tar), TABLES (what a table says) and HOPELESS (places without a pair).
"""
import csv
import io
import json
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from conftest import encode, launch, prepare, write, write_pictures, write_tar


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep(values):
    """A picture of one channel whose pixels, of any type, are these and 1."""
    file = io.BytesIO()
    Image.fromarray(np.resize([*values, 1], (16, 16)).astype(values.dtype)).save(file, "TIFF")
    return file.getvalue()


RED, BLUE, JPEG = encode(colour=(255, 0, 0)), encode(colour=(0, 0, 255)), encode(
    kind="JPEG", colour=(0, 255, 0))
GIF = encode(kind="GIF", colour=(255, 0, 0), save_all=True, append_images=[Image.new("1", (9, 9))])
MUCH, BOMB = zlib.compress(bytes(3 << 20)), encode("1", size=(20000, 10000))
UNREADABLE, SILENT, LOSSY = "unreadable image", "no caption beside it", "caption is not UTF-8"
ODD, LARGE = f"{UNREADABLE}: one channel of more than 8 bits", f"{UNREADABLE}: Image size exceeds"
REDS, GREENS, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 0), (255, 255, 255)

PICTURES = {               # file: (its bytes, the colour as read or the reason why it is not)
    "good.jpg": (JPEG, GREENS), "capitals.JPG": (JPEG, GREENS), "png as.jpg": (RED, REDS),
    "broken EXIF.png": (RED[:33] + chunk(b"eXIf", b"broken") + RED[33:], UNREADABLE),
    "text of 3 MB.png": (RED[:33] + chunk(b"zTXt", b"Comment\0\0" + MUCH) + RED[33:], UNREADABLE),
    "profile of 3 MB.png": (RED[:33] + chunk(b"iCCP", b"icc\0\0" + MUCH) + RED[33:], UNREADABLE),
    "truncated.jpg": (JPEG[:200], UNREADABLE), "nothing.jpg": (b"", UNREADABLE),
    "html.jpg": (b"<html>404</html>", UNREADABLE), "bomb.png": (BOMB, LARGE),
    "cmyk.jpg": (encode("CMYK", "JPEG"), WHITE), "grey.png": (encode("L", colour=255), WHITE),
    "black and white.png": (encode("1", colour=1), WHITE), "palette.png": (encode("P"), BLACK),
    "clear.png": (encode("RGBA", colour=(255, 0, 0, 0)), WHITE),
    "grey and clear.png": (encode("LA", colour=(0, 0)), WHITE),
    "one pixel.png": (encode(size=(1, 1)), BLACK), "thin.png": (encode(size=(30000, 2)), BLACK),
    "frames.gif": (GIF, REDS), "animated.png": (GIF, REDS),
    "sixteen bit.png": (encode("I;16", colour=40000), ODD),
    "not a number.tif": (deep(np.float32([np.nan, np.inf, 200])), ODD),
    "no data.tif": (deep(np.int32([-9999, -2 ** 31, 5])), ODD),
    'comma, "quote".png': (RED, REDS), "Ünï/cøde 50%.png": (RED, REDS),
}
TEXTS = {                  # file: (its bytes, the caption as read or the reason why it is not)
    "none.md": (b"x", SILENT), "empty.txt": (b"  \n", SILENT), "nan.txt": (b" NaN ", SILENT),
    "huge.txt": (b"word " * 20000, "word " * 19999 + "word"), "mark.txt": (b"\xef\xbb\xbfx", "x"),
    "controls.txt": (b"a\x07b\x1b[31m \x00 red", "a b [31m   red"),
    "right to left.txt": ("قطة على".encode(), "قطة على"), "emoji.caption": ("😀🐈".encode(), "😀🐈"),
    "cp1252.txt": (b"caf\xe9", LOSSY), "utf-16.txt": ("café".encode("utf-16"), LOSSY),
    "a.json": (b'{"caption": "x"}', "x"), "other.json": (b'{"title": "x"}', SILENT),
    "list.json": (b'{"caption": ["x", "y"], "text": "z"}', "x"), "b.json": (b'["caption"]', SILENT),
    "half a letter.json": (b'{"caption": "a \\ud800 x"}', "a \\ud800 x"),
    "broken.json": (b'{"caption": ', SILENT), "deep.json": (b"[" * 100000, SILENT),
}
KINDS = {name.rpartition(".")[0]: kind for name, (_, kind) in (PICTURES | TEXTS).items()}
KEPT = [key for key, kind in KINDS.items() if not str(kind).startswith((UNREADABLE, SILENT, LOSSY))]


def files_of_kinds():
    """All of them, each with a sound other half."""
    files = {}
    for name, (data, _) in (PICTURES | TEXTS).items():
        key = name.rpartition(".")[0]
        files |= {name: data, f"{key}.txt": b"x"} if name in PICTURES else {
            f"{key}.png": RED, name: data}
    return files


def read(stage, place, size=16):
    """{key: (colour, caption)} of the pairs in a place, and [(reason, name)] of what is skipped."""
    s1, skipped, found = stage(1), [], {}
    for source in s1.list_sources(str(place))[0]:
        for key, image, caption, _ in s1.read_pairs(source, size):
            if image is None:
                skipped.append((caption, key))
            else:
                colour = 255 * (image[:, size // 2, size // 2] > 127)
                found.setdefault(key, (tuple(colour.tolist()), caption))
    return found, skipped


def count(skipped, reason):
    """How many were skipped for reasons that begin so."""
    return sum(found.startswith(reason) for found, _ in skipped)


@pytest.mark.parametrize("place", ["tar", "folder"])
def test_kinds_of_broken_pairs(stage, tmp_path, place):
    """Exactly the good ones are read, each as itself; the others are counted by their reasons."""
    files = files_of_kinds()
    found, skipped = read(stage, write_tar(tmp_path / "0.tar", files) if place == "tar" else
                          write(tmp_path / "d", files))
    assert {*found} == {*KEPT}
    reasons = {name.removeprefix(f"{tmp_path}/0.tar: "): reason for reason, name in skipped}
    for key, kind in KINDS.items():
        assert kind in found[key] if key in found else reasons.pop(key).startswith(kind), key
    assert not reasons
    assert not any("<" in reason or "(" in reason for reason, _ in skipped)
    assert any(reason.startswith(LARGE) and "pixels" in reason for reason, _ in skipped)


def test_what_only_a_tar_can_do_wrong(stage, tmp_path, capsys, monkeypatch):
    """Unsafe names, links, a key that comes again, a cut tar, HTML, nothing: read by all cores,
    ratings in the end belong to their keys."""
    write(tmp_path / "d", {"f.tar.gz": b"", "loose.png": RED})
    write_tar(tmp_path / "d/a.tar", files_of_kinds())
    names = "/root", "../above", "a/../../b", "bell\a", "c:x", ".hidden", "._mac", "good", "last"
    with tarfile.open(write_tar(tmp_path / "d/b.tar", pairs_of(*names)), "a") as tar:
        for kind, link in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "good.png")):
            member = tarfile.TarInfo("link.png")
            member.type, member.linkname = kind, link
            tar.addfile(member)
    cut = (tmp_path / "d/b.tar").read_bytes().replace(b"last.", b"lost.")
    write(tmp_path / "d", {"c.tar": cut[:cut.index(b"lost.jpg") + 530], "d.tar": b"<html>no</html>",
                           "e.tar": b""})
    write_pictures(stage, tmp_path / "trusted", 60)
    flags = [f"--data={tmp_path}/d", f"--val={tmp_path}/trusted", "--smoke", "--batch-size=8"]
    pairs = prepare(stage, tmp_path / "out", *flags)["train"]
    said = capsys.readouterr().out
    monkeypatch.setattr(stage(3), "draw_bands", print)     # which takes its time
    for number, extra in ((1, flags), (2, flags[2:]), (3, [])):
        launch(stage, number, ["--out", str(tmp_path / "out"), *extra])
    assert pairs.read("key") == KEPT + ["last"]
    for reason, number in (("hidden file or unsafe name", 28), ("link or device in a tar", 2),
                           (LOSSY, 2), ("comes twice", 2)):
        assert f"skipped {number} ({reason})" in said, said
    assert said.count("damaged, cut or compressed tar") == 3, said
    with open(tmp_path / "out/ratings.csv", encoding="utf-8", newline="") as file:
        assert [line["key"] for line in csv.DictReader(file)] == KEPT + ["last"]


UNSAFE, FURTHER, HALF = "hidden file or unsafe name", "further picture", "no picture beside it"
SIGNS = "\n\r\x0b\x85\u2028\u2029\x1b\x7f"
FORMATS = {"avif": "AVIF", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "tiff": "TIFF",
           "jfif": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}
NAMES = "Shot 3\u202fPM", "\u0645\u06cc\u200c\u062e", "a\u200db", "\u3000", "d.e/c  d", "50%"


def pairs_of(*keys):
    return {f"{key}.{kind}": data for key in keys for kind, data in (("jpg", RED), ("txt", b"x"))}


def fill(names):
    """{name: bytes}: pictures red, or blue where an ! ends the name, which no pair may show."""
    return {name.rstrip("!"): BLUE if name.endswith("!") else
            b'{"caption": "x"}' if name.lower().endswith("json") else
            encode(kind=FORMATS[name.split(".")[-1]], colour=REDS)
            if name.split(".")[-1] in FORMATS else
            RED if name.lower().endswith(("jpg", "png")) else b"x" for name in names}


LAYOUTS = {                # names in a tar's order, keys as read, {beginning of reason: count}
    "photo and mask": (["0.png!", "0.jpg", "0.txt", "1.seg.png!", "1.txt", "1.webp"], ["0", "1"],
                       {FURTHER: 2}),
    "further files": (["a.b/0.rgb.jpg", "a.b/0.txt", "a.b/0.npy", "a.b/0.cls"], ["a.b/0"], {}),
    "dots and capitals": (["./a.v2.jpg", "./a.v2.txt", "./a.v3.jpg!", "B.Json", "B.Png", "I.JPG",
                           "I.TXT"], ["a", "B", "I"], {FURTHER: 1}),
    "companions": (["._0.jpg!", "0.jpg", "._0.txt", ".DS_Store", "0.txt", "__MACOSX/._0.jpg!",
                    ".thumbs/0.jpg!", "a/.cache/0.jpg!", "Thumbs.db"], ["0"],
                   {UNSAFE: 6, HALF: 1}),
    "kinds of pictures": ([f"{k}.{kind}" for k in FORMATS for kind in (k, "txt")], [*FORMATS], {}),
    "not opened": (["0.heic", "1.svg", "2", "3.jpg", "3.caption"], ["3"], {HALF: 3}),
    "spaces and joiners": ([*pairs_of(*NAMES)], [*NAMES], {}),
    "names that break a line": ([*pairs_of("0", *(f"a{sign}b" for sign in SIGNS))], ["0"],
                                {UNSAFE: 16}),
    "a name that is not UTF-8": (["caf\udce9.png", "caf\udce9.txt"], ["caf\\udce9"], {}),
}


@pytest.mark.parametrize("place", ["tar", "folder"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_files_give_the_same_pairs(stage, tmp_path, layout, place):
    names, keys, reasons = LAYOUTS[layout]
    found, skipped = read(stage, write_tar(tmp_path / "0.tar", fill(names)) if place == "tar" else
                          write(tmp_path / "d", fill(names)))
    assert found == {key: (REDS, "x") for key in keys}
    assert {reason: count(skipped, reason) for reason in reasons} == reasons
    assert len(skipped) == sum(reasons.values()), skipped


def test_places(stage, tmp_path, monkeypatch):
    """Patterns, brackets in names, folders of classes, tars among other files."""
    data = write(tmp_path / "photos [2023]", pairs_of("cats/0", "dogs/0"))
    (data / "b.png").mkdir()
    (data / "gone.png").symlink_to(data / "nowhere.png")
    (data / "again").symlink_to(data, target_is_directory=True)
    write_tar(tmp_path / "a[1].tar", pairs_of("3"))
    write_tar(write(tmp_path / "other/deep", {"loose.jpg": RED}) / "a.TAR", pairs_of("2"))
    write_tar(tmp_path / "other" / "._a.tar", {})
    monkeypatch.chdir(tmp_path)
    for place, keys in (("photos [2023]", {"cats/0", "dogs/0"}), ("photos ?2023?/c*", {"0"}),
                        ("photos ?2023?/[cd]*s", {"cats/0", "dogs/0"}),
                        ("a[1].tar", {"3"}), ("other", {"2"}), ("o*r/**/*.TAR", {"2"})):
        found, skipped = read(stage, place)
        assert set(found) == keys and not skipped, place
    for place in ("{00000..00012}.tar", "s3://bucket/x.tar", "nowhere/*.tar"):
        with pytest.raises(SystemExit, match="no such file or folder. Quote a pattern.*braces"):
            launch(stage, 1, ["--data", place])


def test_a_tar_is_read_to_its_end_or_the_rest_is_said(stage, tmp_path):
    """A header damaged at any place, zeros, a missing end, a second tar behind the first."""
    whole = write_tar(tmp_path / "0.tar", pairs_of(*range(20))).read_bytes()

    def after(data):
        found, skipped = read(stage, write(tmp_path, {"0.tar": data}) / "0.tar")
        return len(found), [reason.partition("tar: ")[2] for reason, _ in skipped
                            if reason.startswith("damaged, cut or compressed tar: ")]
    for at in (1024, 9216, 39936):
        assert after(whole[:at] + b"?" + whole[at + 1:]) == (
            at // 2048, [f"nothing was read beyond byte {at}"])
    assert after(whole[:10240] + bytes(40960)) == (5, ["nothing was read beyond byte 10240"])
    for rest in (b"", b"x" * 1024, whole[40960:] + whole):
        found, said = after(whole[:40960] + rest)
        assert found == 20 and said
    for good in (whole, whole[:40960] + bytes(512), bytes(10240)):
        assert not after(good)[1]
    for bad in (b"", b"<html>", zlib.compress(whole), b"?" + whole[1:], b"\x1f\x8b" + whole[2:]):
        assert after(bad)[0] == 0 and after(bad)[1]


def test_files_of_a_key_that_are_apart_in_a_tar(stage, tmp_path):
    files = fill(f"{k}.{kind}" for kind in ("jpg", "txt") for k in range(4))
    found, skipped = read(stage, write_tar(tmp_path / "0.tar", files))
    assert not found and count(skipped, SILENT) == count(skipped, HALF) == 4
    assert len(read(stage, write(tmp_path / "d", files))[0]) == 4


# Rows between these lines, or a whole table; {key: caption} of them; {reason: count}. The pictures
# 0.jpg to 9.jpg lie beside it.
FIRST, LAST = "file_name,caption\n", '\n1.jpg,"one, with a comma"\n2.jpg,two\n'
MISFIT, MISSING = "row that does not fit its table", "image file missing"
TABLES = {
    "sound": ('0.jpg,"zero\nof two lines, ""quoted"""\n3.jpg,a 5" nail\n4.jpg, "red, round"\n'
              'only.jpg,x', {"0": 'zero\nof two lines, "quoted"', "3": 'a 5" nail',
                            "4": "red, round", "only": "x"}, {}),
    "too many and too few columns": ("0.jpg,a red, round ball\n\n\n3.jpg", {}, {MISFIT: 2}),
    "other names": ("../0.jpg,x\n/data/3.jpg,x\n,x\na cat,4.jpg\nsub/3.jpg,x\n10.jpg,x\ntwin.jpg,x",
                    {}, {MISFIT: 2, MISSING: 5}),
    "captions": ("0.jpg,\n3.jpg,nan\n4.jpg,caf\udce9", {}, {SILENT: 2, LOSSY: 1}),
    "quote not closed": (FIRST + '3.jpg,x\n0.jpg,"never closed' + LAST, {"3": "x"}, {MISFIT: 1}),
    "Windows, a mark": ("\ufefffile_name,caption\r\n0.jpg,café\r\n", {"0": "café"}, {}),
    "other columns": ("text,path,caption\nx,0.jpg,\ny,1.jpg,z\n", {"0": "x", "1": "z"}, {}),
    "lines of JSON": ("\n".join(['{"file_name": "0.jpg", "caption": ["x", "y", "z"]}', "",
                                 "{broken", "[1]", '{"file_name": ["0.jpg"], "caption": "x"}',
                                 '{"file_name": "1.jpg", "caption": "", "text": "y"}',
                                 '{"caption": "x"}',
                                 '{"file_name": "4.jpg", "caption": "a \\ud83d b"}\n']),
                      {"0": "x", "1": "y"}, {MISFIT: 5, LOSSY: 1}),
}


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_tables(stage, tmp_path, table):
    """Of any name, the folder's only one; texts beside the pictures do not count then, nor does a
    hidden table."""
    text, expected, reasons = TABLES[table]
    if not text.endswith("\n"):
        text, expected = FIRST + text + LAST, expected | {"1": "one, with a comma", "2": "two"}
    write(tmp_path, fill([f"{k}.jpg" for k in range(10)] + [
        "0.txt", "a/twin.jpg!", "b/twin.jpg!", "b/only.jpg", "._captions.csv",
        ".ipynb_checkpoints/captions-checkpoint.csv"]) | {
        "x.jsonl" if "JSON" in table else "captions.CSV": text.encode("utf-8", "surrogateescape")})
    found, skipped = read(stage, tmp_path)
    assert found == {key: (REDS, caption) for key, caption in expected.items()}, skipped
    assert {reason: count(skipped, reason) for reason in reasons} == reasons, skipped
    assert len(skipped) == sum(reasons.values()), skipped


@pytest.mark.parametrize("tables", [{"a.csv": b"file_name,text\n0.jpg,y", "b.jsonl": b""},
                                    {"log.csv": b"step,loss\n1,2\n"}])
def test_two_tables_or_one_of_other_things_leave_pairs_to_their_names(stage, tmp_path, tables):
    assert read(stage, write(tmp_path, pairs_of("0") | tables))[0] == {"0": (REDS, "x")}


HOPELESS = {               # files; words of the one line that says what was found and what to do
    "nothing": ({}, "0 files, 0 of them tables"),
    "classes": ({"cats/0.jpg": RED, "dogs/0.jpg": RED}, "2 files, 0 of them tables"),
    "other columns": ({"0.jpg": RED, "a.csv": b"id,title\n0,x\n"}, "2 files, 1 of them tables"),
    "COCO": ({"0.jpg": RED, "captions.json": b'{"images": [], "annotations": []}'}, "2 files"),
}


@pytest.mark.parametrize("kind", HOPELESS)
def test_other_layouts_end_in_one_line_that_says_what_to_do(stage, tmp_path, kind):
    files, words = HOPELESS[kind]
    data = write(tmp_path / "data", files)
    data.mkdir(exist_ok=True)
    with pytest.raises(SystemExit) as stop:
        launch(stage, 1, ["--smoke", "--data", str(data), "--out", f"{tmp_path}/out"])
    text = str(stop.value)
    assert words in text and "\n" not in text and "own.md has a script" in text
    assert "columns file_name or image" in text and "same name" in text
