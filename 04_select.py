"""Stage 4 of 5: choose the pairs to keep: Shift-Gsample (eq. 11) and its rivals. numpy only.

Sort by rating, highest first; w_i in [0, 1) is pair i's position in that order. Then

    eq. 11   p(i) ~ exp(-(w_i - mean)^2 / (2 std^2)) for w_i >= drop, 0 for the dropped head,

drawn without replacement to an exact count. --method

    shift-gsample  eq. 11: the head is dropped, the tail only made unlikely      (the paper's)
    gsample        eq. 11 with nothing dropped
    topk           the highest ratings
    block          the run of pairs that begins at --drop
    random         every pair alike

The paper gives neither n, mu, sigma (here --drop, --mean, --std) nor says how to draw. Ours: drop
25 %, as in the names of the authors' early files; the mean at 50 % and the std of 15 points place
the bell on what the paper calls informative, its 30 to 80 %. Sampling is without replacement.
Which end to cut depends on what the rating measures: look at out/ratings-bands.png first.

Reads    out/ratings.csv, or --ratings with another CSV of stage 3 or a .npy of ratings
Writes   out/selected-METHOD-KEEP.csv (column key; row numbers for a .npy) and .png; for
         ratings-loss.csv the names begin with selected-loss
Run      python 04_select.py --keep 0.5
         python 04_select.py --ratings out/ratings-loss.csv --method topk --keep 2000
"""
import argparse
import csv
import os
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

METHODS = ("shift-gsample", "gsample", "topk", "block", "random")


# ---- eq. 11 and its rivals -------------------------------------------------------------------
def positions(rating):
    """w_i (N,) in [0, 1): the share of pairs that stand above pair i; ties keep their order."""
    w = np.empty(len(rating))
    w[np.argsort(-rating, kind="stable")] = np.arange(len(rating)) / len(rating)
    return w


def log_density(w, drop, mean, std):
    """log p(i) (N,) of Shift-Gsample, up to a constant; -inf for the dropped head."""
    return np.where(w >= drop, -(w - mean) ** 2 / (2 * std ** 2), -np.inf)    # eq. 11


def draw(log_p, count, rng):
    """`count` row numbers, ascending, drawn without replacement with probabilities ~ exp(log_p).

    The Gumbel top-k trick: the `count` largest of log p + Gumbel noise are distributed like draws
    one after another (Kool et al. 2019, arXiv 1903.06059); log space, so a far tail never
    underflows.
    """
    keys = rng.gumbel(size=len(log_p))
    keys += log_p
    return np.sort(np.argpartition(-keys, count - 1)[:count])


def select(rating, method, keep, drop=0.25, mean=0.5, std=0.15, seed=0):
    """Row numbers, ascending, of the pairs to keep.

    rating (N,): high is rated high. keep: a share up to 1, or a count above it. Raises ValueError
    where fewer pairs are left than shall be kept.
    """
    count = round(keep * len(rating)) if keep <= 1 else round(keep)
    w, rng = positions(rating), np.random.default_rng(seed)
    start = drop if method in ("shift-gsample", "block") else 0.0
    left = np.count_nonzero(w >= start)
    if not 0 < count <= left:
        raise ValueError(f"keep {count} of {len(rating)} pairs, but drop {start:g} leaves {left}")
    if method in ("topk", "block"):
        return np.sort(np.argsort(np.where(w >= start, w, 2))[:count])
    if method == "random":
        return draw(np.zeros(len(w)), count, rng)
    return draw(log_density(w, start, mean, std), count, rng)


# ---- files -----------------------------------------------------------------------------------
def read_ratings(path, rank_by):
    """keys (N,), rating (N,) and strata (N,) or None of a CSV of stage 3, or of a .npy.

    Of the columns `loss` and `difference` a low value is rated high, so their sign is turned.
    """
    if path.suffix == ".npy":
        rating = np.load(path, allow_pickle=False).astype(float).ravel()
        keys, strata = np.arange(len(rating)), None
    else:
        with open(path, encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file), [])
        if not {"key", rank_by} <= set(columns):
            raise SystemExit(f"{path}: columns key and {rank_by} are needed, it has {columns}")
        rating = read_column(path, columns.index(rank_by), float)
        keys = read_column(path, columns.index("key"), str)
        strata = read_column(path, columns.index("stratum"), str) if "stratum" in columns else None
    if not np.isfinite(rating).all():
        raise SystemExit(f"{path}: {rank_by} is not a number in row {np.isfinite(rating).argmin()}")
    values, first, counts = np.unique(keys, return_index=True, return_counts=True)
    if (counts > 1).any():
        raise SystemExit(f"{path}: key {values[counts.argmax()]} stands there more than once")
    return keys, rating if rank_by == "rating" else -rating, strata


def read_column(path, column, kind):
    """One column (N,) of a CSV file with a header; a broken or missing file ends the program."""
    try:
        return np.loadtxt(path, dtype=kind, delimiter=",", skiprows=1, usecols=column, ndmin=1,
                          quotechar='"', comments=None, encoding="utf-8")
    except FileNotFoundError:
        raise SystemExit(f"{path} is missing: run 04_select.py first, or correct the path")
    except ValueError as error:
        raise SystemExit(f"{path}: {error}")


def describe(strata, rows):
    """The share of every stratum among `rows`, in words (analysis only)."""
    names = sorted(set(strata) - {""})
    return ", ".join(f"{np.mean(strata[rows] == name):.0%} {name}" for name in names)


def draw_figure(path, w, rows, args):
    """What was kept over the ranking, and the density of eq. 11 that it was drawn from."""
    figure, axis = plt.subplots(figsize=(5, 3))
    bins = np.linspace(0, 1, 41)
    axis.hist(100 * w, 100 * bins, color="0.85", label="all pairs")
    axis.hist(100 * w[rows], 100 * bins, color="#0072B2", label="kept")
    if "gsample" in args.method:
        start = args.drop if args.method == "shift-gsample" else 0.0
        fine = np.linspace(0, 1, 1001)
        p = np.exp(log_density(fine, start, args.mean, args.std))
        axis.plot(100 * fine, p * len(w) / 40, color="#D55E00", label="p of eq. 11, scaled")
    axis.set(xlabel="percentile (0 = highest rating)", ylabel="pairs")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3, frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ratings", type=Path, help="CSV of stage 3, or .npy (default: in --out)")
    parser.add_argument("--rank-by", choices=["rating", "loss", "difference"], default="rating")
    parser.add_argument("--method", choices=METHODS, default="shift-gsample")
    parser.add_argument("--keep", type=float, default=0.5, help="share up to 1, or a count")
    parser.add_argument("--drop", type=float, default=0.25, help="n of eq. 11: share of the head")
    parser.add_argument("--mean", type=float, default=0.5, help="mu of eq. 11, as a share")
    parser.add_argument("--std", type=float, default=0.15, help="sigma of eq. 11, as a share")
    parser.add_argument("--out", default="out", help="folder of all results")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--smoke", action="store_true", help="accepted; this stage is quick")
    args = parser.parse_args(argv)
    args.ratings = args.ratings or Path(args.out) / "ratings.csv"
    if args.std <= 0 or not 0 <= args.drop < 1:
        parser.error("--std must be above 0 and --drop in [0, 1)")
    return args


def main(args):
    if not args.ratings.exists():
        raise SystemExit(f"{args.ratings} is missing: run 03_score.py first")
    keys, rating, strata = read_ratings(args.ratings, args.rank_by)
    try:
        rows = select(rating, args.method, args.keep, args.drop, args.mean, args.std, args.seed)
    except ValueError as error:
        raise SystemExit(f"{args.ratings}: {error}: lower --keep or --drop")
    of = args.ratings.stem.removeprefix("ratings")
    of = f"-{of}" if of and not of.startswith("-") else of
    by = "" if args.rank_by == "rating" else f"-by-{args.rank_by}"
    Path(args.out).mkdir(parents=True, exist_ok=True)
    stem = Path(args.out) / f"selected{of}{by}-{args.method}-{args.keep:g}"
    with open(f"{stem}.csv.part", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["key"], *([key] for key in keys[rows])])
    os.replace(f"{stem}.csv.part", f"{stem}.csv")
    draw_figure(f"{stem}.png", positions(rating), rows, args)
    shares = f": {describe(strata, rows)}" if strata is not None else ""
    print(f"wrote {stem}.csv, .png: {len(rows)} of {len(rating)} pairs{shares}")


if __name__ == "__main__":
    main(parse_args())
