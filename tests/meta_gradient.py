"""What eq. 6 is: beside the exact meta-gradient, over time, by validation set, and in a selection.

    exact        does L_i(theta) - L_i(theta_hat) rank pairs like dL_val / dW_i through K unrolled
                 steps, with one noise for both proxies and with two; does eq. 9; what does the
                 exact gradient cost in time and memory?
    distance     how many steps after theta and theta_hat parted does the difference find which
                 stratum, and would one step's inner product <grad L_i, g_val> do?
    validation   how many trusted pairs does eq. 6 need, and how clean have they to be?
    diversity    purity and coverage of what every rule selects

    python tests/meta_gradient.py exact distance --seeds 5         ten minutes, one thread
    python tests/meta_gradient.py validation diversity --seeds 3   a quarter of an hour

A seed redraws everything: the toy corpus, the warm proxy, the rater. Prints Markdown tables, mean
and 95 % interval (Student's t) over seeds. AUC = P(an informative pair is rated above one of the
other stratum).
"""
import copy
import functools
import time
from dataclasses import replace

import numpy as np
import torch
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (RULES, areas, cell, collect, command_line, print_table, ruled, s1, s2, s4, s5,
                    spearman, start_nets, warm_up)

OTHERS = ("chaotic-caption", "chaotic-noise", "plain")     # the strata in the order of the tables
LEVELS = (0.4, 0.6, 0.8, 0.95)                             # t of the loss that is looked at


# ---- exact: eq. 6 beside the unrolled meta-gradient ------------------------------------------
UNROLLED, BETAS = (1, 2, 4, 8), (0.001, 0.01, 0.05)        # K, and the step size of eq. 5


def saved_megabytes(function):
    """What autograd keeps for backward passes while `function` runs, every storage once."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function()
    return sum(storages.values()) / 1e6


def exact_meta_gradient(proxy, train, val, W, beta, steps):
    """dL_val / dW_i (B,) through `steps` unrolled gradient steps of eq. 3: what eq. 6 approximates.

    train and val are (x, c, t, eps). Keeps one graph per step in memory, and needs second
    derivatives, which fused attention does not have on the CPU.
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


def part_by_descent(proxy, train, val, W, beta, steps):
    """theta and theta_hat after `steps` plain gradient steps of eq. 5 from one point."""
    nets = copy.deepcopy(proxy), copy.deepcopy(proxy)
    for _ in range(steps):
        for net, with_val in zip(nets, (True, False)):
            loss = (W * s1.flow_loss(net, *train)).sum()             # eq. 5
            loss = loss + s1.flow_loss(net, *val).mean() if with_val else loss
            grads = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads):
                    p -= beta * g
    return nets


def compare_gradients(proxy, train, val, other, beta, steps):
    """Rank correlation with the exact gradient: eq. 6 with one noise, with two, eq. 9; seconds of
    the exact gradient over those of eq. 6. `other`: the training pairs under a second noise."""
    W = torch.full((len(train[0]),), 1 / len(train[0]))                       # (B,)
    start = time.process_time()
    exact = exact_meta_gradient(proxy, train, val, W, beta, steps)    # (B,)
    middle = time.process_time()
    theta, hat = part_by_descent(proxy, train, val, W, beta, steps)
    with torch.no_grad():
        L_theta, L_hat = (s1.flow_loss(net, *train) for net in (theta, hat))
        seconds = time.process_time() - middle
        L_far = s1.flow_loss(hat, *other)                            # (B,)
    signals = (L_theta - L_hat, L_theta - L_far, L_theta)
    return [spearman(s, exact) for s in signals] + [(middle - start) / seconds]


def draw_pairs(seed, smoke, n=64):
    """The warm proxy, n training pairs, n validation pairs, the training pairs in other noise."""
    settings, (pairs, val, _), proxy = warm_up(seed, smoke)
    (x, c), (x_val, c_val) = (split.batch(next(s1.draw_batches(len(split), n, seed, 0, 1)))
                              for split in (pairs, val))
    rng = s1.seeded("cpu", seed, "exact")
    noises = [s1.draw_noise(x, rng, shift) for shift in (s2.T_SHIFT, 0.0, s2.T_SHIFT)]
    return proxy, (x, c, *noises[0]), (x_val, c_val, *noises[1]), (x, c, *noises[2])


def exact(args):
    """A table: a row per K and step size."""
    found = {}                                             # {(K, beta): [[4 numbers] per seed]}
    for seed in range(args.seeds):
        batches = draw_pairs(seed, args.smoke)
        for steps in UNROLLED:
            for beta in BETAS:
                found.setdefault((steps, beta), []).append(
                    compare_gradients(*batches, beta, steps))
    batch = (*batches[:3], torch.full((64,), 1 / 64), 0.01)
    one_step = saved_megabytes(lambda: part_by_descent(*batch, 1))
    memory = {steps: saved_megabytes(lambda: exact_meta_gradient(*batch, steps))
              for steps in UNROLLED}
    rows = [[steps, beta, *(cell(column, 3) for column in np.transpose(numbers)[:3]),
             cell(np.transpose(numbers)[3], 1), f"{memory[steps]:.0f}"]
            for (steps, beta), numbers in found.items()]
    print_table(["K", "beta", "eq. 6, one noise", "eq. 6, two noises", "eq. 9",
                 "time, exact / eq. 6", f"MB, exact (eq. 6: {one_step:.0f})"], rows)


# ---- distance: the signal grows while the proxies part ---------------------------------------
APART = (1, 3, 10, 20, 50, 100, 200, 400)                  # steps since they were one
PART = 200                                                 # pairs in one forward pass
PER_STRATUM = 400                                          # pairs looked at, all wrong captions


def part_by_adamw(nets, pairs, val, seed, args, after):
    """Eq. 5 with W_i = 1 / B: `proxy` on validation and training pairs, `ref` on training pairs.
    The settings are those of stage 2, the rater is left out."""
    opts = {name: s1.adamw(net, args.lr) for name, net in nets.items()}
    batches = (s1.draw_batches(len(split), args.batch_size, seed, 0, max(APART))
               for split in (pairs, val))
    for k, both in enumerate(zip(*batches), 1):
        (x, c), (x_val, c_val) = (split.batch(rows) for split, rows in zip((pairs, val), both))
        rng = s1.seeded("cpu", seed, "part", k)
        train = x, c, *s1.draw_noise(x, rng, s2.T_SHIFT)
        trusted = x_val, c_val, *s1.draw_noise(x_val, rng)
        for name, parts in (("proxy", (trusted, train)), ("ref", (train,))):
            loss = sum(s1.flow_loss(nets[name], *part).mean() for part in parts)
            s1.descend(loss, nets[name], opts[name])
        after(k)


def choose_pairs(pairs, seed):
    """x, c, eps and strata of up to PER_STRATUM pairs of every stratum."""
    strata = pairs.strata()
    rows = np.concatenate([np.flatnonzero(strata == name)[:PER_STRATUM] for name in s1.STRATA])
    x, c = pairs.batch(rows)
    eps = torch.randn(x.shape, generator=s1.seeded("cpu", seed, "look"))
    return x, c, eps, strata[rows]


@torch.no_grad()
def compare_losses(nets, x, c, eps, strata):
    """AUC (levels, 3) of one draw of L(theta; x_i) - L(theta_hat; x_i), low rated high."""
    found = []
    for t in LEVELS:
        gaps = [s1.flow_loss(nets["proxy"], *part) - s1.flow_loss(
            nets["ref"], *part) for part in zip(*(v.split(PART) for v in (
                x, c, torch.full((len(x),), t), eps)))]
        found.append(areas(-torch.cat(gaps).numpy(), strata, OTHERS))
    return found


def compare_inner_products(proxy, val, x, c, eps, strata, seed):
    """AUC (levels, 3) of <grad L_i, g_val>, high rated high: all that one step of eq. 5 can tell.

    By forward mode, every pair's derivative along g_val of all validation pairs in one pass.
    """
    x_val, c_val = val.batch()
    noise = s1.draw_noise(x_val, s1.seeded("cpu", seed, "g_val"))
    params = {name: p.detach() for name, p in proxy.named_parameters()}
    loss = s1.flow_loss(proxy, x_val, c_val, *noise).mean()
    g_val = dict(zip(params, torch.autograd.grad(loss, list(proxy.parameters()))))

    def along(part):
        return jvp(lambda params: s1.flow_loss(
            lambda *inputs: functional_call(proxy, params, inputs), *part), (params,), (g_val,))[1]
    found = []
    with sdpa_kernel(SDPBackend.MATH):                     # fused attention has no forward mode
        for t in LEVELS:
            parts = zip(*(v.split(PART) for v in (x, c, torch.full((len(x),), t), eps)))
            found.append(areas(torch.cat([along(part) for part in parts]).numpy(), strata, OTHERS))
    return found


def measure_distance(seed, smoke):
    """Of one seed: AUC of inner products, then at every step of APART (1 + steps, levels, 3)."""
    _, (pairs, val, _), proxy = warm_up(seed, smoke)
    x, c, eps, strata = choose_pairs(pairs, seed)
    nets = {name: copy.deepcopy(proxy) for name in ("proxy", "ref")}
    curve = [compare_inner_products(proxy, val, x, c, eps, strata, seed)]

    def after(k):
        if k in APART:
            curve.append(compare_losses(nets, x, c, eps, strata))
    part_by_adamw(nets, pairs, val, seed, s2.parse_args(["--smoke"] * smoke), after)
    return curve


def distance(args):
    """A table per stratum, of which tests/figures.py draws apart.png."""
    curves = np.array([measure_distance(seed, args.smoke) for seed in range(args.seeds)])
    for k, other in enumerate(OTHERS):
        rows = [[step, *(cell(v, 3) for v in curves[:, place, :, k].T)]
                for place, step in enumerate(["inner product at 0", *APART])]
        print_table([f"over {other}, steps apart", *(f"t = {t}" for t in LEVELS)], rows)


# ---- validation: what the trusted pairs may be -----------------------------------------------
TRUSTED = {                # pairs, share of plain ones, share of wrong captions
    "1,000 clean pairs (the default)": (1000, 0.0, 0.0), "200 clean pairs": (200, 0.0, 0.0),
    "50 clean pairs": (50, 0.0, 0.0), "1,000, of which 20 % plain": (1000, 0.2, 0.0),
    "1,000, of which 50 % plain": (1000, 0.5, 0.0),
    "1,000, of which 10 % under wrong captions": (1000, 0.0, 0.1)}


def spoil(val, settings, count, plain, wrong):
    """The first `count` validation pairs, some replaced, over and over up to the length of val."""
    pool = collect(s1.draw_toy(8 * len(val), settings.size, settings.seed + 1000, "train"))
    images, tokens, first = val.images.copy(), val.tokens.copy(), 0
    count = min(count, len(val))
    for stratum, share in (("plain", plain), ("chaotic-caption", wrong)):
        rows = np.flatnonzero(pool.strata() == stratum)[:round(share * count)]
        places = slice(first, first + len(rows))
        images[places], tokens[places] = pool.images[rows], pool.tokens[rows]
        first += len(rows)
    return replace(val, images=images, tokens=tokens, rows=np.resize(np.arange(count), len(val)))


@functools.lru_cache(maxsize=None)
def rate(seed, smoke, trusted=next(iter(TRUSTED))):
    """Logits (N,) of the training pairs after stage 2, with these validation pairs."""
    settings, (pairs, val, _), proxy = warm_up(seed, smoke)
    args, nets = s2.parse_args(["--smoke"] * smoke), start_nets(settings, proxy.state_dict(), val)
    s2.learn(nets, pairs, spoil(val, settings, *TRUSTED[trusted]), args, seed, s1.Progress())
    with torch.no_grad():
        return nets["rater"].logits(nets["rater"].features(*pairs.batch())).numpy()


def validation(args):
    """A table: a row per kind of validation set."""
    rows = []
    for name in TRUSTED:
        numbers = []
        for seed in range(args.seeds):
            strata = warm_up(seed, args.smoke)[1][0].strata()
            rating = rate(seed, args.smoke, name)
            half = strata[np.argsort(-rating)[:len(rating) // 2]]
            numbers.append([*areas(rating, strata, OTHERS), np.mean(half == "informative")])
        rows.append([name, *(cell(v, 3) for v in np.transpose(numbers))])
    print_table(["validation pairs", *(f"over {other}" for other in OTHERS),
                 "informative in the top half"], rows)


# ---- diversity: purity and coverage of a selection -------------------------------------------
ARMS = [arm for keep in (0.2, 0.5) for arm in (
    s5.Arm(f"random {keep:.0%}", keep=keep), *(ruled("eq. 6", rule, keep) for rule in RULES))]


def count_combinations(captions):
    """Combinations present and their effective number, exp(entropy), as shares of all 72.

    The caption of an informative pair names its attributes, so captions are combinations.
    """
    counts = np.unique(captions, return_counts=True)[1]
    if not len(counts):
        return np.zeros(2)
    shares = counts / counts.sum()
    possible = len(s1.COLOURS) * len(s1.GROUNDS) * len(s1.SHAPES)
    return np.array([len(counts), np.exp(-(shares * np.log(shares)).sum())]) / possible


def describe_rows(pairs, rows, seed):
    """Purity; combinations present and effective number among the informative pairs selected;
    effective number of as many informative pairs drawn at random: what the count alone allows."""
    captions = np.array(pairs.read("caption"))
    informative = np.flatnonzero(pairs.strata() == "informative")
    good = np.intersect1d(rows, informative)
    alike = np.random.default_rng(seed).choice(informative, len(good), replace=False)
    return (len(good) / len(rows), *count_combinations(captions[good]),
            count_combinations(captions[alike])[1])


def diversity(args):
    """A table, a row per selection."""
    found = {arm.name: [] for arm in ARMS}
    for seed in range(args.seeds):
        pairs, rating = warm_up(seed, args.smoke)[1][0], rate(seed, args.smoke)
        for arm in ARMS:
            rows, _ = s4.select(rating, arm.method, arm.keep, seed=seed, **arm.settings)
            found[arm.name].append(describe_rows(pairs, rows, seed))
    print_table(["selection", "informative, %", "combinations present, %", "effective number, %",
                 "of as many random ones, %"],
                [[name, *(cell(100 * v, 0) for v in np.transpose(numbers))]
                 for name, numbers in found.items()])


QUESTIONS = {"exact": exact, "distance": distance, "validation": validation,
             "diversity": diversity}


def main(argv=None):
    parser = command_line(__doc__)
    parser.add_argument("questions", nargs="+", choices=QUESTIONS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for question in args.questions:
        QUESTIONS[question](args)


if __name__ == "__main__":
    main()
