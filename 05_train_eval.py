"""Stage 5 of 5: train the same model from scratch on every selection and compare what it draws.

    eq. 1    find S in D with M(theta(S)) >~ M(theta(D)) at the same number of epochs

An arm is a selection: half the pairs take half the steps. All arms of a seed share initial
weights, evaluation captions and noise, so their differences are paired; a seed also redraws the
random selections. Measured on trusted pairs that neither a proxy nor an arm is trained on:

    held-out   mean flow loss under fixed noise
    distance   Frechet distance between features of drawn and of real images
    score      100 cos between drawn image and its caption, as a CLIP score
    match      share of drawn images whose own caption is the nearest of all distinct captions

Features and cosines come from stage 3's small contrastive network, trained here on stage 5's own
trusted pairs, which no rating has seen: its distance is not FID and its score not OpenAI's CLIP
score. --metrics standard uses the public networks of both instead, and --evaluate
does so for images that already exist: their code comes after `main` and can be skipped. Full data
and a random selection are always among the arms; tests/evidence.py has the paper's tables.

Reads    out/proxy.pt, out/ratings.csv, out/ratings-loss.csv, or --selected CSV files of stage 4
Writes   out/results.csv (a row per arm and seed), .md, .png, and out/results-samples.png (all arms
         under the same captions and noise)
Run      python 05_train_eval.py                          five minutes on two cores
         python 05_train_eval.py --selected out/selected-topk-0.5.csv --seeds 1
         python 05_train_eval.py --evaluate DRAWN --reference REAL       FID and CLIP score alone
         torchrun --nproc-per-node 2 -- 05_train_eval.py
"""
import functools
import gzip
import hashlib
import html
import importlib
import re
import sys
import time
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from torchvision.models import inception_v3
from torchvision.transforms import InterpolationMode, functional as image_ops

sys.path.insert(0, str(Path(__file__).parent))             # PYTHONSAFEPATH leaves it out
s1 = importlib.import_module("01_proxy")
s3 = importlib.import_module("03_score")
s4 = importlib.import_module("04_select")

DECAY = 0.4                # share of the steps in which the learning rate falls to zero
DRAWN = 512                # images drawn per arm for the distance, the score and the match
PART = 128                 # pairs at a time when nothing is trained
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student t, 1-9 d.o.f.


# ---- arms ------------------------------------------------------------------------------------
class Arm(NamedTuple):
    """A selection: which ratings, sorted by what, which rule, how much; or a `file` of stage 4."""
    name: str
    ratings: str = ""          # stem of the ratings file in --out, '' where none is needed
    method: str = "random"
    keep: float = 1.0
    settings: dict = {}
    rank_by: str = "rating"
    file: str = ""


# Drawn up from the decile tables of stage 3, before any arm was trained: under eq. 6 the head is
# the informative part (percentiles 0-45 of the toy pairs), under eq. 9 the middle (30-75).
EQ6, EQ9 = "ratings", "ratings-loss"
BELL = {"mean": 0.22, "std": 0.12}                         # of Gsample over the head of eq. 6
ARMS = [Arm("full"), Arm("random 50%", keep=0.5), Arm("random 20%", keep=0.2),
        Arm("eq. 6, Top-K 50%", EQ6, "topk", 0.5),
        Arm("eq. 6, Shift-Gsample 50%", EQ6, "shift-gsample", 0.5),
        Arm("eq. 6, Top-K 20%", EQ6, "topk", 0.2),
        Arm("eq. 6, Gsample 20%", EQ6, "gsample", 0.2, BELL),
        Arm("eq. 9, Top-K 50%", EQ9, "topk", 0.5),
        Arm("eq. 9, Shift-Gsample 50%", EQ9, "shift-gsample", 0.5),
        Arm("eq. 9, Shift-Gsample 20%", EQ9, "shift-gsample", 0.2)]
read_once = functools.cache(s4.read_ratings)               # of each file, for all arms and seeds
check_once = functools.cache(s4.read_record)


def find_file(arm, out):
    """The file that says which pairs an arm has, None for full data and random selections."""
    return Path(arm.file or Path(out) / f"{arm.ratings}.csv") if arm.file or arm.ratings else None


def choose_rows(arm, pairs, out, seed):
    """Corpus rows (n,) of an arm, drawn anew for each seed where its rule draws."""
    path = find_file(arm, out)
    if not path:
        return (np.arange(len(pairs)) if arm.keep == 1 else
                s4.select(np.zeros(len(pairs)), "random", arm.keep, seed=seed)[0])
    check_once(path, out, s1.print0)
    if s4.is_array(path):
        return s4.read_rows(path, len(pairs))
    hashes, rating = read_once(path, "key" if arm.file else arm.rank_by, s1.hash_key)
    lines = np.arange(len(hashes)) if arm.file else s4.select(
        rating, arm.method, arm.keep, seed=seed, **arm.settings)[0]
    rows = s1.find_rows(pairs, hashes[lines])
    if (rows < 0).any():
        key, _ = next(s4.read_keys(path, lines[[rows.argmin()]]))
        raise SystemExit(f"{path}: key {key} is not among the training pairs of proxy.pt")
    return rows


def list_arms(args, pairs, arms=ARMS):
    """Those of `arms` whose ratings exist; or full, random and one per --selected file."""
    read_once.cache_clear()
    check_once.cache_clear()
    if args.selected:
        for file in args.selected:
            if not Path(file).exists():
                raise SystemExit(f"{file} is missing: 04_select.py writes selections and names "
                                 "them")
        stems = [Path(file).stem for file in args.selected]
        names = [stem if stems.count(stem) == 1 and not re.match("(full|real)$|random ", stem)
                 else str(Path(file).resolve()) for stem, file in zip(stems, args.selected)]
        if len(set(names)) < len(names):
            raise SystemExit("--selected names a file twice")
        given = [Arm(name, file=file) for name, file in zip(names, args.selected)]
        counts = sorted({len(choose_rows(arm, pairs, args.out, 0)) for arm in given})
        return [Arm("full"), *(Arm(f"random {n}", keep=n) for n in counts), *given]
    found = []
    for arm in arms:
        file = find_file(arm, args.out)
        header = file.open(encoding="utf-8").readline() if file and file.exists() else ""
        if not file or set(arm.rank_by.split(",")) <= set(header.strip().split(",")):
            found.append(arm)
        else:
            how = "--signal loss" if arm.ratings == EQ9 else "--baselines"
            s1.print0(f"{arm.name} is left out: {file} is missing or has no column {arm.rank_by} "
                      f"(03_score.py {how} writes it)")
    return found


def count_steps(size, args):
    """Of an arm of `size` pairs: half the pairs, half the steps."""
    return args.epochs * (size // args.batch_size)         # eq. 1: the same number of epochs


def foretell(arms, args, settings, pairs):
    """Steps of every arm: all that they read is read here, before any training. Says the cost."""
    sizes = [len(choose_rows(arm, pairs, args.out, args.seed)) for arm in arms]
    if min(sizes) < args.batch_size:
        raise SystemExit(f"{arms[np.argmin(sizes)].name}: {min(sizes)} pairs are fewer than "
                         "--batch-size")
    steps = {arm.name: count_steps(size, args) for arm, size in zip(arms, sizes)}
    total = args.seeds * sum(steps.values())
    with torch.random.fork_rng(devices=[]):                # what follows draws as if this were not
        net = s1.build_proxy(settings, pairs.device)
        for _ in range(2):                                 # in the first round a GPU wakes up
            began = time.monotonic()
            s1.train(net, pairs, 4, args.batch_size, args.lr, args.seed)
    minutes = (time.monotonic() - began) / 4 * total / 60
    s1.print0(f"{args.seeds * len(arms)} models, {total:,} steps in all, about {minutes:.0f} "
              "minutes of training; fewer --seeds or --epochs, or some files with --selected, make "
              "it less")
    return steps


# ---- metrics ---------------------------------------------------------------------------------
def moments(f):
    """Mean (d,) and covariance (d, d) of features (N, d), in float64."""
    f = f.double().cpu().numpy()
    return f.mean(0), np.cov(f, rowvar=False)


def frechet_distance(mu1, S1, mu2, S2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians (Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which
    is symmetric: real numbers throughout, also for singular covariances.
    """
    values, vectors = np.linalg.eigh(S1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T                    # S1^(1/2)
    middle = root @ S2 @ root
    trace = np.sqrt(np.linalg.eigvalsh((middle + middle.T) / 2).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * trace)


def judge_images(judge, images, captions, reference):
    """distance, score and match of images (B, 3, H, W) under a list of B captions."""
    f, image = map(torch.cat, zip(*map(judge.embed_images, images.split(PART))))
    distinct = sorted(set(captions))                                          # M captions
    own = torch.tensor([distinct.index(caption) for caption in captions], device=images.device)
    cosines = image @ judge.embed_captions(distinct).T                        # (B, M)
    return {"distance": frechet_distance(*moments(f), *reference),
            "score": 100 * cosines.gather(1, own[:, None]).mean().item(),
            "match": 100 * (cosines.argmax(1) == own).float().mean().item()}


@torch.no_grad()
def evaluate(net, test, judge, reference, seed):
    """The four numbers of one trained model, and the images it drew (DRAWN, 3, H, W)."""
    n = min(DRAWN, len(test)) // s1.world() * s1.world()
    x, c = test.batch(np.arange(n))
    rng = s1.seeded(x.device, seed, "evaluate")
    eps = torch.randn(x.shape, generator=rng, device=x.device)
    t = (torch.arange(n, device=x.device) + 0.5) / n                          # every level once
    losses = [s1.flow_loss(net, *part) for part in zip(*(v.split(PART) for v in (x, c, t, eps)))]
    images = [s1.sample(net, *part) for part in zip(*(s1.mine(v).split(PART) for v in (c, eps)))]
    images = s1.gather(torch.cat(images))
    numbers = judge_images(judge, images, test.captions[:n], reference)
    return {"held-out": torch.cat(losses).mean().item(), **numbers}, images


# ---- one arm, all arms -----------------------------------------------------------------------
def run_arm(arm, seed, args, settings, pairs, test, judge, reference, progress):
    """Train on the arm's pairs from scratch and evaluate. Returns the result row and images."""
    rows = choose_rows(arm, pairs, args.out, seed)
    torch.manual_seed(seed)                                # all arms start from the same weights
    net = s1.build_proxy(settings, pairs.device)
    chosen = s1.keep_resident(pairs.take(rows), s1.Machine.memory).to(pairs.device)
    steps = count_steps(len(rows), args)
    s1.train(net, chosen, steps, args.batch_size, args.lr, seed, decay=DECAY, progress=progress)
    seconds = progress.seconds
    numbers, images = evaluate(net, test, judge, reference, args.seed)
    shares = {name: float(np.mean(np.array(pairs.strata)[rows] == name))
              for name in s1.STRATUM_COLOURS if name in pairs.strata}
    return {"arm": arm.name, "seed": seed, "pairs": len(rows), "steps": steps,
            "seconds": seconds, **numbers, **shares}, images


def run_all(stem, arms, steps, args, settings, pairs, test, judge, reference):
    """Every arm under every seed; STEM.csv grows with each. Returns rows and samples."""
    weights = [getattr(args, what) for what in WEIGHTS if args.metrics == "standard"]
    inputs = [Path(args.out) / "proxy.pt", *(find_file(arm, args.out) for arm in arms), *weights]
    state = {str(file): s1.digest(file) for file in inputs if file}
    progress = s1.Progress(f"{stem}.progress", "05_train_eval.py",
                           {**vars(args), **state}, args.save_every)
    results = progress.kept.setdefault("results", [])
    samples = progress.kept.setdefault("samples", {})      # {arm: (8, 3, H, W)}
    work = [(seed, arm) for seed in range(args.seed, args.seed + args.seeds) for arm in arms]
    for seed, arm in work[len(results):]:
        progress.expect(sum(steps[arm.name] for _, arm in work[len(results):]), args.batch_size)
        result, images = run_arm(arm, seed, args, settings, pairs, test, judge, reference, progress)
        results.append(result)
        samples.setdefault(arm.name, images[:8].cpu())
        s1.print0(f"seed {seed}  {arm.name:30} " + "  ".join(
            f"{name} {result[name]:.3f}" for name in METRICS) + f"  {result['seconds']:.0f} s")
        s1.write_csv(f"{stem}.csv", list(result), [
            [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in results])
        progress.begin_next()
    return results, samples, progress


# ---- tables and figures ----------------------------------------------------------------------
METRICS = {"held-out": -1, "distance": -1, "score": 1, "match": 1}            # sign: what is better


def interval(values):
    """Mean and half-width of its 95 % interval (Student's t); nan below two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), np.nan
    return values.mean(), T975[min(len(values), 10) - 2] * values.std(ddof=1) / len(values) ** 0.5


def show_interval(mean, half, sign=""):
    return f"{mean:{sign}.3g}" + ("" if np.isnan(half) else f" ± {half:.2g}")


def verdict(difference, half, sign):
    """wins, loses, or tie where the interval of a paired difference holds zero; '' at one seed."""
    if np.isnan(half):
        return ""
    if abs(difference) <= half:
        return "tie"
    return "wins" if difference * sign > 0 else "loses"


def show_difference(values, sign):
    """The interval of paired differences, and their verdict."""
    mean, half = interval(values)
    return f"{show_interval(mean, half, '+')} {verdict(mean, half, sign)}"


def write_markdown(*rows):
    """A table of rows of cells, of which the first is its head."""
    head, *lines = ["| " + " | ".join(map(str, row)) + " |\n" for row in rows]
    return "".join([head, "|---" * len(rows[0]) + "|\n", *lines])


def tabulate(results, arms, floor):
    """Two Markdown tables: means, and paired differences with full and random."""
    values = {arm.name: {name: np.array([row[name] for row in results if row["arm"] == arm.name])
                         for name in results[0] if name != "arm"} for arm in arms}
    strata = [name for name in results[0] if name in s1.STRATUM_COLOURS]
    means = [("arm", "pairs", " / ".join(strata) or "stratum", "seconds", *METRICS)]
    for name, columns in values.items():
        shares = " / ".join(f"{100 * columns[stratum].mean():.0f}" for stratum in strata) or "-"
        means.append((name, columns["pairs"][0], shares, f"{columns['seconds'].mean():.0f}",
                      *(show_interval(*interval(columns[metric])) for metric in METRICS)))
    baselines = [arm.name for arm in arms if not arm.ratings and not arm.file]
    differences = [("arm", "baseline", *METRICS)]
    for name, columns in values.items():
        for baseline in [] if name in baselines else baselines:
            rival = values[baseline]
            if rival["pairs"][0] >= columns["pairs"][0]:
                differences.append((name, baseline, *(
                    show_difference(columns[metric] - rival[metric], sign)
                    for metric, sign in METRICS.items())))
    return (f"Mean and 95 % interval over {len(results) // len(arms)} paired seeds; {floor}\n\n"
            + write_markdown(*means) + "\nPaired differences, arm minus baseline:\n\n"
            + write_markdown(*differences))


def colour_of(arm):
    """Black for full data, grey for random, blue for eq. 6, orange for eq. 9, green for others."""
    if arm.file or arm.rank_by not in ("rating", "instance"):
        return "#009E73"
    return {"": "black" if arm.keep == 1 else "0.6", EQ6: "#0072B2", EQ9: "#D55E00"}.get(
        arm.ratings, "#009E73")


def draw_results(path, results, arms):
    """Every seed as a point, the mean as a bar with its 95 % interval."""
    metrics = [name for name in METRICS if name != "score"]
    figure, axes = plt.subplots(1, len(metrics), figsize=(11, 0.34 * len(arms) + 1), sharey=True)
    for axis, metric in zip(axes, metrics):
        for place, arm in enumerate(arms):
            values = [row[metric] for row in results if row["arm"] == arm.name]
            mean, half = interval(values)
            axis.errorbar(mean, place, xerr=np.nan_to_num(half), fmt="|", color=colour_of(arm),
                          capsize=3, markersize=12)
            axis.plot(values, [place] * len(values), "o", color=colour_of(arm), markersize=4,
                      alpha=0.7)
        better = "more" if METRICS[metric] > 0 else "less"
        axis.set(xlabel=f"{metric} ({better} is better)")
        axis.grid(axis="x", alpha=0.3)
        if better == "less":                               # some selections are worse tenfold
            axis.set_xscale("log")
            axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}",
                           minor_formatter="")
        else:
            axis.set_xlim(left=0)
        axis.tick_params(axis="x", labelsize=8)
    axes[0].set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes[0].invert_yaxis()
    figure.tight_layout()
    s1.save_figure(figure, path)


def draw_samples(path, samples, test):
    """Eight captions: the real image, then what each arm draws for it from the same noise."""
    columns = min(8, len(test))
    rows = {"real": test.batch(np.arange(columns))[0].cpu(), **samples}
    figure, axes = plt.subplots(len(rows), columns, figsize=(10, 1.05 * len(rows) + 0.8))
    for k, (row, (name, images)) in enumerate(zip(axes, rows.items())):
        s1.show_pictures(row, images, test.captions[:columns] if k == 0 else [""] * columns)
        row[0].text(-0.15, 0.5, name, ha="right", va="center", transform=row[0].transAxes)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    s1.save_figure(figure, path)


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = s1.options(
        __doc__, batch_size=(64, "pairs, all processes"), epochs=(16, "over every selection"),
        seeds=(3, "paired repetitions"), lr=(5e-3, "of the downstream model"))
    parser.add_argument("--selected", nargs="+", default=[], help="CSV files of stage 4 as arms")
    parser.add_argument("--metrics", choices=["mini", "standard"], default="mini",
                        help="own small network, or FID's Inception and OpenAI's CLIP")
    for what in ("inception", "clip", "clip-vocab"):
        parser.add_argument(f"--{what}", help=f"local {what} file of the standard metrics")
    parser.add_argument("--evaluate", help="only measure these images, in any layout of --data")
    parser.add_argument("--reference", help="real images, or .npz statistics, for their FID")
    parser.add_argument("--save-statistics", help=".npz for mu and sigma of --evaluate")
    args = s1.parse(parser, argv, epochs=1, seeds=2, batch_size=16)
    if args.evaluate:
        args.batch_size = 0                                # nothing is trained
    elif args.reference or args.save_statistics:
        parser.error("--reference and --save-statistics need the images of --evaluate")
    if args.save_statistics and not args.save_statistics.lower().endswith(".npz"):
        parser.error(f"--save-statistics {args.save_statistics} has to end in .npz")
    return args


def main(args, device, arms=ARMS, name="results"):
    if args.evaluate:
        return evaluate_files(args, device)
    settings, _ = s1.load_proxy(args.out)
    pairs, val, test = s1.load_data(settings, device)
    real = [k for k, name in enumerate(pairs.strata) if not name.startswith("planted-")]
    if args.selected and len(real) < len(pairs.strata):    # as in the selections of stage 4
        s1.print0(f"{len(pairs) - len(real)} pairs with planted dirt are in no arm")
        if any(file.lower().endswith(".npy") for file in args.selected):
            raise SystemExit("a .npy does not fit a corpus with planted dirt: use a CSV of keys")
        pairs = pairs.take(real)
    arms, stem = list_arms(args, pairs, arms), Path(args.out) / name
    steps = foretell(arms, args, settings, pairs)
    judge = (StandardJudge(args, device) if args.metrics == "standard" else
             s3.train_contrast(test, 20 if args.smoke else s3.CONTRAST_STEPS, args.seed))
    (x, _), (other, _) = (split.batch(np.arange(min(DRAWN, len(split)))) for split in (test, val))
    reference = moments(torch.cat([judge.embed_images(part)[0] for part in x.split(PART)]))
    real = judge_images(judge, other, val.captions[:len(other)], reference)
    floor = (f"{len(other)} real images that the judge has not seen: score {real['score']:.1f}, "
             f"match {real['match']:.0f} %, distance {real['distance']:.3f}")
    s1.print0(floor)
    pairs = s1.keep_decoded(pairs, args.out)
    results, samples, progress = run_all(stem, arms, steps, args, settings, pairs, test, judge,
                                         reference)
    table = tabulate(results, arms, floor)
    if s1.rank() == 0:
        with s1.atomic_file(f"{stem}.md") as file:
            file.write(table)
        draw_results(f"{stem}.png", results, arms)
        draw_samples(f"{stem}-samples.png", samples, test)
    progress.finish()
    s1.print0(f"\n{table}\nwrote {stem}.csv, .md, .png and {stem}-samples.png")


# ---- standard metrics: FID's Inception-v3, OpenAI's CLIP -------------------------------------
WEIGHTS = {                # what: (address, SHA-256, the option that takes a local file instead)
    "inception": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    "clip": ("https://openaipublic.azureedge.net/clip/models/40d365715913c9da98579312b702a82c18be21"
             "9cc2a73407c4526f58eba950af/ViT-B-32.pt",
             "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "clip_vocab": ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
                   "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")}


def find_weights(what, path):
    """The file given, or the public one, fetched once into torch's cache and checked whole."""
    if path:
        if not Path(path).is_file():
            raise SystemExit(f"--{what.replace('_', '-')} {path}: no such file")
        return Path(path)
    address, digest = WEIGHTS[what]
    file = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(file), hash_prefix=digest)
        except (OSError, RuntimeError) as error:
            raise SystemExit(f"{address} could not be fetched ({error}): get the file elsewhere "
                             f"and name it with --{what.replace('_', '-')}")
    with open(file, "rb") as data:
        if hashlib.file_digest(data, "sha256").hexdigest() != digest:
            raise SystemExit(f"{file} is not the public file (SHA-256 differs): delete it")
    return file


def repool(block, pool):
    """Let a block's pool branch see pool(x) where torchvision averages over padding zeros too."""
    held = []
    block.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, inputs: (pool(held.pop()),))


def build_inception():
    """torchvision's Inception-v3 with the pooling of the FID network of 2015, up to 2048 features.

    Eight average pools do not count padding, and the last block has a max pool (pytorch-fid).
    """
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False,
                       init_weights=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        repool(getattr(net, f"Mixed_{name}"), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    repool(net.Mixed_7c, nn.MaxPool2d(3, 1, 1))
    return net.eval().requires_grad_(False)


def load_strictly(net, state, path):
    """Load weights of which none may be missing, left over or of another shape."""
    counters = {name: value for name, value in net.state_dict().items()
                if name.endswith("num_batches_tracked")}
    try:
        net.load_state_dict({**counters, **state})
    except RuntimeError as error:
        raise SystemExit(f"{path} holds other weights: {str(error).splitlines()[1].strip()[:200]}")
    return net


def clip_tower(width, depth):
    """`depth` pre-norm transformer blocks, 64 numbers a head, with OpenAI's fast GELU."""
    if width % 64 or width > 1024:
        raise SystemExit(f"a CLIP of width {width} is none of OpenAI's, whose heads have 64 "
                         "numbers: how many this one's have, its file does not say")
    block = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True,
        activation=lambda h: h * torch.sigmoid(1.702 * h))
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


CLIP_NAMES = {             # of the parts of a block: OpenAI's, torch's
    "resblocks": "layers", "ln_1": "norm1", "attn": "self_attn", "ln_2": "norm2",
    "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}


def rename_parts(_, state, *__):
    """Before a state dict of OpenAI's is loaded: the names that torch gives to the same parts."""
    for name in list(state):
        named = re.sub("|".join(CLIP_NAMES), lambda part: CLIP_NAMES[part[0]], name)
        state[named] = state.pop(name)


class ClipImages(nn.Module):
    """Vision transformer: pixels (B, 3, 224, 224), normalised -> (B, embedding)."""

    def __init__(self, width, depth, patch, tokens, embedding):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = clip_tower(width, depth)
        self.proj = nn.Parameter(torch.zeros(width, embedding))

    def forward(self, x):
        h = self.conv1(x).flatten(2).transpose(1, 2)                          # (B, P, D)
        h = torch.cat([self.class_embedding.expand(len(h), 1, -1), h], 1)
        h = self.transformer(self.ln_pre(h + self.positional_embedding))      # (B, 1 + P, D)
        return self.ln_post(h[:, 0]) @ self.proj                              # (B, embedding)


class Clip(nn.Module):
    """OpenAI's CLIP with a vision transformer; all sizes are read off the state dict."""

    def __init__(self, state):
        super().__init__()
        shape = {name: tuple(value.shape) for name, value in state.items()}
        depths = [1 + max(int(name.removeprefix(part).split(".")[0]) for name in shape
                          if name.startswith(part))
                  for part in ("visual.transformer.resblocks.", "transformer.resblocks.")]
        width, _, patch, _ = shape["visual.conv1.weight"]
        self.visual = ClipImages(width, depths[0], patch, shape["visual.positional_embedding"][0],
                                 shape["visual.proj"][1])
        self.token_embedding = nn.Embedding(*shape["token_embedding.weight"])
        self.positional_embedding = nn.Parameter(torch.zeros(shape["positional_embedding"]))
        self.transformer = clip_tower(shape["positional_embedding"][1], depths[1])
        self.ln_final = nn.LayerNorm(shape["positional_embedding"][1])
        self.text_projection = nn.Parameter(torch.zeros(shape["text_projection"]))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.register_load_state_dict_pre_hook(rename_parts)

    def encode_text(self, ids):
        """Token ids (B, 77) -> (B, embedding), read at the end-of-text token, the largest id."""
        mask = torch.ones(2 * ids.shape[1:], dtype=torch.bool, device=ids.device).triu(1)
        h = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        rows = torch.arange(len(ids), device=ids.device)
        return self.ln_final(h)[rows, ids.argmax(1)] @ self.text_projection


def load_state(path):
    """A state dict from a plain file of tensors, of which nothing is run, or from a TorchScript
    archive such as ViT-B-32.pt.

    torch.jit.load runs no Python that an archive holds, but TorchScript that asks to be run when it
    is loaded: the public archive's hash is known, and who names one with --clip has to trust it.
    """
    try:
        archive = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
        if archive and any(name.endswith("/constants.pkl") for name in archive.namelist()):
            if damaged := archive.testzip():               # torch.jit.load looks at no checksum
                raise ValueError(f"{damaged} in it is damaged")
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                state = torch.jit.load(path, map_location="cpu").state_dict()  # deprecated
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{path} is no file of weights: {' '.join(str(error).split())[:120]}")
    named = state.items() if isinstance(state, dict) else []
    tensors = {name: value for name, value in named if torch.is_tensor(value)}
    if not tensors:
        raise SystemExit(f"{path} holds no weights by name: save the network's state_dict alone")
    return tensors


@functools.cache
def character_class(kind):
    """The code points of Unicode category `kind` (L, N), as ranges for a regular expression."""
    member = [unicodedata.category(chr(k)).startswith(kind) for k in range(sys.maxunicode + 1)]
    edges = np.flatnonzero(np.diff([0, *member, 0]))
    return "".join(f"{re.escape(chr(a))}-{re.escape(chr(b - 1))}" for a, b in edges.reshape(-1, 2))


class ClipTokenizer:
    """CLIP's byte-pair encoding: captions -> ids (B, 77), start and end of text included.

    Without ftfy: Unicode is composed and curly quotes straightened, broken encodings stay broken.
    """

    def __init__(self, path):
        data = Path(path).read_bytes()
        try:
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise SystemExit(f"{path} is no vocabulary of CLIP: {error}")
        merges = [tuple(line.split()) for line in text.split("\n")[1:48895] if line]
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in plain]
        symbols = [chr(byte) for byte in plain] + [chr(256 + k) for k in range(len(rest))]
        self.symbol = dict(zip(plain + rest, symbols))
        names = symbols + [f"{s}</w>" for s in symbols] + ["".join(merge) for merge in merges]
        self.ids = {name: k for k, name in enumerate(names)}
        self.order = {merge: k for k, merge in enumerate(merges)}
        letters, numbers = character_class("L"), character_class("N")
        self.words = re.compile(f"'s|'t|'re|'ve|'m|'ll|'d|[{letters}]+|[{numbers}]|"
                                f"[^\\s{letters}{numbers}]+", re.IGNORECASE)

    def merge(self, word):
        """Ids of one word: the earliest learnt merge first, until none is left."""
        parts = [self.symbol[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in self.order]:
            first, second = min(pairs, key=self.order.get)
            spaced = "".join(f" {part} " for part in parts)
            parts = spaced.replace(f" {first}  {second} ", f" {first}{second} ").split()
        return [self.ids[part] for part in parts]

    def encode(self, caption):
        """Ids of a caption, without start and end."""
        text = caption.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))
        text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
        text = re.sub(r"<\|(startoftext|endoftext)\|>", " ", " ".join(text.split()).lower())
        return [number for word in self.words.findall(text) for number in self.merge(word)]

    def __call__(self, captions, length=77):
        table = torch.zeros(len(captions), length, dtype=torch.int64)
        for row, caption in zip(table, captions):
            ids = self.encode(caption)[:length - 2]
            row[:len(ids) + 2] = torch.tensor([len(self.ids), *ids, len(self.ids) + 1])
        return table


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class StandardJudge:
    """The interface of stage 3's `Contrast`, with the networks of FID and of the CLIP score."""

    def __init__(self, args, device):
        torch.backends.cudnn.allow_tf32 = False            # else features differ between GPUs
        torch.set_float32_matmul_precision("highest")      # (the arms train without TF32, too)
        paths = {what: find_weights(what, getattr(args, what)) for what in WEIGHTS}
        self.inception = load_strictly(build_inception(), load_state(paths["inception"]),
                                       paths["inception"]).to(device)
        self.inception.fc = nn.Identity()                  # the 2048 features before the classes
        state = {name: value.float() for name, value in load_state(paths["clip"]).items()
                 if value.is_floating_point()}             # not its three sizes
        try:
            clip = Clip(state)
        except (LookupError, ValueError, TypeError):
            raise SystemExit(f"{paths['clip']} is not a CLIP with a vision transformer")
        self.clip = load_strictly(clip, state, paths["clip"]).to(device).eval()
        self.tokenize = ClipTokenizer(paths["clip_vocab"])
        tokens, rows = len(self.tokenize.ids) + 2, len(self.clip.token_embedding.weight)
        if tokens != rows:
            raise SystemExit(f"{paths['clip_vocab']} has {tokens} tokens, {paths['clip']} has "
                             f"{rows} rows for them: give the vocabulary that it was trained with")
        side, patch = self.clip.visual.positional_embedding, self.clip.visual.conv1.kernel_size[0]
        self.size, self.device = round((len(side) - 1) ** 0.5) * patch, device
        s1.print0(f"CLIP ViT, width {side.shape[1]}, patch {patch}, {self.size} px: score = 100 "
                  "cos (other tools print 2.5 max(cos, 0)); FID with the Inception-v3 of 2015")
        if args.clip:
            s1.print0(f"{args.clip} does not say with which activation it was trained: QuickGELU "
                      "is taken, as in OpenAI's; weights trained with plain GELU get another score")

    @torch.no_grad()
    def embed_pixels(self, images):
        """Features (B, 2048) and unit vectors (B, E) of images, a list of (3, H, W) uint8."""
        large = [F.interpolate(image[None].to(self.device) / 255, (299, 299), mode="bilinear",
                               align_corners=False) for image in images]
        crops = [image_ops.center_crop(image_ops.resize(
            image_ops.to_pil_image(image), self.size, InterpolationMode.BICUBIC), self.size)
            for image in images]
        crops = torch.stack([image_ops.normalize(image_ops.to_tensor(crop), CLIP_MEAN, CLIP_STD)
                             for crop in crops]).to(self.device)
        f = self.inception(2 * torch.cat(large) - 1)
        if not f.isfinite().all():
            raise SystemExit("the features are not finite: look at the images")
        return f, F.normalize(self.clip.visual(crops), dim=1)

    def embed_images(self, x):
        """The same for images (B, 3, H, W) in [-1, 1], rounded as a saved file would be."""
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        parts = [self.embed_pixels(list(part)) for part in pixels.split(50)]
        return torch.cat([f for f, _ in parts]), torch.cat([unit for _, unit in parts])

    @torch.no_grad()
    def embed_captions(self, captions):
        """Unit vectors (B, E) of a list of captions."""
        ids = self.tokenize(captions).to(self.device)
        return F.normalize(torch.cat([self.clip.encode_text(part) for part in ids.split(256)]),
                           dim=1)


# ---- the evaluation as a tool: nothing is trained --------------------------------------------
class Moments:
    """Mean and covariance of features in one pass, float64, over all processes."""

    def __init__(self, width):
        self.sums = torch.zeros(width + 1, width + 1, dtype=torch.float64)    # of [1 f]^T [1 f]

    def add(self, f):                                                         # (B, d)
        f = F.pad(f.double().cpu(), (1, 0), value=1)
        self.sums += f.T @ f

    def finish(self):
        """Count, mean (d,) and covariance (d, d) with N - 1."""
        sums = s1.add_up(self.sums.clone()).numpy()
        n, mu = sums[0, 0], sums[0, 1:] / sums[0, 0]
        if n < 2:
            raise SystemExit(f"{n:.0f} image(s): a covariance needs at least two")
        return int(n), mu, (sums[1:, 1:] - n * np.outer(mu, mu)) / (n - 1)


def measure_images(judge, path, out, batch_size=50):
    """Moments of all images in `path`, and the cosines of the captioned ones of all processes."""
    shards, skipped = s1.open_pairs(path, 0, 0, out), {}
    found, cosines, rows = Moments(2048), [], np.arange(s1.rank(), len(shards), s1.world())
    for part in np.split(rows, range(batch_size, len(rows), batch_size)):
        batch = []
        for key, files in map(shards.read, part):
            try:
                image = s1.open_image(files[s1.of_types(files, s1.IMAGE_TYPES)[0]])
                captions, _ = s1.list_captions(files)
                batch.append((image_ops.pil_to_tensor(image), (captions or [""])[0]))
            except Exception:                              # decoders of broken files raise anything
                skipped["unreadable image", key] = 1
        if batch:
            f, unit = judge.embed_pixels([image for image, _ in batch])
            found.add(f)
            named = [k for k, (_, caption) in enumerate(batch) if caption]
            text = judge.embed_captions([batch[k][1] for k in named]) if named else unit[:0]
            cosines += (unit[named] * text).sum(1).tolist()
    s1.print_skipped(dict.fromkeys(s1.gather_lists([*skipped])))
    return found, s1.gather_lists(cosines)


def read_statistics(path):
    """mu (2048,) and sigma (2048, 2048) of an .npz, as pytorch-fid writes it."""
    try:
        with np.load(path, allow_pickle=False) as saved:
            mu, S = saved["mu"], saved["sigma"]
        sound = S.shape == (2048, 2048) and mu.shape == (2048,) and np.isfinite(S.sum() + mu.sum())
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        sound = False
    if not sound:
        raise SystemExit(f"{path} is no .npz of statistics: mu (2048 numbers) and sigma (2048 x "
                         "2048) are needed, as pytorch-fid and --save-statistics write them")
    return mu, S


def evaluate_files(args, device):
    """FID of --evaluate against --reference, and the CLIP score of the captioned images."""
    for path in filter(None, (args.evaluate, args.reference)):
        s1.list_files(path, None, {})
    saved = (args.reference or "").lower().endswith(".npz") and read_statistics(args.reference)
    if args.save_statistics and not Path(args.save_statistics).absolute().parent.is_dir():
        raise SystemExit(f"--save-statistics {args.save_statistics}: there is no such folder")
    judge = StandardJudge(args, device)
    found, cosines = measure_images(judge, args.evaluate, args.out)
    if cosines:
        error = np.std(cosines) / len(cosines) ** 0.5
        s1.print0(f"CLIP score {100 * np.mean(cosines):.3f} +- {100 * error:.3f} (standard error) "
                  f"of {len(cosines)} captioned images")
    if args.save_statistics or args.reference:
        n, mu, S = found.finish()
    else:
        s1.print0(f"{s1.add_up(found.sums[0, 0]):.0f} images; --reference would give their FID"
                  + ("" if cosines else ", captions beside them a CLIP score"))
    if args.save_statistics and s1.rank() == 0:
        with s1.atomic_file(args.save_statistics, "wb") as file:
            np.savez(file, mu=mu, sigma=S, count=n)
    if args.reference:
        reference = saved or measure_images(judge, args.reference, args.out)[0].finish()[1:]
        fid = max(frechet_distance(mu, S, *reference), 0.0)
        few = " (fewer images than 2049: the bias of a small sample outweighs most differences)"
        s1.print0(f"FID {fid:.4f} of {n} images{few if n < 2049 else ''}")


if __name__ == "__main__":
    s1.launch(main, parse_args())
