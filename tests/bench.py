"""How fast is the pipeline: every costly part beside its floor or a peer, timed in turns.

    python tests/bench.py              prints Markdown tables; under five minutes on two cores
    python tests/bench.py --quick      the same in under a minute, to see that it works

A row times two functions A B A B ..., each sample being as many calls as fill a fifth of a second.
Shown are median and range of both, and median and range of the ratios of neighbours: measured /
floor, low is fast. Of a floor the ratio can at best be 1; a peer does the same work in another way,
and below 1 means faster than it. Uses a CUDA GPU where there is one; needs no files of the stages.
"""
import argparse
import functools
import itertools
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn

import common
from common import s1, s2, s3, s4, s5
from meta_gradient import saved_megabytes

STEPS = 10                 # training steps in one call of a row
UNROLLED = 4               # K of the second row of the exact meta-gradient
SAMPLE_SECONDS = 0.2       # a sample repeats its call until it lasts this long


# ---- timing ----------------------------------------------------------------------------------
class Row(NamedTuple):
    """A comparison: two functions, the work units in a call of each, and the highest good ratio."""
    what: str
    against: str
    measured: Callable
    floor: Callable
    target: float = math.nan
    units: int = 1


def seconds(function, calls=1):
    """Seconds per call, until the device has finished."""
    finish = torch.cuda.synchronize if torch.cuda.is_available() else bool
    finish()
    began = time.perf_counter()
    for _ in range(calls):
        function()
    finish()
    return (time.perf_counter() - began) / calls


def sampler(function, units=1):
    """A function that takes one sample: seconds per unit of work. Warms up first."""
    function()
    calls = max(1, round(SAMPLE_SECONDS / seconds(function)))
    return lambda: seconds(function, calls) / units


def take_turns(samplers, repeats):
    """Samples (repeats, K) of K samplers, A B A B ..."""
    return np.array([[sample() for sample in samplers] for _ in range(repeats)])


def show(values, digits="{:.3g}"):
    """'median (lowest-highest)'."""
    low, middle, high = (digits.format(q) for q in np.quantile(values, (0, 0.5, 1)))
    return f"{middle} ({low}-{high})"


def show_row(what, against, samples, target):
    """A table row from samples (repeats, 2) of measured and floor, in seconds."""
    ratio = samples[:, 0] / samples[:, 1]
    met = "" if math.isnan(target) else (
        f"≤ {target:.3g}, " + ("met" if np.median(ratio) <= target else "missed"))
    common.show(what, against, *(show(1e3 * column) for column in samples.T),
                show(ratio, "{:.2f}"), met)


# ---- floors and peers ------------------------------------------------------------------------
def own_products(net, inputs, dtype=torch.float32):
    """A function that does the matrix products of one training step of `net`, and nothing else;
    and their number of floating-point operations.

    The shapes are read off the network at work. A linear layer: y = x W^T, dW = dy^T x and, where
    x has a gradient, dx = dy W; the patches' convolution is one, too. Attention: q k^T, p v, and
    two products for the gradients of each.
    """
    products = []

    def fill(*shape):
        return torch.randn(shape, device=inputs[0].device, dtype=dtype)

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


class TextbookBlock(s1.Block):
    """The block with attention written from its equation: three projections, softmax by hand."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        del self.qkv
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def attention(self, h):                                                   # (B, S, D)
        B, S, D = h.shape
        q, k, v = (layer(h).view(B, S, self.heads, -1).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))                     # (B, heads, S, d)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(B, S, D))


def textbook(bench):
    """A function that trains such a DiT for STEPS steps, with AdamW one tensor at a time."""
    net = new_proxy(bench.device)
    net.blocks = nn.ModuleList(TextbookBlock(64, 4) for _ in net.blocks).to(bench.device)
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.95), foreach=False,
                            fused=False)

    def train():
        for k in range(STEPS):
            x, c = bench.pairs.batch(np.random.default_rng(k).integers(len(bench.pairs), size=64))
            c = c * (torch.rand(len(c), 1, device=x.device) >= s1.CAPTION_DROPOUT)
            t, eps = torch.randn(len(x), device=x.device).sigmoid(), torch.randn_like(x)
            along = t.view(-1, 1, 1, 1)
            loss = ((net((1 - along) * x + along * eps, t, c) - (eps - x)) ** 2).mean()
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 2.0, foreach=False)
            opt.step()
    return train


# ---- what is measured ------------------------------------------------------------------------
def new_proxy(device, size=16, width=64, depth=s1.DEPTH):
    return s1.DiT(size, 4, width, depth, 8).to(device)


def draw_pairs(n, device, size=16, split="train"):
    pairs = common.collect(s1.draw_toy(n, size, 0, split))
    pairs.device = device
    return pairs


def set_up(device):
    """Fresh networks of the default sizes, and toy pairs; no result depends on what they learnt."""
    torch.manual_seed(0)
    pairs, val = (draw_pairs(4000, device, split=split) for split in ("train", "val"))
    nets = {name: new_proxy(device) for name in ("proxy", "ref")}
    nets["rater"] = s2.Rater(16, 4, 8).to(device)
    batches = [split.batch(np.arange(64)) for split in (pairs, val)]
    rng = s1.seeded(device, 0, "bench")
    return SimpleNamespace(device=device, pairs=pairs, nets=nets, rng=rng, batches=batches,
                           opts={name: s1.adamw(net, 1e-3) for name, net in nets.items()},
                           parts=[(*batch, *s1.draw_noise(batch[0], rng)) for batch in batches],
                           args=s2.parse_args([]))


def trainer(device, pairs, steps=STEPS, width=64):
    """A function that trains a fresh proxy for some steps of 64 pairs."""
    net = new_proxy(device, width=width)
    return lambda: s1.train(net, pairs, steps, 64, 1e-3, 0)


def proxy_rows(bench):
    x, c, t, _ = bench.parts[0]
    peer = 1 / (2.5 if bench.device.type == "cuda" else 1.2)
    for width in (64, 256):
        products, _ = own_products(new_proxy(bench.device, width=width), (x, t, c))

        def floor(products=products):
            for _ in range(STEPS):
                products()
        yield Row(f"proxy step of 01 and 05, width {width}", "its matrix products alone",
                  trainer(bench.device, bench.pairs, width=width), floor, 1 / 0.7, STEPS)
    yield Row("proxy step of 01 and 05, width 64", "peer: textbook step",
              trainer(bench.device, bench.pairs), textbook(bench), peer, STEPS)


def meta_rows(bench):
    nets, opts = bench.nets, bench.opts
    train, val = bench.parts

    def step():
        s2.meta_step(nets, opts, *bench.batches, bench.rng, bench.args)

    def passes():
        for name, parts in (("proxy", (train, val)), ("ref", (train,))):
            s1.descend(sum(s1.flow_loss(nets[name], *part).mean() for part in parts), nets[name],
                       opts[name])
        weights = s2.weigh(nets["rater"], *bench.batches[0], s2.GROUP)
        s1.descend(sum(w.square().mean() for w in weights), nets["rater"], opts["rater"])

    def exact(steps):
        W = torch.full((64,), 1 / 64, device=bench.device)
        return lambda: s2.exact_meta_gradient(nets["ref"], train, val, W, 0.01, steps)
    yield Row("meta step of 02", "its passes: theta 2B, theta_hat B, rater B", step, passes, 1.15)
    for steps in (1, UNROLLED):
        kept = [f"{saved_megabytes(function):.0f} MB" for function in (exact(steps), step)]
        yield Row(f"exact meta-gradient, K = {steps} (keeps {kept[0]}, the meta step {kept[1]})",
                  "meta step of 02", exact(steps), step)


def forward_rows(bench):
    """Scoring, Frechet statistics and sampling, each beside the bare forward passes in it."""
    rater, net = bench.nets["rater"], bench.nets["proxy"]
    companions = s3.draw_companions(rater, s2.GROUP, bench.pairs, 0)
    x, c = bench.pairs.batch(np.arange(512))
    judge = s2.Contrast(16, 8).to(bench.device).requires_grad_(False)
    many = bench.pairs.batch()[0]
    reference = s5.moments(judge.embed_images(x)[0])
    eps, t = torch.randn_like(x[:128]), torch.rand(256, device=bench.device)
    both, captions = eps.repeat(2, 1, 1, 1), torch.cat([c[:128], torch.zeros_like(c[:128])])

    @torch.no_grad()
    def forward():
        rater.logits(rater.features(x, c))

    @torch.no_grad()
    def guided():
        for _ in range(12):
            net(both, t, captions)

    def features():
        return judge.embed_images(many)[0]
    return [Row("scoring 512 pairs, 03", "bare rater forward",
                lambda: s3.score_chunk({"rater": rater}, x, c, companions, None), forward, 1 / 0.9),
            Row(f"features and moments of {len(many):,} images, 05", "features alone",
                lambda: s5.moments(features()), features, 1.05),
            Row("the same and the distance, once an arm", "features alone",
                lambda: s5.frechet_distance(*s5.moments(features()), *reference), features),
            Row("sampling 128 images, 12 steps, 01", "12 bare forwards of 256",
                lambda: s1.sample(net, c[:128], eps), guided, 1.1)]


def selection_row(count):
    ratings = np.random.default_rng(0).standard_normal(count, dtype=np.float32)

    def floor():
        keys = np.random.default_rng(0).gumbel(size=count)
        np.argpartition(keys, count // 2)
    return Row(f"selecting half of {count:,}, 04", "Gumbel keys and one argpartition",
               lambda: s4.select(ratings, "shift-gsample", 0.5), floor, 1.5)


# ---- two processes ---------------------------------------------------------------------------
def work(steps):
    """One of 1 or 2 processes: trains the proxy and prints seconds per step, warm-up left out."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(2 // s1.world())
    bench = set_up(common.CPU)
    train = trainer(bench.device, bench.pairs, steps)
    train()
    s1.add_up(torch.zeros(1))
    s1.print0(seconds(train) / steps)
    if dist.is_initialized():
        dist.destroy_process_group()


def start(processes, steps):
    """A sampler that lets 1 or 2 processes do `work`."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone",
                                          "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(Path(__file__)), "--work", str(steps)]
    threads = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
    return lambda: float(subprocess.run(command, env=threads, capture_output=True, text=True,
                                        check=True).stdout.split()[-1])


# ---- growth ----------------------------------------------------------------------------------
def stepper(device, batch=64, size=16, width=64):
    """One proxy step at these sizes."""
    net, x = new_proxy(device, size, width), torch.rand(batch, 3, size, size, device=device)
    opt, t = s1.adamw(net, 1e-3), torch.rand(batch, device=device)
    c = torch.randint(s1.VOCABULARY, (batch, 8), device=device)
    return lambda: s1.descend(s1.flow_loss(net, x, c, t, x).mean(), net, opt)


def growth_rows(device, count):
    """What, against what, exponent of the method, the points, a function for every point."""
    return [("proxy step", "batch", "1", (32, 64, 128, 256), lambda n: stepper(device, n)),
            ("proxy step", "pixels", "1, attention 2", (16 ** 2, 24 ** 2, 32 ** 2, 48 ** 2),
             lambda n: stepper(device, size=math.isqrt(n))),
            ("proxy step", "width", "2", (64, 128, 192, 256), lambda n: stepper(device, width=n)),
            (f"{STEPS} proxy steps", "corpus", "0", (1000, 4000, 16000, 64000),
             lambda n: trainer(device, draw_pairs(n, device))),
            ("selection", "ratings", "1, sorting n log n",
             tuple(count // k for k in (8, 4, 2, 1)), lambda n: selection_row(n).measured)]


def print_growth(rows, repeats):
    """A table: least-squares slope of log seconds over log size."""
    common.head("cost of", "against", "at", "ms there", "fitted exponent", "of the method")
    for what, against, expected, points, make in rows:
        samples = take_turns([sampler(make(n)) for n in points], repeats)
        slopes = np.polyfit(np.log(points), np.log(samples).T, 1)[0]
        common.show(what, against, ", ".join(map(str, points)),
                    ", ".join(f"{1e3 * s:.3g}" for s in np.median(samples, 0)),
                    show(slopes, "{:.2f}"), expected)


# ---- one GPU ---------------------------------------------------------------------------------
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}    # bf16 products, dense, by the makers
STAGES = ("01, 05", "02", "03 --baselines", "05, drawing")


def gpu_stages(device, width, batch, mode="fp32", size=64, depth=12):
    """For each of STAGES what it does once, and its floating-point operations, at these sizes."""
    pairs, val = (draw_pairs(2 * batch, device, size, split) for split in ("train", "val"))
    nets = {name: new_proxy(device, size, width, depth) for name in ("proxy", "ref")}
    for net in nets.values():
        net.bf16 = mode == "bf16"
    torch.set_float32_matmul_precision("highest" if mode == "fp32" else "high")
    nets["rater"] = s2.Rater(size, 4, 8).to(device)
    opts = {name: s1.adamw(net, 1e-4) for name, net in nets.items()}
    args, rng, rows = s2.parse_args([]), s1.seeded(device, 0, "bench"), np.arange(batch)
    x, c = pairs.batch(np.arange(8))
    operations = own_products(nets["proxy"], (x, x[:, 0, 0, 0], c))[1] * batch / 8   # of training
    companions = s3.draw_companions(nets["rater"], s2.GROUP, pairs, 0)
    score = functools.partial(s3.score_chunk, {**nets, "contrast": s2.Contrast(size, 8).to(device)})
    return dict(zip(STAGES, [
        (lambda: s1.train(nets["proxy"], pairs, 1, batch, 1e-4, 0), operations),
        (lambda: s2.meta_step(nets, opts, pairs.batch(rows), val.batch(rows), rng, args),
         3 * operations),
        (lambda: score(*pairs.batch(rows), companions, rng), s3.DRAWS * operations),
        (lambda: s1.sample(nets["proxy"], c[:1].expand(batch, -1), pairs.batch(rows)[0]),
         8 * operations)]))                                # 24 forward passes, a third each


def print_gpu_rows(device, batch=128):
    """Images a second, share of the maker's peak, gigabytes: by width, precision and stage."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    peak = next((rate for chip, rate in PEAK.items() if chip in name), math.nan)
    print(f"\n{name}; batch {batch}, 64 x 64 pixels, depth 12")
    common.head("width", "precision", "stage", "images a second", "share of peak", "peak GB")
    for width, mode in itertools.product((384, 768), ("fp32", "tf32", "bf16")):   # ViT-S, DiT-B
        known = device.type == "cuda" and gpu_stages(device, width, batch, mode)
        for stage in STAGES:
            cells = ["not measured"] * 3
            if known:
                torch.cuda.reset_peak_memory_stats()
                sample = sampler(known[stage][0])
                each = np.median([sample() for _ in range(5)])
                cells = (f"{batch / each:,.0f}", f"{known[stage][1] / each / peak:.0%}",
                         f"{torch.cuda.max_memory_allocated() / 1e9:.1f}")
            common.show(width, mode, stage, *cells)
    torch.set_float32_matmul_precision("highest")


# ---- the tables ------------------------------------------------------------------------------
def main(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; median (range) of {args.repeats} pairs of samples")
    common.head("what", "floor or peer", "measured ms", "floor ms", "measured / floor", "target")
    bench = set_up(device)
    for row in [*proxy_rows(bench), *meta_rows(bench), *forward_rows(bench),
                selection_row(args.ratings)]:
        pair = [sampler(function, row.units) for function in (row.measured, row.floor)]
        show_row(row.what, row.against, take_turns(pair, args.repeats), row.target)
    toy = take_turns([sampler(lambda: draw_pairs(20_000, device))], args.repeats)
    show_row("drawing 20,000 toy pairs", "2 seconds", np.hstack([toy, 0 * toy + 2]), 1)
    show_row("proxy step, 2 processes of 1 thread", "1 process of 2 threads", take_turns(
        [start(2, args.steps), start(1, args.steps)], args.repeats), 1 / 0.8)
    print_growth(growth_rows(device, args.ratings // 4), args.repeats)
    print_gpu_rows(device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ratings", type=int, default=30_000_000, help="of the selection")
    parser.add_argument("--steps", type=int, default=100, help="of the two-process row")
    parser.add_argument("--quick", action="store_true", help="small and few, to see that it works")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.ratings, arguments.steps = 2, 1_000_000, 20
        SAMPLE_SECONDS = 0.02
    work(arguments.work) if arguments.work else main(arguments)
