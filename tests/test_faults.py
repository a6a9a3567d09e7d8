"""Runs that are killed, stopped, starved or doubled: nothing is lost, the same command goes on."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT, TORCHRUN, launch, run

# Runs a stage and sends itself a signal at the n-th call of one function: inside a step, a save, ...
DEADLY = """
import importlib, os, sys
sys.path.insert(0, sys.argv[1])
name, place, function, number, count = sys.argv[2:7]
module = importlib.import_module(place)
alive, calls = getattr(module, function), 0
def deadly(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count) and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), int(number))
    return alive(*args, **kwargs)
setattr(module, function, deadly)
stage = importlib.import_module(name)
importlib.import_module("01_proxy").launch(stage.main, stage.parse_args(sys.argv[7:]))
"""


def run_deadly(tmp_path, command, place, count, number=signal.SIGKILL, launcher=()):
    """Run 'FILE --flags', killed at the count-th call of place = 'module.function'."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    file, *flags = command.split()
    words = [str(tmp_path / "deadly.py"), str(ROOT), file.removesuffix(".py"),
             *place.split("."), str(int(number)), str(count), *flags]
    return subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)


def same_tensors(one, two):
    """Every tensor in two files of `save`, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same_tensors(one[k], two[k]) for k in one)
    return True


def without_clock(path):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def compare(one, two, names):
    for name in names:
        if name.endswith(".pt"):
            files = [torch.load(folder / name, weights_only=True) for folder in (one, two)]
            for part in ("snapshots", "weights"):
                assert same_tensors(files[0].get(part), files[1].get(part)), name
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
        else:
            assert without_clock(one / name) == without_clock(two / name), name
    assert not list(two.glob("*.progress")) and not list(two.glob("*.part"))


# Stage: files given to it, its results, and between which calls of what it is killed.
KILLED = {
    "01_proxy.py": (0, ["proxy.pt", "proxy.csv"],
                    {"01_proxy.step_down": (3, 12), "os.replace": (2, 9)}),
    "02_meta_rater.py": (1, ["rater.pt", "rater.csv"],
                         {"01_proxy.step_down": (4, 36), "os.replace": (2, 9)}),
    "03_score.py --baselines": (2, ["ratings.csv"], {"os.replace": (2, 6),
                                                     "03_score.score_chunk": (1, 2)}),
    "05_train_eval.py": (4, ["results.csv"],
                         {"01_proxy.step_down": (3, 60), "os.replace": (3, 90)})}
GIVEN = ("proxy.pt", "rater.pt", "ratings.csv", "ratings-loss.csv")


@pytest.mark.parametrize("stage_file", [
    pytest.param(file, marks=pytest.mark.slow) for file in KILLED])
def test_killed_at_random_moments_and_continued_is_bit_identical(chain, tmp_path, stage_file):
    """SIGKILL inside a step, and in the middle of a save; then the plain command finishes."""
    rng, (given, results, places) = np.random.default_rng(len(stage_file)), KILLED[stage_file]
    for name in GIVEN[:given]:
        shutil.copy(chain / name, tmp_path)
    command, said = f"{stage_file} --smoke --save-every 0 --out {tmp_path}", ""
    for place, between in places.items():
        done = run_deadly(tmp_path, command, place, rng.integers(*between))
        said += done.stdout
        # the second run may have less left to do than its number of calls, and finish
        assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
    done = run(command)
    assert done.returncode == 0 and "continuing from" in said + done.stdout, done.stderr
    compare(chain, tmp_path, results)


@pytest.mark.slow
def test_killed_under_torchrun(chain, tmp_path):
    """The second of two processes is killed; the launcher ends the first; both continue."""
    for folder in ("broken", "whole"):
        (tmp_path / folder).mkdir()
        shutil.copy(chain / "proxy.pt", tmp_path / folder)
    command = "02_meta_rater.py --smoke --save-every 0 --signal loss --out "
    done = run_deadly(tmp_path, f"{command}{tmp_path}/broken", "01_proxy.step_down", 19,
                      launcher=TORCHRUN)
    assert done.returncode and (tmp_path / "broken/rater-loss.progress").exists(), done.stderr
    for folder in ("broken", "whole"):
        done = run(f"{command}{tmp_path}/{folder}", TORCHRUN)
        assert done.returncode == 0, done.stderr
    compare(tmp_path / "whole", tmp_path / "broken", ["rater-loss.pt", "rater-loss.csv"])


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow),
                                    signal.SIGTERM])
def test_a_polite_stop_finishes_the_step_and_says_how_to_go_on(chain, tmp_path, number):
    command = f"01_proxy.py --smoke --out {tmp_path}"
    done = run_deadly(tmp_path, command, "01_proxy.step_down", 5, number)
    assert done.returncode == 128 + number and "Traceback" not in done.stderr
    assert "stopped after step 5: the same command continues" in done.stdout
    done = run(f"02_meta_rater.py --smoke --out {tmp_path}")
    assert done.returncode == 1 and "01_proxy.py was interrupted" in done.stderr
    assert run(command).returncode == 0
    compare(chain, tmp_path, ["proxy.pt", "proxy.csv"])


@pytest.mark.slow
def test_a_stop_reaches_both_processes(chain, tmp_path):
    """Only one of two processes gets the signal; both save the same step and leave."""
    command = f"01_proxy.py --smoke --out {tmp_path}"
    done = run_deadly(tmp_path, command, "01_proxy.step_down", 4, signal.SIGTERM, TORCHRUN)
    assert "stopped after step 4" in done.stdout, done.stderr
    assert run(command, TORCHRUN).returncode == 0
    losses = [[float(row["loss"]) for row in without_clock(folder / "proxy.csv")]
              for folder in (chain, tmp_path)]
    assert np.allclose(*losses, atol=1e-5)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_earlier_files_survive(chain, tmp_path):
    shutil.copy(chain / "proxy.pt", tmp_path)
    before = (tmp_path / "proxy.pt").read_bytes()
    for name in ("proxy.progress", "proxy.pt"):
        (tmp_path / f"{name}.part").symlink_to("/dev/full")
        done = run(f"01_proxy.py --smoke --save-every {'0' if 'gress' in name else '60'} "
                   f"--out {tmp_path}")
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert f"{name} cannot be written" in done.stderr
        assert (tmp_path / "proxy.pt").read_bytes() == before


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(stage, tmp_path):
    with stage(1).lock_folder(tmp_path):
        done = run(f"01_proxy.py --smoke --out {tmp_path}")
        assert done.returncode == 1 and "is in use by another run" in done.stderr
        assert "Traceback" not in done.stderr
    assert run(f"01_proxy.py --smoke --out {tmp_path}").returncode == 0


@pytest.fixture()
def unfinished(stage, tmp_path):
    """progress(**settings): a Progress of stage 1 at `path`, where one was saved at step 3."""
    path = tmp_path / "proxy.progress"

    def progress(written_by="01_proxy.py", **settings):
        return stage(1).Progress(path, written_by, {"lr": 0.1, "steps": 9, **settings}, 0)
    first = progress()
    first.attach(net=torch.nn.Linear(2, 1))
    for _ in range(3):
        first.advance(torch.tensor([1.0]))
    stage(1).Progress.running = False
    return progress, path


def test_foreign_and_damaged_checkpoints_are_refused(unfinished):
    progress, path = unfinished
    assert progress().step == 3 and progress(out="elsewhere").step == 3
    with pytest.raises(SystemExit, match="begun with lr = 0.1, not 0.2"):
        progress(lr=0.2)
    with pytest.raises(SystemExit, match="not written by 02_meta_rater.py"):
        progress("02_meta_rater.py")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(SystemExit, match="cannot be read"):
        progress()


def run_again(path):
    """As if the stage that wrote this file had run again with another seed."""
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        state["settings"]["seed"] += 1
        torch.save(state, path)
    else:
        path.write_text(path.read_text().replace("0.", "1."))


ARTEFACTS = ("proxy.pt", "rater.pt", "ratings.csv", "ratings.json", "ratings.npy",
             "selected-topk-0.5.csv", "selected-topk-0.5.json")
OWN = ["--selected", "OUT/selected-topk-0.5.csv"]


@pytest.mark.parametrize("changed,number,flags,message", [
    ("proxy.pt", 3, [], "another .*proxy.pt: run 02_meta_rater.py"),
    ("proxy.pt", 4, [], "another .*proxy.pt than is there now: run 03_score.py"),
    ("proxy.pt", 5, [], "ratings.csv was made from another .*proxy.pt .*run 03_score.py"),
    ("proxy.pt", 5, OWN, "another .*proxy.pt .*run 04_select.py"),
    ("rater.pt", 4, [], "ratings.csv was made from another .*rater.pt .*run 03_score.py"),
    ("rater.pt", 4, ["--ratings", "OUT/ratings.npy"], "another .*rater.pt .*run 03_score.py"),
    ("rater.pt", 5, [], "another .*rater.pt .*run 03_score.py"),
    ("ratings.csv", 5, OWN, "selected-topk-0.5.csv was .*another .*ratings.csv .*run 04_select")])
def test_what_was_made_from_another_file_is_refused(
        stage, chain, tmp_path, capsys, changed, number, flags, message):
    for name in ARTEFACTS:
        shutil.copy(chain / name, tmp_path)
    flags = ["--smoke", "--out", str(tmp_path),
             *(flag.replace("OUT", str(tmp_path)) for flag in flags)]
    if number == 4:
        launch(stage, number, flags)                       # as long as nothing is changed it runs
        assert "carries no record" not in capsys.readouterr().out
    run_again(tmp_path / changed)
    with pytest.raises(SystemExit, match=message) as stop:
        launch(stage, number, flags)
    assert "\n" not in stop.value.code
    for name in ("ratings.json", "selected-topk-0.5.json"):
        (tmp_path / name).unlink()
    if number == 4:                                        # one's own ratings are taken as they are
        launch(stage, number, flags)
        assert "carries no record" in capsys.readouterr().out


def test_the_same_run_again_makes_the_same_file(stage, chain, tmp_path):
    """So that nothing later has to run again, wherever and however often it was saved."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    launch(stage, 1, ["--smoke", "--save-every", "0", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    assert (tmp_path / "proxy.pt").read_bytes() == (chain / "proxy.pt").read_bytes()
    launch(stage, 4, ["--ratings", str(chain / "ratings.csv"), "--out", str(tmp_path)])
    record = json.loads((tmp_path / "selected-topk-0.5.json").read_text())
    assert record["made_from"].keys() == {"proxy.pt", "rater.pt", "ratings.csv"}


class Cut(Exception):
    """Stands for a power failure."""


def cut_at(function, count):
    """The function, until it fails for good at its count-th call."""
    def failing(*args, **kwargs):
        failing.calls += 1
        if failing.calls >= count:
            raise Cut
        return function(*args, **kwargs)
    failing.calls = 0
    return failing


@pytest.mark.parametrize("number,function,changed", [
    (2, "meta_step", "proxy.pt"), (3, "score_chunk", "rater.pt"), (3, "score_chunk", "proxy.pt")])
def test_an_interrupted_run_knows_what_it_read(
        stage, chain, tmp_path, monkeypatch, number, function, changed):
    """Interrupted, an earlier stage run again, and the same command: half of either is refused."""
    for name in ("proxy.pt", "rater.pt"):
        shutil.copy(chain / name, tmp_path)
    flags = ["--smoke", "--save-every", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(stage(3), "CHUNK", 64)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(stage(number), function, cut_at(getattr(stage(number), function), 3))
        launch(stage, number, flags)
    run_again(tmp_path / changed)
    if changed == "proxy.pt" and number == 3:              # and stage 2 after it
        rater = torch.load(tmp_path / "rater.pt", weights_only=True)
        rater["proxy"] = stage(1).digest(tmp_path / "proxy.pt")
        torch.save(rater, tmp_path / "rater.pt")
    with pytest.raises(SystemExit, match=f"begun with {changed} = .* delete the file"):
        launch(stage, number, flags)
    stage(1).Progress.running = False


@pytest.mark.parametrize("place,count", [
    ("write_record", 1), ("report", 1), ("draw_histogram", 1), ("draw_dynamics", 1),
    ("score_chunk", 3)])
def test_stage_3_cut_off_anywhere_continues(stage, chain, tmp_path, monkeypatch, place, count):
    for name in ("proxy.pt", "rater.pt"):
        shutil.copy(chain / name, tmp_path)
    flags = ["--smoke", "--out", str(tmp_path)]
    if place == "score_chunk":
        monkeypatch.setattr(stage(3), "CHUNK", 64)
        flags += ["--save-every", "0"]
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(stage(3), place, cut_at(getattr(stage(3), place), count))
        launch(stage, 3, flags)
    cut = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    launch(stage, 3, flags)
    whole = np.loadtxt(chain / "ratings.csv", delimiter=",", skiprows=1, usecols=3)
    assert np.allclose(np.load(tmp_path / "ratings.npy"), whole, atol=1e-5)
    assert not list(tmp_path.glob("*.progress")) and not list(tmp_path.glob("*.part"))
    for name, content in cut.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "ratings.csv").write_text("of another run")
    (tmp_path / "ratings.csv.part").unlink(missing_ok=True)
    with pytest.raises(SystemExit, match="not as the interrupted run left it: delete"):
        launch(stage, 3, flags)
    stage(1).Progress.running = False


def test_nan_stops_at_its_step_and_names_the_pairs(stage, tmp_path):
    """Weights of one infinite number: the loss is NaN at once, the earlier save stays good."""
    pairs = stage(1).draw_toy(64, 16, 0, "val")
    progress = stage(1).Progress(tmp_path / "p.progress", "01_proxy.py", {}, 0)
    net, seen = stage(1).DiT(16, 4, 16, 1, 8), []

    def poison(step):
        seen.append(step)
        if step == 3:
            net.position.data[0, 0, 0] = float("inf")
    with pytest.raises(SystemExit, match="step 4: .*nan.* val0000") as stop:
        stage(1).train(net, pairs, 9, 8, 1e-3, 0, progress=progress, after=poison)
    stage(1).Progress.running = False
    assert seen == [1, 2, 3] and str(stop.value).count("val0000") == 8
    rows, = stage(1).draw_batches(64, 8, 0, 3, 4)
    assert all(pairs.keys[row] in str(stop.value) for row in rows)
    saved = stage(1).load(tmp_path / "p.progress", "01_proxy.py")
    assert saved["step"] == 3 and len(saved["log"]) == 3
