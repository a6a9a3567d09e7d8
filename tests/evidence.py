"""The evidence beyond stage 5's five arms: one command per question, one Markdown table each.

    python tests/evidence.py main        every rule on both signals, and rankings without a rater
                                         (Table 1)
    python tests/evidence.py group       without the Group MLP (Table 4)
    python tests/evidence.py retention   shares from 10 to 50 % (Fig. 1)
    python tests/evidence.py forward     does the rater add anything on pairs that no proxy saw?
    python tests/evidence.py split       a random split of the corpus as validation set
    python tests/evidence.py time        time to quality, and the spread over seeds (Fig. 6)
    python tests/evidence.py models      other downstream models (Table 2)
    python tests/evidence.py corpora     a clean corpus with long captions (Table 3)

The first three are stage 5 with other arms, with all options of stage 5: they compare the ratings
in --out (those of `main` after 03_score.py --baselines) and write out/results-NAME.csv, .md, .png.
Of the others every seed redraws the corpus and trains its own proxies, rater and downstream models;
the evaluation pairs and the judge are those of seed 0. "±" is the half-width of a 95 % interval;
after the semicolon, the paired difference with the baseline named above the table. What is trained
is kept in --out and shared. On one core each takes from ten minutes to half an hour.
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

import common
from common import CPU, OTHERS, RULES, areas, collect, head, ruled, s1, s2, s3, s4, s5, show

METRICS, SIGNALS = s5.METRICS, {"eq. 6": "difference", "eq. 9": "loss"}


# ---- stage 5 with the arms of the paper's tables ---------------------------------------------
FULL, HALF, FIFTH = s5.Arm("full"), s5.Arm("random 50%", keep=0.5), s5.Arm("random 20%", keep=0.2)
TABLES = {
    "main": [FULL, HALF, FIFTH,                            # Table 1
             *(ruled(signal, rule, keep) for signal in ("eq. 6", "eq. 9") for keep in (0.5, 0.2)
               for rule in RULES),
             *(s5.Arm(f"{name}, Top-K 50%", s5.EQ6, "topk", 0.5, rank_by=name)
               for name in (*s3.BASELINES, "contrast", "rating,contrast"))],
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
    stage = functools.partial(s5.main, arms=TABLES[name], name=f"results-{name}")
    s1.launch(stage, s5.parse_args(argv))


# ---- another corpus --------------------------------------------------------------------------
def draw_clean(n, size, seed, split):
    """Like `draw_toy`: clean pictures under long captions, whose size, contrast and place vary."""
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
    for k, pair in enumerate(zip(s1.to_pixels(images.astype(np.float32)), captions, kinds)):
        yield f"{split}{k:06d}", *pair


CORPORA = {                # name: what draws it, words of a caption
    "web crawl": (s1.draw_toy, 8), "clean, long captions": (draw_clean, 16)}


# ---- another downstream model ----------------------------------------------------------------
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


# ---- what all questions share: warm-ups, raters, arms ----------------------------------------
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
        return settings, test, common.open_judge(settings, test)

    def warm(self, name, settings, pairs):
        """Weights of the reference after eq. 4 on `pairs`."""
        return self.keep(f"warm-{name}-{settings.seed}",
                         lambda: common.train_proxy(settings, pairs).state_dict())

    def learn(self, name, settings, weights, pairs, val, signal):
        """The weights of the three nets after stage 2 from warm weights."""
        def make():
            args = s2.parse_args(["--signal", signal, *self.smoke])
            nets = common.start_nets(settings, weights, val)
            s2.learn(nets, pairs, val, args, settings.seed, s1.Progress())
            return {key: net.state_dict() for key, net in nets.items()}
        return self.keep(f"rater-{name}-{signal}-{settings.seed}", make)

    def rate(self, learnt, settings, pairs, draws=0):
        """Columns of stage 3 for `pairs`; of the baselines only with `draws`."""
        nets = common.start_nets(settings, learnt["proxy"])
        for key in ("ref", "rater"):
            nets[key].load_state_dict(learnt[key])
        return common.rate(nets, pairs, bool(self.smoke), draws)

    def rated(self, corpus, seed, signal="difference", validation="informative"):
        """The whole of stages 1-3: rating (N,), and what `learn` returned."""
        settings, (pairs, val, _) = self.settings(corpus, seed), self.data(corpus, seed)
        weights = self.warm(corpus, settings, pairs)
        if validation == "random split":                   # more of the corpus' own pairs
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


def rank_unseen(lab, seed):
    """{ranking: (AUCs on the unseen three quarters, seconds per 1000 pairs)} of one seed."""
    settings, (pairs, val, _) = lab.settings("web crawl", seed), lab.data("web crawl", seed)
    quarter, rest = map(pairs.take, np.split(np.arange(len(pairs)), [len(pairs) // 4]))
    learnt = lab.learn("quarter", settings, lab.warm("quarter", settings, quarter), quarter, val,
                       "difference")
    strata, per_thousand = rest.strata(), 1000 / len(rest)
    quick, rater_cost = timed(lambda: lab.rate(learnt, settings, rest))
    found = {"rater, forward only": (areas(quick["rating"], strata), per_thousand * rater_cost)}
    for draws in (1, 8):
        table, cost = timed(lambda: lab.rate(learnt, settings, rest, draws))
        cost = 2 / 3 * (cost - rater_cost)                 # of three passes the difference has two
        found[f"-difference, {draws} of t and eps"] = (areas(-table["difference"], strata),
                                                       per_thousand * cost)
    return found


def forward(lab, seeds):
    """Rankings of three quarters of the corpus by what was trained on the other quarter."""
    print("AUC of informative pairs in three quarters of the corpus, by what was trained on the "
          "other quarter; after the semicolon, minus -difference with 8 draws. Processor time; of "
          "the three passes of a draw the difference is counted two\n")
    head("ranking", "seconds per 1000 pairs", *(f"over {name}" for name in OTHERS))
    runs = [lab.keep(f"forward-{seed}", lambda: rank_unseen(lab, seed)) for seed in seeds]
    best = "-difference, 8 of t and eps"
    for name in runs[0]:
        table, other = (np.array([run[key][0] for run in runs]).T for key in (name, best))
        show(name, f"{np.mean([run[name][1] for run in runs]):.2f}", *(
            cell(a, None if name == best else b) for a, b in zip(table, other)))


# ---- (b) a random split as validation set ----------------------------------------------------
def random_split(lab, seeds):
    """Both signals, with the default's validation set and with more of the corpus itself."""
    base = [lab.arm("web crawl", seed, "random 50%") for seed in seeds]
    print("AUC of informative pairs; of the metrics, the difference with random 50 %\n")
    head("selection", "validation", *(f"over {name}" for name in OTHERS), "composition", *METRICS)
    show("random 50%", *[""] * 4, composition(base), *metric_cells(base))
    for name in ("eq. 6, Top-K 50%", "eq. 9, Shift-Gsample 50%"):
        for validation in ("informative", "random split"):
            table = np.transpose([areas(
                lab.rated("web crawl", seed, SIGNALS[name[:5]], validation)[0],
                lab.data("web crawl", seed)[0].strata()) for seed in seeds])
            rows = [lab.arm("web crawl", seed, name, validation=validation) for seed in seeds]
            show(name, validation, *map(cell, table), composition(rows), *metric_cells(rows, base))


# ---- (c) time to quality ---------------------------------------------------------------------
CURVES = {                 # epochs of every point, a run of its own with its own decay
    "full": (2, 4, 8, 16), "random 50%": (1, 2, 4, 8, 16), "random 20%": (2, 4, 8, 16, 40),
    "eq. 6, Top-K 50%": (1, 2, 4, 8, 16), "eq. 6, Top-K 20%": (2, 4, 8, 16, 40)}
RACES = [("eq. 6, Top-K 50%", "random 50%"), ("eq. 6, Top-K 20%", "random 20%"),
         ("eq. 6, Top-K 20%", "random 50%"), ("eq. 6, Top-K 50%", "full")]


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


def step_cost(lab, build, steps=20):
    """Processor seconds of one training step of a downstream model."""
    settings, pairs = lab.settings("web crawl", 0), lab.data("web crawl", 0)[0]
    net = build(settings, CPU)
    train = functools.partial(s1.train, net, pairs, batch_size=64, lr=1e-3, seed=0)
    train(steps=2)
    return timed(lambda: train(steps=steps))[1] / steps


# ---- (d) other downstream models -------------------------------------------------------------
def widen(settings, device):
    return s1.DiT(settings.size, settings.patch, 192, 4, settings.words)


MODELS = {                 # name: its builder, learning rate
    "DiT, 1x": (s1.build_proxy, 5e-3), "U-Net": (lambda *_: UNet(), 5e-3),
    "DiT, 8x": (widen, 5e-3 / 3)}


def models(lab, seeds):
    """The ratings of the small proxy, and what they are worth to other models."""
    print("Of the metrics, the difference with random 50 %\n")
    head("model", "parameters", "ms a step", "selection", *METRICS)
    for name, (build, lr) in MODELS.items():
        net = build(lab.settings("web crawl", seeds[0]), CPU)
        count = sum(p.numel() for p in net.parameters())
        about = name, f"{count / 1e6:.2f} M", f"{1000 * step_cost(lab, build):.0f}"
        base = None
        for arm in ("random 50%", "full", "eq. 6, Top-K 50%"):
            rows = [lab.arm("web crawl", seed, arm, build=build, lr=lr,
                            note="" if name == "DiT, 1x" else name) for seed in seeds]
            show(*about, arm, *metric_cells(rows, base))
            base = base or rows


# ---- (e) another corpus ----------------------------------------------------------------------
def corpora(lab, seeds):
    """Random and chosen pairs of both corpora, at half and at a fifth."""
    print("Of the metrics, the difference with random at the same retention\n")
    head("corpus", "selection", "composition", *METRICS)
    for corpus in CORPORA:
        for share in ("50%", "20%"):
            base = None
            for arm in ("random", "eq. 6, Top-K", "eq. 9, Shift-Gsample"):
                rows = [lab.arm(corpus, seed, f"{arm} {share}") for seed in seeds]
                show(corpus, f"{arm} {share}", composition(rows), *metric_cells(rows, base))
                base = base or rows


# ---- the command line ------------------------------------------------------------------------
QUESTIONS = {"forward": (forward, 5), "split": (random_split, 3), "time": (time_to_quality, 3),
             "models": (models, 3), "corpora": (corpora, 3)}


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
