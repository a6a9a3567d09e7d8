"""Runs that are killed, stopped, starved or stale: nothing is lost, the same command goes on."""
import contextlib
import csv
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import tarfile
import time

import numpy as np
import pytest
import torch

from conftest import encode, launch, write_tar

# A process that has imported the stages once is forked for each run, which saves seconds each time.
STAGES = ["01_proxy", "02_meta_rater", "03_score", "04_select", "05_train_eval"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(STAGES)


def play(number, flags, said, changes, strike, env, limit, threads):
    """In a child: one stage, which prints into the file `said`. changes: {(stage, name): value};
    strike: (stage or module, function, at which call, signal, whether to the whole group)."""
    os.setsid()
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
        whole, calls = getattr(holder, name), []

        def struck(*args, **kwargs):
            calls.append(name)
            if len(calls) == count:
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


def compare(one, two, names):
    """Files of both folders are the same, bit for bit, and nothing unfinished is left."""
    for name in names:
        if name.endswith(".csv"):
            assert without_clock(one / name) == without_clock(two / name), name
        else:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    left = [file.name for file in two.rglob("*") if file.suffix in (".progress", ".part")]
    assert not left


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order in this process and in those that it starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def crawl(stage, tmp_path_factory):
    """Results of 01 to 03 on two tars with names, captions and strata outside ASCII, written while
    the terminal had ASCII alone; their folder, and the files of the tars."""
    folder, files = tmp_path_factory.mktemp("crawl") / "фото 红", {}
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(120):
        key = f"été {k:03d} 图"
        files[f"{key}.png"] = encode(size=(16, 16), colour=tuple(rng.integers(0, 255, 3).tolist()))
        files[f"{key}.json"] = json.dumps({"caption": f"a “red” квадрат {k} 🐍", "stratum": "ясно"}
                                          ).encode()
    for shard in (0, 1):
        write_tar(folder / f"train-{shard}.tar", dict(list(files.items())[120 * shard:][:120]))
    out = folder.parent / "out"
    with narrow("ascii") as said:
        launch(stage, 1, ["--data", str(folder / "*.tar"), "--smoke", "--batch-size", "4",
                          "--out", str(out)])
        launch(stage, 2, ["--smoke", "--batch-size", "4", "--out", str(out)])
        launch(stage, 3, ["--out", str(out)])
    assert "pairs" in said.buffer.getvalue().decode("ascii")
    return out, files


@contextlib.contextmanager
def narrow(encoding):
    """A terminal that has no letters outside an encoding."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with contextlib.redirect_stdout(screen):
        yield screen
        screen.flush()


# ---- killed ----------------------------------------------------------------------------------
SELECTED = ["--smoke", "--seeds", "1", "--selected"]
KILLED = {                 # stage: flags, results, and between which calls of what it is killed
    1: (["--smoke"], ["pairs/images.npy", "pairs/entries.npy", "proxy.pt", "proxy.csv"],
        {(1, "append"): (1, 10), (1, "descend"): (11, 13), ("os", "replace"): (1, 5)}),
    2: (["--smoke"], ["rater.pt", "rater.csv"],
        {(1, "descend"): (30, 36), ("os", "replace"): (1, 5)}),
    3: (["--baselines"], ["ratings.npy", "ratings.csv"],
        {(3, "score_chunk"): (2, 5), ("os", "replace"): (1, 6)}),
    5: (SELECTED, ["results.csv", "results-samples.png"],
        {(1, "descend"): (17, 33), ("os", "replace"): (1, 6)})}


@pytest.mark.parametrize("number", [
    1, 2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_continued_is_bit_identical(chain, tmp_path, number):
    """SIGKILL while pairs are prepared, inside a step, and in the middle of saves."""
    flags, results, places = KILLED[number]
    flags = flags + [str(chain / "selected-topk-0.5.csv")] * (number == 5)
    how = {"changes": {(1, "SAVE_EVERY"): 0, (3, "CHUNK"): 64}}
    given = [("made.json",), ("proxy.pt", "proxy.json"), ("proxy.*", "rater.*")][min(number - 1, 2)]
    whole, broken = (copy(chain, tmp_path / name, *given) for name in ("whole", "broken"))
    if number == 1:
        shutil.rmtree(whole / "pairs")
        shutil.rmtree(broken / "pairs")
    assert attempt(whole, number, flags, **how)[0] == 0
    rng, heard = np.random.default_rng(number), []
    for (place, name), between in places.items():
        code, said = attempt(broken, number, flags, **how, strike=(
            place, name, int(rng.integers(*between)), signal.SIGKILL, False))
        assert code == -signal.SIGKILL, said
        heard.append(said)
    code, said = attempt(broken, number, flags, **how)
    assert code == 0 and "continuing from" in "".join([*heard, said]), said
    compare(whole, broken, results)


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


@pytest.mark.parametrize("number,place,count,given", [
    (1, "split_rows", 1, []), (1, "save", 1, []), (1, "read_captions", 1, []),
    (2, "meta_step", 12, ["proxy.*"]), (3, "score_chunk", 3, ["proxy.*", "rater.*"]),
    (3, "write_table", 1, ["proxy.*", "rater.*"]), (3, "report", 1, ["proxy.*", "rater.*"]),
    (5, "tabulate", 1, ["proxy.*"]), (5, "run_arm", 2, ["proxy.*"])])
def test_cut_off_anywhere_continues(stage, chain, tmp_path, monkeypatch, number, place, count,
                                    given):
    """As above, where a kill at random would seldom be; all ends as in the unbroken run."""
    out = copy(chain, tmp_path / "out", *given)
    flags = ([*SELECTED, str(chain / "selected-topk-0.5.csv")] if number == 5 else
             ["--smoke"] * (number < 3)) + ["--out", str(out)]
    if place == "split_rows":
        shutil.rmtree(out / "pairs")
    if place == "score_chunk":
        monkeypatch.setattr(stage(3), "CHUNK", 64)
    monkeypatch.setattr(stage(1), "SAVE_EVERY", 0)
    monkeypatch.setattr(stage(3), "draw_bands", lambda *given: None)          # takes long
    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(stage(number), place, cut_at(getattr(stage(number), place), count))
        launch(stage, number, flags)
    launch(stage, number, flags)
    compare(chain, out, {1: KILLED[1][1], 2: KILLED[2][1]}.get(number, []))
    if number == 3:
        one, two = (np.load(folder / "ratings.npy")["rating"] for folder in (chain, out))
        assert np.allclose(one, two, atol=1e-5)
    if number == 5:
        assert len(without_clock(out / "results.csv")) == 3


# ---- Ctrl-C ----------------------------------------------------------------------------------
@pytest.mark.parametrize("number,flags,strike,threads", [
    (1, ["--data", "TARS", "--batch-size", "4"], (1, "read_task", 1), 2),     # inside a worker
    (1, ["--data", "TARS", "--batch-size", "4"], (1, "append", 2), 2),
    (1, ["--smoke"], (1, "descend", 5), 1),
    (3, [], (3, "show_pictures", 2), 1),
    (4, ["--write-shards", "SHARDS"], ("os", "fsync", 4), 1),
    (5, [*SELECTED, "CSV"], ("os", "replace", 2), 2)])
def test_ctrl_c_is_one_line_and_leaves_no_process(crawl, chain, tmp_path, number, flags, strike,
                                                  threads):
    """It reaches the whole process group, as from a terminal: workers, too, which have no say."""
    (results, _), out = crawl, tmp_path / "out"
    out = copy(results if number == 4 else chain, out, "*.pt", "*.npy", "*.json")
    if number == 1:
        shutil.rmtree(out / "pairs")
    places = {"TARS": results.parent / "фото 红" / "*.tar", "SHARDS": tmp_path / "half",
              "CSV": chain / "selected-topk-0.5.csv"}
    flags = [str(places.get(flag, flag)) for flag in flags]
    code, said = attempt(out, number, flags, strike=(*strike, signal.SIGINT, True),
                         threads=threads)
    assert code == 130, said
    assert "stopped: the same command goes on" in said.splitlines()[-1]
    assert "Traceback" not in said and "Error" not in said and "warning" not in said.lower()
    assert attempt(out, number, flags, threads=threads)[0] == 0


@pytest.mark.parametrize("number,threads", [(1, 2), pytest.param(5, 2, marks=pytest.mark.slow)])
def test_workers_end_when_their_parent_is_killed(crawl, chain, tmp_path, number, threads):
    out = copy(chain, tmp_path / "out", "proxy.*")
    flags = [*SELECTED, str(chain / "selected-topk-0.5.csv")]
    if number == 1:
        shutil.rmtree(out / "pairs")
        flags = ["--data", str(crawl[0].parent / "фото 红" / "*.tar"), "--batch-size", "4"]
    code, _ = attempt(out, number, flags, threads=threads, strike=(
        *((1, "append") if number == 1 else ("os", "replace")), 1, signal.SIGKILL, False))
    assert code == -signal.SIGKILL                         # `attempt` waits for the others


# ---- a full disk, too little memory ----------------------------------------------------------
@pytest.mark.parametrize("number,flags,limit,lacks", [
    (1, ["--smoke"], 10 ** 5, "pairs"), (1, ["--smoke"], 10 ** 6, "proxy.pt"),
    (2, ["--smoke"], 10 ** 6, "rater.pt"), (3, [], 4000, "ratings.npy"),
    (3, [], 9000, "ratings.csv"), (4, [], 1000, "selected-topk-0.5.csv"),
    (5, [*SELECTED, "CSV"], 9000, "results.progress")])
def test_a_full_disk_is_one_line_and_earlier_files_survive(chain, tmp_path, number, flags, limit,
                                                           lacks):
    """A limit to the size of a file, as a disk that is full cannot be had without being root."""
    flags = [flag.replace("CSV", str(chain / "selected-topk-0.5.csv")) for flag in flags]
    out = copy(chain, tmp_path / "out", "*.pt", "*.npy", "*.json", "*.csv")
    if lacks == "pairs":
        shutil.rmtree(out / "pairs")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    code, said = attempt(out, number, flags, limit=limit)
    assert code == 1 and "Traceback" not in said, said
    line = said.splitlines()[-1]
    assert "File too large" in line and lacks in line and "run the same command again" in line
    if lacks.startswith(("proxy", "rater")):
        assert all(file.read_bytes() == data for file, data in before.items())
    assert attempt(out, number, flags)[0] == 0


@pytest.mark.parametrize("greedy", [lambda: torch.empty(10 ** 15), lambda: np.empty(10 ** 15)])
def test_too_little_memory_is_one_line_with_the_cure(stage, tmp_path, greedy):
    args = stage(1).parse_args(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^out of memory: lower --batch-size.*$"):
        stage(1).launch(lambda args, device: greedy(), args)
    with pytest.raises(RuntimeError, match="illegal"):     # other errors keep their traceback
        stage(1).launch(lambda args, device: exec('raise RuntimeError("illegal access")'), args)


@pytest.mark.parametrize("error", [OSError(38, "Function not implemented"), ImportError("no sem")])
def test_without_semaphores_all_goes_on_in_one_process(stage, crawl, chain, tmp_path, monkeypatch,
                                                       capfd, error):
    """As where /dev/shm cannot be written, or is not there."""
    def refuse(*args, **kwargs):
        raise error
    monkeypatch.setattr(multiprocessing.synchronize, "SemLock", refuse)
    out = tmp_path / "out"
    torch.set_num_threads(2)
    launch(stage, 1, ["--data", str(crawl[0].parent / "фото 红" / "*.tar"), "--smoke",
                      "--batch-size", "4", "--out", str(out)])
    for name in ("images.npy", "tokens.npy", "texts.jsonl"):
        assert (out / "pairs" / name).read_bytes() == (crawl[0] / "pairs" / name).read_bytes()
    assert list(stage(5).run_side_by_side(str, [1, 2, 3], 2)) == ["1", "2", "3"]
    assert "Traceback" not in capfd.readouterr().err


def test_workers_share_no_memory(stage, crawl, tmp_path, monkeypatch):
    """64 MB of /dev/shm, as containers have it, are enough: what is read goes through pipes."""
    def refuse(*args):
        raise AssertionError("shared memory")
    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, refuse)
    torch.set_num_threads(2)
    launch(stage, 1, ["--data", str(crawl[0].parent / "фото 红" / "*.tar"), "--smoke",
                      "--batch-size", "4", "--out", str(tmp_path)])


# ---- stale, foreign, damaged, edited ---------------------------------------------------------
def run_again(path):
    """As if the stage that wrote this file had run again, with another result."""
    if path.suffix == ".pt":
        weights = torch.load(path, weights_only=True)
        weights["more"] = torch.zeros(1)
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
    path.write_bytes(path.read_bytes()[:-7])


def replace_by(name):
    def replaced(path):
        for kind in (path.suffix, ".json"):
            shutil.copy((path.parent / name).with_suffix(kind), path.with_suffix(kind))
    return replaced


OWN = ["--selected", "OUT/selected-topk-0.5.csv"]


@pytest.mark.parametrize("changed,how,number,flags,message", [
    ("pairs/made.json", run_again, 2, [], "proxy.pt was .* another .*made.json .*run 01_proxy.py"),
    ("pairs/made.json", run_again, 4, [], "another .*made.json .*run 0[13]"),
    ("proxy.pt", run_again, 3, [], "rater.pt was .* another .*proxy.pt .*run 02_meta_rater.py"),
    ("proxy.pt", run_again, 4, [], "another .*proxy.pt .*run 02_meta_rater.py"),
    ("proxy.pt", run_again, 5, [], "another .*proxy.pt .*run 02_meta_rater.py"),
    ("proxy.pt", run_again, 5, OWN, "another .*proxy.pt .*run 02_meta_rater.py"),
    ("rater.pt", run_again, 4, [], "ratings.npy was .* another .*rater.pt .*run 03_score.py"),
    ("rater.pt", run_again, 4, ["--ratings", "OUT/ratings.csv"], "another .*rater.pt .*run 03_sc"),
    ("rater.pt", run_again, 5, OWN, "another .*rater.pt .*run 03_score.py"),
    ("ratings.npy", run_again, 5, OWN, "selected-.* another .*ratings.npy .*run 04_select.py"),
    ("proxy.pt", damage, 2, [], "proxy.pt and its .json are not as 01_proxy.py wrote them"),
    ("proxy.json", damage, 2, [], "proxy.pt and its .json are not as 01_proxy.py wrote them"),
    ("rater.pt", damage, 3, [], "rater.pt and its .json are not as 02_meta_rater.py wrote them"),
    ("proxy.pt", replace_by("rater.pt"), 2, [], "are not as 01_proxy.py wrote them"),
    ("rater.pt", replace_by("rater-loss.pt"), 3, [], "are not as 02_meta_rater.py wrote them"),
    ("ratings.npy", damage, 4, [], "ratings.npy: "),
    ("ratings.csv", damage, 4, ["--ratings", "OUT/ratings.csv"], "ratings.csv"),
    ("ratings.npy", damage, 5, [], "ratings.npy"),
    ("selected-topk-0.5.csv", damage, 5, OWN, "selected-topk-0.5.csv"),
    ("proxy.pt", os.remove, 2, [], "proxy.pt is missing: run 01_proxy.py"),
    ("rater.pt", os.remove, 3, [], "rater.pt is missing: run 02_meta_rater.py"),
    ("ratings.npy", os.remove, 4, [], "ratings.npy is missing: run 03_score.py"),
    ("selected-topk-0.5.csv", os.remove, 5, OWN, "selected-topk-0.5.csv is missing: 04_select"),
    ("proxy.progress", lambda path: path.touch(), 2, [], "01_proxy.py was interrupted; run it")])
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


@pytest.mark.parametrize("number,function,changed,flags", [
    (1, "descend", None, ["--smoke", "--lr", "0.1"]), (1, "descend", "pairs/made.json", ["--smoke"]),
    (2, "meta_step", "proxy.pt", ["--smoke"]), (3, "score_chunk", "rater.pt", []),
    (5, "run_arm", "selected-topk-0.5.csv", None)])
def test_an_interrupted_run_knows_what_it_read(
        stage, chain, tmp_path, monkeypatch, number, function, changed, flags):
    """Interrupted, then other options or an earlier stage run again: half of either is refused."""
    out = copy(chain, tmp_path / "out", "*.pt", "*.json", "*.npy", "*.csv")
    own = [*SELECTED, str(out / "selected-topk-0.5.csv")] if number == 5 else ["--smoke"]
    own = own * (number != 3) + ["--out", str(out)]
    monkeypatch.setattr(stage(1), "SAVE_EVERY", 0)
    monkeypatch.setattr(stage(3), "CHUNK", 64)
    with monkeypatch.context() as patch, pytest.raises(Cut):
        count = {1: 11, 2: 11}.get(number, 3)
        patch.setattr(stage(number), function, cut_at(getattr(stage(number), function), count))
        launch(stage, number, own)
    moved = tmp_path / "moved"
    if number < 3:                                         # a folder may be moved meanwhile
        shutil.copytree(out, moved)
        launch(stage, number, [*own[:-1], str(moved)])
    if number == 5:                                        # another file of the same rows
        path = out / changed
        path.write_text("\n".join([*path.read_text().splitlines()[:-1], ""]))
        flags = own[:-2]
    elif number > 1:
        run_again(out / changed)
        record = json.loads((out / "rater.json").read_text())
        record["grew_from"]["proxy.pt"] = stage(1).digest(out / "proxy.pt")
        (out / "rater.json").write_text(json.dumps(record))
    elif changed:
        flags = [*flags, "--pairs", "200"]
    name = "lr" if not changed else "pairs" if number == 1 else changed.split("/")[-1]
    with pytest.raises(SystemExit, match=f"begun with other .*{name}.*: .*delete the file") as stop:
        launch(stage, number, [*flags, "--out", str(out)])
    assert "\n" not in stop.value.code


# ---- numbers that are not finite -------------------------------------------------------------
@pytest.mark.parametrize("number,place,name,last", [(1, 1, "descend", 25), (2, 2, "meta_step", 25)])
def test_nan_stops_at_its_step_with_one_line(stage, chain, tmp_path, monkeypatch, number, place,
                                             name, last):
    """The earlier save stays good, and nothing after it is written."""
    out, whole = copy(chain, tmp_path / "out", "proxy.*"), getattr(stage(place), name)
    calls = []

    def poisoned(*args, **kwargs):
        calls.append(0)
        nets = args[0] if number == 2 else {"ref": args[1]}
        if len(calls) == last:
            with torch.no_grad():
                nets["ref"].position[0, 0, 0] = float("inf")
        return whole(*args, **kwargs)
    monkeypatch.setattr(stage(place), name, poisoned)
    monkeypatch.setattr(stage(1), "SAVE_EVERY", 0)
    with pytest.raises(SystemExit, match=r"step 2[56]: .*(nan|inf).* is not finite: lower --lr") \
            as stop:
        launch(stage, number, ["--smoke", "--steps", "40", "--out", str(out)])
    assert "\n" not in stop.value.code and len(calls) == 30
    name = "proxy" if number == 1 else "rater"
    assert not (out / "rater.pt").exists()
    saved = torch.load(out / f"{name}.progress", weights_only=True)
    assert saved["step"] == len(saved["log"]) == 20
    assert all(v.isfinite().all() for v in saved["weights"][{"proxy": "net", "rater": "ref"}[
        name]].values())


def test_nan_in_one_of_the_arms_is_one_line_too(chain, tmp_path):
    out = copy(chain, tmp_path / "out", "proxy.*")
    code, said = attempt(out, 5, [*SELECTED, str(chain / "selected-topk-0.5.csv"), "--lr", "1e30"],
                         threads=2)
    assert code == 1 and "is not finite: lower --lr" in said.splitlines()[-1], said
    assert "Traceback" not in said


# ---- a narrow encoding -----------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_outside_the_terminals_letters(stage, crawl, tmp_path, encoding):
    """What the terminal lacks is ? there, in all five stages (01 to 03: `crawl`); files are whole."""
    (out, files), shards = crawl, tmp_path / "половина"
    out = copy(out, tmp_path / "out", "*.pt", "*.json", "*.npy", "*.csv")
    with narrow(encoding) as screen:
        launch(stage, 4, ["--out", str(out), "--write-shards", str(shards)])
        launch(stage, 5, ["--smoke", "--seeds", "1", "--batch-size", "4", "--out", str(out),
                          "--selected", str(out / "selected-topk-0.5.csv")])
    assert "wrote" in screen.buffer.getvalue().decode(encoding)
    with tarfile.open(shards / "000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    assert members and all(files[name] == data for name, data in members.items())
    keys = [row["key"] for row in without_clock(out / "selected-topk-0.5.csv")]
    assert keys == list(dict.fromkeys(name.split(".")[0] for name in members))
    with contextlib.redirect_stdout(io.StringIO()) as text:                   # as in a notebook
        stage(1).launch(lambda args, device: stage(1).print0("±"),
                        stage(1).parse_args(["--out", str(out)]))
    assert text.getvalue() == "±\n"
