"""Two processes (gloo) on files: one index, one count, one step; signals and kills; two nodes."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from conftest import ROOT, TORCHRUN, run, write_pictures
from test_scale import tars  # noqa: F401  (a fixture)

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}

# Two processes as on two nodes: each has its own copy of the shards, with its own times and folder.
TWO_NODES = """
import importlib, json, os, shutil, sys
from pathlib import Path
root, shards, pictures, out = map(Path, sys.argv[1:])
sys.path.insert(0, str(root))
import numpy as np
import torch
p = importlib.import_module("01_proxy")
moments = importlib.import_module("05_train_eval").Moments

def attempt(function, *given):
    try:
        function(*given)
        return "went on"
    except (SystemExit, RuntimeError) as end:              # RuntimeError: the other one left
        return str(end)

def resume(step, results):
    progress = p.Progress(out / "p.progress")
    progress.step, progress.kept = step, {"results": [{}] * results}
    return attempt(progress.attach)

def main(args, device):
    k, found = p.rank(), {}
    own = out / f"node {k}" / "shards"
    shutil.copytree(shards, own)
    if k:
        for tar in own.glob("*.tar"):
            os.utime(tar, (1, 1))
    pairs = p.open_pairs(own, 16, 8, out)
    found["pairs"] = [len(pairs), *pairs.name([0, 700, 1299])]
    found["indexes"] = len(list(out.glob("index-*")))
    found["same place"], found["other step"], found["other arm"] = (
        resume(*place) for place in ((3, 1), (3 * k, 0), (3, k)))
    for _ in p.stream(p.open_pairs(pictures, 16, 8), np.arange(8).reshape(2, 4)):
        pass
    noise = p.draw_noise(torch.zeros(24, 3, 2, 2), p.seeded("cpu", 1))
    found["noise"] = [v.tolist() for v in map(p.gather, noise)]
    sums = moments(2)
    sums.add(torch.full((3, 2), float(k)))
    found["images"] = sums.finish()[0]
    for tar in list(own.glob("*-1.tar"))[:k]:
        tar.unlink()
    found["other shards"] = attempt(p.open_pairs, own, 16, 8, out)
    (out / f"found {k}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)

p.launch(main, p.parse_args(["--smoke", "--out", str(out)]))
"""


@pytest.fixture(scope="module")
def nodes(stage, tars, tmp_path_factory):  # noqa: F811
    """What two processes printed and found."""
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "nodes.py").write_text(TWO_NODES)
    write_pictures(stage, folder / "pictures", 8)
    for key in (1, 6):                                     # one in the share of either process
        (folder / f"pictures/val{key:06d}.png").write_bytes(b"no picture")
    done = subprocess.run([sys.executable, *TORCHRUN, folder / "nodes.py", ROOT, tars[0],
                           folder / "pictures", folder / "out"], env=ENV, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, [json.loads((folder / f"out/found {k}.json").read_text()) for k in (0, 1)]


def test_shards_of_each_node_are_read_through_one_index(nodes, tars):  # noqa: F811
    for found in nodes[1]:
        assert found["pairs"] == [1300, *(tars[1].keys[row] for row in (0, 700, 1299))]
        assert found["indexes"] == 1
    assert "not the shards (names, sizes) of the first process" in nodes[1][1]["other shards"]


def test_processes_that_resume_elsewhere_stop_with_one_line(nodes):
    for name in ("other step", "other arm"):
        assert "p.progress: the processes do not see the same" in nodes[1][1][name]
        assert "\n" not in nodes[1][1][name]
    assert [found["same place"] for found in nodes[1]] == ["went on"] * 2


def test_skipped_pairs_of_all_processes_are_counted(nodes):
    assert "skipped 2 (unreadable image" in nodes[0]


def test_noise_of_all_rows_is_what_one_process_draws(stage, nodes):
    """24 rows a process: neither begins nor ends where a block of noise does."""
    t, eps = stage(1).draw_noise(torch.zeros(48, 3, 2, 2), stage(1).seeded("cpu", 1))
    for found in nodes[1]:
        assert torch.allclose(torch.tensor(found["noise"][0]), t, atol=1e-6)
        assert torch.equal(torch.tensor(found["noise"][1]), eps)


def test_images_measured_by_all_processes_are_added_up(nodes):
    assert [found["images"] for found in nodes[1]] == [6, 6]


def test_a_process_draws_the_noise_of_its_own_rows_alone(stage, monkeypatch):
    """Of 64 processes' rows, the blocks of one; as many draws at any number of processes."""
    drawn, randn = [], torch.randn

    def counted(*shape, **more):
        drawn.append(shape[0])
        return randn(*shape, **more)
    monkeypatch.setattr(torch, "randn", counted)
    for world, rank in ((1, 0), (64, 0), (64, 41), (64, 63)):
        monkeypatch.setattr(stage(1), "world", lambda world=world: world)
        monkeypatch.setattr(stage(1), "rank", lambda rank=rank: rank)
        drawn.clear()
        t, eps = stage(1).draw_noise(torch.zeros(40, 3, 2, 2), stage(1).seeded("cpu", 1))
        assert t.shape == (40,) and eps.shape == (40, 3, 2, 2)
        assert sum(drawn) <= 40 + 2 * stage(1).NOISE_ROWS


# Stage 1 from disk, with workers that decode slowly; tells the process ids of those at work.
FROM_DISK = """
import importlib, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
p = importlib.import_module("01_proxy")
decode, advance = p.decode, p.Progress.advance

def slowly(data, size):
    time.sleep(0.002)
    return decode(data, size)

def told(self, *rest):
    advance(self, *rest)
    Path(sys.argv[2], f"step-{os.getpid()}").write_text(str(self.step))

p.decode, p.Progress.advance = slowly, told
p.launch(p.main, p.parse_args(sys.argv[3:]))
"""


def start_from_disk(tmp_path, shards, launcher=()):
    """Stage 1 on 1,300 pairs at --memory 0, in a session of its own, when it has made two steps."""
    (tmp_path / "from_disk.py").write_text(FROM_DISK)
    process = subprocess.Popen(
        [sys.executable, *launcher, tmp_path / "from_disk.py", ROOT, tmp_path, "--data", shards,
         "--memory", "0", "--steps", "5000", "--batch-size", "16", "--width", "16", "--depth", "1",
         "--out", tmp_path / "out"], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True)
    assert wait_for(lambda: any(int(file.read_text() or 0) > 1 for file in
                                tmp_path.glob("step-*")))
    return process


def wait_for(condition, seconds=120):
    """Whether it comes true; the time is there for a busy machine and not a promise."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def members(session):
    """Process ids of a session, zombies left out."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,sess=,stat="], capture_output=True, text=True)
    rows = (line.split() for line in listed.stdout.splitlines())
    return [int(pid) for pid, of, state in rows if int(of) == session and state[0] != "Z"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "torchrun"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_the_step(tars, tmp_path, launcher, number):  # noqa: F811
    """It reaches the workers that decode too; they leave it to the main process."""
    process = start_from_disk(tmp_path, tars[0], launcher)
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=120)
    assert "stopped after step" in said and "DataLoader" not in said, said
    step = int(said.split("stopped after step ")[1].split(":")[0])
    saved = torch.load(tmp_path / "out/proxy.progress", weights_only=True)
    assert saved["step"] == step == len(saved["log"]) > 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are ended by Linux")
def test_after_kill_9_no_worker_is_left_and_the_folder_is_free(stage, tars, tmp_path):  # noqa: F811
    process = start_from_disk(tmp_path, tars[0])
    assert len(members(process.pid)) > 1                   # workers are there
    process.kill()
    process.wait()
    with stage(1).lock_folder(tmp_path / "out"):           # free at once
        assert wait_for(lambda: not members(process.pid))
    process.stdout.close()


def test_a_lock_is_not_inherited_by_a_fork(stage, tmp_path):
    """Whatever a stage forks (workers, the index's pool) may live on; the folder is free."""
    read, write = os.pipe()
    owner = os.fork()
    if not owner:
        with stage(1).lock_folder(tmp_path):
            child = os.fork()
            if child:
                os.write(write, str(child).encode())
            time.sleep(60)
            os._exit(0)
    child = int(os.read(read, 20))
    try:
        with pytest.raises(SystemExit, match="in use by another run"):
            with stage(1).lock_folder(tmp_path):
                pass
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
        with stage(1).lock_folder(tmp_path):
            os.kill(child, 0)                              # the fork is still there
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(read)
        os.close(write)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are ended by Linux")
def test_a_worker_ends_with_its_parent_whatever_it_is_at(stage):
    """A DataLoader's would notice after a while by itself, the index's pool never."""
    read, write = os.pipe()
    owner = os.fork()
    if not owner:
        child = os.fork()
        if not child:
            stage(1).obey_parent()
            os.write(write, str(os.getpid()).encode())
        time.sleep(120)
        os._exit(0)
    child = int(os.read(read, 20))
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    gone = wait_for(lambda: not is_alive(child), 30)
    if not gone:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    os.close(write)
    assert gone


def is_alive(pid):
    """Whether a process runs; a zombie that nobody has waited for does not."""
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.slow
def test_two_launchers_as_on_two_nodes(chain, tmp_path):
    """--nnodes 2 on one machine: 01 to 03 as one process does, and 05 runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for command, given in (("01_proxy.py", []), ("02_meta_rater.py --signal loss", ["proxy.pt"]),
                           ("03_score.py", ["rater.pt"]), ("05_train_eval.py", [])):
        for name in given:
            shutil.copy(chain / name, tmp_path)
        launched = [subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(k),
             "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port),
             "--", *f"{ROOT}/{command} --smoke --out {tmp_path}".split()], env=ENV,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for k in (0, 1)]
        said = [process.communicate(timeout=300)[0] for process in launched]
        assert [process.returncode for process in launched] == [0, 0], said
    for name, column in (("proxy.csv", 1), ("rater-loss.csv", 1), ("ratings.csv", 3)):
        one, two = (np.loadtxt(folder / name, delimiter=",", skiprows=1, usecols=column)
                    for folder in (chain, tmp_path))
        assert np.allclose(one, two, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("file", ["02_meta_rater.py", "03_score.py", "04_select.py",
                                  "05_train_eval.py"])
def test_stages_find_each_other_in_safe_mode(file, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    done = run(f"{file} --help")
    assert done.returncode == 0 and "--out" in done.stdout, done.stderr
