"""Stage 2: every equation against an independent answer."""
import shutil

import pytest
import torch

from common import collect, spearman
from conftest import launch
from meta_gradient import exact_meta_gradient

SIZE, PATCH, WORDS, GROUP = 8, 4, 4, 4


def make_batch(n, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, SIZE, SIZE, generator=rng) * 2 - 1
    c = torch.randint(1, 50, (n, WORDS), generator=rng)
    return x, c, torch.rand(n, generator=rng), torch.randn(x.shape, generator=rng)


def make_proxy(stage, steps=30):
    """A proxy that has left its zero start, or every gradient but the last layer's is zero."""
    torch.manual_seed(0)
    proxy = stage(1).DiT(SIZE, PATCH, 16, 2, WORDS)
    opt = torch.optim.Adam(proxy.parameters(), 1e-2)
    for k in range(steps):
        opt.zero_grad()
        stage(1).flow_loss(proxy, *make_batch(16, k)).mean().backward()
        opt.step()
    return proxy


def make_rater(stage):
    torch.manual_seed(0)
    return stage(2).Rater(SIZE, PATCH, WORDS, width=16, depth=1)


def make_nets(stage, steps=30):
    """theta, theta_hat and mu, and plain gradient descent of each; theta_hat after `steps`."""
    nets = {"proxy": make_proxy(stage), "ref": make_proxy(stage, steps), "rater": make_rater(stage)}
    return nets, {name: torch.optim.SGD(net.parameters(), 0.1) for name, net in nets.items()}


def trained(net):
    """All but the rater's contrastive network."""
    return [p for p in net.parameters() if p.requires_grad]


def flat(net):
    return torch.nn.utils.parameters_to_vector(trained(net)).detach().clone()


# ---- eqs. 6 and 7 ------------------------------------------------------------------------------
def test_eq6_is_the_gradient_of_weights_times_gaps(stage):
    """Without the additions: the mean over groups of sum_i gap_i grad W_i."""
    rater, (x, c, _, _) = make_rater(stage).double(), make_batch(8, 1)
    gap, params = torch.randn(2, GROUP).double(), trained(rater)
    W_inst, W_batch = stage(2).weigh(rater, x.double(), c, GROUP)
    total = (gap * W_inst.detach()).sum(1, keepdim=True)
    found, expected = (torch.autograd.grad(objective, params, retain_graph=True) for objective in (
        stage(2).rater_objective(W_inst, W_batch, gap, total), (gap * W_inst * W_batch).sum() / 2))
    assert max(grad.abs().max() for grad in expected) > 1e-4
    for one, two in zip(found, expected):
        assert torch.allclose(one, two, atol=1e-12)


def descend_by_hand(stage, net, W, train, val, beta, steps):
    """`steps` plain gradient steps of eq. 3, or of eq. 5 where there is a `val`."""
    for _ in range(steps):
        loss = (W * stage(1).flow_loss(net, *train)).sum()
        loss = loss + stage(1).flow_loss(net, *val).mean() if val else loss
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads):
                p -= beta * g
    return net


@pytest.mark.parametrize("steps", [1, 4])
def test_eq6_with_shared_noise_is_the_unrolled_meta_gradient(stage, steps):
    """Rank correlation near 1 with one noise for both proxies, far below with two."""
    n, beta, train, val = 32, 0.01, make_batch(32, 100), make_batch(32, 200)
    W = torch.full((n,), 1 / n)
    exact = exact_meta_gradient(make_proxy(stage), train, val, W, beta, steps)
    nets = [descend_by_hand(stage, make_proxy(stage), W, train, with_val, beta, steps)
            for with_val in (val, None)]                       # theta, theta_hat
    other = (*train[:2], *make_batch(n, 300)[2:])
    with torch.no_grad():
        theta, hat, far = (stage(1).flow_loss(*pair) for pair in (
            (nets[0], *train), (nets[1], *train), (nets[1], *other)))
    assert spearman(theta - hat, exact) > 0.97
    assert spearman(theta - far, exact) < 0.9
    if steps == 1:                                             # in size, too: to first order
        assert torch.allclose(theta - hat, exact, atol=0.2 * exact.abs().max())


# ---- what is added to the paper ----------------------------------------------------------------
def test_the_signal_is_ranked_in_its_group_and_its_total_among_groups(stage):
    """So that neither a tail nor a drift that all groups share moves anything."""
    scores = stage(2).rank_normal(torch.tensor([[5.0, -1e6, 7.0, 6.0]]))
    normal = torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose(scores, normal.icdf(torch.tensor([[3.0, 1.0, 7.0, 5.0]]) / 8), atol=1e-5)
    signal = torch.tensor([[3.0, -1.0, 0.0], [0.1, 90.0, 0.2], [-5.0, 0.0, 1.0]])
    W = torch.full((3, 3), 1 / 3)                          # totals 0.7, 30.1 and -1.3
    low, middle, high = stage(2).rank_normal(torch.arange(3.0)).tolist()
    s, s_group = stage(2).rank_signal(signal + 1000, W)
    assert s.tolist() == [[high, low, middle], [low, high, middle], [low, middle, high]]
    assert s_group.tolist() == [[middle], [high], [low]]


# ---- one meta step -----------------------------------------------------------------------------
def expect(stage, nets, train, val, rng, args):
    """Numbers of the log, and the vectors that one meta step at a rate of 0.1 leads to: three flow
    losses of the nets as they are, and a gradient for each net."""
    s1, s2, groups = stage(1), stage(2), len(train[0]) // GROUP
    noise, noise_val = s1.draw_noise(train[0], rng, s2.T_SHIFT), s1.draw_noise(val[0], rng)
    seen, seen_val = s1.drop_captions(train[1], rng), s1.drop_captions(val[1], rng)
    L_theta, L_hat = (s1.flow_loss(nets[name], train[0], seen, *noise) for name in ("proxy", "ref"))
    L_val = s1.flow_loss(nets["proxy"], val[0], seen_val, *noise_val).mean()
    f = nets["rater"].features(*train).view(groups, GROUP, -1)
    W_inst = nets["rater"].instance(f)[..., 0].softmax(1)
    moments = torch.cat([f.mean(1), f.var(1, unbiased=False)], 1)
    W_batch = nets["rater"].group(moments).sigmoid()[:, 0]
    W = (W_inst * W_batch[:, None]).flatten().detach()
    gap = (L_theta - L_hat).detach()
    signal = (gap if args.signal == "difference" else L_theta.detach()).view(groups, GROUP)
    s, total = s2.rank_normal(signal), s2.rank_normal((signal * W_inst.detach()).sum(1))
    objective = ((W_batch.detach() * (s * W_inst).sum(1)).mean() + (total * W_batch).mean()
                 + args.tau * ((W_inst * W_inst.log()).sum(1) + W_batch * W_batch.log()
                               + (1 - W_batch) * (1 - W_batch).log()).mean())
    losses = {"proxy": L_val + (W * L_theta).sum() / groups, "ref": (W * L_hat).sum() / groups,
              "rater": objective}
    moved = {}
    for name, loss in losses.items():
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(
            loss, trained(nets[name]), retain_graph=True)])
        moved[name] = flat(nets[name]) - 0.1 * grads * min(1.0, 2 / grads.norm().item())
    return moved, {"val": L_val, "ref": L_hat.mean(), "gap_mean": gap.mean(), "gap_std": gap.std(),
                   "W_batch": W_batch.mean()}


@pytest.mark.parametrize("rest", [False, True])
@pytest.mark.parametrize("signal", ["difference", "loss"])
@pytest.mark.parametrize("steps", [30, 20])                # theta_hat: the same net, and another
def test_a_meta_step_moves_each_net_by_its_own_equation(stage, signal, steps, rest):
    """theta by both terms of eq. 5, theta_hat by one, mu by eq. 6 or 9; both proxies under one
    noise, and all losses, also the gap of the log, of the parameters before the step."""
    nets, opts = make_nets(stage, steps)
    train, val = make_batch(8, 10)[:2], make_batch(8, 20)[:2]
    args = stage(2).parse_args(["--signal", signal])
    moved, log = expect(stage, nets, train, val, stage(1).seeded("cpu", 1), args)
    before = flat(nets["rater"])
    numbers = stage(2).meta_step(nets, opts, train, val, stage(1).seeded("cpu", 1), args, rest)
    found = dict(zip(stage(2).COLUMNS, torch.stack(numbers).tolist()))
    for name, number in log.items():
        assert found[name] == pytest.approx(number.item(), abs=1e-5), name
    assert len(numbers) == len(stage(2).COLUMNS) and (found["gap_std"] < 1e-6) == (steps == 30)
    for name in ("proxy", "ref"):
        assert torch.allclose(flat(nets[name]), moved[name], atol=1e-5), name
    assert (flat(nets["proxy"]) - flat(nets["ref"])).abs().max() > 1e-4
    if rest:
        assert torch.equal(flat(nets["rater"]), before)
    elif signal == "loss" or steps < 30:                   # the ranks of rounding are not defined
        assert torch.allclose(flat(nets["rater"]), moved["rater"], atol=1e-5)
        assert (before - moved["rater"]).abs().max() > 1e-4


def test_the_rater_rests_in_the_first_step_and_in_no_other(stage):
    """Nor in the first step of a run that is continued."""
    pairs = collect(stage(1).draw_toy(32, SIZE, 0, "val"), WORDS)
    for done, steps, rests in ((0, 1, True), (0, 2, False), (1, 2, False)):
        args = stage(2).parse_args(["--batch-size", "8", "--steps", str(steps)])
        nets, _ = make_nets(stage)
        first, progress = flat(nets["rater"]), stage(1).Progress()
        progress.step = done
        stage(2).learn(nets, pairs, pairs, args, 0, progress)
        assert torch.equal(flat(nets["rater"]), first) == rests
        assert len(progress.log) == steps - done


def test_the_cosine_is_an_input_that_no_step_changes(stage):
    """Features follow the contrastive network's cosine, which stays frozen to the bit."""
    nets, opts = make_nets(stage, 20)
    rater, (x, c) = nets["rater"], make_batch(8, 1)[:2]
    before = [p.clone() for p in rater.contrast.parameters()]
    with torch.no_grad():
        seen = rater.features(x, c)
        rater.contrast.compare = lambda x, c: torch.linspace(-1, 1, 8)
        other = rater.features(x, c)
    del rater.contrast.compare
    assert seen.shape == (8, 17)
    assert not torch.allclose(seen, other, atol=0.1)
    args = stage(2).parse_args([])
    stage(2).meta_step(nets, opts, (x, c), make_batch(8, 2)[:2], stage(1).seeded("cpu", 1), args)
    assert all(torch.equal(*both) for both in zip(before, rater.contrast.parameters()))


# ---- the stage ---------------------------------------------------------------------------------
def test_both_proxies_start_from_the_warm_one(stage, chain, tmp_path):
    out = shutil.copytree(chain, tmp_path / "out")
    launch(stage, 2, ["--smoke", "--steps", "1", "--lr", "1e-9", "--signal", "loss",
                      "--out", str(out)])
    _, weights = stage(1).load(out / "rater-loss.pt", "02_meta_rater.py --signal loss")
    _, warm = stage(1).load(out / "proxy.pt", "01_proxy.py")
    for name in ("proxy", "ref"):
        assert all(torch.allclose(weights[name][key], warm[key], atol=1e-6) for key in warm)
