"""Runs that are killed, stopped, starved or stale: nothing is lost, the same command goes on."""
import contextlib
import csv
import functools
import importlib
import io
import json
import multiprocessing.synchronize
import os
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

from unittest import mock

import numpy as np
import pytest
import torch

from common import s1
from conftest import encode, launch, prepare, write_tar

# A process that has imported the stages once is forked for each run, which saves seconds each time.
STAGES = ["01_proxy", "02_meta_rater", "03_score", "04_select", "05_train_eval"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(STAGES)


def play(number, flags, said, changes, strike, env, limit, threads):
    """In a child: one stage, which prints into the file `said`. changes: {(stage, name): value};
    strike: (stage or module, function, at which call, signal, whether to the whole group)."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell has none
    multiprocessing.set_start_method("fork", force=True)   # as in a process that a user starts
    for descriptor in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(env)
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    stages = [None, *map(importlib.import_module, STAGES)]
    for (place, name), value in changes.items():
        setattr(stages[place], name, value)
    if strike:
        place, name, count, what, group = strike
        holder = importlib.import_module(place) if isinstance(place, str) else stages[place]
        whole, calls = getattr(holder, name), multiprocessing.Value("i")      # of all workers

        @functools.wraps(whole)                            # else it cannot be sent to a worker
        def struck(*args, **kwargs):
            with calls:
                calls.value += 1
                now = calls.value == count
            if now:
                os.killpg(0, what) if group else os.kill(os.getpid(), what)
            return whole(*args, **kwargs)
        setattr(holder, name, struck)
    stages[1].launch(stages[number].main, stages[number].parse_args(flags))


def begin(folder, number, flags=(), *, changes={}, strike=(), env={}, limit=-1, threads=1, by=play):
    """A stage as a process of its own, in a session of its own, and the file that it prints to."""
    said = folder.parent / f"{folder.name}-{env.get('RANK', 0)}.said"
    said.write_text("")
    process = SERVER.Process(target=by, args=(
        number, [*flags, "--out", str(folder)], str(said), changes, strike, env, limit, threads))
    process.start()
    return process, said


def attempt(folder, number, flags=(), **how):
    """Its exit code, and what it printed; all processes that it started have to end."""
    process, said = begin(folder, number, flags, **how)
    process.join(300)
    assert wait_for(lambda: not members(process.pid)), members(process.pid)
    return process.exitcode, said.read_text()


def wait_for(condition, seconds=60):
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


def copy(source, folder, *patterns):
    """The files of some patterns in a folder of results; *.json come with what they belong to."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(source / "pairs", folder / "pairs", dirs_exist_ok=True)
    for pattern in patterns:
        for file in source.glob(pattern):
            shutil.copy(file, folder)
    return folder


def without_clock(path):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def crawl(stage, tmp_path_factory):
    """Results of 01 to 03 on two tars with names, captions and strata outside ASCII; their folder,
    and the files of the tars."""
    folder, files = tmp_path_factory.mktemp("crawl") / "фото 红", {}
    folder.mkdir()
    for k in range(120):
        files[f"été {k:03d} 图.png"] = encode(size=(16, 16), colour=(k, 2 * k, 99))
        record = {"caption": f"a “red” квадрат {k} 🐍", "stratum": "ясно"}
        files[f"été {k:03d} 图.json"] = json.dumps(record).encode()
    for shard in (0, 1):
        write_tar(folder / f"train-{shard}.tar", dict(list(files.items())[120 * shard:][:120]))
    out = folder.parent / "out"
    launch(stage, 1, [*read_crawl(folder.parent), "--out", str(out)])
    launch(stage, 2, ["--smoke", "--batch-size", "4", "--out", str(out)])
    launch(stage, 3, ["--out", str(out)])
    return out, files


def read_crawl(folder):
    tars = str(folder / "фото 红" / "*.tar")
    return ["--data", tars, "--val", tars, "--smoke", "--batch-size", "4"]


# ---- killed ----------------------------------------------------------------------------------
SELECTED = ["--smoke", "--seeds", "1", "--selected"]
QUICK = {(1, "SAVE_EVERY"): 0, (3, "CHUNK"): 64, (3, "GROUPS"): 4, (3, "draw_bands"): print}
KILLED = {                 # stage: flags, what is given, results, calls at which it is killed
    1: (["--smoke"], [], ["pairs/images.npy", "pairs/entries.npy", "proxy.pt", "proxy.csv"],
        {(1, "append"): (1, 10), (1, "split_rows"): (1, 2), (1, "descend"): (11, 13),
         ("os", "replace"): (1, 5)}),
    2: (["--smoke"], ["proxy.*"], ["rater.pt", "rater.csv"],
        {(1, "descend"): (30, 36), ("os", "replace"): (1, 5)}),
    3: ([], ["proxy.*", "rater.*"], ["ratings.npy", "ratings.csv"],
        {(3, "score_chunk"): (2, 5), ("os", "replace"): (1, 3), (3, "write_table"): (1, 2)}),
    5: (SELECTED, ["proxy.*"], ["results.csv", "results-samples.png"],
        {(1, "descend"): (17, 33), ("os", "replace"): (1, 6)})}
OTHER = {1: ["--lr", "0.1"], 2: ["--tau", "0.1"], 3: ["--baselines"], 5: ["--lr", "0.1"]}


@pytest.mark.parametrize("number", [1, 2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_continued_is_bit_identical(chain, tmp_path, number):
    """SIGKILL while pairs are prepared, inside a step, in the middle of saves, and again and again;
    half a run with other options is refused."""
    flags, given, results, places = KILLED[number]
    flags = flags + [str(chain / "selected-topk-0.5.csv")] * (number == 5)
    whole, broken = (copy(chain, tmp_path / name, *given) for name in ("whole", "broken"))
    if number == 1:
        shutil.rmtree(whole / "pairs")
        shutil.rmtree(broken / "pairs")
    assert attempt(whole, number, flags, changes=QUICK)[0] == 0
    rng = np.random.default_rng(number)
    for (place, name), between in places.items():
        count = int(rng.integers(*between))
        code, said = attempt(broken, number, flags, changes=QUICK, strike=(
            place, name, count, signal.SIGKILL, False))
        assert code == -signal.SIGKILL, said
    code, said = attempt(broken, number, flags + OTHER[number], changes=QUICK)
    assert code == 1 and "begun with other" in said.splitlines()[-1], said
    code, said = attempt(broken, number, flags, changes=QUICK)
    assert code == 0 and "continuing from" in said, said
    for name in results:
        if name.endswith(".csv"):
            assert without_clock(whole / name) == without_clock(broken / name), name
        else:
            assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    assert not [file for file in broken.rglob("*") if file.suffix in (".progress", ".part")]


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


# ---- Ctrl-C ----------------------------------------------------------------------------------
CSV = [*SELECTED, "CHAIN/selected-topk-0.5.csv"]


@pytest.mark.parametrize("number,flags,strike,threads", [
    (1, [], (1, "read_task", 1, signal.SIGINT), 2),        # inside a worker
    (1, [], (1, "append", 2, signal.SIGKILL), 2),
    (1, [], (1, "descend", 5, signal.SIGINT), 1),
    (3, [], (3, "show_pictures", 2, signal.SIGINT), 1),
    (4, ["--write-shards", "SHARDS"], ("os", "fsync", 4, signal.SIGINT), 1),
    (5, CSV, ("os", "replace", 2, signal.SIGINT), 2),
    pytest.param(5, CSV, ("os", "replace", 2, signal.SIGKILL), 2, marks=pytest.mark.slow)])
def test_ctrl_c_is_one_line_and_no_process_is_left(crawl, chain, tmp_path, number, flags, strike,
                                                   threads):
    """It reaches the whole process group, as from a terminal: workers, too, which have no say.
    After kill -9 of the first process they end by themselves."""
    results, out = crawl[0], tmp_path / "out"
    copy(results if number == 4 else chain, out, "*.pt", "*.npy", "*.json")
    flags = [flag.replace("CHAIN", str(chain)).replace("SHARDS", str(tmp_path / "half"))
             for flag in flags]
    if number == 1:
        shutil.rmtree(out / "pairs")
        flags = read_crawl(results.parent)
    code, said = attempt(out, number, flags, threads=threads, strike=(
        *strike, strike[3] == signal.SIGINT))
    if strike[3] == signal.SIGINT:
        assert code == 130 and "stopped: the same command goes on" in said.splitlines()[-1], said
        assert not any(word in said.lower() for word in ("traceback", "error", "warning")), said
    assert attempt(out, number, flags)[0] == 0


# ---- a full disk, too little memory ----------------------------------------------------------
@pytest.mark.parametrize("number,flags,limit,lacks", [
    (1, ["--smoke", "--size", "20"], 10 ** 5, "OUT: "), (1, ["--smoke"], 10 ** 6, "proxy.pt"),
    (2, ["--smoke"], 10 ** 6, "rater.pt"), (3, [], 4000, "OUT: "), (3, [], 9000, "ratings.csv"),
    (4, [], 1000, "selected-topk-0.5.csv"), (5, CSV, 9000, "results.progress")])
def test_a_full_disk_is_one_line_and_earlier_files_survive(chain, tmp_path, number, flags, limit,
                                                           lacks):
    """A limit to the size of a file, as a disk that is full cannot be had without being root."""
    flags = [flag.replace("CHAIN", str(chain)) for flag in flags]
    out = copy(chain, tmp_path / "out", "*.pt", "*.npy", "*.json", "*.csv")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, said = attempt(out, number, flags, limit=limit)
    assert code == 1 and "Traceback" not in said, said
    line, lacks = said.splitlines()[-1], lacks.replace("OUT", str(out))
    assert "File too large" in line and lacks in line and "run the command again" in line
    if number < 3:
        assert all(file.read_bytes() == data for file, data in before.items())
    if number < 5:                                         # (5 goes on after Ctrl-C, above)
        assert attempt(out, number, flags, changes=QUICK)[0] == 0


def test_too_little_memory_is_one_line_with_the_cure(stage, tmp_path):
    args = stage(1).parse_args(["--out", str(tmp_path)])
    for error in (torch.OutOfMemoryError, MemoryError):
        with pytest.raises(SystemExit, match="^out of memory: lower --batch-size.*$"):
            stage(1).launch(mock.Mock(side_effect=error), args)
    with pytest.raises(RuntimeError, match="illegal"):     # other errors keep their traceback
        stage(1).launch(lambda args, device: exec('raise RuntimeError("illegal access")'), args)


def test_what_workers_read_needs_no_shared_memory(stage, crawl, tmp_path, monkeypatch, capfd):
    """Of which there may be 64 MB: it goes through pipes."""
    def refuse(*args, **kwargs):
        raise AssertionError("shared memory")
    monkeypatch.setattr("torch.UntypedStorage._share_fd_cpu_", refuse)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    prepare(stage, tmp_path, *read_crawl(crawl[0].parent))
    for name in ("images.npy", "tokens.npy", "texts.jsonl"):
        assert (tmp_path / "pairs" / name).read_bytes() == (crawl[0] / "pairs" / name).read_bytes()
    assert "Traceback" not in capfd.readouterr().err


# ---- stale, foreign, damaged, edited ---------------------------------------------------------
def run_again(path):
    """As if the stage that wrote this file had run again, with another result."""
    if path.suffix == ".pt":
        weights = torch.load(path, weights_only=True)
        weights.get("rater", weights)["position"] += 1
        torch.save(weights, path)
    elif path.suffix == ".npy":
        table = np.load(path)
        table["rating"] += 1
        np.save(path, table)
    else:
        path.write_text(path.read_text().replace(": 0", ": 1"))
        return
    record = json.loads(path.with_suffix(".json").read_text())
    record["digest"] = importlib.import_module("01_proxy").digest(path)
    path.with_suffix(".json").write_text(json.dumps(record))


def damage(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def replace(path):
    for kind in (".pt", ".json"):
        shutil.copy(path.with_name(f"rater-loss{kind}"), path.with_suffix(kind))


OWN = ["--selected", "OUT/selected-topk-0.5.csv"]


@pytest.mark.parametrize("changed,how,number,flags,message", [
    ("pairs/made.json", run_again, 2, [], "proxy.pt was .* another .*made.json .*run 01_proxy.py"),
    ("proxy.pt", run_again, 3, [], "rater.pt was .* another .*proxy.pt .*run 02_meta_rater.py"),
    ("proxy.pt", run_again, 5, OWN, "another .*proxy.pt .*run 02_meta_rater.py"),
    ("rater.pt", run_again, 4, [], "ratings.npy was .* another .*rater.pt .*run 03_score.py"),
    ("rater.pt", run_again, 4, ["--ratings", "OUT/ratings.csv"], "another .*rater.pt .*run 03_sc"),
    ("proxy.pt", run_again, 5, [], "another .*proxy.pt .*run 02_meta_rater.py"),
    ("rater.pt", run_again, 5, [], "ratings.npy was .* another .*rater.pt .*run 03_score.py"),
    ("ratings.npy", run_again, 5, OWN, "selected-.* another .*ratings.npy .*run 04_select.py"),
    ("proxy.json", damage, 2, [], "proxy.pt .* was changed: run 01_proxy.py"),
    ("rater.pt", damage, 3, [], "rater.pt .* was changed: run 02_meta_rater.py"),
    ("rater.pt", replace, 3, [], "was changed: run 02_meta_rater.py"),
    ("ratings.npy", damage, 4, [], "ratings.npy: "),
    ("rater.pt", os.remove, 3, [], "rater.pt is missing or .*: run 02_meta_rater.py")])
def test_what_does_not_belong_together_is_refused_by_name(
        stage, chain, tmp_path, capsys, changed, how, number, flags, message):
    out = copy(chain, tmp_path / "out", "*.pt", "*.json", "*.npy", "*.csv")
    flags = [*(flag.replace("OUT", str(out)) for flag in flags), "--out", str(out)]
    if number == 4:
        launch(stage, number, flags)                       # as long as nothing is changed it runs
        assert "carries no record" not in capsys.readouterr().out
    how(out / changed)
    with pytest.raises(SystemExit, match=message) as stop:
        launch(stage, number, flags)
    assert "\n" not in stop.value.code


def test_results_of_another_out_are_refused(stage, chain, tmp_path):
    """Toy pairs of another seed have the same keys. A copy of the same pairs is not another."""
    launch(stage, 1, ["--smoke", "--seed", "1", "--out", str(tmp_path / "b")])
    shutil.copytree(chain, tmp_path / "same")
    for number, flags, message in (
            (4, ["--ratings", f"{chain}/ratings.npy"], "rates other pairs than .*b/pairs holds"),
            (5, [*SELECTED, f"{chain}/selected-topk-0.5.csv"], "other pairs than .*b/pairs: rate")):
        with pytest.raises(SystemExit, match=message):
            launch(stage, number, [*flags, "--out", str(tmp_path / "b")])
        launch(stage, number, [*flags, "--out", str(tmp_path / "same")])


def test_edited_ratings_are_taken_as_ones_own(stage, chain, tmp_path, capsys):
    out = copy(chain, tmp_path / "out", "ratings.*")
    table = np.load(out / "ratings.npy")
    table["rating"] *= -1
    np.save(out / "ratings.npy", table)
    launch(stage, 4, ["--out", str(out)])
    assert "ratings.npy carries no record" in capsys.readouterr().out
    rows = [set(stage(4).read_columns(folder / "selected-topk-0.5.csv", [])["row"])
            for folder in (chain, out)]
    assert not rows[0] & rows[1]


def test_an_interrupted_run_knows_what_it_read(stage, chain, tmp_path, monkeypatch):
    """Interrupted, an earlier stage run again, and the same command: half of either is refused."""
    out = copy(chain, tmp_path / "out", "proxy.*")
    flags = ["--smoke", "--out", str(out)]
    monkeypatch.setattr(stage(1), "SAVE_EVERY", 0)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(stage(2), "meta_step", cut_at(stage(2).meta_step, 11))
        launch(stage, 2, flags)
    run_again(out / "proxy.pt")
    with pytest.raises(SystemExit, match="begun with other .*proxy.pt: .*delete the file"):
        launch(stage, 2, flags)


# ---- numbers that are not finite -------------------------------------------------------------
def test_nan_in_a_worker_is_one_line_too(stage, chain, tmp_path):
    out = copy(chain, tmp_path / "out", "*.pt", "*.npy", "*.json")
    flags = [*SELECTED, f"{chain}/selected-topk-0.5.csv", "--lr", "1e9"]
    code, said = attempt(out, 5, flags, threads=2)
    assert code == 1 and "Traceback" not in said
    assert re.search("out: .*step [12]: .* not finite, lower --lr: mend", said.splitlines()[-1]), said


@pytest.mark.parametrize("number,name,net", [(1, "descend", "net"), (2, "meta_step", "ref")])
def test_nan_stops_at_its_step_with_one_line(stage, chain, tmp_path, monkeypatch, number, name,
                                             net):
    """The last steps are looked at, too. The earlier save stays, nothing after it is written."""
    out, whole, calls = copy(chain, tmp_path / "out"), getattr(stage(number), name), []

    def poisoned(*args, **more):
        calls.append(0)
        if len(calls) == 13:
            with torch.no_grad():
                (args[1] if number == 1 else args[0]["ref"]).position[0, 0, 0] = float("inf")
        return whole(*args, **more)
    copy(chain, out, *["proxy.*"] * (number == 2))
    monkeypatch.setattr(stage(number), name, poisoned)
    monkeypatch.setattr(stage(1), "SAVE_EVERY", 0)
    with pytest.raises(SystemExit, match="step 1[34]: .*nan.* not finite, lower --lr") as stop:
        launch(stage, number, ["--smoke", "--steps", "14", "--out", str(out)])
    assert "\n" not in stop.value.code and not list(out.glob("rater.pt"))
    file, = out.glob("*.progress")
    saved = torch.load(file, weights_only=True)
    assert saved["step"] == len(saved["log"]) == 10
    assert all(v.isfinite().all() for v in saved["weights"][net].values())
