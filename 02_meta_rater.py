"""Stage 2 of 5: the rater mu learns which pairs help, from an explicit meta-gradient (eqs. 2-10).

Two proxies leave the warm-up side by side. theta trains on the weighted training pairs and on
validation pairs, theta_hat on the weighted training pairs alone. Where theta has the lower loss
on a training pair, validation data asked for that pair, and its weight rises.

    eq. 2    mu* = argmin_mu L(theta*(mu); D_val)             what is wanted (outer problem)
    eq. 3    theta*(mu) = argmin_theta sum_i W_i(mu) L(theta; x_i)                     (inner)
    eq. 5    theta     <- theta - beta (grad L(theta; D_val) + sum_i W_i grad L(theta; x_i))
             theta_hat <- the same without the validation term
    eq. 6    mu <- mu - alpha sum_i (L(theta; x_i) - L(theta_hat; x_i)) grad_mu W_i
    eq. 7    W_inst = softmax over a group of pairs,  W_i = W_inst,i * W_batch
    eq. 8    assume L(theta_hat; x_i) = 0, and eq. 6 becomes
    eq. 9    mu <- mu - alpha sum_i L(theta; x_i) grad_mu W_i           (--signal loss)
    eq. 10   the batch gradient of eq. 5: mean over pairs of W_i grad L; here a sum, as W_i holds
             the 1/N already

Why eq. 6 is a meta-gradient: with theta = theta_hat - beta g_val,
    L_i(theta) - L_i(theta_hat) = -beta <grad L_i, g_val> + O(beta^2) = dL_val / dW_i + O(beta^2),
provided that both losses use the same t and eps. With separate noise a step shows little but the
noise, which the rater then has to average away.

Added to the paper, each marked in the code (what happens without it: .assets/differences.md):
    entropy term   keeps all weight from falling on one pair, and pulls W_batch to 0.5; the logit
                   tends to -W_batch E[signal] / tau
    rank signal    a pair's difference is ranked in its group, a group's total among the step's
                   groups: no heavy tails, and no common drift that takes every W_batch to 1.
                   W_batch needs both: either alone lets it drift
    shifted t      the signal is drawn at high noise, where captions matter to the loss; no effect
                   on the toy pairs
    no caption     a tenth of the captions is blanked as in the warm-up. Without it both proxies
                   forget pictures without a caption, and stage 3 can no longer tell what a
                   caption is worth
Released code: eq. 9 only, no reference proxy, another softmax on top, validation only at first.
Differs from the paper: steps by AdamW; the softmax runs over groups of fixed size (the paper's 64
pairs on 2 GPUs are groups of 32), so the number of processes changes nothing.

Reads    out/proxy.pt
Writes   out/rater.pt, .csv, .png      (--signal loss: out/rater-loss.pt, .csv, .png)
Run      python 02_meta_rater.py                        under a minute on two cores
         torchrun --nproc-per-node 2 -- 02_meta_rater.py --signal loss
"""
import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from matplotlib import pyplot as plt
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))             # PYTHONSAFEPATH leaves it out
s1 = importlib.import_module("01_proxy")

PROBE = 512                # training pairs whose logits the figure follows


# ---- the rater -------------------------------------------------------------------------------
class Rater(nn.Module):
    """mu: clean image and caption -> features -> Instance MLP (logit) and Group MLP (W_batch).

    The paper's Fig. 2a with a small transformer encoder in place of a text-to-image model's. The
    Group MLP is the paper's part: in all our measurements ratings without it are as good.
    """

    def __init__(self, size, patch, words, width=64, depth=2):
        super().__init__()
        self.patch = patch
        self.to_patch = nn.Linear(3 * patch ** 2, width)
        self.word = nn.Embedding(s1.VOCABULARY, width)
        self.position = nn.Parameter(0.2 * torch.randn(1, words + (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.instance = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 1))
        self.group = nn.Sequential(nn.Linear(2 * width, 64), nn.GELU(), nn.Linear(64, 1))

    def features(self, x, c):                              # (B, 3, H, W), (B, T)
        patches = self.to_patch(s1.patchify(x, self.patch))                   # (B, P, D)
        return self.encoder(torch.cat([self.word(c), patches], 1) + self.position).mean(1)  # (B, D)

    def logits(self, f):
        """Instance rating of features (..., D) -> (...): eq. 7's W_i before its softmax."""
        return self.instance(f).squeeze(-1)

    def group_weight(self, mean, var):
        """W_batch (..., 1) of groups whose features have this mean and variance (..., D)."""
        return self.group(torch.cat([mean, var], -1)).sigmoid()


def weigh(rater, x, c, group_size):
    """Eq. 7: W_inst (B / G, G), summing to 1 in every group of G pairs, and W_batch (B / G, 1)."""
    f = rater.features(x, c)                                                  # (B, D)
    W_inst = rater.logits(f).view(-1, group_size).softmax(1)                  # (B / G, G)   eq. 7
    groups = f.view(-1, group_size, f.shape[-1])                              # (B / G, G, D)
    return W_inst, rater.group_weight(groups.mean(1), groups.var(1, unbiased=False))


# ---- the meta-gradient -----------------------------------------------------------------------
def rater_objective(W_inst, W_batch, s, s_group):
    """Its gradient in mu is eq. 6, sum_i s_i grad (W_inst,i W_batch), averaged over groups.

    s (B / G, G) is the signal: L(theta; x_i) - L(theta_hat; x_i) in eq. 6, here its ranks. By the
    product rule the Instance MLP gets s_i W_batch, and the Group MLP the group's total s_group
    (B / G, 1), in eq. 6 sum_i s_i W_inst,i. It is an argument because it is ranked by itself.
    """
    instance = W_batch.detach() * (s * W_inst).sum(1, keepdim=True)           # (B / G, 1)
    return (instance + s_group * W_batch).mean()                              # eqs. 6, 9


def rank_signal(signal, W_inst):
    """Added: ranks of a pair in its group (B / G, G), of a group's total (B / G, 1) in the step."""
    total = s1.gather((signal * W_inst).sum(1))            # (all groups,)
    return rank_normal(signal), s1.mine(rank_normal(total))[:, None]


def rank_normal(s):
    """Along the last axis, ranks as standard normal scores; lowest signal, lowest score."""
    ranks = s.argsort(-1).argsort(-1)
    return torch.special.ndtri((ranks + 0.5) / s.shape[-1])


def negative_entropy(W_inst, W_batch):
    """Added: sum_i W_i log W_i, and its two-way form for W_batch against 1 - W_batch.

    Without it the objective is linear in the weights and its optimum one pair, one group. With
    tau times it the optimum is logit = -W_batch E[signal] / tau: the rater becomes a regression.
    """
    either = torch.stack([W_batch, 1 - W_batch], -1)                          # (B / G, 1, 2)
    return sum((w * w.clamp_min(1e-12).log()).flatten(1).sum(1).mean() for w in (W_inst, either))


def meta_step(nets, opts, train, val, rng, args):
    """One step of eqs. 5-7. nets and opts: proxy theta, ref theta_hat, rater mu.

    To first order gap_i = -beta <grad L_i, g_val> = dL_val / dW_i: the meta-gradient, without a
    second derivative. The proxies are never joined again, so that the gap adds up over the steps.
    train and val are batches (x (B, 3, H, W), c (B, T)), already cut to this process; each
    softmax runs over a group of --group-size pairs inside it. Returns the COLUMNS of the log.
    """
    (x, c), (x_val, c_val) = train, val
    W_inst, W_batch = weigh(nets["rater"], x, c, args.group_size)             # (B / G, G or 1)
    W = (W_inst * W_batch).detach()                        # eq. 5 holds mu fixed; sums to W_batch
    noise = s1.draw_noise(x, rng, s1.T_SHIFT)              # one for both proxies; added: the shift
    noise_val = s1.draw_noise(x_val, rng)
    c, c_val = (s1.drop_captions(words, rng) for words in (c, c_val))         # added
    batch = W.flatten() / len(W), x, c, *noise
    batch_val = x_val.new_full((len(x_val),), 1 / len(x_val)), x_val, c_val, *noise_val
    L_hat, norm_hat = s1.descend_flow(nets["ref"], opts["ref"], *batch)       # eq. 5, no g_val
    L_both, norm = s1.descend_flow(nets["proxy"], opts["proxy"],              # eqs. 5, 10
                                   *map(torch.cat, zip(batch, batch_val)))
    L_theta, L_val = L_both.split(len(x))                                     # (B,), (B,)
    L_theta, L_hat = L_theta.view_as(W), L_hat.view_as(W)                     # (B / G, G)

    gap = L_theta - L_hat                                  # eq. 6 holds both proxies fixed
    signal = gap if args.signal == "difference" else L_theta                  # eq. 8: L_hat = 0
    objective = rater_objective(W_inst, W_batch, *rank_signal(signal, W_inst.detach()))
    norm_mu = s1.descend(objective + args.tau * negative_entropy(W_inst, W_batch),
                         nets["rater"], opts["rater"])
    ess = 1 / W_inst.square().sum(1).mean() / args.group_size
    return torch.stack([L_val.mean(), L_hat.mean(), gap.mean(), gap.std(), ess, W_batch.mean(),
                        W_inst.clamp_min(1e-12).log().std(1).mean(),
                        norm_mu + norm + norm_hat]).detach()


def exact_meta_gradient(proxy, train, val, W, beta, steps):
    """dL_val / dW_i (B,) through `steps` unrolled gradient steps of eq. 3: what eq. 6 approximates.

    No stage calls it: the tests and tests/meta_gradient.py hold eq. 6 against it. train and val are
    (x, c, t, eps). Keeps one graph per step in memory, and needs second derivatives, which fused
    attention does not have on the CPU.
    """
    W = W.detach().requires_grad_()                                           # (B,)
    params = {name: p.detach().requires_grad_() for name, p in proxy.named_parameters()
              if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):
        for _ in range(steps):
            def net(*inputs, params=params):
                return functional_call(proxy, params, inputs)
            loss = (W * s1.flow_loss(net, *train)).sum()                      # eq. 3
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - beta * g for (name, p), g in zip(params.items(), grads)}
        L_val = s1.flow_loss(                                                 # eq. 2
            lambda *inputs: functional_call(proxy, params, inputs), *val).mean()
        return torch.autograd.grad(L_val, W)[0]


# ---- the loop --------------------------------------------------------------------------------
COLUMNS = ["step", "val", "ref", "gap_mean", "gap_std", "ess", "W_batch", "logit_std",
           "grad_norm"]    # the step, and what `meta_step` returns


@torch.no_grad()
def follow(nets, x, c, args, draws=4):
    """Added: rank correlation of the rater's logits with minus its signal; 0 is chance.

    The signal is measured afresh, outside the step, under the same noise at every call. Returns the
    logits (B,), too.
    """
    logits = nets["rater"].logits(nets["rater"].features(x, c))               # (B,)
    rng, signal = s1.seeded(x.device, args.seed, "follow"), torch.zeros_like(logits)
    for _ in range(draws):
        t, eps = s1.draw_noise(x, rng, s1.T_SHIFT, whole=True)
        signal += s1.flow_loss(nets["proxy"], x, c, t, eps)
        if args.signal == "difference":
            signal -= s1.flow_loss(nets["ref"], x, c, t, eps)
    places = torch.stack([logits, -signal]).argsort(1).argsort(1).double()
    return torch.corrcoef(places)[0, 1].item(), logits.cpu()


def learn(nets, pairs, val, args, probe, progress):
    """`--steps` meta steps, logged in `progress`, which also keeps the probe's logits over time."""
    opts = {name: s1.adamw(net, args.lr) for name, net in nets.items()}
    progress.attach(**nets, **{f"{name}_opt": opt for name, opt in opts.items()})
    seen = progress.kept.setdefault("seen", [])            # [(step, logits (PROBE,), follows)]

    def after(k):
        if k % max(args.steps // 10, 1) == 0 or k == args.steps:
            follows, logits = follow(nets, *probe, args)
            seen.append((k, logits, follows))
        if k % 100 == 0 or k == args.steps:
            val_loss, _, gap, gap_std, *health, _ = np.mean(progress.fetch()[-100:], axis=0)
            s1.print0(
                f"meta {k:5d}/{args.steps}   val {val_loss:.4f}   difference {gap:+.4f} "
                f"+- {gap_std:.4f}   ESS {health[0]:.2f}   W_batch {health[1]:.3f}   "
                f"logit std {health[2]:.2f}   follows {seen[-1][2]:.2f}"
                + warn_of_collapse(*health))

    batches = [s1.stream(split, s1.draw_batches(
        len(split), args.batch_size, args.seed, progress.step, args.steps))
        for split in (pairs, val)]
    for (keys, *train_batch), (_, *val_batch) in zip(*batches):
        rng = s1.seeded("cpu", args.seed, "meta", progress.step + 1)
        numbers = meta_step(nets, opts, train_batch, val_batch, rng, args)
        progress.advance(numbers, keys, after)
    progress.fetch()


def warn_of_collapse(ess, W_batch, logit_std):
    """In words, all that is wrong with the rater, or ''."""
    signs = {"a few pairs hold all weight (raise --tau)": ess < 0.2,
             "W_batch is stuck and says nothing about its group": not 0.05 < W_batch < 0.95,
             "every pair is rated alike (more warm-up, or better validation pairs)":
                 logit_std < 0.01}
    found = "; ".join(sign for sign, seen in signs.items() if seen)
    return f"   COLLAPSE: {found}" if found else ""


def judge_following(follows):
    """The verdict on `follow` over the run: does the rater learn, and is it still learning?"""
    half = follows[(len(follows) - 1) // 2]
    trend = ("; rising from {:.2f} half-way: more --steps would help" if follows[-1] > half + 0.03
             else "; {:.2f} half-way already: more --steps would not help").format(half)
    verdict = s1.say("the rater is {}following its signal", follows[-1], 0, 0.3,
                     "more warm-up or more trusted pairs would help")
    return verdict + (trend if len(follows) > 2 else "")


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = s1.options(
        __doc__, batch_size=(64, "training pairs, and as many validation pairs, all processes"),
        group_size=(32, "pairs under one softmax; W_batch ranks the groups of a batch"),
        steps=(400, "meta steps"), lr=(1e-3, "of theta, theta_hat and mu"),
        tau=(1.0, "weight of the entropy term (added)"))
    parser.add_argument("--signal", choices=["difference", "loss"], default="difference",
                        help="eq. 6, or eq. 9 as in the released code")
    return s1.parse(parser, argv, steps=12, batch_size=16, group_size=8)


def suffix(signal):
    """Files of the eq. 9 rater stand beside those of eq. 6."""
    return "" if signal == "difference" else f"-{signal}"


def main(args, device):
    if args.group_size < 2 or args.batch_size % (args.group_size * s1.world()):
        raise SystemExit(f"--batch-size {args.batch_size} must be a multiple of --group-size "
                         f"{args.group_size}, 2 or more, times {s1.world()} processes")
    if args.batch_size == args.group_size:
        s1.print0("one group a batch: nothing to rank it against, so W_batch learns "
                  "nothing; raise --batch-size or lower --group-size")
    settings, snapshots = s1.load_proxy(args.out)
    pairs, val, _ = s1.load_data(settings, device)
    if min(len(pairs), len(val)) < args.batch_size:
        raise SystemExit(f"{len(pairs)} training and {len(val)} validation pairs do not both fill "
                         f"--batch-size {args.batch_size}: lower it or add pairs")
    pairs = s1.keep_decoded(pairs, args.out)
    nets = {name: s1.build_proxy(settings, device) for name in ("proxy", "ref")}
    for net in nets.values():
        net.load_state_dict(snapshots[settings.steps])     # theta <- theta_hat, after eq. 4
    nets["rater"] = Rater(settings.size, settings.patch, settings.words).to(device)

    (_, probe), = pairs.parts([np.arange(min(PROBE, len(pairs)))])
    file = Path(args.out) / f"rater{suffix(args.signal)}"
    proxy_digest = s1.digest(Path(args.out) / "proxy.pt")
    progress = s1.Progress(f"{file}.progress", "02_meta_rater.py",
                           {**vars(args), "proxy.pt": proxy_digest}, args.save_every)
    progress.expect(args.steps, args.batch_size)
    learn(nets, pairs, val, args, probe.batch(np.arange(len(probe))), progress)
    rows = [[k, *row] for k, row in enumerate(progress.log, 1)]
    s1.save(f"{file}.pt", "02_meta_rater.py", settings=vars(args), proxy=proxy_digest,
            weights={name: net.state_dict() for name, net in nets.items()})
    s1.write_csv(f"{file}.csv", COLUMNS, rows)
    seen = progress.kept["seen"]
    s1.print0(judge_following([follows for *_, follows in seen]))
    draw_figure(f"{file}.png", rows, seen, np.array(probe.strata))
    progress.finish()
    s1.print0(f"wrote {file}.pt, .csv, .png: {args.steps} meta steps in "
              f"{progress.seconds:.0f} s")


def draw_figure(path, rows, seen, strata):
    """Logits by stratum over the run (analysis only), and the health of the weights."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
    steps, logits, follows = zip(*seen)
    logits = torch.stack(logits).numpy()
    logits = logits - logits.mean(1, keepdims=True)                           # (times, PROBE)
    unnamed = "other pairs" if set(strata) - {""} else "all pairs"
    for stratum, style in zip(sorted(set(strata)), itertools.cycle(["-.", ":", "-", "--"])):
        chosen = logits[:, strata == stratum]
        low, middle, high = np.percentile(chosen, (25, 50, 75), axis=1)
        colour = s1.STRATUM_COLOURS.get(stratum, "black")
        left.plot(steps, middle, style, color=colour, label=stratum or unnamed)
        left.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    left.set(xlabel="meta step", ylabel="logit, centred (median, quartiles)")
    s1.legend_above(left)
    table = np.array(rows)                                                    # (steps, 9)
    window = min(25, len(table))
    for column, style in (("ess", "-"), ("W_batch", "--"), ("logit_std", ":")):
        smooth = np.convolve(table[:, COLUMNS.index(column)], np.ones(window) / window, "valid")
        right.plot(table[window - 1:, 0], smooth, style, color="black", label=column)
    right.plot(steps, follows, "o-", color="#0072B2", markersize=3, label="follows its signal")
    right.set(xlabel="meta step", ylim=(0, None))
    s1.legend_above(right)
    s1.save_figure(figure, path)


if __name__ == "__main__":
    s1.launch(main, parse_args())
