"""Real pictures: which rater, which meta step and which signal find which dirt. See QUESTIONS.

    python tests/real.py eyes toy fashion --seeds 3          raters with and without the proxy's
                                                             eyes, 4 minutes a corpus and seed
    python tests/real.py steps toy fashion --seeds 3         what theta and theta_hat train on
    python tests/real.py curve errors=TRAIN,VAL --seeds 3    how many steps captions take
    python tests/real.py signals errors=TRAIN,VAL --seeds 3  which signal finds which dirt
    python tests/real.py arms planted --seeds 5 --csv FILE   and what training on its half gives

A corpus is `toy`, `fashion` (FashionMNIST, 40 % of the captions swapped), `planted` (FashionMNIST
with the toy's dirt), `similar` (swapped among similar classes), or NAME=TRAIN,VAL with tar shards
or folders whose `stratum` is known. AUC: P(a right pair is ranked above one of the stratum named).
"""
import argparse
import contextlib
import copy
import functools
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from common import (CPU, Watched, cell, chunks, command_line, head, s1, s2, s3, s4, s5, show,
                    train_proxy)

SIMILAR = (("t-shirt", "shirt", "pullover", "coat", "dress"), ("sneaker", "sandal", "ankle boot"))
CHECKS = (100, 200, 400)   # meta steps at which the AUC is taken
PROBE = 2000               # training pairs that the AUC is taken over
FOLDER = ["--size", "16", "--width", "96", "--words", "16", "--lr", "1e-3"]
FASHION = ["--data", "FashionMNIST", "--pairs"]
CORPORA = {                # name: options of 01_proxy.py
    "toy": [], "fashion": [*FASHION, "8000", "--plant", "captions=0.4", "--steps", "800"],
    "planted": [*FASHION, "4000", "--plant", "plain=0.3,noise=0.15,captions=0.1"],
    "similar": [*FASHION, "8000", "--steps", "800"]}


@contextlib.contextmanager
def open_corpus(name, args, seed):
    """Name, options and splits of a corpus, prepared in a folder that lasts as long."""
    name, _, places = name.partition("=")
    flags = CORPORA.get(name)
    if places:
        train, val = places.split(",")
        flags = ["--data", train, "--val", val, "--steps", "800", *FOLDER]
    if flags is None:
        raise SystemExit(f"{name}: a corpus is {', '.join(CORPORA)} or NAME=TRAIN,VAL")
    flags = flags + ["--root", args.root] * bool(args.root) + ["--smoke"] * args.smoke
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        settings, folder = s1.parse_args([*flags, "--out", out, "--seed", str(seed)]), Path(out)
        s1.prepare(folder / "pairs", settings)
        if name == "similar":
            swap_similar(folder / "pairs", 0.4, seed)
        yield name, settings, [s1.open_pairs(folder / "pairs", split)
                               for split in ("train", "val", "test")]


def swap_similar(folder, share, seed):
    """A share of the captions that have similar ones in SIMILAR takes another of these."""
    pairs, rng = s1.open_pairs(folder), np.random.default_rng([seed, 16])
    tokens, entries = (np.load(folder / f"{name}.npy", mmap_mode="r+")
                       for name in ("tokens", "entries"))
    captions = pairs.read("caption")
    known = {caption: (tokens[row].copy(), entries["caption"][row].item())
             for row, caption in zip(pairs.rows, captions)}
    for row, caption in zip(pairs.rows, captions):
        group = next((group for group in SIMILAR if caption.split(" ", 4)[-1] in group), ())
        if group and rng.random() < share:
            others = [s1.name_class(name) for name in group]
            other = rng.choice([other for other in others if other != caption])
            tokens[row], entries["caption"][row] = known[other]
            entries["stratum"][row] = b"planted-caption"


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
        return torch.cat([rater.logits(rater.features(*pairs.batch(rows)))
                          for rows in chunks(pairs)]).numpy()


# ---- one meta step, taken apart ---------------------------------------------------------------
def proxy_losses(nets, train, val, rng, W, dropped, training_term):
    """Steps of both proxies (eq. 5 or a variant), and the difference (B,) before them."""
    (x, c), (x_val, c_val) = train, val
    if dropped:
        c, c_val = (s1.drop_captions(words, rng) for words in (c, c_val))
    t, eps = s1.draw_noise(x, rng, s1.T_SHIFT)
    L_val = s1.flow_loss(nets["proxy"], x_val, c_val, *s1.draw_noise(x_val, rng)).mean()
    with torch.set_grad_enabled(training_term):
        L_theta = s1.flow_loss(nets["proxy"], x, c, t, eps)
    L_hat = s1.flow_loss(nets["ref"], x, c, t, eps)
    return ({"proxy": L_val + (W * L_theta).sum() * training_term, "ref": (W * L_hat).sum()},
            (L_theta - L_hat).detach())


def signals(nets, pairs, seed):
    """{signal: values (N,), high is good} of the two proxies alone, 8 draws."""
    found = []
    with torch.no_grad():
        for k, rows in enumerate(chunks(pairs)):
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
    batches = (s1.draw_batches(len(split), 64, settings.seed, 0, steps) for split in splits[:2])
    for k, both in enumerate(zip(*batches), 1):
        (x, c), val = (split.batch(rows) for split, rows in zip(splits, both))
        rng = s1.seeded("cpu", settings.seed, "meta", k)
        W = torch.full((len(x),), 1 / len(x))
        losses, gap = proxy_losses(nets, (x, c), val, rng, W, dropped, training_term)
        s = s2.rank_normal(gap.view(-1, 32))
        for name, rater in dict(raters).items():
            start = time.perf_counter()
            W_inst, W_batch = s2.weigh(rater, x, c, 32)
            total = (gap.view(-1, 32) * W_inst.detach()).sum(1)
            loss = (s2.rater_objective(W_inst, W_batch, s, s2.rank_normal(total)[:, None])
                    + s2.negative_entropy(W_inst, W_batch))
            s1.descend(loss, rater, rater_opts[name])
            spent[name] += time.perf_counter() - start
        for name, loss in losses.items():
            s1.descend(loss, nets[name], opts[name])
        after(k)
    return nets, {name: 1000 * seconds / steps for name, seconds in spent.items()}


def warm(settings, pairs):
    """The warm proxy, the probe and its strata."""
    probe = find_probe(pairs, settings.seed)
    return train_proxy(settings, pairs), probe, probe.strata()


def find_probe(pairs, seed):
    """The pairs that the AUC is taken over."""
    return pairs.take(np.sort(np.random.default_rng(seed).permutation(len(pairs))[:PROBE]))


# ---- questions -------------------------------------------------------------------------------
def ask_eyes(args):
    """AUC by steps of raters that learn from one and the same signal, and their milliseconds."""
    for corpus in args.corpora:
        table = {}
        for seed in range(args.seeds):
            with open_corpus(corpus, args, seed) as (name, settings, splits):
                look_at_eyes(settings, splits, table, CHECKS[0] if args.smoke else CHECKS[-1])
        head(f"{name}: rater", "AUC over", *(f"{k} steps" for k in CHECKS), "ms a step")
        for key in sorted({key[:2] for key in table if len(key) == 3}):
            cells = [cell(table[(*key, k)], 3) if (*key, k) in table else "" for k in CHECKS]
            show(*key, *cells, cell(table[key[0], "ms"], 0) if (key[0], "ms") in table else "")


def note_areas(table, key, strata, values, *more):
    """Add the AUC over every stratum to table[(*key, stratum, *more)]."""
    for stratum, area in s3.areas(strata, values).items():
        table.setdefault((*key, stratum, *more), []).append(area)


def look_at_eyes(settings, splits, table, steps):
    """One seed of `ask_eyes`, added to `table`."""
    proxy, probe, strata = warm(settings, splits[0])
    raters = build_raters(settings, proxy)

    def after(k):
        if k in CHECKS:
            for name, rater in raters.items():
                note_areas(table, [name], strata, rate(rater, probe), k)
    nets, spent = walk(settings, splits, proxy, steps, True, True, raters, after)
    for name, milliseconds in spent.items():
        table.setdefault((name, "ms"), []).append(milliseconds)
    for signal, values in signals(nets, probe, settings.seed).items():
        note_areas(table, [signal], strata, values, steps)


def ask_steps(args):
    """AUC of the proxies' own signals by what theta and theta_hat train on; weights all alike."""
    for corpus in args.corpora:
        table = {}
        for seed in range(args.seeds):
            with open_corpus(corpus, args, seed) as (name, settings, splits):
                proxy, probe, strata = warm(settings, splits[0])
                for dropped, term in ((False, True), (False, False), (True, True), (True, False)):
                    nets, _ = walk(settings, splits, proxy, 10 if args.smoke else 300, dropped,
                                   term)
                    step = (f"captions {'dropped in a tenth' if dropped else 'kept'}, theta on "
                            f"{'eq. 5' if term else 'validation alone'}")
                    for signal, values in signals(nets, probe, seed).items():
                        note_areas(table, [step, signal], strata, values)
        strata = sorted({key[2] for key in table})
        head(f"{name}: meta step", "signal", *strata)
        for step, signal in dict.fromkeys(key[:2] for key in table):
            show(step, signal, *(cell(table[step, signal, stratum], 3) for stratum in strata))


def ask_curve(args):
    """What it takes to find wrong captions: AUC of the caption gain after more and more warm-up."""
    points = (20, 40) if args.smoke else (500, 1000, 2000, 4000)
    for corpus in args.corpora:
        table = {}
        for seed in range(args.seeds):
            with open_corpus(corpus, args, seed) as (name, settings, (pairs, val, _)):
                for width in (64, 128):
                    settings.width = width
                    torch.manual_seed(seed)
                    proxy = s1.build_proxy(settings, CPU)
                    probe = find_probe(pairs, seed)

                    def after(step):
                        if step in points:
                            gain = signals({"proxy": proxy, "ref": proxy}, probe, seed)[
                                "caption gain of theta_hat"]
                            note_areas(table, [width], probe.strata(), gain, step)
                            table.setdefault((width, "captions read", step), []).append(
                                s1.read_captions(proxy, val, seed))
                    s1.train(proxy, pairs, points[-1], settings.batch_size, settings.lr, seed,
                             progress=Watched(after))
        head(f"{name}: width", "AUC of the caption gain over", *(f"{k} steps" for k in points))
        for width, what in dict.fromkeys(key[:2] for key in table):
            show(width, what, *(cell(table[width, what, k], 3) for k in points))


# ---- the whole chain on one corpus -----------------------------------------------------------
SIGNALS = {                # name in the tables: file of stage 3, its columns
    "eq. 6": (s5.EQ6, "rating"), "eq. 9": (s5.EQ9, "rating"), "difference": (s5.EQ6, "difference"),
    "loss": (s5.EQ6, "ref_loss"), "contrast": (s5.EQ6, "contrast"), "gain": (s5.EQ6, "gain"),
    "eq. 6 + gain": (s5.EQ6, "rating,gain"), "eq. 6 + contrast": (s5.EQ6, "rating,contrast")}


def rate_corpus(settings, smoke):
    """Stages 1 to 3 as they are shipped, but for their figures, with both signals."""
    unseen = dict.fromkeys(("draw_bands", "draw_histogram"), mock.DEFAULT)
    with mock.patch.multiple(s3, **unseen):
        s1.launch(s1.main, settings)
        for signal in ("difference", "loss"):
            flags = ["--out", settings.out, "--signal", signal]
            s1.launch(s2.main, s2.parse_args(flags + ["--smoke"] * smoke))
            s1.launch(s3.main, s3.parse_args(
                flags + ["--baselines"] * (signal == "difference")))


def ask_signals(args, judge=lambda *_: None):
    """AUC of every signal over every kind of dirt."""
    for corpus in args.corpora:
        table, seconds = {}, []
        for seed in range(args.seeds):
            with open_corpus(corpus, args, seed) as (name, settings, (pairs, *_)):
                start = time.perf_counter()
                rate_corpus(settings, args.smoke)
                seconds.append(time.perf_counter() - start)
                for signal, (stem, columns) in SIGNALS.items():
                    values = s4.read_ratings(Path(settings.out) / f"{stem}.npy", columns, pairs)
                    note_areas(table, [signal], pairs.strata(), values)
                judge(name, settings, pairs)
        strata = sorted({stratum for _, stratum in table})
        head(f"{name}: AUC over", *strata)
        for signal in SIGNALS:
            show(signal, *(cell(table[signal, stratum], 3) for stratum in strata))
        print(f"\nrating, both raters and all signals: {np.mean(seconds):.0f} s a seed", flush=True)


def list_arms(pairs, out):
    """[(arm of stage 5, its epochs in units of the others')]; the right pairs as a file."""
    right, six = Path(out) / "right.csv", SIGNALS["eq. 6"]
    s1.write_csv(right, ["row"], np.flatnonzero(pairs.strata() == "informative")[:, None])
    chosen = [(name, "topk", *SIGNALS[name]) for name in SIGNALS]
    chosen += [(name, "shift-gsample", *SIGNALS[name]) for name in ("eq. 6", "eq. 9")]
    words = {"topk": "Top-K", "shift-gsample": "Shift-Gsample"}
    arms = [s5.Arm("full"), s5.Arm("random 50%", keep=0.5), *(
        s5.Arm(f"{name}, {words[method]} 50%", stem, method, 0.5, rank_by=columns)
        for name, method, stem, columns in chosen)]
    arms.append(s5.Arm("oracle: all right pairs", file=str(right)))
    again = s5.Arm("eq. 6, Top-K 50%, equal updates", six[0], "topk", 0.5, rank_by=six[1])
    return [*((arm, 1) for arm in arms), (again, 2)]


def run_arm(work, flags, seed):
    """The row of stage 5 for (arm, how many times the epochs)."""
    arm, times = work
    longer = argparse.Namespace(**{**vars(flags), "epochs": times * flags.epochs})
    return s5.run_arm((seed, arm), longer, CPU)[0]


def ask_arms(args):
    """The same model trained on every selection: stage 5's tables, with a rating for each seed."""
    results, floors, cores = [], [], torch.get_num_threads()

    def judge(name, settings, pairs):
        torch.set_num_threads(1)                           # arms side by side
        flags = s5.parse_args(["--out", settings.out, "--lr", str(args.lr)]
                              + ["--smoke"] * args.smoke)
        work = list_arms(pairs, settings.out)
        val = s1.open_pairs(Path(settings.out) / "pairs", "val")
        sees, reference = s5.open_judge(flags.out, flags.metrics, flags.weights, flags.smoke, CPU)
        rows = np.arange(min(s5.DRAWN, len(val)))
        floors.append(s5.judge_images(sees, val.batch(rows)[0], val.read("caption", rows),
                                      reference))
        run = functools.partial(run_arm, flags=flags, seed=settings.seed)
        for row in s5.run_side_by_side(run, work, cores):
            results.append(row)
            print(f"{name} seed {settings.seed} {row['arm']:32} " + "  ".join(
                f"{key} {row[key]:.3f}" for key in s5.METRICS), flush=True)
        torch.set_num_threads(cores)
        arms[:] = [arm for arm, _ in work]
        if args.csv:
            s1.write_csv(args.csv, list(results[0]), [
                [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()]
                for row in results])

    if len(args.corpora) > 1:
        raise SystemExit("arms takes one corpus")
    arms = []
    ask_signals(args, judge)
    print("\n" + s5.tabulate(results, arms, "real images: " + ", ".join(
        f"{key} {cell([floor[key] for floor in floors])}" for key in floors[0])))


QUESTIONS = {"eyes": ask_eyes, "steps": ask_steps, "signals": ask_signals, "arms": ask_arms,
             "curve": ask_curve}


def main(argv=None):
    parser = command_line(__doc__, "out")
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("corpora", nargs="+", help="toy, fashion, ..., or NAME=TRAIN,VAL")
    parser.add_argument("--lr", type=float, default=5e-3, help="of the downstream model")
    parser.add_argument("--csv", help="arms: keep the rows of every seed here")
    parser.add_argument("--root", help="folder of the data sets, as in 01_proxy.py")
    args = parser.parse_args(argv)
    print("`python tests/real.py " + " ".join(argv or sys.argv[1:]) + "`")
    QUESTIONS[args.question](args)


if __name__ == "__main__":
    main()
