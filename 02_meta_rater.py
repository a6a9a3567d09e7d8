"""Stage 2 of 5: the rater mu learns which pairs help, from an explicit meta-gradient (eqs. 2-10).

Two proxies leave the warm-up side by side. theta trains on the weighted training pairs and on
validation pairs, theta_hat on the weighted training pairs alone. After hundreds of steps they
differ by what the validation pairs teach. Where theta has the lower loss on a training pair, that
pair is like what was taught, and its weight rises.

    eq. 2    mu* = argmin_mu L(theta*(mu); D_val)             what is wanted (outer problem)
    eq. 3    theta*(mu) = argmin_theta sum_i W_i(mu) L(theta; x_i)                     (inner)
    eq. 5    theta     <- theta - beta (grad L(theta; D_val) + sum_i W_i grad L(theta; x_i))
             theta_hat <- the same without the validation term
    eq. 6    mu <- mu - alpha sum_i (L(theta; x_i) - L(theta_hat; x_i)) grad_mu W_i
    eq. 7    W_inst = softmax over a group of pairs,  W_i = W_inst,i * W_batch
    eq. 8    assume L(theta_hat; x_i) = 0, and eq. 6 becomes
    eq. 9    mu <- mu - alpha sum_i L(theta; x_i) grad_mu W_i           (--signal loss)
    eq. 10   the batch gradient of eq. 5: mean over pairs of W_i grad L; here a sum over a group,
             as W_i holds its 1/N already, and a mean over groups

What the difference of eq. 6 measures: after hundreds of steps the negative of a reducible holdout
loss (RHO-LOSS, arXiv 2206.07137), how much better a model that knows the validation pairs explains
this pair than one that does not. Why it is a meta-gradient: for one plain step from shared weights,
theta = theta_hat - beta g_val, and
    L_i(theta) - L_i(theta_hat) = -beta <grad L_i, g_val> + O(beta^2) = dL_val / dW_i + O(beta^2).
That one step tells nothing yet and hundreds do is what we measured, and does not follow from this.
Both losses need the same t and eps: with two noises the difference shows little but these, which
the rater then has to average away.

Added to the paper, each marked in the code (what happens without it: .assets/differences.md):
    cosine         of picture and caption, under a small contrastive network trained on the
                   validation pairs: an input of the rater, whose own encoder learns from some
                   thousands of ranks what real pictures show, but hardly what their captions say
    entropy term   keeps all weight from falling on one pair, and pulls W_batch to 0.5; the logit
                   tends to -W_batch E[signal] / tau
    rank signal    a pair's difference is ranked in its group, a group's total among the step's
                   groups: no heavy tails, and no common drift that takes every W_batch to 1.
                   W_batch needs ranks and entropy term: either alone lets it drift
    shifted t      training pairs are seen at high noise, where captions matter to the loss; no
                   effect on the toy pairs
    no caption     a tenth of the captions is blanked as in the warm-up. Without it both proxies
                   forget pictures without a caption, and stage 3 can no longer tell what a
                   caption is worth
    first rest     theta = theta_hat before the first step, so that eq. 6's differences are
                   rounding: the rater rests
Released code: eq. 9 only, no reference proxy, another softmax on top, validation only at first.
Differs from the paper: steps by AdamW; the softmax runs over groups of fixed size (the paper's 64
pairs on 2 GPUs are groups of 32), so the number of processes changes nothing.

Reads    out/pairs/, out/proxy.pt
Writes   out/rater.pt, .json, .csv            (--signal loss: out/rater-loss.pt, .json, .csv)
Run      python 02_meta_rater.py                        40 s on two cores
         torchrun --nproc-per-node 2 -- 02_meta_rater.py --signal loss
"""
import importlib
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))             # PYTHONSAFEPATH leaves it out
s1 = importlib.import_module("01_proxy")

CONTRAST_STEPS = 500       # of the contrastive network's training
T_SHIFT = 1.2              # added: t = sigmoid(normal + 1.2), of mean 0.73
GROUP = 32                 # pairs under one softmax; W_batch ranks the groups of a batch


# ---- the rater -------------------------------------------------------------------------------
class Rater(nn.Module):
    """mu: clean image and caption -> features -> Instance MLP (logit) and Group MLP (W_batch).

    The paper's Fig. 2a with a small transformer encoder in place of a text-to-image model's, and
    the cosine of a frozen contrastive network beside it. The Group MLP is the paper's part: in all
    our measurements ratings without it are as good.
    """

    def __init__(self, size, patch, words, width=64, depth=2):
        super().__init__()
        self.to_patch = nn.Conv2d(3, width, patch, stride=patch)
        self.word = nn.Embedding(s1.VOCABULARY, width)
        self.position = nn.Parameter(0.2 * torch.randn(1, words + (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.instance = nn.Sequential(nn.Linear(width + 1, 64), nn.GELU(), nn.Linear(64, 1))
        self.group = nn.Sequential(nn.Linear(2 * width + 2, 64), nn.GELU(), nn.Linear(64, 1))
        self.contrast = Contrast(size, words).requires_grad_(False)
        self.norm = nn.LayerNorm(width + 1)

    def features(self, x, c):                              # (B, 3, H, W), (B, T)
        patches = self.to_patch(x).flatten(2).transpose(1, 2)                 # (B, P, D)
        h = self.encoder(torch.cat([self.word(c), patches], 1) + self.position).mean(1)    # (B, D)
        cosine = 5 * self.contrast.compare(x, c)[:, None]                     # (B, 1)  added
        return self.norm(torch.cat([h, cosine], 1))        # (B, D'), D' = D + 1

    def logits(self, f):
        """Instance rating of features (..., D') -> (...): eq. 7's W_inst before its softmax."""
        return self.instance(f).squeeze(-1)

    def group_weight(self, mean, var):
        """W_batch (..., 1) of groups whose features have this mean and variance (..., D')."""
        return self.group(torch.cat([mean, var], -1)).sigmoid()


def weigh(rater, x, c, group_size):
    """Eq. 7: W_inst (B / G, G), summing to 1 in every group of G pairs, and W_batch (B / G, 1)."""
    f = rater.features(x, c)                                                  # (B, D')
    W_inst = rater.logits(f).view(-1, group_size).softmax(1)                  # (B / G, G)   eq. 7
    groups = f.view(-1, group_size, f.shape[-1])                              # (B / G, G, D')
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
    ranks = s.argsort(-1).argsort(-1)                      # of each, 0 the lowest
    return torch.special.ndtri((ranks + 0.5) / s.shape[-1])


def negative_entropy(W_inst, W_batch):
    """Added: sum_i W_inst,i log W_inst,i, and its two-way form for W_batch and 1 - W_batch.

    Without it the objective is linear in the weights and its optimum one pair, one group. With
    tau times it the optimum is logit = -W_batch E[signal] / tau: the rater becomes a regression.
    """
    either = torch.stack([W_batch, 1 - W_batch], -1)                          # (B / G, 1, 2)
    return sum((w * w.clamp_min(1e-12).log()).flatten(1).sum(1).mean() for w in (W_inst, either))


def meta_step(nets, opts, train, val, rng, args, rest=False):
    """One step of eqs. 5-7. nets and opts: proxy theta, ref theta_hat, rater mu.

    All losses are those of the parameters before the step. theta is never reset to theta_hat, so
    that the gap adds up over the steps; there is no second derivative. train and val are whole
    batches (x (B, 3, H, W), c (B, T)), of which a process takes its share; each softmax runs over a
    group inside it. With `rest` the rater stays as it is. Returns the log's COLUMNS, see below.
    """
    (x, c), (x_val, c_val) = train, val
    noise = s1.draw_noise(x, rng, T_SHIFT)              # one for both proxies; added: the shift
    noise_val = s1.draw_noise(x_val, rng)
    seen, c_val = s1.drop_captions(c, rng), s1.drop_captions(c_val, rng)      # added
    group_size = min(GROUP, len(x) // 2)                   # W_batch ranks two groups or more
    x, c, seen, x_val, c_val = map(s1.mine, (x, c, seen, x_val, c_val))
    noise, noise_val = ([s1.mine(drawn) for drawn in both] for both in (noise, noise_val))

    W_inst, W_batch = weigh(nets["rater"], x, c, group_size)                  # (B / G, G or 1)
    W = (W_inst * W_batch).detach().flatten() / len(W_inst)                   # (B,) fixed in eq. 5
    L_theta = s1.flow_loss(nets["proxy"], x, seen, *noise)                    # (B,)
    L_hat = s1.flow_loss(nets["ref"], x, seen, *noise)                        # (B,)
    L_val = s1.flow_loss(nets["proxy"], x_val, c_val, *noise_val)             # (B,)
    loss = L_val.mean() + (W * L_theta).sum()              # the objectives of eqs. 2, 3
    norm = s1.descend(loss, nets["proxy"], opts["proxy"])                     # eqs. 5, 10
    norm_hat = s1.descend((W * L_hat).sum(), nets["ref"], opts["ref"])        # eq. 5, no g_val

    gap = (L_theta - L_hat).detach().view_as(W_inst)       # eq. 6 holds both proxies fixed
    signal = gap if args.signal == "difference" else L_theta.detach().view_as(W_inst)    # eq. 8
    objective = rater_objective(W_inst, W_batch, *rank_signal(signal, W_inst.detach()))
    norm_mu = norm.new_zeros(()) if rest else s1.descend(
        objective + args.tau * negative_entropy(W_inst, W_batch), nets["rater"], opts["rater"])
    ess = 1 / W_inst.square().sum(1).mean() / group_size   # effective sample size, as a share
    return [number.detach() for number in (
        L_val.mean(), L_hat.mean(), gap.mean(), gap.std(), ess, W_batch.mean(),
        W_inst.clamp_min(1e-12).log().std(1).mean(), norm_mu + norm + norm_hat)]


# ---- the loop --------------------------------------------------------------------------------
COLUMNS = ["val", "ref", "gap_mean", "gap_std", "ess", "W_batch", "logit_std",
           "grad_norm"]    # what `meta_step` returns; the last is the sum of three


def learn(nets, pairs, val, args, seed, progress):
    """`--steps` meta steps, logged in `progress`."""
    opts = {name: s1.adamw(net, args.lr) for name, net in nets.items()}
    parts = {**nets, **{f"{name}_opt": opt for name, opt in opts.items()}}
    batches = (s1.draw_batches(len(split), args.batch_size, seed, progress.step, args.steps)
               for split in (pairs, val))
    for k, rows, rows_val in zip(progress.steps(args.steps, **parts), *batches):
        progress.note(*meta_step(nets, opts, pairs.batch(rows), val.batch(rows_val),
                                 s1.seeded(pairs.device, seed, "meta", k), args, rest=k == 0))


def warn_of_collapse(*means):
    """In words, all that is wrong with the rater, or ''."""
    mean = dict(zip(COLUMNS, means))
    signs = {"a few pairs hold all weight (raise --tau)": mean["ess"] < 0.2,
             "W_batch is stuck and says nothing about its group": not 0.05 < mean["W_batch"] < 0.95,
             "every pair is rated alike (more warm-up, or better validation pairs)":
                 mean["logit_std"] < 0.01}
    found = "; ".join(sign for sign, seen in signs.items() if seen)
    return f"   COLLAPSE: {found}" if found else ""


# ---- what the rater is given: does the caption fit the picture? ------------------------------
class Contrast(nn.Module):
    """Image -> features (B, 64) -> unit vector (B, 32); caption -> unit vector; cosine compares.

    CLIP in small, and a rival by itself; stage 5's judge is another one, trained on other pairs.
    """

    def __init__(self, size, words):
        super().__init__()
        self.words = words
        widths = [3] + [32 * 2 ** k for k in range(int(math.log2(size // 4)) + 1)]
        convolutions = [layer for a, b in zip(widths[:-1], widths[1:]) for layer in
                        (nn.Conv2d(a, b, 3, stride=1 if a == 3 else 2, padding=1), nn.GELU())]
        self.image = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                   nn.Linear(16 * widths[-1], 64))
        self.image_head = nn.Sequential(nn.GELU(), nn.Linear(64, 32))
        self.word = nn.Embedding(s1.VOCABULARY, 64, padding_idx=0)
        self.text = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def embed_images(self, x):
        """Features (B, 64) and unit vectors (B, 32) of images (B, 3, H, W)."""
        f = self.image(x)
        return f, F.normalize(self.image_head(f), dim=1)

    def embed_tokens(self, c):
        """Unit vectors (B, 32) of captions as tokens (B, T)."""
        return F.normalize(self.text(self.word(c).sum(1)), dim=1)

    def compare(self, x, c):
        """Cosine (B,) of pictures and their captions."""
        return (self.embed_images(x)[1] * self.embed_tokens(c)).sum(1)

    def embed_captions(self, captions):
        """Unit vectors (B, 32) of a list of captions."""
        tokens = torch.from_numpy(s1.tokenize(captions, self.words))
        return self.embed_tokens(tokens.to(self.scale.device).long())


def degrade(x, rng):
    """A third of the images as they are, a third noised, a third blurred, as models draw them."""
    from torchvision.transforms.functional import gaussian_blur               # slow to import
    kind = torch.randint(3, (len(x), 1, 1, 1), generator=rng, device=x.device)
    amount = 0.6 * torch.rand(kind.shape, generator=rng, device=x.device)
    noised = x + amount * torch.randn(x.shape, generator=rng, device=x.device)
    blurred = gaussian_blur(x, 5, 1.0)
    return torch.where(kind == 0, x, torch.where(kind == 1, noised, blurred))


def train_contrast(pairs, steps, seed, batch_size=128):
    """Contrastive training; a caption that comes twice in the batch is right for both pictures."""
    device, batch_size = pairs.device, min(batch_size, len(pairs))
    torch.manual_seed(seed)
    net = Contrast(pairs.images.shape[-1], pairs.tokens.shape[1]).to(device)
    opt = s1.adamw(net, 2e-3)
    for k, rows in enumerate(s1.draw_batches(len(pairs), batch_size, seed, 0, steps)):
        opt.param_groups[0]["lr"] = 2e-3 * (1 - k / steps)
        rng = s1.seeded(device, seed, "contrast", k)
        x, c = pairs.batch(rows)
        same = (c[:, None] == c[None]).all(2).float()                         # (B, B)
        cosines = net.embed_images(degrade(x, rng))[1] @ net.embed_tokens(c).T  # (B, B)
        logits, right = net.scale.exp() * cosines, same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
        s1.descend(loss, net, opt)
    return net.eval().requires_grad_(False)


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    return s1.parse(
        argv, __doc__, smoke=dict(steps=12, batch_size=16),
        signal=(("difference", "loss"), "eq. 6, or eq. 9 as in the released code"),
        batch_size=(64, "training pairs, and as many validation pairs, all processes"),
        steps=(200, "meta steps"), lr=(1e-3, "beta and alpha: of theta, theta_hat and mu"),
        tau=(1.0, "weight of the entropy term (added): more keeps weights closer together"))


def name_rater(signal):
    """The file of a rater, which stands beside that of the other signal, and the command for it."""
    loss = signal == "loss"
    return "rater-loss" if loss else "rater", "02_meta_rater.py" + " --signal loss" * loss


def main(args, device):
    unit = min(GROUP, max(args.batch_size // 2, 2)) * s1.world()              # a group in each
    if args.batch_size < 4 or args.batch_size % unit:
        raise SystemExit(f"--batch-size {args.batch_size} must be a multiple of "
                         f"{GROUP * s1.world()} or, in one process, even and from 4 to {2 * GROUP}")
    out = Path(args.out)
    settings, weights = s1.load(out / "proxy.pt", "01_proxy.py")
    pairs, val = (s1.open_pairs(out / "pairs", split, device) for split in ("train", "val"))
    if min(len(pairs), len(val)) < args.batch_size:
        raise SystemExit(f"{len(pairs)} training and {len(val)} validation pairs do not both fill "
                         f"--batch-size {args.batch_size}: lower it or add pairs")
    torch.manual_seed(settings.seed)
    nets = {name: s1.build_proxy(settings, device) for name in ("proxy", "ref")}
    for net in nets.values():
        net.load_state_dict(weights)                       # theta <- theta_hat, after eq. 4
    nets["rater"] = Rater(settings.size, settings.patch, settings.words).to(device)

    name, command = name_rater(args.signal)
    steps = 20 if settings.smoke else CONTRAST_STEPS
    s1.print0(f"training the contrastive network, {steps} steps")
    contrast = train_contrast(val, steps, settings.seed + 1)                  # not 05's judge
    nets["rater"].contrast.load_state_dict(contrast.state_dict())
    progress = s1.Progress(out / f"{name}.progress", {
        **vars(args), "proxy.pt": s1.digest(out / "proxy.pt")}, COLUMNS, warn_of_collapse)
    learn(nets, pairs, val, args, settings.seed, progress)
    s1.save(out / f"{name}.pt", command, [out / "proxy.pt"], args,
            {name: net.state_dict() for name, net in nets.items()})
    s1.write_csv(out / f"{name}.csv", ["step", *COLUMNS],
                 [(k, *row) for k, row in enumerate(progress.log, 1)])
    progress.finish()
    command = command.replace("02_meta_rater", "03_score")
    return f"wrote {out}/{name}.pt, .json, .csv; next {command}"


if __name__ == "__main__":
    s1.launch(main, parse_args())
