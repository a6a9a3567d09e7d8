"""Stage 4 of 5: choose the pairs to keep: Shift-Gsample (eq. 11) and its rivals.

Sort by rating, highest first; w_i in [0, 1) is pair i's position in that order. Then

    eq. 11   p(i) ~ exp(-(w_i - mean)^2 / (2 std^2)) for w_i >= drop, 0 for the dropped head,

drawn without replacement to an exact count. --method     head               tail

    topk           the highest ratings                      kept               cut
    shift-gsample  eq. 11, the paper's rule                 first --drop out   unlikely, not cut
    gsample        eq. 11 with nothing dropped              unlikely           unlikely, not cut
    block          the run of pairs that begins at --drop   first --drop out   cut
    random         every pair alike

Which rule is right depends on what a high rating means. By eq. 9 it means low loss, the head is
plain pictures, and the paper's rule is the default. By eq. 6 it means that validation asked for the
pair, and the head is what is wanted: there topk is the default.

The bell's middle is --mean. At the default, half of the ranking, the first quarter holds 5 % of it,
so that dropping that quarter changes little. The more is kept, the more of the tail comes along.

The paper gives neither n, mu, sigma (here --drop, --mean, --std) nor says how to draw. Ours: drop
25 %, as file names in the authors' first release have it; the mean at 50 % and the std of 15 points
place the bell on what the paper calls informative, its 30 to 80 %. No pair is drawn twice.

Reads    out/ratings.csv, or --ratings with another CSV of stage 3 or a .npy of ratings
Writes   out/selected-METHOD-KEEP.csv (column key), .png and .json (what it was made from); for
         ratings-loss.csv the names begin with selected-loss; for a .npy that is not of stage 3 the
         selection is a .npy of row numbers.
         --write-shards DIR: the selected pairs of the rated --data as new tar shards
Run      python 04_select.py                                  ratings of eq. 6
         python 04_select.py --ratings out/ratings-loss.csv   ratings of eq. 9
"""
import argparse
import collections
import csv
import importlib
import io
import itertools
import json
import mmap
import os
import re
import sys
import tarfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))             # PYTHONSAFEPATH leaves it out
s1 = importlib.import_module("01_proxy")

METHODS = ("topk", "shift-gsample", "gsample", "block", "random")
RANKINGS = ("rating", "instance", "loss", "difference", "gain", "contrast")


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
                         f"{len(w) - first}: "
                         + ("lower --keep or --drop" if count else "raise --keep"))
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
    Where float32 is too coarse for that order, argsort it is.
    """
    with np.errstate(over="ignore"):
        bits = (0 - rating.astype(np.float32)).view(np.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF                      # integers in the order of the floats
    both = (bits.astype(np.int64) << 32) | np.arange(len(rating))
    both.sort()
    rows = both & 0xFFFFFFFF
    sorted_ = rating[rows]
    exact = (sorted_[1:] <= sorted_[:-1]).all()
    return rows if exact else np.argsort(-rating, kind="stable")


def join(ratings):
    """One rating (N,) from several (N,): minus the mean of a pair's places in their rankings."""
    places = np.zeros(len(ratings[0]))
    for rating in ratings:
        places[sort_rows(rating)] -= np.arange(len(rating)) / len(ratings)
    return places


def advise(written_by, rank_by):
    """Added: the rule that suits a ranking, and why. written_by: the command that rated."""
    ours = rank_by in ("rating", "instance")
    if rank_by == "loss" or ours and "--signal loss" in written_by:
        return "shift-gsample", "a high rating means low loss (eq. 9), so plain pictures come first"
    if ours and written_by or rank_by == "difference":
        return "topk", "a high rating means that validation asked for the pair (eq. 6)"
    return "topk", f"all that is known of {rank_by} is that high is good"


# ---- files -----------------------------------------------------------------------------------
def read_ratings(path, rank_by, hash_key=lambda key: hash(key) & 0xFFFFFFFFFFFFFFFF):
    """Hashes of the keys (N,) and ratings (N,) of a CSV, line by line; for a .npy None and (N,).

    Hashes, as thirty million keys are gigabytes; `read_keys` reads the chosen ones again. Of the
    columns `loss` and `difference` a low value is rated high, so their sign is turned. Several
    columns, with commas between them, are joined.
    """
    if "," in rank_by:
        hashes, ratings = zip(*(read_ratings(path, name, hash_key) for name in rank_by.split(",")))
        return hashes[0], join(ratings)
    if is_array(path):
        if rank_by != "rating":
            raise SystemExit(f"{path} is one column: --rank-by {rank_by} needs a CSV of stage 3")
        hashes, rating = None, read_array(path, "iuf")
        rating = rating.astype(float) if rating.dtype.kind == "u" else rating
    else:
        hashes, rating = read_columns(path, rank_by, hash_key)
    if not np.isfinite(rating).all():
        raise SystemExit(f"{path}: {rank_by} is not a number in row "
                         f"{np.isfinite(rating).argmin() + 1}")
    return hashes, -rating if rank_by in ("loss", "difference") else rating


def is_array(path):
    return Path(path).suffix.lower() == ".npy"


def read_array(path, kinds):
    """A .npy of one number per row, (N,), of one of these numpy kinds."""
    try:
        with open(path, "rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise ValueError("it is another kind of file")
        values = np.load(path, allow_pickle=False)
        if values.dtype.kind not in kinds or not 0 < len(values) == values.size:
            raise ValueError(f"it holds {values.dtype} of shape {values.shape}")
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} is no .npy of one number per row: "
                         f"{getattr(error, 'strerror', None) or error}")
    return values.reshape(-1)


def read_columns(path, name, hash_key):
    """Of every line of a CSV the hash of its key (N,), and column `name` (N,) as numbers.

    A file that cannot be read as such, or in which a key stands twice, ends the program.
    """
    try:
        with (open(path, encoding="utf-8-sig", newline="") as file,
              warnings.catch_warnings(action="ignore")):   # of no data
            columns = next(csv.reader(file), [])
            if not {"key", name} <= set(columns):
                raise ValueError(f"columns key and {name} are needed, it has {columns}; those of "
                                 "rankings without a rater come with 03_score.py --baselines")
            places = [columns.index(found) for found in dict.fromkeys(["key", name])]
            table = np.loadtxt(file, [("key", "u8"), ("number", "f8")][:len(places)],
                               delimiter=",", converters={places[0]: hash_key}, usecols=places,
                               quotechar='"', comments=None, encoding="utf-8", ndmin=1)
        if not len(table):
            raise ValueError("no line follows the names of its columns")
    except UnicodeError:
        raise SystemExit(f"{path} is no CSV in UTF-8: save it as one")
    except (OSError, ValueError, csv.Error) as error:
        raise SystemExit(f"{path}: {getattr(error, 'strerror', None) or error}")
    ordered = np.sort(table["key"])
    if (ordered[1:] == ordered[:-1]).any():
        _, first = np.unique(table["key"], return_index=True)
        again = np.setdiff1d(np.arange(len(table)), first)[:1]
        raise SystemExit(f"{path}: key {next(read_keys(path, again))[0]} stands there more than "
                         f"once, again in row {again[0] + 1}")
    return table["key"], table[table.dtype.names[-1]]


def read_keys(path, rows):
    """(key, stratum or '') of these lines, ascending, of a CSV, one after another."""
    chosen = np.zeros(rows[-1] + 1, bool)
    chosen[rows] = True
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = filter(None, csv.reader(file))
        columns = next(lines)
        places = [columns.index(name) for name in ("key", "stratum") if name in columns]
        for line in itertools.compress(lines, chosen.tobytes()):
            yield (*(line[place] for place in places), "")[:2]


def find_planted(path, n):
    """Which lines (n,) of a CSV of stage 3 are pairs with planted dirt."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(b"planted-") < 0:
            return np.zeros(n, bool)
    lines = read_keys(path, np.arange(n))
    return np.array([stratum.startswith("planted-") for _, stratum in lines])


def read_rows(path, n):
    """Corpus rows from a .npy of row numbers, or of True or False for each of the n pairs."""
    rows = read_array(path, "iub")
    fits = rows.dtype != bool or len(rows) == n
    rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(int)
    if not (fits and 0 < len(rows) == len(np.unique(rows)) and 0 <= rows.min() <= rows.max() < n):
        raise SystemExit(f"{path}: row numbers from 0 to {n - 1}, each once, are needed, or True "
                         f"or False for each of the {n} pairs")
    return rows


def read_record(path, out, say=print):
    """The .json beside a file of stage 3 or 4; {} where there is none that knows this very file.

    It names what the file was made from; if one of these is another one now, the program ends.
    """
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        known = [s1.digest(path.with_name(name)) == value for name, value in record["files"].items()
                 if name in (path.name, f"{path.stem}.csv")]                  # which has the keys
        made_from, made_by = record["made_from"].items(), record["written_by"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        known = []
    if not known or not all(known) or path.name not in record["files"]:
        say(f"{path} carries no record of what it was made from: it is taken as it is")
        return {}
    for name, value in made_from:
        file = Path(out if name == "proxy.pt" else path.parent) / name
        if file.exists() and s1.digest(file) != value:
            raise SystemExit(f"{path} was made from another {file} than is there now: run "
                             f"{made_by} again, or name the --out that it came from")
    return record


def write_selection(stem, rows, table, **facts):
    """STEM.csv with the keys of these lines of a CSV, or STEM.npy with the rows where there is no
    table; and STEM.json. Returns its path, and {stratum: count} for the analysis."""
    path, strata = Path(f"{stem}.csv" if table else f"{stem}.npy"), collections.Counter()
    with s1.atomic_file(path, "w" if table else "wb") as file:
        if table:
            writer = csv.writer(file)
            writer.writerow(["key"])
            for key, stratum in read_keys(table, rows):
                writer.writerow([key])
                strata[stratum] += 1
        else:
            np.save(file, rows)
    with s1.atomic_file(f"{stem}.json") as file:
        json.dump({**facts, "files": {path.name: s1.digest(path)}}, file, indent=1)
    return path, strata


def compose(strata):
    """': ' and the share of every stratum of {stratum: count}, '' where none is known."""
    shares = [f"{strata[name] / strata.total():.0%} {name}" for name in sorted(strata) if name]
    return ": " + ", ".join(shares) if shares else ""


def write_shards(folder, out, data, keys, rows, rated, per_shard=10000):
    """Copy the selected pairs of `data`, else of out/proxy.pt's --data, into tars of 10,000 pairs.

    Members keep their bytes and keys. Where keys is None (ratings in a .npy), rows (n,) stand for
    them, if `rated` is the number of all pairs.
    """
    settings, _ = s1.load_proxy(out)
    data = data or settings.data
    if data in ("toy", *s1.DATASETS):
        raise SystemExit(f"--write-shards copies pairs out of files, not those of --data {data}")
    pairs = s1.open_pairs(data, settings.size, settings.words, out)
    if data == settings.data:
        s1.compare_corpus(settings, data=pairs)
    if keys is None and rated != len(pairs):
        raise SystemExit(f"the ratings are of {rated} pairs and {data} has {len(pairs)}: which is "
                         "which a .npy does not say, so give a CSV of keys")
    rows = rows if keys is None else s1.find_rows(pairs, keys)
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(pairs):
        raise SystemExit(f"{data} does not hold all selected pairs: the ratings are of "
                         "other data")
    Path(folder).mkdir(parents=True, exist_ok=True)
    parts = np.split(rows, range(per_shard, len(rows), per_shard))
    files = [Path(folder) / f"{number:06d}.tar" for number in range(len(parts))]
    done = 0
    with ProcessPoolExecutor(min(len(parts), os.cpu_count())) as pool:
        for file, part in zip(files, pool.map(write_shard, files, map(pairs.take, parts))):
            done += part
            print(f"{file}: {done} of {len(rows)} pairs")


def write_shard(file, pairs):
    """One tar of all these pairs; returns their number."""
    with (s1.atomic_file(file, "wb") as whole,
          tarfile.open(fileobj=whole, mode="w") as tar):
        for row in range(len(pairs)):
            key, files = pairs.read(row)
            for kind, data in files.items():
                member = tarfile.TarInfo(to_name(key) + kind)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return len(pairs)


def to_name(key):
    """A member's name from which any reader gets a key of its own, and no file out of a folder."""
    return re.sub(r"\.|^/", lambda found: f"%{ord(found[0]):X}", key)


def draw_figure(path, n, w, args):
    """What was kept over the ranking, and the bell of eq. 11, from which it was drawn or not."""
    figure, axis = plt.subplots(figsize=(5, 3))
    bins = np.linspace(0, 1, 41)
    axis.stairs(np.full(40, n / 40), 100 * bins, fill=True, color="0.85", label="all pairs")
    axis.stairs(np.histogram(w, bins)[0], 100 * bins, fill=True, color="#0072B2", label="kept")
    drawn, fine = "gsample" in args.method, np.linspace(0, 1, 1001)
    start = 0.0 if args.method == "gsample" else args.drop
    p = np.exp(log_density(fine, start, args.mean, args.std))
    axis.plot(100 * fine, p * n / 40, "-" if drawn else "--", color="#D55E00",
              label="p of eq. 11, scaled" if drawn else "p of eq. 11 (not used)")
    axis.set(xlabel="percentile (0 = highest rating)", ylabel="pairs")
    s1.legend_above(axis, 3)
    s1.save_figure(figure, path)


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ratings", type=Path, help="CSV of stage 3, or .npy (default: in --out)")
    parser.add_argument("--rank-by", default="rating", help="column to sort by, or several joined "
                        f"by commas, their mean place, of {', '.join(RANKINGS)}")
    parser.add_argument("--method", choices=METHODS, help="default: what suits the ratings")
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
    if not set(args.rank_by.split(",")) <= set(RANKINGS):
        parser.error(f"--rank-by {args.rank_by}: name one or more of {', '.join(RANKINGS)}")
    if not (0 <= args.drop < 1 and 0 <= args.mean <= 1 and 1e-6 <= args.std <= 1 and args.seed >= 0
            and 0 < args.keep < np.inf and (args.keep <= 1 or args.keep % 1 == 0)):
        parser.error("--drop, --mean and --std are shares from 0 to 1 (50 per cent is 0.5), --keep "
                     "is a share above 0 or a whole number of pairs, --seed is not negative")
    return args


def main(args):
    if not args.ratings.exists():
        raise SystemExit(f"{args.ratings} is missing: run 03_score.py first")
    if args.write_shards and any(Path(args.write_shards).glob("*.tar")):
        raise SystemExit(f"--write-shards {args.write_shards} holds tars already, which would be "
                         "overwritten or mixed with the new ones: name another folder")
    record = read_record(args.ratings, args.out)
    suited, why = advise(record.get("written_by", ""), args.rank_by)
    args.method, asked = args.method or suited, args.method
    print(f"--method {args.method}, " + ("as asked" if asked else "the default here")
          + (f": {why}" if args.method == suited else f"; {suited} would suit: {why}"))
    _, rating = read_ratings(args.ratings, args.rank_by)
    own = is_array(args.ratings) and not record
    table = None if own else args.ratings.with_suffix(".csv" if record else args.ratings.suffix)
    planted = find_planted(table, len(rating)) if table else np.zeros(len(rating), bool)
    real = np.flatnonzero(~planted)
    try:
        rows, w = select(rating[real], args.method, args.keep, args.drop, args.mean, args.std,
                         args.seed)
    except ValueError as error:
        raise SystemExit(f"{args.ratings}: {error}")
    of, usual = args.ratings.stem.removeprefix("ratings"), parse_args([])
    of = f"-{of}" if of and not of.startswith("-") else of
    by = "" if args.rank_by == "rating" else f"-by-{args.rank_by.replace(',', '-')}"
    other = [f"-{name}-{getattr(args, name):.15g}" for name in ("drop", "mean", "std", "seed")
             if getattr(args, name) != getattr(usual, name)]
    stem = Path(args.out) / f"selected{of}{by}-{args.method}-{args.keep:.15g}{''.join(other)}"
    rows = real[rows]
    file, strata = write_selection(
        stem, rows, table, written_by="04_select.py", data=record.get("data"),
        made_from={**record.get("made_from", {}), args.ratings.name: s1.digest(args.ratings)})
    draw_figure(f"{stem}.png", len(real), w, args)
    print(f"wrote {file}, .json, .png: {len(rows)} of {len(real)} pairs{compose(strata)}")
    if 1 < args.keep <= 100 < len(real):
        print(f"--keep {args.keep:g} is a number of pairs; a share is 1 at most, and half is 0.5")
    if len(real) < len(rating):
        print(f"{len(rating) - len(real)} pairs with planted dirt are left out of the ranking")
    if args.write_shards:
        keys = (key for key, _ in read_keys(table, rows)) if table else None
        write_shards(args.write_shards, args.out, record.get("data"), keys, rows, len(rating))


if __name__ == "__main__":
    main(parse_args())
