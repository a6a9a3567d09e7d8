"""Stage 3 of 5: one multi-granularity score for every training pair.

The weight of eq. 7 is only defined inside a batch. A score has to stand alone, so it keeps what
belongs to the pair and averages the batch away:

    rating_i = logit_i + log(mean of W_batch over 16 groups: pair i and its companions)

which is log W_i of eq. 7 but for the softmax's normaliser, with a mean W_batch. The companions are
drawn once from the corpus for all pairs, so that within a corpus a rating depends on its pair
alone: batch-mates, order of work and number of processes change nothing. (The released code's
ratings are softmaxes over the scoring batch: they depend on batch-mates and on file order, and grow
in a short last batch.) Ratings are written chunk by chunk: memory does not grow with the corpus,
and a run that is killed continues.

A rating costs one pass of the small rater. `contrast`, the cosine that the rater is given, is by
itself what practitioners filter by, in small. --baselines adds three rankings without a rater, the
mean of 8 draws of t and eps each: `ref_loss`, L(theta_hat; x_i) after stage 2; `difference`,
L(theta; x_i) - L(theta_hat; x_i); and `gain`, what its caption is worth to theta_hat,
L(theta_hat; x_i without caption) - L(theta_hat; x_i).

Reads    out/pairs/, out/proxy.pt, out/rater.pt           (--signal loss: out/rater-loss.pt)
Writes   out/ratings.npy (structured, in row order), out/ratings.csv (the same, for people),
         out/ratings.json (what it grew from), out/ratings.png (histogram), out/ratings-bands.png
         (pictures by percentile, the paper's Fig. 5)
         (--signal loss: the same with ratings-loss; --data DIR: out/pairs-of-DIR-..., and
         ratings-of-DIR-...)
Run      python 03_score.py                      5 s on two cores
         torchrun --nproc-per-node 2 -- 03_score.py
"""
import argparse
import importlib
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False             # a $ in a name is a $
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

sys.path.insert(0, str(Path(__file__).parent))             # PYTHONSAFEPATH leaves it out
s1 = importlib.import_module("01_proxy")
s2 = importlib.import_module("02_meta_rater")

CHUNK = 512                # corpus rows that share a stream of random numbers, scored at a time
GROUPS = 16                # random groups that every pair is tried in
DRAWS = 8                  # of t and eps behind three of the baselines
BANDS = 10                 # percentile bands in the figures
GOOD = 0.8                 # AUC over every kind of known dirt
SHOWN = 1_000_000          # ratings at most that the report and the figures look at
NUMBERS = ["instance", "group", "rating", "contrast"]
BASELINES = ["ref_loss", "difference", "gain"]
LOW_IS_GOOD = ("ref_loss", "difference")

STRATUM_COLOURS = {"informative": "#0072B2", "plain": "#E69F00", "planted-plain": "#E69F00",
                   "chaotic-noise": "#555555", "planted-noise": "#555555",
                   "chaotic-caption": "#CC79A7", "planted-caption": "#CC79A7",
                   "chaotic-collage": "#009E73"}           # of photographs, not of the toy


# ---- the score -------------------------------------------------------------------------------
def mean_group_weight(rater, f, companions):
    """Mean W_batch (B,) over R groups: each pair's features f (B, D') beside the same companions.

    companions (R, G - 1, D'). Mean and variance follow from sums over the companions plus f, so
    that a group costs as much as a pair. Never 0: a collapsed rater's ratings are finite, too.
    """
    size, f = companions.shape[1] + 1, f[:, None]                             # (B, 1, D')
    mean = (f + companions.sum(1)) / size                                     # (B, R, D')
    var = (f.square() + companions.square().sum(1)) / size - mean.square()    # (B, R, D')
    W_batch = rater.group_weight(mean, var).mean((1, 2))                      # (B,)
    return W_batch.clamp_min(torch.finfo(W_batch.dtype).tiny)


def baselines(proxy, ref, x, c, rng):
    """ref_loss, difference and gain (B,), each the mean of DRAWS draws at the meta step's noise."""
    sums = torch.zeros(len(x), 3, device=x.device)
    for _ in range(DRAWS):
        noise = s1.draw_noise(x, rng, s2.T_SHIFT)          # same for all three
        L_theta, L_hat = (s1.flow_loss(net, x, c, *noise) for net in (proxy, ref))
        L_empty = s1.flow_loss(ref, x, 0 * c, *noise)                         # no caption
        sums += torch.stack([L_hat, L_theta - L_hat, L_empty - L_hat], 1) / DRAWS
    return sums.unbind(1)


@torch.no_grad()
def score_chunk(nets, x, c, companions, rng):
    """The NUMBERS (B, 4), with BASELINES (B, 7) where `nets` has the proxies."""
    f = nets["rater"].features(x, c)                                          # (B, D')
    instance = nets["rater"].logits(f)                                        # (B,)
    group = mean_group_weight(nets["rater"], f, companions)                   # (B,)
    columns = [instance, group, instance + group.log(),    # log W_i, but for eq. 7's normaliser
               nets["rater"].contrast.compare(x, c)]
    if "proxy" in nets:
        columns += baselines(nets["proxy"], nets["ref"], x, c, rng)
    return torch.stack(columns, 1)


@torch.no_grad()
def draw_companions(rater, group_size, pairs, seed):
    """Features (R, G - 1, D) of random pairs: GROUPS groups in which one place is free."""
    count = GROUPS * (group_size - 1)
    rows = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:count])
    f = torch.cat([rater.features(*pairs.batch(part))
                   for part in np.array_split(rows, len(rows) // CHUNK + 1)])
    f = f[torch.randperm(len(f), generator=s1.seeded("cpu", seed, "companions"))]
    return f[torch.arange(count) % len(f)].view(GROUPS, -1, f.shape[1])       # few pairs: again


def score(nets, companions, pairs, path, seed, progress):
    """Write PATH.npy in row order; processes share the chunks. `progress` continues a run."""
    names = NUMBERS + BASELINES * ("proxy" in nets)
    dtype = np.dtype([(name, "f4") for name in names] + [("stratum", "S15")])
    part, columns = Path(f"{path}.npy.part"), len(names)
    if s1.rank() == 0 and not progress.step:
        with open(part, "wb") as file:                     # zeros: a full disk is seen here
            for rows in np.array_split(np.arange(len(pairs)), len(pairs) // 2 ** 20 + 1):
                s1.append(file, np.zeros(len(rows), dtype), int(rows[-1]) + 1)
    table = np.lib.format.open_memmap(part, "r+") if s1.rank() == 0 else None
    span = CHUNK * s1.world()
    for k in progress.steps(-(-len(pairs) // span), every=1):
        rows = np.arange(k * span, min((k + 1) * span, len(pairs)))
        own = rows[s1.rank() * CHUNK:][:CHUNK]
        numbers = torch.zeros(CHUNK, columns, device=pairs.device)
        if len(own):
            numbers[:len(own)] = score_chunk(nets, *pairs.batch(own), companions, s1.seeded(
                pairs.device, seed, "score", int(own[0])))
        numbers = s1.gather(numbers)[:len(rows)].cpu().numpy()                # (rows, K)
        if table is not None:
            for name, column in zip(names, numbers.T):
                table[name][rows] = column
            table["stratum"][rows] = pairs.strata(rows).astype("S15")
            table.flush()
    if table is not None:
        write_table(f"{path}.csv", table, pairs)


def write_table(path, table, pairs):
    """The ratings for people: row, key, and the columns of the array."""
    keys = (pairs.read("key", [row])[0] for row in range(len(pairs)))
    s1.write_csv(path, ["row", "key", *table.dtype.names], (
        (row, key, *(f"{value:.6g}" for value in values), stratum.decode())
        for row, (key, (*values, stratum)) in enumerate(zip(keys, map(np.void.item, table)))))


def places(rating):
    """Place (N,) in a ranking from 0, the highest, to 1; equal ratings share their mean place."""
    _, of, counts = np.unique(-rating, return_inverse=True, return_counts=True)
    return ((np.cumsum(counts) - (counts + 1) / 2) / len(rating))[of]


def rank_by(columns, names):
    """One rating (N,) of the table's columns `names`, joined by commas: minus the mean place. Of
    ref_loss and difference a low value is good."""
    ratings = [columns[name] * (-1 if name in LOW_IS_GOOD else 1) for name in names.split(",")]
    return ratings[0] if len(ratings) == 1 else -np.mean([places(rating) for rating in ratings], 0)


# ---- analysis: what the ratings mean ---------------------------------------------------------
def auc(high, low):
    """P(a value of `high` > one of `low`), ties counted half."""
    low = np.sort(low)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return below.mean() / 2 / len(low)


def areas(strata, column):
    """{kind of dirt: AUC of the pairs that are no known dirt above it}."""
    dirt = [name for name in STRATUM_COLOURS if name != "informative"]
    good = column[~np.isin(strata, dirt)]
    return {name: auc(good, column[strata == name]) for name in dirt
            if name in strata and len(good)}


def report(strata, columns, rankings):
    """Added: an AUC for each ranking and kind of known dirt, and whether the rating finds it."""
    found = {name: areas(strata, rank_by(columns, name)) for name in rankings}
    if not found["rating"]:
        s1.print0("whether this rating finds dirt is not known: 01_proxy.py --plant 0.05 tells")
        return
    for name, kinds in found.items():
        s1.print0(f"AUC by {name}: " + ", ".join(f"{kind} {area:.2f}"
                                                 for kind, area in kinds.items()))
    worst = {name: min(kinds.values()) for name, kinds in found.items()}
    best, good = max(worst, key=worst.get), worst["rating"] >= GOOD
    s1.print0(f"the rating {'finds' if good else 'does not find'} every kind of known dirt: "
              f"{worst['rating']:.2f} at worst (0.5 is chance, {GOOD} is good)")
    if not good:
        s1.print0("more --steps of 01 or 02 or better trusted pairs may help" + (
            f"; best is 04_select.py --rank-by {best}, {worst[best]:.2f}" * (best != "rating")))


# ---- figures ---------------------------------------------------------------------------------
def draw_histogram(path, rating, strata):
    """Ratings by stratum."""
    names = [name for name in STRATUM_COLOURS if name in set(strata)]
    rest = ~np.isin(strata, names)
    groups = [(name, strata == name) for name in names] + [
        ("other pairs" if names else "all pairs", rest)] * bool(rest.any())
    figure, axis = plt.subplots(figsize=(6, 3))
    axis.hist([rating[chosen] for _, chosen in groups], bins=60, stacked=True,
              color=[STRATUM_COLOURS.get(name, "black") for name, _ in groups],
              label=[name for name, _ in groups], edgecolor="white", linewidth=0,
              hatch=["//" if name.startswith("chaotic") else "" for name, _ in groups])
    axis.set(xlabel="rating", ylabel="pairs")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=4, frameon=False)
    save_figure(figure, path)


def draw_bands(path, pairs, rating, seed):
    """Pictures and captions drawn at random, a column per percentile band (the paper's Fig. 5)."""
    bands = np.array_split(np.argsort(-rating, kind="stable"), BANDS)
    figure, axes = plt.subplots(5, BANDS, figsize=(BANDS, 8))
    for band, (rows, column) in enumerate(zip(bands, axes.T)):
        five = np.random.default_rng([seed, band]).choice(rows, 5, replace=len(rows) < 5)
        show_pictures(column, pairs.batch(five)[0], pairs.read("caption", five), 13)
        column[0].text(0.5, 1.95, f"{band * 100 // BANDS}-{(band + 1) * 100 // BANDS} %",
                       ha="center", fontsize=10, transform=column[0].transAxes)
    figure.subplots_adjust(wspace=0.08, hspace=0.55)
    save_figure(figure, path)


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    return s1.parse(
        argv, __doc__,
        data=("", "pairs to rate instead of the training pairs, as files like those of 01"),
        signal=(("difference", "loss"), "which rater of stage 2"),
        baselines=(False, f"rankings without a rater, too: {', '.join(BASELINES)}"))


def load_nets(out, signal, with_proxies, settings, device):
    """{rater}, or {rater, proxy, ref}, as stage 2 left them, and its group size."""
    name, command = s2.name_rater(signal)
    args, weights = s1.load(out / f"{name}.pt", command)
    nets = {name: s1.build_proxy(settings, device) for name in ("proxy", "ref") if with_proxies}
    nets["rater"] = s2.Rater(settings.size, settings.patch, settings.words).to(device)
    for name, net in nets.items():
        net.load_state_dict(weights[name])
    return nets, min(s2.GROUP, args.batch_size // 2)


def prepare_other(data, out, settings):
    """Prepare the pairs of --data beside those of stage 1; returns their folder."""
    path = os.path.abspath(os.path.expanduser(data))
    words = "-".join(re.findall(r"\w+", data.removesuffix(".tar")))[-50:]
    folder = out / f"pairs-of-{words or 'here'}"
    there = s1.read_json(folder / "made.json").get("data", path)
    if there != path:
        raise SystemExit(f"{folder} holds the pairs of {there}, not of {path}: name another --out")
    s1.prepare(folder, argparse.Namespace(data=path, size=settings.size, words=settings.words))
    return folder


def main(args, device):
    out = Path(args.out)
    settings, _ = s1.load(out / "proxy.pt", "01_proxy.py")
    nets, group_size = load_nets(out, args.signal, args.baselines, settings, device)
    folder = prepare_other(args.data, out, settings) if args.data else out / "pairs"
    pairs = s1.open_pairs(folder, "train", device)
    name, _ = s2.name_rater(args.signal)
    stem = out / f"{name.replace('rater', 'ratings')}{folder.name.removeprefix('pairs')}"
    sources = [out / f"{name}.pt", folder / "made.json"]
    progress = s1.Progress(Path(f"{stem}.progress"), vars(args) | {
        file.name: s1.digest(file) for file in sources}, ["rated"])
    companions = draw_companions(nets["rater"], group_size, pairs, settings.seed)
    score(nets, companions, pairs, stem, settings.seed, progress)
    if s1.rank():
        return
    progress.finish()                                      # `score` has written the table
    os.replace(f"{stem}.npy.part", f"{stem}.npy")
    command = (f"03_score.py --signal {args.signal}" + " --baselines" * args.baselines
               + f" --data {args.data}" * bool(args.data))
    s1.record(Path(f"{stem}.npy"), command, sources, pairs=folder.name,
              csv=s1.digest(f"{stem}.csv"))
    shown = np.arange(0, len(pairs), -(-len(pairs) // SHOWN))
    table, pairs = np.load(f"{stem}.npy", mmap_mode="r")[shown], pairs.take(shown)
    report(pairs.strata(), table, ["rating", "contrast", *BASELINES * args.baselines])
    draw_histogram(f"{stem}.png", table["rating"], pairs.strata())
    draw_bands(f"{stem}-bands.png", pairs, table["rating"], settings.seed)
    return (f"wrote {stem}.npy, .csv, .json and two figures; look at {stem}-bands.png; next "
            "04_select.py" + f" --ratings {stem}.npy" * (stem.name != "ratings"))


def show_pictures(axes, images, captions, letters=16):
    """Images (K, 3, H, W) in [-1, 1] on K axes, their captions above, cut to fit."""
    for axis, image, caption in zip(np.ravel(axes), images.cpu(), captions):
        axis.imshow((image.permute(1, 2, 0).numpy() + 1) / 2)
        title = textwrap.fill(textwrap.shorten(caption[:500], 3 * letters), letters)
        axis.set_title(title, fontsize=7)
        axis.axis("off")


def draw_rows(path, rows):
    """Pictures in rows: {name: (images (K, 3, H, W), captions)}."""
    wide = max(len(images) for images, _ in rows.values())
    high = sum(1.5 if any(captions) else 1.05 for _, captions in rows.values())
    figure, axes = plt.subplots(len(rows), wide, figsize=(1.25 * wide, high), squeeze=False,
                                layout="constrained")
    for line, (name, (images, captions)) in zip(axes, rows.items()):
        for axis in line:
            axis.axis("off")
        show_pictures(line, images, captions)
        line[0].text(-0.15, 0.5, name, ha="right", va="center", transform=line[0].transAxes)
    save_figure(figure, path)


def save_figure(figure, path):
    if s1.rank() == 0:
        with s1.atomic_file(path, "wb") as file, warnings.catch_warnings(action="ignore"):
            figure.savefig(file, format="png", dpi=150, bbox_inches="tight")  # emoji have no glyph
    plt.close(figure)


if __name__ == "__main__":
    s1.launch(main, parse_args())
