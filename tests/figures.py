"""The drawings of README, claims and lecture that are no stage's.

    python tests/figures.py --out out        after stages 1 to 3; writes pipeline.png, eq6.png,
                                             apart.png (of the tables in .assets/evidence.md),
                                             example.png, whose table it prints for the lecture,
                                             rater.png and rater-tau0.png (two raters learn);
                                             bells.png of both signals;
                                             toy.png, the README's first picture, and
                                             real.png, where --out holds stages 1 to 3
                                             of pairs with planted dirt
"""
import csv
import re
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib import pyplot as plt

from common import CPU, Watched, areas, print_table, s1, s2, s3, s4, s5, start_nets

ASSETS = Path(__file__).resolve().parent.parent / ".assets"
RED, GREY = "#C03000", "0.35"
LOOKS = {                  # stratum: its name in a drawing, mark and hatch, which show in grey, too
    "informative": ("informative", "o", ""), "plain": ("plain", "s", ".."),
    "chaotic-noise": ("noise", "^", "//"), "chaotic-caption": ("wrong caption", "X", "xx")}
STAGES = [("01_proxy.py", "warm up theta_hat\non all pairs (eq. 4)"),
          ("02_meta_rater.py", "which pairs help?\n(eqs. 5-9)"),
          ("03_score.py", "one rating\nfor every pair"),
          ("04_select.py", "keep half\n(eq. 11 or a rival)"),
          ("05_train_eval.py", "train from scratch\non that half (eq. 1)")]


def box(axis, x, y, text, colour=GREY, bold=""):
    """A box around text, centred at (x, y)."""
    axis.text(x, y + 0.75, bold, ha="center", fontsize=13, weight="bold")
    return axis.text(x, y, text, ha="center", va="center", fontsize=13, linespacing=1.4, bbox={
        "boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": colour, "linewidth": 1.5})


def arrow(axis, start, end, lift=0.0, **style):
    """An arrow from the edge of one box to that of another, moved up by `lift`."""
    (x, y), (x2, y2) = start.get_position(), end.get_position()
    axis.annotate("", (x2, y2 + lift), (x, y + lift), zorder=4, arrowprops={
        "arrowstyle": "-|>", "color": GREY, "linewidth": 1.5, "shrinkA": 2, "shrinkB": 2,
        "patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch(), **style})


def draw_pipeline(path):
    """Above, the five stages; below, one step of stage 2, its gradient as thick arrows."""
    figure, axis = plt.subplots(figsize=(14, 8))
    axis.set(xlim=(-1.6, 13.5), ylim=(-1.9, 7.1))
    axis.axis("off")
    boxes = [box(axis, 3 * k, 6, text, bold=name) for k, (name, text) in enumerate(STAGES)]
    train = box(axis, 0, 2.1, "training pairs x_i:\ninformative, plain,\nnoise, wrong caption")
    val = box(axis, 0, -1, "validation pairs\nthat you trust", RED)
    rater = box(axis, 5, 4, "rater mu: pair\nand cosine -> W_i", RED)
    ref = box(axis, 5, 1.5, "theta_hat learns from\ntraining pairs (eq. 5)")
    proxy = box(axis, 5, -1, "theta learns from training\nand validation pairs (eq. 5)", RED)
    W = box(axis, 10.9, 4, "weights of the pairs (eq. 7)\nW_i = W_inst,i W_batch,\n"
            "evened by the entropy term", RED)
    gap = box(axis, 10.9, -0.1, "difference (eq. 6)\nL(theta; x_i) - L(theta_hat; x_i)\n"
              "under one noise t, eps", RED)
    for start, end in (*zip(boxes, boxes[1:]), (train, rater), (train, ref), (train, proxy),
                       (ref, gap)):
        arrow(axis, start, end)
    arrow(axis, rater, W, lift=-0.2)
    for net in (ref, proxy):
        arrow(axis, W, net, color="black", linewidth=2.5)
    axis.text(6.6, 2.95, "weigh the pairs (eq. 5)", fontsize=13, ha="center")
    for start, end, lift in ((val, proxy, 0), (proxy, gap, 0), (gap, W, 0), (W, rater, 0.2)):
        arrow(axis, start, end, lift, color=RED, linewidth=5, mutation_scale=28)
    for x, y, text in ((2.25, -0.7, "1  g_val"), (8.8, -1.3, "2  its losses change"),
                       (11.1, 1.9, "3  ranked, stands for\n    dL_val / dW_i"),
                       (7.75, 4.45, "4  moves mu\n    (eq. 6)")):
        axis.text(x, y, text, color=RED, fontsize=14, weight="bold",
                  ha="left" if "3" in text else "center")
    axis.axhline(5.1, color="0.8", linewidth=1)
    axis.text(-1.5, 4.6, "one step of stage 2", fontsize=14, weight="bold")
    axis.text(-1.5, 4.15, "thick: the way of the gradient of the\nvalidation loss to the rater",
              fontsize=14, color=RED, va="top")
    s3.save_figure(figure, path)


@torch.no_grad()
def measure(nets, pairs, own_noise, draws, seed=0):
    """L(theta_hat; x_i) and the difference (N,), means of `draws` draws of t and eps."""
    x, c = pairs.batch()
    rng, sums = s1.seeded(x.device, seed, "figure", own_noise), 0
    for _ in range(draws):
        noise = s1.draw_noise(x, rng, s2.T_SHIFT)
        other = s1.draw_noise(x, rng, s2.T_SHIFT) if own_noise else noise
        L_theta = s1.flow_loss(nets["proxy"], x, c, *other)
        L_hat = s1.flow_loss(nets["ref"], x, c, *noise)
        sums = sums + torch.stack([L_hat, L_theta - L_hat]) / draws
    return sums.numpy()


def draw_eq6(path, nets, pairs):
    """The difference against the loss, one draw of noise: shared by both proxies, and not."""
    strata = pairs.strata()
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), sharey=True)
    for axis, own in zip(axes, (False, True)):
        L_hat, gap = measure(nets, pairs, own, draws=1)
        for stratum, (name, mark, _) in LOOKS.items():
            chosen = strata == stratum
            axis.plot(L_hat[chosen], gap[chosen], mark, color=s3.STRATUM_COLOURS[stratum],
                      markersize=7, markeredgecolor="white", markeredgewidth=0.4, label=name)
        noise, caption, plain = areas(-gap, strata)
        axis.axhline(0, color="black", linewidth=1)
        axis.set(xlim=(0, 1), ylim=(-0.5, 0.6))
        noises = "each proxy its own noise" if own else "one noise for both proxies (eq. 6)"
        axis.set_title(f"{noises}\nspread: loss {L_hat.std():.2f}, difference {gap.std():.2f}",
                       fontsize=18)
        axis.set_xlabel("loss  L(theta_hat; x_i)", fontsize=17)
        axis.tick_params(labelsize=15)
        outside = (L_hat > 1) | (gap < -0.5) | (gap > 0.6)
        print(f"eq6.png, {noises}: spread of the loss {L_hat.std():.2f}, of the difference "
              f"{gap.std():.2f}; AUC over wrong captions {caption:.2f}, noise {noise:.2f}, plain "
              f"{plain:.2f}; {outside.sum()} of {len(gap)} points outside the frame")
    axes[0].text(0.98, -0.46, "below 0: what validation taught\nis of use to the pair", ha="right",
                 fontsize=16)
    axes[0].set_ylabel("difference\nL(theta; x_i) - L(theta_hat; x_i)", fontsize=17)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=17,
                  bbox_to_anchor=(0.5, 0.97), frameon=False, markerscale=2, handletextpad=0.2)
    figure.tight_layout()
    s3.save_figure(figure, path)


def draw_bells(path, strata, ratings):
    """Both rankings by stratum, the bell of eq. 11 over each, and what it and Top-K keep of them.

    ratings: {equation: rating (N,) under its signal}.
    """
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.6), sharey=True)
    for axis, (equation, rating) in zip(axes, ratings.items()):
        draw_strata(axis, 100 * s3.places(rating), strata)
        draw_bell(axis)
        shares = describe_halves(rating, strata)
        axis.set_title(f"ranking by {equation}; informative:\n{shares}", fontsize=18)
        print(f"bells.png, ranking by {equation}; informative: {shares}")
    axes[0].set_ylabel("pairs, %", fontsize=17)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=3, fontsize=17, frameon=False,
                  bbox_to_anchor=(0.5, 0.03), columnspacing=1.5)
    figure.tight_layout()
    s3.save_figure(figure, path)


def describe_halves(rating, strata):
    """How much of the half that Top-K and Shift-Gsample keep is informative, in words."""
    found = []
    for rule, method in (("Top-K's half", "topk"), ("the bell's", "shift-gsample")):
        rows, _ = s4.select(rating, method, 0.5)
        found.append(f"{100 * np.mean(strata[rows] == 'informative'):.0f} % of {rule}")
    return ", ".join(found)


def draw_strata(axis, place, strata, bins=50):
    """What every 2 % of a ranking consist of, in per cent, stacked."""
    edges = np.linspace(0, 100, bins + 1)
    below, everything = np.zeros(bins), np.histogram(place, edges)[0].clip(1)
    for stratum, (name, _, hatch) in LOOKS.items():
        above = below + 100 * np.histogram(place[strata == stratum], edges)[0] / everything
        axis.stairs(above, edges, baseline=below, fill=True, hatch=hatch, label=name, linewidth=0,
                    facecolor=s3.STRATUM_COLOURS[stratum], edgecolor="white")
        below = above


def draw_bell(axis):
    """Eq. 11 with the defaults of stage 4, as a curve, and a bar over what Top-K keeps of half."""
    usual = s4.parse_args([])
    w = np.linspace(0, 1, 501)
    outline = [patheffects.withStroke(linewidth=7, foreground="white")]
    for drop, style, label in ((0.0, ":", "Gsample: eq. 11, drop 0"),
                               (usual.drop, "-", "Shift-Gsample: eq. 11")):
        p = np.exp(s4.log_density(w, drop, usual.mean, usual.std))
        axis.plot(100 * w, 95 * p, style, color="black", linewidth=4, path_effects=outline,
                  label=label, zorder=3 + drop)
    axis.plot([0, 50], [105, 105], color="black", linewidth=7, solid_capstyle="butt")
    axis.text(51, 105, "Top-K keeps this half", fontsize=16, va="center")
    axis.set(xlim=(0, 100), ylim=(0, 110), yticks=range(0, 101, 25))
    axis.set_xlabel("place in the ranking, % (0 = rated highest)", fontsize=17)
    axis.tick_params(labelsize=15)


def read_apart(text):
    """{stratum: [(steps apart, AUC at t = 0.6, half-width of its interval)]} from the tables that
    `meta_gradient.py distance` prints."""
    found = {}
    for stratum, rows in re.findall(r"^\| over (\S+), steps apart .*\n\|[-|]+\n((?:\|.*\n)+)",
                                    text, re.M):
        cells = [line.strip("| ").split(" | ") for line in rows.splitlines()]
        found[stratum] = [(int(row[0]), *map(float, row[2].split(" ± ")))
                          for row in cells if row[0].isdigit()]
    return found


def draw_apart(path, text):
    """AUC of one draw of the difference against the steps that the proxies are apart."""
    figure, axis = plt.subplots(figsize=(10, 6))
    axis.axhline(0.5, color="0.4", linewidth=1.5)
    axis.text(430, 0.51, "chance", fontsize=17, ha="right")
    axis.text(1, 1.08, "bars: 95 % intervals over five seeds; t = 0.6", fontsize=17)
    for shift, style, (stratum, numbers) in zip((1, 0.95, 1.05), ("-", "--", ":"),
                                                read_apart(text).items()):
        name, mark, _ = LOOKS[stratum]
        steps, mean, half = np.transpose(numbers)
        axis.errorbar(shift * steps, mean, [half, np.minimum(half, 1 - mean)], fmt=mark + style,
                      markersize=13, linewidth=3, elinewidth=1.5, capsize=4,
                      color=s3.STRATUM_COLOURS[stratum], label=name)
    axis.set_xscale("log")
    axis.set_xticks(steps, [f"{step:.0f}" for step in steps])
    axis.minorticks_off()
    axis.set(ylim=(0.2, 1.05))
    axis.tick_params(labelsize=16)
    axis.set_xlabel("steps apart: since theta and theta_hat were one", fontsize=18)
    axis.set_ylabel("AUC of the difference, one draw", fontsize=18)
    axis.legend(fontsize=17, title="informative pairs ranked above", title_fontsize=17,
                frameon=False, loc="lower right")
    s3.save_figure(figure, path)


# ---- the worked example ----------------------------------------------------------------------
THREE = ("informative", "plain", "chaotic-caption")


@torch.no_grad()
def work_example(nets, pairs, group_size, seed=0):
    """Eqs. 5 to 7 for one group (G,) at the end of stage 2, and the rows of its pairs.

    The group is the first in the order of training that holds all of THREE.
    """
    groups = s1.draw_batches(len(pairs), group_size, seed, 0, len(pairs))
    rows = next(rows for rows in groups if set(THREE) <= {*pairs.strata(rows)})
    x, c = pairs.batch(rows)
    t, eps = s1.draw_noise(x, s1.seeded("cpu", seed, "example"), s2.T_SHIFT)
    L_theta, L_hat = (s1.flow_loss(nets[name], x, c, t, eps) for name in ("proxy", "ref"))
    gap = L_theta - L_hat                                                     # (G,)
    s = s2.rank_normal(gap)
    W_inst, W_batch = s2.weigh(nets["rater"], x, c, group_size)               # (1, G), (1, 1)
    W_inst, W_batch = W_inst[0], W_batch[0].expand(group_size)
    W = W_inst * W_batch
    return rows, {"t": t, "L_theta": L_theta, "L_hat": L_hat, "gap": gap,
                  "rank": gap.argsort().argsort() + 1, "s": s, "W_inst": W_inst,
                  "W_batch": W_batch, "W": W, "push": -W * (s - (W_inst * s).sum())}


QUANTITIES = {             # key of `work_example`: what the row is called, how it is written
    "t": ("t, how much noise both proxies see (0 none, 1 nothing else)", ".2f"),
    "L_theta": ("L(theta; x_i), eq. 5 with validation pairs", ".4f"),
    "L_hat": ("L(theta_hat; x_i), eq. 5 without", ".4f"),
    "gap": ("difference of eq. 6", "+.4f"),
    "rank": ("its rank in the group, 1 = lowest", "d"),
    "s": ("s_i, the rank as a normal score, in the place of the difference", "+.3f"),
    "W_inst": ("W_inst,i of eq. 7, in the group sums to 1", ".4f"),
    "W_batch": ("W_batch of eq. 7, the whole group's", ".4f"),
    "W": ("W_i = W_inst,i W_batch of eq. 7", ".4f"),
    "push": ("eq. 6 asks the logit for -W_i (s_i - sum_j W_inst,j s_j)", "+.4f")}


def find_three(pairs, rows, gap):
    """Of each of THREE the place in the group whose difference is the (lower) median of its kind:
    a rule, so that nobody picks the pairs that suit."""
    order = gap.argsort().numpy()
    kinds = [order[pairs.strata(rows[order]) == stratum] for stratum in THREE]
    return [kind[(len(kind) - 1) // 2] for kind in kinds]


def print_example(pairs, rows, numbers):
    """The worked example as a Markdown table: a column for each of THREE."""
    places = find_three(pairs, rows, numbers["gap"])
    lines = [["caption", *pairs.read("caption", rows[places])]]
    for key, (name, digits) in QUANTITIES.items():
        lines.append([name, *(format(numbers[key][place].item(), digits) for place in places)])
    lines.append(["so the rater is asked to", *(ask(numbers["push"][place]) for place in places)])
    print_table([f"of a group of {len(rows)} pairs", *(LOOKS[name][0] for name in THREE)], lines)


def ask(push):
    return "raise its weight" if push > 0 else "lower its weight"


def draw_example(path, pairs, rows, numbers):
    """The three pairs of the worked example with the numbers that decide."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 6.2))
    places = find_three(pairs, rows, numbers["gap"])
    s3.show_pictures(axes, pairs.batch(rows[places])[0], [""] * 3)
    captions = pairs.read("caption", rows[places])
    for axis, stratum, place, caption in zip(axes, THREE, places, captions):
        caption = textwrap.fill(f'"{caption}"', 20)
        axis.set_title(f"{LOOKS[stratum][0]}:\n{caption}", fontsize=20)
        gap, rank = numbers["gap"][place], numbers["rank"][place]
        axis.text(0.5, -0.05, f"L(theta)  {numbers['L_theta'][place]:.3f}\n"
                  f"L(theta_hat)  {numbers['L_hat'][place]:.3f}\ndifference  {gap:+.3f}\n"
                  f"rank {rank} of {len(rows)}:\n{ask(numbers['push'][place])}", fontsize=20,
                  ha="center", va="top", transform=axis.transAxes, linespacing=1.4)
    s3.save_figure(figure, path)


NAMES = {"informative": "right pair", "planted-plain": "plain", "planted-noise": "noise",
         "planted-caption": "wrong caption", "plain": "plain", "chaotic-noise": "noise",
         "chaotic-caption": "wrong caption"}


def draw_real(path, pairs, rating):
    """Twelve random pairs from every fifth of the ranking, framed by what was planted in them."""
    place, strata = 100 * s3.places(rating), pairs.strata()
    figure = plt.figure(figsize=(13, 5.4))
    for band, part in enumerate(figure.subfigures(1, 5, wspace=0.04)):
        inside = np.flatnonzero((place // 20).astype(int) == band)
        chosen = np.random.default_rng(band).choice(inside, 12, replace=False)
        part.suptitle(["rated highest", "", "middle", "", "rated lowest"][band]
                      or f"{20 * band}-{20 * band + 20} %", fontsize=15, y=1.0)
        axes = part.subplots(4, 3, gridspec_kw={"hspace": 0.55, "wspace": 0.08, "left": 0.02,
                                                "right": 0.98, "bottom": 0.02, "top": 0.88})
        for axis, row, x, caption in zip(axes.flat, chosen, pairs.batch(chosen)[0],
                                         pairs.read("caption", chosen)):
            axis.imshow((x.permute(1, 2, 0).numpy() + 1) / 2)
            words = re.sub("^(a photo of )?an? |empty | background", "", caption)
            axis.set_title(words.replace(" on a", "\non"), fontsize=11 - 2 * (" on " in words),
                           pad=3)
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=s3.STRATUM_COLOURS[strata[row]], linewidth=4)
    marks = [plt.Line2D([], [], color=s3.STRATUM_COLOURS[stratum], linewidth=5, label=name)
             for stratum, name in NAMES.items() if stratum in strata]
    figure.legend(handles=marks, loc="lower center", ncol=4, fontsize=14, frameon=False,
                  bbox_to_anchor=(0.5, -0.09))
    s3.save_figure(figure, path)


def draw_results(path, table):
    """Of a results.csv: every seed as a point, the mean as a bar with its 95 % interval."""
    with open(table, newline="") as file:
        results = list(csv.DictReader(file))
    arms, metrics = list(dict.fromkeys(row["arm"] for row in results)), ("held-out", "match")
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.34 * len(arms) + 1), sharey=True)
    for axis, metric in zip(axes, metrics):
        for place, arm in enumerate(arms):
            values = [float(row[metric]) for row in results if row["arm"] == arm]
            mean, half = s5.interval(values)
            axis.errorbar(mean, place, xerr=np.nan_to_num(half), fmt="k|", capsize=3, markersize=12)
            axis.plot(values, [place] * len(values), "o", color="#0072B2", markersize=4, alpha=0.7)
        axis.set(xlabel=f"{metric} ({'more' if s5.METRICS[metric] > 0 else 'less'} is better)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    figure.tight_layout()
    s3.save_figure(figure, path)


# ---- how a rater learns ----------------------------------------------------------------------
def draw_rater(path, settings, weights, pairs, val, flags):
    """Logits of 512 pairs by stratum over a run of stage 2, and the health of its weights."""
    probe, seen = pairs.take(np.arange(min(512, len(pairs)))), {}
    args = s2.parse_args(["--smoke"] * settings.smoke + flags)
    nets = start_nets(settings, weights, val)

    @torch.no_grad()
    def after(k):
        if k % max(1, args.steps // 10) == 0:
            seen[k] = nets["rater"].logits(nets["rater"].features(*probe.batch())).numpy()
    progress = Watched(after)
    s2.learn(nets, pairs, val, args, settings.seed, progress)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
    logits, strata = np.array([*seen.values()]), probe.strata()               # (times, 512)
    logits -= logits.mean(1, keepdims=True)
    for (stratum, (name, *_)), style in zip(LOOKS.items(), ("-", "--", ":", "-.")):
        low, middle, high = np.percentile(logits[:, strata == stratum], (25, 50, 75), axis=1)
        left.plot([*seen], middle, style, color=s3.STRATUM_COLOURS[stratum], label=name)
        left.fill_between([*seen], low, high, color=s3.STRATUM_COLOURS[stratum], alpha=0.2)
    left.set(xlabel="meta step", ylabel="logit, centred (median, quartiles)")
    window = min(25, args.steps)
    for name, column in zip(s2.COLUMNS, np.transpose(progress.log)):
        if name in ("ess", "W_batch", "logit_std"):
            right.plot(range(window, args.steps + 1), np.convolve(
                column, np.full(window, 1 / window), "valid"), label=name)
    right.set(xlabel="meta step", ylim=(0, None))
    for axis in (left, right):
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=4, frameon=False)
    s3.save_figure(figure, path)


def main(argv=None):
    out = Path(s1.parse(argv, __doc__).out)
    settings, weights = s1.load(out / "proxy.pt", "01_proxy.py")
    pairs, val = (s1.open_pairs(out / "pairs", split) for split in ("train", "val"))
    if any(settings.plant):
        return draw_real(out / "real.png", pairs, np.load(out / "ratings.npy")["rating"])
    if not set(LOOKS) <= {*pairs.strata()}:
        raise SystemExit(f"{out}/proxy.pt is of other pairs than the toy, whose kinds are drawn: "
                         "name the --out of a run without --data")
    nets, group_size = s3.load_nets(out, "difference", True, settings, CPU)
    draw_real(out / "toy.png", pairs, np.load(out / "ratings.npy")["rating"])
    if (out / "results.csv").exists():
        draw_results(out / "results.png", out / "results.csv")
    draw_pipeline(out / "pipeline.png")
    draw_eq6(out / "eq6.png", nets, pairs.take(np.arange(min(1500, len(pairs)))))
    draw_apart(out / "apart.png", (ASSETS / "evidence.md").read_text(encoding="utf-8"))
    example = work_example(nets, pairs, group_size)
    print_example(pairs, *example)
    draw_example(out / "example.png", pairs, *example)
    for name, flags in (("rater", []), ("rater-tau0", ["--tau", "0"])):
        draw_rater(out / f"{name}.png", settings, weights, pairs, val, flags)
    draw_bells(out / "bells.png", pairs.strata(), {
        equation: np.load(out / f"{stem}.npy")["rating"]
        for equation, stem in (("eq. 6", s5.EQ6), ("eq. 9", s5.EQ9))})


if __name__ == "__main__":
    main()
