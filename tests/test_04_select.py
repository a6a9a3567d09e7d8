"""Stage 4: eq. 11 against its formula, and the files that it reads."""
import itertools

import numpy as np
import pytest

from conftest import run


def test_rows_are_sorted_stably(stage):
    rating = np.random.default_rng(0).standard_normal(5000).round(2)        # negative, ties, -0.0
    rating[:9] = [0.0, -0.0, 0.0, -1e-30, 1e-30, 3e38, -3e38, 1e-42, -1e-42]
    expected = np.argsort(-rating.astype(np.float32), kind="stable")
    assert (stage(4).sort_rows(rating) == expected).all()
    assert stage(4).sort_rows(np.array([1.0, 3.0, 2.0, 0.0])).tolist() == [1, 2, 0, 3]


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


def test_rankings_and_key_files(tmp_path):
    write(tmp_path / "ratings.csv", ['"a,1",3,1,9,x', "b,2,2,8,x", "c,1,3,7,y", "d,0,4,6,y"])
    for rank_by, first in (("rating", "a,1"), ("loss", "a,1"), ("difference", "d")):
        done = run(f"04_select.py --out {tmp_path} --method topk --keep 0.25 --rank-by {rank_by}")
        by = "" if rank_by == "rating" else f"-by-{rank_by}"
        lines = (tmp_path / f"selected{by}-topk-0.25.csv").read_text().split("\n")
        assert lines[1].strip('"\r') == first
    np.save(tmp_path / "r.npy", np.arange(10.0))
    done = run(f"04_select.py --out {tmp_path} --ratings {tmp_path}/r.npy --method topk --keep 2")
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "selected-r-topk-2.npy").tolist() == [8, 9]


def test_a_head_left_out_is_said(tmp_path):
    write(tmp_path / "ratings.csv", [f"{k},{k},1,1,x" for k in range(2000)])
    for method, said in (("shift-gsample", "the 25% rated highest"), ("topk", "")):
        done = run(f"04_select.py --out {tmp_path} --method {method}")
        assert ("rated highest" in done.stdout) == bool(said) and said in done.stdout


@pytest.mark.parametrize("rows,message", [
    (["b,1,1,1,x", "a,nan,1,1,x"], "not a number in row 2"),
    (["a,1,1,1,x", "b,2,1,1,x", "a,3,1,1,x"], "key a stands there more than once, again in row 3"),
    (["a,1,1,1,x", "b,low,1,1,x"], "low"), (["a"], "ratings.csv")])
def test_bad_ratings_are_refused_by_name(tmp_path, rows, message):
    write(tmp_path / "ratings.csv", rows)
    done = run(f"04_select.py --out {tmp_path}")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
