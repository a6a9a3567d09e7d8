"""Stage 1 of 5: the data, the text-to-image proxy, and the warm-up of its reference copy (eq. 4).

Alchemist rates image-text pairs by what a small text-to-image model, the *proxy*, gains from them.
This stage draws or reads the pairs, defines the proxy and warms it up on the training pairs, all
weighted alike: the reference theta_hat. Stage 2 starts both of its proxies, theta and theta_hat,
from these weights.

    eq. 4    theta_hat <- theta_hat - beta * grad L(theta_hat; D_train)
    L        rectified flow, one number per pair:  x_t = (1 - t) x + t eps,
             L_i = mean over pixels of |net(x_t, t, c) - (eps - x)|^2

Differs from the paper: the proxy is a diffusion transformer (DiT) in pixel space trained by
rectified flow; the paper's is a 0.3 B scale-wise autoregressive model. Eq. 4 steps by AdamW.

The method reads as far as `main`. What comes after it can be skipped: readers of real pairs, and
plumbing for all five stages. Of that, these names stand in the method: `Pairs` (pictures, keys, and
captions that `tokenize` made into numbers), `draw_batches` and `stream` (batch after batch),
`world` and `rank` (how many processes there are, and which this is), `mine` (its share of a batch;
with one process, all of it), `gather` (the shares of all again), `average_gradients` (over
processes), `seeded` (random numbers by seed and step), `to_device` (a tensor moved to where another
is), `Progress` (the log of a loop that may be stopped and continued) and `say` (a verdict on a
number, in words).

Shapes: B pairs in a batch, T words, P patches, D width, N pairs in the corpus.

Writes   out/proxy.pt (weights at four points of the warm-up, settings), .csv, .png
Run      python 01_proxy.py                                   toy pairs, 15 s on two cores
         python 01_proxy.py --data 'DIR/train-*.tar' --val CURATED --size 32 --width 96
         torchrun --nproc-per-node 2 -- 01_proxy.py           same global batch, cut over processes
"""
import argparse
import contextlib
import csv
import ctypes
import datetime
import gc
import glob
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import textwrap
import time
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import functional as image_ops

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False             # a $ in a name is a $
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

try:
    import fcntl
except ImportError:                                       # Windows: --out is not locked
    fcntl = None

VOCABULARY = 2048          # rows of the word table, a word's row is its CRC-32: any language
T_SHIFT = 1.2              # added: t = sigmoid(normal + 1.2) where captions matter, mean 0.74
CAPTION_DROPOUT = 0.1      # share of captions blanked in training, for classifier-free guidance
NOISE_ROWS = 32            # pairs of a batch whose noise is drawn from one seed
TOY_PAIRS = {"train": 4000, "val": 1000, "test": 1000}
SMOKE_PAIRS = {"train": 256, "val": 64, "test": 64}
ANYHOW = ("out", "save_every", "micro_batch", "memory", "compile")     # change rounding at most
HELD_OUT = 20000           # trusted pairs at most, half for eq. 5 and half for stage 5
DATASETS = ("FashionMNIST", "MNIST", "CIFAR10", "CIFAR100")        # of torchvision
DATASET_TRUSTED = 1000     # of their training split for eq. 5; twice as many of their test split


class Machine:
    """How the networks are run, not what they compute: `launch` sets it from the options."""
    bf16, compiled, micro_batch, fetch_every, memory = False, False, None, 1, 2e9


# ---- the proxy: a small diffusion transformer ------------------------------------------------
class Block(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the time (adaLN-Zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        nn.init.zeros_(self.modulation[1].weight)     # at the start every block is the identity
        nn.init.zeros_(self.modulation[1].bias)

    def attention(self, h):                                                   # (B, S, D)
        B, S, D = h.shape
        q, k, v = self.qkv(h).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)                           # (B, heads, S, d)
        return self.out(h.transpose(1, 2).reshape(B, S, D))                   # (B, S, D)

    def forward(self, h, cond):                                               # (B, S, D), (B, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond)[:, None].chunk(6, -1)
        h = h + gate1 * self.attention(self.norm1(h) * (1 + scale1) + shift1)
        return h + gate2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)    # (B, S, D)


class DiT(nn.Module):
    """The proxy: predicts the velocity eps - x from x_t, t and the caption's words.

    Peebles & Xie 2023 (arXiv 2212.09748) with the words as tokens beside the image patches.
    """

    def __init__(self, size, patch, width, depth, words):
        super().__init__()
        if size < 4 or size % patch or width % 4:
            raise SystemExit(f"--size {size} must be 4 or more and divide by --patch {patch}, "
                             f"--width {width} by 4")
        self.patch, self.words = patch, words
        heads = next(n for n in range(max(4, width // 64), 0, -1) if width % n == 0)
        self.to_patch = nn.Linear(3 * patch ** 2, width)
        self.from_patch = nn.Linear(width, 3 * patch ** 2)
        self.word = nn.Embedding(VOCABULARY, width)                           # row 0: no word
        self.position = nn.Parameter(0.2 * torch.randn(1, words + (size // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        nn.init.normal_(self.word.weight, std=0.5)
        nn.init.zeros_(self.from_patch.weight)
        nn.init.zeros_(self.from_patch.bias)

    def forward(self, x, t, c):                            # (B, 3, H, W), (B,), (B, T)
        word = self.word(c)                                                   # (B, T, D)
        cond = self.time(time_features(t, word.shape[-1])) + word.mean(1)     # (B, D)
        h = torch.cat([word, self.to_patch(patchify(x, self.patch))], 1) + self.position
        for block in self.blocks:
            h = block(h, cond)                                                # (B, T + P, D)
        h = self.from_patch(self.norm(h[:, self.words:]))                     # (B, P, 3 p p)
        return unpatchify(h, self.patch, x.shape[-1])                         # (B, 3, H, W)


def patchify(x, p):
    """(B, 3, H, W) -> (B, P, 3 p p), row by row."""
    B, C, H, W = x.shape
    return x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)


def unpatchify(h, p, size):
    """(B, P, 3 p p) -> (B, 3, size, size), the inverse of `patchify`."""
    n = size // p
    return h.view(-1, n, n, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, size, size)


def time_features(t, width):
    """(B,) in [0, 1] -> (B, width): sines and cosines at geometrically spaced frequencies."""
    rates = torch.exp(torch.linspace(0, np.log(1000), width // 2, device=t.device))
    angles = t[:, None] * rates                                               # (B, width / 2)
    return torch.cat([angles.sin(), angles.cos()], 1)


def build_proxy(settings, device):
    """The network that the options of this stage describe, with fresh weights."""
    net = DiT(settings.size, settings.patch, settings.width, settings.depth,
              settings.words).to(device)
    for block in net.blocks if Machine.compiled else []:
        block.compile()                                    # in place: the names of weights stay
    return net


# ---- rectified flow: the loss L, its noise, the sampler --------------------------------------
def flow_loss(net, x, c, t, eps):
    """L(net; x_i) for every pair, (B,): squared error of the predicted velocity at time t."""
    along = t[:, None, None, None]
    x_t = (1 - along) * x + along * eps                                       # (B, 3, H, W)
    return (velocity(net, x_t, t, c) - (eps - x)).square().mean((1, 2, 3))    # (B,)


def velocity(net, x_t, t, c):
    """What `net` predicts, like x_t. This forward pass alone may run in bfloat16."""
    with torch.autocast(x_t.device.type, torch.bfloat16, enabled=Machine.bf16):
        return net(x_t, t, c).to(x_t.dtype)


def draw_noise(x, rng, shift=0.0, whole=False):
    """t (B,), the sigmoid of a normal number plus `shift` (towards noise), and eps like x.

    Every NOISE_ROWS rows of the global batch have a seed of their own, and a process draws those
    that it holds, all of them where x is the `whole` batch: world size changes nothing.
    """
    first, total = (0, len(x)) if whole else (rank() * len(x), world() * len(x))
    block, offset = divmod(first, NOISE_ROWS)
    seeds = torch.randint(2 ** 62, (total,), generator=rng, device=rng.device)
    drawn = torch.cat([torch.randn(NOISE_ROWS, 1 + x[0].numel(), device=x.device,
                                   generator=torch.Generator(x.device).manual_seed(seed))
                       for seed in seeds[block:][:-(-(offset + len(x)) // NOISE_ROWS)].tolist()])
    drawn = drawn[offset:][:len(x)]                                           # (B, 1 + 3 H W)
    return (drawn[:, 0] + shift).sigmoid(), drawn[:, 1:].reshape(x.shape)


def drop_captions(c, rng):
    """Blank a tenth of the captions, so that `sample` can ask what the net draws without one."""
    drawn = torch.rand(len(c) * world(), generator=rng, device=rng.device)
    return c * to_device(mine(drawn) >= CAPTION_DROPOUT, c.device)[:, None]


@torch.no_grad()
def sample(net, c, eps, steps=12, guidance=2.0):
    """Images (B, 3, H, W) in [-1, 1] for captions c: Euler steps from eps (t = 1) to data (t = 0).

    Classifier-free guidance runs both captions, the real and the empty one, as one batch.
    """
    x, both = eps.clone(), torch.cat([c, torch.zeros_like(c)])                # (B, ...), (2B, T)
    for t in torch.linspace(1, 0, steps + 1, device=x.device)[:-1]:
        v, v_empty = velocity(net, x.repeat(2, 1, 1, 1), t.expand(len(both)), both).chunk(2)
        x = x - (v_empty + guidance * (v - v_empty)) / steps
    return x.clamp(-1, 1)


# ---- eq. 4: training without weights ---------------------------------------------------------
def descend(loss, net, opt):
    """One clipped optimiser step on a loss that trains `net` alone. Returns the gradient's norm."""
    opt.zero_grad(set_to_none=True)
    loss.backward()
    return step_down(net, opt)


def descend_flow(net, opt, W, x, c, t, eps):
    """The same on sum_i W_i L(net; x_i), --micro-batch pairs at a time: L (B,), and the norm."""
    opt.zero_grad(set_to_none=True)
    losses = []
    for W_part, *part in zip(*(v.split(Machine.micro_batch or len(x)) for v in (W, x, c, t, eps))):
        L = flow_loss(net, *part)
        (W_part * L).sum().backward()                      # frees this part before the next
        losses.append(L.detach())
    return torch.cat(losses), step_down(net, opt)


def step_down(net, opt, clip=2.0):
    """Go one step down the gradient that `net` holds. Returns its norm, before it is clipped."""
    average_gradients(net)                                # does nothing with one process
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    opt.step()
    return norm


def adamw(net, lr):
    """The optimiser of all three networks: betas as in the released code, weight decay 0.01."""
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), fused=True)


def train(net, pairs, steps, batch_size, lr, seed, decay=0.0, progress=None, after=None):
    """`steps` steps of eq. 4 on `pairs`. Stage 1 warms the proxy up, stage 5 trains its models.

    The learning rate rises over the first twentieth of the steps and, with `decay`, falls to zero
    over that share at their end. `progress` logs loss and gradient norm and continues an
    interrupted run; `after(step)` is called after each step.
    """
    opt, ramp, progress = adamw(net, lr), max(steps // 20, 1), progress or Progress()
    progress.attach(net=net, opt=opt)
    batches = draw_batches(len(pairs), batch_size, seed, progress.step, steps)
    for k, (keys, x, c) in enumerate(stream(pairs, batches), progress.step):
        left = (steps - k) / (decay * steps) if decay else 1.0
        opt.param_groups[0]["lr"] = lr * min(1.0, (k + 1) / ramp, left)
        rng = seeded("cpu", seed, "train", k)
        c, alike = drop_captions(c, rng), x.new_full((len(x),), 1 / len(x))
        L, norm = descend_flow(net, opt, alike, x, c, *draw_noise(x, rng))    # eq. 4
        progress.advance(torch.stack([L.mean(), norm]), keys, after)
    progress.fetch()
    return net


@torch.no_grad()
def read_captions(proxy, pairs, seed, draws=8):
    """Added: the share of pairs whose own caption has a lower loss than another pair's; 0.5 is
    chance.

    On up to 512 pairs that the proxy was not trained on, both captions under the same noise.
    """
    x, c = pairs.batch(np.arange(min(512, len(pairs))))
    rng, gain = seeded(x.device, seed, "captions"), torch.zeros(len(x), device=x.device)
    for _ in range(draws):
        t, eps = draw_noise(x, rng, T_SHIFT, whole=True)
        gain += flow_loss(proxy, x, c.roll(1, 0), t, eps) - flow_loss(proxy, x, c, t, eps)
    differ = (c != c.roll(1, 0)).any(1)
    return (gain[differ] > 0).float().mean().item()


# ---- pairs with known dirt: drawn, or planted in real ones ------------------------------------
# Strata serve the analysis only: nothing rates by them (a test shuffles them), and selections know
# what was planted, to leave it out.
#   informative      45 %   one shape in colour on a background, and the caption says so
#   plain            30 %   a white field; teaches nothing, lies about nothing, costs steps
#   chaotic-noise    15 %   noise under a caption that promises a shape
#   chaotic-caption  10 %   a clean picture under another picture's caption: no statistic of the
#                           image can find these
STRATA = {"informative": 0.45, "plain": 0.30, "chaotic-noise": 0.15, "chaotic-caption": 0.10}
PLANTED = {"plain": "planted-plain", "noise": "planted-noise", "captions": "planted-caption"}
STRATUM_COLOURS = {        # collages: a stratum of photographs, not of the toy
                   "informative": "#0072B2", "plain": "#E69F00", "planted-plain": "#E69F00",
                   "chaotic-noise": "#555555", "planted-noise": "#555555",
                   "chaotic-caption": "#CC79A7", "planted-caption": "#CC79A7",
                   "chaotic-collage": "#009E73"}
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230),
           "yellow": (240, 220, 50), "pink": (240, 110, 200), "cyan": (60, 210, 220)}
GROUNDS = {"black": (20, 20, 20), "gray": (128, 128, 128), "brown": (110, 65, 30),
           "white": (235, 235, 235)}
SHAPES = ("circle", "square", "triangle")
PLAIN_CAPTION = "an empty white background"


def draw_kinds(n, shares, rng):
    """A kind (n,) for every pair: k for a share shares[k - 1] of them, 0 for the rest."""
    ends = np.round(np.cumsum([1 - sum(shares), *shares]) * n).astype(int)
    return rng.permutation(np.searchsorted(ends, np.arange(n), side="right"))


def to_pixels(images):
    """[-1, 1] -> uint8"""
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def plant(images, captions, kind, rng, misname):
    """Turn pairs into dirt in place: images (n, 3, H, W) uint8, captions (n,), kind (n,). Kind 1
    becomes a plain white picture that says so, 2 noise under its own caption, 3 takes its row of
    misname(), a wrong caption for every pair; kind 0 stays as it is."""
    flat = rng.uniform(0.75, 0.95, (len(images), 1, 1, 1)).astype(np.float32)
    for rows in np.array_split(np.arange(len(images)), len(images) // 1024 + 1):
        grain = rng.standard_normal(images[rows].shape, dtype=np.float32)
        plain, noise = kind[rows] == 1, kind[rows] == 2
        images[rows[plain]] = to_pixels(flat[rows[plain]] + 0.04 * grain[plain])
        images[rows[noise]] = to_pixels(0.5 * grain[noise])
    captions[kind == 3] = misname()[kind == 3]
    captions[kind == 1] = PLAIN_CAPTION


def plant_pairs(pairs, planted, seed):
    """Pairs of which the shares of `planted`, {kind of PLANTED: share}, are dirt and marked so."""
    rng = np.random.default_rng([seed, zlib.crc32(b"plant")])
    kind = draw_kinds(len(pairs), [planted.get(name, 0) for name in PLANTED], rng)
    images, captions = pairs.images.numpy().copy(), np.array(pairs.captions, object)

    def misname():
        wrong = rng.permutation(captions)
        for _ in range(100):
            same = (wrong == captions) & (kind == 3)
            wrong[same] = rng.choice(captions, same.sum())
        if same.any():
            raise SystemExit("--plant captions: nearly all pairs have one caption, so leave it out")
        return wrong

    plant(images, captions, kind, rng, misname)
    print0("planted: " + ", ".join(f"{name} {(kind == k).sum()}" for k, name in
                                   enumerate(PLANTED, 1) if name in planted))
    names = ["", *PLANTED.values()]
    return Pairs(torch.from_numpy(images), tokenize(captions, pairs.tokens.shape[1]), pairs.keys,
                 list(captions), [names[k] or old for k, old in zip(kind, pairs.strata)])


def draw_shapes(n, size, rng):
    """n clean pictures (n, 3, size, size) in [-1, 1] and what is on them (n, 3): colour, ground,
    shape."""
    what = np.stack([rng.integers(len(options), size=n) for options in (COLOURS, GROUNDS, SHAPES)],
                    1)                                                        # (n, 3)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    middle = rng.uniform(-0.1, 0.1, (2, n, 1, 1)).astype(np.float32)
    radius = rng.uniform(0.55, 0.7, (n, 1, 1)).astype(np.float32)
    dy, dx = axis[None, :, None] - middle[0], axis[None, None] - middle[1]    # (n, size, size)
    edges = np.stack([np.hypot(dx, dy), 1.15 * np.maximum(abs(dx), abs(dy)),  # < radius: inside
                      np.maximum(1.6 * abs(dx) - 0.8 * dy, 1.5 * dy)])       # (3, n, size, size)
    inside = 1 / (1 + np.exp((edges[what[:, 2], np.arange(n)] - radius) * size))[:, None]
    colour = np.array(list(COLOURS.values()), np.float32)[what[:, 0], :, None, None]
    ground = np.array(list(GROUNDS.values()), np.float32)[what[:, 1], :, None, None]
    noise = rng.standard_normal((n, 3, size, size), dtype=np.float32)
    return (ground + inside * (colour - ground)) / 127.5 - 1 + 0.04 * noise, what


def describe(what):
    """Captions of rows (colour, ground, shape), such as 'a red circle on a gray background'."""
    colours, grounds = list(COLOURS), list(GROUNDS)
    return np.array([f"a {colours[colour]} {SHAPES[shape]} on a {grounds[ground]} background"
                     for colour, ground, shape in what], object)


def draw_toy(n, size, seed, split, words=8):
    """The toy split 'train', 'val' or 'test': n pairs; only 'train' has more than one stratum."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    kind = draw_kinds(n, list(STRATA.values())[1:] if split == "train" else [], rng)
    images, what = draw_shapes(n, size, rng)
    captions, pixels = describe(what), to_pixels(images)
    options = np.array([len(COLOURS), len(GROUNDS), len(SHAPES)])
    plant(pixels, captions, kind, rng,                     # of a wrong caption nothing is right
          lambda: describe((what + rng.integers(1, options, size=(n, 3))) % options))
    return Pairs(torch.from_numpy(pixels), tokenize(captions, words),
                 [f"{split}{i:06d}" for i in range(n)], list(captions),
                 [list(STRATA)[k] for k in kind])


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = options(__doc__, data=("toy", f"toy, {', '.join(DATASETS)}, tar shards (* works), or "
                                    "a folder of images"),
                     val=(None, "pairs you trust, in the same layouts"),
                     root=(str(Path(torch.hub.get_dir()) / "datasets"), "folder of the data sets"),
                     plant=("", "dirt to plant, such as captions=0.1,noise=0.05,plain=0.05"),
                     size=(16, "pixels a side"), words=(8, "words kept of a caption"),
                     patch=(4, "pixels a side of a patch"), width=(64, "of the proxy"),
                     depth=(3, "blocks of the proxy"), batch_size=(64, "pairs, all processes"),
                     steps=(400, "of warm-up"), lr=(2e-3, "of the warm-up"))
    parser.add_argument("--pairs", type=count, help="take so many training pairs, not all")
    args = parse(parser, argv, steps=12, batch_size=16)
    read_plant(args.plant)
    args.root = os.path.abspath(os.path.expanduser(args.root))   # later stages may run elsewhere
    return args


def load_data(args, device):
    """The splits train, val (for eq. 5) and test (for stage 5) as the options name them."""
    if args.val and args.data in ("toy", *DATASETS):
        raise SystemExit(f"--val goes with files: --data {args.data} has trusted pairs of its own")
    room = np.inf if args.plant and "corpus" in vars(args) else Machine.memory    # as in stage 1
    if args.data == "toy":
        counts = SMOKE_PAIRS if args.smoke else TOY_PAIRS
        splits = [draw_toy(n, args.size, args.seed, split, args.words) for split, n in
                  {**counts, "train": args.pairs or counts["train"]}.items()]
    elif args.data in DATASETS:
        splits = read_dataset(args)
    else:
        corpus = open_pairs(args.data, args.size, args.words, args.out)
        compare_corpus(args, data=corpus)
        if args.val:
            val, test, _ = deal(open_pairs(args.val, args.size, args.words, args.out), 1, args.seed)
        else:
            val, test, corpus = deal(corpus, 0.1, args.seed)
            print0("no --val: part of the corpus is held out instead. Validation no better than "
                   "the corpus can only ask eq. 6 for more of the same; give it pairs you trust.")
        if args.pairs:
            corpus = corpus.take(np.sort(np.argsort(corpus.hashes())[:args.pairs]))
        args.data, args.val = (path and os.path.abspath(os.path.expanduser(path))
                               for path in (args.data, args.val))
        splits = [keep_resident(corpus, room), keep_resident(val), keep_resident(test)]
    splits = dict(zip(("train", "val", "test"), splits))
    compare_corpus(args, val=splits["val"], test=splits["test"])
    name_shared(*splits.values())
    if args.plant:
        if not isinstance(splits["train"], Pairs):
            raise SystemExit(f"--plant works on pairs that fit into --memory, and {len(corpus)} do "
                             "not: take a part of them, such as --pairs 20000, or raise it")
        splits["train"] = plant_pairs(splits["train"], read_plant(args.plant), args.seed)
    for name, pairs in splits.items():
        if len(pairs) < args.batch_size:
            raise SystemExit(f"the {name} split has {len(pairs)} readable pairs, fewer than "
                             f"--batch-size {args.batch_size}: add pairs, or lower it")
    print0("pairs: " + ", ".join(f"{len(pairs)} {name}" for name, pairs in splits.items()))
    return [pairs.to(device) for pairs in splits.values()]


def main(args, device):
    out = Path(args.out)
    pairs, val, test = load_data(args, device)
    pairs = keep_decoded(pairs, out)
    proxy = build_proxy(args, device)
    progress = Progress(out / "proxy.progress", "01_proxy.py", vars(args), args.save_every)
    progress.expect(args.steps, args.batch_size)
    points = {max(1, round(share * args.steps)) for share in (0.05, 0.2, 0.5, 1)}
    snapshots = progress.kept                              # {step: weights}

    def after(step):
        if step in points:
            snapshots[step] = {name: value.to("cpu", copy=True)
                               for name, value in proxy.state_dict().items()}
        if step % 100 == 0 or step == args.steps:
            recent = np.mean(progress.fetch()[-100:], axis=0)
            print0(f"warm-up {step:5d}/{args.steps}   loss {recent[0]:.4f}")

    train(proxy, pairs, args.steps, args.batch_size, args.lr, args.seed, progress=progress,
          after=after)
    save(out / "proxy.pt", "01_proxy.py", settings=vars(args), snapshots={
        step: {sys.intern(name): value for name, value in weights.items()}    # each name once: a
        for step, weights in snapshots.items()})           # continued run saves the same bytes
    write_csv(out / "proxy.csv", ["step", "loss", "grad_norm"],
              [(k, *row) for k, row in enumerate(progress.log, 1)])
    verdict = say("captions are {}read", read_captions(proxy, val, args.seed), 0.5, 0.75,
                  "more --steps, a smaller --size, fewer --words or more pairs would help")
    draw_figure(out / "proxy.png", proxy, [loss for loss, _ in progress.log], test, args.seed,
                verdict)
    progress.finish()
    print0(verdict)
    print0(f"wrote {out}/proxy.pt, .csv, .png: {sum(p.numel() for p in proxy.parameters()):,} "
           f"parameters, {args.steps} steps in {progress.seconds:.0f} s")


def draw_figure(path, proxy, losses, test, seed, verdict):
    """The loss, smoothed over 25 steps, and what the warm proxy draws for eight captions."""
    rows = np.arange(8) % len(test)
    x, c = test.batch(rows)
    eps = torch.randn(x.shape, generator=seeded(x.device, seed, "figure"), device=x.device)
    figure, axes = plt.subplot_mosaic("L0123;L4567", figsize=(10, 4), layout="constrained",
                                      width_ratios=[3, 1, 1, 1, 1])
    left, window = axes.pop("L"), min(25, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    left.plot(np.arange(len(smooth)) + window, smooth, color="black")
    left.set(xlabel="warm-up step", ylabel="loss of the reference proxy", ylim=(0, None))
    left.set_title(verdict.split(":")[0], fontsize=9)
    show_pictures(list(axes.values()), sample(proxy, c, eps), test.take(rows).captions)
    save_figure(figure, path)


# ---- pairs: in memory, or on disk behind an index --------------------------------------------
SINGLE_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")  # no spaces in Chinese


def find_word_rows(caption):
    """Rows of the word table for a caption: one per word, or per character in CJK scripts."""
    words = SINGLE_WORDS.findall(caption.lower()) or caption.split()
    return [1 + zlib.crc32(word.encode("utf-8", "replace")) % (VOCABULARY - 1) for word in words]


def tokenize(captions, words):
    """Captions -> (N, words) int64; 0 fills up, and what is beyond `words` is cut off."""
    rows = [find_word_rows(caption)[:words] for caption in captions]
    rows = [row + [0] * (words - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64).view(len(captions), words)


def deal(pairs, share, seed):
    """Two halves of a share of the pairs, and the rest. A pair's place follows from its key, so
    that another pair moves none; the share is halved while it holds more than HELD_OUT."""
    while share * len(pairs) > HELD_OUT:
        share /= 2
    lots = pairs.hashes() ^ np.uint64(hash_key(f"split {seed}"))              # (N,)
    lots = lots * np.uint64(0x9E3779B97F4A7C15) / 2 ** 64                     # mixed, in [0, 1]
    places = np.digitize(lots, (share / 2, share))
    return [pairs.take(np.flatnonzero(places == k)) for k in range(3)]


def compare_corpus(args, **found):
    """Note count and keys of pairs in the options of stage 1; later stages compare with these."""
    noted = vars(args).setdefault("corpus", {})
    for name, pairs in found.items():
        now = f"{len(pairs)} pairs, keys {zlib.crc32(pairs.hashes().tobytes()):08x}"
        if noted.setdefault(name, now) != now:
            raise SystemExit(f"--data or --val changed after 01_proxy.py ({name}: {noted[name]}; "
                             f"now {now}): run 01_proxy.py and the stages after it again")


def name_shared(train, *held):
    """Say how many trusted pairs are training pairs too: by key and, in memory, by pixels."""
    marks = {"keys": [pairs.hashes() for pairs in (train, *held)]}
    if isinstance(train, Pairs):
        marks["pixels"] = [[hash(image.tobytes()) for image in pairs.images.numpy()]
                           for pairs in (train, *held)]
    for name, (known, *asked) in marks.items():
        both = np.flatnonzero(np.isin(np.concatenate(asked), known))
        if len(both):
            print0(f"{len(both)} trusted pairs have the {name} of training pairs, first "
                   f"{sum((pairs.keys for pairs in held), [])[both[0]]}: take them out of --data, "
                   "or validation asks for what is trained on anyway")


@dataclass
class Pairs:
    """N image-text pairs, resident on one device. Strata are names for the analysis, or ''."""
    images: torch.Tensor       # (N, 3, H, W) uint8
    tokens: torch.Tensor       # (N, T) int64
    keys: list
    captions: list
    strata: list

    def __len__(self):
        return len(self.keys)

    def batch(self, rows):
        """x (B, 3, H, W) in [-1, 1] and c (B, T) of these rows."""
        rows = to_device(rows, self.device)
        return self.images[rows].float() / 127.5 - 1, self.tokens[rows]

    def take(self, rows):
        """The pairs of these rows, as Pairs."""
        columns = ([column[i] for i in rows] for column in (self.keys, self.captions, self.strata))
        rows = to_device(rows, self.device)
        return Pairs(self.images[rows], self.tokens[rows], *columns)

    def parts(self, batches, shared=False):
        """For every array of rows in `batches`: the rows and their pairs."""
        for rows in batches:
            yield rows, self.take(rows)

    def name(self, rows):
        return [self.keys[row] for row in rows]

    def hashes(self):
        return np.array([hash_key(key) for key in self.keys], "u8")

    @property
    def device(self):
        return self.images.device

    def to(self, device):
        return replace(self, images=to_device(self.images, device),
                       tokens=to_device(self.tokens, device))


# 24 bytes a pair: its source; where in a tar it begins, how many blocks it has; its key's hash.
ENTRY = np.dtype([("source", "i4"), ("offset", "i8"), ("blocks", "i4"), ("hash", "u8")])


@dataclass
class Shards:
    """N image-text pairs on disk, found by row: stands in for Pairs where memory is too small."""
    sources: list              # (tar, "", {}), or (path, key, {suffix: path, or bytes of a table})
    entries: np.ndarray        # (N,) of ENTRY
    size: int
    words: int
    device: str = "cpu"
    cache: np.ndarray = None   # of decoded images, and where in it the (N,) pairs lie
    places: np.ndarray = None
    strata = ()                # not known before a pair is read

    def __len__(self):
        return len(self.entries)

    def take(self, rows):
        places = None if self.cache is None else self.places[rows]
        return replace(self, entries=self.entries[rows], places=places)

    def to(self, device):
        return replace(self, device=device)

    def read(self, row, types=("",)):
        """Key, and {suffix: bytes} of a pair's files of some types (all), read in place."""
        number, offset, blocks, known = self.entries[row].tolist()
        path, key, places = self.sources[number]
        if places:
            return key, {kind: place if isinstance(place, bytes) else Path(place).read_bytes()
                         for kind, place in places.items() if kind.endswith(types)}
        files = {}
        with open(path, "rb") as shard:
            shard.seek(offset)
            tar = tarfile.open(fileobj=shard, mode="r:", encoding="utf-8")
            for member in iter(tar.next, None):
                first, stem, kind = split_name(member.name)
                if hash_key(first) == known:
                    stem, kind = "", stem.lower() + kind
                if member.isfile() and hash_key(first + stem) == known:
                    key = first + stem
                    if kind.endswith(types):
                        files.setdefault(kind, tar.extractfile(member).read())
                if tar.offset >= offset + blocks * BLOCK:
                    break
        return key, files

    def __getitems__(self, rows):
        """For the DataLoader: rows, their readable Pairs, and (reason, name) of what is skipped."""
        images = np.zeros((len(rows), 3, self.size, self.size), np.uint8)
        texts, skipped = [], []
        for row in rows:
            key, files = self.read(row, IMAGE_TYPES + TEXT_TYPES)
            slot = {"seen": False} if self.cache is None else self.cache[self.places[row]]
            pair = decode_pair(files, self.size, slot)
            if isinstance(pair, str):
                skipped.append((pair, key))
            else:
                images[len(texts)], caption, stratum, further = pair
                texts.append((key, caption, stratum))
                skipped += [(FURTHER, f"{key}: {text}") for text in further]
        keys, captions, strata = ([text[k] for text in texts] for k in range(3))
        return rows, Pairs(torch.from_numpy(images[:len(keys)]), tokenize(captions, self.words),
                           keys, captions, strata), skipped

    def parts(self, batches, shared=False):
        """For every array of rows in `batches`: the rows and the readable pairs among them. Workers
        decode ahead, but not for a batch that is the only one. What was skipped is told at the end,
        by all processes together where they have `shared` the batches."""
        alone, skipped = isinstance(batches, list) and len(batches) == 1, {}
        loader = map(self.__getitems__, batches) if alone or len(self) <= 1000 else DataLoader(
            self, batch_sampler=batches, collate_fn=tuple, num_workers=cores(),
            multiprocessing_context="fork" if hasattr(os, "fork") else None,
            worker_init_fn=obey_parent, generator=torch.Generator())
        for rows, part, missing in loader:
            skipped.update(dict.fromkeys(missing))
            yield rows, part.to(self.device)
        print_skipped(dict.fromkeys(gather_lists([*skipped])) if shared else skipped)

    def name(self, rows):
        return [self.read(row, ())[0] for row in rows]

    def hashes(self):
        return self.entries["hash"]


def obey_parent(*_):
    """In a worker: the main process alone decides on both signals, and takes it with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)         # PR_SET_PDEATHSIG: also after kill -9


def find_rows(pairs, keys):
    """Row (K,) of every key, -1 where there is none. keys: text, or an array of their hashes."""
    known, hashed = pairs.hashes(), getattr(keys, "dtype", None) == np.dtype("u8")
    wanted = keys if hashed else np.fromiter(map(hash_key, keys), "u8")
    order = np.argsort(known)
    rows = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[rows] == wanted, rows, -1)


def hash_key(key):
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest())


def read_dataset(args):
    """Splits of a torchvision data set: no trusted pair is a training pair, stage 5 has the test
    split's."""
    if rank() == 0:
        open_dataset(args, download=True)
    from_first(None)                                       # the others wait for its files
    rng = np.random.default_rng(args.seed)
    data, test = (open_dataset(args, train=train) for train in (True, False))
    order, test_order = (rng.permutation(len(split)) for split in (data, test))
    trusted = min(DATASET_TRUSTED, len(data) // 5)
    return [label_pairs(data, np.sort(order[trusted:][:args.pairs]), args),
            label_pairs(data, order[:trusted], args),
            label_pairs(test, test_order[:2 * DATASET_TRUSTED], args)]


def open_dataset(args, **how):
    """One of DATASETS in --root, as torchvision reads it."""
    kind = getattr(datasets, args.data)
    try:
        return kind(args.root, **how)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        names = [name.removesuffix(".gz") for name, _ in
                 getattr(kind, "resources", None) or kind.train_list + kind.test_list]
        folder = Path(args.root) / getattr(kind, "base_folder", f"{args.data}/raw")
        raise SystemExit(f"{args.data} could not be read or downloaded: put {', '.join(names)} "
                         f"into {folder}, or name another --root ({str(error).splitlines()[0]})")


def label_pairs(data, rows, args):
    """These pictures of a torchvision data set under 'a photo of a CLASS', as Pairs."""
    images = torch.as_tensor(np.asarray(data.data)[rows])                     # (n, H, W[, 3])
    images = images.permute(0, 3, 1, 2) if images.dim() == 4 else images[:, None]
    images = image_ops.resize(images.expand(-1, 3, -1, -1), [args.size] * 2, antialias=True)
    captions = [name_class(data.classes[int(data.targets[row])]) for row in rows]
    split = "train" if data.train else "test"
    return Pairs(images, tokenize(captions, args.words), [f"{split}{row:05d}" for row in rows],
                 captions, ["informative"] * len(rows))


def name_class(name):
    """'T-shirt/top', '8 - eight', 'aquarium_fish' -> 'a photo of a t-shirt', 'an eight', ..."""
    word = name.split(" - ")[-1].split("/")[0].replace("_", " ").lower()
    return f"a photo of {'an' if word[0] in 'aeiou' and word != 'one' else 'a'} {word}"


# ---- reading real pairs: WebDataset tars, folders, tables -------------------------------------
IMAGE_TYPES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
TEXT_TYPES = (".txt", ".caption", ".json")                # of several in a pair, the first type
CAPTION_NAMES = ("caption", "text", "prompt")
TABLES = ("metadata.csv", "metadata.jsonl")
BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE     # 512 and 10,240 bytes
NAME = re.compile(rf"(?s)(?:\./)?((?:.*/)?[^./]*)(.*?)((?:{'|'.join(IMAGE_TYPES)})?\.[^.]*)?", re.I)
BREAKS = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029]")    # of a line
CONTROLS = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
UNSEEN = (r"[\s\0-\x1f\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
          r"\u2028-\u202e\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0]*")
NO_CAPTION = re.compile(f"{UNSEEN}(nan|none|null|<na>|n/a)?{UNSEEN}", re.I)
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16",
         b"\xfe\xff": "utf-16", b"": "utf-8-sig"}
FURTHER = "further caption of a pair, of which the first is used"
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 30      # not used, no fault


def open_pairs(path, size, words, out=None):
    """Shards of `path`: tars, or folders of tars, of images with sidecars, or with a table. What
    the index already shows to be of no use is skipped, counted by reason and named once."""
    skipped = {}
    files, base = list_files(path, out, skipped)
    tars = [file for file in files if file.lower().endswith(".tar")]
    if tars:
        sources, entries = [(tar, "", {}) for tar in tars], index_shards(tars, skipped, out)
        skipped |= {("file beside tars", file): 1 for file in sorted(set(files) - set(tars))}
    elif out and os.path.realpath(out) == os.path.realpath(path):
        raise SystemExit(f"{path} is --out as well: results are no pairs, name another --out")
    else:
        named = [(os.path.relpath(file, base).replace(os.sep, "/"), file) for file in files]
        sources = index_tables(files, base, skipped)
        if sources is None:                                # images with .txt beside them
            sources = [(base, key, {kind: file for kind, (_, file) in pair.items()})
                       for key, pair in find_pairs(named, "", skipped)]
        entries = np.array([(k, 0, 0, hash_key(key)) for k, (_, key, _) in enumerate(sources)],
                           ENTRY)
    pairs = Shards(sources, entries, size, words)
    _, first = np.unique(entries["hash"], return_index=True)
    again = np.delete(np.arange(len(pairs)), first)
    if len(again):                                         # the first is named, the others counted
        (key,) = pairs.name(again[:1])
        skipped |= {("key seen before", f"{key} ({k})"): 1 for k in range(len(again))}
    print_skipped(skipped)
    if not len(pairs):
        raise SystemExit(f"{path}: no readable pair; README, 'Your own pairs', has the layouts "
                         "(unpack what is compressed, call a table metadata.csv)")
    return pairs.take(np.sort(first))


def list_files(path, out, skipped):
    """All files that `path` stands for, in which * works, and the folder that it names or that they
    lie in: keys begin there. What exists is no pattern. Links to folders are followed once."""
    base = path = os.path.expanduser(path)
    while base and not os.path.isdir(base):
        base = os.path.dirname(base)
    places = [path] if os.path.exists(path) else sorted(
        glob.glob(glob.escape(base) + path[len(base):], recursive=True))
    if not places:
        raise SystemExit(f"{path}: no such file or folder (pairs are tar shards, as in "
                         "'DIR/train-*.tar', a folder of them, or a folder of images)")
    found, seen = [], {os.path.realpath(out)} if out else set()
    for place in places:
        found += [] if os.path.isdir(place) else [place]
        for folder, folders, names in os.walk(place, followlinks=True):
            hidden, real = os.path.basename(folder).startswith("."), os.path.realpath(folder)
            if folder != base and (hidden or real in seen or ".lock" in names):
                skipped["folder that is hidden, of results, or read already", folder] = 1
                names, folders[:] = [], []
            seen.add(real)
            folders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
            found += [os.path.join(folder, name) for name in names]
    files = sorted({file for file in found if os.path.isfile(file) and os.access(file, os.R_OK)
                    and not os.path.basename(file).startswith(".")})
    rest = sorted(set(found).difference(files))
    skipped |= {("hidden file, broken link, or not to be read", file): 1 for file in rest}
    return files, base or "."


def index_shards(tars, skipped, out):
    """Entries (N,) of all tars, by all processes and cores; kept in `out` while no tar changes. The
    first process says which index is meant: another node may hold the same shards elsewhere."""
    named = [(os.path.basename(tar), os.path.getsize(tar)) for tar in tars]
    if from_first(named) != named:
        raise SystemExit(f"{tars[0]}: these are not the shards (names, sizes) of the first process")
    state = repr([ENTRY.names, *((os.path.realpath(tar), os.path.getsize(tar),
                                  os.stat(tar).st_mtime_ns) for tar in tars)])
    file = Path(out) / f"index-{hash_key(from_first(state)):016x}.npz" if out else None
    if not from_first(file and file.exists()):
        with ProcessPoolExecutor(cores(), initializer=obey_parent) as pool:
            share = np.array_split(np.arange(len(tars)), world())[rank()]
            parts = gather_lists([*pool.map(index_shard, [tars[k] for k in share], share)])
        entries, bad = zip(*parts)
        saved = {"entries": np.concatenate(entries),
                 "skipped": np.array([pair for part in bad for pair in part]).reshape(-1, 2)}
        if file and rank() == 0:
            with atomic_file(file, "wb") as whole:
                np.savez(whole, **saved)
    from_first(None)                                       # the others wait for the file
    saved = np.load(file, allow_pickle=False) if file else saved
    skipped |= {tuple(pair): 1 for pair in saved["skipped"].tolist()}
    return saved["entries"]


def index_shard(tar_path, source=0):
    """Entries (n,) of one tar, source number `source`, and {(reason, name)} of what is skipped."""
    files, skipped, entries, end, size = [], {}, [], 0, os.path.getsize(tar_path)
    gc.disable()                                           # many objects, and no cycle among them
    with (contextlib.suppress(tarfile.TarError, OSError, ValueError),         # the rest is counted
          tarfile.open(tar_path, "r:", encoding="utf-8") as tar):
        for member in iter(tar.next, None):
            tar.members.clear()                           # tarfile would keep them all
            if tar.offset <= end:
                break                                     # a damaged size that leads backwards
            end = tar.offset
            if member.isfile():
                files.append((member.name, (member.offset, end)))
            elif not member.isdir():
                skipped["link or device in a tar", f"{tar_path}: {member.name}"] = 1
    with open(tar_path, "rb") as shard:
        shard.seek(end)
        tail = shard.read(RECORD + 2 * BLOCK)             # the end mark: two blocks, filled up
    if not BLOCK <= len(tail) < RECORD + 2 * BLOCK or tail.strip(b"\0"):
        skipped[f"damaged shard, cut off, compressed or no tar: {max(size - end, 0)} of {size} "
                "bytes not read", str(tar_path)] = 1
    for key, pair in find_pairs(files, f"{tar_path}: ", skipped):
        numbers, spans = zip(*sorted(pair.values()))
        start, end = spans[0][0], spans[-1][1]
        reason = ("cut off at the end of a shard" if end > size else
                  "files of a key are apart in a tar: sort it as tar --sort=name does, without "
                  "dots in names"
                  if numbers[-1] - numbers[0] >= len(numbers) else "")
        if reason:
            skipped[reason, f"{tar_path}: {key}"] = 1
        else:
            entries.append((source, start, (end - start) // BLOCK, hash_key(key)))
    gc.enable()
    return np.array(entries, ENTRY), skipped


def find_pairs(files, where, skipped):
    """(key, {suffix: (number, place)}) of every image and what belongs to it, from (name, place).
    The key ends at the first dot of a file's name, as in WebDataset, or at the last one where the
    first would join images of which one has a caption of its own, or none has any."""
    groups, number, types = {}, 0, IMAGE_TYPES + TEXT_TYPES
    for name, place in files:
        reason = refuse(name, "tar" if where else "folder")
        if reason:
            skipped[reason, where + name] = 1
            continue
        key, stem, kind = split_name(name)
        pair = groups.setdefault(key, {}).setdefault(stem, {})
        if kind in pair:
            skipped["key seen before", where + key + stem] = 1
        else:
            number += kind.endswith(types)
            pair[kind] = number, place
    for key, parts in groups.items():
        images, texts = ({stem for stem in parts if of_types(parts[stem], types)}
                         for types in (IMAGE_TYPES, TEXT_TYPES)) if len(parts) > 1 else ("", "")
        if len(images) > 1 and (not texts or images & texts - {""}):
            skipped["first dot as the end of a key, which would join images", where + key] = 1
        elif parts.keys() != {""}:
            parts = {"": {stem.lower() + kind: place for stem, pair in parts.items()
                          for kind, place in pair.items()}}
        for stem, pair in parts.items():
            images = of_types(pair, IMAGE_TYPES)
            if images:
                yield key + stem, pair
            else:
                reason = ("no image" if of_types(pair, TEXT_TYPES) else
                          f"neither image nor caption: {' '.join(pair) or 'no suffix'}")
                skipped[reason, where + key + stem] = 1
            for kind in images[1:]:
                skipped["another image of a pair", where + key + stem + kind] = 1


def of_types(kinds, types):
    """The suffixes of some types, the preferred first: '.jpg', then '.png', then '.seg.jpg'."""
    found = [kind for kind in kinds if kind.endswith(types)]
    return found if len(found) < 2 else sorted(found, key=lambda kind: (
        kind.count("."), types.index(kind[kind.rindex("."):]), kind))


def split_name(name):
    """'./a/b.c.JPG' -> ('a/b', '.c', '.jpg'). What `to_name` in 04 changed is turned back."""
    key, dot, kind = name.removeprefix("./").rpartition(".")
    key, stem, kind = ((key, "", dot + kind) if dot and "." not in key else       # most names
                       NAME.fullmatch(name).groups(""))
    return to_key(key), to_key(stem), kind.lower()


def to_key(name):
    """A name as a key, without what cannot be written: bytes that are no UTF-8 become \\xe9."""
    name = name.replace("%2E", ".").replace("%2F", "/") if "%" in name else name
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def refuse(name, where):
    """Why a file is not read, or ''. Nothing is unpacked, but keys end up in files."""
    name = name.removeprefix("./")
    parts = name.replace("\\", "/").split("/")
    if BREAKS.search(name) or ".." in parts or parts[0][1:] == ":" or not parts[0]:
        return f"unsafe name in a {where}"
    return f"hidden file in a {where}" if "/." in "/" + name else ""


def index_tables(files, base, skipped):
    """Sources of metadata.csv and .jsonl: `file_name` and `text`, `caption` or `prompt`; or None
    where there is no table."""
    tables = [file for file in files if os.path.basename(file).lower() in TABLES]
    if not tables:
        return None
    sources = []
    for table in tables:
        rows, folder = list(read_rows(table)), os.path.dirname(table)
        if rows and not any("file_name" in row and set(row).intersection(CAPTION_NAMES)
                            for _, row in rows):
            raise SystemExit(f"{table}: needs columns file_name and one of "
                             f"{', '.join(CAPTION_NAMES)}")
        for line, row in rows:
            name, file = row.get("file_name"), os.path.join(folder, str(row.get("file_name")))
            if not isinstance(name, str) or name.splitlines() != [name]:
                skipped["row that does not fit its table", f"{table}, line {line}"] = 1
            elif not os.path.isfile(file):
                skipped["image file missing", file] = 1
            else:
                key = to_key(Path(os.path.relpath(folder, base), name).with_suffix("").as_posix())
                kind, texts = os.path.splitext(name)[1].lower(), find_captions(row)
                kind = kind if kind in IMAGE_TYPES else IMAGE_TYPES[0]
                skipped |= {(FURTHER, f"{key}: {text}"): 1 for text in texts[1:]}
                note = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
                sources.append((file, key, {kind: file, ".json": note} | {
                    ".txt": text.encode() for text in texts[:1]}))
    named = {os.path.abspath(file) for file in [*tables, *(file for file, _, _ in sources)]}
    skipped |= {("file that no table names", file): 1 for file in files
                if os.path.abspath(file) not in named}
    return sources


def read_rows(table):
    """(line number, record) of a table's rows; {} for one that does not fit. A quote that is not
    closed within 50 lines takes no other row with it."""
    lines = re.split("\r\n|\r|\n", decode_text(Path(table).read_bytes()))
    if table.lower().endswith(".jsonl"):
        yield from ((k, parse_json(line)) for k, line in enumerate(lines, 1) if line.strip())
        return
    columns, first = [], 0
    while first < len(lines):
        row, line = [], first
        for last in range(first + 1, min(first + 50, len(lines)) + 1):
            with contextlib.suppress(csv.Error):
                row = next(csv.reader(["\n".join(lines[first:last])], strict=True,
                                      skipinitialspace=True))
                break
        first = last if len(row) == len(columns or row) else first + 1
        if columns and lines[line].strip():
            yield line + 1, dict(zip(columns, row)) if len(row) == len(columns) else {}
        columns = columns or [name.strip() for name in row]


def print_skipped(skipped):
    """A line for each reason of {(reason, name)}: how many names, and the first."""
    for reason in dict.fromkeys(reason for reason, _ in skipped):
        names = [name for other, name in skipped if other == reason]
        print0(f"skipped {len(names)} ({reason}), first {' '.join(clean(names[0]).split())}")


def decode_text(data):
    """Text in the encoding of its byte-order mark, or in UTF-8; what is neither as U+FFFD."""
    return data.decode(next(MARKS[mark] for mark in MARKS if data.startswith(mark)), "replace")


def clean(text):
    """Text that can be written and printed: no controls, no lone surrogates."""
    return CONTROLS.sub(" ", text).strip().encode("utf-8", "backslashreplace").decode()


def parse_json(text):
    """A JSON object as a dict; anything else, broken text included, as an empty one."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else {}
    return {}


def find_captions(record):
    """The captions of a JSON record or a table row: of its first field that has any. What was
    decoded with loss is none."""
    fields = (record.get(name) for name in CAPTION_NAMES)
    found = ([clean(text) for text in (field if isinstance(field, list) else [field])
              if isinstance(text, str) and "\ufffd" not in text and not NO_CAPTION.fullmatch(text)]
             for field in fields)
    return next(filter(None, found), [])


def list_captions(files):
    """The captions of a pair, of its text files or else its JSON, and why there is none."""
    texts = {kind: decode_text(files[kind]) for kind in of_types(files, TEXT_TYPES)}
    found = (find_captions(parse_json(text) if kind.endswith(".json") else {"text": text})
             for kind, text in texts.items())
    lost = "\ufffd" in "".join(texts.values())
    return next(filter(None, found), []), "caption is not UTF-8" if lost else "no caption"


def decode_pair(files, size, slot):
    """(image (3, size, size) uint8, caption, stratum, further captions) of a pair's files, or why
    it has none. The cache's slot for the pair has its image, or gets it here."""
    captions, reason = list_captions(files)
    if not captions:
        return reason
    try:
        if not slot["seen"]:
            slot["image"] = decode(files[of_types(files, IMAGE_TYPES)[0]], size)
            slot["seen"] = True                            # last: a worker may be killed
    except Exception as error:                             # decoders of broken files raise anything
        return f"unreadable image: {re.split('[<(]', str(error))[0].strip()}"
    stratum = str(parse_json(decode_text(files.get(".json", b""))).get("stratum") or "")
    return slot["image"], captions[0], " ".join(clean(stratum).split()), captions[1:]


def open_image(data, side=None):
    """Image bytes -> PIL image in RGB, on white, upright; a large JPEG at 2 `side` at least."""
    image = Image.open(io.BytesIO(data))
    image.draft(None, side and (2 * side, 2 * side))
    image.load()
    with contextlib.suppress(Exception):                  # broken EXIF: the pixels are sound
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                             # of shares, or of 8, 12 or 16 bits
        values = np.asarray(image, float).clip(0)
        levels = next((n for n in (256, 4096, 65536) if values.max() < n), values.max())
        scale = 255 if values.max() <= 1 else 256 / levels
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def decode(data, size):
    """Image bytes -> (3, size, size) uint8: the largest square in the middle, resized."""
    image = open_image(data, size)
    square = image_ops.center_crop(image, [min(image.size)] * 2)
    return image_ops.pil_to_tensor(image_ops.resize(square, [size, size], antialias=True)).numpy()


def keep_resident(pairs, limit=np.inf):
    """Shards as Pairs where their pixels fit into `limit` bytes, else as they are."""
    if isinstance(pairs, Pairs) or len(pairs) * 3 * pairs.size ** 2 > limit:
        return pairs
    parts = [part for _, part in pairs.parts(np.array_split(np.arange(len(pairs)),
                                                            len(pairs) // 256 + 1))]
    keys, captions, strata = ([text for part in parts for text in getattr(part, name)]
                              for name in ("keys", "captions", "strata"))
    longer = np.mean([len(find_word_rows(caption)) > pairs.words for caption in captions or [""]])
    if longer > 0.05 and pairs.cache is None:
        print0(f"{longer:.0%} of the captions are longer than --words {pairs.words} and are cut")
    return Pairs(torch.cat([part.images for part in parts]),
                 torch.cat([part.tokens for part in parts]), keys, captions, strata)


def keep_decoded(pairs, out):
    """For several epochs: Shards with a mapped file in `out`, one a machine, that takes every image
    when it is first decoded. It has no name: the disk is free again however the run ends."""
    if isinstance(pairs, Pairs):
        return pairs
    slot = np.dtype([("seen", "?"), ("image", "u1", (3, pairs.size, pairs.size))])
    size = len(pairs) * slot.itemsize
    fits = from_first(shutil.disk_usage(out).free > 1.1 * size)
    print0(f"{len(pairs)} pairs exceed --memory: decoded " + ("once" if fits else "in every epoch")
           + f", with {size / 1e9:.1f} GB {'taken from' if fits else 'more than free in'} {out}")
    if not fits:
        return pairs
    file = Path(out) / f".pixels-{os.environ.get('GROUP_RANK', 0)}"
    if os.environ.get("LOCAL_RANK", "0") == "0":           # one process of a machine makes the file
        np.memmap(file, slot, "w+", shape=len(pairs))
    from_first(None)                                       # the others wait for it
    cache = np.memmap(file, slot, "r+", shape=len(pairs))
    from_first(None)                                       # until all have opened it
    file.unlink(missing_ok=True)
    return replace(pairs, cache=cache, places=np.arange(len(pairs), dtype="i4"))


# ---- plumbing for all five stages: batches, processes, files, options -------------------------
LAUNCHER = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}    # set by torchrun, all of them


def draw_batches(n, batch_size, seed, first, last):
    """Rows of batches `first` to `last` - 1: every epoch its own order, the short rest left out."""
    for step in range(first, last):
        epoch, place = divmod(step, n // batch_size)
        if step == first or place == 0:
            order = np.random.default_rng([seed, epoch, n]).permutation(n)
        yield order[place * batch_size:(place + 1) * batch_size]


def stream(pairs, batches):
    """(keys, x, c) for every global batch of rows, cut to this process's share. The place of a
    pair that cannot be read goes to another one of the share."""
    for rows, part in pairs.parts(map(mine, batches), shared=True):
        if not len(part):
            raise SystemExit(f"none of these pairs can be read: {', '.join(pairs.name(rows))}")
        yield part.keys, *part.batch(np.arange(len(rows)) % len(part))


def to_device(values, device):
    """Values as a tensor on `device`; this process does not wait for a batch's copy to a GPU."""
    tensor = torch.as_tensor(values)
    if torch.device(device).type == "cpu" or tensor.is_cuda or tensor.nbytes > 2 ** 26:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def seeded(device, *parts):
    """A generator that depends on `parts` alone, so that any step can be repeated by itself."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def cores():
    """The cores that this process may use: its share of those of the machine."""
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, free // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def mine(rows):
    """This process's share of a global batch: the rank-th of `world()` equal runs of rows."""
    share = len(rows) // world()
    return rows[rank() * share:(rank() + 1) * share]


def average_gradients(net):
    """Mean of the gradients over processes, in one message."""
    if world() > 1:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        vector_to_parameters(add_up(parameters_to_vector(grads)) / world(), grads)


def add_up(tensor):
    """Sum of a tensor over processes."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(tensor):
    """The rows of all processes, in the order in which `mine` dealt them."""
    rows = tensor.new_zeros(world() * len(tensor), *tensor.shape[1:])
    mine(rows).copy_(tensor)
    return add_up(rows)


def gather_lists(items):
    """The lists of all processes one after another. Each waits here for the others."""
    lists = [items] * world()
    if world() > 1:
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def from_first(value):
    """What the first process has in the place of `value`."""
    return gather_lists([value])[0]


def print0(*words):
    if rank() == 0:
        print(*words, flush=True)


def launch(main, args):
    """Call main(args, device): one process of torchrun's, or alone; --out is its own meanwhile."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")           # the terminal may not have ±
    cuda, place = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if args.precision == "auto":
        native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if native else "tf32" if cuda else "fp32"
    if cuda:
        if place >= torch.cuda.device_count():
            raise SystemExit(f"{torch.cuda.device_count()} GPU(s) here: --nproc-per-node asks for "
                             "more processes than that")
        torch.cuda.set_device(place)
        torch.set_float32_matmul_precision("highest" if args.precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    if LAUNCHER <= os.environ.keys() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if getattr(args, "batch_size", 0) % world():
        raise SystemExit(f"--batch-size {args.batch_size} must divide by {world()} processes")
    Machine.bf16, Machine.compiled = args.precision == "bf16", args.compile
    Machine.fetch_every = 10 if cuda else 1
    Machine.micro_batch, Machine.memory = getattr(args, "micro_batch", None), args.memory * 1e9
    if cuda:
        print0(f"{torch.cuda.get_device_name()}, forward passes in bf16: {Machine.bf16}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)
    torch.manual_seed(args.seed)
    try:
        with lock_folder(Path(args.out)):
            main(args, torch.device("cuda" if cuda else "cpu"))
    except (RuntimeError, MemoryError) as error:
        if re.search("out of memory|allocate|ALLOC_FAILED", str(error)):
            cures = {"micro_batch": "--micro-batch (pairs at a time, with the same results)",
                     "batch_size": "--batch-size", "memory": "--memory"}
            raise SystemExit("out of memory: lower " + " or ".join(
                cure for name, cure in cures.items() if hasattr(args, name)))
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def lock_folder(folder):
    """Make a folder and lock it until this process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise SystemExit(f"--out {folder} cannot be written: {error.strerror}; name another folder")
    try:
        if fcntl and rank() == 0:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)                  # no fork inherits it
    except (BlockingIOError, PermissionError):
        raise SystemExit(f"{folder} is in use by another run: wait for it, or name another --out")
    except OSError as error:
        print0(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
    with lock:
        yield


def note_signal(number, frame):
    """Ctrl-C or SIGTERM: the step under way is finished first; a second one ends at once."""
    if Progress.stop or not Progress.running:
        sys.exit(128 + number)
    Progress.stop = number


class Progress:
    """A loop of steps that may be stopped at any moment; the same command continues it.

    Batches and random numbers depend on the seed and the step alone, so the networks, their
    optimisers and the step are the whole state, and a continued run ends bit for bit as an unbroken
    one (on a CPU). `log` holds a row of numbers per step, `kept` whatever else shall survive.
    `settings` are the options and a `digest` of every input: with others nothing is continued.
    """
    running, stop = False, 0   # between the first step and `finish`; the signal that came
    tell_every, goal = 10, 0   # seconds between two lines of `tell`; the steps that it counts to

    def __init__(self, path=None, written_by="", settings=None, save_every=60):
        self.path, self.written_by, self.settings = path, written_by, settings or {}
        self.save_every, self.parts, self.weights = save_every, {}, {}
        self.step, self.seconds, self.log, self.kept = 0, 0.0, [], {}
        self.waiting, self.stopping = [], 0
        if path and Path(path).exists():
            state = load(path, written_by)
            for name, value in self.settings.items():
                if state["settings"].get(name) != value and name not in ANYHOW:
                    raise SystemExit(
                        f"{path} was begun with {name} = {state['settings'].get(name)}, not "
                        f"{value}: finish that run first, or delete the file to begin anew")
            self.step, self.seconds, self.kept = (state[k] for k in ("step", "seconds", "kept"))
            self.log, self.weights = state["log"].tolist(), state["weights"]
            print0(f"continuing from {path}")
        self.now = self.saved = self.told = time.monotonic()

    def expect(self, steps, pairs):
        """From now on tell every few seconds how far the way to `steps` of `pairs` each is."""
        self.goal, self.step_pairs = steps, pairs

    def tell(self):
        if self.goal and self.step and self.now - self.told >= self.tell_every:
            self.told, rate = self.now, self.step / self.seconds
            left = datetime.timedelta(seconds=round((self.goal - self.step) / rate))
            print0(f"step {self.step} of {self.goal}   {self.step_pairs * rate:,.0f} pairs a second"
                   f"   {left} left")

    def attach(self, **parts):
        """Networks and optimisers to save, and to restore where the run was interrupted."""
        place = self.step, [len(kept) for kept in self.kept.values() if isinstance(kept, list)]
        if from_first(place) != place:
            raise SystemExit(f"{self.path}: the processes do not see the same file (step "
                             f"{self.step} here); --out must be one folder that all of them see")
        for name, part in parts.items():
            if self.weights:
                part.load_state_dict(self.weights[name])
        self.parts, self.weights, Progress.running = parts, {}, True

    def advance(self, numbers, keys=(), after=None, by=1):
        """Count a step of the pairs `keys`, and its numbers (K,); call after(step) before it may be
        saved. On a GPU numbers are looked at every ten steps and before every save only, as looking
        waits for the device."""
        caught = numbers.new_full((1,), float(Progress.stop))
        self.waiting.append((add_up(torch.cat([numbers.detach(), caught])) / world(), keys))
        self.step += by
        together = (self.step // by % Machine.fetch_every == 0     # for all processes the same step
                    or Progress.stop and world() == 1)
        due = self.path and time.monotonic() - self.saved >= self.save_every
        if together or due:
            self.fetch()
        if after:
            after(self.step)
        stop = together and self.stopping
        if stop or due:
            self.save()
        if stop:
            print0(f"stopped after step {self.step}: the same command continues from {self.path}")
            sys.exit(128 + (Progress.stop or signal.SIGTERM))

    def fetch(self):
        """The log: with the numbers that wait, averaged over processes, which have to be finite."""
        while self.waiting:
            row, keys = self.waiting.pop(0)
            *numbers, stop = row.tolist()
            if not np.isfinite(numbers).all():
                keep = f" {self.path} still holds an earlier step." if self.path else ""
                raise SystemExit(f"step {len(self.log) + 1}: {numbers} is not finite.{keep} Lower "
                                 f"--lr, or look at the pairs of its batch: {', '.join(keys)}")
            self.log.append(numbers)
            self.stopping = max(self.stopping, stop)
        now = time.monotonic()
        self.seconds, self.now = self.seconds + now - self.now, now
        self.tell()
        return self.log

    def save(self):
        if self.path:
            save(self.path, self.written_by, settings=self.settings, step=self.step,
                 seconds=self.seconds, log=torch.tensor(self.log), kept=self.kept,
                 weights={name: part.state_dict() for name, part in self.parts.items()})
        self.saved = time.monotonic()

    def begin_next(self):
        """Start a new loop in the same file; `kept` remains."""
        self.step, self.seconds, self.log, self.parts = 0, 0.0, [], {}
        self.now = self.told = time.monotonic()
        self.save()

    def finish(self):
        """The results are written: nothing is left to continue."""
        Progress.running = False
        if self.path and rank() == 0:
            Path(self.path).unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path, mode="w"):
    """A file that takes its name when it is complete; where it cannot be written, one line."""
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        text = {"newline": "", "encoding": "utf-8"} if mode == "w" else {}
        with open(part, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:              # RuntimeError: torch on a full disk
        with contextlib.suppress(OSError):
            part.unlink()
        raise SystemExit(f"{path} cannot be written ({str(error).splitlines()[0]}): mend that and "
                         "run the same command again; earlier files are as they were")


def digest(path):
    """Sixteen digits that stand for the contents of a file: what was made from it keeps them."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def save(path, written_by, settings=(), **state):
    """State dicts, settings and numbers, from the first process; equal results, equal bytes."""
    state["settings"] = {name: settings[name] for name in settings if name not in ANYHOW}
    if rank() == 0:
        with atomic_file(path, "wb") as file:
            torch.save({"written_by": written_by, **state}, file)


def load(path, written_by):
    """What `save` wrote; no code in the file is run. Missing or foreign files end the program."""
    script, unfinished = written_by.split()[0], Path(path).with_suffix(".progress")
    if unfinished != Path(path) and unfinished.exists():
        raise SystemExit(f"{unfinished}: {written_by} was interrupted; run it again to finish it, "
                         "or delete this file")
    if not Path(path).exists():
        raise SystemExit(f"{path} is missing: run {written_by} with the same --out first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{path} cannot be read ({type(error).__name__}): delete it and run "
                         f"{written_by} again")
    if not isinstance(state, dict) or state.get("written_by") != script:
        raise SystemExit(f"{path} was not written by {script}: run {written_by} again")
    return state


def write_csv(path, columns, rows):
    if rank() == 0:
        with atomic_file(path) as file:
            csv.writer(file).writerows([columns, *rows])


def say(text, value, chance, good, cure):
    """The verdict on a measured number, in words: {} in `text` stays empty or becomes a no."""
    if np.isnan(value):
        return f"{text.format('perhaps ')}: it cannot be told here, no two pairs differ in it"
    doubt = "" if value >= good else "hardly " if value >= (chance + good) / 2 else "not "
    return f"{text.format(doubt)}: {value:.2f} ({chance:g} is chance)" + (doubt and f"; {cure}")


def show_pictures(axes, images, captions, letters=16):
    """Images (K, 3, H, W) in [-1, 1] on K axes, their captions above, cut to fit."""
    for axis, image, caption in zip(np.ravel(axes), images.cpu(), captions):
        axis.imshow((image.permute(1, 2, 0).numpy() + 1) / 2)
        title = textwrap.fill(textwrap.shorten(caption[:500], 3 * letters), letters)
        axis.set_title(title, fontsize=7)
        axis.axis("off")


def legend_above(axis, columns=4):
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=columns,
                frameon=False, columnspacing=1)


def save_figure(figure, path):
    if rank() == 0:
        with atomic_file(path, "wb") as file, warnings.catch_warnings(action="ignore"):
            figure.savefig(file, format="png", dpi=150, bbox_inches="tight")  # emoji have no glyph
    plt.close(figure)


def options(description, **defaults):
    """The parser of the options that mean the same in every stage that has them."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=lambda text: count(text, 0), default=0,
                        help="of every random draw")
    parser.add_argument("--smoke", action="store_true",
                        help="tiny run, to see that it works; what is typed beside it still counts")
    parser.add_argument("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto",
                        help="of the proxies' forward passes; auto: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, block by block")
    if "batch_size" in defaults:
        parser.add_argument("--micro-batch", type=count, metavar="PAIRS", help="in memory at a "
                            "time, for the same results (default: all that a process has)")
    everywhere = {"out": ("out", "folder of all results"),
                  "save_every": (60.0, "seconds; an interrupted run loses this much at most"),
                  "memory": (2.0, "GB of pixels up to which pairs are kept in memory")}
    for name, (default, text) in {**everywhere, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text,
                            type={int: count, float: amount}.get(type(default), str))
    return parser


def parse(parser, argv, **smoke):
    """The options as typed; --smoke changes the defaults of those that are not."""
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**smoke)
    return parser.parse_args(argv)


def read_plant(text):
    """'captions=0.1,noise=0.05' -> {kind of PLANTED: share}."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    planted = {name: float(share) for name, _, share in pairs if re.fullmatch(r"0?\.\d+", share)}
    if (len(pairs) != len(planted) or not set(planted) <= set(PLANTED)
            or sum(planted.values()) > 0.99):
        raise SystemExit(f"--plant {text}: name kinds of {', '.join(PLANTED)} and shares of 0.99 "
                         "at most together, as in --plant captions=0.1,noise=0.05")
    return planted


def count(text, least=1):
    if not text.isdecimal() or not least <= int(text) < 2 ** 63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above {least - 1}")
    return int(text)


def amount(text):
    if not re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[-+]?\d\d?)?", text, re.I):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return float(text)


def load_proxy(out):
    """The options that out/proxy.pt was made with, and the weights at four points of the warm-up,
    {step: state dict}."""
    saved = load(Path(out) / "proxy.pt", "01_proxy.py")
    return argparse.Namespace(**{**saved["settings"], "out": out}), saved["snapshots"]


if __name__ == "__main__":
    launch(main, parse_args())
