"""Two processes (gloo) do what one does, by hand and under torchrun."""
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import collect
from conftest import ROOT, TORCHRUN, launch, run
from test_faults import (QUICK, SELECTED, SERVER, STAGES, attempt, begin, copy, members,
                         wait_for, without_clock)


def find_ranks(n=2):
    """What torchrun sets in the environment of each of n processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [{"RANK": str(k), "WORLD_SIZE": str(n), "LOCAL_RANK": str(k), "MASTER_PORT": str(port),
             "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "x"} for k in range(n)]


def attempt_together(folder, number, flags, strike=(), **how):
    """What the first of two processes printed, when both have ended well; before that both are
    killed once, where `strike` says so."""
    for hit in ([strike] if strike else []) + [()]:
        both = [begin(folder, number, flags, env=env, strike=hit, **how) for env in find_ranks()]
        for process, said in both:
            process.join(300)
            assert process.exitcode == (-signal.SIGKILL if hit else 0), said.read_text()
            assert "Traceback" not in said.read_text()
    return both[0][1].read_text()


# ---- the same numbers ------------------------------------------------------------------------
SLOW = pytest.mark.slow
TRIED = {                  # stage: flags, where it is killed, what is compared, how near
    1: (["--smoke"], (1, "descend", 12), {"proxy.csv": "loss"}, 1e-5),
    2: (["--smoke", "--signal", "loss"], (1, "descend", 54), {"rater-loss.csv": "val ref"}, 1e-5),
    3: (["--baselines"], (3, "score_chunk", 2),
        {"ratings.csv": "instance group rating ref_loss difference gain"}, 1e-4),
    5: ([*SELECTED, "CHAIN/selected-topk-0.5.csv"], (1, "descend", 50),
        {"results.csv": "held-out score distance"}, 0.05)}


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=SLOW), 3, pytest.param(5, marks=SLOW)])
def test_two_processes_do_what_one_does(chain, tmp_path, number):
    """To rounding, also when they are killed on the way.

    02 is compared under eq. 9: in eq. 6's first step theta = theta_hat, and ranks follow rounding.
    """
    flags, strike, results, apart = TRIED[number]
    flags = [flag.replace("CHAIN", str(chain)) for flag in flags]
    one, two = (copy(chain, tmp_path / name, *["proxy.*", "rater.*"][:number - 1])
                for name in ("one", "two"))
    if number == 1:
        shutil.rmtree(two / "pairs")
    assert attempt(one, number, flags, changes=QUICK)[0] == 0
    said = attempt_together(two, number, flags, (*strike, signal.SIGKILL, False),
                            changes=QUICK)
    assert "continuing from" in said
    for name, columns in results.items():
        rows, others = (without_clock(folder / name) for folder in (one, two))
        assert [row.get("key") for row in rows] == [row.get("key") for row in others]
        for column in columns.split():
            a, b = (np.array([float(row[column]) for row in part]) for part in (rows, others))
            assert abs(a - b).max() < apart, (name, column)
    assert not list(two.rglob("*.part")) and not list(two.glob("*.progress"))


def take_one_step(said, env, signal):
    """One meta step by plain SGD, from proxies that differ: its change of all three networks."""
    os.environ.update(env)
    torch.set_num_threads(1)
    s1, s2 = map(importlib.import_module, STAGES[:2])

    def main(args, device):
        torch.manual_seed(0)
        nets = {name: s1.DiT(16, 4, 16, 1, 8) for name in ("proxy", "ref")}
        nets["rater"] = s2.Rater(16, 4, 8, 16, 1)
        for net in nets.values():
            for p in net.parameters():
                p.data += 0.1 * torch.randn(p.shape)
        opts = {name: torch.optim.SGD(net.parameters(), 1e-3) for name, net in nets.items()}
        before = {name: torch.nn.utils.parameters_to_vector(net.parameters()).detach()
                  for name, net in nets.items()}
        batches = [collect(s1.draw_toy(128, 16, 0, split)).batch() for split in ("train", "val")]
        numbers = s2.meta_step(nets, opts, *batches, s1.seeded(device, 0), args)
        moved = {name: torch.nn.utils.parameters_to_vector(net.parameters()).detach()
                 - before[name] for name, net in nets.items()}
        s1.add_up(mean := torch.stack(numbers))
        if not s1.rank():
            torch.save((moved, mean / s1.world()), said)
    s1.launch(main, s2.parse_args(["--signal", signal]))
    for name in Path("/proc/self/task").glob("*/comm"):    # it would abort the interpreter's end
        assert "gloo" not in name.read_text(), "a thread of the group has outlived it"


@pytest.mark.parametrize("signal", ["difference", "loss"])
def test_gradients_of_two_processes_are_those_of_the_joined_batch(tmp_path, signal):
    """Of four groups; whichever process holds a group, its total is ranked among all four."""
    found = []
    for ranks in ([{}], find_ranks()):
        both = [SERVER.Process(target=take_one_step, args=(tmp_path / "moved", env, signal))
                for env in ranks]
        for process in both:
            process.start()
        for process in both:
            process.join(300)
            assert process.exitcode == 0
        found.append(torch.load(tmp_path / "moved", weights_only=True))
    for net in ("proxy", "ref", "rater"):
        one, two = found[0][0][net], found[1][0][net]
        assert one.norm() > 1e-4 and (one - two).norm() < 1e-4 * one.norm(), net
    assert torch.allclose(found[0][1][:3], found[1][1][:3], atol=1e-5)        # val, ref, gap


def test_a_batch_that_cannot_be_cut_is_one_line(stage, chain, monkeypatch):
    monkeypatch.setattr(stage(1), "world", lambda: 2)
    for number, size, message in ((5, "51", "51 must divide by 2 processes"),
                                  (2, "96", "a multiple of 64 or, in one process")):
        with pytest.raises(SystemExit, match=message):
            launch(stage, number, ["--smoke", "--batch-size", size, "--out", str(chain)])


@pytest.mark.slow
def test_under_torchrun(chain, tmp_path):
    """The numbers of two processes without it; Ctrl-C leaves no process."""
    out = copy(chain, tmp_path / "out", "proxy.*")
    done = run(f"02_meta_rater.py --smoke --signal loss --out {out}", TORCHRUN)
    assert done.returncode == 0 and "waiting" not in done.stdout, done.stderr
    rows, others = (without_clock(folder / "rater-loss.csv") for folder in (chain, out))
    assert np.allclose(*([float(row["val"]) for row in part] for part in (rows, others)), atol=1e-5)
    with open(tmp_path / "said", "w") as said:
        first = subprocess.Popen([sys.executable, *TORCHRUN, str(ROOT / "01_proxy.py"), "--smoke",
                                  "--steps", "10000", "--out", str(tmp_path / "long")],
                                 start_new_session=True, stdout=said, stderr=said)
        assert wait_for(lambda: "pairs: 256 train" in (tmp_path / "said").read_text())
        os.killpg(first.pid, signal.SIGINT)
        assert first.wait(60) and wait_for(lambda: not members(first.pid))
    assert "stopped: the same command goes on" in (tmp_path / "said").read_text()
