"""Every kind of broken or odd input: read as a person would, or skipped and counted by its cause.

The kinds stand in tables: KINDS (a picture with its caption each), LAYOUTS (files that make pairs,
as a folder and as a tar), TABLES (what a table says) and HOPELESS (places without a pair).
"""
import csv
import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from conftest import encode, launch, prepare, write, write_pictures, write_tar


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side):
    """A PNG of a few bytes whose header promises side x side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x")
            + chunk(b"IEND", b""))


def deep(values, kind="TIFF"):
    """A picture of one channel whose pixels, of any type, are these and 1."""
    file = io.BytesIO()
    Image.fromarray(np.resize([*values, 1], (16, 16)).astype(values.dtype)).save(file, kind)
    return file.getvalue()


def animate():
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


RED, GREEN, BLUE = (encode(colour=colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
JPEG, GIF = encode(kind="JPEG", colour=(0, 255, 0)), animate()
UNREADABLE, SILENT, LOSSY = "unreadable image", "no caption beside it", "caption is not UTF-8"
ODD = "unreadable image: one channel of more than 8 bits"
LARGE = "unreadable image: Image size exceeds limit of"
REDS, GREENS, BLUES, BLACK, WHITE = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255,) * 3)

# name: (image file, its bytes, caption as .txt or .json bytes, the colour as read or a reason)
KINDS = {
    "good": (".jpg", JPEG, b"a green field", GREENS),
    "truncated jpeg": (".jpg", JPEG[:200], b"x", UNREADABLE),
    "empty jpeg": (".jpg", b"", b"x", UNREADABLE),
    "html": (".jpg", b"<html>404 not found</html>", b"x", UNREADABLE),
    "bomb": (".png", bomb(60000), b"x", LARGE),
    "bomb of pillow's second limit": (".png", bomb(20000), b"x", LARGE),
    "broken chunk": (".png", RED.replace(b"IDATx", b"IDATy"), b"x", UNREADABLE),
    "cmyk": (".jpg", encode("CMYK", "JPEG"), b"x", WHITE),
    "black and white": (".png", encode("1", colour=1), b"x", WHITE),
    "grey": (".png", encode("L", colour=255), b"x", WHITE),
    "palette": (".png", encode("P"), b"x", BLACK),
    "clear": (".png", encode("RGBA", colour=(255, 0, 0, 0)), b"x", WHITE),
    "grey and clear": (".png", encode("LA", colour=(0, 0)), b"x", WHITE),
    "a colour that is clear": (".png", encode("L", transparency=0), b"x", WHITE),
    "one pixel": (".png", encode(size=(1, 1)), b"x", BLACK),
    "long and thin": (".png", encode(size=(30000, 2)), b"x", BLACK),
    "gif": (".gif", GIF, b"x", REDS),
    "animated": (".png", GIF, b"x", REDS),
    "png as jpg": (".jpg", RED, b"x", REDS),
    "capitals": (".JPG", JPEG, b"x", GREENS),
    "sixteen bit": (".png", encode("I;16", colour=40000), b"x", ODD),
    "float, not a number": (".tif", deep(np.float32([np.nan, 200])), b"x", ODD),
    "float, infinite": (".tif", deep(np.float32([np.inf, -np.inf])), b"x", ODD),
    "float, no data": (".tif", deep(np.float32([-9999, -3.4e38, 1e20])), b"x", ODD),
    "whole, no data": (".tif", deep(np.int32([-9999, -2 ** 31, 5])), b"x", ODD),
    "sixteen bit, no data": (".tif", deep(np.uint16([65535, 300])), b"x", ODD),
    "no caption file": (".png", RED, None, SILENT),
    "empty caption": (".png", RED, b"  \n", SILENT),
    "huge caption": (".png", RED, b"word " * 20000, REDS),
    "control characters": (".png", RED, b"a\x07b\x1b[31m \x00 red", REDS),
    "right to left": (".png", RED, "قطة على الطاولة".encode(), REDS),
    "emoji": (".png", RED, "😀🐈".encode(), REDS),
    "not utf-8": (".png", RED, b"caf\xe9", LOSSY),
    "utf-16": (".png", RED, "café".encode("utf-16"), LOSSY),
    "a mark of utf-8": (".png", RED, b"\xef\xbb\xbfx", REDS),
    "nan": (".png", RED, b" NaN ", SILENT),
    "json": (".png", RED, b'{"caption": "from json"}', REDS),
    "json list": (".png", RED, b'{"caption": ["x", "y"], "text": "z"}', REDS),
    "json, second name": (".png", RED, b'{"caption": null, "prompt": "x"}', REDS),
    "json half a letter": (".png", RED, b'{"caption": "a \\ud800 x"}', REDS),
    "json number": (".png", RED, b'{"caption": 5}', SILENT),
    "json no object": (".png", RED, b'["caption"]', SILENT),
    "json other field": (".png", RED, b'{"title": "x"}', SILENT),
    "json broken": (".png", RED, b'{"caption": ', SILENT),
    "json deep": (".png", RED, b"[" * 100000, SILENT),
    'comma, "quote"': (".png", RED, b"x", REDS),
    "Ünï/cøde 50%": (".png", RED, b"x", REDS),
}


def files_of_kinds():
    files = {}
    for key, (kind, image, text, _) in KINDS.items():
        files[key + kind] = image
        if text is not None:
            files[key + (".json" if key.startswith("json") else ".txt")] = text
    return files


def read(stage, place, size=16):
    """{key: (colour, caption)} of the pairs in a place, and [(reason, name)] of what is skipped."""
    s1, skipped, found = stage(1), [], {}
    for source in s1.list_sources(str(place), skipped)[0]:
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
    """Exactly the good ones are read, each with its own picture; the others by their reasons."""
    files = files_of_kinds()
    found, skipped = read(stage, write_tar(tmp_path / "0.tar", files) if place == "tar" else
                          write(tmp_path / "d", files))
    kept = {key: kind[3] for key, kind in KINDS.items() if isinstance(kind[3], tuple)}
    assert {key: colour for key, (colour, _) in found.items()} == kept
    reasons = {name.rpartition(": ")[2] if place == "tar" else name: reason
               for reason, name in skipped}
    for key, (*_, reason) in KINDS.items():
        assert key in kept or reasons.pop(key).startswith(reason), key
    assert not reasons
    assert found["json"][1] == "from json" and found["json list"][1] == "x"
    assert found["json half a letter"][1] == "a \\ud800 x"
    assert found["control characters"][1] == "a b [31m   red"
    assert not any("<" in reason or "(" in reason for reason, _ in skipped)
    assert any(reason.startswith(LARGE) and "pixels" in reason for reason, _ in skipped)


def test_what_only_a_tar_can_do_wrong(stage, tmp_path, capsys):
    """Unsafe names, links, a key that comes again, a cut tar, HTML, nothing: read by all cores,
    ratings in the end belong to their keys."""
    write(tmp_path / "d", {"f.tar.gz": b"", "loose.png": RED})
    write_tar(tmp_path / "d/a.tar", files_of_kinds())
    names = ("/absolute", "../above", "a/../../b", "bell\a", "c:x", ".hidden", "._mac", "good",
             "last")
    with tarfile.open(write_tar(tmp_path / "d/b.tar", {
            f"{name}.{kind}": data for name in names
            for kind, data in (("png", RED), ("txt", b"x"))}), "a") as tar:
        for kind, link in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "good.png")):
            member = tarfile.TarInfo("link.png")
            member.type, member.linkname = kind, link
            tar.addfile(member)
    cut = (tmp_path / "d/b.tar").read_bytes().replace(b"last.", b"lost.")
    write(tmp_path / "d", {"c.tar": cut[:cut.index(b"lost.png") + 530], "d.tar": b"<html>no</html>",
                           "e.tar": b""})
    write_pictures(stage, tmp_path / "trusted", 60)
    flags = [f"--data={tmp_path}/d", f"--val={tmp_path}/trusted", "--smoke", "--batch-size=8"]
    pairs = prepare(stage, tmp_path / "out", *flags)["train"]
    said = capsys.readouterr().out
    for number, extra in ((1, flags), (2, flags[2:]), (3, [])):
        launch(stage, number, ["--out", str(tmp_path / "out"), *extra])
    kept = [key for key, kind in KINDS.items() if isinstance(kind[3], tuple)]
    assert pairs.read("key") == kept + ["last"]
    for reason, number in (("hidden file or unsafe name", 28), ("link or device in a tar", 2),
                           (LOSSY, 2), ("comes twice", 2)):
        assert f"skipped {number} ({reason})" in said, said
    assert said.count("damaged, cut or compressed tar") == 3, said
    with open(tmp_path / "out/ratings.csv", encoding="utf-8", newline="") as file:
        assert [line["key"] for line in csv.DictReader(file)] == kept + ["last"]


FORMATS = {"avif": "AVIF", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "tiff": "TIFF",
           "jfif": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}
NAMES = ("Shot 3\u202fPM", "\u0645\u06cc\u200c\u062e", "a\u200db", "\u3000", "d.e/c  d", "50%")
UNSAFE, FURTHER = "hidden file or unsafe name", "further picture of a pair"


def pairs_of(*keys, picture=RED):
    return {f"{key}.{kind}": data for key in keys
            for kind, data in (("jpg", picture), ("txt", b"x"))}


# {name: bytes} in a tar's order; {key: (colour, caption)} as read; {beginning of reason: count}
LAYOUTS = {
    "photo and mask": ({"0.png": BLUE, "0.jpg": RED, "0.txt": b"x"}, {"0": (REDS, "x")},
                       {FURTHER: 1}),
    "mask with its own suffix": ({"0.seg.png": BLUE, "0.txt": b"x", "0.webp": RED},
                                 {"0": (REDS, "x")}, {FURTHER: 1}),
    "further files": ({"0.jpg": RED, "0.meta.json": b"[1]", "0.txt": b"x", "0.cls": b"7",
                       "0.npy": b"7"}, {"0": (REDS, "x")}, {}),
    "two words of suffix": ({"a.b/0.rgb.jpg": RED, "a.b/0.txt": b"x"}, {"a.b/0": (REDS, "x")}, {}),
    "dots in names": ({"photo.v2.jpg": RED, "photo.v2.txt": b"x", "photo.v3.jpg": BLUE},
                      {"photo": (REDS, "x")}, {FURTHER: 1}),
    "txt before caption before json": ({"0.caption": b"y", "0.jpg": RED, "0.txt": b"x",
                                        "0.json": b'{"caption": "z"}'}, {"0": (REDS, "x")}, {}),
    "capitals": ({"B.Json": b'{"caption": "y"}', "B.Png": BLUE, "IMG.JPG": RED, "IMG.TXT": b"x"},
                 {"IMG": (REDS, "x"), "B": (BLUES, "y")}, {}),
    "in the folder itself": ({"./0.jpg": RED, "./0.txt": b"x"}, {"0": (REDS, "x")}, {}),
    "a Mac's companions": ({"._0.jpg": b"Mac", "0.jpg": RED, "._0.txt": b"Mac", ".DS_Store": b"",
                            "0.txt": b"x", "__MACOSX/._0.jpg": b"Mac"}, {"0": (REDS, "x")},
                           {UNSAFE: 4}),
    "hidden folders": ({".thumbs/0.jpg": RED, ".thumbs/0.txt": b"x", "0.jpg": BLUE, "0.txt": b"y",
                        "a/.cache/0.jpg": RED}, {"0": (BLUES, "y")}, {UNSAFE: 3}),
    "Windows' companions": ({"0.jpg": RED, "0.txt": b"x", "1.txt": b"x", "Thumbs.db": b"",
                             "desktop.ini": b""}, {"0": (REDS, "x")},
                            {"neither picture nor text": 2, "no picture beside it": 1}),
    "kinds of pictures": ({f"{kind}.{suffix}": data for kind, pillow in FORMATS.items()
                           for suffix, data in ((kind, encode(kind=pillow, colour=REDS)),
                                                ("txt", b"x"))},
                          {kind: (REDS, "x") for kind in FORMATS}, {}),
    "kinds that are not opened": ({"0.heic": b"?", "1.svg": b"?", "2": b"?", "3.jpg": RED,
                                   "3.caption": b"x"}, {"3": (REDS, "x")},
                                  {"neither picture nor text": 3}),
    "spaces and joiners in names": (pairs_of(*NAMES), {key: (REDS, "x") for key in NAMES}, {}),
    "names that break a line": (pairs_of("0", *(f"a{sign}b" for sign in
                                                "\n\r\x0b\x85\u2028\u2029\x1b\x7f")),
                                {"0": (REDS, "x")}, {UNSAFE: 16}),
    "a name that is not UTF-8": ({"caf\udce9.png": RED, "caf\udce9.txt": b"x"},
                                 {"caf\\udce9": (REDS, "x")}, {}),
}


@pytest.mark.parametrize("place", ["tar", "folder"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_files_give_the_same_pairs(stage, tmp_path, layout, place):
    files, expected, reasons = LAYOUTS[layout]
    path = write_tar(tmp_path / "0.tar", files) if place == "tar" else write(tmp_path / "d", files)
    found, skipped = read(stage, path)
    assert found == expected
    assert {reason: count(skipped, reason) for reason in reasons} == reasons
    assert len(skipped) == sum(reasons.values()), skipped


def test_places(stage, tmp_path, monkeypatch):
    """Patterns, brackets in names, folders of classes, tars among other files, `~`."""
    data = write(tmp_path / "photos [2023]", pairs_of("cats/0", "dogs/0"))
    (data / "b.png").mkdir()
    (data / "gone.png").symlink_to(data / "nowhere.png")
    (data / "again").symlink_to(data, target_is_directory=True)
    assert set(read(stage, data)[0]) == {"cats/0", "dogs/0"}
    monkeypatch.chdir(tmp_path)
    assert set(read(stage, "photos ?2023?/[cd]*s")[0]) == {"cats/0", "dogs/0"}
    assert len(read(stage, "photos ?2023?/c*")[0]) == 1
    assert set(read(stage, "photos [2023]")[0]) == {"cats/0", "dogs/0"}
    write_tar(tmp_path / "a[1].tar", pairs_of("3"))
    assert set(read(stage, "a[1].tar")[0]) == {"3"}
    write_tar(write(tmp_path / "other/deep", {"loose.jpg": RED}) / "a.TAR", pairs_of("2"))
    write_tar(tmp_path / "other" / "._a.tar", {})
    assert read(stage, "other") == ({"2": (REDS, "x")}, [])
    assert set(read(stage, "o*r/**/*.TAR")[0]) == {"2"}
    monkeypatch.setenv("HOME", str(tmp_path))
    args = stage(1).parse_args(["--data", "~/other", "--root", "~/root"])
    assert (args.data, args.root) == (str(tmp_path / "other"), str(tmp_path / "root"))


def test_a_tar_is_read_to_its_end_or_the_rest_is_said(stage, tmp_path):
    """A header damaged at any place, zeros, a missing end, a second tar behind the first."""
    whole = write_tar(tmp_path / "0.tar", pairs_of(*range(20))).read_bytes()
    assert len(whole) == 51200

    def after(data):
        found, skipped = read(stage, write(tmp_path, {"0.tar": data}) / "0.tar")
        return len(found), [reason.partition("tar: ")[2] for reason, _ in skipped
                            if reason.startswith("damaged, cut or compressed tar: ")]
    for number in (0, 1, 9, 39):
        at = number * 1024
        assert after(whole[:at] + b"?" + whole[at + 1:]) == (
            number // 2, [f"{51200 - at} of 51200 bytes not read"])
    zeros = bytes(len(whole) - 10240)
    assert after(whole[:10240] + zeros) == (5, ["40960 of 51200 bytes not read"])
    assert after(whole + whole)[1] and after(whole[:40960] + b"x" * 1024)[1]
    assert after(whole[:40960])[0] == 20 and after(whole[:40960])[1]          # no end mark
    found, said = after(whole[:40960 - 1024 + 300])                           # within 19.txt
    assert found == 19 or said
    for good in (whole, whole[:40960] + bytes(1024), whole[:40960] + bytes(512), bytes(10240)):
        assert not after(good)[1]
    for bad in (b"", b"<html>", zlib.compress(whole), b"\x1f\x8b" + whole[2:]):
        assert after(bad)[0] == 0 and after(bad)[1]


def test_files_of_a_key_that_are_apart_in_a_tar(stage, tmp_path):
    files = {f"{k}.{kind}": RED if kind == "jpg" else b"x" for kind in ("jpg", "txt")
             for k in range(4)}
    found, skipped = read(stage, write_tar(tmp_path / "0.tar", files))
    assert not found and count(skipped, SILENT) == count(skipped, "no picture beside it") == 4
    assert len(read(stage, write(tmp_path / "d", files))[0]) == 4


def test_a_member_of_two_gigabytes_is_not_read(stage, tmp_path):
    """What is not needed for training may be of any size; the file is sparse."""
    with open(tmp_path / "0.tar", "wb") as file:
        for name, data, size in (("0.jpg", RED, 0), ("0.npy", b"", 9 << 28), ("0.txt", b"x", 0)):
            member = tarfile.TarInfo(name)
            member.size = len(data) + size
            file.write(member.tobuf(tarfile.GNU_FORMAT) + data)
            file.seek(size + -len(data) % 512, 1)
        file.truncate(file.tell() + 1024)
    assert read(stage, tmp_path / "0.tar") == ({"0": (REDS, "x")}, [])


# What a table says; {key: caption}; {reason: count}. The pictures 0.jpg to 9.jpg lie beside it.
NEXT = 'file_name,caption\n{}\n1.jpg,"one, with a comma"\n2.jpg,two\n'
REST = {"1": "one, with a comma", "2": "two"}
MISFIT, MISSING = "row that does not fit its table", "image file missing"
TABLES = {
    "plain": (NEXT.format('0.jpg,"zero\nof two lines, ""quoted"""'),
              REST | {"0": 'zero\nof two lines, "quoted"'}, {}),
    "quote not closed": (NEXT.format('3.jpg,x\n0.jpg,"never closed'), {"3": "x"}, {MISFIT: 1}),
    "comma without quotes": (NEXT.format("0.jpg,a red, round ball"), REST, {MISFIT: 1}),
    "too few, empty lines": (NEXT.format("0.jpg\n\n"), REST, {MISFIT: 1}),
    "quotes behind a blank": (NEXT.format('0.jpg, "a red, round ball"'),
                              REST | {"0": "a red, round ball"}, {}),
    "an inch": (NEXT.format('0.jpg,a 5" nail'), REST | {"0": 'a 5" nail'}, {}),
    "columns swapped": (NEXT.format("word " * 100 + ",0.jpg"), REST, {MISSING: 1}),
    "empty, nan": (NEXT.format("0.jpg,\n3.jpg,nan"), REST, {SILENT: 2}),
    "lines of Windows": (NEXT.format("0.jpg,x").replace("\n", "\r\n"), REST | {"0": "x"}, {}),
    "a mark": (("\ufeff" + NEXT.format("0.jpg,café")).encode(), REST | {"0": "café"}, {}),
    "cp1252": (NEXT.format("0.jpg,café").encode("cp1252"), REST, {LOSSY: 1}),
    "other columns": ("id,text,image\n7,x,0.jpg\n8,y,1.jpg\n", {"0": "x", "1": "y"}, {}),
    "two captions": ("text,file_name,caption\nx,0.jpg,\ny,1.jpg,z\n", {"0": "x", "1": "z"}, {}),
    "names above or without": (NEXT.format("../0.jpg,x\n/data/3.jpg,x\n,x"), REST,
                               {MISFIT: 2, MISSING: 1}),
    "unknown": (NEXT.format("10.jpg,x\nsub/x.jpg,x"), REST, {MISSING: 2}),
    "not the same name in another folder": (NEXT.format("sub/3.jpg,x"), REST, {MISSING: 1}),
    "which of two": (NEXT.format("twin.jpg,x"), REST, {MISSING: 1}),
    "in another folder": (NEXT.format("only.jpg,x"), REST | {"only": "x"}, {}),
    "lines of JSON": ("\n".join(['{"file_name": "0.jpg", "caption": ["x", "y", "z"]}', "",
                                 "{broken", "[1]", '{"file_name": ["0.jpg"], "caption": "x"}',
                                 '{"file_name": "1.jpg", "caption": "", "text": "y"}',
                                 '{"caption": "x"}', '{"file_name": 2, "caption": "x"}',
                                 '{"file_name": "3.jpg", "caption": "x", "license": null}',
                                 '{"file_name": "4.jpg", "caption": "a \\ud83d b"}']),
                      {"0": "x", "1": "y", "3": "x", "4": "a \\ud83d b"}, {MISFIT: 6}),
}


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_tables(stage, tmp_path, table):
    """Of any name, the folder's only one; texts beside the pictures do not count then."""
    text, expected, reasons = TABLES[table]
    write(tmp_path, {f"{k}.jpg": RED for k in range(10)} | {
        "0.txt": b"not read", "a/twin.jpg": RED, "b/twin.jpg": RED, "b/only.jpg": RED})
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / ("x.jsonl" if "JSON" in table else "captions.CSV")).write_bytes(data)
    found, skipped = read(stage, tmp_path)
    assert {key: caption for key, (_, caption) in found.items()} == expected, skipped
    assert {reason: count(skipped, reason) for reason in reasons} == reasons, skipped
    assert len(skipped) == sum(reasons.values()), skipped


@pytest.mark.parametrize("other", ["._captions.csv", ".ipynb_checkpoints/captions-checkpoint.csv"])
def test_a_hidden_table_is_no_second_table(stage, tmp_path, other):
    write(tmp_path, {"images/0.jpg": RED, "captions.csv": b"image,caption\n0.jpg,x\n", other: b"?"})
    assert read(stage, tmp_path)[0] == {"0": (REDS, "x")}


def test_two_tables_are_grouped_by_name(stage, tmp_path):
    write(tmp_path, pairs_of("0") | {"a.csv": b"file_name,text\n0.jpg,y", "b.jsonl": b""})
    assert read(stage, tmp_path)[0] == {"0": (REDS, "x")}
    write(tmp_path / "e", pairs_of("0") | {"log.csv": b"step,loss\n1,2\n"})
    assert read(stage, tmp_path / "e")[0] == {"0": (REDS, "x")}               # no row of it is one


# files; words of the one line that says what was found and what to do
HOPELESS = {
    "nothing": ({}, "0 pictures, 0 texts and 0 tables"),
    "texts alone": ({"x.txt": b"x"}, "0 pictures, 1 texts"),
    "classes": ({"cats/0.jpg": RED, "dogs/0.jpg": RED}, "2 pictures, 0 texts"),
    "names that differ": ({"images/0.jpg": RED, "texts/0.txt": b"x"}, "1 pictures, 1 texts"),
    "other columns": ({"0.jpg": RED, "a.csv": b"id,title\n0,x\n"}, "begins with b'id,title"),
    "a caption elsewhere": ({"0.jpg": RED, "a.csv": b"image_id;comment\n0.jpg;x\n"}, "image_id;c"),
    "rows of no picture": ({"0.jpg": RED, "a.csv": b"image,text\n1.jpg,x\n"}, "b'image,text"),
    "two tables": ({"0.jpg": RED, "a.csv": b"image,text\n0.jpg,x\n", "b.csv": b"x"}, "2 tables"),
    "utf-16": ({"0.jpg": RED, "a.csv": "image,text\n0.jpg,x\n".encode("utf-16")}, "1 tables"),
    "COCO": ({"0.jpg": RED, "annotations.json": b'{"images": [], "annotations": []}'},
             "1 pictures, 1 texts"),
    "parquet": ({"0.parquet": b"PAR1"}, "0 pictures"),
    "gzip": ({"0.tar.gz": b"\x1f\x8b"}, "0 pictures"),
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


@pytest.mark.parametrize("place", ["{00000..00012}.tar", "s3://bucket/x.tar", "pipe:cat x.tar",
                                   "photos [2024]", "nowhere/*.tar"])
def test_places_that_are_not_there(stage, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no such file or folder. Quote a pattern.*braces") as stop:
        launch(stage, 1, ["--data", place])
    assert "\n" not in str(stop.value) and "own.md has a script" in str(stop.value)


def test_a_pattern_that_the_shell_has_expanded(stage, tmp_path, capsys):
    files = [str(write_tar(tmp_path / f"{k}.tar", {})) for k in range(3)]
    with pytest.raises(SystemExit):
        stage(1).parse_args(["--data", *files])
    assert "quote a pattern with *" in capsys.readouterr().err


@pytest.mark.parametrize("tars", [{"0.jpg": RED}, {}, {"0.jpg": b"", "0.txt": b"x"}])
def test_tars_without_a_pair_end_in_one_line(stage, tmp_path, capsys, tars):
    path = write_tar(tmp_path / "0.tar", tars)
    for more in ([], ["--val", str(path)]):
        with pytest.raises(SystemExit, match="the (train|val) split has 0 readable pairs") as stop:
            launch(stage, 1, ["--data", str(path), "--out", f"{tmp_path}/out", *more])
        assert "\n" not in str(stop.value)
    assert not (tmp_path / "out/pairs").exists()
    assert "skipped" in capsys.readouterr().out or not tars


def test_a_file_that_goes_while_it_is_read_is_one_line(stage, tmp_path, monkeypatch):
    s1, path = stage(1), write_tar(tmp_path / "0.tar", pairs_of(*range(40)))
    listed = s1.list_tasks

    def list_tasks(args, skipped):
        found = listed(args, skipped)
        os.unlink(path)
        return found
    monkeypatch.setattr(s1, "list_tasks", list_tasks)
    with pytest.raises(SystemExit) as stop:
        launch(stage, 1, ["--data", str(path), "--out", f"{tmp_path}/out"])
    assert "\n" not in str(stop.value) and "0.tar" in str(stop.value)


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
        image = Image.new("RGB", (16, 16))
        image.paste((255, 255, 255), (0, 0, 16, 8))        # white above, once turned on the right
        file = io.BytesIO()
        image.save(file, "PNG", exif=data)
        found = stage(1).decode_image(file.getvalue(), 16)
        assert found[:, 8, 12].tolist() == [255] * 3 and found[:, 8, 3].tolist() == [0] * 3, broken
    text = zlib.compress(bytes(3 << 20))
    for kind, data in ((b"zTXt", b"Comment\0\0" + text), (b"iTXt", b"Comment\0\1\0\0\0" + text),
                       (b"iCCP", b"icc\0\0" + text)):
        for at in (33, len(RED) - 12):                     # before and behind the pixels
            found = stage(1).decode_image(RED[:at] + chunk(kind, data) + RED[at:], 8)
            assert found[:, 3, 3].tolist() == [255, 0, 0], kind


def test_odd_captions_can_be_written_and_drawn(stage, tmp_path):
    pairs = [(f"{k}", np.zeros((3, 4, 4), np.uint8), stage(1).clean(text.decode(errors="replace")),
              "") for k, (*_, text, _) in enumerate(KINDS.values()) if text]
    images, _, _, texts, _ = stage(1).read_task(("", lambda: pairs, ()),
                                                stage(1).parse_args(["--size", "4"]))
    captions = [json.loads(line) for line in texts.split(b"\n")[1:-1:2]]
    assert captions == [caption for _, _, caption, _ in pairs]
    figure, axes = stage(3).plt.subplots(4, 12)
    stage(3).show_pictures(axes, stage(1).torch.from_numpy(images), captions)
    stage(3).save_figure(figure, tmp_path / "captions.png")
    assert (tmp_path / "captions.png").stat().st_size > 1000
