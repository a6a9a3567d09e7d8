"""Makes the numbered stages importable; runs the chain once, tiny, for the tests that read it.

What is promised of a CPU is tested on one: the GPU is hidden, but for test_gpu.py by itself.
"""
import importlib
import io
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest import mock

GPU_ALONE = any("test_gpu.py" in word for word in sys.argv)
GPUS = {k: v for k, v in os.environ.items() if k == "CUDA_VISIBLE_DEVICES"}
if not GPU_ALONE:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""                # before torch is imported

os.environ["OMP_NUM_THREADS"] = "1"                        # one core: sums do not depend on threads

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CHAIN = ("01_proxy.py --smoke", "02_meta_rater.py --smoke",
         "02_meta_rater.py --smoke --signal loss", "03_score.py --baselines",
         "03_score.py --signal loss", "04_select.py", "04_select.py --method shift-gsample",
         "05_train_eval.py --smoke")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--")


def run(command, launcher=()):
    """Run one stage as a user does; returns the finished process. command: 'FILE --flag value'."""
    file, *flags = command.split()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *launcher, str(ROOT / file), *flags], env=env,
                          capture_output=True, text=True, timeout=600)


def launch(stage, number, flags):
    """Run one stage in this process; flags: a list of words."""
    module = stage(number)
    return stage(1).launch(module.main, module.parse_args(flags))


def prepare(stage, out, *flags):
    """The splits that stage 1 prepares in `out` with these options, as {name: Pairs}."""
    s1, folder = stage(1), out / "pairs"
    s1.prepare(folder, s1.parse_args(["--out", str(out), *map(str, flags)]))
    return {split: s1.open_pairs(folder, split) for split in ("train", "val", "test")
            if (folder / f"{split}.npy").exists()}


def write_pictures(stage, folder, n, split="val"):
    """A folder of n toy pictures, their captions in .txt files beside them."""
    folder.mkdir()
    for key, image, caption, _ in stage(1).draw_toy(n, 16, 0, split):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{key}.png")
        (folder / f"{key}.txt").write_text(caption)


def encode(mode="RGB", kind="PNG", size=(20, 14), colour=0, **settings):
    """The bytes of a picture of one colour."""
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind, **settings)
    return file.getvalue()


def write(folder, files):
    """Files {name: bytes} in a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path, files):
    """A tar of files {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_fashion(root, train=260, test=60):
    """A tiny FashionMNIST in the real file format: the class is a grey level."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, n in (("train", train), ("t10k", test)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = np.broadcast_to(labels[:, None, None] * 20, (n, 28, 28)).astype(np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">iiii", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">ii", 2049, n) + labels.tobytes())


@pytest.fixture(scope="session")
def stage():
    """stage(1) .. stage(5): the modules under test."""
    names = ["01_proxy", "02_meta_rater", "03_score", "04_select", "05_train_eval"]
    return lambda number: importlib.import_module(names[number - 1])


@pytest.fixture(scope="session", autouse=True)
def small(stage):
    """Small figures and 16 drawn images an arm, in this process, to save time."""
    with (mock.patch.object(stage(3), "BANDS", 3), mock.patch.object(stage(5), "DRAWN", 16),
          mock.patch.object(stage(4), "SHOWN", 2)):
        yield


@pytest.fixture(scope="session")
def chain(stage, tmp_path_factory):
    """Folder with the results of the whole chain in smoke mode on toy pairs."""
    out = tmp_path_factory.mktemp("chain")
    for command in CHAIN:
        file, *flags = command.split()
        launch(stage, int(file[1]), [*flags, "--out", str(out)])
    return out
