"""Real pictures: which ranking finds which dirt, and what a model learns from its half.

    python tests/real.py signals planted --seeds 5           AUC of every ranking, 2 minutes a seed
    python tests/real.py arms planted --seeds 5 --csv FILE   and a model trained on every half,
                                                             9 minutes a seed
    python tests/real.py raters planted --seeds 3            what of the rater and of the meta step
                                                             is needed, 6 minutes a seed
    python tests/real.py dials toy planted                   stage 3's verdict at six bad settings

A corpus is `toy`, `planted` (FashionMNIST with the toy's dirt), `swapped` (40 % of the captions
swapped), `similar` (swapped among similar classes), `off-topic` (trusted pairs show clothes, the
corpus shoes and bags, too), or NAME=TRAIN,VAL with tar shards or folders whose `stratum` is known.
AUC: P(a right pair is ranked above one of the stratum named). Seeds begin at FIRST: the settings of
the stages were chosen on others.
"""
import argparse
import contextlib
import functools
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn as nn

from common import CPU, cell, chunks, command_line, head, s1, s2, s3, s4, s5, show

FIRST = 30
SIMILAR = (("t-shirt", "shirt", "pullover", "coat", "dress"), ("sneaker", "sandal", "ankle boot"))
FOLDER = ["--size", "16", "--width", "96", "--words", "16", "--lr", "1e-3", "--steps", "800"]
FASHION = ["--data", "FashionMNIST", "--pairs", "4000"]
CORPORA = {                # name: options of 01_proxy.py
    "toy": [], "planted": [*FASHION, "--plant", "0.3", "0.15", "0.1"],
    "swapped": [*FASHION, "--plant", "0", "0", "0.4"], "similar": FASHION, "off-topic": FASHION}


@contextlib.contextmanager
def open_corpus(name, args, seed, more=()):
    """Name and options of a corpus, prepared in a folder of results that lasts as long."""
    name, _, places = name.partition("=")
    flags = CORPORA.get(name)
    if places:
        train, val = places.split(",")
        flags = ["--data", train, "--val", val, *FOLDER]
    if flags is None:
        raise SystemExit(f"{name}: a corpus is {', '.join(CORPORA)} or NAME=TRAIN,VAL")
    flags = [*flags, *more] + ["--root", args.root] * bool(args.root) + ["--smoke"] * args.smoke
    with tempfile.TemporaryDirectory() as out:
        settings, folder = s1.parse_args([*flags, "--out", out, "--seed", str(seed)]), Path(out)
        with contextlib.redirect_stdout(sys.stderr):
            s1.prepare(folder / "pairs", settings)
        if name == "similar":
            swap_similar(folder / "pairs", 0.4, seed)
        if name == "off-topic":
            keep_clothes(folder / "pairs")
        yield name, settings, s1.open_pairs(folder / "pairs")


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
            other = rng.choice([other for other in known
                                if other != caption and other.split(" ", 4)[-1] in group])
            tokens[row], entries["caption"][row] = known[other]
            entries["stratum"][row] = b"similar-caption"


def keep_clothes(folder):
    """Trusted pairs show clothes only; all else in the corpus is off topic, rightly captioned."""
    for split in ("train", "val", "test"):
        pairs = s1.open_pairs(folder, split)
        clothes = np.array([caption.split(" ", 4)[-1] in SIMILAR[0]
                            for caption in pairs.read("caption")])
        if split == "train":
            entries = np.load(folder / "entries.npy", mmap_mode="r+")
            entries["stratum"][pairs.rows[~clothes]] = b"off-topic"
        else:
            np.save(folder / f"{split}.npy", pairs.rows[clothes])


def areas(strata, values):
    """{kind of dirt: AUC of the right pairs above it}."""
    good = values[strata == "informative"]
    return {name: s3.auc(good, values[strata == name])
            for name in sorted(set(strata) - {"informative"})}


def show_areas(name, table):
    """A row for each ranking of {(ranking, stratum): an AUC for every seed}."""
    strata = sorted({stratum for _, stratum in table})
    head(f"{name}: AUC over", *strata)
    for ranking in dict.fromkeys(ranking for ranking, _ in table):
        show(ranking, *(cell(table[ranking, stratum], 3) for stratum in strata))


# ---- the whole chain on one corpus -----------------------------------------------------------
RANKINGS = {               # name in the tables: file of stage 3, its columns
    "rating, eq. 6": (s5.EQ6, "rating"), "rating, eq. 9": (s5.EQ9, "rating"),
    "difference": (s5.EQ6, "difference"), "loss of theta_hat": (s5.EQ6, "ref_loss"),
    "contrast": (s5.EQ6, "contrast"), "gain": (s5.EQ6, "gain"),
    "rating and contrast": (s5.EQ6, "rating,contrast")}


def rate_corpus(settings, smoke):
    """Stages 1 to 3 as they are shipped, but for their figures, with both signals; folders with
    the steps that README gives for them."""
    own = settings.data not in ("toy", *s1.DATASETS)
    unseen = dict.fromkeys(("draw_bands", "draw_histogram"), mock.DEFAULT)
    with mock.patch.multiple(s3, **unseen), contextlib.redirect_stdout(sys.stderr):
        s1.launch(s1.main, settings)
        for signal in ("difference", "loss"):
            flags = ["--out", settings.out, "--signal", signal]
            s1.launch(s2.main, s2.parse_args(
                flags + ["--steps", "400"] * own + ["--smoke"] * smoke))
            s1.launch(s3.main, s3.parse_args(
                flags + ["--baselines"] * (signal == "difference")))


def ask_signals(args, judge=lambda *_: None):
    """AUC of every ranking over every kind of dirt."""
    for corpus in args.corpora:
        table, seconds = {}, []
        for seed in range(FIRST, FIRST + args.seeds):
            with open_corpus(corpus, args, seed) as (name, settings, pairs):
                start = time.perf_counter()
                rate_corpus(settings, args.smoke)
                seconds.append(time.perf_counter() - start)
                for ranking, (stem, columns) in RANKINGS.items():
                    values = s4.read_ratings(Path(settings.out) / f"{stem}.npy", columns, pairs)
                    for stratum, area in areas(pairs.strata(), values).items():
                        table.setdefault((ranking, stratum), []).append(area)
                judge(name, settings, pairs)
        show_areas(name, table)
        print(f"\nboth raters and all rankings: {np.mean(seconds):.0f} s a seed", flush=True)


def list_arms(pairs, out):
    """Arms of stage 5; the right pairs as a file."""
    right = Path(out) / "right.csv"
    s1.write_csv(right, ["row"], np.flatnonzero(pairs.strata() == "informative")[:, None])
    return [s5.Arm("full"), s5.Arm("random 50%", keep=0.5), *(
        s5.Arm(f"{name}, 50%", stem, "topk", 0.5, rank_by=columns)
        for name, (stem, columns) in RANKINGS.items() if stem == s5.EQ6 and columns != "ref_loss"),
        s5.Arm("rating, eq. 9, Shift-Gsample 50%", s5.EQ9, "shift-gsample", 0.5),
        s5.Arm("all right pairs", file=str(right))]


def ask_arms(args):
    """The same model trained on every selection: stage 5's tables, with a rating for each seed."""
    results, floors, cores = [], [], torch.get_num_threads()

    def judge(name, settings, pairs):
        torch.set_num_threads(1)                           # arms side by side
        flags = s5.parse_args(["--out", settings.out, "--lr", str(args.lr)]
                              + ["--smoke"] * args.smoke)
        arms[:] = list_arms(pairs, settings.out)
        lab = s5.open_lab(flags.out, False, CPU)
        sees, reference = s5.open_judge(flags, lab, CPU)
        rows = np.arange(min(s5.DRAWN, len(lab.val)))
        floors.append(s5.judge_images(sees, lab.val.batch(rows)[0], lab.val.read("caption", rows),
                                      reference))
        run = functools.partial(s5.run_arm, args=flags, device=CPU)
        work = [(settings.seed, arm) for arm in arms]
        for row, images in s1.side_by_side(run, work, "spawn", cores):
            row |= s5.judge_images(sees, torch.from_numpy(images),
                                   lab.test.read("caption", np.arange(len(images))), reference)
            results.append(row)
            print(f"{name} seed {settings.seed} {row['arm']:32} " + "  ".join(
                f"{key} {row[key]:.3f}" for key in s5.METRICS), file=sys.stderr, flush=True)
        torch.set_num_threads(cores)
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


# ---- what of the rater and of the meta step is needed ------------------------------------------
def detach_first(flow_loss):
    """Of the three losses of a meta step, the first without a gradient: theta learns from trusted
    pairs alone."""
    count = [0]

    def loss(*inputs):
        count[0] += 1
        L = flow_loss(*inputs)
        return L.detach() if count[0] % 3 == 1 else L
    return loss


def scale_signal(signal, W_inst):
    """The signal itself, centred and of unit spread, in the place of its ranks."""
    s = (signal - signal.mean()) / signal.std()
    return s, (s * W_inst).sum(1, keepdim=True)


def shuffle_signal(signal, W_inst, rank_signal=s2.rank_signal):
    places = torch.rand(signal.shape, generator=s1.seeded("cpu", signal.sum().item())).argsort(1)
    return rank_signal(signal.gather(1, places), W_inst)


class GainRater(s2.Rater):
    """With a second number beside the cosine: what the caption is worth to the warm proxy."""
    gain = {}                  # of this corpus, see `learn_gain`

    def __init__(self, size, patch, words, width=64, depth=2):
        super().__init__(size, patch, words, width, depth)
        self.instance[0], self.group[0] = nn.Linear(width + 2, 64), nn.Linear(2 * width + 4, 64)
        self.norm = nn.LayerNorm(width + 2)

    def features(self, x, c):
        patches = self.to_patch(x).flatten(2).transpose(1, 2)
        h = self.encoder(torch.cat([self.word(c), patches], 1) + self.position).mean(1)
        gain = torch.tensor([self.gain[name_pair(*pair)] for pair in zip(x, c)])
        return self.norm(torch.cat([h, torch.stack([5 * self.contrast.compare(x, c), gain], 1)], 1))


def name_pair(x, c):
    return x.numpy().tobytes() + c.numpy().tobytes()


@torch.no_grad()
def learn_gain(settings, pairs):
    """Give GainRater the gain of every pair, of mean 0 and spread 1."""
    proxy = s1.build_proxy(settings, CPU)
    proxy.load_state_dict(s1.load(Path(settings.out) / "proxy.pt", "01_proxy.py")[1])
    gain = torch.cat([s3.baselines(proxy, proxy, *pairs.batch(rows), s1.seeded("cpu", k))[2]
                      for k, rows in enumerate(chunks(pairs))])
    standard = ((gain - gain.mean()) / gain.std()).tolist()
    GainRater.gain = dict(zip(map(name_pair, *pairs.batch()), standard))


VARIANTS = {               # name: options of stage 2, what is put in the place of what
    "as shipped": ([], {}),
    "without the cosine": ([], {(s2.Contrast, "compare"): lambda net, x, c: x.new_zeros(len(x))}),
    "eq. 9": (["--signal", "loss"], {}),
    "shuffled signal": ([], {(s2, "rank_signal"): shuffle_signal}),
    "no ranks": ([], {(s2, "rank_signal"): scale_signal}),
    "no entropy term": (["--tau", "0"], {}),
    "W_batch = 1": ([], {(s2.Rater, "group_weight"): lambda net, mean, var: 0 * mean[..., :1] + 1}),
    "theta on trusted pairs alone": ([], {(s1, "flow_loss"): detach_first(s1.flow_loss)}),
    "with the gain, too": ([], {(s2, "Rater"): GainRater})}


def rate_variant(settings, flags, swaps):
    """The rating (N,) of all training pairs after stage 2, and the share of W that matters."""
    with contextlib.ExitStack() as stack, contextlib.redirect_stdout(sys.stderr):
        for (owner, name), other in swaps.items():
            stack.enter_context(mock.patch.object(owner, name, other))
        args = s2.parse_args(["--out", settings.out, *flags] + ["--smoke"] * settings.smoke)
        s1.launch(s2.main, args)
        nets, group_size = s3.load_nets(Path(settings.out), args.signal, False, settings, CPU)
        pairs = s1.open_pairs(Path(settings.out) / "pairs")
        companions = s3.draw_companions(nets["rater"], group_size, pairs, settings.seed)
        return torch.cat([s3.score_chunk(nets, *pairs.batch(rows), companions, None)[:, 2]
                          for rows in chunks(pairs)]).numpy()


def ask_raters(args):
    """AUC of ratings that differ in one thing each."""
    for corpus in args.corpora:
        table = {}
        for seed in range(FIRST, FIRST + args.seeds):
            with open_corpus(corpus, args, seed) as (name, settings, pairs):
                with contextlib.redirect_stdout(sys.stderr):
                    s1.launch(s1.main, settings)
                learn_gain(settings, pairs)
                steps = ["--steps", "400"] * ("=" in corpus)
                for variant in args.only or VARIANTS:
                    flags, swaps = VARIANTS[variant]
                    rating = rate_variant(settings, steps + flags, swaps)
                    for stratum, area in areas(pairs.strata(), rating).items():
                        table.setdefault((variant, stratum), []).append(area)
        show_areas(name, table)


# ---- stage 3's verdict -------------------------------------------------------------------------
def shuffle_captions(folder):
    """Every trusted pair takes the caption of another one."""
    tokens, rows = np.load(folder / "tokens.npy", mmap_mode="r+"), np.load(folder / "val.npy")
    tokens[rows] = tokens[np.roll(rows, 1)]


def trust_corpus(folder):
    """Trusted pairs are a random part of the corpus, dirt included."""
    rows, val = np.load(folder / "train.npy"), np.load(folder / "val.npy")
    np.save(folder / "val.npy", np.random.default_rng(0).permutation(rows)[:len(val)])


SETTINGS = {               # name: options of stages 1 and 2, and what is done to the pairs
    "good": ([], [], None), "20 steps of warm-up": (["--steps", "20"], [], None),
    "20 meta steps": ([], ["--steps", "20"], None), "one meta step": ([], ["--steps", "1"], None),
    "tau 0": ([], ["--tau", "0"], None), "trusted captions shuffled": ([], [], shuffle_captions),
    "trusted = corpus": ([], [], trust_corpus)}


def ask_dials(args):
    """AUC of the rating over planted dirt, kind by kind, at a good setting and at six bad ones."""
    for corpus in args.corpora:
        plant, steps = (["--plant", "0.1"], ["--steps", "400"]) if "=" in corpus else ([], [])
        rows = []
        for setting, (first, second, spoil) in SETTINGS.items():
            with open_corpus(corpus, args, FIRST, [*plant, *first]) as (name, settings, pairs):
                if spoil:
                    spoil(Path(settings.out) / "pairs")
                with contextlib.redirect_stdout(sys.stderr):
                    s1.launch(s1.main, settings)
                found = s3.areas(pairs.strata(), rate_variant(settings, steps + second, {}))
                worst = min(found.values())
                rows.append((setting, *(f"{area:.2f}" for area in found.values()),
                             "yes" if worst >= s3.GOOD else "no"))
        head(f"{name}: setting", *found, "every kind found?")
        for row in rows:
            show(*row)


QUESTIONS = {"signals": ask_signals, "arms": ask_arms, "raters": ask_raters, "dials": ask_dials}


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("corpora", nargs="+", help="toy, planted, ..., or NAME=TRAIN,VAL")
    parser.add_argument("--lr", type=float, default=5e-3, help="of the downstream model")
    parser.add_argument("--csv", help="arms: keep the rows of every seed here")
    parser.add_argument("--only", nargs="+", help="raters: some of the variants")
    parser.add_argument("--root", help="folder of the data sets, as in 01_proxy.py")
    args = parser.parse_args(argv)
    print("`python tests/real.py " + " ".join(argv or sys.argv[1:]) + "`")
    QUESTIONS[args.question](args)


if __name__ == "__main__":
    main()
