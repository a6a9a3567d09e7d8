"""What a large corpus costs: preparing, start-up, epochs, selection, memory, on this machine.

    python tests/scale.py      half an hour on one core, 3 GB in a temporary folder; Linux

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
from unittest import mock

import numpy as np
from PIL import Image

import conftest
from common import head, s1, s2, s3, s4, s5, show

TARS, SIDE, DISTINCT = 8, 256, 100
WORK = {s2: (s1.Progress, "steps"), s3: (s1.Progress, "steps"), s4: (s4, "select"),
        s5: (s2, "train_contrast")}                        # stage: what its work begins with


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


def select(folder, count):
    """A row: ratings in a .npy are read, and half of them selected by two rules."""
    np.save(folder / "web.npy", np.random.default_rng(0).standard_normal(count, np.float32))
    cells = []
    for method in ("topk", "shift-gsample"):
        seconds = cpu_seconds(lambda: s4.select(s4.read_ratings(
            folder / "web.npy", "rating", range(count)), method, 0.5))
        cells.append(f"{method} {seconds:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    show(f"selecting half of {count:,} ratings, .npy", f"{', '.join(cells)}, at most {peak:.1f} GB")


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


class Begun(Exception):
    """Work begins."""


def start(out):
    """Rows: from the first line of `main` to the first step of work, beside the imports."""
    for stage, (owner, work) in WORK.items():
        code = f"import importlib; importlib.import_module('{stage.__name__}')"
        imports = cpu_seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True,
                                                     cwd=conftest.ROOT))
        began = time.perf_counter()
        with (mock.patch.object(owner, work, side_effect=Begun), contextlib.suppress(Begun),
              contextlib.redirect_stdout(sys.stderr)):
            stage.main(stage.parse_args(["--out", out]), s1.torch.device("cpu"))
        show(f"start-up of {stage.__name__}.py",
             f"{time.perf_counter() - began:.2f} s, its imports {imports:.2f}")


def watch(command, limit=3600):
    """Runs a stage for `limit` seconds at most: its seconds, and the most gigabytes that its first
    process held, of its own and mapped."""
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
    return time.monotonic() - began, *most


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1_000_000, help="toy pairs for the memory")
    parser.add_argument("--jpeg", type=int, default=20_000, help="pictures packed into tars")
    parser.add_argument("--ratings", type=int, default=30_000_000, help="that 04 selects from")
    args = parser.parse_args(argv)
    head("what", "measured")
    with tempfile.TemporaryDirectory() as folder:
        select(Path(folder), args.ratings)
        prepare(Path(folder), args.jpeg)
        data = f"--data {folder}/tars"
        for command in (f"01_proxy.py {data} --steps 12", "02_meta_rater.py --steps 12",
                        "03_score.py"):
            watch(f"{command} --out {folder}/out")
        start(f"{folder}/out")
        for command in (f"01_proxy.py --pairs {args.pairs} --steps 100",
                        "02_meta_rater.py --steps 100", "03_score.py", "04_select.py",
                        "05_train_eval.py --smoke"):
            seconds, own, mapped = watch(f"{command} --out {folder}/toy",
                                         120 if command[1] == "5" else 3600)
            show(f"{command.split()[0]} of {args.pairs:,} toy pairs",
                 f"{seconds:.0f} s, {own:.2f} GB of its own, {mapped:.2f} GB mapped")


if __name__ == "__main__":
    main()
