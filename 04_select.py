"""Stage 4 of 5: choose the pairs to keep: Shift-Gsample (eq. 11) and its rivals.

Sort by rating, highest first; w_i in [0, 1) is pair i's position in that order. Then

    eq. 11   p(i) ~ exp(-(w_i - mean)^2 / (2 std^2)) for w_i >= drop, 0 for the dropped head,

drawn without replacement to an exact count. The rules:   head               tail

    topk           the highest ratings                      kept               cut
    shift-gsample  eq. 11, the paper's rule                 first --drop out   unlikely, not cut
    gsample        eq. 11 with nothing dropped              unlikely           unlikely, not cut
    block          the run of pairs that begins at --drop   first --drop out   cut
    random         every pair alike

Which rule is right depends on what a high rating means. By eq. 9 it means low loss, the head is
plain pictures, and the paper's rule is the default. By eq. 6 it means that validation asked for the
pair, and the head is what is wanted: there topk is the default.

The paper gives neither n, mu, sigma (here --drop, --mean, --std) nor says how to draw. Ours: drop
25 %, as file names in the authors' first release have it; a mean of 50 % and a std of 15 points put
the bell over the middle (the paper calls its 30 to 80 % informative). No pair is drawn twice: of a
half drawn under this bell with nothing dropped 9 % comes from the first quarter.

Reads    out/ratings.npy, or --ratings with another .npy or .csv of stage 3, or with anybody's
         numbers: a .npy of one number a pair, in row order, or a .csv with columns row and rating
Writes   out/selected-METHOD-KEEP.csv (row, key), .json (what it grew from) and .png, a contact
         sheet of both sides of the cut; for ratings-loss the names begin with selected-loss
         --write-shards DIR: the selected pairs of the rated --data as new tar shards
Run      python 04_select.py                                  ratings of eq. 6
         python 04_select.py --ratings out/ratings-loss.npy   ratings of eq. 9
"""
import argparse
import csv
import importlib
import io
import itertools
import re
import sys
import tarfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))             # PYTHONSAFEPATH leaves it out
s1 = importlib.import_module("01_proxy")
s3 = importlib.import_module("03_score")

METHODS = ("topk", "shift-gsample", "gsample", "block", "random")
SHOWN = 8                  # pairs in a row of the contact sheet
RANKINGS = (*s3.NUMBERS, *s3.BASELINES)


# ---- eq. 11 and its rivals -------------------------------------------------------------------
def log_density(w, drop, mean, std):
    """log p(i) (N,) of Shift-Gsample, up to a constant; -inf for the dropped head."""
    return np.where(w >= drop, -(w - mean) ** 2 / (2 * std ** 2), -np.inf)    # eq. 11


def draw(log_p, count, rng):
    """`count` row numbers drawn without replacement with probabilities ~ exp(log_p): where log p +
    Gumbel noise is largest (Kool et al. 2019, arXiv 1903.06059)."""
    keys = log_p + rng.gumbel(size=len(log_p))
    return np.argpartition(keys, len(keys) - count)[len(keys) - count:]


def select(rating, method, keep, drop=0.25, mean=0.5, std=0.15, seed=0):
    """Row numbers, ascending, of the pairs to keep, and in the same order their w_i.

    rating (N,): high is rated high, and equal ones stand in an order drawn by seed. keep: a share
    up to 1, or a count above it. Ends the program where fewer pairs are left than shall be kept.
    """
    count, rng = round(keep * len(rating) if keep <= 1 else keep), np.random.default_rng(seed)
    start = drop if method in ("shift-gsample", "block") else 0.0
    w = np.arange(len(rating)) / max(len(rating), 1)       # of the ranking, best first
    first = np.searchsorted(w, start)
    if not 0 < count <= len(w) - first:
        raise SystemExit(f"keep {count} of {len(w)} pairs, but drop {start:g} leaves "
                         f"{len(w) - first}: change --keep or --drop")
    order = rng.permutation(len(rating))
    order = order[np.argsort(-rating[order], kind="stable")]                  # (N,) rows by w
    if method in ("topk", "block"):
        chosen = first + np.arange(count)
    elif method == "random":
        chosen = draw(np.zeros(len(w)), count, rng)
    else:
        chosen = draw(log_density(w, start, mean, std), count, rng)
    chosen = chosen[np.argsort(order[chosen])]
    return order[chosen], w[chosen]


def advise(written_by, rank_by):
    """Added: the rule that suits a ranking, and why. written_by: the command that rated."""
    ours = rank_by in ("rating", "instance")
    if rank_by == "ref_loss" or (ours and "--signal loss" in written_by):
        return "shift-gsample", "a high rating means low loss (eq. 9), so plain pictures come first"
    if (ours and written_by) or rank_by == "difference":
        return "topk", "a high rating means that validation asked for the pair (eq. 6)"
    return "topk", f"all that is known of {rank_by} is that high is good"


# ---- files -----------------------------------------------------------------------------------
def read_columns(path, names):
    """{name: (n,)} of `row` and other columns of a .csv, or of the fields of a .npy; an array of
    one number a row is `rating`."""
    try:
        if path.suffix == ".npy":
            table = np.load(path, mmap_mode="r").reshape(-1)
            table = table if table.dtype.names else table.view([("rating", table.dtype)])
            head = ["row", *table.dtype.names]
        else:
            with open(path, encoding="utf-8-sig", newline="") as file:
                head = [name.strip() for name in next(csv.reader(file), [])]
        found, missing = ["row", *names], [name for name in ("row", *names) if name not in head]
        if missing:
            raise ValueError(f"no column {' or '.join(missing)} among {', '.join(head)}; rankings "
                             "without a rater come with 03_score.py --baselines")
        if path.suffix == ".npy":
            columns = {"row": np.arange(len(table)), **{name: table[name] for name in names}}
        else:
            columns = dict(zip(found, np.loadtxt(
                path, delimiter=",", quotechar='"', comments=None, encoding="utf-8-sig", skiprows=1,
                usecols=[head.index(name) for name in found], ndmin=2).T))
        return {name: column.astype(float, casting="same_kind") for name, column in columns.items()}
    except (OSError, EOFError, ValueError, TypeError, csv.Error) as error:
        raise SystemExit(f"{path}: {error}")


def read_ratings(path, names, pairs):
    """One rating (N,) for every pair, of the columns `names`, joined by commas, of a file."""
    columns = read_columns(path, names.split(","))
    order = np.argsort(columns["row"])
    if len(order) != len(pairs) or (columns["row"][order] != np.arange(len(pairs))).any():
        raise SystemExit(f"{path} has {len(order)} ratings, and {len(pairs)} pairs were prepared: "
                         f"each row from 0 to {len(pairs) - 1} needs one")
    for name, column in columns.items():
        if not np.isfinite(column).all():
            raise SystemExit(f"{path}: {name} is no number in row {np.isfinite(column).argmin()}")
    return s3.rank_by({name: column[order] for name, column in columns.items()}, names)


def read_rows(path, pairs):
    """The rows (n,) of a selection, ascending."""
    rows = np.sort(read_columns(path, [])["row"])          # a .npy has no column row
    if (path.suffix == ".npy" or not len(rows) or rows[0] < 0 or not rows[-1] < len(pairs)
            or (rows % 1).any() or (np.diff(rows) == 0).any()):
        raise SystemExit(f"{path}: a .csv with a column row is needed, of rows from 0 to "
                         f"{len(pairs) - 1}, each once at most")
    return rows.astype(int)


def compare_keys(path, pairs):
    """End the program where the column `key` of a .csv, if it has one, names other pairs."""
    with open(path, encoding="utf-8-sig", newline="", errors="replace") as file:
        for line in csv.DictReader(file, skipinitialspace=True):
            row, key = (line.get("row") or "").strip().removesuffix(".0"), line.get("key")
            if key and row.isdecimal() and pairs.read("key", [int(row) % len(pairs)]) != [key]:
                raise SystemExit(f"{path} is of another corpus: {key} is not the key of the "
                                 f"prepared pair in row {row}")


def find_planted(pairs):
    """Which pairs (N,) are dirt that --plant planted."""
    return np.isin(pairs.entries["stratum"][pairs.rows], np.array(s1.PLANTED, "S15"))


def write_shards(folder, pairs, rows, made, per_shard=10000):
    """Copy the selected pairs, rows ascending, into tars of 10,000 pairs, in one walk through their
    files. Members keep their bytes; a dot in a key is written as %2E, as a key ends at a dot."""
    found = find_files(made, (pairs.read("key", rows[k:k + 1])[0] for k in range(len(rows))))
    for number, first in enumerate(range(0, len(rows), per_shard)):
        path, count = Path(folder) / f"{number:06d}.tar", min(per_shard, len(rows) - first)
        with (s1.atomic_file(path, "wb") as whole,
              tarfile.open(fileobj=whole, mode="w") as tar):
            for key, files in itertools.islice(found, count):
                name = re.sub(r"\.(?=[^/]*$)", "%2E", key)
                for kind, read in files.items():
                    data, member = read(), tarfile.TarInfo(name + kind)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        print(f"{path}: {first + count} of {len(rows)} pairs", flush=True)


def find_files(made, keys):
    """(key, {suffix: function that reads it}) of these keys, which stand in the files' order."""
    tasks, stamp = s1.list_tasks(argparse.Namespace(**made))
    key, unchanged = next(keys, None), stamp == made["files"]
    for source in [task[2][0] for task in tasks if unchanged and task[0] == "data"]:
        for name, files, _ in s1.list_pairs(source):
            if name == key and files and not isinstance(s1.decode_pair(files, 8), str):
                yield name, files
                key = next(keys, None)
    if key is not None:
        raise SystemExit(f"{made['data']} has changed since its pairs were prepared ({key}): run "
                         "the stages again")


def draw_contact_sheet(path, pairs, rating, kept):
    """What to look at before the rest is deleted: both ends of what is kept and of what is not."""
    left_out, rows = np.setdiff1d(np.arange(len(rating)), kept), {}
    for name, part in (("kept", kept), ("left out", left_out)):
        part = part[np.argsort(-rating[part], kind="stable")]
        for end, shown in (("highest", part[:SHOWN]), ("lowest", part[-SHOWN:])):
            titles = map(" ".join, zip(pairs.read("key", shown), pairs.read("caption", shown)))
            rows[f"{name},\n{end} {len(shown)}"] = pairs.batch(shown)[0], [*titles]
    s3.draw_rows(path, {name: row for name, row in rows.items() if len(row[1])})


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    args = s1.parse(
        argv, __doc__, ratings=("", "of stage 3, or anybody's (OUT/ratings.npy)"),
        rank_by=("rating", f"a column of {', '.join(RANKINGS)}, or several joined by commas: their "
                 "mean place"),
        method=((None, *METHODS), "by default what suits the ratings"),
        keep=(0.5, "share up to 1, or a number of pairs"),
        drop=(0.25, "n of eq. 11: share of the head"), mean=(0.5, "eq. 11's mu, as a share"),
        std=(0.15, "sigma of eq. 11, as a share"), seed=(0, "of what is drawn"),
        write_shards=("", "folder for the pairs as new tar shards"))
    args.ratings = Path(args.ratings or Path(args.out) / "ratings.npy")
    if not (args.drop < 1 and args.mean <= 1 and 1e-6 <= args.std <= 1 and args.keep > 0
            and (args.keep <= 1 or args.keep % 1 == 0)):
        raise SystemExit("--drop, --mean and --std are shares from 0 to 1 (50 per cent is 0.5), "
                         "--keep is a share above 0 or a whole number of pairs")
    return args


def name_selection(args):
    """OUT/selected-..., named after the ratings and all options that are not usual."""
    usual = parse_args([])
    other = [f"{name}-{getattr(args, name):.15g}" for name in ("drop", "mean", "std", "seed")
             if getattr(args, name) != getattr(usual, name)]
    by = [f"by-{args.rank_by.replace(',', '-')}"] * (args.rank_by != "rating")
    parts = ["selected", args.ratings.stem.removeprefix("ratings").strip("-"), *by, args.method,
             f"{args.keep:.15g}", *other]
    return Path(args.out) / "-".join(filter(None, parts))


def main(args, device=None):
    if not args.ratings.exists():
        raise SystemExit(f"{args.ratings} is missing: run 03_score.py first")
    if args.write_shards and any(Path(args.write_shards).glob("*.tar")):
        raise SystemExit(f"--write-shards {args.write_shards} holds tars: remove or rename them")
    known = s1.check(args.ratings)
    if not known:
        print(f"{args.ratings} carries no record of what it was made from: it is taken as it is")
    folder = Path(args.out) / known.get("pairs", "pairs")
    pairs, made = s1.open_pairs(folder), s1.read_json(folder / "made.json")
    if known and s1.digest(folder / "made.json") not in known["grew_from"].values():
        raise SystemExit(f"{args.ratings} rates other pairs than {folder} holds: name its --out")
    if args.write_shards and made["data"] in s1.BUILT_IN:
        raise SystemExit(f"--write-shards copies pairs out of files, not those of {made['data']}")
    suited, why = advise(known.get("written_by", ""), args.rank_by)
    args.method = args.method or suited
    print(f"--method {args.method}; {suited} suits, as {why}")
    rating, planted = read_ratings(args.ratings, args.rank_by, pairs), find_planted(pairs)
    if args.ratings.suffix == ".csv":
        compare_keys(args.ratings, pairs)
    real = np.flatnonzero(~planted)
    chosen, _ = select(rating[real], args.method, args.keep, args.drop, args.mean, args.std,
                       args.seed)
    rows, stem = real[chosen], name_selection(args)
    s1.write_csv(Path(f"{stem}.csv"), ["row", "key"], zip(rows.tolist(), pairs.read("key", rows)))
    s1.record(Path(f"{stem}.csv"), "04_select.py", [args.ratings, folder / "made.json"],
              pairs=folder.name)
    draw_contact_sheet(f"{stem}.png", pairs.take(real), rating[real], chosen)
    names, counts = np.unique(pairs.strata(rows), return_counts=True)
    shares = [f"{n / len(rows):.0%} {name}" for name, n in zip(names, counts) if name]
    print(f"wrote {stem}.csv, .json, .png: {len(rows)} of {len(real)} pairs"
          + f", none of the {planted.sum()} with planted dirt" * bool(planted.any())
          + f": {', '.join(shares)}" * bool(shares))
    cut = rating[real] == rating[rows].min()               # equal ratings are drawn by lot
    if args.method != "random" and cut.sum() > cut[chosen].sum():
        print(f"{cut.sum()} pairs have the lowest rating kept: {cut[chosen].sum()} were drawn")
    if args.write_shards:
        write_shards(args.write_shards, pairs, rows, made)
    return f"look at {stem}.png; next 05_train_eval.py, or --selected {stem}.csv"


if __name__ == "__main__":
    s1.launch(main, parse_args())
