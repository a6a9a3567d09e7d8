"""What the experiment scripts of this folder share: stages, warm proxies, AUCs, Markdown tables."""
import argparse
import functools
import importlib
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
STAGES = s1, s2, s3, s4, s5 = [
    importlib.import_module(name) for name in (
        "01_proxy", "02_meta_rater", "03_score", "04_select", "05_train_eval")]
CPU = torch.device("cpu")
OTHERS = ("chaotic-noise", "chaotic-caption", "plain")     # strata, beside the informative one
RULES = {"Top-K": "topk", "Block": "block", "Gsample": "gsample", "Shift-Gsample": "shift-gsample"}


def ruled(signal, rule, keep, rank_by="rating", note=""):
    """Stage 5's arm of one rule on the ratings of one signal, 'eq. 6' or 'eq. 9'."""
    settings = {"mean": 0.22, "std": 0.12} if (signal, rule) == ("eq. 6", "Gsample") else {}
    return s5.Arm(f"{signal}, {rule} {keep:.0%}{note}", s5.EQ6 if signal == "eq. 6" else s5.EQ9,
                  RULES[rule], keep, settings, rank_by)


def collect(pairs, words=8):
    """Pairs in memory, of an iterable of (key, image, caption, stratum) such as draw_toy's."""
    pairs = list(pairs)
    images, tokens, entries, texts, _ = s1.read_task(
        ("", lambda: pairs, ()), s1.argparse.Namespace(size=pairs[0][1].shape[-1], words=words))
    return s1.Pairs(images, tokens, entries, texts, np.arange(len(entries)))


def draw_splits(settings, draw=s1.draw_toy):
    """The toy's splits train, val and test, as stage 1 prepares them with these options."""
    return [collect(draw(n[settings.smoke], settings.size, settings.seed, split), settings.words)
            for split, n in s1.TOY_PAIRS.items()]


@functools.lru_cache(maxsize=None)
@torch.enable_grad()
def warm_up(seed, smoke):
    """Settings, splits (train, val, test) and warm proxy, as 01_proxy.py --seed `seed` has them."""
    settings = s1.parse_args(["--seed", str(seed)] + ["--smoke"] * smoke)
    splits = draw_splits(settings)
    return settings, splits, train_proxy(settings, splits[0])


@torch.enable_grad()
def train_proxy(settings, pairs):
    """The proxy after eq. 4 on `pairs`, as stage 1 leaves it."""
    torch.manual_seed(settings.seed)
    proxy = s1.build_proxy(settings, CPU)
    return s1.train(proxy, pairs, settings.steps, settings.batch_size, settings.lr, settings.seed)


def start_nets(settings, weights, val=None):
    """Both proxies with these weights, and a fresh rater, as stage 2 starts; the rater's
    contrastive network trained on `val`."""
    torch.manual_seed(settings.seed)
    nets = {name: s1.build_proxy(settings, CPU) for name in ("proxy", "ref")}
    for net in nets.values():
        net.load_state_dict(weights)
    nets["rater"] = s2.Rater(settings.size, settings.patch, settings.words)
    if val:
        contrast = s2.train_contrast(val, 20 if settings.smoke else s2.CONTRAST_STEPS,
                                     settings.seed + 1)
        nets["rater"].contrast.load_state_dict(contrast.state_dict())
    return nets


def chunks(pairs):
    """All rows, up to 512 at a time."""
    return np.array_split(np.arange(len(pairs)), len(pairs) // 512 + 1)


@torch.no_grad()
def rate(nets, pairs, smoke=False, draws=0):
    """{column of stage 3: (N,)}; with `draws` of the baselines, too."""
    rater, group_size = nets["rater"], 8 if smoke else s2.GROUP
    companions, parts = s3.draw_companions(rater, group_size, pairs, 0), []
    nets = nets if draws else {"rater": rater}
    with mock.patch.object(s3, "DRAWS", draws):
        for k, rows in enumerate(chunks(pairs)):
            parts.append(s3.score_chunk(nets, *pairs.batch(rows), companions,
                                        s1.seeded("cpu", "rate", k)))
    return dict(zip([*s3.NUMBERS, *s3.BASELINES], torch.cat(parts).numpy().T))


def open_judge(settings, test):
    """Stage 5's judge of test pairs in memory, and what it sees in them."""
    judge = s2.train_contrast(test, 20 if settings.smoke else s2.CONTRAST_STEPS, settings.seed)
    x, _ = test.batch(np.arange(min(s5.DRAWN, len(test))))
    return judge, s5.moments(judge.embed_images(x)[0])


def train_arm(settings, pairs, test, judged, name, rows, seed, args):
    """Stage 5's result row of a selection, evaluated on `test` as `judged` by `open_judge`."""
    (judge, reference), n = judged, min(s5.DRAWN, len(test))
    lab = s5.SimpleNamespace(settings=settings, pairs=pairs, pool=np.arange(len(pairs)), test=test)
    with mock.patch.multiple(s5, open_lab=lambda *_: lab, choose_rows=lambda *_: rows):
        row, images = s5.run_arm((seed, s5.Arm(name)), args, CPU)
    return row | s5.judge_images(judge, torch.from_numpy(images),
                                 test.read("caption", np.arange(n)), reference)


def areas(rating, strata, others=OTHERS):
    """AUC: P(an informative pair is rated above one of another stratum), of those there are."""
    good = rating[strata == "informative"]
    return [float(s3.auc(good, rating[strata == name])) for name in others
            if name in strata]


def positions(values):
    return np.argsort(np.argsort(np.asarray(values), kind="stable"), kind="stable")


def spearman(a, b):
    """Rank correlation of two (N,)."""
    return float(np.corrcoef(positions(a), positions(b))[0, 1])


def show(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(*names):
    print()
    show(*names)
    print("|---" * len(names) + "|", flush=True)


def cell(values, digits=None):
    """'mean ± half-width of the 95 % interval' of one value per seed, to `digits` decimals."""
    mean, half = s5.interval(values)
    if digits is None:
        return s5.show_interval(mean, half)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def print_table(columns, rows):
    head(*columns)
    for row in rows:
        show(*row)


def command_line(doc):
    """The options that the scripts share."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="paired repetitions")
    parser.add_argument("--smoke", action="store_true", help="tiny run, to see that it works")
    return parser


class Watched(s1.Progress):
    """A loop that calls after(k) when k steps are done."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def steps(self, goal, **parts):
        for k in super().steps(goal, **parts):
            yield k
            self.after(k + 1)
