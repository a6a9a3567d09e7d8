"""The README's drawings that are no stage's: the pipeline, what eq. 6 measures, retention.

    python tests/figures.py --out out        after stages 1 and 2; writes pipeline.png and eq6.png,
                                             after evidence.py retention retention.png;
                                             and real.png, the README's first picture, where --out
                                             holds stages 1 to 3 of pairs with planted dirt
"""
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import STAGES, areas  # noqa: E402

s1, s2, s3, _, s5 = STAGES
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "0.35"
STAGES = [("01_proxy.py", "warm up theta_hat\non all pairs (eq. 4)"),
          ("02_meta_rater.py", "which pairs help?\n(eqs. 5-9)"),
          ("03_score.py", "one rating\nfor every pair"),
          ("04_select.py", "keep half\n(eq. 11 or a rival)"),
          ("05_train_eval.py", "train from scratch\non that half (eq. 1)")]


def box(axis, x, y, text, colour=GREY, bold=""):
    """A box around text, centred at (x, y)."""
    axis.text(x, y + 0.75, bold, ha="center", fontsize=11, weight="bold")
    return axis.text(x, y, text, ha="center", va="center", fontsize=11, linespacing=1.4, bbox={
        "boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": colour, "linewidth": 1.5})


def arrow(axis, start, end, text="", colour=GREY, beside=(0, 0.15)):
    """An arrow from the edge of one box to that of another, and a text beside its middle."""
    (x, y), (x2, y2) = start.get_position(), end.get_position()
    axis.annotate("", (x2, y2), (x, y), zorder=4, arrowprops={
        "arrowstyle": "-|>", "color": colour, "linewidth": 1.5, "shrinkA": 2, "shrinkB": 2,
        "patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()})
    axis.text((x + x2) / 2 + beside[0], (y + y2) / 2 + beside[1], text, ha="center", fontsize=10,
              color=colour)


def draw_pipeline(path):
    """Above, the five stages; below, one step of stage 2."""
    figure, axis = plt.subplots(figsize=(13, 6.5))
    axis.set(xlim=(-1.6, 13.3), ylim=(-0.6, 7.1))
    axis.axis("off")
    boxes = [box(axis, 2.95 * k, 6, text, bold=name) for k, (name, text) in enumerate(STAGES)]
    train = box(axis, 0, 2.5, "training pairs x_i:\ngood, plain, wrong")
    val = box(axis, 0, 0, "validation pairs\nthat you trust", BLUE)
    rater = box(axis, 4.6, 4, "rater mu", BLUE)
    ref = box(axis, 4.6, 2, "theta_hat learns from\ntraining pairs", ORANGE)
    proxy = box(axis, 4.6, 0, "theta learns from training\nand validation pairs", ORANGE)
    W = box(axis, 10.3, 4, "W_i = W_inst,i W_batch   (eq. 7)", BLUE)
    gap = box(axis, 10.3, 1, "L(theta; x_i) - L(theta_hat; x_i)\nunder the same t and eps:\n"
              "dL_val / dW_i, to first order")
    for start, end in (*zip(boxes, boxes[1:]), (train, rater), (train, ref), (train, proxy),
                       (ref, gap), (proxy, gap)):
        arrow(axis, start, end)
    arrow(axis, val, proxy, "g_val", BLUE)
    arrow(axis, rater, W, "", BLUE)
    arrow(axis, W, ref, "weighs the pairs of both\n(eq. 5)", ORANGE, (-1.2, 0.15))
    arrow(axis, W, proxy, "", ORANGE)
    arrow(axis, gap, W, "where it is low,\nW_i rises (eq. 6)", BLUE, (1.15, -0.05))
    axis.axhline(5.1, color="0.8", linewidth=1)
    axis.text(-1.5, 4.6, "one step of stage 2", fontsize=11, weight="bold")
    s1.save_figure(figure, path)


@torch.no_grad()
def measure(nets, pairs, own_noise, draws, seed=0):
    """L(theta_hat; x_i) and the difference (N,), means of `draws` draws of t and eps."""
    x, c = pairs.batch(np.arange(len(pairs)))
    rng, sums = s1.seeded(x.device, seed, "figure", own_noise), 0
    for _ in range(draws):
        noise = s1.draw_noise(x, rng, s1.T_SHIFT)
        other = s1.draw_noise(x, rng, s1.T_SHIFT) if own_noise else noise
        L_theta = s1.flow_loss(nets["proxy"], x, c, *other)
        L_hat = s1.flow_loss(nets["ref"], x, c, *noise)
        sums = sums + torch.stack([L_hat, L_theta - L_hat]) / draws
    return sums.numpy()


def draw_eq6(path, nets, pairs):
    """The difference against the loss, one draw of noise: shared by both proxies, and not."""
    strata = np.array(pairs.strata)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    for axis, own in zip(axes, (False, True)):
        L_hat, gap = measure(nets, pairs, own, draws=1)
        for name, colour in s1.STRATUM_COLOURS.items():
            chosen = strata == name
            axis.plot(L_hat[chosen], gap[chosen], ".", color=colour, markersize=4,
                      label=name if chosen.any() else None)
        noise, caption, plain = areas(-gap, strata)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="L(theta_hat; x_i)", xlim=(0, 1), ylim=(-0.5, 0.6))
        axis.set_title(("each proxy its own t and eps" if own else "the same t and eps for both")
                       + f"\nAUC {plain:.2f} over plain, {noise:.2f} over noise, {caption:.2f} "
                       "over wrong captions", fontsize=10)
    axes[0].set_ylabel("L(theta; x_i) - L(theta_hat; x_i)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=10,
                  bbox_to_anchor=(0.5, 0.98), frameon=False, markerscale=3)
    figure.tight_layout()
    s1.save_figure(figure, path)


def draw_retention(path, table):
    """Held-out loss, distance and match against the share that is kept (the paper's Fig. 1)."""
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {"random": "0.6", "eq. 6, Top-K": BLUE, "eq. 9, Shift-Gsample": "#D55E00"}
    full = [row for row in rows if row["arm"] == "full"]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    for axis, metric in zip(axes, ("held-out", "distance", "match")):
        for (kind, colour), mark in zip(kinds.items(), "sov"):
            shares = sorted({int(row["arm"].split()[-1][:-1]) for row in rows
                             if row["arm"].startswith(kind)})
            values = [[float(row[metric]) for row in rows if row["arm"] == f"{kind} {share}%"]
                      for share in shares]
            means, halves = np.transpose([s5.interval(column) for column in values])
            axis.errorbar(shares, means, np.nan_to_num(halves), marker=mark, color=colour,
                          label=kind, capsize=2, markersize=4)
            axis.plot(shares, values, ".", color=colour, alpha=0.7, markersize=4)
        everything = [float(row[metric]) for row in full]
        axis.errorbar(100, *s5.interval(everything), marker="D", color="black", capsize=2,
                      label="full", linestyle="", markersize=4)
        axis.plot([100] * len(full), everything, ".", color="black", alpha=0.7, markersize=4)
        axis.set(xlabel="share of the corpus, %", xticks=[10, 20, 30, 40, 50, 100],
                 ylabel=f"{metric} ({'more' if metric == 'match' else 'less'} is better)")
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log")
    axes[1].set_yticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=10,
                  bbox_to_anchor=(0.5, 0.98), frameon=False)
    figure.tight_layout()
    s1.save_figure(figure, path)


NAMES = {"informative": "right pair", "planted-plain": "plain", "planted-noise": "noise",
         "planted-caption": "wrong caption"}


def draw_real(path, out):
    """Twelve random pairs from every fifth of the ranking, framed by what was planted in them."""
    settings, _ = s1.load_proxy(out)
    pairs = s1.load_data(settings, torch.device("cpu"))[0]
    table = s3.read_table(Path(out) / "ratings.csv")
    place = s3.percentiles(table["rating"])
    rows = s1.find_rows(pairs, table["key"].tolist())
    figure = plt.figure(figsize=(13, 5.4))
    for band, part in enumerate(figure.subfigures(1, 5, wspace=0.04)):
        inside = np.flatnonzero((place // 20).astype(int) == band)
        chosen = rows[np.random.default_rng(band).choice(inside, 12, replace=False)]
        part.suptitle(["rated highest", "", "middle", "", "rated lowest"][band]
                      or f"{20 * band}-{20 * band + 20} %", fontsize=15, y=1.0)
        axes = part.subplots(4, 3, gridspec_kw={"hspace": 0.55, "wspace": 0.08, "left": 0.02,
                                                "right": 0.98, "bottom": 0.02, "top": 0.88})
        for axis, row in zip(axes.flat, chosen):
            x, _ = pairs.batch([row])
            axis.imshow((x[0].permute(1, 2, 0).numpy() + 1) / 2)
            caption = pairs.captions[row].replace(s1.PLAIN_CAPTION, "white")
            words = caption.split(" ", 4)[-1]
            axis.set_title(words, fontsize=11, pad=3)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=s1.STRATUM_COLOURS[pairs.strata[row]], linewidth=4)
    marks = [plt.Line2D([], [], color=s1.STRATUM_COLOURS[stratum], linewidth=5, label=name)
             for stratum, name in NAMES.items() if stratum in pairs.strata]
    figure.legend(handles=marks, loc="lower center", ncol=4, fontsize=14, frameon=False,
                  bbox_to_anchor=(0.5, -0.09))
    s1.save_figure(figure, path)


def main(argv=None):
    args = s1.options(__doc__).parse_args(argv)
    settings, _ = s1.load_proxy(args.out)
    args.signal = "difference"
    nets, _ = s3.load_nets(args, settings, "cpu")
    pairs = s1.load_data(settings, "cpu")[0]
    if settings.plant:
        return draw_real(Path(args.out) / "real.png", args.out)
    draw_pipeline(Path(args.out) / "pipeline.png")
    draw_eq6(Path(args.out) / "eq6.png", nets, pairs.take(np.arange(min(1500, len(pairs)))))
    table = Path(args.out) / "results-retention.csv"
    if table.exists():
        draw_retention(Path(args.out) / "retention.png", table)


if __name__ == "__main__":
    main()
