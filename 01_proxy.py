"""Stage 1 of 5: the data, the text-to-image proxy, and the warm-up of its reference copy (eq. 4).

Alchemist rates image-text pairs by what a small text-to-image model, the *proxy*, gains from them.
This stage prepares the pairs, defines the proxy and warms it up on the training pairs, all weighted
alike: the reference theta_hat. Stage 2 starts both of its proxies, theta and theta_hat, from these
weights.

    eq. 4    theta_hat <- theta_hat - beta * grad L(theta_hat; D_train)
    L        rectified flow, one number per pair:  x_t = (1 - t) x + t eps,
             L_i = mean over pixels and channels of |net(x_t, t, c) - (eps - x)|^2

Differs from the paper: the proxy is a diffusion transformer (DiT) in pixel space trained by
rectified flow; the paper's is a 0.3 B scale-wise autoregressive model. Eq. 4 steps by AdamW.

The pairs are read once, into arrays in out/pairs that all stages map into memory: a pair is its row
there. *Training* pairs are rated. *Validation* pairs are trusted and take part in eq. 5. *Test*
pairs are trusted, too, and only stage 5 and its judge see them.

What comes after `main` can be skipped: toy pairs, readers of real pairs, plumbing. Of that, these
names stand in the method: `Pairs` (pictures, and captions as numbers), `draw_batches` (rows, batch
after batch), `mine` (this process's share of a batch), `seeded` (random numbers by seed and step)
and `Progress` (a loop that may be killed and continued).

Shapes: B pairs in a batch, T words, P patches, D width, N pairs of a split, M rows of the arrays.

Writes   out/pairs/, out/proxy.pt (theta_hat), .json (the options), .csv (the loss)
Run      python 01_proxy.py                                   toy pairs, 15 s on two cores
         python 01_proxy.py --data 'DIR/train-*.tar' --val CURATED --size 32 --width 96
         torchrun --nproc-per-node 2 -- 01_proxy.py           same global batch, cut over processes
"""
import argparse
import collections
import contextlib
import csv
import datetime
import functools
import glob
import hashlib
import io
import json
import mmap
import multiprocessing
import os
import re
import shutil
import tarfile
import threading
import time
import unicodedata
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # imported after a group is made, it keeps the group's threads alive
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader

VOCABULARY = 2048          # rows of the word table; a word's row follows from its CRC-32
DEPTH = 3                  # blocks of the proxy
TOY_PAIRS = {"train": (4000, 256), "val": (1000, 64), "test": (1000, 64)}     # with --smoke
DATASETS = ("FashionMNIST", "MNIST", "CIFAR10", "CIFAR100")        # of torchvision
BUILT_IN = ("toy", *DATASETS, "own")                       # --data that is no path
DATASET_TRUSTED = 1000     # validation pairs, of their training split; twice as many test pairs


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
        self.to_patch = nn.Conv2d(3, width, patch, stride=patch)
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
        patches = self.to_patch(x).flatten(2).transpose(1, 2)                 # (B, P, D)
        h = torch.cat([word, patches], 1) + self.position                     # (B, T + P, D)
        for block in self.blocks:
            h = block(h, cond)                                                # (B, T + P, D)
        h = self.from_patch(self.norm(h[:, self.words:])).transpose(1, 2)     # (B, 3 p p, P)
        side = x.shape[-1] // self.patch
        return F.pixel_shuffle(h.unflatten(2, (side, side)), self.patch)      # (B, 3, H, W)


def time_features(t, width):
    """(B,) in [0, 1] -> (B, width): sines and cosines at geometrically spaced frequencies."""
    rates = torch.exp(torch.linspace(0, np.log(1000), width // 2, device=t.device))
    angles = t[:, None] * rates                                               # (B, width / 2)
    return torch.cat([angles.sin(), angles.cos()], 1)


def build_proxy(settings, device):
    """The network that the options of this stage describe, with fresh weights."""
    net = DiT(settings.size, settings.patch, settings.width, DEPTH, settings.words).to(device)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if bf16 and not settings.fp32:
        net.forward = torch.autocast("cuda", torch.bfloat16)(net.forward)
    torch.set_float32_matmul_precision("highest" if settings.fp32 else "high")         # TF32
    return net


# ---- rectified flow: the loss L, its noise, the sampler --------------------------------------
def flow_loss(net, x, c, t, eps):
    """L(net; x_i) for every pair, (B,): squared error of the predicted velocity at time t."""
    along = t[:, None, None, None]
    x_t = (1 - along) * x + along * eps                                       # (B, 3, H, W)
    return (net(x_t, t, c) - (eps - x)).square().mean((1, 2, 3))              # (B,)


def draw_noise(x, rng, shift=0.0):
    """The noise of a whole batch: t (B,), a normal number through a sigmoid, and eps like x."""
    t = (torch.randn(len(x), generator=rng, device=x.device) + shift).sigmoid()        # (B,)
    return t, torch.randn(x.shape, generator=rng, device=x.device)                     # as x


def drop_captions(c, rng):
    """Blank a tenth of the captions, so that `sample` can ask what the net draws without one."""
    return c * (torch.rand(len(c), 1, generator=rng, device=c.device) >= 0.1)


@torch.no_grad()
def sample(net, c, eps, steps=12, guidance=2.0):
    """Images (B, 3, H, W) in [-1, 1] for captions c: Euler steps from eps (t = 1) to data (t = 0).

    Classifier-free guidance runs both captions, the real and the empty one, as one batch.
    """
    x, both = eps.clone(), torch.cat([c, torch.zeros_like(c)])                # (B, ...), (2B, T)
    for t in torch.linspace(1, 0, steps + 1, device=x.device)[:-1]:
        v, v_empty = net(x.repeat(2, 1, 1, 1), t.expand(len(both)), both).chunk(2)
        x = x - (v_empty + guidance * (v - v_empty)) / steps
    return x.clamp(-1, 1)


# ---- eq. 4: training without weights ---------------------------------------------------------
def descend(loss, net, opt, clip=2.0):
    """One clipped optimiser step on a loss that trains `net` alone. Returns the gradient's norm."""
    opt.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(net)                                # does nothing with one process
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    opt.step()
    return norm


def adamw(net, lr):
    """The optimiser of every network: betas as in the released code, torch's weight decay 0.01."""
    return torch.optim.AdamW(net.parameters(), lr, (0.9, 0.95), fused=True)   # frozen ones rest


def train(net, pairs, steps, batch_size, lr, seed, decay=0.0, progress=None):
    """`steps` steps of eq. 4 on `pairs`. Stage 1 warms the proxy up, stage 5 trains its models.

    The learning rate rises over the first twentieth of the steps and, with `decay`, falls to zero
    over that share at their end. `progress` logs loss and gradient norm, and continues a run that
    was killed.
    """
    opt, ramp, progress = adamw(net, lr), max(steps // 20, 1), progress or Progress()
    batches = draw_batches(len(pairs), batch_size, seed, progress.step, steps)
    for k, rows in zip(progress.steps(steps, net=net, opt=opt), batches):
        left = (steps - k) / (decay * steps) if decay else 1.0
        opt.param_groups[0]["lr"] = lr * min(1.0, (k + 1) / ramp, left)
        x, c = pairs.batch(rows)                           # of all processes: each takes its share
        rng = seeded(x.device, seed, "train", k)
        c, noise = drop_captions(c, rng), draw_noise(x, rng)
        loss = flow_loss(net, *map(mine, (x, c, *noise))).mean()
        progress.note(loss.detach(), descend(loss, net, opt))                 # eq. 4
    return net


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    args = parse(
        argv, __doc__, smoke=dict(steps=12, batch_size=16),
        data=("toy", f"{', '.join(BUILT_IN)} (arrays), tar shards (* works), or a folder"),
        val=("", "pairs you trust, as files like those of --data"),
        pairs=(0, "take so many training pairs; 0 takes all"),
        plant=([0.0], "dirt to plant: shares of plain, of noise, of wrong captions; or one"),
        root=(str(Path(torch.hub.get_dir()) / "datasets"), "folder of the data sets"),
        size=(16, "pixels a side"), words=(8, "words kept of a caption"),
        patch=(4, "pixels a side of a patch"), width=(64, "of the proxy"),
        batch_size=(64, "pairs, all processes"), steps=(400, "of warm-up"),
        lr=(2e-3, "of the warm-up"), seed=(0, "of every random draw, in all stages"),
        fp32=(False, "no bf16 or TF32 on a GPU, in all stages"))
    asked = args.plant
    args.plant = asked if len(asked) > 1 else 3 * asked    # of PLANTED
    if len(asked) not in (1, 3) or not all(share >= 0 for share in asked) or sum(args.plant) > 0.99:
        raise SystemExit("--plant takes three shares, together 0.99 at most, or one for all three")
    unread = args.data == "own" and (args.pairs or any(args.plant))
    if unread or (args.val and args.data in BUILT_IN):
        raise SystemExit(f"--data {args.data} takes no --val" + ", --pairs, --plant" * bool(unread))
    for name in ("data", "val", "root"):                   # the same folder, wherever a stage runs
        if vars(args)[name] not in ("", *BUILT_IN):
            setattr(args, name, os.path.abspath(os.path.expanduser(vars(args)[name])))
    return args


def main(args, device):
    out, ref = Path(args.out), build_proxy(args, device)   # theta_hat
    prepare(out / "pairs", args)
    pairs, val, test = (open_pairs(out / "pairs", split, device)
                        for split in ("train", "val", "test"))
    if ((args.size, args.words) != (pairs.images.shape[2], pairs.tokens.shape[1])
            or len(pairs) < args.batch_size):
        raise SystemExit(f"{out}/pairs: its {len(pairs)} training pairs are fewer than --batch-size"
                         " or, with --data own, of another --size or --words")
    print0(f"pairs: {len(pairs)} train, {len(val)} val, {len(test)} test")
    made = out / "pairs/made.json"
    progress = Progress(out / "proxy.progress", {**vars(args), "pairs": digest(made)},
                        ["loss", "grad_norm"])
    train(ref, pairs, args.steps, args.batch_size, args.lr, args.seed, progress=progress)
    save(out / "proxy.pt", "01_proxy.py", [made], args, ref.state_dict())
    write_csv(out / "proxy.csv", ["step", "loss", "grad_norm"],
              [(k, *row) for k, row in enumerate(progress.log, 1)])
    progress.finish()
    return (f"wrote {out}/proxy.pt, .json, .csv: {sum(p.numel() for p in ref.parameters()):,} "
            "parameters; next 02_meta_rater.py")


# ---- pairs with known dirt: drawn, or planted in real ones ------------------------------------
# A stratum says what a pair is, for the analysis only: nothing rates by it (a test shuffles them).
#   informative      one shape in colour on a background, and the caption says so
#   plain            a white field; teaches nothing, lies about nothing, costs steps
#   chaotic          noise under a caption that promises a shape; a clean one under a wrong caption
STRATA = {"informative": 0.45, "plain": 0.30, "chaotic-noise": 0.15, "chaotic-caption": 0.10}
PLANTED = ("planted-plain", "planted-noise", "planted-caption")
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


def to_pixels(images):                                     # [-1, 1] -> uint8
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


def plant_pictures(images, rows, kind, rng):
    """Turn these rows (n,) of images (M, 3, H, W) uint8 into dirt in place, by their kind (n,): 1
    becomes a plain white picture, 2 noise; 0 and 3, a wrong caption, stay as they are."""
    flat = rng.uniform(0.75, 0.95, (len(rows), 1, 1, 1)).astype(np.float32)
    for part in np.array_split(np.arange(len(rows)), len(rows) // 1024 + 1):
        grain = rng.standard_normal((len(part), *images.shape[1:]), dtype=np.float32)
        plain, noise = kind[part] == 1, kind[part] == 2
        images[rows[part[plain]]] = to_pixels(flat[part[plain]] + 0.04 * grain[plain])
        images[rows[part[noise]]] = to_pixels(0.5 * grain[noise])


def draw_shapes(n, size, rng):
    """n clean pictures (n, 3, size, size) in [-1, 1]; colour, ground and shape of each (n, 3)."""
    what = np.stack([rng.integers(len(of), size=n) for of in (COLOURS, GROUNDS, SHAPES)], 1)
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


def draw_toy(n, size, seed, split, first=0):
    """n pairs (key, image, caption, stratum) of a toy split; only 'train' has several strata."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), *[first] * (first > 0)])
    kind = draw_kinds(n, list(STRATA.values())[1:] if split == "train" else [], rng)
    images, what = draw_shapes(n, size, rng)
    captions, pixels = describe(what), to_pixels(images)
    plant_pictures(pixels, np.arange(n), kind, rng)
    options = np.array([len(COLOURS), len(GROUNDS), len(SHAPES)])
    wrong = describe((what + rng.integers(1, options, size=(n, 3))) % options)  # nothing is right
    captions[kind == 3], captions[kind == 1] = wrong[kind == 3], PLAIN_CAPTION
    for k in range(n):
        yield f"{split}{first + k:06d}", pixels[k], captions[k], list(STRATA)[kind[k]]


# ---- pairs: prepared once, mapped afterwards -------------------------------------------------
# For pairs in another layout a script writes these files (.assets/own.md has one), for --data own:
#   images.npy (M, 3, S, S) uint8, tokens.npy (M, T) int16, entries.npy (M,) of ENTRY
#   texts.jsonl, a JSON string a line: entries say at which byte a key and a caption begin
#   train.npy, val.npy, test.npy: rows of these arrays; made.json: {"data": "own", "digest": ...}
ENTRY = np.dtype([("hash", "u8"), ("pixels", "u8"), ("key", "i8"), ("caption", "i8"),
                  ("stratum", "S15")])                     # hashes of key and picture
PREPARED = ("data", "val", "pairs", "plant", "root", "size", "words", "seed", "smoke")
TASK, TOY_TASK, LEAST = 2048, 20000, 16    # pairs that a core reads or draws at a time; of a split
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w[\w{}]*".format("".join(
    chr(k) for k in range(0x300, 0x1f000) if unicodedata.category(chr(k)).startswith("M"))))


def tokenize(captions, words):
    """Captions -> (N, words) int16: the word table's row of each word or CJK character, then 0."""
    table = np.zeros((len(captions), words), np.int16)
    for row, caption in zip(table, captions):
        text = unicodedata.normalize("NFC", caption).lower()
        found = WORD.findall(text)[:words] or text.split()[:words]
        row[:len(found)] = [1 + zlib.crc32(word.encode("utf-8", "replace")) % (VOCABULARY - 1)
                            for word in found]
    return table


@dataclass
class Pairs:
    """N image-text pairs: rows of arrays in memory, or of the files of `prepare`, mapped."""
    images: np.ndarray         # (M, 3, H, W) uint8
    tokens: np.ndarray         # (M, T) int16
    entries: np.ndarray        # (M,) of ENTRY
    texts: bytes               # JSON strings, a line each
    rows: np.ndarray           # (N,)
    device: object = "cpu"

    def __len__(self):
        return len(self.rows)

    def batch(self, rows=slice(None)):
        """x (B, 3, H, W) in [-1, 1] and c (B, T) of these pairs."""
        rows = self.rows[rows]
        x, c = (torch.from_numpy(array[rows]).to(self.device)
                for array in (self.images, self.tokens))
        return x.float() / 127.5 - 1, c.long()

    def take(self, rows):
        """Some of the pairs, as Pairs."""
        return replace(self, rows=self.rows[rows])

    def read(self, what, rows=slice(None)):
        """The texts `key` or `caption` of these pairs."""
        begins = self.entries[what][self.rows[rows]].tolist()
        return [json.loads(self.texts[k:self.texts.find(b"\n", k)]) for k in begins]

    def strata(self, rows=slice(None)):
        """Names for the analysis (B,), or ""."""
        return self.entries["stratum"][self.rows[rows]].astype("U15")


def open_pairs(folder, split="train", device="cpu"):
    """One split of the pairs in `folder`, as Pairs."""
    if not (folder / "made.json").exists():
        raise SystemExit(f"{folder} is missing: run 01_proxy.py with the same --out first, or the "
                         "script that writes it for --data own")
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r")
              for name in ("images", "tokens", "entries", split)]
    with open(folder / "texts.jsonl", "rb") as file:
        texts = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Pairs(*arrays[:3], texts, arrays[3], device)


def prepare(folder, args):
    """The first process makes `folder` of --data and --val, unless the same was made before: in
    FOLDER.part until it is whole. args without `val` (03_score.py --data): all pairs are train."""
    if rank() == 0:
        part, old = Path(f"{folder}.part"), read_json(folder / "made.json")
        tasks, stamp = list_tasks(args)
        made = {name: vars(args).get(name) for name in PREPARED}
        made |= {"files": stamp, "form": repr(ENTRY)}
        changed = ", ".join(name for name in made if old.get(name) != made[name] and tasks)
        if changed:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            print0(f"{folder} is made" + f" anew, with other {changed}" * bool(old)
                   + f": {3 * args.size ** 2 + 2 * args.words + 150} bytes of disk a pair, "
                   f"{shutil.disk_usage(part).free / 1e9:.1f} GB are free")
            split_rows(part, read_tasks(part, tasks, args), args)
            if any(made["plant"] or ()):
                plant_pairs(part, args)
            made["digest"] = digest(part / "entries.npy") + digest(part / "texts.jsonl")
            (part / "made.json").write_text(json.dumps(made, indent=1))
            (folder / "made.json").unlink(missing_ok=True)  # first: without it nothing is whole
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()                                      # else a power cut leaves a hollow folder
            part.rename(folder)
    add_up(torch.zeros(1))                                 # the others wait here


def list_tasks(args):
    """[(label, reader, its arguments)] for all pairs that the options name, and digits for the
    names, sizes and times of their files. The label is a split; `data` or `val` for files."""
    if args.data == "own":                                 # a script has made them
        return [], ""
    if args.data == "toy":
        counts = {split: sizes[args.smoke] for split, sizes in TOY_PAIRS.items()}
        counts["train"] = args.pairs or counts["train"]
        return [(split, draw_toy, (min(TOY_TASK, n - first), args.size, args.seed, split, first))
                for split, n in counts.items() for first in range(0, n, TOY_TASK)], ""
    if args.data in DATASETS:
        return [(split, read_dataset, (name, data, part, args.size))
                for split, name, data, rows in split_dataset(args)
                for part in np.array_split(rows, len(rows) // TASK + 1)], ""
    tasks, stamps = [], []
    for label in ("data", "val"):
        path = vars(args).get(label)
        sources, files = list_sources(path) if path else ([], [])
        tasks += [(label, read_pairs, (source, args.size)) for source in sources]
        stamps += [(file, os.path.getsize(file), os.stat(file).st_mtime_ns) for file in files]
    return tasks, f"{hash64(repr(stamps).encode()):016x}"


def read_tasks(folder, tasks, args):
    """Write the arrays of all tasks into `folder`, read by all cores. Returns the labels (M,)."""
    counts, skipped, began, told = [], [], time.monotonic(), time.monotonic()
    parts = side_by_side(functools.partial(read_task, args=args), tasks, "fork")
    with contextlib.ExitStack() as stack:
        texts, *files = (stack.enter_context(open(folder / name, "wb")) for name in (
            "texts.jsonl", "images.npy", "tokens.npy", "entries.npy"))
        for k, (images, tokens, entries, lines, left_out) in enumerate(parts, 1):
            for what in ("key", "caption"):
                entries[what] += texts.tell()
            texts.write(lines)
            counts.append(len(entries))
            for file, rows in zip(files, (images, tokens, entries)):
                append(file, rows, sum(counts))
            skipped += left_out
            if time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                left = datetime.timedelta(seconds=round((told - began) * (len(tasks) / k - 1)))
                print0(f"read {sum(counts):,} pairs   {left} left")
    for reason in dict.fromkeys(reason for reason, _ in skipped):
        names = [name for other, name in skipped if other == reason]
        print0(f"skipped {len(names)} ({reason}), first {' '.join(clean(names[0]).split())}")
    return np.repeat([label for label, *_ in tasks], counts)


def append(file, rows, total):
    """Append rows to an open .npy, whose head, which numpy leaves room for, then says `total`."""
    file.seek(0)
    head = np.lib.format.header_data_from_array_1_0(rows)
    np.lib.format.write_array_header_1_0(file, {**head, "shape": (total, *rows.shape[1:])})
    file.seek(0, os.SEEK_END)
    file.write(rows.tobytes())


def read_task(task, args):
    """Arrays and texts of one task, and [(reason, name)] of what was skipped; no torch is used."""
    images, captions, entries, texts, skipped = [], [], [], [], []
    _, reader, arguments = task
    for key, image, caption, stratum in reader(*arguments):
        if image is None:
            skipped.append((caption, key))                 # the reason
            continue
        images.append(image)
        captions.append(caption)
        texts += [json.dumps(text, ensure_ascii=False).encode() + b"\n" for text in (key, caption)]
        entries.append((hash64(key.encode()), hash64(image.tobytes()), 0, 0,
                        stratum.encode("ascii", "replace")))
    entries, ends = np.array(entries, ENTRY), np.cumsum([0, *map(len, texts)])
    entries["key"], entries["caption"] = ends[:-1:2], ends[1::2]
    return (np.array(images, np.uint8).reshape(-1, 3, args.size, args.size),
            tokenize(captions, args.words), entries, b"".join(texts), skipped)


def split_rows(folder, labels, args):
    """Write the rows of every split, of pairs with these labels (M,): of one key the first."""
    entries, splits = np.load(folder / "entries.npy"), {}
    keys = entries["hash"]
    for label in dict.fromkeys(labels):
        found = np.flatnonzero(labels == label)
        splits[label] = np.sort(found[np.unique(keys[found], return_index=True)[1]])
        again = np.setdiff1d(found, splits[label])
        if len(again):
            print0(f"skipped {len(again)} (comes twice), the first of them pair {again[0] + 1}")
    corpus = splits.pop("data", np.arange(0))
    if "val" not in args:
        splits = {"train": corpus}
    elif args.val:
        splits["val"], splits["test"], _ = deal(splits.get("val", corpus[:0]), keys, 1, args.seed)
        splits["train"] = corpus
    elif "train" not in splits:
        splits = dict(zip(("val", "test", "train"), deal(corpus, keys, 0.1, args.seed)))
        print0("no --val: part of the corpus is held out instead, and eq. 6 can only ask for more "
               "of the same: give it pairs you trust")
    if vars(args).get("pairs"):                            # by lot, and new pairs change no lot
        lots = np.argsort(keys[splits["train"]])[:args.pairs]
        splits["train"] = splits["train"][np.sort(lots)]
    for split, rows in splits.items():
        if len(rows) < (least := max(LEAST, vars(args).get("batch_size", 0))):
            raise SystemExit(f"{args.data}: the {split} split has {len(rows)} readable pairs, less "
                             f"than {least}: add pairs, or lower --batch-size; {LAYOUTS}")
        np.save(folder / f"{split}.npy", rows)
        shared = np.intersect1d(entries["pixels"][rows], entries["pixels"][splits["train"]])
        if split != "train" and len(shared):
            print0(f"{len(shared)} pictures of the {split} split are training pictures, too: take "
                   "them out of --data, or trusted pairs ask for what is trained on anyway")


def deal(rows, keys, share, seed):
    """Two halves of a share of the rows, mixed, and the rest, by lots that no other pair moves."""
    lots = keys[rows] ^ np.uint64(hash64(f"split {seed}".encode()))
    lots = lots * np.uint64(0x9E3779B97F4A7C15) / 2 ** 64                     # mixed, in [0, 1]
    *halves, rest = (rows[np.digitize(lots, (share / 2, share)) == k] for k in range(3))
    return *map(np.random.default_rng(seed).permutation, halves), rest        # 05 takes the first


def plant_pairs(folder, args):
    """Turn shares of the training pairs in `folder` into dirt, as --plant says, and mark them."""
    rows, rng = np.load(folder / "train.npy"), np.random.default_rng([args.seed, 0])
    kind = draw_kinds(len(rows), args.plant, rng)
    images, tokens, entries = (np.load(folder / f"{name}.npy", mmap_mode="r+")
                               for name in ("images", "tokens", "entries"))
    plant_pictures(images, rows, kind, rng)
    wrong, plain = rows[kind == 3], rows[kind == 1]
    other = rng.choice(rows, len(wrong))                   # whose caption a pair gets
    for _ in range(100):
        same = (tokens[wrong] == tokens[other]).all(1)
        other[same] = rng.choice(rows, same.sum())
    if same.any():
        raise SystemExit("--plant: nearly all pairs have one caption, so no caption can be wrong")
    tokens[wrong], entries["caption"][wrong] = tokens[other], entries["caption"][other]
    with open(folder / "texts.jsonl", "ab") as file:
        entries["caption"][plain] = file.tell()
        tokens[plain] = tokenize([PLAIN_CAPTION], args.words)
        file.write(json.dumps(PLAIN_CAPTION).encode() + b"\n")
    for k, stratum in enumerate(PLANTED, 1):
        entries["stratum"][rows[kind == k]] = stratum.encode()
        print0(f"{stratum}: {(kind == k).sum()} pairs")


def split_dataset(args):
    """[(split, its name in keys, data set, rows)] of a data set; a val pair is no training pair."""
    from torchvision import datasets                       # takes as long to import as torch
    kind, rng = getattr(datasets, args.data), np.random.default_rng(args.seed)
    try:
        data, test = (kind(args.root, train, download=True) for train in (True, False))
    except Exception as error:                             # of another file under its name, any
        why = " ".join(str(error).split())
        raise SystemExit(f"{args.data} could not be read or downloaded ({why}): put its files into "
                         f"{args.root}, or name another --root")
    order, test_order = (rng.permutation(len(split)) for split in (data, test))
    trusted = min(DATASET_TRUSTED, len(data) // 5)
    train = np.sort(order[trusted:][:args.pairs or None])
    return [("train", "train", data, train), ("val", "train", data, order[:trusted]),
            ("test", "test", test, test_order[:2 * DATASET_TRUSTED])]


def read_dataset(name, data, rows, size):
    """Pairs of a data set: 'T-shirt/top' is 'a photo of a t-shirt', '8 - eight' '... an eight'."""
    for row in rows:
        image, label = data[row]
        word = data.classes[label].split(" - ")[-1].split("/")[0].replace("_", " ").lower()
        caption = f"a photo of {'an' if word[0] in 'aeiou' and word != 'one' else 'a'} {word}"
        yield f"{name}{row:05d}", shrink(image.convert("RGB"), size), caption, "informative"


# ---- reading real pairs: WebDataset tars, folders, a table ------------------------------------
IMAGE_TYPES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
TEXT_TYPES = (".txt", ".caption", ".json")                 # of several in a pair, the first type
CAPTION_NAMES = ("caption", "text", "prompt")
FILE_NAMES = ("file_name", "image", "filename", "path")    # columns of a table
NO_CAPTION = ("", "nan", "none", "null", "n/a")
LAYOUTS = ("a pair is a picture and a .txt, .caption or .json of the same name in a folder or tar, "
           f"or a row of the folder's only .csv or .jsonl, with columns {' or '.join(FILE_NAMES)}, "
           f"and {' or '.join(CAPTION_NAMES)}; .assets/own.md has a script for other layouts")
SPLIT = re.compile(r"(?s)(?:\./)?((?:.*/)?[^./]*)(.*)")    # a name: its key, its suffix
CONTROLS = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
UNSAFE = re.compile(r"(?s)[/\\]|.:|(.*[/\\])?\.\.([/\\]|$)|.*[\0-\x1f\x7f-\x9f\u2028\u2029]")


def list_sources(path):
    """Tars, or lists of up to TASK loose pairs, in `path`, where * works; and all files there."""
    places = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not places:
        raise SystemExit(f"{path}: no such file or folder. Quote a pattern with *, braces do not "
                         f"work, and {LAYOUTS}")
    files = {os.path.join(folder, name) for place in places for folder, _, names in os.walk(place)
             for name in names}
    files = sorted(file for file in files.union(places) if os.path.isfile(file))
    top = os.path.commonpath(places)
    shown = [file for file in files if "/." not in file.removeprefix(top)]
    tars = [file for file in shown if file.lower().endswith(".tar")]
    if tars:
        return tars, files
    tables = [file for file in shown if file.lower().endswith((".csv", ".jsonl"))]
    named = [(os.path.relpath(file, top), Path(file).read_bytes, "") for file in files]
    pairs = [*read_table(tables[0], files)] if len(tables) == 1 else []
    if not any(pair for _, pair, _ in pairs):
        pairs = [*group_files(sorted(named, key=lambda item: SPLIT.match(item[0]).groups()))]
    if not any(of_types(pair, TEXT_TYPES) and of_types(pair, IMAGE_TYPES) for _, pair, _ in pairs):
        raise SystemExit(f"{path}: no pair in {len(files)} files, {len(tables)} of them tables: "
                         f"{LAYOUTS}")
    return [pairs[k:k + TASK] for k in range(0, len(pairs), TASK)], files


def list_pairs(source):
    """(key, {suffix: function that reads it}, "") of a source, or (name, {}, why it is skipped)."""
    return group_files(list_members(source)) if isinstance(source, str) else source


def list_members(path):
    """(name, function that reads it, "") of a tar's files, or (name, None, why it is skipped)."""
    try:
        tar = tarfile.open(path, "r:", encoding="utf-8")
        for member in iter(tar.next, None):
            tar.members.clear()                            # tarfile would keep them all
            if member.isfile():
                yield member.name, lambda member=member: tar.extractfile(member).read(), ""
            elif not member.isdir():
                yield member.name, None, "link or device in a tar"
        tar.fileobj.seek(tar.offset)
        tail = tar.fileobj.read(12000)                     # the end mark: zeros, a record at most
        if not 512 <= len(tail) < 12000 or tail.strip(b"\0"):
            raise ValueError(f"nothing was read beyond byte {tar.offset}")
    except (tarfile.TarError, OSError, ValueError) as error:
        yield os.path.basename(path), None, f"damaged, cut or compressed tar: {error}"


def group_files(files):
    """What `list_pairs` yields: neighbours of one key, the name up to its first dot, are a pair."""
    key, pair = None, {}
    for name, read, reason in files:
        name = name.removeprefix("./")
        if read and (UNSAFE.match(name) or "/." in f"/{name}"):
            read, reason = None, "hidden file or unsafe name"
        if not read:
            yield name, {}, reason
            continue
        last, (key, suffix) = key, SPLIT.match(name).groups()
        if pair and key != last:
            yield last.encode("utf-8", "backslashreplace").decode(), pair, ""
            pair = {}
        pair[suffix.lower()] = read
    if pair:
        yield key.encode("utf-8", "backslashreplace").decode(), pair, ""


def read_table(table, files):
    """What `list_pairs` yields, of the rows of a table, whose pictures are among `files`: under the
    path that it gives; a bare name that is the only one, anywhere."""
    named, k = collections.Counter(map(os.path.basename, files)), 0
    by_name = {name: file for file in files if named[name := os.path.basename(file)] == 1}
    by_name |= dict(zip(files, files))
    with (open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
          contextlib.suppress(csv.Error)):                 # a quote that is not closed: said below
        rows = (({column: value for column, value in parse_json(line).items() if value is not None}
                 for line in file) if table.lower().endswith(".jsonl") else
                csv.DictReader(file, strict=True, skipinitialspace=True))
        for k, row in enumerate(rows, 1):
            name = next((row[column] for column in FILE_NAMES if column in row), None)
            path = os.path.normpath(os.path.join(os.path.dirname(table), str(name)))
            picture = by_name.get(path) or by_name.get(str(name))
            if None in (*row, *row.values()) or not isinstance(name, str) or UNSAFE.match(name):
                yield f"{table}, row {k}", {}, "row that does not fit its table"
            elif not picture:
                yield f"{table}, row {k}: {name}", {}, "image file missing"
            else:
                kind = os.path.splitext(picture)[1].lower()
                note = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")
                yield os.path.splitext(name)[0].encode("utf-8", "backslashreplace").decode(), {
                    kind if kind in IMAGE_TYPES else ".jpg": Path(picture).read_bytes,
                    ".json": functools.partial(bytes, note)}, ""
        return
    yield f"{table}, row {k + 1}, and all after it", {}, "row that does not fit its table"


def read_pairs(source, size):
    """(key, image, caption, stratum) of a source's pairs; (name, None, reason, "") if skipped."""
    where = f"{source}: " if isinstance(source, str) else ""
    for key, files, reason in list_pairs(source):
        for kind in of_types(files, IMAGE_TYPES)[1:]:
            yield where + key + kind, None, "further picture of a pair: a key ends at a dot", ""
        pair = reason or decode_pair(files, size)
        yield (where + key, None, pair, "") if isinstance(pair, str) else (key, *pair)


def decode_pair(files, size):
    """(image, caption, stratum) of a pair's {suffix: function that reads it}, or what is wrong."""
    if not (images := of_types(files, IMAGE_TYPES)):
        return "no picture beside it"
    try:
        texts = [(kind, files[kind]().decode("utf-8-sig")) for kind in of_types(files, TEXT_TYPES)]
        records = [parse_json(text) if kind.endswith(".json") else {"caption": text}
                   for kind, text in texts]
        captions = [clean(record.get(name)) for record in records for name in CAPTION_NAMES]
        caption = next((text for text in captions if text.lower() not in NO_CAPTION), None)
        stratum = " ".join(clean(record.get("stratum")) for record in records).strip()
        if not caption:
            return "no caption beside it"
        return decode_image(files[images[0]](), size), caption, stratum
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    except Exception as error:                             # decoders of broken files raise anything
        return "unreadable image: " + " ".join(re.sub(r"<[^>]*>|\([^)]*\)", "", str(error)).split())


def of_types(kinds, types):
    """The suffixes that end in one of `types`, fewest dots first, then in the order of `types`."""
    found = [kind for end in types for kind in kinds if kind.lower().endswith(end)]
    return sorted(found, key=lambda kind: kind.count("."))  # of .png and .seg.jpg the first


def parse_json(text):
    """A JSON object as a dict; anything else, broken text included, as an empty one."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else {}
    return {}


def clean(text):
    """A text, or the first of a list, without controls and lone surrogates; "" of anything else."""
    text = text[0] if isinstance(text, list) and text else text
    text = CONTROLS.sub(" ", text).strip() if isinstance(text, str) else ""
    return text.encode("utf-8", "backslashreplace").decode()


def decode_image(data, size):
    """Image bytes -> (3, size, size) uint8: upright, in RGB, on white, the square in the middle."""
    image = Image.open(io.BytesIO(data))
    image.draft(None, (2 * size, 2 * size))                # a large JPEG is decoded in part
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                              # what is white in them is not known
        raise ValueError("one channel of more than 8 bits")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return shrink(image.convert("RGB"), size)


def shrink(image, size):
    """PIL image in RGB -> (3, size, size) uint8, of its largest square in the middle."""
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


# ---- plumbing for all five stages: batches, processes, files, options -------------------------
SAVE_EVERY, TELL_EVERY = 60, 10        # seconds


def draw_batches(n, batch_size, seed, first, last):
    """Rows of batches `first` to `last` - 1: every epoch its own order, the short rest left out."""
    for step in range(first, last):
        epoch, place = divmod(step, n // batch_size)
        if step == first or place == 0:
            order = np.random.default_rng([seed, epoch, n]).permutation(n)
        yield order[place * batch_size:(place + 1) * batch_size]


def seeded(device, *parts):
    """A generator that depends on `parts` alone, so that any step can be repeated by itself."""
    return torch.Generator(device).manual_seed(hash64(repr(parts).encode()) >> 1)


def hash64(data):
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def mine(rows):
    """This process's share of a global batch: the rank-th of `world()` equal runs of rows."""
    return rows.chunk(world())[rank()]


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


def print0(*words):
    if rank() == 0:
        print(*words, flush=True)


def launch(main, args):
    """Print what main(args, device) returns: as one process of torchrun's, or alone."""
    began, cuda = time.monotonic(), torch.cuda.is_available()
    if dist.is_torchelastic_launched():
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(days=7))           # while 01 reads
    if vars(args).get("batch_size", 0) % world():
        raise SystemExit(f"--batch-size {args.batch_size} must divide by {world()} processes")
    torch.manual_seed(vars(args).get("seed", 0))
    try:
        end = main(args, torch.device("cuda" if cuda else "cpu"))
        print0(f"{end} ({time.monotonic() - began:.0f} s, --out {args.out})")
    except KeyboardInterrupt:
        print0("\nstopped: the same command goes on from what is saved")
        os._exit(130)                                      # its workers end with it
    except (OSError, FloatingPointError) as error:
        why = str(error).strip().rpartition("\n")[2]       # of a worker, its last line
        raise SystemExit(f"{args.out}: {why}: mend that and run the command again")
    except (torch.OutOfMemoryError, MemoryError):
        raise SystemExit("out of memory: lower --batch-size, or --size and --width of 01_proxy.py")
    if dist.is_initialized():
        dist.destroy_process_group()


def side_by_side(run, work, how, cores=None):
    """run(...) of all `work`, in order, by a process for each core. how: fork or spawn."""
    workers = min(cores or torch.get_num_threads(), len(work))
    workers, how = (workers, how) if workers > 1 else (0, None)
    return DataLoader(work, None, collate_fn=run, num_workers=workers, multiprocessing_context=how,
                      worker_init_fn=end_with_first)


def end_with_first(_):
    """In a worker, which would hang for ever where the first process was killed."""
    first = multiprocessing.parent_process()
    threading.Thread(target=lambda: (first.join(), os._exit(1)), daemon=True).start()


class Progress:
    """A loop of steps that may be killed; the same command continues it, on a CPU bit for bit, as
    batches and random numbers depend on seed and step alone. Every ten steps it looks, and where it
    is time tells or saves. `log` holds a row of numbers a step, `kept` what else shall survive."""

    def __init__(self, path=None, settings=None, columns=(), warn=lambda *means: ""):
        self.path, self.settings, self.columns, self.warn = path, settings, columns, warn
        self.step, self.log, self.kept, self.weights, self.waiting = 0, [], {}, {}, []
        self.saved = self.told = time.monotonic()
        if path and path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            other = [name for name in settings if state["settings"].get(name) != settings[name]]
            if other and other != ["out"]:
                raise SystemExit(f"{path} was begun with other {', '.join(other)}: finish that run "
                                 "first, or delete the file to begin anew")
            vars(self).update(state)
            print0(f"continuing from {path}")

    def steps(self, goal, every=10, **parts):
        """The numbers of the steps that are left, from 0; `parts` are networks and optimisers."""
        for name in self.weights:
            parts[name].load_state_dict(self.weights[name])
        first, began = self.step, time.monotonic()
        while self.step < goal:
            yield self.step
            self.step += 1
            if self.step % every == 0 or self.step == goal:
                self.look()
                now = time.monotonic()
                left = (now - began) / (self.step - first) * (goal - self.step)
                if self.columns and (now - self.told > TELL_EVERY or (self.path and not left)):
                    means, self.told = np.mean(self.log[-100:], 0) if self.log else (), now
                    more = f"   {datetime.timedelta(seconds=round(left))} left" * bool(left)
                    print0(f"step {self.step} of {goal}" + "".join(
                        f"   {name} {mean:.4g}" for name, mean in zip(self.columns, means))
                        + more + self.warn(*means))
                if self.path and now - self.saved > SAVE_EVERY:
                    self.saved = now
                    self.save(parts)

    def note(self, *numbers):
        """The numbers of this step, as tensors: they are not looked at yet, which would wait."""
        self.waiting.append(torch.stack(numbers))

    def look(self):
        """Move the numbers that wait to the log, averaged over processes; they must be finite."""
        numbers = add_up(torch.stack(self.waiting)).tolist() if self.waiting else []
        for row in (np.array(numbers) / world()).tolist():
            if not np.isfinite(row).all():
                raise FloatingPointError(f"step {len(self.log) + 1}: {row} not finite, lower --lr")
            self.log.append(row)
        self.waiting = []

    def save(self, parts):
        self.weights = {name: parts[name].state_dict() for name in parts}
        if rank() == 0:
            with atomic_file(self.path, "wb") as file:
                torch.save({name: getattr(self, name) for name in (
                    "settings", "step", "log", "kept", "weights")}, file)

    def finish(self):
        """The results are written: nothing is left to continue."""
        if self.path and rank() == 0:
            self.path.unlink(missing_ok=True)


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
    except (OSError, RuntimeError) as error:               # RuntimeError: torch on a full disk
        cause = str(error.__context__ or error).split("\n")[0]                 # torch hides it
        raise OSError(f"{path} cannot be written ({cause})")


def digest(path):
    """Sixteen digits that stand for the contents of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]


def record(path, written_by, grew_from, **facts):
    """Write the .json beside a result: what it grew from, for `check`."""
    with atomic_file(path.with_suffix(".json")) as file:
        json.dump({"written_by": written_by, "digest": digest(path), **facts, "grew_from": {
            os.path.relpath(parent, path.parent): digest(parent) for parent in grew_from}}, file)


def check(path):
    """The record of a result, {} of a foreign file; what it grew from must not have changed."""
    known = read_json(path.with_suffix(".json"))
    if digest(path) not in (known.get("digest"), known.get("csv")):
        return {}
    for name, value in known["grew_from"].items():
        if (parent := path.parent / name).exists():
            if digest(parent) != value:
                raise SystemExit(f"{path} was made from another {parent} than is there now: run "
                                 f"{known['written_by']} again, with the same --out")
            check(parent)
    return known


def read_json(path):
    return parse_json(path.read_bytes()) if path.exists() else {}


def save(path, written_by, grew_from, settings, weights):
    """The first process writes what `load` returns."""
    if rank() == 0:
        with atomic_file(path, "wb") as file:
            torch.save(weights, file)
        record(path, written_by, grew_from, settings=vars(settings))


def load(path, written_by):
    """Options (those of stage 1 in load(OUT/proxy.pt)) and weights; no code in them is run."""
    known = check(path) if path.exists() else {}
    if known.get("written_by") != written_by:
        raise SystemExit(f"{path} is missing or was changed: run {written_by} with the same --out")
    return (argparse.Namespace(**{**known["settings"], "out": str(path.parent)}),
            torch.load(path, map_location="cpu", weights_only=True))


def write_csv(path, columns, rows):
    if rank() == 0:
        with atomic_file(path) as file:
            csv.writer(file).writerows([columns, *rows])


def parse(argv, description, smoke=None, **defaults):
    """Options of {name: (default, help)}, and --out. `smoke` are the defaults of a tiny run. A
    number is not negative, and a whole one is 0 only where that is its default."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    if smoke:
        defaults["smoke"] = False, "tiny run, to see that it works; what is typed still counts"
    for name, (default, text) in {"out": ("out", "folder of all results"), **defaults}.items():
        how = {"action": "store_true"} if default is False else {"type": type(default)}
        if isinstance(default, tuple):                     # of choices the first
            default, how = default[0], {"choices": [choice for choice in default if choice]}
        if isinstance(default, list):
            how = {"nargs": "+", "type": type(default[0]) if default else str}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **how,
                            help=text + f" ({default})" * bool(default))
    if smoke and parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**smoke)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = 1 if type(value) is int and parser.get_default(name) else 0
        if type(value) in (int, float) and not least <= value < 1e15:
            parser.error(f"--{name.replace('_', '-')} {value}: a number from {least} up is needed")
    return args


if __name__ == "__main__":
    launch(main, parse_args())
