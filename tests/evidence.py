"""The evidence beyond stage 5's ten arms: one command per question, one Markdown table each.

    python tests/evidence.py main        every rule on both signals, and rankings without a rater
                                         (Table 1)
    python tests/evidence.py group       without the Group MLP (Table 4)
    python tests/evidence.py retention   shares from 10 to 50 % (Fig. 1)
    python tests/evidence.py forward     does the rater add anything on pairs that no proxy saw?
    python tests/evidence.py signals     eq. 6, its noise, eq. 9, and the validation set
    python tests/evidence.py batches     does W_batch learn from batches that really differ?
    python tests/evidence.py time        time to quality, and the spread over seeds (Fig. 6)
    python tests/evidence.py models      other downstream models, and LoRA (Table 2)
    python tests/evidence.py corpora     other corpora (Table 3)

The first three are stage 5 with other arms, with all options of stage 5: they compare the ratings
in --out (those of `main` after 03_score.py --baselines) and write out/results-NAME.csv, .md, .png.
Of the others every seed redraws the corpus and trains its own proxies, rater and downstream models;
the evaluation pairs and the judge are those of seed 0. "±" is the half-width of a 95 % interval;
after the semicolon, the paired difference with the baseline named above the table. What is trained
is kept in --out (delete it to begin anew), and shared. On one core forward takes 18 minutes,
signals 28, time 10, models 23, corpora 21, batches 8.
"""
import argparse
import contextlib
import functools
import os
import re
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib import pyplot as plt

import common
from common import CPU, OTHERS, RULES, areas, collect, head, ruled, s1, s2, s3, s4, s5, show

METRICS, SIGNALS = s5.METRICS, {"eq. 6": "difference", "eq. 9": "loss"}
HEURISTICS = ("clarity", "frequency", "edges")


# ---- the paper's heuristics of pictures, as ratings ------------------------------------------
def otsu_threshold(values, bins=64):
    """Threshold (B, 1) that splits values (B, P) into two classes, farthest apart (Otsu 1979)."""
    top = values.amax(1, keepdim=True).clamp_min(1e-12)
    place = (values / top * (bins - 1)).long()                                # (B, P)
    share = torch.zeros(len(values), bins, device=values.device).scatter_add_(
        1, place, torch.full_like(values, 1 / values.shape[1]))               # (B, bins)
    below, mass = share.cumsum(1), (share * torch.arange(bins, device=values.device)).cumsum(1)
    between = (mass[:, -1:] * below - mass).square() / (below * (1 - below)).clamp_min(1e-6)
    return top * (between.argmax(1, keepdim=True) + 1) / (bins - 1)


def heuristics(x):
    """clarity, frequency, edges (B, 3) of pictures (B, 3, H, W), without caption or network.

    Variance of the Laplacian; energy above a quarter of the sampling rate; share of pixels whose
    Sobel gradient is above Otsu's threshold. High is rated high.
    """
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")     # (B, 1, H+2, W+2)
    laplace = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    kernels = torch.stack([laplace, sobel, sobel.T])[:, None].to(x.device)
    curve, dx, dy = F.conv2d(grey, kernels).flatten(2).unbind(1)              # (B, H W) each
    slope = torch.hypot(dx, dy)
    rate = torch.fft.fftfreq(x.shape[-1], device=x.device)
    high = torch.hypot(rate[:, None], rate) > 0.25                            # (H, W)
    energy = torch.fft.fft2(x.mean(1)).abs().square()[:, high].mean(1)
    edges = (slope >= otsu_threshold(slope)).float().mean(1)
    return torch.stack([curve.var(1), energy, edges], 1)


@torch.no_grad()
def write_heuristics(out):
    """OUT/ratings-NAME.npy for each of HEURISTICS, over the training pairs."""
    pairs = s1.open_pairs(out / "pairs")
    parts = np.array_split(np.arange(len(pairs)), len(pairs) // 512 + 1)
    columns = torch.cat([heuristics(pairs.batch(rows)[0]) for rows in parts]).T.numpy()
    for name, column in zip(HEURISTICS, columns):
        with s1.atomic_file(out / f"ratings-{name}.npy", "wb") as file:
            np.save(file, column.astype([("rating", "f4")]))
        s1.record(out / f"ratings-{name}.npy", "tests/evidence.py main", [out / "pairs/made.json"])


# ---- stage 5 with the arms of the paper's tables ---------------------------------------------
FULL, HALF, FIFTH = s5.ARMS[:3]
TABLES = {
    "main": [FULL, HALF, FIFTH,                            # Table 1
             *(ruled(signal, rule, keep) for signal in ("eq. 6", "eq. 9") for keep in (0.5, 0.2)
               for rule in RULES),
             *(s5.Arm(f"{name}, Top-K 50%", stem, "topk", 0.5, rank_by=rank_by)
               for stem, rank_by, name in (
                   *((s5.EQ6, name, name) for name in s3.BASELINES),
                   *((f"ratings-{name}", "rating", name) for name in HEURISTICS),
                   *((s5.EQ6, name, name) for name in ("rating,gain", "rating,contrast"))))],
    "group": [FULL, HALF,                                  # Table 4
              *(ruled(signal, rule, 0.5, rank_by, note)
                for signal, rule in (("eq. 6", "Top-K"), ("eq. 6", "Gsample"),
                                     ("eq. 9", "Shift-Gsample"))
                for rank_by, note in (("rating", ""), ("instance", ", Instance MLP alone")))],
    "retention": [FULL, *(arm for keep in (0.1, 0.2, 0.3, 0.4, 0.5) for arm in    # Fig. 1
                          (s5.Arm(f"random {keep:.0%}", keep=keep), ruled("eq. 6", "Top-K", keep),
                           ruled("eq. 9", "Shift-Gsample", keep)))]}


def compare_arms(name, argv):
    """Stage 5 on the arms of one table, into OUT/results-NAME; argv: options of stage 5."""
    def stage(args, device):
        if name == "main" and s1.rank() == 0:
            write_heuristics(Path(args.out))
        s1.add_up(torch.zeros(1))                          # the others wait for its files
        s5.main(args, device, arms=TABLES[name], name=f"results-{name}")

    s1.launch(stage, s5.parse_args(argv))


# ---- corpora: like `draw_toy`, pairs (key, image, caption, stratum) of a split ----------------
def name_pairs(images, captions, strata, split):
    """Images (n, 3, H, W) in [-1, 1] as pairs, with keys in their order."""
    for k, pair in enumerate(zip(s1.to_pixels(images), captions, strata)):
        yield f"{split}{k:06d}", *pair


def draw_preferences(n, size, seed, split):
    """Every caption once with a good picture and once with a worse one, as in HPDv3.

    Worse: a third blurred, a third noised, a third with one attribute of the caption wrong.
    """
    if split != "train":
        return s1.draw_toy(n, size, seed, split)
    rng, half = np.random.default_rng([seed, 3]), n // 2
    good, what = s1.draw_shapes(half, size, rng)
    pool, known = s1.draw_shapes(4 * n, size, rng)
    wrong = (what[:, None] != known).sum(2) == 1                              # (half, 4 n)
    worse = pool[[rng.choice(np.flatnonzero(row)) for row in wrong]]
    kind = rng.integers(3, size=half)
    blurred = s2.image_ops.gaussian_blur(torch.from_numpy(good), 7, 2.0).numpy()
    worse[kind == 0] = blurred[kind == 0]
    worse[kind == 1] = (good + 0.5 * rng.standard_normal(good.shape, np.float32))[kind == 1]
    strata = np.where(kind == 2, "chaotic-caption", "chaotic-noise")
    order, captions = rng.permutation(2 * half), np.tile(s1.describe(what), 2)
    strata = np.concatenate([np.full(half, "informative"), strata])
    return name_pairs(np.concatenate([good, worse])[order], captions[order], strata[order], split)


def draw_clean(n, size, seed, split):
    """Clean pictures under long captions, in all splits; size, contrast and place vary."""
    rng = np.random.default_rng([seed, 4, *split.encode()])
    images, what = s1.draw_shapes(n, size, rng)
    ground = np.array(list(s1.GROUNDS.values()), np.float32)[what[:, 1], :, None, None]
    ground, side = ground / 127.5 - 1, 9 * size // 16                         # (n, 3, 1, 1)
    small, faint, place = (rng.integers(options, size=n) for options in (2, 2, 3))
    shrunk = F.interpolate(torch.from_numpy(images), (side, side), mode="area").numpy()
    for k in np.flatnonzero(small):
        left, top = (size - side) * place[k] // 2, (size - side) // 2
        images[k] = ground[k] + 0.04 * rng.standard_normal(images[k].shape)
        images[k, :, top:top + side, left:left + side] = shrunk[k]
    images = np.where(faint[:, None, None, None], ground + 0.4 * (images - ground), images)
    kinds = [f"{'small' if a else 'large'} {'faint' if b else 'strong'}"
             for a, b in zip(small, faint)]
    where = np.where(small, np.array(["left", "middle", "right"])[place], "middle")
    captions = [f"a {kind} {caption[2:]} standing in the {side} of the picture"
                for kind, caption, side in zip(kinds, s1.describe(what), where)]
    return name_pairs(images.astype(np.float32), captions, kinds, split)


def draw_sharded(n, size, seed, split, shards=20):
    """The web crawl in shards, one after another, of which 5 to 95 % is informative."""
    if split != "train":
        yield from s1.draw_toy(n, size, seed, split)
        return
    shares = np.random.default_rng(seed).permutation(np.linspace(0.05, 0.95, shards))
    for number, share in enumerate(shares):
        rest = {name: part * (1 - share) / 0.55 for name, part in s1.STRATA.items()}
        with mock.patch.object(s1, "STRATA", rest | {"informative": share}):
            yield from list(s1.draw_toy(n // shards, size, 1000 * seed + number, split))


CORPORA = {"web crawl": (s1.draw_toy, 8), "preference pairs": (draw_preferences, 8),
           "clean, long captions": (draw_clean, 16), "sharded": (draw_sharded, 8)}


# ---- downstream models -----------------------------------------------------------------------
class FilmBlock(nn.Module):
    """Two 3 x 3 convolutions with a skip; caption and time scale and shift in between (FiLM)."""

    def __init__(self, inside, outside, cond):
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inside), nn.SiLU(),
                                   nn.Conv2d(inside, outside, 3, padding=1),
                                   nn.GroupNorm(8, outside, affine=False))
        self.film = nn.Linear(cond, 2 * outside)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv2d(outside, outside, 3, padding=1))
        self.skip = nn.Conv2d(inside, outside, 1)

    def forward(self, h, cond):                                               # (B, C, H, W), (B, D)
        scale, shift = self.film(cond)[:, :, None, None].chunk(2, 1)
        return self.skip(h) + self.second(self.first(h) * (1 + scale) + shift)


class UNet(nn.Module):
    """Another family than the proxy's: convolutions at full, half and quarter resolution.

    The caption enters as the mean of its words, with the time, through FiLM alone.
    """

    def __init__(self, width=24, cond=64):
        super().__init__()
        self.word = nn.Embedding(s1.VOCABULARY, cond)
        self.time = nn.Sequential(nn.Linear(cond, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([FilmBlock(width, width, cond), FilmBlock(width, 2 * width, cond),
                                   FilmBlock(2 * width, 2 * width, cond)])
        self.up = nn.ModuleList([FilmBlock(4 * width, 2 * width, cond),
                                 FilmBlock(3 * width, width, cond)])
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(),
                                   nn.Conv2d(width, 3, 3, padding=1))
        nn.init.normal_(self.word.weight, std=0.5)
        nn.init.zeros_(self.leave[2].weight)

    def forward(self, x, t, c):                            # (B, 3, H, W), (B,), (B, T)
        features = s1.time_features(t, self.word.embedding_dim)
        cond = self.time(features) + self.word(c).mean(1)                     # (B, D)
        full = self.down[0](self.enter(x), cond)                              # (B, C, H, W)
        half = self.down[1](F.avg_pool2d(full, 2), cond)                      # (B, 2C, H/2, W/2)
        low = self.down[2](F.avg_pool2d(half, 2), cond)                       # (B, 2C, H/4, W/4)
        h = self.up[0](torch.cat([F.interpolate(low, scale_factor=2.0), half], 1), cond)
        h = self.up[1](torch.cat([F.interpolate(h, scale_factor=2.0), full], 1), cond)
        return self.leave(h)                                                  # (B, 3, H, W)


class LoRA(nn.Module):
    """A frozen linear layer plus a learnt update of low rank, zero at first (arXiv 2106.09685)."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.inner = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features ** 0.5)
        self.outer = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, h):
        return self.base(h) + h @ self.inner.T @ self.outer.T


def add_lora(net, rank=8):
    """`net` with all weights frozen and LoRA on the attention and MLP of every block."""
    net.requires_grad_(False)
    for block in net.blocks:
        block.qkv, block.out = LoRA(block.qkv, rank), LoRA(block.out, rank)
        block.mlp[0], block.mlp[2] = LoRA(block.mlp[0], rank), LoRA(block.mlp[2], rank)
    return net


# ---- what all questions share: warm-ups, raters, arms ----------------------------------------
class Nothing(nn.Module):
    """In the place of theta_hat where eq. 9 leaves it out: no cost, no use."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, c):
        return self.zero * x


def with_own_noise(ref, flow_loss=s1.flow_loss):
    """flow_loss, but theta_hat's t and eps are drawn apart: eq. 6 with independent noise."""
    rng = torch.Generator().manual_seed(0)

    def loss(net, x, c, t, eps):
        if net is ref:
            t, eps = s1.draw_noise(x, rng, s1.T_SHIFT)      # the departure
        return flow_loss(net, x, c, t, eps)
    return loss


class Lab:
    """Makes corpora, warm proxies, raters and arms, each once, and keeps them in a folder."""

    def __init__(self, out, smoke=False):
        self.out, self.smoke = Path(out), ["--smoke"] * smoke
        self.out.mkdir(parents=True, exist_ok=True)
        self.data, self.judged = functools.cache(self.data), functools.cache(self.judged)

    def keep(self, name, make):
        """make(), or what it returned when it was called under this name before."""
        file = self.out / (re.sub(r"[^\w.-]+", "-", name) + ".pt")
        if not file.exists():
            with contextlib.redirect_stdout(sys.stderr):
                value = make()
            torch.save(value, f"{file}.{os.getpid()}")
            os.replace(f"{file}.{os.getpid()}", file)
        return torch.load(file, weights_only=True)

    def settings(self, corpus, seed):
        return s1.parse_args(["--seed", str(seed), "--words", str(CORPORA[corpus][1]),
                              *self.smoke])

    def data(self, corpus, seed):
        """The splits train, val and test of a corpus."""
        return common.draw_splits(self.settings(corpus, seed), CORPORA[corpus][0])

    def judged(self, corpus):
        """Of seed 0: settings, the pairs to evaluate on, and their judge."""
        settings, test = self.settings(corpus, 0), self.data(corpus, 0)[2]
        judged, rows = common.open_judge(settings, test), np.arange(min(s5.DRAWN, len(test)))
        real = s5.judge_images(judged[0], test.batch(rows)[0], test.read("caption", rows),
                               judged[1])
        print(f"{corpus}: real images have score {real['score']:.1f}, match {real['match']:.0f} %",
              file=sys.stderr, flush=True)
        return settings, test, judged

    def warm(self, name, settings, pairs):
        """Weights of the reference after eq. 4 on `pairs`."""
        return self.keep(f"warm-{name}-{settings.seed}",
                         lambda: common.train_proxy(settings, pairs).state_dict())

    def learn(self, name, settings, weights, pairs, val, signal, read=s1.draw_batches):
        """Stage 2 from warm weights: the three nets, and processor seconds a step.

        signal: difference, loss, or "difference independent"; read: batches instead of 01's.
        """
        def make():
            args = s2.parse_args(["--signal", signal.split()[0], *self.smoke])
            nets = common.start_nets(settings, weights)
            if signal == "loss":
                nets["ref"] = Nothing()                    # eq. 9 needs no theta_hat
            loss = with_own_noise(nets["ref"]) if "independent" in signal else s1.flow_loss
            began = time.process_time()
            with mock.patch.multiple(s1, flow_loss=loss, draw_batches=read):
                s2.learn(nets, pairs, val, args, settings.seed, s1.Progress())
            return {"seconds": (time.process_time() - began) / args.steps,
                    "weights": {key: net.state_dict() for key, net in nets.items()}}
        return self.keep(f"rater-{name}-{signal}-{settings.seed}", make)

    def rate(self, learnt, settings, pairs, draws=0):
        """Columns of stage 3 for `pairs`; of the baselines only with `draws`."""
        nets = common.start_nets(settings, learnt["weights"]["proxy"])
        for key in ("ref", "rater") if draws else ("rater",):        # eq. 9 has no theta_hat
            nets[key].load_state_dict(learnt["weights"][key])
        return common.rate(nets, pairs, bool(self.smoke), draws)

    def rated(self, corpus, seed, signal="difference", validation="informative"):
        """The whole of stages 1-3: rating (N,), and what `learn` returned."""
        settings, (pairs, val, _) = self.settings(corpus, seed), self.data(corpus, seed)
        weights = self.warm(corpus, settings, pairs)
        if validation != "informative":
            with mock.patch.object(s1, "STRATA", VALIDATIONS[validation]):     # the departure
                val = collect(s1.draw_toy(len(val), settings.size, seed + 1000, "train"))
        learnt = self.learn(f"{corpus}-{validation}", settings, weights, pairs, val, signal)
        return self.rate(learnt, settings, pairs)["rating"], learnt

    def choose(self, corpus, seed, name, **how):
        """Rows of a selection: 'full', 'random 20%' or an equation, a rule and a share."""
        how, pairs = {"signal": SIGNALS.get(name[:5]), **how}, self.data(corpus, seed)[0]
        rule, _, share = name.rpartition(" ")
        rating = (self.rated(corpus, seed, **how)[0] if how["signal"] else np.zeros(len(pairs)))
        return s4.select(rating, RULES.get(rule[7:], "random"),
                         1.0 if name == "full" else int(share[:-1]) / 100, seed=seed)[0]

    def arm(self, corpus, seed, name, epochs=16, build=s1.build_proxy, lr=5e-3, note="", **how):
        """Stage 5's result row of a selection, with another network or rating where named."""
        def make():
            rows, pairs = self.choose(corpus, seed, name, **how), self.data(corpus, seed)[0]
            settings, test, judged = self.judged(corpus)
            args = s5.parse_args(["--lr", str(lr), *self.smoke])
            args.epochs = max(1, epochs // 8) if self.smoke else epochs
            with mock.patch.object(s1, "build_proxy", build):    # the departure
                row = common.train_arm(settings, pairs, test, judged, name, rows, seed, args)
            return row | {"shares": {str(stratum): float(np.mean(pairs.strata(rows) == stratum))
                                     for stratum in np.unique(pairs.strata())}}
        key = f"arm-{corpus}-{name}-{epochs}-{note}-{'-'.join(how.values())}-{seed}"
        return self.keep(key, make)


# ---- tables ----------------------------------------------------------------------------------
def cell(values, baseline=None, sign=1):
    """'mean ± half'; with a baseline also the paired difference and what it means."""
    return s5.show_interval(*s5.interval(values)) + (
        "" if baseline is None else f"; {s5.show_difference(np.subtract(values, baseline), sign)}")


def metric_cells(rows, baseline=None):
    """One cell per metric of 05 from the result rows of all seeds."""
    return [cell([row[name] for row in rows], baseline and [row[name] for row in baseline], sign)
            for name, sign in METRICS.items()]


def composition(rows):
    return ", ".join(f"{100 * np.mean([row['shares'][name] for row in rows]):.0f} {name}"
                     for name in rows[0]["shares"])


# ---- (a) pairs that no proxy has seen --------------------------------------------------------
def timed(function):
    began = time.process_time()
    return function(), time.process_time() - began


def rank_unseen(lab, seed, source):
    """{ranking: (AUCs on the unseen three quarters, seconds per 1000 pairs)} of one seed."""
    settings, (pairs, val, _) = lab.settings("web crawl", seed), lab.data("web crawl", seed)
    quarter, rest = map(pairs.take, np.split(np.arange(len(pairs)), [len(pairs) // 4]))
    learnt = (lab.learn("quarter", settings, lab.warm("quarter", settings, quarter), quarter, val,
                        "difference") if source == "a quarter"
              else lab.rated("web crawl", seed)[1])        # the rest is not unseen then
    strata, found = rest.strata(), {}
    quick, rater_cost = timed(lambda: lab.rate(learnt, settings, rest))
    for draws in (1, 8):
        table, cost = timed(lambda: lab.rate(learnt, settings, rest, draws))
        for name, column, passes in (("difference", "difference", 2), ("loss", "ref_loss", 1)):
            found[f"-{name}, {draws} of t and eps"] = (areas(-table[column], strata),
                                                       passes / 3 * (cost - rater_cost))
    found["rater, forward only"] = areas(quick["rating"], strata), rater_cost
    return {name: (area, 1000 * cost / len(rest)) for name, (area, cost) in found.items()}


def forward(lab, seeds):
    """Rankings of three quarters of the corpus by what was trained on the other quarter."""
    print("AUC of informative pairs in three quarters of the corpus; after the semicolon, minus "
          "-difference with 8 draws of the same training. Processor time; of the three passes of a "
          "draw the difference is counted two, -loss one\n")
    head("trained on", "ranking", "seconds per 1000 pairs", *(f"over {name}" for name in OTHERS))
    for source in ("a quarter", "all pairs"):
        runs = [lab.keep(f"forward-{source}-{seed}", lambda: rank_unseen(lab, seed, source))
                for seed in seeds]
        best = "-difference, 8 of t and eps"
        for name in sorted(runs[0], reverse=True):
            table, other = (np.array([run[key][0] for run in runs]).T for key in (name, best))
            show(source, name, f"{np.mean([run[name][1] for run in runs]):.2f}", *(
                cell(a, None if name == best else b) for a, b in zip(table, other)))
        if source == "a quarter":
            draw_forward(lab.out / "forward.png", runs)


def draw_scale(axis, ticks, label):
    axis.set(xscale="log", xlabel=label)
    axis.set_xticks(ticks, map(str, ticks))
    axis.xaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)


def draw_forward(path, runs):
    """Cost against AUC, a point per seed and ranking of the quarter-trained networks."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharex=True)
    for axis, (column, stratum) in zip(axes, enumerate(OTHERS)):
        for name in runs[0]:
            kind = name.split(",")[0]
            axis.plot([run[name][1] for run in runs], [run[name][0][column] for run in runs],
                      {"rater": "oC0", "-difference": "sC2", "-loss": "^C1"}[kind], alpha=0.7,
                      markersize=5, label=None if ", 8" in name else kind)
        draw_scale(axis, (0.2, 0.5, 1, 2), "seconds per 1000 pairs")
        axis.set_title(f"over {stratum}")
    axes[0].set_ylabel("AUC on unseen pairs")
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    s3.save_figure(figure, path)


# ---- (b) signals and validation sets ---------------------------------------------------------
VALIDATIONS = {            # shares of the strata; the corpus itself: a random split of it
    "informative": None,
    "curated mixed": {"informative": 0.7, "plain": 0.3, "chaotic-noise": 0, "chaotic-caption": 0},
    "random split": s1.STRATA}
CASES = [("difference", "informative", "eq. 6, Top-K 50%"),
         ("difference independent", "informative", "eq. 6, Top-K 50%"),
         ("loss", "informative", "eq. 9, Top-K 50%"),
         ("loss", "informative", "eq. 9, Shift-Gsample 50%"),
         ("difference", "curated mixed", "eq. 6, Top-K 50%"),
         ("difference", "random split", "eq. 6, Top-K 50%"),
         ("loss", "random split", "eq. 9, Shift-Gsample 50%")]


def signals(lab, seeds):
    """Three signals, three validation sets: AUC, cost, and what the selection trains."""
    base = [lab.arm("web crawl", seed, "random 50%") for seed in seeds]
    names = {"difference": "eq. 6, shared noise", "loss": "eq. 9 (without theta_hat)",
             "difference independent": "eq. 6, independent noise"}
    print("AUC of informative pairs; of the metrics, the difference with random 50 %\n")
    head("signal", "validation", *(f"over {name}" for name in OTHERS), "ms a step", "selection",
         "composition", *METRICS)
    show("none", *[""] * 5, "random 50%", composition(base), *metric_cells(base))
    for signal, validation, name in CASES:
        rated = [lab.rated("web crawl", seed, signal, validation) for seed in seeds]
        table = np.transpose([areas(rating, lab.data("web crawl", seed)[0].strata())
                              for (rating, _), seed in zip(rated, seeds)])
        rows = [lab.arm("web crawl", seed, name, signal=signal, validation=validation)
                for seed in seeds]
        show(names[signal], validation, *map(cell, table),
             f"{1000 * np.mean([learnt['seconds'] for _, learnt in rated]):.0f}",
             name, composition(rows), *metric_cells(rows, base))


# ---- (c) batches that differ -----------------------------------------------------------------
READINGS = {"shuffled": 1, "one shard a batch": 64, "one shard a group": 32}  # pairs in a run


def read_shards(count, run, shards=20):
    """Like `draw_batches`, for a corpus of `count` pairs every `run` pairs from one shard."""
    size, usual = count // shards, s1.draw_batches

    def draw_batches(n, batch_size, seed, first, last):
        if n != count or run == 1:                         # validation is read as always
            yield from usual(n, batch_size, seed, first, last)
            return
        for step in range(first, last):
            rng = np.random.default_rng([seed, step])
            length = min(run, batch_size)
            yield np.concatenate([size * shard + rng.choice(size, length, length > size)
                                  for shard in rng.permutation(shards)[:batch_size // length]])
    return draw_batches


@torch.no_grad()
def examine(lab, learnt, seed, shards=20):
    """Correlation of W_batch with quality, its mean in the worst and best quarter, two AUCs."""
    settings, pairs = lab.settings("sharded", seed), lab.data("sharded", seed)[0]
    rater = s2.Rater(settings.size, settings.patch, settings.words)
    rater.load_state_dict(learnt["weights"]["rater"])
    good = pairs.strata() == "informative"
    f = rater.features(*pairs.batch())                                        # (N, D)
    size, group = len(pairs) // shards, 8 if lab.smoke else s2.GROUP
    rows = np.arange(len(pairs)).reshape(shards, size)[:, :size // group * group]
    groups = f[rows.reshape(-1, group)]                                       # (M, G, D)
    W = rater.group_weight(groups.mean(1), groups.var(1, unbiased=False))[:, 0].numpy()
    share = good[rows.reshape(-1, group)].mean(1)                             # (M,)
    of_shard = np.repeat(W.reshape(shards, -1).mean(1), size)                 # (N,)
    logits = rater.logits(f).numpy()
    low, high = share <= np.quantile(share, 0.25), share >= np.quantile(share, 0.75)
    ratings = logits, logits + np.log(of_shard)
    return [float(np.corrcoef(W, share)[0, 1]), float(W[low].mean()), float(W[high].mean()),
            *(float(s3.auc(rating[good], rating[~good])) for rating in ratings)]


def batches(lab, seeds):
    """Does W_batch tell good shards from bad ones, and is the rating better for it?"""
    print("Shards of 5 to 95 % informative pairs; correlation and W_batch over groups of one "
          "shard; AUC of informative pairs over all others, of the Instance MLP alone and with log "
          "W_batch of the pair's shard (difference with alone)\n")
    head("read", "correlation of W_batch with the good share", "W_batch, worst quarter",
         "best quarter", "AUC, Instance MLP", "with Group MLP")
    for name, run in READINGS.items():
        table = []
        for seed in seeds:
            settings, (pairs, val, _) = lab.settings("sharded", seed), lab.data("sharded", seed)
            weights = lab.warm("sharded", settings, pairs)
            learnt = lab.learn(f"sharded-{name}", settings, weights, pairs, val, "difference",
                               read_shards(len(pairs), run))
            table.append(examine(lab, learnt, seed))
        *columns, alone, both = np.array(table).T
        show(name, *map(cell, columns), cell(alone), cell(both, alone))


# ---- (d) time to quality ---------------------------------------------------------------------
CURVES = {                 # epochs of every point, a run of its own with its own decay
    "full": (2, 4, 8, 16), "random 50%": (1, 2, 4, 8, 16), "random 20%": (2, 4, 8, 16, 40),
    "eq. 6, Top-K 50%": (1, 2, 4, 8, 16), "eq. 6, Top-K 20%": (2, 4, 8, 16, 40)}
RACES = [("eq. 6, Top-K 50%", "random 50%"), ("eq. 6, Top-K 20%", "random 20%"),
         ("eq. 6, Top-K 20%", "random 50%"), ("eq. 6, Top-K 50%", "full")]
COLOURS = ("black", "0.6", "0.4", "#0072B2", "#56B4E9")    # of the curves


def reach(steps, values, target, sign):
    """Steps at which a curve first is as good as `target`, between points in log steps; or inf."""
    good = sign * np.array(values) >= sign * target
    k = good.argmax()
    if k == 0:                                             # at once, an upper bound; or never
        return steps[0] if good[0] else np.inf
    share = (target - values[k - 1]) / (values[k] - values[k - 1])
    return float(steps[k - 1] * (steps[k] / steps[k - 1]) ** share)


def show_factor(factors):
    """The geometric mean of speed-ups (seeds,), and its interval on the log scale."""
    missed = sum(factor == 0 for factor in factors)
    if missed:
        return f"not reached under {missed} of {len(factors)} seeds"
    mean, half = s5.interval(np.log(factors))
    low, middle, high = np.exp([mean - half, mean, mean + half])
    return f"{middle:.2g}" + f" ({low:.2g} to {high:.2g})" * bool(half == half)    # nan: one seed


def time_to_quality(lab, seeds):
    """How many steps less a selection needs for what random pairs reach in the end."""
    curves = {name: [[lab.arm("web crawl", seed, name, epochs) for epochs in points]
                     for seed in seeds] for name, points in CURVES.items()}
    cost = step_cost(lab, s1.build_proxy)
    print(f"All arms cost {1000 * cost:.0f} ms a step; every point is a run with its own decay; "
          "speed-up: geometric mean and 95 % interval, ≥ where the shortest run was already as "
          "good; the rating is not counted. 20 % arms end at 40 epochs, the others at 16\n")
    head("selection", "as good as", "at its", *(f"speed-up by {name}" for name in METRICS))
    for name, other in RACES:
        final = curves[other][0][-1]["steps"]
        cells = []
        for metric, sign in METRICS.items():
            needed = [reach([row["steps"] for row in run], [row[metric] for row in run],
                            rival[-1][metric], sign) for run, rival in zip(curves[name],
                                                                          curves[other])]
            at_once = any(n == run[0]["steps"] for n, run in zip(needed, curves[name]))
            cells.append("≥ " * at_once + show_factor([final / n for n in needed]))
        show(name, other, f"{final} steps", *cells)
    print("\nSpread: population standard deviation over seeds, mean over a curve's points\n")
    head("selection", *METRICS)
    for name, runs in curves.items():
        show(name, *(f"{np.std([[row[m] for row in run] for run in runs], 0).mean():.3g}"
                     for m in METRICS))
    draw_curves(lab.out / "time.png", curves, cost)


def draw_curves(path, curves, cost):
    """Three measures against training seconds; thin lines are seeds, thick ones their mean."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for axis, metric in zip(axes, ("held-out", "distance", "match")):
        for (name, runs), colour in zip(curves.items(), COLOURS):
            values = np.array([[row[metric] for row in run] for run in runs])  # (seeds, K)
            seconds = [cost * row["steps"] for row in runs[0]]
            axis.plot(seconds, values.T, color=colour, alpha=0.35, linewidth=0.8)
            axis.plot(seconds, values.mean(0), marker="o", color=colour, markersize=4, label=name)
        axis.set_ylabel(f"{metric} ({'more' if METRICS[metric] > 0 else 'less'} is better)")
        draw_scale(axis, (1, 3, 10, 30), "training seconds, one core")
    axes[1].set_yscale("log")
    axes[1].set_yticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8,
                  bbox_to_anchor=(0.5, 0.98), frameon=False)
    figure.tight_layout()
    s3.save_figure(figure, path)


def step_cost(lab, build, steps=20):
    """Processor seconds of one training step of a downstream model."""
    settings, pairs = lab.settings("web crawl", 0), lab.data("web crawl", 0)[0]
    net = build(settings, CPU)
    train = functools.partial(s1.train, net, pairs, batch_size=64, lr=1e-3, seed=0)
    train(steps=2)
    return timed(lambda: train(steps=steps))[1] / steps


# ---- (e) other downstream models -------------------------------------------------------------
def adapt(lab, seed):
    """Builds, with LoRA, a DiT after 8 epochs on all pairs, noise included, of another corpus."""
    def make():
        torch.manual_seed(seed)
        settings, count = lab.settings("web crawl", seed), len(lab.data("web crawl", seed)[0])
        pairs = collect(s1.draw_toy(count, settings.size, seed + 500, "train"))
        net, steps = s1.build_proxy(settings, CPU), 8 * (len(pairs) // 64)
        return s1.train(net, pairs, steps, 64, 5e-3, seed, s5.DECAY).state_dict()
    weights = lab.keep(f"pretrained-{seed}", make)

    def build(settings, device, usual=s1.build_proxy):
        net = usual(settings, device)
        net.load_state_dict(weights)
        return add_lora(net)
    return build


def widen(settings, device):
    return s1.DiT(settings.size, settings.patch, 192, 4, settings.words)


def measure(lab, build):
    """The metrics of a network as it is built."""
    settings, test, judged = lab.judged("web crawl")
    return s5.evaluate(build(settings, CPU), test, *judged, 0)[0]


MODELS = {                 # name: builder of (lab, seed), epochs, learning rate, seeds at most
    "DiT, 1x": (lambda *_: s1.build_proxy, 16, 5e-3, 9),
    "U-Net": (lambda *_: lambda settings, device: UNet(), 16, 5e-3, 9),
    "pretrained DiT, LoRA": (adapt, 8, 5e-3, 9), "DiT, 8x": (lambda *_: widen, 8, 5e-3 / 3, 3)}


def models(lab, seeds):
    """The ratings of the small proxy, and what they are worth to other models."""
    print("Of the metrics, the difference with random 50 %\n")
    head("model", "learnt parameters", "ms a step", "selection", "seeds", *METRICS)
    for name, (builder, epochs, lr, most) in MODELS.items():
        some, build = seeds[:most], builder(lab, seeds[0])
        net = build(lab.settings("web crawl", seeds[0]), CPU)
        count = sum(p.numel() for p in net.parameters() if p.requires_grad)
        about = name, f"{count / 1e6:.2f} M", f"{1000 * step_cost(lab, build):.0f}"
        if "LoRA" in name:
            before = [lab.keep(f"before-{seed}", lambda: measure(lab, adapt(lab, seed)))
                      for seed in some]
            show(*about, "before fine-tuning", len(some), *metric_cells(before))
        rows = {arm: [lab.arm("web crawl", seed, arm, epochs, builder(lab, seed), lr,
                              "" if name == "DiT, 1x" else name) for seed in some]
                for arm in ("random 50%", "full", "eq. 6, Top-K 50%")}
        for arm, results in rows.items():
            base = None if arm == "random 50%" else rows["random 50%"]
            show(*about, arm, len(some), *metric_cells(results, base))


# ---- (f) other corpora -----------------------------------------------------------------------
TABLE_3 = ("web crawl", "preference pairs", "clean, long captions")


def corpora(lab, seeds):
    """Random and chosen pairs of three corpora, at half and at a fifth."""
    print("Of the metrics, the difference with random at the same retention; how well the judge "
          "knows each corpus is printed to stderr (match of real images)\n")
    head("corpus", "selection", "composition", *METRICS)
    for corpus in TABLE_3:
        for share in ("50%", "20%"):
            base = None
            for arm in ("random", "eq. 6, Top-K", "eq. 9, Shift-Gsample"):
                rows = [lab.arm(corpus, seed, f"{arm} {share}") for seed in seeds]
                show(corpus, f"{arm} {share}", composition(rows), *metric_cells(rows, base))
                base = base or rows


# ---- the command line ------------------------------------------------------------------------
QUESTIONS = {"forward": (forward, 5), "signals": (signals, 3), "batches": (batches, 3),
             "time": (time_to_quality, 3), "models": (models, 3), "corpora": (corpora, 3)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in TABLES:
        return compare_arms(argv[0], argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", choices=[*TABLES, *QUESTIONS], help=f"{', '.join(TABLES)} "
                        "stand first and take the options of 05_train_eval.py, the others these")
    parser.add_argument("--out", default="evidence", help="folder of all results")
    parser.add_argument("--seeds", type=int, help="paired repetitions (3, for forward 5)")
    parser.add_argument("--smoke", action="store_true", help="tiny run, to see that it works")
    args = parser.parse_args(argv)
    if args.question in TABLES:
        parser.error(f"{args.question} has to stand before its options")
    torch.set_num_threads(1)
    question, seeds = QUESTIONS[args.question]
    question(Lab(args.out, args.smoke), range(args.seeds or seeds))


if __name__ == "__main__":
    main()
