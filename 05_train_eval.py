"""Stage 5 of 5: train the same model from scratch on every selection and compare what it draws.

    eq. 1    find S in D with M(theta(S)) >~ M(theta(D)) at the same number of epochs

An arm is a selection: half the pairs take half the steps. All arms of a seed share initial
weights, evaluation captions and noise, so their differences are paired; a seed also redraws the
random selections. Measured on clean pairs that no other stage has used:

    held-out   mean flow loss under fixed noise
    distance   Frechet distance between features of drawn and of real images
    score      100 cos between drawn image and its caption, as a CLIP score
    match      share of drawn images whose own caption is the nearest of all distinct captions

Features and cosines come from a small contrastive image-text network that this script trains on
the validation pairs, on noised and blurred copies too: its distance is not FID and its score not
OpenAI's CLIP score. Full data and a random selection are always among the arms.

Reads    out/proxy.pt, out/ratings.csv, out/ratings-loss.csv, or --selected CSV files of stage 4
Writes   out/results.csv (a row per arm and seed), out/results.md, out/results.png,
         out/samples.png (all arms under the same captions and noise)
Run      python 05_train_eval.py                          five minutes on two cores
         python 05_train_eval.py --selected out/selected-topk-0.5.csv --seeds 1
         torchrun --nproc-per-node 2 05_train_eval.py
"""
import csv
import importlib
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torchvision.transforms.functional import gaussian_blur

proxy_stage = importlib.import_module("01_proxy")
score_stage = importlib.import_module("03_score")
select_stage = importlib.import_module("04_select")

DECAY = 0.4                # share of the steps in which the learning rate falls to zero
DRAWN = 512                # images drawn per arm for the distance, the score and the match
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student t, 1-9 d.o.f.


# ---- arms ------------------------------------------------------------------------------------
class Arm(NamedTuple):
    """A selection: which ratings, which rule, how much. `file` holds keys instead of a rule."""
    name: str
    ratings: str = ""          # stem of the ratings file in --out, '' where none is needed
    method: str = "random"
    keep: float = 1.0
    settings: dict = {}
    file: str = ""


# Drawn up from the decile tables of stage 3, before any downstream run: under eq. 6 the head is
# the informative part (percentiles 0-45 of the toy pairs), under eq. 9 the middle (30-75).
ARMS = [
    Arm("full"),
    Arm("random 50%", keep=0.5),
    Arm("random 20%", keep=0.2),
    Arm("eq. 6, Top-K 50%", "ratings", "topk", 0.5),
    Arm("eq. 6, Shift-Gsample 50%", "ratings", "shift-gsample", 0.5),
    Arm("eq. 6, Top-K 20%", "ratings", "topk", 0.2),
    Arm("eq. 6, Gsample 20%", "ratings", "gsample", 0.2, {"mean": 0.22, "std": 0.12}),
    Arm("eq. 9, Top-K 50%", "ratings-loss", "topk", 0.5),
    Arm("eq. 9, Shift-Gsample 50%", "ratings-loss", "shift-gsample", 0.5),
    Arm("eq. 9, Shift-Gsample 20%", "ratings-loss", "shift-gsample", 0.2),
]


def choose_rows(arm, pairs, out, seed):
    """Corpus rows (n,) of an arm, drawn anew for each seed where its rule draws."""
    if arm.keep == 1 and not arm.file:
        return np.arange(len(pairs))
    if not arm.ratings and not arm.file:
        return select_stage.select(np.zeros(len(pairs)), "random", arm.keep, seed=seed)
    path = Path(arm.file or Path(out) / f"{arm.ratings}.csv")
    if arm.file:
        keys = select_stage.read_column(path, 0, str)
    else:
        keys, rating, _ = select_stage.read_ratings(path, "rating")
        keys = keys[select_stage.select(rating, arm.method, arm.keep, seed=seed, **arm.settings)]
    row_of = {key: row for row, key in enumerate(pairs.keys)}
    unknown = next((key for key in keys if key not in row_of), None)
    if unknown is not None:
        raise SystemExit(f"{path}: key {unknown} is not among the training pairs of proxy.pt")
    return np.array([row_of[key] for key in keys])


def list_arms(args, pairs):
    """The default arms, those whose ratings exist; or full, random and one per --selected file."""
    if args.selected:
        counts = {file: len(select_stage.read_column(file, 0, str)) for file in args.selected}
        return [Arm("full"), *(Arm(f"random {n}", keep=n) for n in sorted(set(counts.values()))),
                *(Arm(Path(file).stem, file=file) for file in args.selected)]
    found = [arm for arm in ARMS
             if not arm.ratings or (Path(args.out) / f"{arm.ratings}.csv").exists()]
    for stem in sorted({arm.ratings for arm in ARMS} - {arm.ratings for arm in found}):
        proxy_stage.print0(f"{args.out}/{stem}.csv is missing: its arms are left out")
    return found


# ---- the judge: features and cosines ---------------------------------------------------------
class Judge(nn.Module):
    """Image -> features (B, 64) -> unit vector (B, 32); caption -> unit vector; cosine compares."""

    def __init__(self, size):
        super().__init__()
        widths = [3] + [32 * 2 ** k for k in range(int(math.log2(size // 4)) + 1)]
        convolutions = [layer for a, b in zip(widths[:-1], widths[1:]) for layer in
                        (nn.Conv2d(a, b, 3, stride=1 if a == 3 else 2, padding=1), nn.GELU())]
        self.image = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                   nn.Linear(16 * widths[-1], 64))
        self.image_head = nn.Sequential(nn.GELU(), nn.Linear(64, 32))
        self.word = nn.Embedding(proxy_stage.VOCABULARY, 64, padding_idx=0)
        self.text = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def embed_images(self, x):
        """Features (B, 64) and unit vectors (B, 32) of images (B, 3, H, W)."""
        f = self.image(x)
        return f, F.normalize(self.image_head(f), dim=1)

    def embed_captions(self, c):
        """Unit vectors (B, 32) of captions (B, T)."""
        return F.normalize(self.text(self.word(c).sum(1)), dim=1)


def degrade(x, rng):
    """A third of the images as they are, a third noised, a third blurred."""
    kind = torch.randint(3, (len(x), 1, 1, 1), generator=rng, device=x.device)
    amount = 0.6 * torch.rand(kind.shape, generator=rng, device=x.device)
    noised = x + amount * torch.randn(x.shape, generator=rng, device=x.device)
    return torch.where(kind == 0, x, torch.where(kind == 1, noised, gaussian_blur(x, 5, 1.0)))


def train_judge(pairs, steps, seed, batch_size=128):
    """Contrastive training; pairs of the batch that share a caption are all right answers."""
    device, batch_size = pairs.images.device, min(batch_size, len(pairs))
    judge = Judge(pairs.images.shape[-1]).to(device)
    opt = proxy_stage.adamw(judge, 2e-3)
    for k in range(steps):
        opt.param_groups[0]["lr"] = 2e-3 * (1 - k / steps)
        rng = proxy_stage.seeded(device, seed, "judge", k)
        x, c = pairs.batch(proxy_stage.batch_rows(len(pairs), batch_size, k, seed))
        same = (c[:, None] == c[None]).all(2).float()                         # (B, B)
        cosines = judge.embed_images(degrade(x, rng))[1] @ judge.embed_captions(c).T  # (B, B)
        logits, right = judge.scale.exp() * cosines, same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
    return judge.eval().requires_grad_(False)


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


def judge_images(judge, images, c, reference):
    """distance, score and match of images (B, 3, H, W) under captions c (B, T)."""
    f, image = judge.embed_images(images)
    distinct, own = c.unique(dim=0, return_inverse=True)                      # (M, T), (B,)
    cosines = image @ judge.embed_captions(distinct).T                        # (B, M)
    return {"distance": frechet_distance(*moments(f), *reference),
            "score": 100 * cosines.gather(1, own[:, None]).mean().item(),
            "match": 100 * (cosines.argmax(1) == own).float().mean().item()}


@torch.no_grad()
def evaluate(net, test, judge, reference, seed):
    """The four numbers of one trained model, and the images it drew (DRAWN, 3, H, W)."""
    n = min(DRAWN, len(test)) // proxy_stage.world() * proxy_stage.world()
    x, c = test.batch(np.arange(n))
    rng = proxy_stage.seeded(x.device, seed, "evaluate")
    eps = torch.randn(x.shape, generator=rng, device=x.device)
    t = (torch.arange(n, device=x.device) + 0.5) / n                          # every level once
    held_out = proxy_stage.flow_loss(net, x, c, t, eps).mean().item()
    images = torch.cat([proxy_stage.sample(net, *part) for part in zip(
        proxy_stage.mine(c).split(128), proxy_stage.mine(eps).split(128))])
    images = proxy_stage.gather(images)
    return {"held-out": held_out, **judge_images(judge, images, c, reference)}, images


# ---- one arm, all arms -----------------------------------------------------------------------
def run_arm(arm, seed, args, settings, pairs, test, judge, reference):
    """Train on the arm's pairs from scratch and evaluate. Returns the result row and images."""
    rows = choose_rows(arm, pairs, args.out, seed)
    torch.manual_seed(seed)                                # all arms start from the same weights
    net = proxy_stage.build_proxy(settings, pairs.images.device)
    steps, began = args.epochs * (len(rows) // args.batch_size), time.time()
    if not steps:
        raise SystemExit(f"{arm.name}: {len(rows)} pairs are fewer than --batch-size")
    proxy_stage.train(net, pairs.take(rows), steps, args.batch_size, args.lr, seed, decay=DECAY)
    seconds = time.time() - began
    numbers, images = evaluate(net, test, judge, reference, args.seed)
    shares = {name: np.mean(np.array(pairs.strata)[rows] == name)
              for name in proxy_stage.STRATUM_COLOURS if name in pairs.strata}
    return {"arm": arm.name, "seed": seed, "pairs": len(rows), "steps": steps,
            "seconds": seconds, **numbers, **shares}, images


def run_all(arms, args, settings, pairs, test, judge, reference):
    """Every arm under every seed; out/results.csv grows with each. Returns rows and samples."""
    results, samples = [], {}
    for seed in range(args.seed, args.seed + args.seeds):
        for arm in arms:
            result, images = run_arm(arm, seed, args, settings, pairs, test, judge, reference)
            results.append(result)
            samples.setdefault(arm.name, images[:8].cpu())
            proxy_stage.print0(f"seed {seed}  {arm.name:26} " + "  ".join(
                f"{name} {result[name]:.3f}" for name in METRICS)
                + f"  {result['seconds']:.0f} s")
            proxy_stage.write_csv(Path(args.out) / "results.csv", list(result), [
                [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()]
                for row in results])
    return results, samples


# ---- tables and figures ----------------------------------------------------------------------
METRICS = {"held-out": -1, "distance": -1, "score": 1, "match": 1}            # sign: what is better


def interval(values):
    """Mean and half-width of its 95 % interval (Student's t); nan below two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), math.nan
    return values.mean(), T975[min(len(values), 10) - 2] * values.std(ddof=1) / len(values) ** 0.5


def show_interval(mean, half, sign=""):
    return f"{mean:{sign}.3g}" + ("" if math.isnan(half) else f" ± {half:.2g}")


def verdict(difference, half, sign):
    """wins, loses, or tie where the interval of a paired difference holds zero; '' at one seed."""
    if math.isnan(half):
        return ""
    if abs(difference) <= half:
        return "tie"
    return "wins" if difference * sign > 0 else "loses"


def tabulate(results, arms, floor):
    """Two Markdown tables: means, and paired differences with full and random."""
    values = {arm.name: {name: np.array([row[name] for row in results if row["arm"] == arm.name])
                         for name in results[0] if name != "arm"} for arm in arms}
    strata = [name for name in results[0] if name in proxy_stage.STRATUM_COLOURS]
    seeds = len(results) // len(arms)
    lines = [f"Mean and 95 % interval over {seeds} paired seeds; {floor}", "",
             "| arm | pairs | " + " / ".join(strata) + " | seconds | " + " | ".join(METRICS) + " |",
             "|---" * (4 + len(METRICS)) + "|"]
    for name, columns in values.items():
        shares = " / ".join(f"{100 * columns[stratum].mean():.0f}" for stratum in strata)
        cells = [show_interval(*interval(columns[metric])) for metric in METRICS]
        lines.append(f"| {name} | {columns['pairs'][0]} | {shares} | "
                     f"{columns['seconds'].mean():.0f} | " + " | ".join(cells) + " |")
    lines += ["", "Paired differences, arm minus baseline:", "",
              "| arm | baseline | " + " | ".join(METRICS) + " |", "|---" * (2 + len(METRICS)) + "|"]
    baselines = [arm.name for arm in arms if not arm.ratings and not arm.file]
    compared = [(name, baseline) for name in values if name not in baselines
                for baseline in baselines
                if values[baseline]["pairs"][0] >= values[name]["pairs"][0]]
    for name, baseline in compared:
        cells = []
        for metric, sign in METRICS.items():
            mean, half = interval(values[name][metric] - values[baseline][metric])
            cells.append(f"{show_interval(mean, half, '+')} {verdict(mean, half, sign)}")
        lines.append(f"| {name} | {baseline} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def colour_of(arm):
    """Black for full data, grey for random, blue for eq. 6, orange for eq. 9, green for files."""
    if arm.file:
        return "#009E73"
    if not arm.ratings:
        return "black" if arm.keep == 1 else "0.6"
    return "#0072B2" if arm.ratings == "ratings" else "#D55E00"


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
        axis.set_xlim(left=0 if metric != "held-out" else None)
    axes[0].set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes[0].invert_yaxis()
    figure.tight_layout()
    proxy_stage.save_figure(figure, path)


def draw_samples(path, samples, test):
    """Eight captions: the real image, then what each arm draws for it from the same noise."""
    rows = {"real": test.batch(np.arange(8))[0].cpu(), **samples}
    figure, axes = plt.subplots(len(rows), 8, figsize=(10, 1.05 * len(rows) + 0.8))
    for k, (row, (name, images)) in enumerate(zip(axes, rows.items())):
        proxy_stage.show_pictures(row, images, test.captions[:8] if k == 0 else [""] * 8)
        row[0].text(-0.15, 0.5, name, ha="right", va="center", transform=row[0].transAxes)
    figure.subplots_adjust(wspace=0.05, hspace=0.05)
    proxy_stage.save_figure(figure, path)


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = proxy_stage.options(
        __doc__, batch_size=(64, "pairs, all processes"), epochs=(16, "over every selection"),
        seeds=(3, "paired repetitions"), lr=(5e-3, "of the downstream model"),
        judge_steps=(500, "of the network behind distance, score and match"))
    parser.add_argument("--selected", nargs="+", default=[], help="CSV files of stage 4 as arms")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs, args.seeds, args.judge_steps, args.batch_size = 1, 2, 20, 16
    return args


def main(args):
    device = proxy_stage.start(args)
    settings, _ = proxy_stage.load_proxy(args.out)
    pairs, val, test = proxy_stage.load_data(settings, device)
    arms, out = list_arms(args, pairs), Path(args.out)
    judge = train_judge(val, args.judge_steps, args.seed)
    x, c = test.batch(np.arange(min(DRAWN, len(test))))
    reference = moments(judge.embed_images(x)[0])
    other = val.batch(np.arange(min(DRAWN, len(val))))
    real, again = judge_images(judge, x, c, reference), judge_images(judge, *other, reference)
    floor = (f"real images: score {real['score']:.1f}, match {real['match']:.0f} %, and "
             f"{len(other[0])} real images of the validation split are at distance "
             f"{again['distance']:.3f}")
    proxy_stage.print0(floor)
    results, samples = run_all(arms, args, settings, pairs, test, judge, reference)
    table = tabulate(results, arms, floor)
    if proxy_stage.rank() == 0:
        (out / "results.md").write_text(table, encoding="utf-8")
        draw_results(out / "results.png", results, arms)
        draw_samples(out / "samples.png", samples, test)
    proxy_stage.print0(f"\n{table}\nwrote {out}/results.csv, .md, .png and samples.png")


if __name__ == "__main__":
    main(parse_args())
