"""What each addition to the paper does: stage 2 with one of them switched off at a time.

    python tests/additions.py --out out            needs out/proxy.pt; half a minute a row

Prints a Markdown table: AUC of the logits between strata, and the health of the weights.
"""
import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
proxy_stage, rater_stage, score_stage = (importlib.import_module(name) for name in (
    "01_proxy", "02_meta_rater", "03_score"))


def standardise(s):
    """In place of ranks: the raw signal, in standard deviations around its mean."""
    return (s - s.mean(-1, keepdim=True)) / s.std(-1, keepdim=True).clamp_min(1e-8)


def scale(s):
    """In place of ranks: the raw signal in standard deviations, its mean left in."""
    return s / s.std().clamp_min(1e-8)


VARIANTS = {"as shipped": {}, "no entropy term (--tau 0)": {"tau": 0.0},
            "signal standardised, not ranked": {"rank_normal": standardise},
            "signal neither ranked nor centred": {"rank_normal": scale},
            "t not shifted": {"T_SHIFT": 0.0}}


def measure(name, changes, args):
    """One table row: train the rater with the changes, rate the training pairs, compare strata."""
    kept = {key: getattr(rater_stage, key) for key in changes if key != "tau"}
    for key in kept:
        setattr(rater_stage, key, changes[key])
    flags = rater_stage.parse_args(["--out", args.out, "--seed", str(args.seed), "--tau",
                                    str(changes.get("tau", 1.0))])
    settings, snapshots = proxy_stage.load_proxy(args.out)
    torch.manual_seed(args.seed)
    pairs, val, _ = proxy_stage.load_data(settings, "cpu")
    nets = {key: proxy_stage.build_proxy(settings, "cpu") for key in ("proxy", "ref")}
    for net in nets.values():
        net.load_state_dict(snapshots[settings.steps])
    nets["rater"] = rater_stage.Rater(settings.size, settings.patch, settings.words)
    progress = proxy_stage.Progress()
    rater_stage.learn(nets, pairs, val, flags, pairs.batch(np.arange(8)), progress)
    for key, value in kept.items():
        setattr(rater_stage, key, value)
    with torch.no_grad():
        x, c = pairs.batch(np.arange(len(pairs)))
        logits = nets["rater"].logits(nets["rater"].features(x, c)).numpy()
    strata, log = np.array(pairs.strata), np.array(progress.log)[-100:]
    good = logits[strata == "informative"]
    cells = [score_stage.auc(good, logits[strata == other]) for other in
             ("chaotic-noise", "chaotic-caption", "plain")]
    cells += [log[:, rater_stage.COLUMNS.index(c) - 1].min() for c in ("ess", "W_batch")]
    cells += [log[:, rater_stage.COLUMNS.index("W_batch") - 1].max()]
    return f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = [measure(name, changes, arguments) for name, changes in VARIANTS.items()]
    print("\n| variant | over noise | over wrong caption | over plain | lowest ESS | lowest W_batch "
          "| highest W_batch |\n" + "|---" * 7 + "|\n" + "\n".join(table))
