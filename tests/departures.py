"""The additions to the paper and the released code's departures from it, one at a time, measured.

    python tests/departures.py additions        each addition switched off
    python tests/departures.py training         rows 1 and 3 to 5: another signal, two softmaxes,
                                                1 / B, validation first
    python tests/departures.py scoring          rows 6 and 7: batch-mates, blank captions

They share what they train; without a name all run, in about half an hour on one core with three
seeds. Markdown tables: mean and half-width of a 95 % interval over paired seeds, of data, proxy and
rater. A departure is a function or a number that takes the place of one of the stages' own while a
rater trains: see `departures`. Of the released code (KlingTeam/Alchemist, fbc70a5, no licence) only
facts are used. The rows are those of .assets/evidence.md.
"""
import contextlib
import functools
import itertools
from unittest import mock

import numpy as np
import torch

from common import (OTHERS, areas, cell, command_line, head, positions, rate, s1, s2, show,
                    spearman, start_nets, warm_up)

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
        "t not shifted": ("", [(s2, "T_SHIFT", 0.0)]),
        SIGMOID: ("--tau 0", [(s2, "weigh", soften)]), SOFTMAX: ("--tau 0", [twice]),
        DIVIDED: ("", [reweighed(lambda k: (1 / PER_GPU, 1.0))]),
        SCHEDULE: ("", [reweighed(lambda k: (1 - upper_level(k), upper_level(k)))]),
        RELEASED: ("--signal loss --tau 0", [
            twice, (s2, "rank_normal", lambda s: s),
            reweighed(lambda k: ((1 - upper_level(k)) / PER_GPU, upper_level(k)))])}


# ---- raters, each made once ------------------------------------------------------------------
class Bench:
    """What the tables share; a rater is kept as nets, log {column: (steps,)}, its logits (N,)."""

    def __init__(self, args):
        self.seeds, self.smoke = range(args.seeds), args.smoke

    def pairs(self, seed):
        return warm_up(seed, self.smoke)[1][0]

    @functools.cache
    def rater(self, seed, name):
        """Stage 2 on the corpus of `seed` with one departure in force."""
        settings, (pairs, val, _), ref = warm_up(seed, self.smoke)
        nets, progress = start_nets(settings, ref.state_dict(), val), s1.Progress()
        smoke = ["--smoke"] * self.smoke
        flags, changes = departures(s2.parse_args(smoke).steps)[name]
        with contextlib.ExitStack() as stack, torch.enable_grad():    # which callers may have off
            for change in changes:
                stack.enter_context(mock.patch.object(*change))
            s2.learn(nets, pairs, val, s2.parse_args(smoke + flags.split()), seed, progress)
        with torch.no_grad():
            logits = nets["rater"].logits(nets["rater"].features(*pairs.batch())).numpy()
        return nets, dict(zip(s2.COLUMNS, np.array(progress.log).T)), logits


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
            _, log, logits = bench.rater(seed, name)
            W_batch = log["W_batch"][-100:]
            table.append([*areas(logits, bench.pairs(seed).strata()), log["ess"][-100:].min(),
                          W_batch.min(), W_batch.max()])
        print_row(name, table)


def training(bench):
    """Rows 1 and 3 to 5: AUC at equal steps; the difference is paired, against the same signal."""
    head("variant", *OVER, "wrong caption, minus as shipped", "informative in the top half", "ESS",
         "L(theta) - L(theta_hat), training pairs")
    for name in (OURS, FREE, SIGMOID, SOFTMAX, DIVIDED, SCHEDULE, LOSS, FREE_LOSS, RELEASED):
        base, table = LOSS if name in (LOSS, FREE_LOSS, RELEASED) else OURS, []
        for seed in bench.seeds:
            strata, (_, log, logits) = bench.pairs(seed).strata(), bench.rater(seed, name)
            cells, ours = areas(logits, strata), areas(bench.rater(seed, base)[2], strata)
            half = strata[np.argsort(-logits, kind="stable")[:len(logits) // 2]]
            table.append([*cells, cells[1] - ours[1], np.mean(half == "informative"),
                          *(log[column][-100:].mean() for column in ("ess", "gap_mean"))])
        print_row(name, table)


# ---- rows 6 and 7: scoring -------------------------------------------------------------------
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


def rescore(bench, seed):
    """{row: rank correlation, shared top half, inflation, AUC over wrong captions, of both}."""
    pairs, (nets, *_) = bench.pairs(seed), bench.rater(seed, OURS)
    strata, size, listed = pairs.strata(), 60 if bench.smoke else 256, np.arange(len(pairs))
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
    pairs, (nets, *_) = bench.pairs(seed), bench.rater(seed, OURS)
    strata, (x, c) = pairs.strata(), pairs.batch()
    dropped = s1.drop_captions(c, s1.seeded("cpu", seed, "blank"))
    full, without = (nets["rater"].logits(nets["rater"].features(x, words)).numpy()
                     for words in (c, dropped))
    gone = (dropped != c).any(1).numpy()
    tops = [positions(values) >= len(values) // 2 for values in (full, without)]
    return full, without, {name: [top[gone & (strata == name)].mean() for top in tops]
                           for name in ("informative", *OTHERS)}


TABLES = {"additions": additions, "training": training, "scoring": scoring}


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    bench = Bench(args)
    for name in args.tables or TABLES:
        TABLES[name](bench)


if __name__ == "__main__":
    main()
