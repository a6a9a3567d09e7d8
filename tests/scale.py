"""What a web-scale corpus costs: index, reading, scoring and selection, measured on this machine.

    python tests/scale.py      packs a million small pairs into tars in a temporary folder, 6 GB

Prints a Markdown table. Memory for thirty million pairs is computed from the measured index.
"""
import argparse
import contextlib
import importlib
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
s1, s2, s3, s4 = (importlib.import_module(name) for name in (
    "01_proxy", "02_meta_rater", "03_score", "04_select"))
PER_TAR, WEB = 10_000, 30_000_000


def pack(folder, count):
    """`count` pairs of a 64 x 64 JPEG and a caption, 10,000 to a tar; returns bytes a pair."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(noise).resize((64, 64)).save(file, "JPEG")

    def member(name, data):
        header = tarfile.TarInfo(name)
        header.size = len(data)
        return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)
    for first in range(0, count, PER_TAR):
        with open(folder / f"{first // PER_TAR:06d}.tar", "wb") as tar:
            for k in range(first, min(first + PER_TAR, count)):
                tar.write(member(f"{k:09d}.jpg", file.getvalue())
                          + member(f"{k:09d}.txt", b"a coloured pattern, number %d" % k))
            tar.write(bytes(1024))


def timed(function):
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):           # what it says is no part of the table
        value = function()
    return value, time.perf_counter() - began


def rate_of(batches):
    """Pairs a second that come out of an iterator of (rows, pairs)."""
    count, seconds = timed(lambda: sum(len(part) for _, part in batches))
    return f"{count / seconds:,.0f} pairs a second"


def score_rate(pairs):
    """Pairs a second of stage 3 with untrained nets of the default size."""
    nets = {name: s1.DiT(16, 4, 64, 3, 8) for name in ("proxy", "ref")}
    nets["rater"] = s2.Rater(16, 4, 8)
    with tempfile.NamedTemporaryFile() as file:
        _, seconds = timed(lambda: s3.score(nets, 32, pairs, file.name, 0,
                                            s1.Progress()))
    return f"{len(pairs) / seconds:,.0f} pairs a second"


def select_rows(folder, kind, count):
    """Seconds and gigabytes of stage 4, start to finish, on `count` ratings in a file."""
    ratings = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
    if kind == "npy":
        np.save(folder / "ratings.npy", ratings)
    else:
        lines = (f"{k:09d},{rating:.6g},0.512345,{rating:.6g},\n"
                 for k, rating in enumerate(ratings))
        with open(folder / "ratings.csv", "w") as file:
            file.write("key,instance,group,rating,stratum\n")
            file.writelines(lines)
    command = [sys.executable, str(ROOT / "04_select.py"), "--ratings",
               str(folder / f"ratings.{kind}"), "--out", str(folder / "out")]
    _, seconds = timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                                              env={**os.environ, "OMP_NUM_THREADS": "1"}))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6    # of the largest so far
    return f"{seconds:.1f} s, {peak:.2f} GB"


def link_twice(folder, tars):
    """A folder of links to these tars."""
    (folder / "twice").mkdir()
    for k, tar in enumerate(tars):
        (folder / f"twice/{k:06d}.tar").symlink_to(tar)
    return folder / "twice"


def main(count, web=WEB):
    torch.set_num_threads(1)
    print("| what | measured |\n|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("npy", "csv"):                        # the peak is of the largest so far
            print(f"| selection of {web:,} ratings, .{kind} | {select_rows(folder, kind, web)} |")
        (hashes, _), seconds = timed(lambda: s4.read_ratings(
            folder / "ratings.csv", "rating", s1.hash_key))
        print(f"| stage 5 reads these ratings, once for all arms and seeds | {seconds:.1f} s, "
              f"{16 * len(hashes) / 1e9:.2f} GB |")
        (folder / "ratings.csv").unlink()
        pack(folder, count)
        pairs, first = timed(lambda: s1.open_pairs(folder, 16, 8, folder))
        pairs, again = timed(lambda: s1.open_pairs(folder, 16, 8, folder))
        each = pairs.entries.nbytes / len(pairs)
        print(f"| index of {len(pairs):,} pairs | {first:.0f} s ({len(pairs) / first:,.0f} pairs a "
              f"second), opened again in {again:.1f} s |")
        print(f"| memory of the index | {each:.0f} bytes a pair, {each * WEB / 1e9:.2f} GB for 30 "
              f"million, {8 * each * WEB / 1e9:.1f} GB in 8 processes |")
        twice = [tar for tar in sorted(folder.glob("*.tar")) for _ in (0, 1)]
        _, seconds = timed(lambda: s1.open_pairs(link_twice(folder, twice), 16, 8))
        print(f"| index of the same with every key twice | {seconds:.0f} s |")
        keys = pairs.name(range(min(1000, len(pairs)))) * (len(pairs) // 1000 + 1)
        _, seconds = timed(lambda: s1.find_rows(pairs, keys))
        print(f"| rows of {len(keys):,} keys | {seconds:.1f} s |")
        _, seconds = timed(lambda: next(s1.draw_batches(WEB, 1, 0, 0, 1)))
        print(f"| an epoch's order of 30 million pairs | {seconds:.1f} s, {8 * WEB / 1e9:.2f} GB |")
        rows = np.random.default_rng(0).permutation(len(pairs))[:20000].reshape(-1, 500)
        ahead = np.arange(rows.size).reshape(rows.shape) % len(pairs)
        print(f"| reading and decoding, in order | {rate_of(pairs.parts(iter(ahead)))} |")
        print(f"| reading and decoding, at random | {rate_of(pairs.parts(iter(rows)))} |")
        print(f"| scoring from tars | {score_rate(pairs.take(ahead.ravel()))} |")
        (folder / "new").mkdir()
        rows = np.split(ahead.ravel(), 2)
        _, seconds = timed(lambda: [s4.write_shard(folder / f"new/{k}.tar", pairs.take(
            part)) for k, part in enumerate(rows)])
        print(f"| new shards, by one of the cores | {ahead.size / seconds:,.0f} pairs a second |")
    toy = s1.draw_toy(4000, 16, 0, "train")
    print(f"| scoring resident pairs, one thread | {score_rate(toy)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1_000_000, help="packed into tars")
    parser.add_argument("--ratings", type=int, default=WEB, help="that stage 4 selects from")
    args = parser.parse_args()
    main(args.pairs, args.ratings)
