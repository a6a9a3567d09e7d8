"""The README's two drawings that are no stage's: the pipeline, and what eq. 6 measures.

    python tests/figures.py --out out        after stages 1 and 2; writes pipeline.png and eq6.png
"""
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import STAGES, areas  # noqa: E402

proxy_stage, rater_stage, score_stage, *_ = STAGES
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
    arrow(axis, gap, W, "where it is low,\nW_i rises (eq. 6)", BLUE, (1.15, -0.05))
    axis.axhline(5.1, color="0.8", linewidth=1)
    axis.text(-1.5, 4.6, "one step of stage 2", fontsize=11, weight="bold")
    proxy_stage.save_figure(figure, path)


@torch.no_grad()
def measure(nets, pairs, own_noise, draws, seed=0):
    """L(theta_hat; x_i) and the difference (N,), means of `draws` draws of t and eps."""
    x, c = pairs.batch(np.arange(len(pairs)))
    rng, sums = proxy_stage.seeded(x.device, seed, "figure", own_noise), 0
    for _ in range(draws):
        noise = proxy_stage.draw_noise(x, rng, rater_stage.T_SHIFT)
        other = proxy_stage.draw_noise(x, rng, rater_stage.T_SHIFT) if own_noise else noise
        L_theta = proxy_stage.flow_loss(nets["proxy"], x, c, *other)
        L_hat = proxy_stage.flow_loss(nets["ref"], x, c, *noise)
        sums = sums + torch.stack([L_hat, L_theta - L_hat]) / draws
    return sums.numpy()


def draw_eq6(path, nets, pairs):
    """The difference against the loss, one draw of noise: shared by both proxies, and not."""
    strata = np.array(pairs.strata)
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
    for axis, own in zip(axes, (False, True)):
        L_hat, gap = measure(nets, pairs, own, draws=1)
        for name, colour in proxy_stage.STRATUM_COLOURS.items():
            chosen = strata == name
            axis.plot(L_hat[chosen], gap[chosen], ".", color=colour, markersize=4,
                      label=name if chosen.any() else None)
        noise, caption, plain = areas(-gap, strata)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xlabel="L(theta_hat; x_i)", xlim=(0, 1), ylim=(-0.5, 0.6))
        axis.set_title(("each proxy its own t and eps" if own else "the same t and eps for both")
                       + f"\nAUC {plain:.2f} over plain, {noise:.2f} over noise, {caption:.2f} over "
                       "wrong captions", fontsize=10)
    axes[0].set_ylabel("L(theta; x_i) - L(theta_hat; x_i)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=10,
                  bbox_to_anchor=(0.5, 0.98), frameon=False, markerscale=3)
    figure.tight_layout()
    proxy_stage.save_figure(figure, path)


def main(argv=None):
    args = proxy_stage.options(__doc__).parse_args(argv)
    settings, _ = proxy_stage.load_proxy(args.out)
    args.signal = "difference"
    nets = score_stage.load_nets(args, settings, "cpu")
    pairs = proxy_stage.load_data(settings, "cpu")[0]
    draw_pipeline(Path(args.out) / "pipeline.png")
    draw_eq6(Path(args.out) / "eq6.png", nets, pairs.take(np.arange(min(1500, len(pairs)))))


if __name__ == "__main__":
    main()
