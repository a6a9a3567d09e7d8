"""Stage 4: eq. 11 against its formula, the order of ties, and the files that it reads."""
import itertools
import shutil

import numpy as np
import pytest
import torch

from common import collect
from conftest import launch


# ---- eq. 11 and its rivals -------------------------------------------------------------------
def test_density_is_eq_11(stage):
    w = np.array([0.1, 0.25, 0.5, 0.8])
    p = np.exp(stage(4).log_density(w, 0.25, 0.5, 0.2))
    expected = [0] + [np.exp(-(v - 0.5) ** 2 / (2 * 0.2 ** 2)) for v in w[1:]]
    assert p == pytest.approx(expected)


def test_draw_without_replacement_follows_successive_draws(stage):
    """Inclusion of each of 5 pairs in draws of 2, against the sum over all ordered pairs."""
    p = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    exact = np.zeros(5)
    for i, j in itertools.permutations(range(5), 2):
        exact[[i, j]] += p[i] * p[j] / (1 - p[i])
    rng, seen = np.random.default_rng(0), np.zeros(5)
    for _ in range(20000):
        seen[stage(4).draw(log_p, 2, rng)] += 1
    assert seen / 20000 == pytest.approx(exact, abs=0.015)
    assert seen[4] == 0


@pytest.mark.parametrize("method", ["shift-gsample", "gsample", "topk", "block", "random"])
@pytest.mark.parametrize("keep, count", [(0.5, 500), (333, 333)])
def test_rows_and_places_in_one_order_to_an_exact_count(stage, method, keep, count):
    rating = np.random.default_rng(1).standard_normal(1000)
    rows, w = stage(4).select(rating, method, keep, seed=2)
    assert len(rows) == count and (np.diff(rows) > 0).all()            # ascending: none twice
    assert (w == np.argsort(np.argsort(-rating))[rows] / 1000).all()   # each row's own place
    if method in ("shift-gsample", "block"):
        assert w.min() >= 0.25                             # the dropped head is never drawn
        with pytest.raises(SystemExit, match="leaves 750: change --keep or --drop"):
            stage(4).select(rating, method, 1)
    if method in ("topk", "block"):
        assert np.ptp(w) * 1000 == pytest.approx(count - 1) and w.min() in (0, 0.25)
    again, other = (stage(4).select(rating, method, keep, seed=seed)[0] for seed in (2, 3))
    assert (again == rows).all() and (other == rows).all() == (method in ("topk", "block"))


def test_far_tail_does_not_underflow(stage):
    """Half of the pairs with a bell of 0.1 points: most of them at log p below -1e6."""
    rows, _ = stage(4).select(np.arange(1000.0), "gsample", 0.5, mean=0.0, std=0.0001, seed=0)
    assert rows.tolist() == list(range(500, 1000))         # the nearest 500, to the exact pair


@pytest.mark.parametrize("method", ["topk", "block"])
def test_ties_are_drawn_by_seed(stage, method):
    """Those above the cut are all kept; of a thousand equal ones each is as likely."""
    rating = np.repeat([2.0, 1.0, 0.0], [100, 800, 100])
    drop = 0.0 if method == "topk" else 0.05
    chosen = [stage(4).select(rating, method, 0.5, drop, seed=seed)[0] for seed in range(200)]
    head = 100 if method == "topk" else 50
    assert all((rows < 100).sum() == head and rows.max() < 900 for rows in chosen)
    kept = np.bincount(np.concatenate(chosen), minlength=1000) / 200
    assert abs(kept[100:900] - (500 - head) / 800).max() < 0.2
    assert abs(kept[100:500].mean() - kept[500:900].mean()) < 0.02


# ---- files: what is read ---------------------------------------------------------------------
def write_pairs(stage, out, n=40, planted=()):
    """OUT/pairs of n pairs with keys key00, key01, ..., as a script writes them for --data own."""
    pairs = collect((f"key{k:02d}", np.full((3, 4, 4), k, np.uint8), "a word",
                     "planted-noise" if k in planted else "") for k in range(n))
    (out / "pairs").mkdir(parents=True)
    for name, array in (("images", pairs.images), ("tokens", pairs.tokens),
                        ("entries", pairs.entries), ("train", pairs.rows)):
        np.save(out / f"pairs/{name}.npy", array)
    (out / "pairs/texts.jsonl").write_bytes(pairs.texts)
    (out / "pairs/made.json").write_text('{"data": "own"}')
    return stage(1).open_pairs(out / "pairs")


def choose(stage, out, rating, *flags, suffix="csv"):
    """Rows that stage 4 keeps by these numbers, an array or the text of a CSV, in a file r."""
    file = out / f"r.{suffix}"
    if suffix == "npy":
        np.save(file, rating)
    elif not isinstance(rating, str):
        rating = "row,rating\n" + "".join(f"{k},{v!r}\n" for k, v in enumerate(rating.tolist()))
    if suffix == "csv":
        file.write_text(rating)
    launch(stage, 4, ["--out", str(out), "--ratings", str(file), *flags])
    new, = out.glob("selected-*.csv")
    lines = [line.split(",") for line in new.read_text().split()]
    assert lines[0] == ["row", "key"] and all(key == f"key{int(row):02d}" for row, key in lines[1:])
    new.unlink()
    return [int(row) for row, _ in lines[1:]]


@pytest.mark.parametrize("suffix", ["npy", "csv"])
@pytest.mark.parametrize("rating", [
    1 - np.arange(40)[::-1] * 1e-13, 1.7e9 + np.arange(40) // 2, np.arange(-20, 20) * 1e300,
    np.arange(40).astype(np.float16), np.arange(40, dtype=np.uint8)],
    ids=["probabilities", "unix times", "huge", "half", "bytes"])
def test_own_numbers_rank_as_they_are(stage, tmp_path, capsys, rating, suffix):
    write_pairs(stage, tmp_path)
    assert choose(stage, tmp_path, rating, "--keep", "10", suffix=suffix) == list(range(30, 40))
    said = capsys.readouterr().out
    assert "carries no record" in said and "known of rating is that high is good" in said


def test_csv_of_any_program_in_any_order(stage, tmp_path):
    """A byte order mark, quotes, other columns, blank lines; rows decide, not the lines' order."""
    write_pairs(stage, tmp_path, 4)
    text = '\ufeffkey, rating ,note,row\n"key02",5,"a ""b"", c",2\n\nkey00,1,#,0\n'
    assert choose(stage, tmp_path, text + 'key03,2,,3\nkey01,4,"é",1\n', "--keep", "2") == [1, 2]


ROWS = [f"{k},{k}" for k in range(40)]
BAD = {                    # ratings of 40 pairs that are refused in one line
    "another length": (ROWS[:39], "39 ratings, and 40 pairs were prepared"),
    "out of range": ([*ROWS[:39], "40,1"], "each row from 0 to 39 needs one"),
    "twice": ([*ROWS[:39], "38,1"], "each row from 0 to 39"),
    "half row": ([*ROWS[:39], "38.5,1"], "each row"),
    "nan": (["0,nan", *ROWS[1:]], "rating is no number"),
    "inf": ([*ROWS[:39], "39,-inf"], "rating is no number"),
    "short line": (["0", *ROWS[1:]], "r.csv")}
ARRAYS = {"text.npy": b"1\n2\n", "few.npy": np.ones(39), "words.npy": np.array(["a"] * 40),
          "square.npy": np.ones((40, 2)), "nan.npy": np.full(40, np.nan),
          "objects.npy": np.array([None] * 40), "other.npy": np.ones(40, [("gain", "f4")]),
          "empty.csv": b"", "binary.csv": b"PAR1\x15\x04\xff\x00", "missing.csv": None}


@pytest.mark.parametrize("name", [*BAD, *ARRAYS])
def test_ratings_that_do_not_fit_the_pairs_are_refused(stage, tmp_path, name):
    write_pairs(stage, tmp_path)
    lines, message = BAD.get(name, ([], name))
    file, held = tmp_path / (name if name in ARRAYS else "r.csv"), ARRAYS.get(name)
    if name in BAD:
        file.write_text("\n".join(["row,rating", *lines]) + "\n")
    elif isinstance(held, bytes):
        file.write_bytes(held)
    elif held is not None:
        np.save(file, held)
    with pytest.raises(SystemExit, match=message) as stop:
        launch(stage, 4, ["--out", str(tmp_path), "--ratings", str(file)])
    assert "\n" not in stop.value.code and not list(tmp_path.glob("selected*"))


def test_ratings_of_another_corpus_are_told_by_their_keys(stage, tmp_path):
    write_pairs(stage, tmp_path)
    fit, apart = ("key,row,rating\n" + "".join(
        f"key{(k + shift) % 40:02d},{k},1\n" for k in range(40)) for shift in (0, 1))
    assert len(choose(stage, tmp_path, fit)) == 20
    late = fit.replace("key39", "key40").replace(",", ", ").replace(", 39,", ", 39.0,")
    for text, key in ((apart, "key01"), (late, "key40")):  # as pandas and people write them
        with pytest.raises(SystemExit, match=f"of another corpus: {key} is not the key of the"):
            choose(stage, tmp_path, text)


def test_a_missing_column_is_said_before_the_numbers_are_read(stage, tmp_path, monkeypatch):
    write_pairs(stage, tmp_path)
    np.save(tmp_path / "r.npy", np.arange(40.0))
    (tmp_path / "r.csv").write_text("row,rating\n0,1\n")
    monkeypatch.setattr(stage(4).np, "loadtxt", None)
    for name in ("r.npy", "r.csv"):
        with pytest.raises(SystemExit, match="no column contrast among .*03_score.py --baselines"):
            launch(stage, 4, ["--out", str(tmp_path), "--ratings", str(tmp_path / name),
                              "--rank-by", "rating,contrast"])


# ---- what is kept, and what is said of it ----------------------------------------------------
@pytest.mark.parametrize("rating, flags, said", [
    (np.ones(40), "", "40 pairs have the lowest rating kept: 20 were drawn"),
    (np.ones(40), "--method shift-gsample --keep 9", "40 pairs have the lowest rating"),
    (np.repeat([2.0, 1, 0], [5, 30, 5]), "--keep 12", "30 pairs have the lowest .*: 7 were"),
    (np.repeat([2.0, 1, 0], [5, 7, 28]), "--keep 12", ""), (np.arange(40), "", "")])
def test_ties_at_the_cut_are_said_with_their_number(stage, tmp_path, capsys, rating, flags, said):
    write_pairs(stage, tmp_path)
    rows = [choose(stage, tmp_path, rating, *flags.split(), "--seed", seed) for seed in "0012"]
    assert rows[0] == rows[1] and (len(set(map(tuple, rows))) > 1) == (said != "")
    heard = capsys.readouterr().out
    assert ("were drawn" in heard) == (said != "")
    assert not said or stage(1).re.search(said, heard)


def test_the_contact_sheet_shows_both_sides_of_the_cut(stage, tmp_path, monkeypatch):
    """Best rated first, by key and caption; of pairs that are all kept, one side."""
    write_pairs(stage, tmp_path)
    pairs, sheets = stage(1).open_pairs(tmp_path / "pairs"), []
    monkeypatch.setattr(stage(4), "SHOWN", 3)
    monkeypatch.setattr(stage(3), "draw_rows", lambda path, rows: sheets.append(rows))
    rating = np.random.default_rng(0).permutation(40) * 1.0
    best = np.argsort(-rating)
    for kept in (np.sort(best[:20]), np.arange(40)):
        stage(4).draw_contact_sheet(tmp_path / "s.png", pairs, rating, kept)
    ends = {"kept,\nhighest 3": best[:3], "kept,\nlowest 3": best[17:20],
            "left out,\nhighest 3": best[20:23], "left out,\nlowest 3": best[-3:]}
    assert list(sheets[0]) == list(ends) and len(sheets[1]) == 2
    for name, rows in ends.items():
        images, titles = sheets[0][name]
        assert torch.equal(images, pairs.batch(rows)[0])
        assert titles == [f"{key} {caption}" for key, caption in zip(
            pairs.read("key", rows), pairs.read("caption", rows))]


def test_planted_pairs_are_in_no_selection_and_counted(stage, tmp_path, capsys):
    """Whatever rates them, by every rule."""
    planted = range(3, 40, 4)
    write_pairs(stage, tmp_path, planted=planted)
    for method in stage(4).METHODS:
        rows = choose(stage, tmp_path, np.arange(40.0), "--method", method, "--keep", "9")
        said = capsys.readouterr().out
        assert len(rows) == 9 and not set(rows) & set(planted)
        assert "9 of 30 pairs, none of the 10 with planted dirt" in said


EQ6 = "that validation asked for the pair (eq. 6)"
EQ9 = "a high rating means low loss (eq. 9)"


@pytest.mark.parametrize("flags,file,text", [
    ("", "topk", f"--method topk; topk suits, as a high rating means {EQ6}"),
    ("--ratings OUT/ratings-loss.csv", "loss-shift-gsample",
     f"--method shift-gsample; shift-gsample suits, as {EQ9}"),
    ("--rank-by ref_loss", "by-ref_loss-shift-gsample", EQ9),
    ("--rank-by rating,gain", "by-rating-gain-topk", "known of rating,gain is that high is good"),
    ("--method topk --ratings OUT/ratings-loss.npy", "loss-topk",
     f"--method topk; shift-gsample suits, as {EQ9}"),
    ("--seed 1 --method block --drop 0.1", "block-0.4-drop-0.1-seed-1", "block; topk suits")])
def test_the_default_rule_follows_the_record(stage, chain, tmp_path, capsys, flags, file, text):
    """And the name tells the ratings and every option that is not usual."""
    out = shutil.copytree(chain, tmp_path / "out")
    launch(stage, 4, ["--out", str(out), "--keep", "0.4", *flags.replace("OUT", str(out)).split()])
    heard = capsys.readouterr().out
    assert text in heard.splitlines()[0] and "carries no record" not in heard
    path = out / (f"selected-{file}" + "-0.4" * ("0.4" not in file) + ".csv")
    known = stage(1).check(path)
    assert known["pairs"] == "pairs" and len(known["grew_from"]) == 2
    assert len(stage(4).read_rows(path, stage(1).open_pairs(out / "pairs"))) == 102


@pytest.mark.parametrize("flags", ["--mean 50", "--std 15", "--drop 25", "--keep 0", "--keep 1.5"])
def test_per_cent_are_refused(stage, flags):
    with pytest.raises(SystemExit, match="50 per cent is 0.5"):
        stage(4).parse_args(flags.split())


def test_a_folder_that_holds_tars_is_not_written_to(stage, tmp_path):
    write_pairs(stage, tmp_path)
    np.save(tmp_path / "ratings.npy", np.arange(40.0))
    (tmp_path / "000000.tar").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="holds tars: remove or rename them"):
        launch(stage, 4, ["--out", str(tmp_path), "--write-shards", str(tmp_path)])
    assert (tmp_path / "000000.tar").read_bytes() == b"mine"
