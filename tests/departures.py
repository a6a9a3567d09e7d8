"""The additions to the paper and the released code's departures from it, one at a time, measured.

    python tests/departures.py additions        each addition switched off
    python tests/departures.py assumption       row 2: L(theta_hat) = 0, eq. 8
    python tests/departures.py training         rows 3 to 5: two softmaxes, 1 / B, validation first
    python tests/departures.py weights          rows 3, 4, 9: ratios, shares, temperature; figure
    python tests/departures.py scoring          rows 6 to 8: batch-mates, blank captions, duplicates
    python tests/departures.py stopping         row 10: early stopping; figure

Several names share what they train; without a name all run, in about 50 minutes on one core with
three seeds. Markdown tables: mean and half-width of a 95 % interval over paired seeds, of data,
proxy and rater; figures in --out. A departure is a function or a number that takes the place of one
of the stages' own while a rater trains: see `departures`. Of the released code
(KlingTeam/Alchemist, fbc70a5, no licence) only facts are used.

Row 9, why W_batch is an inverse temperature under a second softmax V_i = softmax_i(W_batch w_i):
    V_i / V_j = exp(W_batch (w_i - w_j))          T = 1 / W_batch; with w = W_inst, w_i - w_j < 1
    sum_i V_i = 1 for every W_batch               no group can be turned down as a whole
    d(sum_i s_i V_i) / dW_batch = Cov_V(s, w)     it learns whether the ranking agrees with s
"""
import contextlib
import csv
import functools
import io
import itertools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch.utils.data import DistributedSampler

import conftest
from common import (CPU, OTHERS, Watched, areas, cell, collect, command_line, head, positions,
                    rate, s1, s2, s3, show, spearman, start_nets, warm_up)

OURS, LOSS, FREE = "eq. 6, as shipped", "eq. 9, as shipped", "eq. 6, no entropy term (--tau 0)"
SIGMOID = "row 3, half: sigmoid head, one softmax, no entropy term"
SOFTMAX = "row 3: sigmoid head, second softmax, no entropy term"
DIVIDED = "row 4: weighted loss divided by its batch again"
SCHEDULE = "row 5: validation only at first"
RELEASED = "rows 1 and 3 to 5 at once, raw signal"
FREE_LOSS = "eq. 9, no entropy term"
OVER = ("over noise", "over wrong caption", "over plain")
EPOCHS, PER_GPU = 10, 32   # released configuration: rater epochs, pairs under one softmax


# ---- what takes the place of what ------------------------------------------------------------
def standardise(s):
    """In place of ranks: the raw signal, in standard deviations around its mean."""
    return (s - s.mean(-1, keepdim=True)) / s.std(-1, keepdim=True).clamp_min(1e-8)


def scale(s):
    """In place of ranks: the raw signal in standard deviations, its mean left in."""
    return s / s.std().clamp_min(1e-8)


def soften(rater, x, c, group_size, weigh=s2.weigh):
    """In place of eq. 7: a sigmoid before the softmax, so that weights differ by at most e."""
    with mock.patch.object(rater, "logits", lambda f: s2.Rater.logits(rater, f).sigmoid()):
        return weigh(rater, x, c, group_size)                                 # (B / G, G or 1)


def soften_twice(rater, x, c, group_size):
    """In place of eq. 7: `soften`, and a second softmax over W_inst W_batch, as in training."""
    W_inst, W_batch = soften(rater, x, c, group_size)                         # (B / G, G or 1)
    return (W_inst * W_batch).softmax(1), torch.ones_like(W_batch)


def reweigh(factors):
    """In place of eq. 5: g_train and g_val of theta times factors(k) at meta step k = 0, 1, ...

    Scales gradients and leaves the values, which the rater sees, as they are. Every step asks for
    three losses: of theta and theta_hat on training pairs, of theta on validation pairs.
    """
    flow_loss, calls = s1.flow_loss, itertools.count()

    def scaled(net, x, c, t, eps):
        L, (k, which) = flow_loss(net, x, c, t, eps), divmod(next(calls), 3)
        train, val = factors(k)
        factor = (train, 1.0, val)[which]
        return factor * L + (1 - factor) * L.detach()
    return scaled


def departures(steps):
    """{name: (flags of stage 2, [(stage, what is replaced, by what)])}, made anew for every run."""
    def upper_level(k):                                    # released weight of L_val, by epochs
        return 1 - 0.03 * (k * EPOCHS // steps)

    def reweighed(factors):
        return s1, "flow_loss", reweigh(factors)
    twice = (s2, "weigh", soften_twice)
    return {
        OURS: ("", []), LOSS: ("--signal loss", []), FREE: ("--tau 0", []),
        FREE_LOSS: ("--signal loss --tau 0", []),
        "signal standardised, not ranked": ("", [(s2, "rank_normal", standardise)]),
        "signal neither ranked nor centred": ("", [(s2, "rank_normal", scale)]),
        "t not shifted": ("", [(s1, "T_SHIFT", 0.0)]),
        SIGMOID: ("--tau 0", [(s2, "weigh", soften)]), SOFTMAX: ("--tau 0", [twice]),
        DIVIDED: ("", [reweighed(lambda k: (1 / PER_GPU, 1.0))]),
        SCHEDULE: ("", [reweighed(lambda k: (1 - upper_level(k), upper_level(k)))]),
        RELEASED: ("--signal loss --tau 0", [
            twice, (s2, "rank_normal", lambda s: s),
            reweighed(lambda k: ((1 - upper_level(k)) / PER_GPU, upper_level(k)))])}


# ---- proxies and raters, each made once ------------------------------------------------------
class Bench:
    """What the tables share; a rater is kept as nets, log {column: (steps,)}, {step: logits}."""

    def __init__(self, args):
        self.out, self.seeds, self.smoke = Path(args.out), range(args.seeds), args.smoke
        self.steps = s2.parse_args(["--smoke"] * args.smoke).steps
        self.out.mkdir(exist_ok=True, parents=True)

    def warm(self, seed):
        """Settings, training pairs, validation pairs and the weights after eq. 4."""
        settings, (pairs, val, _), ref = warm_up(seed, self.smoke)
        return settings, pairs, val, ref.state_dict()

    @torch.enable_grad()                                   # callers that only look have it off
    def learn(self, seed, pairs, weights, flags=()):
        """Stage 2 on `pairs` from these weights of both proxies."""
        settings, _, val, _ = self.warm(seed)
        nets, seen = start_nets(settings, weights), {}
        args, rater = s2.parse_args(["--smoke"] * self.smoke + [*flags]), nets["rater"]

        def after(k):
            if k % max(1, args.steps // 20) == 0:
                with torch.no_grad():
                    seen[k] = rater.logits(rater.features(*pairs.batch())).numpy()
        progress = Watched(after)
        s2.learn(nets, pairs, val, args, seed, progress)
        return nets, dict(zip(s2.COLUMNS, np.array(progress.log).T)), seen

    @functools.cache
    def rater(self, seed, name):
        """Stage 2 on the corpus of `seed` with one departure in force."""
        _, pairs, _, weights = self.warm(seed)
        flags, changes = departures(self.steps)[name]
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(mock.patch.object(*change))
            return self.learn(seed, pairs, weights, flags.split())

    def strata(self, seed):
        return self.warm(seed)[1].strata()


def pure(rating, strata, share):
    """Share of informative pairs among the best rated `share`."""
    best = np.argsort(-rating, kind="stable")[:round(share * len(rating))]
    return np.mean(strata[best] == "informative")


def print_row(name, table):
    """One line; table (seeds, columns)."""
    show(name, *map(cell, zip(*table)))


# ---- the tables ------------------------------------------------------------------------------
def additions(bench):
    """Each addition switched off: AUC of the logits, and the health of the weights."""
    head("variant", *OVER, "lowest ESS", "lowest W_batch", "highest W_batch")
    for name in (OURS, FREE, "signal standardised, not ranked",
                 "signal neither ranked nor centred", "t not shifted"):
        table = []
        for seed in bench.seeds:
            _, log, seen = bench.rater(seed, name)
            W_batch = log["W_batch"][-100:]
            table.append([*areas(seen[bench.steps], bench.strata(seed)), log["ess"][-100:].min(),
                          W_batch.min(), W_batch.max()])
        print_row(name, table)


def training(bench):
    """Rows 3 to 5: AUC at equal steps; the difference is paired, against the same signal."""
    head("variant", *OVER, "wrong caption, minus as shipped", "informative in the top half", "ESS",
         "L(theta) - L(theta_hat), training pairs")
    for name in (OURS, FREE, SIGMOID, SOFTMAX, DIVIDED, SCHEDULE, LOSS, FREE_LOSS, RELEASED):
        base, table = LOSS if name in (LOSS, FREE_LOSS, RELEASED) else OURS, []
        for seed in bench.seeds:
            strata, (_, log, seen) = bench.strata(seed), bench.rater(seed, name)
            cells, ours = (areas(of[bench.steps], strata) for of in (
                seen, bench.rater(seed, base)[2]))
            table.append([*cells, cells[1] - ours[1], pure(seen[bench.steps], strata, 0.5),
                          *(log[column][-100:].mean() for column in ("ess", "gap_mean"))])
        print_row(name, table)


def stopping(bench):
    """Row 10: AUC, purity and ESS against meta steps, with and without the entropy term."""
    moments = [max(1, round(share * bench.steps)) for share in (0.05, 0.15, 0.25, 0.5, 1)]
    head("signal, entropy term", "meta steps", *OVER, "informative in the top tenth",
         "in the top half", "ESS")
    for name in (OURS, FREE, LOSS, FREE_LOSS):
        for k in moments:
            table = []
            for seed in bench.seeds:
                strata, (_, log, seen) = bench.strata(seed), bench.rater(seed, name)
                table.append([*areas(seen[k], strata), pure(seen[k], strata, 0.1),
                              pure(seen[k], strata, 0.5), log["ess"][max(0, k - 20):k].mean()])
            print_row(f"{name} | {k}", table)
    draw_stopping(bench)


def draw_stopping(bench):
    """AUC against meta steps, every seed a thin line, their mean a thick one."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3), sharey=True)
    for name, style in ((OURS, "-C0"), (FREE, ":C0"), (LOSS, "-C1"), (FREE_LOSS, ":C1")):
        steps = sorted(bench.rater(0, name)[2])
        curves = np.array([[areas(bench.rater(seed, name)[2][k], bench.strata(seed)) for k in steps]
                           for seed in bench.seeds])                          # (seeds, times, 3)
        for axis, other, lines in zip(axes, OTHERS, curves.transpose(2, 0, 1)):
            axis.plot(steps, lines.T, style, linewidth=0.7, alpha=0.6)
            axis.plot(steps, lines.mean(0), style, linewidth=2, label=name.split(" (")[0])
            axis.set(xlabel="meta step", ylim=(-0.02, 1.02), title=f"informative over {other}")
    axes[0].set_ylabel("AUC of the logits")
    axes[0].legend(fontsize=8, loc="lower right")
    s3.save_figure(figure, bench.out / "departures-stopping.png")


def assumption(bench):
    """Row 2: how near eq. 8 comes, and whether eq. 9 then says what eq. 6 says.

    The small corpus is memorised step by step; its first row and the full corpus' are the warm-up.
    """
    head("corpus", "steps of theta_hat", "L(theta_hat)", "L of perfect memory",
         "norm of exact gradient", "eq. 6 with exact", "eq. 9 with exact", "eq. 9 with eq. 6 later",
         "share of L(theta_hat) in eq. 9's variance", "over plain, eq. 6", "over plain, eq. 9")
    rows = {}
    for seed in bench.seeds:
        settings, pairs, _, weights = bench.warm(seed)
        rows.setdefault((f"{len(pairs)} pairs", settings.steps), []).append(
            compare_signals(bench, seed, pairs, weights))
        few = collect(s1.draw_toy(96, settings.size, seed + 1000, "train"))
        for steps, state in memorise(bench, seed, few).items():
            rows.setdefault((f"{len(few)} pairs", steps), []).append(
                compare_signals(bench, seed, few, state))
    for (name, steps), table in rows.items():
        print_row(f"{name} | {steps}", table)


def memorise(bench, seed, few):
    """{step: weights} of a theta_hat that sees the same few pairs again and again (eq. 4)."""
    settings, *_ = bench.warm(seed)
    torch.manual_seed(seed)
    net, points, states = s1.build_proxy(settings, CPU), (1, 4, 16), {}

    def after(step):
        if step in [settings.steps * k // 2 for k in points]:
            states[step] = {name: value.clone() for name, value in net.state_dict().items()}
    s1.train(net, few, settings.steps * 8, settings.batch_size, settings.lr, seed,
             decay=0.5, progress=Watched(after))
    return states


def compare_signals(bench, seed, pairs, weights, beta=0.01):
    """The cells of one row of `assumption`: at the first step, and when the proxies have parted."""
    settings, _, val, _ = bench.warm(seed)
    ref, count = s1.build_proxy(settings, CPU), min(64, len(pairs))
    ref.load_state_dict(weights)
    rng = s1.seeded("cpu", seed, "departures")
    train, held = ([*part.batch(np.arange(count)), *s1.draw_noise(
        part.batch(np.arange(count))[0], rng, shift)] for part, shift in (
        (pairs, s1.T_SHIFT), (val, 0.0)))
    exact = s2.exact_meta_gradient(ref, train, held, torch.full((count,), 1 / count),
                                   beta, steps=1)                    # (count,)
    L_hat = s1.flow_loss(ref, *train)                                # (count,)
    g_train, g_val = (torch.autograd.grad(L.mean(), list(ref.parameters()), retain_graph=True)
                      for L in (L_hat, s1.flow_loss(ref, *held)))
    signals = []
    for with_val in (0, 1):                                # theta_hat, theta: one step of eq. 5
        ref.load_state_dict(weights)
        with torch.no_grad():
            for p, g, h in zip(ref.parameters(), g_train, g_val):
                p -= beta * (g + with_val * h)
            signals.append(s1.flow_loss(ref, *train))
    first = [spearman(signals[1] - signals[0], exact), spearman(signals[1], exact)]
    nets, *_ = bench.learn(seed, pairs, weights, () if bench.smoke else ("--steps", "100"))
    columns = rate(nets, pairs, bench.smoke, draws=s3.DRAWS)
    loss, gap, strata = columns["ref_loss"], columns["difference"], pairs.strata()   # (N,) each
    return [L_hat.mean().item(), perfect_memory(pairs, train), exact.norm().item() / beta, *first,
            spearman(loss + gap, gap), loss.var() / (loss.var() + gap.var()),
            *(areas(-signal, strata)[-1] for signal in (gap, loss + gap))]


def perfect_memory(pairs, batch):
    """L of the best possible answer to the batch: the posterior mean over pairs of its caption."""
    losses, (known, tokens) = [], pairs.batch()
    for x, c, t, eps in zip(*batch):
        same = known[(tokens == c).all(1)]                                    # (n, 3, H, W)
        x_t = (1 - t) * x + t * eps
        p = (-(x_t - (1 - t) * same).square().sum((1, 2, 3)) / (2 * t ** 2)).softmax(0)   # (n,)
        losses.append(((x - torch.einsum("n,nchw->chw", p, same)) / t).square().mean().item())
    return np.mean(losses)


def weights(bench):
    """Rows 3, 4 and 9: how far weights can differ, what trains theta, what W_batch does."""
    head("pairs under the softmax", "largest ratio of two weights: possible, row 3",
         "measured, row 3", "measured, as shipped", "ESS: lowest possible, row 3",
         "measured, row 3", "measured, as shipped")
    for B in (2, 8, 32) if bench.smoke else (2, 8, 32, 64, 128, 512):
        ratio, ess = bounds(B)
        row3, ours = ([spread(bench, seed, name, weigh, B) for seed in bench.seeds] for name, weigh
                      in ((SOFTMAX, soften_twice), (OURS, s2.weigh)))
        print_row(f"{B}", [(ratio, a[0], b[0], ess, a[1], b[1]) for a, b in zip(row3, ours)])
    head("batch", "eq. 5", "row 4: g_train / B", "and first weighted epoch (0.97)",
         "and last epoch (0.73)")
    for B in (32, 64) if bench.smoke else (32, 64, 512):
        print_row(f"{B}", [gradient_shares(bench, seed, B) for seed in bench.seeds])
    draw_temperature(bench)


def bounds(B):
    """Largest ratio and lowest ESS of softmax(softmax(logits in (0, 1))): k logits 1, others 0."""
    k = np.arange(1, B)
    ratios = np.exp((np.e - 1) / (k * np.e + B - k))
    return ratios.max(), ((k * ratios + B - k) ** 2 / (k * ratios ** 2 + B - k)).min() / B


@torch.no_grad()
def spread(bench, seed, name, weigh, B):
    """Mean over groups of B pairs: largest ratio of two weights, effective sample size / B."""
    x, c = bench.warm(seed)[1].batch(np.arange(256 if bench.smoke else 512))
    W_inst, _ = weigh(bench.rater(seed, name)[0]["rater"], x, c, B)           # (512 / B, B)
    ratio = W_inst.amax(1) / W_inst.amin(1)
    return ratio.mean().item(), (1 / W_inst.square().sum(1) / B).mean().item()


def gradient_shares(bench, seed, B, draws=4):
    """Row 4: |g_train| / (|g_train| + |g_val|), theta after stage 2, eq. 5 and three departures."""
    _, pairs, val, _ = bench.warm(seed)
    nets, shares = bench.rater(seed, OURS)[0], []
    for k in range(draws):
        rng, norms = s1.seeded("cpu", seed, "shares", k), []
        for part in (pairs, val):
            x, c = part.batch(np.random.default_rng([seed, k]).integers(len(part), size=B))
            L = s1.flow_loss(nets["proxy"], x, c, *s1.draw_noise(
                x, rng, s1.T_SHIFT if part is pairs else 0.0))       # (B,)
            W_inst, W_batch = s2.weigh(nets["rater"], x, c, B)
            loss = (W_inst * W_batch).detach()[0] @ L if part is pairs else L.mean()
            grads = torch.autograd.grad(loss, list(nets["proxy"].parameters()))
            norms.append(torch.cat([g.flatten() for g in grads]).norm().item())
        scaled = [(norms[0] * a, norms[1] * b) for a, b in (
            (1, 1), (1 / B, 1), (0.03 / B, 0.97), (0.27 / B, 0.73))]
        shares.append([a / (a + b) for a, b in scaled])
    return np.mean(shares, 0)


@torch.no_grad()
def draw_temperature(bench):
    """Row 9: the largest ratio under the second softmax by W_batch; dashed: the possible most."""
    figure, axis = plt.subplots(figsize=(5, 3))
    W_batch, (nets, *_) = torch.linspace(0, 1, 21), bench.rater(0, SOFTMAX)
    x, c = bench.warm(0)[1].batch(np.arange(256))
    for B, colour in ((4, "C3"), (8, "C1"), (32, "C0")):
        logits = nets["rater"].logits(nets["rater"].features(x, c)).sigmoid()
        V = (W_batch[:, None, None] * logits.view(-1, B).softmax(1)).softmax(2)   # (21, 256 / B, B)
        axis.plot(W_batch, (V.amax(2) / V.amin(2)).mean(1), color=colour, label=f"{B} pairs")
        axis.plot(W_batch, bounds(B)[0] ** W_batch, "--", color=colour, linewidth=1)
    axis.set(xlabel="W_batch = 1 / temperature", ylabel="largest ratio of two weights")
    s3.legend_above(axis)
    s3.save_figure(figure, bench.out / "departures-temperature.png")


# ---- rows 6 to 8: scoring --------------------------------------------------------------------
@torch.no_grad()
def score_batches(rater, pairs, order, size):
    """Row 6, ratings (N,) as released: softmax over the scoring batch times its W_batch."""
    rating = torch.empty(len(pairs))
    for rows in np.split(order, range(size, len(order), size)):
        W_inst, W_batch = s2.weigh(rater, *pairs.batch(rows), len(rows))
        rating[rows] = (W_inst * W_batch).flatten()
    return rating.numpy()


def scoring(bench):
    head("rows 6 and 7: a corpus scored twice", "rank correlation", "shared top half",
         "mean rating, last batch / others", "over wrong caption, first", "second")
    tables = [rescore(bench, seed) for seed in bench.seeds]                   # {name: cells}
    for name in tables[0]:
        print_row(name, [table[name] for table in tables])
    head("row 7: pairs whose caption was blanked", "in the top half before", "after")
    for stratum in ("informative", *OTHERS):
        print_row(stratum, [blank(bench, seed)[2][stratum] for seed in bench.seeds])
    head("row 8: 2 processes, 1001 pairs, 10 broken", "lines", "pairs twice or more",
         "readable pairs missing", "broken pairs rated")
    for name, keys in (("released: padding, next row", replace_broken(1001)),
                       ("ours, torchrun 03_score.py", rate_broken(1001))):
        again = len(keys) - len(set(keys))
        missing = len(set(range(1001)) - BROKEN - set(keys))
        show(name, len(keys), again, missing, len(BROKEN & set(keys)))


def rescore(bench, seed):
    """{row: rank correlation, shared top half, inflation, AUC over wrong captions, of both}."""
    (_, pairs, *_), (nets, *_) = bench.warm(seed), bench.rater(seed, OURS)
    strata, size, listed = bench.strata(seed), 60 if bench.smoke else 256, np.arange(len(pairs))
    mixed = np.random.default_rng(seed).permutation(len(pairs))

    def compare(one, two, last=()):
        rest = np.setdiff1d(listed, last)
        top = [positions(values) >= len(values) // 2 for values in (one, two)]
        return (spearman(one, two), np.logical_and(*top).mean() * 2,
                two[last].mean() / two[rest].mean() if len(last) else 1.0,
                areas(one, strata)[1], areas(two, strata)[1])

    def compare_released(order):                           # whose last batch is a short one
        return compare(first, score_batches(nets["rater"], pairs, order, size),
                       order[len(pairs) // size * size:])
    first = score_batches(nets["rater"], pairs, listed, size)
    ours, moved = rate(nets, pairs, bench.smoke)["rating"], np.empty(len(pairs))
    moved[mixed] = rate(nets, pairs.take(mixed), bench.smoke)["rating"]
    full, without, _ = blank(bench, seed)
    return {
        "released: in another order": compare_released(mixed),
        "released: sorted by a first rating": compare_released(np.argsort(-first, kind="stable")),
        "ours: in another order": compare(ours, moved),
        "released: a tenth of the captions blank": compare(full, without)}


@torch.no_grad()
def blank(bench, seed):
    """Row 7: logits (N,) with all captions, with a tenth blanked, and {stratum: share of its
    blanked pairs that were in the top half, share that then are}."""
    (_, pairs, *_), (nets, *_) = bench.warm(seed), bench.rater(seed, OURS)
    strata, (x, c) = pairs.strata(), pairs.batch()
    dropped = s1.drop_captions(c, s1.seeded("cpu", seed, "blank"))
    full, without = (nets["rater"].logits(nets["rater"].features(x, words)).numpy()
                     for words in (c, dropped))
    gone = (dropped != c).any(1).numpy()
    tops = [positions(values) >= len(values) // 2 for values in (full, without)]
    return full, without, {name: [top[gone & (strata == name)].mean() for top in tops]
                           for name in ("informative", *OTHERS)}


BROKEN = set(range(50, 1001, 100))                         # 10 of 1001 rows


def replace_broken(count):
    """Row 8 as released: rows of a padded sampler; a broken row's place goes to the next row."""
    samplers = (DistributedSampler(range(count), 2, rank, shuffle=False) for rank in (0, 1))
    return [(row + 1) % count if row in BROKEN else row for rows in samplers for row in rows]


def rate_broken(count):
    """Row 8, ours: rows named in ratings.csv after two processes of 03_score.py on a tar."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for row, (key, image, caption, _) in enumerate(s1.draw_toy(count, 16, 0, "train")):
            Image.fromarray(image.transpose(1, 2, 0)).save(file := io.BytesIO(), "PNG")
            files[f"{key}.png"] = file.getvalue()[:100 if row in BROKEN else None]     # cut off
            files[f"{key}.txt"] = caption.encode()
        conftest.write_tar(f"{folder}/pairs.tar", files)
        for command, launcher in (("01_proxy.py --smoke", ()), ("02_meta_rater.py --smoke", ()), (
                f"03_score.py --data {folder}/pairs.tar", conftest.TORCHRUN)):
            conftest.run(f"{command} --out {folder}/out", launcher).check_returncode()
        rated, = Path(folder, "out").glob("ratings-of-*.csv")
        with open(rated, newline="") as file:
            return [int(line["key"].removeprefix("train")) for line in csv.DictReader(file)]


TABLES = {"additions": additions, "training": training, "weights": weights, "scoring": scoring,
          "stopping": stopping, "assumption": assumption}


def main(argv=None):
    parser = command_line(__doc__, "out/departures")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    bench = Bench(args)
    for name in args.tables or TABLES:
        TABLES[name](bench)


if __name__ == "__main__":
    main()
