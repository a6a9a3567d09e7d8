"""What a large corpus costs: preparing, epochs, time and memory of every stage, on this machine.

    python tests/scale.py      20 minutes on one core, 3 GB in a temporary folder; Linux

Prints a Markdown table. CPU seconds are those of all processes. Memory of its own does not count
the pages of mapped files that a stage has touched, which the machine takes back when it needs them.
Stage 5 is watched for two minutes only.
"""
import argparse
import contextlib
import io
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import conftest
from common import head, s1, show

TARS, SIDE, DISTINCT = 8, 256, 100


def pack(folder, count):
    """`count` pairs of a JPEG and a caption in tars; of 100 pictures, which are returned."""
    files, rng = [], np.random.default_rng(0)
    for _ in range(DISTINCT):                              # smooth, with the grain of a photograph
        image = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).resize((SIDE, SIDE))
        pixels, file = image + rng.normal(0, 8, (SIDE, SIDE, 3)), io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG")
        files.append(file.getvalue())
    for number, rows in enumerate(np.array_split(np.arange(count), TARS)):
        conftest.write_tar(folder / f"{number}.tar", {
            f"{row:09d}{kind}": data for row in rows for kind, data in (
                (".jpg", files[row % DISTINCT]), (".txt", b"pattern %d" % row))})
    return files


def cpu_seconds(function):
    """What a function takes of all cores, its processes included."""
    def spent():
        return sum(sum(resource.getrusage(who)[:2])
                   for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    began = spent()
    with contextlib.redirect_stdout(sys.stderr):           # what it says is no part of the table
        function()
    return spent() - began


def prepare(folder, count):
    """Rows: preparing the JPEG at 16 pixels, and epochs from the map that it leaves."""
    (folder / "tars").mkdir()
    files = pack(folder / "tars", count)
    args = s1.parse_args(["--data", str(folder / "tars")])
    whole = cpu_seconds(lambda: s1.prepare(folder / "out/pairs", args))
    alone = cpu_seconds(lambda: [s1.decode_image(files[k % DISTINCT], 16) for k in range(count)])
    show(f"preparing {count:,} JPEG of {SIDE} px in {TARS} tars at 16 px",
         f"{whole:.1f} CPU seconds, decoding alone {alone:.1f}: {whole / alone:.2f} times")
    pairs = s1.open_pairs(folder / "out/pairs")
    for name in ("first", "second"):
        batches = s1.draw_batches(len(pairs), 64, 0, 0, len(pairs) // 64)
        seconds = cpu_seconds(lambda: [pairs.batch(rows) for rows in batches])
        show(f"the {name} epoch from the map", f"{seconds:.3f} s, {seconds / whole:.4f} of that")


def watch(command, count, limit=3600):
    """A row: a stage for `limit` seconds at most, and the most gigabytes that its first process
    held, of its own and mapped."""
    stage, *flags = command.split()
    process = subprocess.Popen([sys.executable, conftest.ROOT / stage, *flags], stdout=sys.stderr)
    began, most = time.monotonic(), [0, 0]
    while process.poll() is None and time.monotonic() - began < limit:
        status = Path(f"/proc/{process.pid}/status").read_text()
        held = re.findall(r"Rss(?:Anon|File):\s+(\d+)", status) or (0, 0)
        most = [max(a, int(b) / 1e6) for a, b in zip(most, held)]
        time.sleep(0.05)
    process.kill()
    if process.wait() > 0:
        raise SystemExit(f"{command} failed")
    show(f"{stage} of {count:,} toy pairs", f"{time.monotonic() - began:.0f} s, {most[0]:.2f} GB "
         f"of its own, {most[1]:.2f} GB mapped")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1_000_000, help="toy pairs for the memory")
    parser.add_argument("--jpeg", type=int, default=20_000, help="pictures packed into tars")
    args = parser.parse_args(argv)
    head("what", "measured")
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.jpeg)
        for command in (f"01_proxy.py --pairs {args.pairs} --steps 100",
                        "02_meta_rater.py --steps 100", "03_score.py", "04_select.py",
                        "05_train_eval.py --smoke"):
            watch(f"{command} --out {folder}/toy", args.pairs, 120 if command[1] == "5" else 3600)


if __name__ == "__main__":
    main()
