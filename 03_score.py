"""Stage 3 of 5: one multi-granularity score for every training pair.

The weight of eq. 7 is only defined inside a batch. A score has to stand alone, so it keeps what
belongs to the pair and averages the batch away:

    rating_i = What_i + log(mean of W_batch over several random groups that hold pair i)

which is log W_i up to the softmax's normaliser. The groups of a pair are fixed by the seed and its
row in the corpus; batch size, order of work and number of processes change nothing, and every pair
is scored once. (The released code's ratings are softmaxes over the scoring batch: they depend on
batch-mates, on file order, and grow in a short last batch.)

Two baselines that need no rater stand beside it: `loss`, L(theta_hat; x_i) after stage 2, and
`difference`, L(theta; x_i) - L(theta_hat; x_i), both the mean of 8 draws of t and eps.

Reads    out/proxy.pt, out/rater.pt                       (--signal loss: out/rater-loss.pt)
Writes   out/ratings.csv, out/ratings.png (histogram), out/ratings-bands.png (pictures by
         percentile, the paper's Fig. 5), out/ratings-dynamics.png (its Fig. 3)
         (--signal loss: the same with ratings-loss)
Run      python 03_score.py                               twenty seconds on two cores
         torchrun --nproc-per-node 2 03_score.py
"""
import importlib
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

proxy_stage = importlib.import_module("01_proxy")
rater_stage = importlib.import_module("02_meta_rater")

CHUNK = 512                # corpus rows that share a stream of random numbers
POOL = 2048                # pairs that companions are drawn from, so memory does not grow
GROUPS = 8                 # random groups per pair
DRAWS = 8                  # of t and eps behind the two baselines
BANDS = 10                 # percentile bands in the figures


# ---- the score -------------------------------------------------------------------------------
def group_rating(rater, f, pool, group_size, rng):
    """Mean W_batch (B,) of GROUPS groups per pair: its features f (B, D) with drawn companions.

    pool (M, D) holds the features that companions come from.
    """
    drawn = torch.randint(len(pool), (CHUNK, GROUPS, group_size - 1), generator=rng,
                          device=f.device)[:len(f)]                           # (B, R, G - 1)
    own = f[:, None, None].expand(-1, GROUPS, 1, -1)                          # (B, R, 1, D)
    groups = torch.cat([own, pool[drawn]], 2)                                 # (B, R, G, D)
    return rater.group_weight(groups).mean((1, 2))                            # (B,)


def baselines(proxy, ref, x, c, rng):
    """loss (B,) and difference (B,), each the mean of DRAWS draws at the meta step's noise."""
    drawn = torch.empty(CHUNK, *x.shape[1:], device=x.device)
    sums = torch.zeros(len(x), 2, device=x.device)
    for _ in range(DRAWS):
        t = torch.randn(CHUNK, generator=rng, device=x.device) + rater_stage.T_SHIFT
        noise = t.sigmoid()[:len(x)], drawn.normal_(generator=rng)[:len(x)]   # same for both nets
        L_theta, L_hat = (proxy_stage.flow_loss(net, x, c, *noise) for net in (proxy, ref))
        sums += torch.stack([L_hat, L_theta - L_hat], 1) / DRAWS
    return sums.unbind(1)


@torch.no_grad()
def score_chunk(nets, pairs, pool, chunk, batch_size, seed):
    """Columns instance, group, loss, difference (B, 4) of corpus rows [CHUNK k, CHUNK (k + 1))."""
    rows = np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, len(pairs)))
    x, c = pairs.batch(rows)
    f = features(nets["rater"], x, c, batch_size)                             # (B, D)
    rng = proxy_stage.seeded(x.device, seed, "score", chunk)
    group = group_rating(nets["rater"], f, pool, nets["group_size"], rng)
    return torch.stack([nets["rater"].logits(f), group,
                        *baselines(nets["proxy"], nets["ref"], x, c, rng)], 1)


def features(rater, x, c, batch_size):
    """The rater's features (B, D), `batch_size` pairs at a time."""
    return torch.cat([rater.features(*part) for part in zip(x.split(batch_size),
                                                            c.split(batch_size))])


@torch.no_grad()
def score(nets, pairs, batch_size, seed):
    """Columns instance, group, loss, difference (N, 4) of all pairs; processes share the chunks."""
    rng = np.random.default_rng([seed, len(pairs)])
    pool_rows = np.sort(rng.permutation(len(pairs))[:POOL])
    pool = features(nets["rater"], *pairs.batch(pool_rows), batch_size)       # (M, D)
    table = torch.zeros(len(pairs), 4, device=pool.device)
    for chunk in range(proxy_stage.rank(), -(-len(pairs) // CHUNK), proxy_stage.world()):
        columns = score_chunk(nets, pairs, pool, chunk, batch_size, seed)
        table[chunk * CHUNK:chunk * CHUNK + len(columns)] = columns
    return proxy_stage.add_up(table).cpu().double().numpy()


def percentiles(rating):
    """Percentile position (N,) in [0, 100), 0 for the highest rating, as in eq. 11."""
    order = np.argsort(-rating, kind="stable")
    place = np.empty(len(rating))
    place[order] = np.arange(len(rating)) * 100 / len(rating)
    return place


# ---- analysis: what the ratings mean ---------------------------------------------------------
def auc(high, low):
    """P(a value of `high` > one of `low`), ties counted half."""
    low = np.sort(low)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return below.mean() / 2 / len(low)


def report(strata, column, name):
    """One line: how far a column ranks informative pairs above each other stratum (AUC)."""
    good = column[strata == "informative"]
    rest = sorted(set(strata) - {"informative"})
    chaotic = np.char.startswith(strata, "chaotic")
    if not len(good) or not chaotic.any():
        return
    words = [f"{stratum} {auc(good, column[strata == stratum]):.3f}" for stratum in rest]
    proxy_stage.print0(f"AUC informative over ({name}): all chaotic "
                       f"{auc(good, column[chaotic]):.3f}, " + ", ".join(words))


def print_bands(strata, percentile):
    """The composition of every percentile band, as a Markdown table."""
    names = [name for name in proxy_stage.STRATUM_COLOURS if name in set(strata)]
    if not names:
        return
    proxy_stage.print0("\n| percentile | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1)
                       + "|")
    for low in range(0, 100, 100 // BANDS):
        chosen = strata[(percentile >= low) & (percentile < low + 100 // BANDS)]
        shares = " | ".join(f"{np.mean(chosen == name):.0%}" for name in names)
        proxy_stage.print0(f"| {low}-{low + 100 // BANDS} | {shares} |")


def probe_dynamics(proxy, pairs, rows, draws, seed):
    """Mean loss and gradient norm of `draws` batches from the corpus rows of one band."""
    values = []
    for k in range(draws):
        rng = proxy_stage.seeded(pairs.images.device, seed, "dynamics", k)
        picked = np.random.default_rng([seed, k]).choice(rows, min(32, len(rows)), replace=False)
        x, c = pairs.batch(picked)
        t = torch.randn(len(x), generator=rng, device=x.device).sigmoid()
        eps = torch.randn(x.shape, generator=rng, device=x.device)
        loss = proxy_stage.flow_loss(proxy, x, c, t, eps).mean()
        grads = torch.autograd.grad(loss, list(proxy.parameters()))
        values.append((loss.item(), torch.cat([g.flatten() for g in grads]).norm().item()))
    return np.mean(values, 0)


# ---- figures ---------------------------------------------------------------------------------
def draw_histogram(path, rating, percentile, strata):
    """Ratings by stratum, and what stands where in the ranking."""
    names = [name for name in proxy_stage.STRATUM_COLOURS if name in set(strata)]
    groups = [(name, strata == name) for name in names] or [("all pairs", strata == strata)]
    colours = [proxy_stage.STRATUM_COLOURS.get(name, "black") for name, _ in groups]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
    for axis, values, bins, label in (
            (left, rating, 60, "rating"),
            (right, percentile, BANDS, "percentile (0 = highest rating)")):
        axis.hist([values[chosen] for _, chosen in groups], bins=bins, stacked=True, color=colours,
                  label=[name for name, _ in groups])
        axis.set(xlabel=label, ylabel="pairs")
    proxy_stage.legend_above(left)
    proxy_stage.save_figure(figure, path)


def draw_bands(path, pairs, percentile, seed):
    """Pictures and captions drawn at random, a column per percentile band (the paper's Fig. 5)."""
    figure, axes = plt.subplots(5, BANDS, figsize=(1.3 * BANDS, 8.5))
    for band, column in enumerate(axes.T):
        inside = np.flatnonzero((percentile * BANDS // 100).astype(int) == band)
        rows = np.random.default_rng([seed, band]).choice(inside, 5, replace=len(inside) < 5)
        proxy_stage.show_pictures(column, pairs.batch(rows)[0], [pairs.captions[i] for i in rows])
        column[0].text(0.5, 1.75, f"{band * 100 // BANDS}-{(band + 1) * 100 // BANDS} %",
                       ha="center", fontsize=12, transform=column[0].transAxes)
    figure.subplots_adjust(wspace=0.08, hspace=0.35)
    proxy_stage.save_figure(figure, path)


def draw_dynamics(path, settings, snapshots, pairs, percentile, draws):
    """Loss and gradient norm by rating band while the proxy warms up (the paper's Fig. 3)."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3))
    bands = [np.flatnonzero((percentile * BANDS // 100).astype(int) == k) for k in range(BANDS)]
    middles = (np.arange(BANDS) + 0.5) * 100 / BANDS
    for k, (step, weights) in enumerate(sorted(snapshots.items())):
        proxy = proxy_stage.build_proxy(settings, pairs.images.device)
        proxy.load_state_dict(weights)
        table = np.array([probe_dynamics(proxy, pairs, rows, draws, settings.seed)
                          for rows in bands])                                 # (BANDS, 2)
        for axis, values in zip(axes, table.T):
            axis.plot(middles, values, "o-", color=plt.cm.viridis(k / len(snapshots)),
                      label=f"step {step}", markersize=4)
    for axis, label in zip(axes, ("loss", "gradient norm of 32 pairs")):
        axis.set(xlabel="percentile (0 = highest rating)", ylabel=label, ylim=(0, None))
        proxy_stage.legend_above(axis)
    proxy_stage.save_figure(figure, path)


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = proxy_stage.options(
        __doc__, data=(None, "pairs to rate instead of the training pairs, same layouts"),
        batch_size=(512, "pairs at a time; changes nothing but memory"))
    parser.add_argument("--signal", choices=["difference", "loss"], default="difference",
                        help="which rater of stage 2")
    return parser.parse_args(argv)


def load_nets(args, settings, device):
    """theta, theta_hat and mu as stage 2 left them, and its group size."""
    file = Path(args.out) / f"rater{rater_stage.suffix(args.signal)}.pt"
    saved = proxy_stage.load(file, f"02_meta_rater.py --signal {args.signal}")
    nets = {name: proxy_stage.build_proxy(settings, device) for name in ("proxy", "ref")}
    nets["rater"] = rater_stage.Rater(settings.size, settings.patch, settings.words).to(device)
    for name, net in nets.items():
        net.load_state_dict(saved[name])
    return nets | {"group_size": saved["settings"]["group_size"]}


def main(args):
    device, began = proxy_stage.start(args), time.time()
    saved = proxy_stage.load(Path(args.out) / "proxy.pt", "01_proxy.py")
    settings, _ = proxy_stage.load_proxy(args.out)
    nets = load_nets(args, settings, device)
    if args.data:
        pairs = proxy_stage.read_pairs(args.data, settings.size, settings.words).to(device)
    else:
        pairs = proxy_stage.load_data(settings, device)[0]
    instance, group, loss, difference = score(nets, pairs, args.batch_size, args.seed).T
    rating = instance + np.log(group)                      # log W_i, but for eq. 7's normaliser
    percentile, strata = percentiles(rating), np.array(pairs.strata)

    stem = Path(args.out) / f"ratings{rater_stage.suffix(args.signal)}"
    numbers = (instance, group, rating, percentile, loss, difference)
    columns = ["key", "instance", "group", "rating", "percentile", "loss", "difference", "stratum"]
    proxy_stage.write_csv(f"{stem}.csv", columns, zip(
        pairs.keys, *([f"{v:.6g}" for v in column] for column in numbers), strata))
    report(strata, rating, "rating")
    report(strata, -loss, "-loss, no rater")
    report(strata, -difference, "-difference, no rater")
    print_bands(strata, percentile)
    if proxy_stage.rank() == 0:
        draw_histogram(f"{stem}.png", rating, percentile, strata)
        draw_bands(f"{stem}-bands.png", pairs, percentile, args.seed)
        draw_dynamics(f"{stem}-dynamics.png", settings, saved["snapshots"], pairs, percentile,
                      draws=2 if args.smoke else 16)
    proxy_stage.print0(f"\nwrote {stem}.csv and three figures: {len(pairs)} pairs in "
                       f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main(parse_args())
