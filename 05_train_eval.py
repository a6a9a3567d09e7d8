"""Stage 5 of 5: train the same model from scratch on every selection and compare what it draws.

    eq. 1    find S in D with M(theta(S)) >~ M(theta(D)), M a measure, at as many epochs

An arm is a selection, chosen here by stage 4's `select`, or --selected: half the pairs take half
the steps. All arms of a seed share initial weights, so their differences are paired; a seed also
redraws what is drawn by chance. Rater, judge, and captions and noise of the evaluation stay the
same: intervals leave their spread out. On 512 test pairs at most, unseen by proxies and arms:

    held-out   mean flow loss under fixed noise
    distance   Frechet distance between features of drawn and of real images
    score      100 cos between drawn image and its caption, as a CLIP score
    match      share of drawn images whose own caption is the nearest of all distinct captions

Features and cosines come from a small contrastive network like stage 2's, trained here on the test
pairs, which no rating has seen: its distance is not FID and its score not OpenAI's CLIP score.
With --weights the public networks of both judge: their code, after `main`, can be skipped. On a CPU
as many arms are trained at a time as there are cores, a thread each.

Reads    out/pairs/, out/proxy.pt, out/ratings.npy, out/ratings-loss.npy, or --selected files
Writes   out/results.csv (a row per arm and seed), .md, -samples.png (same captions and noise)
Run      python 05_train_eval.py                          four minutes on two cores
         python 05_train_eval.py --selected out/selected-topk-0.5.csv --seeds 1
         torchrun --nproc-per-node 2 -- 05_train_eval.py
"""
import functools
import gzip
import hashlib
import html
import importlib
import re
import sys
import time
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))             # PYTHONSAFEPATH leaves it out
s1 = importlib.import_module("01_proxy")
s2 = importlib.import_module("02_meta_rater")
s3 = importlib.import_module("03_score")
s4 = importlib.import_module("04_select")

DECAY = 0.4                # share of the steps in which the learning rate falls to zero
DRAWN = 512                # images drawn per arm for the distance, the score and the match
PART = 128                 # pairs at a time when nothing is trained
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student t, 1-9 d.o.f.


# ---- arms ------------------------------------------------------------------------------------
class Arm(NamedTuple):
    """A selection: which ratings, sorted by what, which rule, how much; or a `file` of stage 4."""
    name: str
    ratings: str = ""          # stem of the ratings in --out, '' where none are needed
    method: str = "random"
    keep: float = 1.0
    settings: dict = {}
    rank_by: str = "rating"
    file: str = ""


EQ6, EQ9 = "ratings", "ratings-loss"   # each with the rule that suits it; tests/evidence.py has all
ARMS = [Arm("full"), Arm("random 50%", keep=0.5),
        Arm("eq. 6, Top-K 50%", EQ6, "topk", 0.5),
        Arm("eq. 9, Shift-Gsample 50%", EQ9, "shift-gsample", 0.5),
        Arm("contrast, Top-K 50%", EQ6, "topk", 0.5, rank_by="contrast")]


def choose_rows(arm, pool, pairs, out, seed):
    """Rows (n,) of an arm's pairs among those of `pool`; a rule that draws does so by `seed`."""
    if arm.file:
        return s4.read_rows(Path(arm.file), pairs)
    if arm.keep == 1:
        return pool
    rating = (s4.read_ratings(Path(out) / f"{arm.ratings}.npy", arm.rank_by, pairs)[pool]
              if arm.ratings else np.zeros(len(pool)))
    return pool[s4.select(rating, arm.method, arm.keep, seed=seed, **arm.settings)[0]]


def list_arms(args, pairs, pool, arms):
    """Those of `arms` whose ratings exist; or full, random and one per --selected file."""
    for file in map(Path, args.selected):
        known, own = s1.check(file), Path(args.out) / "pairs/made.json"
        if known and s1.digest(own) not in known["grew_from"].values():
            raise SystemExit(f"{file} chooses among other pairs than {args.out}/pairs: rate those")
        s4.compare_keys(file, pairs)
    if args.selected:
        names, chosen = zip(*((Path(file).stem, s4.read_rows(Path(file), pairs))
                              for file in args.selected))
        if not np.isin(np.concatenate(chosen), pool).all():
            raise SystemExit("--selected lists pairs with planted dirt: leave them out")
        rivals = [Arm("full"), *(Arm(f"random {n}", keep=n) for n in sorted({*map(len, chosen)}))]
        if len({*names, "real", *(arm.name for arm in rivals)}) < len(names) + len(rivals) + 1:
            raise SystemExit(f"--selected {' '.join(names)}: names are not distinct, or taken")
        return rivals + [Arm(name, file=file) for name, file in zip(names, args.selected)]
    missing = {arm.ratings for arm in arms
               if arm.ratings and not (Path(args.out) / f"{arm.ratings}.npy").exists()}
    for name in missing:
        s1.print0(f"arms of {args.out}/{name}.npy are left out: 03_score.py"
                  + " --signal loss" * (name == EQ9) + " writes it")
    for name in {arm.ratings for arm in arms} - missing - {""}:
        s1.check(Path(args.out) / f"{name}.npy")           # of these pairs, or the program ends
    return [arm for arm in arms if arm.ratings not in missing]


# ---- metrics ---------------------------------------------------------------------------------
def moments(f):
    """Mean (d,) and covariance (d, d) of features (N, d), in float64."""
    f = f.double().cpu().numpy()
    return f.mean(0), np.cov(f, rowvar=False)


def frechet_distance(mu1, S1, mu2, S2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians (Heusel et al. 2017).

    The root's trace is summed from the symmetric S1^(1/2) S2 S1^(1/2): real, also if singular.
    """
    values, vectors = np.linalg.eigh(S1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T                    # S1^(1/2)
    middle = root @ S2 @ root
    trace = np.sqrt(np.linalg.eigvalsh((middle + middle.T) / 2).clip(0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(S1) + np.trace(S2) - 2 * trace)


def judge_images(judge, images, captions, reference):
    """distance, score and match of images (B, 3, H, W) under a list of B captions."""
    f, image = map(torch.cat, zip(*map(judge.embed_images, images.split(PART))))
    distinct = sorted(set(captions))                                          # M captions
    own = torch.tensor([[distinct.index(caption)] for caption in captions], device=images.device)
    cosines = image @ judge.embed_captions(distinct).T                        # (B, M)
    cosine = cosines.gather(1, own)                                           # (B, 1)
    return {"distance": frechet_distance(*moments(f), *reference),
            "score": 100 * cosine.mean().item(),
            "match": 100 * (cosine >= cosines.amax(1, True)).float().mean().item()}


@torch.no_grad()
def evaluate(net, test, seed):
    """The held-out loss of one trained model, and the n images it drew (n, 3, H, W)."""
    n = min(DRAWN, len(test)) // s1.world() * s1.world()
    x, c = test.batch(np.arange(n))
    rng = s1.seeded(x.device, seed, "evaluate")
    eps = torch.randn(x.shape, generator=rng, device=x.device)
    t = (torch.arange(n, device=x.device) + 0.5) / n                          # every level once
    losses = [s1.flow_loss(net, *part) for part in zip(*(v.split(PART) for v in (x, c, t, eps)))]
    images = [s1.sample(net, *part) for part in zip(*(s1.mine(v).split(PART) for v in (c, eps)))]
    return torch.cat(losses).mean().item(), s1.gather(torch.cat(images))


# ---- one arm, all arms -----------------------------------------------------------------------
@functools.cache
def open_lab(out, unplanted, device):
    """What all arms share: options of stage 1, splits, and `pool`, the rows to select from; with
    `unplanted` it leaves out what --plant planted."""
    settings, _ = s1.load(Path(out) / "proxy.pt", "01_proxy.py")
    pairs, val, test = (s1.open_pairs(Path(out) / "pairs", split, device)
                        for split in ("train", "val", "test"))
    pool = np.flatnonzero(~(s4.find_planted(pairs) & unplanted))
    return SimpleNamespace(settings=settings, pairs=pairs, pool=pool, val=val, test=test)


def open_judge(args, lab, device):
    """The judge, and mean and covariance of the features that it sees in the test images."""
    judge = StandardJudge(args.weights, device) if args.weights else s2.train_contrast(
        lab.test, 20 if args.smoke else s2.CONTRAST_STEPS, lab.settings.seed)
    x, _ = lab.test.batch(np.arange(min(DRAWN, len(lab.test))))
    return judge, moments(torch.cat([judge.embed_images(part)[0] for part in x.split(PART)]))


def run_arm(work, args, device):
    """Train on an arm's pairs from scratch and draw: the result row, but for the judge's numbers,
    and images (n, 3, H, W). work: (seed, arm)."""
    (seed, arm), lab = work, open_lab(args.out, bool(args.selected), device)
    rows, began = choose_rows(arm, lab.pool, lab.pairs, args.out, seed), time.monotonic()
    torch.manual_seed(seed)                                # all arms start from the same weights
    net = s1.build_proxy(lab.settings, device)
    steps = args.epochs * (len(rows) // args.batch_size)   # eq. 1: half the pairs, half the steps
    progress = s1.Progress(columns=["loss", "grad_norm"], warn=lambda *_: f"   {arm.name}")
    s1.train(net, lab.pairs.take(rows), steps, args.batch_size, args.lr, seed, DECAY, progress)
    seconds = time.monotonic() - began
    held_out, images = evaluate(net, lab.test, lab.settings.seed)
    strata, known = lab.pairs.strata(rows), set(lab.pairs.strata(lab.pool))
    shares = {name: float(np.mean(strata == name)) for name in s3.STRATUM_COLOURS if name in known}
    return {"arm": arm.name, "seed": seed, "pairs": len(rows), "steps": steps, "seconds": seconds,
            **shares, "held-out": held_out}, images.cpu().numpy()


def run_all(stem, arms, args, lab, judge, reference, device, cores):
    """Every arm under every seed; STEM.csv grows with each. Returns rows, samples and progress."""
    files = [Path(arm.file or Path(args.out) / f"{arm.ratings}.npy") for arm in arms
             if arm.file or arm.ratings]
    progress = s1.Progress(Path(f"{stem}.progress"), vars(args) | {"arms": repr(arms)} | {
        f"{k} {file.name}": s1.digest(file)
        for k, file in enumerate([Path(args.out) / "proxy.pt", *files])})
    results = progress.kept.setdefault("results", [])
    samples = progress.kept.setdefault("samples", {})      # {arm: (8, 3, H, W)}
    work = [(lab.settings.seed + k, arm) for k in range(args.seeds) for arm in arms][len(results):]
    run, began = functools.partial(run_arm, args=args, device=device), time.monotonic()
    found = zip(work, s1.side_by_side(run, work, "spawn", cores))
    for done, ((seed, arm), (result, images)) in enumerate(found, 1):
        captions, pixels = lab.test.read("caption", np.arange(len(images))), s1.to_pixels(images)
        results.append(result | judge_images(
            judge, torch.from_numpy(images).to(device), captions, reference))
        samples.setdefault(arm.name, torch.from_numpy(pixels[:8]))
        if args.save_images:
            save_images(args, f"{arm.name} seed {seed}", pixels, lab.test)
        minutes = (time.monotonic() - began) / 60 * (len(work) / done - 1)
        s1.print0(f"seed {seed}  {arm.name:30} " + "  ".join(
            f"{name} {results[-1][name]:.3f}" for name in METRICS)
            + f"  {minutes:.1f} min left" * (done >= cores))  # the first begin together
        s1.write_csv(f"{stem}.csv", list(results[-1]), [
            [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()] for row in results])
        progress.save({})
    return results, samples, progress


def save_images(args, name, images, test):
    """Images (n, 3, H, W) uint8 as NAME/000000.png, their captions as NAME-captions/000000.txt."""
    if s1.rank() == 0:
        name = re.sub(r"[^.a-z0-9]+", "-", name.lower())
        pictures, captions = (Path(args.save_images) / f"{name}{end}" for end in ("", "-captions"))
        pictures.mkdir(parents=True, exist_ok=True)
        captions.mkdir(exist_ok=True)
        for k, (image, caption) in enumerate(zip(images, test.read("caption"))):
            Image.fromarray(image.transpose(1, 2, 0)).save(pictures / f"{k:06d}.png")
            (captions / f"{k:06d}.txt").write_text(caption, encoding="utf-8")


# ---- tables and figures ----------------------------------------------------------------------
METRICS = {"held-out": -1, "distance": -1, "score": 1, "match": 1}            # sign: what is better


def interval(values):
    """Mean and half-width of its 95 % interval (Student's t); nan below two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), np.nan
    return values.mean(), T975[min(len(values), 10) - 2] * values.std(ddof=1) / len(values) ** 0.5


def show_interval(mean, half, sign=""):
    return f"{mean:{sign}.3g}" + ("" if np.isnan(half) else f" ± {half:.2g}")


def show_difference(values, sign):
    """Paired differences: their interval, and whether they win, lose, or tie, with zero in it."""
    mean, half = interval(values)
    verdict = "tie" if abs(mean) <= half else "wins" if mean * sign > 0 else "loses"
    return show_interval(mean, half, "+") + f" {verdict}" * (not np.isnan(half))


def write_markdown(*rows):
    """A table of rows of cells, of which the first is its head."""
    head, *lines = ["| " + " | ".join(map(str, row)) + " |\n" for row in rows]
    return "".join([head, "|---" * len(rows[0]) + "|\n", *lines])


def tabulate(results, arms, floor):
    """Two Markdown tables: means, and paired differences with full and random."""
    values = {arm.name: {name: np.array([row[name] for row in results if row["arm"] == arm.name])
                         for name in results[0] if name != "arm"} for arm in arms}
    strata = [name for name in results[0] if name in s3.STRATUM_COLOURS]
    means = [("arm", "pairs", " / ".join(strata) or "stratum", "seconds", *METRICS)]
    for name, columns in values.items():
        shares = " / ".join(f"{100 * columns[stratum].mean():.0f}" for stratum in strata) or "-"
        means.append((name, columns["pairs"][0], shares, f"{columns['seconds'].mean():.0f}",
                      *(show_interval(*interval(columns[metric])) for metric in METRICS)))
    baselines = [arm.name for arm in arms if not arm.ratings and not arm.file]
    differences = [("arm", "baseline", *METRICS)]
    for name, columns in values.items():
        for baseline in [] if name in baselines else baselines:
            rival = values[baseline]
            if rival["pairs"][0] >= columns["pairs"][0]:
                differences.append((name, baseline, *(
                    show_difference(columns[metric] - rival[metric], sign)
                    for metric, sign in METRICS.items())))
    return (f"Mean and 95 % interval over {len(results) // len(arms)} paired seeds; {floor}\n\n"
            + write_markdown(*means) + "\nPaired differences, arm minus baseline:\n\n"
            + write_markdown(*differences))


def sum_up(results, arms, real):
    """What the table says of match, in sentences."""
    match = {arm.name: np.array([row["match"] for row in results if row["arm"] == arm.name])
             for arm in arms}
    steps = {row["arm"]: row["steps"] for row in results}
    rivals = [arm.name for arm in arms if not arm.ratings and not arm.file]
    chosen = [name for name in match if name not in rivals] or rivals
    best = max(chosen, key=lambda name: match[name].mean())
    first = arms[0].name
    lines = [f"Best selection: {best}, match {match[best].mean():.0f} % after "
             f"{steps[best] / steps[first]:.0%} of the steps of {first}; against " + ", ".join(
                 f"{rival} {show_difference(match[best] - match[rival], 1)}" for rival in rivals)]
    for verdict, words in (("wins", "Better than"), ("tie", "A tie with"), ("loses", "Worse than")):
        names = [name for name in chosen
                 if show_difference(match[name] - match[first], 1).endswith(verdict)]
        lines += [f"{words} {first}: {', '.join(names)}"] * bool(names)
    doubt = "" if real["match"] > 60 else ": it says little here, look at the pictures"
    return "\n".join([*lines, f"The judge matches {real['match']:.0f} % of real images{doubt}"])


def draw_samples(path, samples, test):
    """Eight captions: the real image, then what each arm draws for it from the same noise."""
    shown = np.arange(min(8, len(test)))
    rows = {"real": (test.batch(shown)[0], test.read("caption", shown))}
    s3.draw_rows(path, rows | {name: (images / 127.5 - 1, [""] * len(shown))
                               for name, images in samples.items()})


# ---- the stage -------------------------------------------------------------------------------
def parse_args(argv=None):
    return s1.parse(
        argv, __doc__, smoke=dict(epochs=1, seeds=2, batch_size=16),
        selected=([], "files of stage 4 as arms; planted pairs are left out of all"),
        batch_size=(64, "pairs, all processes"), epochs=(16, "over every selection"),
        seeds=(3, "repetitions of every arm"), lr=(5e-3, "of the downstream model"),
        weights=("", "folder of the public networks of FID and CLIP score, to judge by them"),
        save_images=("", "folder for what every arm draws, with captions, for other tools"))


def main(args, device, arms=ARMS, name="results"):
    cores, stem = 1, Path(args.out) / name
    if device.type == "cpu" and s1.world() == 1:           # arms side by side, with a thread each
        cores = torch.get_num_threads()
        torch.set_num_threads(1)
    lab = open_lab(args.out, bool(args.selected), device)
    if len(lab.pool) < len(lab.pairs):                     # as in the selections of stage 4
        s1.print0(f"{len(lab.pairs) - len(lab.pool)} pairs with planted dirt are in no arm")
    arms = list_arms(args, lab.pairs, lab.pool, arms)
    sizes = [len(choose_rows(arm, lab.pool, lab.pairs, args.out, lab.settings.seed))
             for arm in arms]                              # all that arms read is checked here
    if min(sizes) < args.batch_size:
        raise SystemExit(f"{arms[np.argmin(sizes)].name}: {min(sizes)} pairs are fewer than "
                         "--batch-size")
    steps = args.seeds * args.epochs * sum(size // args.batch_size for size in sizes)
    s1.print0(f"training the judge, then {args.seeds * len(arms)} models, {steps:,} steps; fewer "
              "--seeds or --epochs, or some files with --selected, make it less")
    judge, reference = open_judge(args, lab, device)
    rows = np.arange(min(DRAWN, len(lab.val)))             # real images that it has not seen
    real = judge_images(judge, lab.val.batch(rows)[0], lab.val.read("caption", rows), reference)
    floor = f"{len(rows)} real images: " + ", ".join(f"{k} {v:.1f}" for k, v in real.items())
    s1.print0(floor)
    if args.save_images:
        save_images(args, "real", lab.test.images[lab.test.rows], lab.test)
    results, samples, progress = run_all(stem, arms, args, lab, judge, reference, device, cores)
    table = tabulate(results, arms, floor)
    if s1.rank() == 0:
        with s1.atomic_file(f"{stem}.md") as file:
            file.write(table)
        draw_samples(f"{stem}-samples.png", samples, lab.test)
    progress.finish()
    return (f"\n{table}\n{sum_up(results, arms, real)}\nwrote {stem}.csv, .md; look at "
            f"{stem}-samples.png")


# ---- standard metrics: FID's Inception-v3, OpenAI's CLIP -------------------------------------
WEIGHTS = {                # what: (address, SHA-256)
    "inception": ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                  "pt_inception-2015-12-05-6726825d.pth",
                  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    "clip": ("https://openaipublic.azureedge.net/clip/models/40d365715913c9da98579312b702a82c18be21"
             "9cc2a73407c4526f58eba950af/ViT-B-32.pt",
             "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "clip_vocab": ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
                   "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")}


def find_weights(what, folder):
    """A public file in `folder`. Its SHA-256 is checked, so that what is read from it is known."""
    address, digest = WEIGHTS[what]
    file = Path(folder) / address.rpartition("/")[2]
    if not file.exists():
        raise SystemExit(f"{file} is missing: download it from {address}")
    with open(file, "rb") as data:
        if hashlib.file_digest(data, "sha256").hexdigest() != digest:
            raise SystemExit(f"{file} is not the public file (SHA-256 differs): delete it")
    return file


def repool(block, pool):
    """Let a block's pool branch see pool(x) where torchvision averages over padding zeros too."""
    held = []
    block.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, inputs: (pool(held.pop()),))


def build_inception():
    """torchvision's Inception-v3 with the pooling of the FID network of 2015, up to 2048 features.

    Eight average pools do not count padding, and the last block has a max pool (pytorch-fid).
    """
    from torchvision.models import inception_v3            # slow to import
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, transform_input=False,
                       init_weights=False)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        repool(getattr(net, f"Mixed_{name}"), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    repool(net.Mixed_7c, nn.MaxPool2d(3, 1, 1))
    return net.eval().requires_grad_(False)


def clip_tower(width, depth):
    """`depth` pre-norm transformer blocks, 64 numbers a head, with OpenAI's fast GELU."""
    block = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True,
        activation=lambda h: h * torch.sigmoid(1.702 * h))
    return nn.TransformerEncoder(block, depth, enable_nested_tensor=False)


SIDE = 224                 # pixels, of CLIP
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_NAMES = {             # of the parts of a block: OpenAI's, torch's
    "resblocks": "layers", "ln_1": "norm1", "attn": "self_attn", "ln_2": "norm2",
    "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}


def rename_parts(state):
    """A state dict of OpenAI's as floats, under the names that torch gives to the same parts."""
    return {re.sub("|".join(CLIP_NAMES), lambda part: CLIP_NAMES[part[0]], name): value.float()
            for name, value in state.items() if value.is_floating_point()}    # not its three sizes


class ClipImages(nn.Module):
    """Vision transformer: pixels (B, 3, 224, 224), normalised -> (B, embedding)."""

    def __init__(self, width, depth, patch, size, embedding):
        super().__init__()
        tokens = 1 + (size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = clip_tower(width, depth)
        self.proj = nn.Parameter(torch.zeros(width, embedding))

    def forward(self, x):
        h = self.conv1(x).flatten(2).transpose(1, 2)                          # (B, P, D)
        h = torch.cat([self.class_embedding.expand(len(h), 1, -1), h], 1)
        h = self.transformer(self.ln_pre(h + self.positional_embedding))      # (B, 1 + P, D)
        return self.ln_post(h[:, 0]) @ self.proj                              # (B, embedding)


class Clip(nn.Module):
    """OpenAI's CLIP with a vision transformer, ViT-B/32 by default. vocabulary: words, length."""

    def __init__(self, images=(768, 12, 32, SIDE, 512), text=(512, 12), vocabulary=(49408, 77)):
        super().__init__()
        width, length = text[0], vocabulary[1]
        self.visual, self.transformer = ClipImages(*images), clip_tower(*text)
        self.token_embedding = nn.Embedding(vocabulary[0], width)
        self.positional_embedding = nn.Parameter(torch.zeros(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, images[-1]))
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_text(self, ids):
        """Token ids (B, 77) -> (B, embedding), read at the end-of-text token, the largest id."""
        mask = torch.ones(2 * ids.shape[1:], dtype=torch.bool, device=ids.device).triu(1)
        h = self.transformer(self.token_embedding(ids) + self.positional_embedding, mask)
        rows = torch.arange(len(ids), device=ids.device)
        return self.ln_final(h)[rows, ids.argmax(1)] @ self.text_projection


class ClipTokenizer:
    """CLIP's byte-pair encoding: captions -> ids (B, 77), start and end of text included.

    Without ftfy: Unicode is composed and curly quotes straightened, broken encodings stay broken.
    """

    def __init__(self, path):
        text = gzip.decompress(Path(path).read_bytes()).decode("utf-8")
        merges = [tuple(line.split()) for line in text.split("\n")[1:48895] if line]
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in plain]
        symbols = [chr(byte) for byte in plain] + [chr(256 + k) for k in range(len(rest))]
        self.symbol = dict(zip(plain + rest, symbols))
        names = symbols + [f"{s}</w>" for s in symbols] + ["".join(merge) for merge in merges]
        self.ids = {name: k for k, name in enumerate(names)}
        self.order = {merge: k for k, merge in enumerate(merges)}
        number = "".join(chr(k) for k in range(sys.maxunicode) if unicodedata.category(chr(k)) in (
            "Nd", "Nl", "No"))                             # a letter: of \w, but no number, no _
        self.words = re.compile(f"'s|'t|'re|'ve|'m|'ll|'d|(?:(?![{number}])[^\\W_])+|[{number}]|"
                                "(?:[^\\s\\w]|_)+", re.IGNORECASE)

    def merge(self, word):
        """Ids of one word: the earliest learnt merge first, until none is left."""
        parts = [self.symbol[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in self.order]:
            first, second = min(pairs, key=self.order.get)
            spaced = "".join(f" {part} " for part in parts)
            parts = spaced.replace(f" {first}  {second} ", f" {first}{second} ").split()
        return [self.ids[part] for part in parts]

    def encode(self, caption):
        """Ids of a caption, without start and end."""
        text = caption.translate(str.maketrans("\u2018\u2019\u201c\u201d", "''\"\""))
        text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
        text = re.sub(r"<\|(startoftext|endoftext)\|>", " ", " ".join(text.split()).lower())
        return [number for word in self.words.findall(text) for number in self.merge(word)]

    def __call__(self, captions, length=77):
        table = torch.zeros(len(captions), length, dtype=torch.int64)
        for row, caption in zip(table, captions):
            ids = self.encode(caption)[:length - 2]
            row[:len(ids) + 2] = torch.tensor([len(self.ids), *ids, len(self.ids) + 1])
        return table


class StandardJudge:
    """The interface of stage 2's `Contrast`, with the networks of FID (Inception-v3 of 2015) and of
    the CLIP score (100 cos of ViT-B/32; others print 2.5 max(cos, 0))."""

    def __init__(self, folder, device):
        torch.backends.cudnn.allow_tf32 = False            # else features differ between GPUs
        paths = {what: find_weights(what, folder) for what in WEIGHTS}
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            state = torch.jit.load(paths["clip"], map_location="cpu").state_dict()     # deprecated
        self.inception = build_inception()
        self.inception.load_state_dict(torch.load(paths["inception"], weights_only=True))
        self.inception.fc = nn.Identity()                  # the 2048 features before the classes
        self.clip, self.device = Clip(), device
        self.clip.load_state_dict(rename_parts(state))
        self.inception, self.clip = self.inception.to(device), self.clip.to(device).eval()
        self.tokenize = ClipTokenizer(paths["clip_vocab"])

    @torch.no_grad()
    def embed_images(self, x):
        """Features (B, 2048) and unit vectors (B, E) of images (B, 3, H, W) in [-1, 1], which are
        rounded as a saved file would be."""
        from torchvision.transforms import InterpolationMode, functional as image_ops
        torch.set_float32_matmul_precision("highest")      # without TF32, whatever an arm has set
        pixels = torch.from_numpy(s1.to_pixels(x.cpu().numpy()))
        large = F.interpolate(pixels.to(self.device) / 255, (299, 299), mode="bilinear",
                              align_corners=False)
        crops = [image_ops.center_crop(image_ops.resize(
            image_ops.to_pil_image(image), SIDE, InterpolationMode.BICUBIC), SIDE)
            for image in pixels]
        crops = torch.stack([image_ops.normalize(image_ops.to_tensor(crop), CLIP_MEAN, CLIP_STD)
                             for crop in crops]).to(self.device)
        return self.inception(2 * large - 1), F.normalize(self.clip.visual(crops), dim=1)

    @torch.no_grad()
    def embed_captions(self, captions):
        """Unit vectors (B, E) of a list of captions."""
        torch.set_float32_matmul_precision("highest")
        ids = self.tokenize(captions).to(self.device)
        return F.normalize(torch.cat([self.clip.encode_text(part) for part in ids.split(256)]),
                           dim=1)


if __name__ == "__main__":
    s1.launch(main, parse_args())
