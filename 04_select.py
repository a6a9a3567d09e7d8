"""Stage 4 of 5: choose the pairs to keep: Shift-Gsample (eq. 11) and its rivals. Needs no torch.

Sort by rating, highest first; w_i in [0, 1) is pair i's position in that order. Then

    eq. 11   p(i) ~ exp(-(w_i - mean)^2 / (2 std^2)) for w_i >= drop, 0 for the dropped head,

drawn without replacement to an exact count. --method     head               tail

    shift-gsample  eq. 11, the paper's rule                 first --drop out   unlikely, not cut
    gsample        eq. 11 with nothing dropped              unlikely           unlikely, not cut
    topk           the highest ratings                      kept               cut
    block          the run of pairs that begins at --drop   first --drop out   cut
    random         every pair alike

The bell's middle is --mean. At the default, half of the ranking, the first quarter holds 5 % of it,
so that dropping that quarter changes little. The more is kept, the more of the tail comes along.

The paper gives neither n, mu, sigma (here --drop, --mean, --std) nor says how to draw. Ours: drop
25 %, as in the names of the authors' early files; the mean at 50 % and the std of 15 points place
the bell on what the paper calls informative, its 30 to 80 %. Sampling is without replacement.
Which end to cut depends on what the rating measures: look at out/ratings-bands.png first.

Reads    out/ratings.csv, or --ratings with another CSV of stage 3 or a .npy of ratings
Writes   out/selected-METHOD-KEEP.csv (column key) and .png; for ratings-loss.csv the names begin
         with selected-loss; for a .npy the selection is a .npy of row numbers.
         --write-shards DIR: the selected pairs of out/proxy.pt's --data as new tar shards
Run      python 04_select.py --method topk                    suits eq. 6
         python 04_select.py --ratings out/ratings-loss.csv   the paper's rule, suits eq. 9
"""
import argparse
import csv
import importlib
import io
import os
import tarfile
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

METHODS = ("shift-gsample", "gsample", "topk", "block", "random")
RANKINGS = ("rating", "instance", "loss", "difference", "clarity", "frequency", "edges")


# ---- eq. 11 and its rivals -------------------------------------------------------------------
def log_density(w, drop, mean, std):
    """log p(i) (N,) of Shift-Gsample, up to a constant; -inf for the dropped head."""
    return np.where(w >= drop, -(w - mean) ** 2 / (2 * std ** 2), -np.inf)    # eq. 11


def draw(log_p, count, rng):
    """`count` row numbers drawn without replacement with probabilities ~ exp(log_p).

    The Gumbel top-k trick: the `count` largest of log p + Gumbel noise are distributed like draws
    one after another (Kool et al. 2019, arXiv 1903.06059); log space, so a far tail never
    underflows.
    """
    keys = rng.gumbel(size=len(log_p))
    keys += log_p
    return np.argpartition(keys, len(keys) - count)[len(keys) - count:]


def select(rating, method, keep, drop=0.25, mean=0.5, std=0.15, seed=0):
    """Row numbers, ascending, of the pairs to keep, and their positions w_i in the ranking.

    rating (N,): high is rated high. keep: a share up to 1, or a count above it. Raises ValueError
    where fewer pairs are left than shall be kept.
    """
    count = round(keep * len(rating)) if keep <= 1 else round(keep)
    rng = np.random.default_rng(seed)
    start = drop if method in ("shift-gsample", "block") else 0.0
    w = np.arange(len(rating)) / max(len(rating), 1)       # of the ranking, best first
    first = np.searchsorted(w, start)
    if not 0 < count <= len(w) - first:
        raise ValueError(f"keep {count} of {len(w)} pairs, but drop {start:g} leaves "
                         f"{len(w) - first}")
    if method in ("topk", "block"):
        chosen = first + np.arange(count)
    elif method == "random":
        chosen = draw(np.zeros(len(w)), count, rng)
    else:
        chosen = draw(log_density(w, start, mean, std), count, rng)
    return np.sort(sort_rows(rating)[chosen]), w[chosen]


def sort_rows(rating):
    """Row numbers (N,) from the highest rating to the lowest; equal ones keep their order.

    np.argsort(-rating, kind="stable") in a fifth of its time: sorts float32 bits and row as one.
    """
    bits = (0 - rating.astype(np.float32)).view(np.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF                      # integers in the order of the floats
    both = (bits.astype(np.int64) << 32) | np.arange(len(rating))
    both.sort()
    return both & 0xFFFFFFFF


def join(ratings):
    """One rating (N,) from several (N,): minus the mean of a pair's places in their rankings."""
    places = np.zeros(len(ratings[0]))
    for rating in ratings:
        places[sort_rows(rating)] -= np.arange(len(rating)) / len(ratings)
    return places


# ---- files -----------------------------------------------------------------------------------
def read_ratings(path, rank_by):
    """keys (N,) or None, rating (N,) and strata (N,) or None of a CSV of stage 3, or of a .npy.

    Of the columns `loss` and `difference` a low value is rated high, so their sign is turned.
    """
    keys = strata = None
    if path.suffix == ".npy":
        rating = read_rows(path, float)
    else:
        with open(path, encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file), [])
        if not {"key", rank_by} <= set(columns):
            raise SystemExit(f"{path}: columns key and {rank_by} are needed, it has {columns}")
        rating = read_column(path, columns.index(rank_by), float)
        keys = read_column(path, columns.index("key"), str)
        strata = read_column(path, columns.index("stratum"), str) if "stratum" in columns else None
    if not np.isfinite(rating).all():
        raise SystemExit(f"{path}: {rank_by} is not a number in row "
                         f"{np.isfinite(rating).argmin() + 1}")
    if keys is not None:
        order = np.argsort(keys, kind="stable")
        again = order[1:][keys[order[1:]] == keys[order[:-1]]]
        if len(again):
            raise SystemExit(f"{path}: key {keys[again.min()]} stands there more than once, again "
                             f"in row {again.min() + 1}")
    return keys, -rating if rank_by in ("loss", "difference") else rating, strata


def read_rows(path, kind):
    """A .npy of one number per row, (N,)."""
    try:
        values = np.load(path, allow_pickle=False)
        return values.astype(kind).reshape(len(values))
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} is no .npy with one number per row: {error}")


def read_column(path, column, kind):
    """One column (N,) of a CSV file with a header; a broken or missing file ends the program."""
    try:
        return np.loadtxt(path, dtype=kind, delimiter=",", skiprows=1, usecols=column, ndmin=1,
                          quotechar='"', comments=None, encoding="utf-8")
    except FileNotFoundError:
        raise SystemExit(f"{path} is missing: run 04_select.py first, or correct the path")
    except ValueError as error:
        raise SystemExit(f"{path}: {error}")


def compose(strata, rows):
    """': ' and the share of every stratum among `rows`, or '' where none is known (analysis)."""
    names = [] if strata is None else sorted(set(strata) - {""})
    shares = [f"{np.mean(strata[rows] == name):.0%} {name}" for name in names]
    return ": " + ", ".join(shares) if shares else ""


def write_shards(folder, out, keys, rows, per_shard=10000):
    """Copy the selected pairs of the --data of out/proxy.pt into WebDataset tars of 10,000 pairs.

    Members keep their bytes and keys. rows (n,) are used where keys is None (ratings in a .npy).
    """
    proxy_stage = importlib.import_module("01_proxy")      # only here: brings torch with it
    settings, _ = proxy_stage.load_proxy(out)
    if settings.data == "toy":
        raise SystemExit("--write-shards copies real pairs; the toy pairs are drawn anew each time")
    pairs = proxy_stage.open_pairs(settings.data, settings.size, settings.words, out)
    proxy_stage.compare_corpus(settings, data=pairs)
    proxy_stage.compare_corpus(settings, data=pairs)
    rows = rows if keys is None else proxy_stage.find_rows(pairs, keys)
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(pairs):
        raise SystemExit(f"{settings.data} does not hold all selected pairs: the ratings are of "
                         "other data")
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.split(rows, range(per_shard, len(rows), per_shard))):
        with proxy_stage.atomic_file(Path(folder) / f"{number:06d}.tar", "wb") as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for row in part:
                    key, files = pairs.read(row)
                    for kind, data in files.items():
                        member = tarfile.TarInfo(proxy_stage.to_name(key) + kind)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        print(f"{folder}/{number:06d}.tar: {number * per_shard + len(part)} of {len(rows)} pairs")


def draw_figure(path, n, w, args):
    """What was kept over the ranking, and the density of eq. 11 that it was drawn from."""
    figure, axis = plt.subplots(figsize=(5, 3))
    bins = np.linspace(0, 1, 41)
    axis.stairs(np.full(40, n / 40), 100 * bins, fill=True, color="0.85", label="all pairs")
    axis.stairs(np.histogram(w, bins)[0], 100 * bins, fill=True, color="#0072B2", label="kept")
    if "gsample" in args.method:
        start = args.drop if args.method == "shift-gsample" else 0.0
        fine = np.linspace(0, 1, 1001)
        p = np.exp(log_density(fine, start, args.mean, args.std))
        axis.plot(100 * fine, p * n / 40, color="#D55E00", label="p of eq. 11, scaled")
    axis.set(xlabel="percentile (0 = highest rating)", ylabel="pairs")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3, frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ratings", type=Path, help="CSV of stage 3, or .npy (default: in --out)")
    parser.add_argument("--rank-by", choices=RANKINGS, default="rating",
                        help="column to sort by; of loss and difference, low is rated high")
    parser.add_argument("--method", choices=METHODS, default="shift-gsample")
    parser.add_argument("--keep", type=float, default=0.5, help="share up to 1, or a count")
    parser.add_argument("--drop", type=float, default=0.25, help="n of eq. 11: share of the head")
    parser.add_argument("--mean", type=float, default=0.5, help="mu of eq. 11, as a share")
    parser.add_argument("--std", type=float, default=0.15, help="sigma of eq. 11, as a share")
    parser.add_argument("--write-shards", metavar="DIR", help="copy the pairs to new tar shards")
    parser.add_argument("--out", default="out", help="folder of all results")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--smoke", action="store_true", help="accepted; this stage is quick")
    args = parser.parse_args(argv)
    args.ratings = args.ratings or Path(args.out) / "ratings.csv"
    if min(args.std, args.keep) <= 0 or not 0 <= args.drop < 1:
        parser.error("--std and --keep must be above 0, --drop in [0, 1)")
    return args


def main(args):
    if not args.ratings.exists():
        raise SystemExit(f"{args.ratings} is missing: run 03_score.py first")
    keys, rating, strata = read_ratings(args.ratings, args.rank_by)
    try:
        rows, w = select(rating, args.method, args.keep, args.drop, args.mean, args.std, args.seed)
    except ValueError as error:
        raise SystemExit(f"{args.ratings}: {error}: lower --keep or --drop")
    of = args.ratings.stem.removeprefix("ratings")
    of = f"-{of}" if of and not of.startswith("-") else of
    by = "" if args.rank_by == "rating" else f"-by-{args.rank_by}"
    stem = Path(args.out) / f"selected{of}{by}-{args.method}-{args.keep:g}"
    file = write_selection(stem, rows, keys)
    draw_figure(f"{stem}.png", len(rating), w, args)
    print(f"wrote {file}, .png: {len(rows)} of {len(rating)} pairs{compose(strata, rows)}")
    if len(w) and w.min() > 0.05:
        print(f"none of them is among the {w.min():.0%} rated highest: right where high means low "
              "loss (eq. 9), wrong where it means what validation asked for (eq. 6); --method topk "
              "keeps those")
    if args.write_shards:
        write_shards(args.write_shards, args.out, None if keys is None else keys[rows], rows)


def write_selection(stem, rows, keys):
    """STEM.csv with the keys of the selected rows; STEM.npy with the rows where keys are None."""
    path = Path(f"{stem}.npy" if keys is None else f"{stem}.csv")
    part = Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if keys is None:
            with open(part, "wb") as file:
                np.save(file, rows)
        else:
            with open(part, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["key"], *([key] for key in keys[rows])])
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SystemExit(f"{path} cannot be written: {error.strerror}; name another --out")
    return path


if __name__ == "__main__":
    main(parse_args())
