"""Stage 4: eq. 11 against its formula, and the files that it reads."""
import csv
import itertools
import shutil

import numpy as np
import pytest

from conftest import launch


def test_rows_are_sorted_stably(stage):
    rating = np.random.default_rng(0).standard_normal(5000).round(2)        # negative, ties, -0.0
    rating[:9] = [0.0, -0.0, 0.0, -1e-30, 1e-30, 3e38, -3e38, 1e-42, -1e-42]
    expected = np.argsort(-rating.astype(np.float32), kind="stable")
    assert (stage(4).sort_rows(rating) == expected).all()
    assert stage(4).sort_rows(np.array([1.0, 3.0, 2.0, 0.0])).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("rating", [
    1 - np.random.default_rng(0).random(5000) * 1e-9,                        # probabilities near 1
    1.7e9 + np.random.default_rng(1).integers(0, 500, 5000),                 # unix times, with ties
    np.random.default_rng(2).integers(-5, 5, 5000) * 1e300,                  # infinite in float32
    np.random.default_rng(3).integers(0, 99, 5000) + 2 ** 60,                # beyond float64, too
    np.random.default_rng(4).standard_normal(5000).astype(np.float16)])
def test_the_order_is_that_of_a_stable_argsort(stage, rating):
    assert (stage(4).sort_rows(rating) == np.argsort(-rating, kind="stable")).all()


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
@pytest.mark.parametrize("keep,count", [(0.5, 500), (0.2, 200), (333, 333)])
def test_exact_count_no_duplicates(stage, method, keep, count):
    rating = np.random.default_rng(1).standard_normal(1000)
    rows, w = stage(4).select(rating, method, keep, seed=2)
    assert len(rows) == count == len(set(rows)) and rows.min() >= 0 and rows.max() < 1000
    assert (np.diff(rows) > 0).all()
    assert sorted(w) == sorted(np.argsort(np.argsort(-rating))[rows] / 1000)
    if method in ("shift-gsample", "block"):
        assert w.min() >= 0.25                         # the dropped head is never drawn
    if method == "topk":
        assert w.max() < count / 1000


def test_far_tail_does_not_underflow(stage):
    """Half of the pairs with a bell of 0.1 points: most of them at log p below -1e6."""
    rows, _ = stage(4).select(np.arange(1000.0), "gsample", 0.5, mean=0.0, std=0.0001, seed=0)
    assert len(set(rows)) == 500 and rows.min() == 500          # the nearest 500, to the exact pair


def test_too_many_after_the_drop_is_an_error(stage):
    with pytest.raises(ValueError, match="leaves 75"):
        stage(4).select(np.arange(100.0), "shift-gsample", 0.9)


def write(path, rows):
    path.write_text("key,rating,loss,difference,stratum\n" + "\n".join(rows) + "\n")


def test_rankings_and_key_files(stage, tmp_path):
    write(tmp_path / "ratings.csv", ['"a,1",3,1,9,x', "b,2,2,8,x", "c,1,3,7,y", "d,0,4,6,y"])
    for rank_by, first in (("rating", "a,1"), ("loss", "a,1"), ("difference", "d")):
        launch(stage, 4, ["--out", str(tmp_path), "--keep", "0.25", "--method", "topk",
                          "--rank-by", rank_by])
        by = "" if rank_by == "rating" else f"-by-{rank_by}"
        lines = (tmp_path / f"selected{by}-topk-0.25.csv").read_text().split("\n")
        assert lines[1].strip('"\r') == first
    np.save(tmp_path / "r.npy", np.arange(10.0))
    launch(stage, 4, ["--out", str(tmp_path), "--ratings", f"{tmp_path}/r.npy", "--keep", "2"])
    assert np.load(tmp_path / "selected-r-topk-2.npy").tolist() == [8, 9]


def test_the_name_tells_all_options_that_are_not_usual(stage, tmp_path):
    write(tmp_path / "ratings.csv", [f"{k},{k},1,1,x" for k in range(40)])
    for flags in ([], ["--seed", "1"], ["--mean", "0.4"], ["--std", "0.2"], ["--drop", "0.1"],
                  ["--keep", "12"], ["--keep", "12", "--method", "block", "--drop", "0"]):
        launch(stage, 4, ["--out", str(tmp_path), *flags])
    assert len(list(tmp_path.glob("selected-*.csv"))) == 7
    assert (tmp_path / "selected-block-12-drop-0.csv").exists()


@pytest.mark.parametrize("flags", [
    "--mean 50", "--std 15", "--std 0", "--drop 25", "--mean nan", "--std nan", "--drop -1",
    "--keep nan", "--keep inf", "--keep 0", "--keep 1.5", "--keep -0.5", "--seed -1", "--keep 50%"])
def test_per_cent_and_other_strange_shares_are_refused(stage, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        stage(4).parse_args(flags.split())
    assert stop.value.code == 2
    assert "50 per cent is 0.5" in capsys.readouterr().err or "%" in flags


@pytest.mark.parametrize("keep,cure", [(0.001, "raise --keep"), (0.9, "lower --keep or --drop")])
def test_a_share_that_cannot_be_kept_names_its_cure(stage, tmp_path, keep, cure):
    write(tmp_path / "ratings.csv", [f"{k},{k},1,1,x" for k in range(40)])
    with pytest.raises(SystemExit, match=cure):
        launch(stage, 4, ["--out", str(tmp_path), "--keep", str(keep), "--method", "block"])


EQ6 = "that validation asked for the pair (eq. 6)"
EQ9 = "a high rating means low loss (eq. 9)"


@pytest.mark.parametrize("flags,file,said", [
    ("", "topk", f"--method topk, the default here: a high rating means {EQ6}"),
    ("--ratings OUT/ratings.npy", "topk", EQ6),
    ("--ratings OUT/ratings-loss.csv", "loss-shift-gsample",
     f"--method shift-gsample, the default here: {EQ9}"),
    ("--rank-by instance --ratings OUT/ratings-loss.csv", "loss-by-instance-shift-gsample", EQ9),
    ("--rank-by loss", "by-loss-shift-gsample", EQ9),
    ("--rank-by difference", "by-difference-topk", EQ6),
    ("--rank-by gain", "by-gain-topk", "known of gain is that high is good"),
    ("--rank-by rating,gain", "by-rating-gain-topk", "known of rating,gain is that high is good"),
    ("--method gsample", "gsample", f"gsample, as asked; topk would suit: a high rating means {EQ6}"),
    ("--method topk", "topk", f"topk, as asked: a high rating means {EQ6}"),
    ("--method topk --ratings OUT/ratings-loss.csv", "loss-topk",
     f"topk, as asked; shift-gsample would suit: {EQ9}")])
def test_the_default_rule_follows_from_what_the_ratings_say_of_themselves(
        stage, chain, tmp_path, capsys, flags, file, said):
    for name in chain.glob("ratings*.*"):
        shutil.copy(name, tmp_path)
    flags = flags.replace("OUT", str(tmp_path)).split()
    launch(stage, 4, ["--out", str(tmp_path), "--keep", "0.4", *flags])
    assert said in capsys.readouterr().out.splitlines()[0]
    assert (tmp_path / f"selected-{file}-0.4.csv").exists()


def test_a_keep_that_may_be_meant_as_per_cent_is_said_to_be_a_number(stage, tmp_path, capsys):
    write(tmp_path / "ratings.csv", [f"{k},{k},1,1,x" for k in range(200)])
    for keep, said in (("50", True), ("0.5", False), ("150", False)):
        launch(stage, 4, ["--out", str(tmp_path), "--keep", keep])
        assert ("is a number of pairs" in capsys.readouterr().out) == said


def test_columns_of_baselines_are_said_to_be_missing(stage, tmp_path):
    write(tmp_path / "ratings.csv", ["a,1,1,1,x", "b,2,1,1,x"])
    with pytest.raises(SystemExit, match="contrast are needed.*03_score.py --baselines"):
        launch(stage, 4, ["--out", str(tmp_path), "--rank-by", "rating,contrast"])


def test_ratings_of_another_origin_are_taken_as_high_is_good(stage, tmp_path, capsys):
    write(tmp_path / "ratings.csv", [f"{k},{k},1,1,x" for k in range(20)])
    launch(stage, 4, ["--out", str(tmp_path), "--keep", "2"])
    assert "all that is known of rating is that high is good" in capsys.readouterr().out
    assert (tmp_path / "selected-topk-2.csv").read_text().split() == ["key", "18", "19"]


def test_a_npy_is_one_column_and_no_other_ranking(stage, tmp_path):
    np.save(tmp_path / "r.npy", np.arange(10.0))
    for rank_by in ("contrast", "loss", "rating,loss"):
        with pytest.raises(SystemExit, match="r.npy is one column: --rank-by .* needs a CSV"):
            launch(stage, 4, ["--out", str(tmp_path), "--ratings", f"{tmp_path}/r.npy",
                              "--rank-by", rank_by])


def test_planted_pairs_are_found_in_a_table_saved_anew(stage, tmp_path):
    """By a program that quotes all, or puts the stratum first."""
    with open(tmp_path / "r.csv", "w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerows([("stratum", "key", "rating"), ("planted-noise", "a", 1), ("x", "b", 2)])
    assert stage(4).find_planted(tmp_path / "r.csv", 2).tolist() == [True, False]


def test_ratings_moved_without_their_npy_keep_their_record(stage, chain, tmp_path, capsys):
    for name in ("ratings-loss.csv", "ratings-loss.json"):
        shutil.copy(chain / name, tmp_path)
    launch(stage, 4, ["--out", str(tmp_path), "--ratings", f"{tmp_path}/ratings-loss.csv"])
    assert "--method shift-gsample, the default here" in capsys.readouterr().out
    shutil.copy(chain / "ratings-loss.npy", tmp_path)      # whose keys are in the CSV
    (tmp_path / "ratings-loss.csv").write_text("key,rating\na,1\n")
    launch(stage, 4, ["--out", str(tmp_path), "--ratings", f"{tmp_path}/ratings-loss.npy"])
    assert "carries no record" in capsys.readouterr().out


def test_a_folder_for_the_selection_is_made(stage, tmp_path):
    """Of ratings that lie elsewhere; where it cannot be made, one line."""
    write(tmp_path / "r.csv", ["a,1,1,1,x", "b,2,1,1,x"])
    flags = ["--ratings", str(tmp_path / "r.csv"), "--out"]
    launch(stage, 4, [*flags, str(tmp_path / "new/out")])
    assert (tmp_path / "new/out/selected-r-topk-0.5.csv").read_text().split() == ["key", "b"]
    with pytest.raises(SystemExit, match="cannot be written"):
        launch(stage, 4, [*flags, str(tmp_path / "r.csv")])


def test_new_shards_overwrite_none(stage, tmp_path):
    write(tmp_path / "ratings.csv", ["a,1,1,1,x", "b,2,1,1,x"])
    (tmp_path / "000000.tar").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="holds tars already.*name another folder"):
        launch(stage, 4, ["--out", str(tmp_path), "--write-shards", str(tmp_path)])
    assert (tmp_path / "000000.tar").read_bytes() == b"mine"
    assert not list(tmp_path.glob("selected*"))


@pytest.mark.parametrize("rows,message", [
    (["b,1,1,1,x", "a,nan,1,1,x"], "not a number in row 2"),
    (["a,1,1,1,x", "b,2,1,1,x", "a,3,1,1,x"], "key a stands there more than once, again in row 3"),
    (["a,1,1,1,x", "b,low,1,1,x"], "low"), (["a"], "ratings.csv"), ([], "no line follows")])
def test_bad_ratings_are_refused_by_name(stage, tmp_path, rows, message):
    write(tmp_path / "ratings.csv", rows)
    with pytest.raises(SystemExit, match=message) as stop:
        launch(stage, 4, ["--out", str(tmp_path)])
    assert "\n" not in str(stop.value)


GOOD = "key,rating\na,1\nb,3\nc,2\n"
ARRAYS = {"folder.npy": None, "empty.npy": b"", "text.npy": b"1\n2\n", "short.npy": b"\x93NUMPY",
          "table.csv": GOOD.encode("utf-16"), "latin.csv": "key,rating\n\xe9,1\n".encode("cp1252"),
          "empty.csv": b"", "binary.csv": b"PAR1\x15\x04\xff\x00", "folder.csv": None,
          "headless.csv": b"a,1\nb,2\n", "words.npy": np.array(["a", "b"]),
          "square.npy": np.ones((3, 3)), "complex.npy": np.ones(3, complex),
          "none.npy": np.array([]), "single.npy": np.array(1.0), "mask.npy": np.ones(3, bool)}


@pytest.mark.parametrize("name", ARRAYS)
def test_files_of_another_kind_are_one_line(stage, tmp_path, name):
    file, held = tmp_path / name, ARRAYS[name]
    if held is None:
        file.mkdir()
    elif isinstance(held, bytes):
        file.write_bytes(held)
    else:
        np.save(file, held)
    with pytest.raises(SystemExit) as stop:
        launch(stage, 4, ["--out", str(tmp_path), "--ratings", str(file)])
    assert name in stop.value.code and "\n" not in stop.value.code


def test_npz_under_another_name_and_a_missing_file(stage, tmp_path):
    np.savez(tmp_path / "r.npz", np.ones(3))
    (tmp_path / "r.npz").rename(tmp_path / "r.npy")
    for name in ("r.npy", "missing.npy", "missing.csv"):
        with pytest.raises(SystemExit, match=name):
            launch(stage, 4, ["--out", str(tmp_path), "--ratings", str(tmp_path / name)])


def test_marks_blank_lines_and_quotes_are_read_as_meant(stage, tmp_path, capsys):
    text = '\ufeffkey,rank,rating\r\n"a,""x",1,1\r\n\r\nb c,2,3\r\n"d""e",3,2\r\n'
    (tmp_path / "ratings.csv").write_bytes(text.encode())
    launch(stage, 4, ["--out", str(tmp_path), "--method", "topk", "--keep", "2"])
    with open(tmp_path / "selected-topk-2.csv", newline="") as file:
        assert [line[0] for line in csv.reader(file)] == ["key", "b c", 'd"e']
    assert "carries no record" in capsys.readouterr().out


def test_row_numbers_and_masks(stage, tmp_path):
    """What a selection may hold for a corpus of 5 pairs."""
    def rows(*values, kind=int):
        np.save(tmp_path / "s.npy", np.array(values, kind))
        return stage(4).read_rows(tmp_path / "s.npy", 5).tolist()
    assert rows(4, 0) == [4, 0] and rows(1, 2, kind=np.uint8) == [1, 2]
    assert rows(0, 1, 0, 0, 1, kind=bool) == [1, 4]
    for values, kind in (((0.1, 0.7), float), ((0.0, 1.0), float), ((5,), int), ((-1,), int),
                         ((1, 1), int), ((), int), ((1, 0), bool), ((0,) * 5, bool)):
        with pytest.raises(SystemExit, match="s.npy"):
            rows(*values, kind=kind)


@pytest.mark.parametrize("method,said", [
    ("topk", "p of eq. 11 (not used)"), ("gsample", "p of eq. 11, scaled"),
    ("shift-gsample", "p of eq. 11, scaled")])
def test_the_figure_says_whether_the_bell_was_used(stage, tmp_path, monkeypatch, method, said):
    figures = []
    monkeypatch.setattr(stage(4).plt, "close", figures.append)
    write(tmp_path / "ratings.csv", [f"{k},{k},1,1,x" for k in range(40)])
    launch(stage, 4, ["--out", str(tmp_path), "--method", method])
    (axis,), = (figure.axes for figure in figures)
    assert said in [text.get_text() for text in axis.get_legend().get_texts()]
