"""Stage 3 of 5: one multi-granularity score for every training pair.

The weight of eq. 7 is only defined inside a batch. A score has to stand alone, so it keeps what
belongs to the pair and averages the batch away:

    rating_i = logit_i + log(mean of W_batch over 16 groups: pair i and its companions)

which is log W_i up to the softmax's normaliser. The companions are drawn once from the corpus for
all pairs, so that in it a rating depends on its pair alone: batch-mates, order of work and number
of processes change nothing. (The released code's ratings are softmaxes over the scoring batch: they
depend on batch-mates and on file order, and grow in a short last batch.) Ratings are written chunk
by chunk: memory does not grow with the corpus, and an interrupted run continues.

A rating costs one pass of the small rater. --baselines adds rankings without a rater. Three are
the mean of 8 draws of t and eps: `loss`, L(theta_hat; x_i) after stage 2; `difference`,
L(theta; x_i) - L(theta_hat; x_i); and `gain`, what its caption is worth to the proxy,
L(theta_hat; x_i without caption) - L(theta_hat; x_i). `contrast` is what practitioners use, in
small: the cosine of picture and caption under a contrastive network, here trained on the trusted
pairs of stage 2.

Reads    out/proxy.pt, out/rater.pt                       (--signal loss: out/rater-loss.pt)
Writes   out/ratings.csv, out/ratings.npy (its column `rating`), out/ratings.json (what made them),
         out/ratings.png (histogram), out/ratings-bands.png (pictures by percentile, the paper's
         Fig. 5), out/ratings-dynamics.png (its Fig. 3)
         (--signal loss: the same with ratings-loss; --data DIR: with ratings-of-DIR)
Run      python 03_score.py                      half a minute on two cores, most for figures
         torchrun --nproc-per-node 2 -- 03_score.py
"""
import csv
import importlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torchvision.transforms import functional as image_ops

sys.path.insert(0, str(Path(__file__).parent))             # PYTHONSAFEPATH leaves it out
s1 = importlib.import_module("01_proxy")
s2 = importlib.import_module("02_meta_rater")

CHUNK = 512                # corpus rows that share a stream of random numbers, scored at a time
GROUPS = 16                # random groups that every pair is tried in
DRAWS = 8                  # of t and eps behind three of the baselines
BANDS = 10                 # percentile bands in the figures
SHOWN = 1_000_000          # ratings at most that the report and the figures look at
NUMBERS = ["instance", "group", "rating"]
BASELINES = ["loss", "difference", "gain", "contrast"]
CONTRAST_STEPS = 500       # of the contrastive network's training
DIRT_NAMES = {"plain": "plain pictures", "noise": "noisy pictures", "caption": "wrong captions",
              "collage": "collages"}


# ---- the score -------------------------------------------------------------------------------
def group_rating(rater, f, companions):
    """Mean W_batch (B,) over R groups: each pair's features f (B, D) beside the same companions.

    companions (R, G - 1, D). A group's mean and variance follow from sums, so that a group costs
    as much as a pair. Never 0, so that a collapsed rater's ratings are finite, too.
    """
    size, f = companions.shape[1] + 1, f[:, None]                             # (B, 1, D)
    mean = (f + companions.sum(1)) / size                                     # (B, R, D)
    var = (f.square() + companions.square().sum(1)) / size - mean.square()    # (B, R, D)
    W_batch = rater.group_weight(mean, var).mean((1, 2))                      # (B,)
    return W_batch.clamp_min(torch.finfo(W_batch.dtype).tiny)


def baselines(proxy, ref, x, c, rng):
    """loss, difference and gain (B,), each the mean of DRAWS draws at the meta step's noise."""
    drawn = torch.empty(CHUNK, *x.shape[1:], device=x.device)
    sums = torch.zeros(len(x), 3, device=x.device)
    for _ in range(DRAWS):
        t = torch.randn(CHUNK, generator=rng, device=x.device) + s1.T_SHIFT
        noise = t.sigmoid()[:len(x)], drawn.normal_(generator=rng)[:len(x)]   # same for all three
        L_theta, L_hat = (s1.flow_loss(net, x, c, *noise) for net in (proxy, ref))
        L_empty = s1.flow_loss(ref, x, 0 * c, *noise)                         # no caption
        sums += torch.stack([L_hat, L_theta - L_hat, L_empty - L_hat], 1) / DRAWS
    return sums.unbind(1)


@torch.no_grad()
def score_chunk(nets, part, companions, chunk, seed, with_baselines=False):
    """The NUMBERS (B, 3), with BASELINES (B, 7), of the pairs of one chunk."""
    x, c = part.batch(np.arange(len(part)))
    f = nets["rater"].features(x, c)                                          # (B, D)
    instance = nets["rater"].logits(f)                                        # (B,)
    group = group_rating(nets["rater"], f, companions)                        # (B,)
    columns = [instance, group, instance + group.log()]    # log W_i, but for eq. 7's normaliser
    if with_baselines:
        rng = s1.seeded(x.device, seed, "score", chunk)
        cosine = (nets["contrast"].embed_images(x)[1] * nets["contrast"].embed_tokens(c)).sum(1)
        columns += [*baselines(nets["proxy"], nets["ref"], x, c, rng), cosine]
    return torch.stack(columns, 1)


@torch.no_grad()
def draw_companions(rater, group_size, pairs, seed):
    """Features (R, G - 1, D) of random pairs: GROUPS groups in which one place is free.

    They are drawn by a hash of their keys, so that the order of the corpus has no say either.
    """
    count = GROUPS * (group_size - 1)
    rows = np.argsort(pairs.hashes() * np.uint64(2 * seed + 1))[:count]
    parts = pairs.parts(np.array_split(rows, -(-len(rows) // CHUNK)))
    f = torch.cat([rater.features(*part.batch(np.arange(len(part)))) for _, part in parts])
    return f[torch.arange(count) % len(f)].view(GROUPS, -1, f.shape[1])       # few pairs: again


@torch.no_grad()
def rate(rater, group_size, pairs, trusted, seed):
    """Ratings (K,) of resident trusted pairs beside the companions of the corpus."""
    companions = draw_companions(rater, group_size, pairs, seed)
    parts = np.array_split(np.arange(len(trusted)), len(trusted) // CHUNK + 1)
    return torch.cat([score_chunk({"rater": rater}, trusted.take(rows), companions, 0, seed)[:, -1]
                      for rows in parts]).cpu().numpy()


def score(nets, group_size, pairs, path, seed, progress, with_baselines=False):
    """Write the lines of `path` in corpus order; processes share the chunks, the first writes."""
    columns = ["key", *NUMBERS, *(BASELINES if with_baselines else []), "stratum"]
    progress.attach()
    progress.expect(-(-len(pairs) // CHUNK), CHUNK)
    companions = draw_companions(nets["rater"], group_size, pairs, seed)      # (R, G - 1, D)
    starts = range(progress.step * CHUNK, len(pairs), CHUNK * s1.world())
    chunks = (np.arange(start, min(start + CHUNK, len(pairs)))
              for start in (first + s1.rank() * CHUNK for first in starts))
    with (open(path, "r+" if progress.step else "w", newline="", encoding="utf-8")
          if s1.rank() == 0 else tempfile.TemporaryFile("w")) as file:
        file.seek(progress.kept.get("bytes", 0))           # what came after the last save is redone
        file.truncate()
        writer = csv.writer(file)
        writer.writerows([] if progress.step else [columns])
        for rows, part in pairs.parts(chunks, shared=True):
            lines = []
            if len(part):
                chunk = progress.step + s1.rank()
                numbers = score_chunk(nets, part, companions, chunk, seed, with_baselines)
                lines = [(key, *(f"{v:.6g}" for v in row), stratum) for key, row, stratum in
                         zip(part.keys, numbers.tolist(), part.strata)]
            lines_of_all = s1.gather_lists(lines)
            writer.writerows(lines_of_all if s1.rank() == 0 else [])
            file.flush()
            progress.kept["bytes"] = file.tell()
            progress.advance(torch.tensor([len(lines)]), by=s1.world(),
                             after=lambda step: os.fsync(file.fileno()))
        progress.fetch()


def reopen(path, progress):
    """Before a run is continued: its lines are where it left them, the last ones under `path`."""
    part, size = Path(f"{path}.part"), progress.kept.get("bytes", 0)
    if progress.step and not part.exists() and path.exists() and path.stat().st_size == size:
        os.replace(path, part)                             # cut off while it drew its figures
    if progress.step and not (part.exists() and part.stat().st_size >= size):
        raise SystemExit(f"{part} is not as the interrupted run left it: delete {progress.path} to "
                         "begin anew")


def write_record(stem, **facts):
    """STEM.npy with the ratings in the order of STEM.csv, and in STEM.json what made them. Returns
    their number."""
    with open(f"{stem}.csv", encoding="utf-8", newline="") as lines:
        place = next(csv.reader(lines)).index("rating")
        ratings = np.loadtxt(lines, np.float32, usecols=place, delimiter=",", quotechar='"',
                             comments=None, ndmin=1)       # six digits: nothing is lost
    with s1.atomic_file(f"{stem}.npy", "wb") as file:
        np.save(file, ratings)
    files = [f"{stem}.csv", f"{stem}.npy"]
    with s1.atomic_file(f"{stem}.json") as file:
        json.dump({**facts, "files": {Path(name).name: s1.digest(name)
                                      for name in files}}, file, indent=1)
    return len(ratings)


def read_table(path):
    """{column: (n,)} of up to SHOWN lines, spread evenly over the file."""
    with open(path, encoding="utf-8", newline="") as file:
        stride = max(1, sum(1 for _ in file) // SHOWN)
        file.seek(0)
        columns, *lines = itertools.islice(csv.reader(file), 0, None, stride)
    return {name: np.array(column, str if name in ("key", "stratum") else float)
            for name, column in zip(columns, zip(*lines))}


def percentiles(rating):
    """Percentile position (N,) in [0, 100), 0 for the highest rating: w_i of eq. 11."""
    return np.argsort(np.argsort(-rating, kind="stable")) * 100 / len(rating)


# ---- a rival: a contrastive network on the same trusted pairs ---------------------------------
class Contrast(nn.Module):
    """Image -> features (B, 64) -> unit vector (B, 32); caption -> unit vector; cosine compares."""

    def __init__(self, size, words):
        super().__init__()
        self.words = words
        widths = [3] + [32 * 2 ** k for k in range(int(math.log2(size // 4)) + 1)]
        convolutions = [layer for a, b in zip(widths[:-1], widths[1:]) for layer in
                        (nn.Conv2d(a, b, 3, stride=1 if a == 3 else 2, padding=1), nn.GELU())]
        self.image = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                   nn.Linear(16 * widths[-1], 64))
        self.image_head = nn.Sequential(nn.GELU(), nn.Linear(64, 32))
        self.word = nn.Embedding(s1.VOCABULARY, 64, padding_idx=0)
        self.text = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def embed_images(self, x):
        """Features (B, 64) and unit vectors (B, 32) of images (B, 3, H, W)."""
        f = self.image(x)
        return f, F.normalize(self.image_head(f), dim=1)

    def embed_tokens(self, c):
        """Unit vectors (B, 32) of captions as tokens (B, T)."""
        return F.normalize(self.text(self.word(c).sum(1)), dim=1)

    def embed_captions(self, captions):
        """Unit vectors (B, 32) of a list of captions."""
        tokens = s1.tokenize(captions, self.words)
        return self.embed_tokens(tokens.to(self.scale.device))


def degrade(x, rng):
    """A third of the images as they are, a third noised, a third blurred."""
    kind = torch.randint(3, (len(x), 1, 1, 1), generator=rng, device=x.device)
    amount = 0.6 * torch.rand(kind.shape, generator=rng, device=x.device)
    noised = x + amount * torch.randn(x.shape, generator=rng, device=x.device)
    blurred = image_ops.gaussian_blur(x, 5, 1.0)
    return torch.where(kind == 0, x, torch.where(kind == 1, noised, blurred))


def train_contrast(pairs, steps, seed, batch_size=128):
    """Contrastive training; pairs of the batch that share a caption are all right answers."""
    device, batch_size = pairs.device, min(batch_size, len(pairs))
    torch.manual_seed(seed)
    net = Contrast(pairs.images.shape[-1], pairs.tokens.shape[1]).to(device)
    opt = s1.adamw(net, 2e-3)
    for k, rows in enumerate(s1.draw_batches(len(pairs), batch_size, seed, 0, steps)):
        opt.param_groups[0]["lr"] = 2e-3 * (1 - k / steps)
        rng = s1.seeded(device, seed, "contrast", k)
        x, c = pairs.batch(rows)
        same = (c[:, None] == c[None]).all(2).float()                         # (B, B)
        cosines = net.embed_images(degrade(x, rng))[1] @ net.embed_tokens(c).T  # (B, B)
        logits, right = net.scale.exp() * cosines, same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
    net.load_state_dict(s1.from_first({name: value.cpu()                      # GPUs may differ
                                       for name, value in net.state_dict().items()}))
    return net.eval().requires_grad_(False)


# ---- analysis: what the ratings mean ---------------------------------------------------------
def auc(high, low):
    """P(a value of `high` > one of `low`), ties counted half."""
    low = np.sort(low)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return below.mean() / 2 / len(low)


def areas(strata, column):
    """{kind of dirt: AUC of the pairs that are no known dirt above it}."""
    dirt = [name for name in s1.STRATUM_COLOURS if name != "informative"]
    good = column[~np.isin(strata, dirt)]
    return {name: auc(good, column[strata == name]) for name in dirt
            if name in strata and len(good)}


def report(strata, column, name):
    """One line: how far a column ranks the other pairs above every kind of dirt (AUC)."""
    words = [f"{stratum} {area:.3f}" for stratum, area in areas(strata, column).items()]
    if words:
        s1.print0(f"AUC over ({name}): " + ", ".join(words))


def judge_rating(strata, rating, trusted, signal):
    """Added: what the rating finds, in words: a line for the trusted pairs (their ratings, (K,))
    and one for every kind of dirt that is known."""
    eq9 = signal == "loss" and "eq. 9 rates low loss high, whatever is asked for: see eq. 6"
    s1.print0(s1.say(
        "trusted pairs are {}rated above the corpus", auc(trusted, rating), 0.5, 0.6, eq9 or
        "either the rating does not know what was asked for, or the corpus is as good as they are: "
        "01_proxy.py --plant tells which"))
    for stratum, area in areas(strata, rating).items():
        kind = stratum.rpartition("-")[2]
        cure = ("if 01 says that captions are read, the rater has not learnt to: 04_select.py "
                "--rank-by rating,contrast finds more"
                if kind == "caption" else "more meta steps, or trusted pairs that differ from it")
        s1.print0(s1.say(f"{DIRT_NAMES[kind]} are {{}}found", area, 0.5, 0.8, eq9 or cure))


def print_bands(strata, percentile):
    """The composition of every percentile band, as a Markdown table."""
    names = [name for name in s1.STRATUM_COLOURS if name in set(strata)]
    if not names:
        return
    s1.print0("\n| percentile, 0 = rated highest | " + " | ".join(names) + " |\n"
              + "|---" * (len(names) + 1) + "|")
    for low in range(0, 100, 100 // BANDS):
        chosen = strata[(percentile >= low) & (percentile < low + 100 // BANDS)]
        shares = " | ".join(f"{np.mean(chosen == name):.0%}" for name in names)
        s1.print0(f"| {low}-{low + 100 // BANDS} | {shares} |")


def probe_dynamics(proxy, pairs, rows, draws, seed):
    """Mean loss and gradient norm of `draws` batches from the corpus rows of one band."""
    values = []
    for k in range(draws):
        rng = s1.seeded(pairs.device, seed, "dynamics", k)
        picked = np.random.default_rng([seed, k]).choice(rows, min(32, len(rows)), replace=False)
        (_, part), = pairs.parts([picked])
        x, c = part.batch(np.arange(len(part)))
        t = torch.randn(len(x), generator=rng, device=x.device).sigmoid()
        eps = torch.randn(x.shape, generator=rng, device=x.device)
        loss = s1.flow_loss(proxy, x, c, t, eps).mean()
        grads = torch.autograd.grad(loss, [p for p in proxy.parameters() if p.requires_grad])
        values.append((loss.item(), torch.cat([g.flatten() for g in grads]).norm().item()))
    return np.mean(values, 0)


# ---- figures ---------------------------------------------------------------------------------
def draw_histogram(path, rating, percentile, strata, trusted):
    """Ratings by stratum, with those of trusted pairs as a line, and what stands where."""
    names = [name for name in s1.STRATUM_COLOURS if name in set(strata)]
    rest = ~np.isin(strata, names)
    groups = [(name, strata == name) for name in names] + [
        ("other pairs" if names else "all pairs", rest)] * bool(rest.any())
    colours = [s1.STRATUM_COLOURS.get(name, "black") for name, _ in groups]
    hatches = ["//" if name.startswith("chaotic") else "" for name, _ in groups]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
    for axis, values, bins, label in (
            (left, rating, 60, "rating"),
            (right, percentile, BANDS, "percentile (0 = highest rating)")):
        axis.hist([values[chosen] for _, chosen in groups], bins=bins, stacked=True, color=colours,
                  label=[name for name, _ in groups], hatch=hatches, edgecolor="white", linewidth=0)
        axis.set(xlabel=label, ylabel="pairs")
    left.hist(trusted, bins=60, range=left.get_xlim(), histtype="step", color="black",
              weights=np.full(len(trusted), len(rating) / len(trusted)), label="trusted, scaled")
    s1.legend_above(left)
    s1.save_figure(figure, path)


def draw_bands(path, pairs, corpus_rows, percentile, seed):
    """Pictures and captions drawn at random, a column per percentile band (the paper's Fig. 5)."""
    figure, axes = plt.subplots(5, BANDS, figsize=(BANDS, 8))
    for band, column in enumerate(axes.T):
        inside = np.flatnonzero((percentile * BANDS // 100).astype(int) == band)
        five = np.random.default_rng([seed, band]).choice(inside, 5, replace=len(inside) < 5)
        (_, part), = pairs.parts([corpus_rows[five]])
        s1.show_pictures(column, part.batch(np.arange(len(part)))[0], part.captions, 13)
        column[0].text(0.5, 1.95, f"{band * 100 // BANDS}-{(band + 1) * 100 // BANDS} %",
                       ha="center", fontsize=10, transform=column[0].transAxes)
    figure.subplots_adjust(wspace=0.08, hspace=0.55)
    s1.save_figure(figure, path)


def draw_dynamics(path, settings, snapshots, pairs, corpus_rows, percentile, draws):
    """Loss and gradient norm by rating band while the proxy warms up (the paper's Fig. 3)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3))
    bands = [corpus_rows[(percentile * BANDS // 100).astype(int) == k] for k in range(BANDS)]
    middles = (np.arange(BANDS) + 0.5) * 100 / BANDS
    for k, (step, weights) in enumerate(sorted(snapshots.items())):
        proxy = s1.build_proxy(settings, pairs.device)
        proxy.load_state_dict(weights)
        table = np.array([probe_dynamics(proxy, pairs, rows, draws, settings.seed)
                          for rows in bands])                                 # (BANDS, 2)
        for axis, values in zip(axes, table.T):
            axis.plot(middles, values, "o-", color=plt.cm.viridis(k / len(snapshots)),
                      label=f"step {step}", markersize=4)
    for axis, label in zip(axes, ("loss", "gradient norm of 32 pairs")):
        axis.set(xlabel="percentile (0 = highest rating)", ylabel=label, ylim=(0, None))
        s1.legend_above(axis)
    s1.save_figure(figure, path)


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = s1.options(
        __doc__, data=(None, "pairs to rate instead of the training pairs, same layouts"))
    parser.add_argument("--signal", choices=["difference", "loss"], default="difference",
                        help="which rater of stage 2")
    parser.add_argument("--baselines", action="store_true", help="rankings without a rater, too")
    return parser.parse_args(argv)


def load_nets(args, settings, device):
    """{proxy, ref, rater} as stage 2 left them, and its group size."""
    file = Path(args.out) / f"rater{s2.suffix(args.signal)}.pt"
    saved = s1.load(file, f"02_meta_rater.py --signal {args.signal}")
    if saved["proxy"] != s1.digest(Path(args.out) / "proxy.pt"):
        raise SystemExit(f"{file} grew from another {args.out}/proxy.pt: run 02_meta_rater.py "
                         f"--signal {args.signal} again")
    nets = {name: s1.build_proxy(settings, device) for name in ("proxy", "ref")}
    nets["rater"] = s2.Rater(settings.size, settings.patch, settings.words).to(device)
    for name, net in nets.items():
        net.load_state_dict(saved["weights"][name])
    return nets, saved["settings"]["group_size"]


def name_data(data):
    """'shards/train-*.tar' -> '-of-shards-train': what is told apart by --data, no file name."""
    words = re.findall(r"\w+", (data or "").removesuffix(".tar"))
    return f"-of-{'-'.join(words)[-80:] or 'here'}" if data else ""


def main(args, device):
    settings, snapshots = s1.load_proxy(args.out)
    nets, group_size = load_nets(args, settings, device)
    pairs, val, test = s1.load_data(settings, device)
    if args.data:
        pairs = s1.keep_resident(s1.open_pairs(
            args.data, settings.size, settings.words, args.out), s1.Machine.memory).to(device)
        if len(pairs) < BANDS:
            raise SystemExit(f"{args.data} has {len(pairs)} readable pairs: {BANDS} are needed")
    if args.baselines:                                     # stage 5's judge has other pairs
        nets["contrast"] = train_contrast(val, 20 if args.smoke else CONTRAST_STEPS, args.seed + 1)
    suffix = s2.suffix(args.signal)
    stem = Path(args.out) / f"ratings{suffix}{name_data(args.data)}"
    made_from = {name: s1.digest(Path(args.out) / name)
                 for name in ("proxy.pt", f"rater{suffix}.pt")}
    progress = s1.Progress(f"{stem}.progress", "03_score.py", {
        **vars(args), "pairs": zlib.crc32(pairs.hashes().tobytes()), **made_from}, args.save_every)
    if s1.rank() == 0:
        reopen(Path(f"{stem}.csv"), progress)
    score(nets, group_size, pairs, f"{stem}.csv.part", args.seed, progress, args.baselines)
    progress.save()
    if s1.rank():
        return
    os.replace(f"{stem}.csv.part", f"{stem}.csv")
    command = (f"03_score.py --signal {args.signal}" + " --baselines" * args.baselines
               + (f" --data {args.data}" if args.data else ""))
    rated = write_record(stem, written_by=command, made_from=made_from,
                         data=args.data and os.path.abspath(os.path.expanduser(args.data)))
    table = read_table(f"{stem}.csv")
    rating, strata = table["rating"], table["stratum"]
    percentile, rows = percentiles(rating), s1.find_rows(pairs, table["key"])
    trusted = rate(nets["rater"], group_size, pairs, test, args.seed)
    judge_rating(strata, rating, trusted, args.signal)
    report(strata, rating, "rating")
    for name in BASELINES if args.baselines else []:
        low_is_good = name in ("loss", "difference")
        report(strata, -table[name] if low_is_good else table[name], f"{name}, no rater")
    if args.baselines:                                     # as 04_select.py --rank-by joins them
        report(strata, -percentile - percentiles(table["contrast"]), "rating,contrast")
    print_bands(strata, percentile)
    draw_histogram(f"{stem}.png", rating, percentile, strata, trusted)
    draw_bands(f"{stem}-bands.png", pairs, rows, percentile, args.seed)
    draw_dynamics(f"{stem}-dynamics.png", settings, snapshots, pairs, rows, percentile,
                  draws=2 if args.smoke else 16)
    progress.finish()
    print(f"\nwrote {stem}.csv, .npy, .json and three figures: {rated} pairs in "
          f"{progress.seconds:.1f} s")


if __name__ == "__main__":
    s1.launch(main, parse_args())
