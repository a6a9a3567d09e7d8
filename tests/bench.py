"""How fast is the pipeline: every costly part beside its floor, timed in turns.

    python tests/bench.py              prints a Markdown table; two minutes on one core

A row times two functions A B A B ..., each sample being as many calls as fill a fifth of a second.
Shown are median and range of both and of the ratios of neighbours, of which 1 is the best possible.
Uses a CUDA GPU where there is one, and then measures every stage on it; needs no files of the
stages.
"""
import argparse
import functools
import itertools
import math
import os
import platform
import time
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn as nn

import common
from common import s1, s2, s3, s4, s5

STEPS = 10                 # training steps in one call of a row
SAMPLE_SECONDS = 0.2       # a sample repeats its call until it lasts this long


# ---- timing ----------------------------------------------------------------------------------
class Row(NamedTuple):
    """A comparison: two functions, and the highest good ratio."""
    what: str
    against: str
    measured: Callable
    floor: Callable
    target: float


def seconds(function, calls=1):
    """Seconds per call, until the device has finished."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else bool
    finish()
    began = time.perf_counter()
    for _ in range(calls):
        function()
    finish()
    return (time.perf_counter() - began) / calls


def sampler(function):
    """A function that takes one sample: seconds of a call. Warms up first."""
    function()
    calls = max(1, round(SAMPLE_SECONDS / seconds(function)))
    return lambda: seconds(function, calls)


def show(values, digits="{:.3g}"):
    """'median (lowest-highest)'."""
    low, middle, high = (digits.format(q) for q in np.quantile(values, (0, 0.5, 1)))
    return f"{middle} ({low}-{high})"


def show_row(row, samples):
    """A table row from samples (repeats, 2) of measured and floor, in seconds."""
    ratio = samples[:, 0] / samples[:, 1]
    met = "met" if np.median(ratio) <= row.target else "missed"
    common.show(row.what, row.against, *(show(1e3 * column) for column in samples.T),
                show(ratio, "{:.2f}"), f"≤ {row.target:.3g}, {met}")


# ---- the floor of a training step ------------------------------------------------------------
def own_products(net, inputs):
    """A function that does the matrix products of one training step of `net`, and nothing else;
    and their number of floating-point operations.

    The shapes are read off the network at work. A linear layer: y = x W^T, dW = dy^T x and, where
    x has a gradient, dx = dy W; the patches' convolution is one, too. Attention: q k^T, p v, and
    two products for the gradients of each.
    """
    products = []

    def fill(*shape):
        return torch.randn(shape, device=inputs[0].device)

    def linear(layer, args, out):
        W = layer.weight.flatten(1)
        n, m = W.shape
        rows = out.numel() // n
        x, W, dy = fill(rows, m), fill(n, m), fill(rows, n)
        products.extend([(x, W.T), (dy.T, x)] + [(dy, W)] * args[0].requires_grad)

    def attention(block, args, _):
        B, S, D = args[0].shape
        q, p = fill(B * block.heads, S, D // block.heads), fill(B * block.heads, S, S)
        products.extend([(q, q.mT), (p, q), (p.mT, q)] * 2)
    hooks = [module.register_forward_hook(hook) for module in net.modules() for kind, hook in
             (((nn.Linear, nn.Conv2d), linear), (s1.Block, attention)) if isinstance(module, kind)]
    net(*inputs)
    for hook in hooks:
        hook.remove()
    outs = [a @ b for a, b in products]

    def multiply():
        for (a, b), out in zip(products, outs):
            torch.matmul(a, b, out=out)
    return multiply, sum(2 * out.numel() * a.shape[-1] for (a, _), out in zip(products, outs))


# ---- what is measured ------------------------------------------------------------------------
def new_proxy(device, size=16, width=64, depth=s1.DEPTH):
    return s1.DiT(size, 4, width, depth, 8).to(device)


def draw_pairs(n, device, size=16, split="train"):
    pairs = common.collect(s1.draw_toy(n, size, 0, split))
    pairs.device = device
    return pairs


def repeat(function, times=STEPS):
    for _ in range(times):
        function()


def proxy_rows(device, pairs):
    x, c = pairs.batch(np.arange(64))
    for width in (64, 256):
        net = new_proxy(device, width=width)
        products, _ = own_products(net, (x, x[:, 0, 0, 0], c))
        yield Row(f"{STEPS} proxy steps of 01 and 05, width {width}", "their matrix products alone",
                  functools.partial(s1.train, net, pairs, STEPS, 64, 1e-3, 0),
                  functools.partial(repeat, products), 1 / 0.7)


def make_nets(device, **sizes):
    """Fresh networks of stage 2 and their optimisers; no result depends on what they learnt."""
    nets = {name: new_proxy(device, **sizes) for name in ("proxy", "ref")}
    nets["rater"] = s2.Rater(sizes.get("size", 16), 4, 8).to(device)
    return nets, {name: s1.adamw(net, 1e-3) for name, net in nets.items()}


def meta_row(device, pairs, val):
    (nets, opts), rng, args = make_nets(device), s1.seeded(device, 0, "bench"), s2.parse_args([])
    batches = [split.batch(np.arange(64)) for split in (pairs, val)]
    train, trusted = [(*batch, *s1.draw_noise(batch[0], rng)) for batch in batches]

    def passes():
        for name, parts in (("proxy", (train, trusted)), ("ref", (train,))):
            s1.descend(sum(s1.flow_loss(nets[name], *part).mean() for part in parts), nets[name],
                       opts[name])
        weights = s2.weigh(nets["rater"], *batches[0], s2.GROUP)
        s1.descend(sum(w.square().mean() for w in weights), nets["rater"], opts["rater"])
    return Row("meta step of 02", "its passes: theta 2B, theta_hat B, rater B",
               lambda: s2.meta_step(nets, opts, *batches, rng, args), passes, 1.15)


def forward_rows(device, pairs):
    """Scoring, Frechet statistics and sampling, each beside the bare forward passes in it."""
    rater, net = s2.Rater(16, 4, 8).to(device), new_proxy(device)
    companions = s3.draw_companions(rater, s2.GROUP, pairs, 0)
    judge = s2.Contrast(16, 8).to(device).requires_grad_(False)
    (x, c), many = pairs.batch(np.arange(512)), pairs.batch()[0]
    eps, t = torch.randn_like(x[:128]), torch.rand(256, device=device)
    both, captions = eps.repeat(2, 1, 1, 1), torch.cat([c[:128], torch.zeros_like(c[:128])])

    @torch.no_grad()
    def forward():
        rater.logits(rater.features(x, c))
    return [Row("scoring 512 pairs, 03", "bare rater forward",
                lambda: s3.score_chunk({"rater": rater}, x, c, companions, None), forward, 1 / 0.9),
            Row(f"features and moments of {len(many):,} images, 05", "features alone",
                lambda: s5.moments(judge.embed_images(many)[0]),
                lambda: judge.embed_images(many), 1.05),
            Row("sampling 128 images, 12 steps, 01", "12 bare forwards of 256",
                lambda: s1.sample(net, c[:128], eps),
                torch.no_grad()(lambda: repeat(lambda: net(both, t, captions), 12)), 1.1)]


def selection_row(count):
    ratings = np.random.default_rng(0).standard_normal(count, dtype=np.float32)

    def floor():
        keys = np.random.default_rng(0).gumbel(size=count)
        np.argpartition(keys, count // 2)
    return Row(f"selecting half of {count:,}, 04", "Gumbel keys and one argpartition",
               lambda: s4.select(ratings, "shift-gsample", 0.5), floor, 1.5)


# ---- one GPU ---------------------------------------------------------------------------------
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}    # bf16 products, dense, by the makers


def gpu_stages(device, width, batch, bf16, size=64, depth=12):
    """{stage: (what it does once, its floating-point operations)} at these sizes."""
    pairs, val = (draw_pairs(2 * batch, device, size, split) for split in ("train", "val"))
    nets, opts = make_nets(device, size=size, width=width, depth=depth)
    for name in ("proxy", "ref") if bf16 else ():
        nets[name].forward = torch.autocast("cuda", torch.bfloat16)(nets[name].forward)
    args, rng, rows = s2.parse_args([]), s1.seeded(device, 0, "bench"), np.arange(batch)
    x, c = pairs.batch(np.arange(8))
    operations = own_products(nets["proxy"], (x, x[:, 0, 0, 0], c))[1] * batch / 8   # of training
    companions = s3.draw_companions(nets["rater"], s2.GROUP, pairs, 0)
    score = functools.partial(s3.score_chunk, nets)
    return {"01, 05": (lambda: s1.train(nets["proxy"], pairs, 1, batch, 1e-4, 0), operations),
            "02": (lambda: s2.meta_step(nets, opts, pairs.batch(rows), val.batch(rows), rng, args),
                   3 * operations),
            "03 --baselines": (lambda: score(*pairs.batch(rows), companions, rng),
                               s3.DRAWS * operations),
            "05, drawing": (lambda: s1.sample(nets["proxy"], c[:1].expand(batch, -1),
                                              pairs.batch(rows)[0]), 8 * operations)}  # 24 forward


def print_gpu_rows(device, name, widths=(384, 768), batch=128, **sizes):
    """Images a second, share of the maker's peak, gigabytes: by width, precision and stage."""
    peak = next((rate for chip, rate in PEAK.items() if chip in name), math.nan)
    common.head("width", "precision", "stage", "images a second", "share of peak", "peak GB")
    for width, bf16 in itertools.product(widths, (False, True)):              # ViT-S, DiT-B
        for stage, (work, operations) in gpu_stages(device, width, batch, bf16, **sizes).items():
            torch.cuda.reset_peak_memory_stats()
            sample = sampler(work)
            each = np.median([sample() for _ in range(5)])
            common.show(width, "bf16" if bf16 else "fp32", stage, f"{batch / each:,.0f}",
                        f"{operations / each / peak:.0%}",
                        f"{torch.cuda.max_memory_allocated() / 1e9:.1f}")


# ---- the tables ------------------------------------------------------------------------------
def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; median (range) of {args.repeats} pairs of samples")
    common.head("what", "floor", "measured ms", "floor ms", "measured / floor", "target")
    torch.manual_seed(0)
    pairs, val = (draw_pairs(4000, device, split=split) for split in ("train", "val"))
    for row in [*proxy_rows(device, pairs), meta_row(device, pairs, val),
                *forward_rows(device, pairs), selection_row(args.ratings)]:
        pair = sampler(row.measured), sampler(row.floor)
        show_row(row, np.array([[sample() for sample in pair] for _ in range(args.repeats)]))
    if device.type == "cuda":
        print_gpu_rows(device, name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ratings", type=int, default=30_000_000, help="of the selection")
    main(parser.parse_args())
