"""Real pictures: which rater, which meta step and which signal find which dirt. See `questions`.

    python tests/real.py eyes toy fashion photos errors --seeds 3    raters with and without the
                                                 proxy's eyes on one signal, 4 minutes a corpus and seed
    python tests/real.py steps toy fashion photos errors --seeds 3   what theta and theta_hat train on
    python tests/real.py curve errors=TRAIN,VAL --seeds 3            how many steps captions take
    python tests/real.py signals errors=TRAIN,VAL --seeds 3          which signal finds which dirt
    python tests/real.py arms planted --seeds 5 --csv FILE           and what training on its half gives

A corpus is `toy`, `fashion` (FashionMNIST, 40 % of the captions swapped), `planted` (FashionMNIST
with the toy's dirt), `similar` (swapped among similar classes), or NAME=TRAIN,VAL with tar shards or
folders whose `stratum` is known. AUC: P(a right pair is ranked above one of the stratum named).
"""
import argparse
import contextlib
import copy
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from common import STAGES, cell, head, show

s1, s2, s3, s4, s5 = STAGES
SIMILAR = (("t-shirt", "shirt", "pullover", "coat", "dress"), ("sneaker", "sandal", "ankle boot"))
CHECKS = (100, 200, 400)   # meta steps at which the AUC is taken
PROBE = 2000               # training pairs that the AUC is taken over
FOLDER = ["--size", "16", "--width", "96", "--words", "16", "--lr", "1e-3"]
CORPORA = {                # name: options of 01_proxy.py
    "toy": [],
    "fashion": ["--data", "FashionMNIST", "--pairs", "8000", "--plant", "captions=0.4",
                "--steps", "800"],
    "planted": ["--data", "FashionMNIST", "--pairs", "4000",
                "--plant", "plain=0.3,noise=0.15,captions=0.1"],
    "similar": ["--data", "FashionMNIST", "--pairs", "8000", "--steps", "800"],
}


def open_corpus(name, args, seed):
    """Name, settings and splits of a corpus."""
    name, _, places = name.partition("=")
    flags = CORPORA.get(name)
    if places:
        train, val = places.split(",")
        flags = ["--data", train, "--val", val, "--steps", "800", *FOLDER]
    if flags is None:
        raise SystemExit(f"{name}: a corpus is {', '.join(CORPORA)} or NAME=TRAIN,VAL")
    if args.root:
        flags = [*flags, "--root", args.root]
    settings = s1.parse_args([*flags, "--seed", str(seed)] + ["--smoke"] * args.smoke)
    settings.out = None
    splits = s1.load_data(settings, torch.device("cpu"))
    if name == "similar":
        splits[0] = swap_similar(splits[0], 0.4, seed)
    return name, settings, splits


def swap_similar(pairs, share, seed):
    """A share of the captions that have similar ones in SIMILAR takes another of these."""
    rng = np.random.default_rng([seed, 16])
    captions, strata = list(pairs.captions), list(pairs.strata)
    for row, caption in enumerate(captions):
        group = next((group for group in SIMILAR if caption.split(" ", 4)[-1] in group), ())
        if group and rng.random() < share:
            others = [s1.name_class(name) for name in group]
            captions[row] = rng.choice([other for other in others if other != caption])
            strata[row] = "planted-caption"
    tokens = s1.tokenize(captions, pairs.tokens.shape[1])
    return s1.Pairs(pairs.images, tokens, pairs.keys, captions, strata)


# ---- raters ----------------------------------------------------------------------------------
class Eyes(nn.Module):
    """Features from a copy of the warm proxy: means of the words' and of the patches' last states
    at t = 0.5 without noise; with `empty` also their change when the caption is taken away."""

    def __init__(self, proxy, frozen, empty):
        super().__init__()
        self.proxy, self.empty = copy.deepcopy(proxy).requires_grad_(not frozen), empty
        width, self.states = proxy.position.shape[-1] * (4 if empty else 2), []
        self.proxy.blocks[-1].register_forward_hook(lambda *run: self.states.append(run[2]))
        self.norm = nn.LayerNorm(width)
        self.instance = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 1))
        self.group = nn.Sequential(nn.Linear(2 * width, 64), nn.GELU(), nn.Linear(64, 1))

    def look(self, x, c):
        self.proxy(0.5 * x, x.new_full((len(x),), 0.5), c)
        h, words = self.proxy.norm(self.states.pop()), self.proxy.words       # (B, T + P, D)
        return torch.cat([h[:, :words].mean(1), h[:, words:].mean(1)], 1)     # (B, 2 D)

    def features(self, x, c):
        f = self.look(x, c)
        return self.norm(torch.cat([f, f - self.look(x, 0 * c)], 1) if self.empty else f)

    logits, group_weight = s2.Rater.logits, s2.Rater.group_weight


def build_raters(settings, proxy):
    torch.manual_seed(settings.seed)
    return {"own encoder": s2.Rater(settings.size, settings.patch, settings.words),
            "theta_hat frozen": Eyes(proxy, True, False),
            "frozen, and without the caption": Eyes(proxy, True, True),
            "theta_hat fine-tuned": Eyes(proxy, False, False)}


def rate(rater, pairs):
    with torch.no_grad():
        return torch.cat([rater.logits(rater.features(*pairs.batch(rows))) for rows in
                          np.array_split(np.arange(len(pairs)), len(pairs) // 512 + 1)]).numpy()


# ---- one meta step, taken apart ---------------------------------------------------------------
def proxy_losses(nets, train, val, rng, W, dropped, training_term):
    """Steps of both proxies (eq. 5 or a variant), and the difference (B,) before them."""
    (x, c), (x_val, c_val) = train, val
    if dropped:
        c, c_val = (s1.drop_captions(words, rng) for words in (c, c_val))
    t, eps = s1.draw_noise(x, rng, s1.T_SHIFT)
    L_val = s1.flow_loss(nets["proxy"], x_val, c_val,
                         *s1.draw_noise(x_val, rng)).mean()
    with torch.set_grad_enabled(training_term):
        L_theta = s1.flow_loss(nets["proxy"], x, c, t, eps)
    L_hat = s1.flow_loss(nets["ref"], x, c, t, eps)
    return ({"proxy": L_val + (W * L_theta).sum() * training_term, "ref": (W * L_hat).sum()},
            (L_theta - L_hat).detach())


def signals(nets, pairs, seed):
    """{signal: values (N,), high is good} of the two proxies alone, 8 draws."""
    found = []
    with torch.no_grad():
        for k, rows in enumerate(np.array_split(np.arange(len(pairs)), len(pairs) // 512 + 1)):
            rng, (x, c) = s1.seeded("cpu", seed, "signals", k), pairs.batch(rows)
            sums = torch.zeros(5, len(x))
            for _ in range(s3.DRAWS):
                noise = s1.draw_noise(x, rng, s1.T_SHIFT)
                L, H, L0, H0 = (s1.flow_loss(net, x, words, *noise) for words in
                                (c, 0 * c) for net in (nets["proxy"], nets["ref"]))
                sums += torch.stack([H - L, -H, H0 - H, L0 - L, (L0 - L) - (H0 - H)])
            found.append(sums)
    names = ("-difference", "-loss", "caption gain of theta_hat", "caption gain of theta",
             "difference of the gains")
    return dict(zip(names, torch.cat(found, 1).numpy()))


def walk(settings, splits, proxy, steps, dropped, training_term, raters=(), after=lambda k: None):
    """Both proxies over `steps` meta steps; every rater learns from one signal. Returns them."""
    nets = {"proxy": copy.deepcopy(proxy), "ref": copy.deepcopy(proxy)}
    opts = {name: s1.adamw(net, 1e-3) for name, net in nets.items()}
    rater_opts = {name: s1.adamw(rater, 1e-3) for name, rater in dict(raters).items()}
    spent = dict.fromkeys(dict(raters), 0.0)
    batches = [s1.stream(split, s1.draw_batches(len(split), 64, settings.seed, 0,
                                                                 steps)) for split in splits[:2]]
    for k, ((_, x, c), (_, *val)) in enumerate(zip(*batches), 1):
        rng = s1.seeded("cpu", settings.seed, "meta", k)
        W = torch.full((len(x),), 1 / len(x))
        losses, gap = proxy_losses(nets, (x, c), val, rng, W, dropped, training_term)
        s = s2.rank_normal(gap.view(-1, 32))
        for name, rater in dict(raters).items():
            start = time.perf_counter()
            W_inst, W_batch = s2.weigh(rater, x, c, 32)
            total = (gap.view(-1, 32) * W_inst.detach()).sum(1)
            loss = (s2.rater_objective(W_inst, W_batch, s,
                                       s2.rank_normal(total)[:, None])
                    + s2.negative_entropy(W_inst, W_batch))
            s1.descend(loss, rater, rater_opts[name])
            spent[name] += time.perf_counter() - start
        for name, loss in losses.items():
            s1.descend(loss, nets[name], opts[name])
        after(k)
    return nets, {name: 1000 * seconds / steps for name, seconds in spent.items()}


def warm(settings, pairs):
    """The warm proxy, the pairs that the AUC is taken over, and their strata."""
    torch.manual_seed(settings.seed)
    proxy = s1.build_proxy(settings, "cpu")
    s1.train(proxy, pairs, settings.steps, settings.batch_size, settings.lr, settings.seed)
    rows = np.random.default_rng(settings.seed).permutation(len(pairs))[:PROBE]
    probe = pairs.take(np.sort(rows))
    return proxy, probe, np.array(probe.strata)


# ---- questions -------------------------------------------------------------------------------
def ask_eyes(args):
    """AUC by steps of raters that learn from one and the same signal, and their milliseconds."""
    for corpus in args.corpora:
        table = {}
        for seed in range(args.seeds):
            name, settings, splits = open_corpus(corpus, args, seed)
            proxy, probe, strata = warm(settings, splits[0])
            raters = build_raters(settings, proxy)

            def after(k):
                if k in CHECKS:
                    for rater_name, rater in raters.items():
                        for stratum, area in s3.areas(strata, rate(rater, probe)).items():
                            table.setdefault((rater_name, stratum, k), []).append(area)

            steps = CHECKS[0] if args.smoke else CHECKS[-1]
            nets, spent = walk(settings, splits, proxy, steps, True, True, raters, after)
            for rater_name, milliseconds in spent.items():
                table.setdefault((rater_name, "ms"), []).append(milliseconds)
            for signal, values in signals(nets, probe, seed).items():
                for stratum, area in s3.areas(strata, values).items():
                    table.setdefault((signal, stratum, steps), []).append(area)
        head(f"{name}: rater", "AUC over", *(f"{k} steps" for k in CHECKS), "ms a step")
        for key in sorted({key[:2] for key in table if len(key) == 3}):
            cells = [cell(table[(*key, k)], 3) if (*key, k) in table else "" for k in CHECKS]
            show(*key, *cells, cell(table[key[0], "ms"], 0) if (key[0], "ms") in table else "")


def ask_steps(args):
    """AUC of the proxies' own signals by what theta and theta_hat train on; weights all alike."""
    for corpus in args.corpora:
        table = {}
        for seed in range(args.seeds):
            name, settings, splits = open_corpus(corpus, args, seed)
            proxy, probe, strata = warm(settings, splits[0])
            for dropped in (False, True):
                for training_term in (True, False):
                    nets, _ = walk(settings, splits, proxy, 10 if args.smoke else 300, dropped,
                                   training_term)
                    step = (f"captions {'dropped in a tenth' if dropped else 'kept'}, theta on "
                            f"{'eq. 5' if training_term else 'validation alone'}")
                    for signal, values in signals(nets, probe, seed).items():
                        for stratum, area in s3.areas(strata, values).items():
                            table.setdefault((step, signal, stratum), []).append(area)
        strata = sorted({key[2] for key in table})
        head(f"{name}: meta step", "signal", *strata)
        for step, signal in dict.fromkeys(key[:2] for key in table):
            show(step, signal, *(cell(table[step, signal, stratum], 3) for stratum in strata))


# ---- the whole chain on one corpus --------------------------------------------------------------
SIGNALS = {                # name in the tables: (raters' signals, columns of stage 3, sign)
    "eq. 6": [("difference", "rating", 1)], "eq. 9": [("loss", "rating", 1)],
    "difference": [("difference", "difference", -1)], "loss": [("difference", "loss", -1)],
    "contrast": [("difference", "contrast", 1)], "gain": [("difference", "gain", 1)],
    "eq. 6 + gain": [("difference", "rating", 1), ("difference", "gain", 1)],
    "eq. 6 + contrast": [("difference", "rating", 1), ("difference", "contrast", 1)]}


def rate_corpus(settings, splits, out, smoke):
    """{signal: (N,), high is good} by stages 1 to 3 as they are shipped; and their seconds."""
    start, tables, smoke = time.perf_counter(), {}, ["--smoke"] * smoke
    common = ["--out", str(out), "--seed", str(settings.seed), *smoke]
    settings.out = str(out)
    unseen = mock.patch.multiple(s3, draw_bands=mock.DEFAULT, draw_dynamics=mock.DEFAULT,
                                 draw_histogram=mock.DEFAULT)
    with mock.patch.object(s1, "load_data", lambda *_: splits), unseen:
        s1.launch(s1.main, settings)
        for signal in ("difference", "loss"):
            flags = [*common, "--signal", signal]
            s1.launch(s2.main, s2.parse_args(flags))
            flags += ["--baselines"] * (signal == "difference")
            s1.launch(s3.main, s3.parse_args(flags))
            tables[signal] = s3.read_table(
                out / f"ratings{s2.suffix(signal)}.csv")
    found = {name: s4.join([sign * tables[signal][column] for signal, column, sign in
                            parts]) for name, parts in SIGNALS.items()}
    return found, time.perf_counter() - start


def ask_signals(args, judged=None):
    """AUC of every signal over every kind of dirt."""
    for corpus in args.corpora:
        table, seconds = {}, []
        for seed in range(args.seeds):
            name, settings, splits = open_corpus(corpus, args, seed)
            with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
                found, spent = rate_corpus(settings, splits, Path(out), args.smoke)
            strata = np.array(splits[0].strata)
            for signal, values in found.items():
                for stratum, area in s3.areas(strata, values).items():
                    table.setdefault((signal, stratum), []).append(area)
            seconds.append(spent)
            if judged:
                judged(name, settings, splits, found)
        strata = sorted({stratum for _, stratum in table})
        head(f"{name}: AUC over", *strata)
        for signal in SIGNALS:
            show(signal, *(cell(table[signal, stratum], 3) for stratum in strata))
        print(f"\nrating, both raters and all signals: {np.mean(seconds):.0f} s a seed", flush=True)


def list_selections(found, strata, seed):
    """Baselines, then {arm: (rows, epochs in units of the others')}."""
    n = len(strata)
    chosen = {"full": np.arange(n), "random 50%": s4.select(
        np.zeros(n), "random", 0.5, seed=seed)[0]}
    for name, rating in found.items():
        chosen[f"{name}, Top-K 50%"] = s4.select(rating, "topk", 0.5)[0]
    for name in ("eq. 6", "eq. 9"):
        chosen[f"{name}, Shift-Gsample 50%"] = s4.select(
            found[name], "shift-gsample", 0.5, seed=seed)[0]
    chosen["oracle: all right pairs"] = np.flatnonzero(strata == "informative")
    arms = {name: (rows, 1) for name, rows in chosen.items()}
    arms["eq. 6, Top-K 50%, equal updates"] = chosen["eq. 6, Top-K 50%"], 2
    return arms


def ask_arms(args):
    """The same model trained on every selection: stage 5's tables, with a rating for each seed."""
    flags = s5.parse_args(["--smoke"] * args.smoke)
    results, floors = [], []

    def judged(name, settings, splits, found):
        pairs, val, test = splits
        strata, seed = np.array(pairs.strata), settings.seed
        judge = s3.train_contrast(
            test, 20 if args.smoke else s3.CONTRAST_STEPS, seed)
        (x, _), (other, _) = (split.batch(np.arange(min(s5.DRAWN, len(split))))
                              for split in (test, val))
        reference = s5.moments(judge.embed_images(x)[0])
        floors.append(s5.judge_images(judge, other, val.captions[:len(other)], reference))
        for arm, (rows, times) in list_selections(found, strata, seed).items():
            torch.manual_seed(seed)
            net, start = s1.build_proxy(settings, "cpu"), time.perf_counter()
            steps = times * flags.epochs * (len(rows) // flags.batch_size)
            s1.train(net, pairs.take(rows), steps, flags.batch_size, args.lr, seed,
                     decay=s5.DECAY)
            spent = time.perf_counter() - start
            numbers, _ = s5.evaluate(net, test, judge, reference, seed)
            shares = {stratum: float(np.mean(strata[rows] == stratum)) for stratum in
                      s1.STRATUM_COLOURS if stratum in strata}
            results.append({"arm": arm, "seed": seed, "pairs": len(rows), "steps": steps,
                            "seconds": spent, **numbers, **shares})
            print(f"{name} seed {seed} {arm:32} " + "  ".join(
                f"{key} {numbers[key]:.3f}" for key in numbers), file=sys.stderr, flush=True)
        if args.csv:
            s1.write_csv(args.csv, list(results[0]), [
                [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()]
                for row in results])

    if len(args.corpora) > 1:
        raise SystemExit("arms takes one corpus")
    ask_signals(args, judged)
    names = dict.fromkeys(row["arm"] for row in results)
    arms = [s5.Arm(name, "" if name in ("full", "random 50%") else "ratings")
            for name in names]
    print("\n" + s5.tabulate(results, arms, "real images: " + ", ".join(
        f"{key} {cell([floor[key] for floor in floors])}" for key in floors[0])))


def ask_curve(args):
    """What it takes to find wrong captions: AUC of the caption gain after more and more warm-up."""
    points = (20, 40) if args.smoke else (500, 1000, 2000, 4000)
    for corpus in args.corpora:
        table = {}
        for seed in range(args.seeds):
            for width in (64, 128):
                name, settings, (pairs, val, _) = open_corpus(corpus, args, seed)
                settings.width, settings.steps = width, points[-1]
                torch.manual_seed(seed)
                proxy = s1.build_proxy(settings, "cpu")
                rows = np.random.default_rng(seed).permutation(len(pairs))[:PROBE]
                probe = pairs.take(np.sort(rows))

                def after(step):
                    if step in points:
                        gain = signals({"proxy": proxy, "ref": proxy}, probe, seed)[
                            "caption gain of theta_hat"]
                        found = {**s3.areas(np.array(probe.strata), gain), "captions read":
                                 s1.read_captions(proxy, val, seed)}
                        for what, value in found.items():
                            table.setdefault((width, what, step), []).append(value)
                s1.train(proxy, pairs, points[-1], settings.batch_size, settings.lr, seed,
                         after=after)
        head(f"{name}: width", "AUC of the caption gain over", *(f"{k} steps" for k in points))
        for width, what in dict.fromkeys(key[:2] for key in table):
            show(width, what, *(cell(table[width, what, k], 3) for k in points))


QUESTIONS = {"eyes": ask_eyes, "steps": ask_steps, "signals": ask_signals, "arms": ask_arms,
             "curve": ask_curve}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("corpora", nargs="+", help="toy, fashion, ..., or NAME=TRAIN,VAL")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-3, help="of the downstream model")
    parser.add_argument("--csv", help="arms: keep the rows of every seed here")
    parser.add_argument("--root", help="folder of the data sets, as in 01_proxy.py")
    parser.add_argument("--smoke", action="store_true", help="tiny run, to see that it works")
    args = parser.parse_args(argv)
    print("`python tests/real.py " + " ".join(argv or sys.argv[1:]) + "`")
    QUESTIONS[args.question](args)


if __name__ == "__main__":
    main()
