"""The five stages as a user runs them: tiny, on toy pairs, on files, on shuffled strata."""
import json
import re

import numpy as np
import pytest

from conftest import launch, write_pictures
from test_faults import SELECTED, without_clock

SUFFIXES = {"rater": ".pt .json .csv", "ratings": ".npy .csv .json .png -bands.png",
            "results": ".csv .md -samples.png", "proxy": ".pt .json .csv",
            "selected-topk-0.5": ".csv .json .png", "selected-shift-gsample-0.5": ".csv .json .png"}


def test_the_chain_writes_what_its_docstrings_promise(stage, chain):
    names = {f"{stem}{'-loss' * loss}{suffix}" for stem, suffixes in SUFFIXES.items()
             for suffix in suffixes.split() for loss in (False, True)
             if not loss or stem.startswith("rat")}
    made = ["images", "tokens", "entries", "train", "val", "test"]
    names |= {f"pairs/{name}" for name in ("made.json", "texts.jsonl",
                                           *(f"{name}.npy" for name in made))}
    found = {str(file.relative_to(chain)) for file in chain.rglob("*") if file.is_file()}
    assert found == names and all((chain / name).stat().st_size for name in names)
    for name in ("proxy", "rater", "ratings", "selected-topk-0.5"):
        record = json.loads((chain / f"{name}.json").read_text())
        assert {"written_by", "digest", "grew_from"} <= record.keys()
    record = json.loads((chain / "ratings-loss.json").read_text())
    assert record["written_by"] == "03_score.py --signal loss"      # what others say to run again
    rows = without_clock(chain / "results.csv")
    assert len(rows) == 10 and {row["seed"] for row in rows} == {"0", "1"}
    assert {row["arm"] for row in rows} == {arm.name for arm in stage(5).ARMS}
    assert all(np.isfinite(float(row[name])) for row in rows for name in stage(5).METRICS)


def test_strata_decide_nothing(stage, chain, tmp_path, monkeypatch):
    """With the strata shuffled, weights, ratings and selections stay as they are."""
    draw = stage(1).draw_toy

    def shuffled(*args):
        pairs = list(draw(*args))
        for pair, other in zip(pairs, np.random.default_rng(0).permutation(len(pairs))):
            yield *pair[:3], pairs[other][3]
    monkeypatch.setattr(stage(1), "draw_toy", shuffled)
    for number, flags in ((1, ["--smoke"]), (2, ["--smoke"]), (3, ["--baselines"]), (4, [])):
        launch(stage, number, [*flags, "--out", str(tmp_path)])
    one, two = (np.load(folder / "ratings.npy") for folder in (chain, tmp_path))
    assert (one["stratum"] != two["stratum"]).any()
    for column in one.dtype.names[:-1]:
        assert np.allclose(one[column], two[column], atol=1e-5), column
    name = "selected-topk-0.5.csv"
    assert len({row["key"] for row in without_clock(chain / name)}
               ^ {row["key"] for row in without_clock(tmp_path / name)}) <= 2    # ties at the edge


def test_own_pictures_without_strata_or_validation(stage, tmp_path, monkeypatch, capsys):
    """A folder goes through all five stages, under a relative path and from another folder each
    time; 03 also rates the half that 04 wrote, which 05 does not take for the corpus."""
    write_pictures(stage, tmp_path / "pictures", 400)
    out = tmp_path / "out"
    for number, flags in (
            (1, ["--data", "pictures", "--smoke"]), (2, ["--smoke"]), (3, []),
            (4, ["--write-shards", "half"]), (5, [*SELECTED, "out/selected-topk-0.5.csv"]),
            (3, ["--data", "half"]), (4, ["--ratings", "out/ratings-of-half.npy"])):
        (tmp_path / str(number)).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path if flags else tmp_path / str(number))
        launch(stage, number, [*flags, "--out", str(out)])
    said = capsys.readouterr().out
    assert "more of the same" in said and "AUC" not in said
    assert len(np.load(out / "ratings.npy")) == int(said.split("\npairs: ")[1].split()[0]) < 390
    written, chosen = ([row["key"] for row in without_clock(out / f"{name}.csv")]
                       for name in ("ratings-of-half", "selected-topk-0.5"))
    assert written == chosen
    with pytest.raises(SystemExit, match="chooses among other pairs than .*/pairs: rate those"):
        launch(stage, 5, [*SELECTED, f"{out}/selected-of-half-topk-0.5.csv", "--out", str(out)])


@pytest.mark.parametrize("command,message", [
    ("02_meta_rater.py --out nowhere-yet", "run 01_proxy.py"),
    ("04_select.py --out nowhere-yet", "run 03_score.py"),
    ("05_train_eval.py --out CHAIN --selected no.csv", "No such file or directory: .no.csv."),
    ("01_proxy.py --data nothing-here", "no such file or folder"),
    ("01_proxy.py --val here", "--data toy takes no --val"),
    ("01_proxy.py --smoke --batch-size 100", "64 readable pairs, less than 100: add pairs, or"),
    ("01_proxy.py --steps 0", "--steps 0: a number from 1 up is needed"),
    ("02_meta_rater.py --batch-size 80 --out CHAIN", "must be a multiple of 32 or, in one process"),
    ("04_select.py --write-shards x --out CHAIN", "copies pairs out of files, not those of toy"),
    ("05_train_eval.py --batch-size 256 --out CHAIN", "128 pairs are fewer than --batch-size"),
    ("01_proxy.py --smoke --out /dev/null/x", "mend that and run the command again")])
def test_errors_are_one_line_with_the_cure(stage, chain, command, message, tmp_path, capsys):
    command = command.replace("nowhere-yet", str(tmp_path / "x")).replace("CHAIN", str(chain))
    file, *flags = command.split()
    with pytest.raises(SystemExit) as stop:
        launch(stage, int(file[1]), flags + ["--out", str(tmp_path)] * ("--out" not in flags))
    if stop.value.code == 2:                               # argparse has told the usage, too
        assert message in capsys.readouterr().err.splitlines()[-1]
    else:
        assert re.search(message, stop.value.code) and "\n" not in stop.value.code
