"""The experiment scripts beside the tests, tiny: each prints its tables and draws its figures."""
import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests"))
common, figures, bench = map(importlib.import_module, ("common", "figures", "bench"))

SCRIPTS = {"meta_gradient.py exact --smoke --seeds 1": "| 8 | 0.05 |",
           "departures.py additions weights --smoke --seeds 1": "| eq. 6, no entropy term"}
LECTURE = (ROOT / ".assets/lecture.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", SCRIPTS)
def test_prints_its_table(command, tmp_path):
    done = subprocess.run([sys.executable, *f"tests/{command}".split(), "--out", str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert SCRIPTS[command] in done.stdout


@pytest.mark.slow
def test_draws_the_figures_of_the_readme(chain):
    done = subprocess.run([sys.executable, "tests/figures.py", "--out", str(chain)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    named = re.findall(r"!\[.*?\]\((.+?)\)", LECTURE)
    assert len(named) == 6 and all((chain / name).exists() for name in named)
    assert all(f"| {name} |" in done.stdout for name, _ in figures.QUANTITIES.values())


def test_compares_two_arms_of_the_committed_table():
    done = subprocess.run([sys.executable, "tests/compare.py", ".assets/results-main.csv",
                           "eq. 6, Top-K 50%", "full"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "match +48.4 ± 6.2 wins" in done.stdout, done.stdout


def test_areas_and_rank_correlation():
    strata = np.array(["informative", "plain", "informative", "plain", "chaotic-noise"])
    assert common.areas(np.array([5.0, 1, 4, 2, 4]), strata) == [0.75, 1.0]   # noise ties once
    assert common.spearman([1, 2, 3, 4], [2, 8, 9, 100]) == pytest.approx(1)
    assert common.spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)


def test_retention_is_drawn_from_the_committed_table(tmp_path):
    figures.draw_retention(tmp_path / "retention.png", ROOT / ".assets/results-retention.csv")
    assert (tmp_path / "retention.png").stat().st_size > 10000


def test_auc_against_steps_apart_is_read_from_the_committed_tables(tmp_path):
    text = (ROOT / ".assets/evidence.md").read_text()
    found = figures.read_apart(text)
    assert list(found) == ["chaotic-caption", "chaotic-noise", "plain"]
    assert all([row[0] for row in rows] == [1, 3, 10, 20, 50, 100, 200, 400]
               for rows in found.values())
    assert found["chaotic-caption"][-1] == (400, 0.989, 0.005)
    figures.draw_apart(tmp_path / "apart.png", text)
    assert (tmp_path / "apart.png").stat().st_size > 10000


def test_bells_say_how_much_of_each_half_is_informative(tmp_path, capsys):
    """Of 200 pairs the first 80 are informative: Top-K keeps them all among 100."""
    strata = np.repeat(list(figures.LOOKS), [80, 60, 40, 20])
    table = {"rating": -np.arange(200.0), "stratum": strata}
    figures.draw_bells(tmp_path / "bells.png", {"eq. 6": table, "eq. 9": table})
    assert (tmp_path / "bells.png").stat().st_size > 10000
    top, bell = map(int, re.findall(r"(\d+) %", capsys.readouterr().out.splitlines()[0]))
    assert top == 80 and 10 < bell < 40   # 30 lie behind the quarter


@pytest.fixture(scope="module")
def example():
    """The worked example of untrained networks that differ, and its pairs."""
    s1, s2 = figures.s1, figures.s2
    torch.manual_seed(0)
    pairs = s1.draw_toy(128, 16, 0, "train")
    settings = s1.parse_args(["--smoke"])
    nets = {name: s1.build_proxy(settings, "cpu") for name in ("proxy", "ref")}
    for net in nets.values():
        for p in net.parameters():                         # some begin at 0
            p.data += 0.05 * torch.randn_like(p)
    nets["rater"] = s2.Rater(16, settings.patch, settings.words)
    return nets, pairs, *figures.work_example(nets, pairs, 32)


def test_the_worked_example_follows_eqs_5_to_7(example):
    nets, pairs, rows, n = example
    x, c = pairs.batch(rows)
    assert set(figures.THREE) <= {pairs.strata[row] for row in rows} and len(set(rows)) == 32
    assert torch.equal(n["gap"], n["L_theta"] - n["L_hat"]) and n["gap"].std() > 0
    assert n["rank"][n["gap"].argmin()] == 1 and n["rank"][n["gap"].argmax()] == 32
    assert n["W"].sum().item() == pytest.approx(n["W_batch"][0].item(), rel=1e-5)
    logits = nets["rater"].logits(nets["rater"].features(x, c)).detach().requires_grad_()
    objective = figures.s2.rater_objective(logits.softmax(0)[None], n["W_batch"][:1, None],
                                           n["s"][None], torch.zeros(1, 1))
    wanted, = torch.autograd.grad(objective, logits)       # eq. 6 lowers the objective
    assert torch.allclose(n["push"], -wanted, atol=1e-7)


def test_the_three_are_the_medians_of_their_kinds(example):
    _, pairs, rows, n = example
    for place, stratum in zip(figures.find_three(pairs, rows, n["gap"]), figures.THREE):
        alike = [k for k, row in enumerate(rows) if pairs.strata[row] == stratum]
        lower = sum(n["gap"][k] < n["gap"][place] for k in alike)
        assert place in alike and lower == (len(alike) - 1) // 2


def test_the_numbers_of_the_lecture_add_up():
    """The committed table, but for its roundings, obeys the equations that its rows name."""
    lines = [line.strip("| ").split(" | ") for line in LECTURE.splitlines() if line[:1] == "|"]
    cells = {line[0]: line[1:] for line in lines}
    n = {key: np.array(cells[name], float) for key, (name, _) in figures.QUANTITIES.items()}
    assert n["gap"] == pytest.approx(n["L_theta"] - n["L_hat"], abs=1.1e-4)
    assert n["W"] == pytest.approx(n["W_inst"] * n["W_batch"], abs=1e-4)
    scores = figures.s2.rank_normal(torch.arange(32.0)).numpy()
    assert n["s"] == pytest.approx(scores[n["rank"].astype(int) - 1], abs=1e-3)
    assert (n["rank"].argsort() == n["gap"].argsort()).all()
    mean = n["s"] + n["push"] / n["W"]                     # sum_j W_inst,j s_j, of the whole group
    assert mean == pytest.approx(mean.mean().repeat(3), abs=0.02)
    asked = [figures.ask(push) for push in n["push"]]
    assert cells["so the rater is asked to"] == asked == ["raise its weight"] + 2 * [
        "lower its weight"]


def test_the_rows_of_a_gpu_can_be_measured_and_say_where_they_are_not(capsys):
    for function, pairs, operations in bench.gpu_stages(torch.device("cpu"), 16, 32, size=32,
                                                        depth=1).values():
        function()
        assert pairs == 32 and operations > 0
    bench.print_gpu_rows(torch.device("cpu"))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()
            if line.startswith(("| 384 ", "| 768 "))]
    assert len(rows) == 2 * 4 * 4 and len({tuple(row[:3]) for row in rows}) == len(rows)
    assert all(row[3:] == ["not measured", "not measured", "not measured |"] for row in rows)
