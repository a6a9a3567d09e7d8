"""Stage 1 of 5: the data, the text-to-image proxy, and the warm-up of its reference copy (eq. 4).

Alchemist rates image-text pairs by what a small text-to-image model, the *proxy*, gains from them.
This stage draws or reads the pairs, defines the proxy and warms up the reference proxy theta_hat
on the training pairs, all weighted alike. Stage 2 starts two copies of it.

    eq. 4    theta_hat <- theta_hat - beta * grad L(theta_hat; D_train)
    L        rectified flow, one number per pair:  x_t = (1 - t) x + t eps,
             L_i = mean over pixels of |net(x_t, t, c) - (eps - x)|^2

Differs from the paper: the proxy is a diffusion transformer (DiT) in pixel space trained by
rectified flow; the paper's is a 0.3 B scale-wise autoregressive model. Eq. 4 steps by AdamW.

Writes   out/proxy.pt (weights at four points of the warm-up, settings), .csv, .png
Run      python 01_proxy.py                                  toy pairs, half a minute on two cores
         python 01_proxy.py --data 'DIR/train-*.tar' --val CURATED --size 32 --width 96
         torchrun --nproc-per-node 2 01_proxy.py             same global batch, cut over processes
"""
import argparse
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import textwrap
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import functional as image_ops

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

VOCABULARY = 2048          # rows of the word table, a word's row is its CRC-32: any language
CAPTION_DROPOUT = 0.1      # share of captions blanked in training, for classifier-free guidance
TOY_PAIRS = {"train": 4000, "val": 1000, "test": 1000}
SMOKE_PAIRS = {"train": 256, "val": 64, "test": 64}


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
    """The proxy theta: predicts the velocity eps - x from x_t, t and the caption's words.

    Peebles & Xie 2023 (arXiv 2212.09748) with the words as tokens beside the image patches.
    """

    def __init__(self, size, patch, width, depth, words):
        super().__init__()
        if size % patch or width % 4:
            raise SystemExit(f"--size {size} must divide by --patch {patch}, --width {width} by 4")
        self.patch, self.words = patch, words
        heads = max(4, width // 64)
        self.to_patch = nn.Linear(3 * patch ** 2, width)
        self.from_patch = nn.Linear(width, 3 * patch ** 2)
        self.word = nn.Embedding(VOCABULARY, width)                           # row 0: no word
        self.place = nn.Parameter(0.2 * torch.randn(1, words + (size // patch) ** 2, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        nn.init.normal_(self.word.weight, std=0.5)
        nn.init.zeros_(self.from_patch.weight)
        nn.init.zeros_(self.from_patch.bias)

    def forward(self, x, t, c):                            # (B, 3, H, W), (B,), (B, T)
        word = self.word(c)                                                   # (B, T, D)
        cond = self.time(time_features(t, word.shape[-1])) + word.mean(1)     # (B, D)
        h = torch.cat([word, self.to_patch(patchify(x, self.patch))], 1) + self.place
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


# ---- rectified flow: the loss L, its noise, the sampler --------------------------------------
def flow_loss(net, x, c, t, eps):
    """L(net; x_i) for every pair, (B,): squared error of the predicted velocity at time t."""
    along = t[:, None, None, None]
    x_t = (1 - along) * x + along * eps                                       # (B, 3, H, W)
    return (net(x_t, t, c) - (eps - x)).square().mean((1, 2, 3))              # (B,)


def draw_noise(x, rng, shift=0.0):
    """t (B,), logit-normal and moved towards noise by `shift`, and eps like x.

    Drawn for the global batch and cut to this process's rows: world size changes nothing.
    """
    n = len(x) * world()
    t = (torch.randn(n, generator=rng, device=x.device) + shift).sigmoid()    # (B,)
    return mine(t), mine(torch.randn(n, *x.shape[1:], generator=rng, device=x.device))


def drop_captions(c, rng):
    """Blank a tenth of the captions, so that `sample` can ask what the net draws without one."""
    drawn = mine(torch.rand(len(c) * world(), generator=rng, device=c.device))
    return c * (drawn >= CAPTION_DROPOUT)[:, None]


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
    """One clipped optimiser step on a loss through which gradients reach `net` alone."""
    opt.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(net)                                # does nothing with one process
    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
    opt.step()


def adamw(net, lr):
    """The optimiser of all three networks; betas as in the released code."""
    return torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)


def train(net, pairs, steps, batch_size, lr, seed, decay=0.0, after=lambda step, loss: None):
    """`steps` steps of eq. 4 on `pairs`; the last share `decay` of them falls linearly to zero.

    Stage 1 warms the proxy up with it, stage 5 trains the downstream models. `after` sees every
    step's mean loss, still on the device.
    """
    opt, ramp = adamw(net, lr), max(steps // 20, 1)
    rows = (batch_rows(len(pairs), batch_size, k, seed) for k in range(steps))
    for k, (x, c) in enumerate(stream(pairs, rows)):
        left = (steps - k) / (decay * steps) if decay else 1.0
        opt.param_groups[0]["lr"] = lr * min(1.0, (k + 1) / ramp, left)
        rng = seeded(x.device, seed, "train", k)
        loss = flow_loss(net, x, drop_captions(c, rng), *draw_noise(x, rng)).mean()
        descend(loss, net, opt)                           # eq. 4
        after(k + 1, loss.detach())
    return net


# ---- toy pairs: drawn here, with known strata ------------------------------------------------
# Strata serve the analysis only: nothing rates or selects by them (a test shuffles them).
#   informative      45 %   one shape in colour on a background, and the caption says so
#   plain            30 %   a white field; teaches nothing, lies about nothing, costs steps
#   chaotic-noise    15 %   noise under a caption that promises a shape
#   chaotic-caption  10 %   a clean picture under another picture's caption: no statistic of the
#                           image can find these
STRATA = {"informative": 0.45, "plain": 0.30, "chaotic-noise": 0.15, "chaotic-caption": 0.10}
STRATUM_COLOURS = {"informative": "#0072B2", "plain": "#E69F00", "chaotic-noise": "#555555",
                   "chaotic-caption": "#CC79A7", "chaotic-collage": "#009E73"}
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230),
           "yellow": (240, 220, 50), "pink": (240, 110, 200), "cyan": (60, 210, 220)}
GROUNDS = {"black": (20, 20, 20), "gray": (128, 128, 128), "brown": (110, 65, 30),
           "white": (235, 235, 235)}
SHAPES = ("circle", "square", "triangle")
PLAIN_CAPTION = "an empty white background"


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
                     for colour, ground, shape in what])


def draw_toy(n, size, seed, split, words=8):
    """The toy split 'train', 'val' or 'test': n pairs; only 'train' has more than one stratum."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    shares = list(STRATA.values()) if split == "train" else [1.0]
    ends = np.round(np.cumsum(shares) * n).astype(int)
    stratum = rng.permutation(np.searchsorted(ends, np.arange(n), side="right"))
    images, what = draw_shapes(n, size, rng)
    captions = describe(what)
    plain, noise, wrong = (stratum == k for k in (1, 2, 3))
    flat = rng.uniform(0.75, 0.95, (n, 1, 1, 1)).astype(np.float32)
    grain = rng.standard_normal(images.shape, dtype=np.float32)
    images[plain], captions[plain] = flat[plain] + 0.04 * grain[plain], PLAIN_CAPTION
    images[noise] = 0.5 * grain[noise]
    options = np.array([len(COLOURS), len(GROUNDS), len(SHAPES)])
    other = (what + rng.integers(1, options, size=(n, 3))) % options          # nothing is right
    captions[wrong] = describe(other[wrong])
    pixels = torch.from_numpy(((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8))
    names = [list(STRATA)[k] for k in stratum]
    return Pairs(pixels, tokenize(captions, words), [f"{split}{i:06d}" for i in range(n)],
                 list(captions), names)


# ---- real pairs: tar shards, folders, tables -------------------------------------------------
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp"}
CAPTION_NAMES = ("caption", "text", "prompt")
SINGLE_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")  # no spaces in Chinese


def find_word_rows(caption):
    """Rows of the word table for a caption: one per word, or per character in CJK scripts."""
    words = SINGLE_WORDS.findall(caption.lower()) or caption.split()
    return [1 + zlib.crc32(word.encode("utf-8", "replace")) % (VOCABULARY - 1) for word in words]


def tokenize(captions, words):
    """Captions -> (N, words) int64; 0 fills up, and what is beyond `words` is cut off."""
    table = torch.zeros(len(captions), words, dtype=torch.int64)
    for row, caption in zip(table, captions):
        ids = find_word_rows(caption)[:words]
        row[:len(ids)] = torch.tensor(ids)
    return table


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
        rows = torch.as_tensor(rows, device=self.images.device)
        return self.images[rows].float() / 127.5 - 1, self.tokens[rows]

    def take(self, rows):
        """The pairs of these rows, as Pairs."""
        rows = torch.as_tensor(rows)
        columns = ([column[i] for i in rows] for column in (self.keys, self.captions, self.strata))
        return Pairs(self.images[rows], self.tokens[rows], *columns)

    def to(self, device):
        return Pairs(self.images.to(device), self.tokens.to(device), self.keys, self.captions,
                     self.strata)


def find_caption(record):
    """The caption in a JSON record or a table row, '' where there is none."""
    texts = (record.get(name) for name in CAPTION_NAMES)
    return next((text for text in texts if isinstance(text, str)), "")


def read_member(file, offset, size):
    """`size` bytes of a file from `offset`: a member of a tar shard, in place."""
    with open(file, "rb") as stream_:
        stream_.seek(offset)
        return stream_.read(size)


def index_shard(shard, skipped):
    """Records of one WebDataset tar: members KEY.jpg|png|webp with KEY.txt and / or KEY.json."""
    found = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, _, kind = member.name.removeprefix("./").rpartition(".")
                record = found.setdefault(key, {"key": key, "name": f"{shard}:{key}"})
                if f".{kind.lower()}" in IMAGE_TYPES:
                    record["at"] = (shard, member.offset_data, member.size)
                elif kind in ("txt", "json"):
                    record[kind] = tar.extractfile(member).read().decode("utf-8", "replace")
    except tarfile.ReadError as error:
        skipped[f"rest of a damaged shard ({error})"].append(str(shard))
    return found.values()


def index_folder(folder, skipped):
    """Records of a folder: images with .txt or .json beside them, or one metadata table."""
    for table in (folder / "metadata.csv", folder / "metadata.jsonl"):
        if table.exists():
            return index_table(table, skipped)
    records = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_TYPES):
        key = file.relative_to(folder).with_suffix("").as_posix()
        record = {"key": key, "name": str(file), "at": (file, 0, file.stat().st_size)}
        for kind in ("txt", "json"):
            if file.with_suffix(f".{kind}").exists():
                record[kind] = file.with_suffix(f".{kind}").read_text("utf-8", "replace")
        records.append(record)
    return records


def index_table(table, skipped):
    """Records of metadata.csv or metadata.jsonl: `file_name` and `text`, `caption` or `prompt`."""
    with open(table, encoding="utf-8-sig", errors="replace", newline="") as lines:
        rows = list(csv.DictReader(lines) if table.suffix == ".csv" else map(parse_json, lines))
    if rows and not any("file_name" in row and find_caption(row) for row in rows):
        raise SystemExit(f"{table}: needs columns file_name and one of {', '.join(CAPTION_NAMES)}")
    records = []
    for row in rows:
        file = table.parent / str(row.get("file_name"))
        if not file.is_file():
            skipped["image file missing"].append(str(file))
            continue
        key = Path(str(row["file_name"])).with_suffix("").as_posix()
        records.append({"key": key, "name": str(file), "at": (file, 0, file.stat().st_size),
                        "json": json.dumps(row)})
    return records


def parse_json(text):
    """A JSON object as a dict; anything else, broken text included, as an empty one."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def open_image(data):
    """Image bytes -> PIL image in RGB, on white, upright. Raises one of UNREADABLE."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):                        # 16 bit: keep the upper eight
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def decode(data, size):
    """Image bytes -> (3, size, size) uint8, resized and cut to the centre."""
    image = image_ops.resize(open_image(data), size, antialias=True)
    return image_ops.pil_to_tensor(image_ops.center_crop(image, [size, size]))


def find_places(path):
    """The files or folders that `path`, in which * works, stands for; none is an error."""
    places = sorted(map(Path, glob.glob(str(path))))
    if not places:
        raise SystemExit(f"{path}: no such file or folder (pairs are tar shards, as in "
                         "'DIR/train-*.tar', a folder of them, or a folder of images)")
    return places


def find_records(path):
    """Records of all images and captions in `path`, and what was skipped so far, by reason."""
    places, skipped = find_places(path), defaultdict(list)
    shards = [shard for place in places for shard in
              ([place] if place.suffix == ".tar" else sorted(place.glob("*.tar")))]
    indexes = [index_shard(shard, skipped) for shard in shards] or [
        index_folder(place, skipped) for place in places]
    return list(itertools.chain.from_iterable(indexes)), skipped


def print_skipped(path, skipped):
    for reason, names in skipped.items():
        print0(f"{path}: skipped {len(names)} ({reason}), first {names[0]}")


def read_pairs(path, size, words):
    """Every usable pair in `path`: tars, or a folder of tars, of images with sidecars, or a table.

    What cannot be used is skipped, counted by reason and named once; the rest keeps its order.
    """
    (records, skipped), kept = find_records(path), {}
    for record in records:
        reason = read_record(record, size, kept)
        if reason:
            skipped[reason].append(record["name"])
    print_skipped(path, skipped)
    if not kept:
        raise SystemExit(f"{path}: no readable pair; see --help for the layouts")
    images, captions, strata = zip(*kept.values())
    longer = np.mean([len(find_word_rows(caption)) > words for caption in captions])
    if longer > 0.05:
        print0(f"{path}: {longer:.0%} of the captions are longer than --words {words} and are cut")
    return Pairs(torch.stack(images), tokenize(captions, words), list(kept), list(captions),
                 list(strata))


def caption_of(record):
    """The caption from the .txt, else from the JSON, '' where there is none."""
    return record.get("txt", "").strip() or find_caption(parse_json(record.get("json", ""))).strip()


def read_record(record, size, kept):
    """Add the record's pair to `kept`; where that fails, return the reason in a few words."""
    caption, notes = caption_of(record), parse_json(record.get("json", ""))
    if "at" not in record:
        return "no image"
    if record["key"] in kept:
        return "key seen before"
    if not caption:
        return "no caption"
    try:
        image = decode(read_member(*record["at"]), size)
    except UNREADABLE as error:
        return f"unreadable image: {type(error).__name__}"
    kept[record["key"]] = image, caption, str(notes.get("stratum", ""))
    return None


# ---- plumbing for all five stages: splits, batches, processes, files, options ----------------
def load_data(args, device):
    """The splits train, val (for eq. 5) and test (for stage 5) as the options name them."""
    if args.data == "toy":
        counts = SMOKE_PAIRS if args.smoke else TOY_PAIRS
        splits = [draw_toy(n, args.size, args.seed, split, args.words)
                  for split, n in counts.items()]
    else:
        corpus = read_pairs(args.data, args.size, args.words)
        rng = np.random.default_rng(args.seed)
        if args.val:
            held = read_pairs(args.val, args.size, args.words)
        else:
            order = rng.permutation(len(corpus))
            held, corpus = (corpus.take(np.sort(part)) for part in
                            (order[:len(order) // 10], order[len(order) // 10:]))
            print0("no --val: a tenth of the corpus is held out instead. Validation no better than "
                   "the corpus can only ask eq. 6 for more of the same; give it pairs you trust.")
        order = rng.permutation(len(held))
        splits = [corpus, held.take(order[::2]), held.take(order[1::2])]
    for name, pairs in zip(("train", "val", "test"), splits):
        if len(pairs) < args.batch_size:
            raise SystemExit(f"the {name} split has {len(pairs)} readable pairs, fewer than "
                             f"--batch-size {args.batch_size}: lower it or add pairs")
    print0("pairs: " + ", ".join(f"{len(pairs)} {name}" for name, pairs in
                                 zip(("train", "val", "test"), splits)))
    return [pairs.to(device) for pairs in splits]


@functools.lru_cache(maxsize=8)
def shuffle(n, seed, epoch):
    return np.random.default_rng([seed, epoch, n]).permutation(n)


def batch_rows(n, batch_size, step, seed):
    """Rows of batch `step` (batch_size,): every epoch its own order, the short rest left out."""
    epoch, place = divmod(step, n // batch_size)
    return shuffle(n, seed, epoch)[place * batch_size:(place + 1) * batch_size]


def stream(pairs, rows_of_batches):
    """Batches (x, c) of `pairs`, each cut to this process's rows."""
    for rows in rows_of_batches:
        yield pairs.batch(mine(rows))


def seeded(device, *parts):
    """A generator that depends on `parts` alone, so that any step can be repeated by itself."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def mine(rows):
    """This process's share of a global batch: the rank-th of `world()` equal runs of rows."""
    share = len(rows) // world()
    return rows[rank() * share:(rank() + 1) * share]


def average_gradients(net):
    """Mean of the gradients over processes, in one message."""
    if world() > 1:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        means = average(torch.cat([grad.flatten() for grad in grads]))
        for grad, mean in zip(grads, means.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))


def add_up(tensor):
    """Sum of a tensor over processes."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def average(tensor):
    """Mean of a tensor over processes."""
    return add_up(tensor) / world()


def gather(tensor):
    """The rows of all processes, in the order in which `mine` dealt them."""
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def print0(*words):
    if rank() == 0:
        print(*words, flush=True)


def start(args):
    """Join the processes of torchrun, if any, make --out, and return the device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if args.batch_size and args.batch_size % world():
        raise SystemExit(f"--batch-size {args.batch_size} must divide by {world()} processes")
    torch.manual_seed(args.seed)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {args.out} cannot be made: {error.strerror}; name another folder")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda" if cuda else "cpu")


def save(path, **state):
    """Write state dicts, settings and numbers, whole or not at all, from the first process."""
    if rank() == 0:
        torch.save(state, f"{path}.part")
        os.replace(f"{path}.part", path)


def load(path, written_by):
    """What `save` wrote; no code in the file is run. Missing or foreign files end the program."""
    if not Path(path).exists():
        raise SystemExit(f"{path} is missing: run {written_by} with the same --out first")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{path} cannot be read ({type(error).__name__}): run {written_by} again")


def write_csv(path, columns, rows):
    if rank() == 0:
        with open(f"{path}.part", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
        os.replace(f"{path}.part", path)


def show_pictures(axes, images, captions):
    """Images (K, 3, H, W) in [-1, 1] on K axes, their captions above them."""
    for axis, image, caption in zip(np.ravel(axes), images.cpu(), captions):
        axis.imshow((image.permute(1, 2, 0).numpy() + 1) / 2)
        axis.set_title(textwrap.fill(textwrap.shorten(caption, 48), 16), fontsize=7)
        axis.axis("off")


def legend_above(axis, columns=4):
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=columns,
                frameon=False, columnspacing=1)


def save_figure(figure, path):
    if rank() == 0:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def options(description, **defaults):
    """The parser of the options that mean the same in every stage that has them."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="out", help="folder of all results")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--smoke", action="store_true", help="tiny run, to see that it works")
    for name, (default, text) in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, help=text,
                            type=str if default is None else type(default))
    return parser


def build_proxy(settings, device):
    """The network that the options of this stage describe, with fresh weights."""
    return DiT(settings.size, settings.patch, settings.width, settings.depth,
               settings.words).to(device)


def load_proxy(out):
    """The options that out/proxy.pt was made with, and the weights after the warm-up."""
    saved = load(Path(out) / "proxy.pt", "01_proxy.py")
    return argparse.Namespace(**saved["settings"]), saved["snapshots"][saved["settings"]["steps"]]


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = options(__doc__, data=("toy", "toy, tar shards (* works), or a folder of images"),
                     val=(None, "pairs you trust, in the same layouts"),
                     size=(16, "pixels a side"), words=(8, "words kept of a caption"),
                     patch=(4, "pixels a side of a patch"), width=(64, "of the proxy"),
                     depth=(3, "blocks of the proxy"), batch_size=(64, "pairs, all processes"),
                     steps=(400, "of warm-up"), lr=(2e-3, "of the warm-up"))
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.batch_size = 12, 16
    return args


def main(args):
    device = start(args)
    pairs, _, test = load_data(args, device)
    proxy = build_proxy(args, device)
    points = {max(1, round(share * args.steps)) for share in (0.05, 0.2, 0.5, 1)}
    losses, snapshots = [], {}

    def after(step, loss):
        losses.append(loss)
        if step in points:
            snapshots[step] = {name: value.clone() for name, value in proxy.state_dict().items()}
        if step % 100 == 0 or step == args.steps:
            recent = average(torch.stack(losses[-100:]).mean())
            print0(f"warm-up {step:5d}/{args.steps}   loss {recent.item():.4f}")

    began = time.time()
    train(proxy, pairs, args.steps, args.batch_size, args.lr, args.seed, after=after)
    out, values = Path(args.out), average(torch.stack(losses)).tolist()
    save(out / "proxy.pt", settings=vars(args), snapshots=snapshots)
    write_csv(out / "proxy.csv", ["step", "loss"], enumerate(values, 1))
    draw_figure(out / "proxy.png", proxy, values, test, args.seed)
    print0(f"wrote {out}/proxy.pt, .csv, .png: {sum(p.numel() for p in proxy.parameters()):,} "
           f"parameters, {args.steps} steps in {time.time() - began:.0f} s")


def draw_figure(path, proxy, losses, test, seed):
    """The loss, smoothed over 25 steps, and what the warm proxy draws for eight captions."""
    x, c = test.batch(np.arange(8))
    eps = torch.randn(x.shape, generator=seeded(x.device, seed, "figure"), device=x.device)
    figure = plt.figure(figsize=(10, 4))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    window = min(25, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    axis = left.subplots()
    axis.plot(np.arange(len(smooth)) + window, smooth, color="black")
    axis.set(xlabel="warm-up step", ylabel="loss of the reference proxy", ylim=(0, None))
    show_pictures(right.subplots(2, 4, gridspec_kw={"hspace": 0.5}), sample(proxy, c, eps),
                  test.captions[:8])
    save_figure(figure, path)


if __name__ == "__main__":
    main(parse_args())
