"""Stage 2: every equation against an independent answer."""
import shutil

import pytest
import torch

from conftest import launch, run

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


def test_eq7_weights(stage):
    torch.manual_seed(0)
    rater = stage(2).Rater(SIZE, PATCH, WORDS, width=16, depth=1)
    x, c, _, _ = make_batch(8, 1)
    W_inst, W_batch = stage(2).weigh(rater, x, c, GROUP)
    assert W_inst.shape == (2, GROUP) and W_batch.shape == (2, 1)
    assert torch.allclose(W_inst.sum(1), torch.ones(2))
    alone, _ = stage(2).weigh(rater, x[:GROUP], c[:GROUP], GROUP)      # groups do not mix
    assert torch.allclose(alone[0], W_inst[0], atol=1e-6)
    f = rater.features(x, c)[:GROUP]
    joined = torch.cat([f.mean(0), ((f - f.mean(0)) ** 2).mean(0)])
    assert torch.allclose(rater.group(joined).sigmoid(), W_batch[0], atol=1e-5)


def test_eq6_gradient_equals_a_sum_over_single_pairs(stage):
    """Without the additions the gradient is the mean over groups of sum_i gap_i grad W_i."""
    torch.manual_seed(0)
    rater = stage(2).Rater(SIZE, PATCH, WORDS, width=16, depth=1).double()
    x, c, _, _ = make_batch(8, 1)
    gap = torch.randn(2, GROUP).double()
    params = [p for p in rater.parameters() if p.requires_grad]

    W_inst, W_batch = stage(2).weigh(rater, x.double(), c, GROUP)
    total = (gap * W_inst.detach()).sum(1, keepdim=True)
    grads = torch.autograd.grad(stage(2).rater_objective(W_inst, W_batch, gap, total), params)

    naive = [torch.zeros_like(p) for p in params]
    for group in range(2):
        for i in range(GROUP):
            W_inst, W_batch = stage(2).weigh(rater, x.double(), c, GROUP)
            W_i = W_inst[group, i] * W_batch[group, 0]
            for total, grad in zip(naive, torch.autograd.grad(W_i, params, allow_unused=True)):
                total += gap[group, i] * (0 if grad is None else grad) / 2
    assert max(g.abs().max() for g in naive) > 1e-4
    for grad, expected in zip(grads, naive):
        assert torch.allclose(grad, expected, atol=1e-12)


def spearman(a, b):
    ranks = torch.stack([a, b]).argsort(1).argsort(1).float()
    return torch.corrcoef(ranks)[0, 1].item()


@pytest.mark.parametrize("steps", [1, 4])
def test_eq6_with_shared_noise_is_the_unrolled_meta_gradient(stage, steps):
    """Rank correlation near 1 with one noise for both proxies, far below with two."""
    flow_loss, n, beta = stage(1).flow_loss, 32, 0.01
    proxy, train, val = make_proxy(stage), make_batch(n, 100), make_batch(n, 200)
    W = torch.full((n,), 1 / n)
    exact = stage(2).exact_meta_gradient(proxy, train, val, W, beta, steps)
    nets = [make_proxy(stage) for _ in range(2)]               # theta, theta_hat
    for _ in range(steps):
        for net, with_val in zip(nets, (True, False)):
            loss = (W * flow_loss(net, *train)).sum()
            loss = loss + flow_loss(net, *val).mean() * with_val
            grads = torch.autograd.grad(loss, list(net.parameters()))
            with torch.no_grad():
                for p, g in zip(net.parameters(), grads):
                    p -= beta * g
    other = (*train[:2], *make_batch(n, 300)[2:])
    with torch.no_grad():
        theta, hat, far = (flow_loss(*pair) for pair in (
            (nets[0], *train), (nets[1], *train), (nets[1], *other)))
    assert spearman(theta - hat, exact) > 0.97
    assert spearman(theta - far, exact) < 0.9


def test_exact_meta_gradient_against_finite_differences(stage):
    proxy, n = make_proxy(stage).double(), 6
    train, val = ([v.double() if v.is_floating_point() else v for v in make_batch(n, k)]
                  for k in (1, 2))
    W = torch.rand(n).double()
    exact = stage(2).exact_meta_gradient(proxy, train, val, W, 0.1, 2)

    def L_val(W):
        copy = make_proxy(stage).double()
        for _ in range(2):
            grads = torch.autograd.grad((W * stage(1).flow_loss(copy, *train)).sum(),
                                        list(copy.parameters()))
            with torch.no_grad():
                for p, g in zip(copy.parameters(), grads):
                    p -= 0.1 * g
        with torch.no_grad():
            return stage(1).flow_loss(copy, *val).mean()
    for i in range(3):
        step = torch.zeros(n).double()
        step[i] = 1e-5
        numeric = (L_val(W + step) - L_val(W - step)) / 2e-5
        assert numeric.item() == pytest.approx(exact[i].item(), rel=1e-3)


def test_lower_signal_gains_weight_and_the_regularised_optimum_is_the_signal(stage):
    """The entropy term turns the logit into -signal / tau; without it one pair takes all."""
    s, tau = torch.tensor([[-1.0, 0.0, 0.5, 1.0]]), 2.0
    for weight, ends in ((tau, (-s / tau).softmax(1)), (0.0, torch.tensor([[1.0, 0, 0, 0]]))):
        logits = torch.zeros(1, 4, requires_grad=True)
        W_batch = torch.ones(1, 1)
        opt = torch.optim.Adam([logits], 0.05)
        for k in range(600):
            W = logits.softmax(1)
            loss = stage(2).rater_objective(W, W_batch, s, torch.zeros(1, 1))
            loss = loss + weight * stage(2).negative_entropy(W, torch.full((1, 1), 0.5))
            opt.zero_grad()
            loss.backward()
            opt.step()
            if k == 0:
                assert logits[0, 0] > logits[0, 3]
        assert torch.allclose(logits.softmax(1), ends, atol=0.01)


def test_rank_normal(stage):
    s = torch.tensor([[5.0, -1e6, 7.0, 6.0]])
    scores = stage(2).rank_normal(s)
    assert scores.argsort().tolist() == s.argsort().tolist()
    assert torch.allclose(scores.sum(), torch.tensor(0.0), atol=1e-6) and scores.abs().max() < 1.2


def test_meta_step_moves_each_net_by_its_own_equation(stage):
    """theta sees validation pairs, theta_hat does not; eq. 9 gives another rater than eq. 6."""
    results = {}
    for signal in ("difference", "loss"):
        args = stage(2).parse_args(["--signal", signal, "--group-size", "4"])
        torch.manual_seed(0)
        nets = {"proxy": make_proxy(stage), "ref": make_proxy(stage),
                "rater": stage(2).Rater(SIZE, PATCH, WORDS, width=16, depth=1)}
        opts = {name: torch.optim.SGD(net.parameters(), 0.1) for name, net in nets.items()}
        before = {name: [p.clone() for p in net.parameters()] for name, net in nets.items()}
        for k in range(2):                                     # at first theta = theta_hat
            stage(2).meta_step(nets, opts, make_batch(8, 10)[:2], make_batch(8, 20)[:2],
                               stage(1).seeded("cpu", k), args)
        results[signal] = nets
        for name, net in nets.items():
            assert any((p != q).any() for p, q in zip(net.parameters(), before[name]))
        pairs = zip(nets["proxy"].parameters(), nets["ref"].parameters())
        assert any((p - q).abs().max() > 1e-6 for p, q in pairs)
    raters = [list(nets["rater"].parameters()) for nets in results.values()]
    assert any((p - q).abs().max() > 1e-6 for p, q in zip(*raters))


def test_meta_step_compares_both_proxies_under_one_noise(stage):
    """The logged difference is L(theta; x_i) - L(theta_hat; x_i), its noise drawn once; equal
    proxies do not differ at all."""
    args = stage(2).parse_args(["--group-size", "4"])
    (x, c), val = make_batch(8, 10)[:2], make_batch(8, 20)[:2]
    for steps in (30, 20):                                 # theta_hat: the same net, and another
        nets = {"proxy": make_proxy(stage), "ref": make_proxy(stage, steps),
                "rater": stage(2).Rater(SIZE, PATCH, WORDS, width=16, depth=1)}
        rng = stage(1).seeded("cpu", 1)
        noise, _ = stage(1).draw_noise(x, rng, stage(1).T_SHIFT), stage(1).draw_noise(val[0], rng)
        with torch.no_grad():
            seen = stage(1).drop_captions(c, rng)
            L_theta, L_hat = (stage(1).flow_loss(nets[name], x, seen, *noise)
                              for name in ("proxy", "ref"))
        opts = {name: torch.optim.SGD(net.parameters(), 0.1) for name, net in nets.items()}
        numbers = stage(2).meta_step(nets, opts, (x, c), val, stage(1).seeded("cpu", 1), args)
        gap = dict(zip(stage(2).COLUMNS[1:], numbers.tolist()))
        expected = (L_theta - L_hat).mean().item(), (L_theta - L_hat).std().item()
        assert (gap["gap_mean"], gap["gap_std"]) == pytest.approx(expected, abs=1e-5)


def test_collapse_is_said_in_words(stage):
    assert stage(2).warn_of_collapse(0.8, 0.5, 0.4) == ""
    for health in ((0.1, 0.5, 0.4), (0.8, 0.001, 0.4), (0.8, 0.9999, 0.4), (0.8, 0.5, 0.001)):
        assert "COLLAPSE" in stage(2).warn_of_collapse(*health)
    both = stage(2).warn_of_collapse(0.1, 0.99, 0.4)
    assert "few pairs" in both and "W_batch" in both and "alike" not in both


def test_one_group_a_batch_is_said_as_it_has_no_rank(stage, chain, tmp_path, capsys):
    shutil.copy(chain / "proxy.pt", tmp_path)
    launch(stage, 2, ["--steps", "1", "--batch-size", "16", "--group-size", "16", "--out",
                      str(tmp_path)])
    assert "one group a batch" in capsys.readouterr().out
    assert stage(2).rank_normal(torch.tensor([3.0])).abs() < 1e-6


def test_too_few_validation_pairs_for_a_batch_are_named(chain):
    done = run(f"02_meta_rater.py --batch-size 128 --out {chain}")
    assert done.returncode == 1 and "64 validation pairs" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_signal_is_ranked_in_its_group_and_its_total_among_groups(stage):
    """So that neither a tail nor a drift that all groups share moves anything."""
    signal = torch.tensor([[3.0, -1.0, 0.0], [90.0, 0.1, 0.2], [-5.0, 0.0, 1.0]])
    W = torch.full((3, 3), 1 / 3)                          # totals 0.7, 30.1 and -1.3
    low, middle, high = stage(2).rank_normal(torch.arange(3.0))
    for drift in (0, 1000):
        s, s_group = stage(2).rank_signal(signal + drift, W)
        assert torch.equal(s, torch.stack([torch.stack(row) for row in (
            (high, low, middle), (high, low, middle), (low, middle, high))]))
        assert torch.equal(s_group, torch.stack([middle, high, low])[:, None])
