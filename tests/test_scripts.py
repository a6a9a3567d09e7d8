"""The experiment scripts beside the tests, tiny: their tables, their figures, what they promise."""
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import bench
import common
import compare
import departures
import figures
import meta_gradient as meta
import real
from conftest import ROOT

LECTURE = (ROOT / ".assets/lecture.md").read_text()
RUNS = {                   # what is asked: its tables' first cells, what is made smaller
    "meta exact": ("K", {"UNROLLED": (1, 2), "BETAS": (0.05,)}),
    "meta distance": ("over chaotic-caption, steps apart; over chaotic-noise, steps apart; "
                      "over plain, steps apart", {"APART": (1, 3)}),
    "meta validation": ("validation pairs", {"TRUSTED": {
        name: meta.TRUSTED[name] for name in list(meta.TRUSTED)[::5]}}),
    "meta diversity": ("selection", {}), "departures training": ("variant", {}),
    "departures additions scoring": ("variant; rows 6 and 7: a corpus scored twice; "
                                     "row 7: pairs whose caption was blanked", {}),
    "real raters toy": ("toy: AUC over", {}), "real dials toy": ("toy: setting", {}),
    "real arms toy": ("toy: AUC over; arm; arm", {})}
SLOW = "departures training", "real arms toy", "real raters toy", "real dials toy"


def read_tables(text):
    """The Markdown tables of a text, each a list of rows of cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [[line[2:-2].split(" | ") for line in block.splitlines() if "|---" not in line]
            for block in blocks]


@pytest.mark.parametrize("asked", [pytest.param(
    asked, marks=[pytest.mark.slow] * (asked in SLOW)) for asked in RUNS])
def test_prints_its_tables(asked, monkeypatch, capsys):
    """All under their heads, none empty, each row as wide as its head."""
    (name, *words), (heads, smaller) = asked.split(), RUNS[asked]
    for what, value in smaller.items():
        monkeypatch.setattr(globals()[name], what, value)
    globals()[name].main([*words, "--smoke", "--seeds", "1"])
    tables = read_tables(capsys.readouterr().out)
    assert [table[0][0] for table in tables] == heads.split("; ")
    for head, *rows in tables:
        assert rows and {len(row) for row in rows} == {len(head)}
        assert not any("nan" in cell for row in rows for cell in row[:3])


def test_similar_captions_are_swapped_on_the_disk(tmp_path, stage):
    """Some t-shirts become shirts, in caption, tokens and stratum alike; no bag ever changes."""
    classes = ("t-shirt", "shirt", "bag") * 40
    folder, s1 = tmp_path / "pairs", stage(1)
    pairs = common.collect((f"{k}", np.zeros((3, 8, 8)), f"a photo of a {name}", "informative")
                           for k, name in enumerate(classes))
    folder.mkdir()
    for name in ("images", "tokens", "entries"):
        np.save(folder / f"{name}.npy", getattr(pairs, name))
    np.save(folder / "train.npy", pairs.rows)
    (folder / "texts.jsonl").write_bytes(pairs.texts)
    (folder / "made.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "SIMILAR", (("t-shirt", "shirt"),))
        real.swap_similar(folder, 0.4, 0)
    after = s1.open_pairs(folder)
    old, new = (np.array(part.read("caption")) for part in (pairs, after))
    changed = old != new
    assert 20 < changed.sum() < 45 and not changed[2::3].any()
    assert (after.strata() == np.where(changed, "similar-caption", "informative")).all()
    assert (after.tokens == s1.tokenize(new, 8)).all()


def test_two_arms_are_compared_in_pairs(tmp_path):
    file = tmp_path / "results.csv"
    numbers = {"a": (1.0, 4.0), "b": (3.0, 5.0)}
    metrics = list(common.s5.METRICS)
    file.write_text("\n".join([",".join(["arm", "seed", *metrics]), *(
        ",".join([arm, str(seed), *[str(value)] * len(metrics)])
        for arm, values in numbers.items() for seed, value in enumerate(values))]))
    found = compare.compare(file, "a", "b")                # -2 and -1, t of one d.o.f.
    assert found["match"] == "-1.5 ± 6.4 tie" and list(found) == metrics
    with pytest.raises(SystemExit, match="it has a, b"):
        compare.compare(file, "a", "c")


def test_areas_and_rank_correlation():
    strata = np.array(["informative", "plain", "informative", "plain", "chaotic-noise"])
    assert common.areas(np.array([5.0, 1, 4, 2, 4]), strata) == [0.75, 1.0]   # noise ties once
    assert common.spearman([1, 2, 3, 4], [2, 8, 9, 100]) == pytest.approx(1)
    assert common.spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)


# ---- figures ---------------------------------------------------------------------------------
def test_draws_the_figures_of_the_pages(chain, capsys):
    figures.main(["--out", str(chain)])
    named = re.findall(r"!\[.*?\]\((.+?)\)", LECTURE)
    assert len(named) == 6
    assert all((chain / name).exists() for name in (*named, "rater.png", "rater-tau0.png"))
    said = capsys.readouterr().out
    assert all(f"| {name} |" in said for name, _ in figures.QUANTITIES.values())


def test_the_steps_apart_are_read_from_the_committed_tables():
    found = figures.read_apart((ROOT / ".assets/evidence.md").read_text())
    assert list(found) == ["chaotic-caption", "chaotic-noise", "plain"]
    assert all([row[0] for row in rows] == [1, 3, 10, 20, 50, 100, 200, 400]
               for rows in found.values())


def test_bells_say_how_much_of_each_half_is_informative():
    """Of 200 pairs the first 80 are informative: Top-K keeps them all among 100."""
    strata = np.repeat(list(figures.LOOKS), [80, 60, 40, 20])
    top, bell = map(int, re.findall(r"(\d+) %", figures.describe_halves(-np.arange(200), strata)))
    assert top == 80 and 10 < bell < 40                    # 30 lie behind the quarter


def test_the_worked_example_follows_eqs_5_to_7():
    """Of untrained networks that differ; the three shown are the medians of their kinds."""
    torch.manual_seed(0)
    pairs = common.collect(common.s1.draw_toy(128, 16, 0, "train"))
    settings = common.s1.parse_args(["--smoke"])
    weights = common.s1.build_proxy(settings, common.CPU).state_dict()
    nets = common.start_nets(settings, weights)
    for name in ("proxy", "ref"):
        for p in nets[name].parameters():                  # some begin at 0
            p.data += 0.05 * torch.randn_like(p)
    rows, n = figures.work_example(nets, pairs, 32)
    strata, (x, c) = pairs.strata(rows), pairs.batch(rows)
    assert set(figures.THREE) <= {*strata} and len(set(rows)) == 32
    assert torch.equal(n["gap"], n["L_theta"] - n["L_hat"]) and n["gap"].std() > 0
    assert n["rank"][n["gap"].argmin()] == 1 and n["rank"][n["gap"].argmax()] == 32
    assert n["W"].sum().item() == pytest.approx(n["W_batch"][0].item(), rel=1e-5)
    logits = nets["rater"].logits(nets["rater"].features(x, c)).detach().requires_grad_()
    objective = figures.s2.rater_objective(logits.softmax(0)[None], n["W_batch"][:1, None],
                                           n["s"][None], torch.zeros(1, 1))
    wanted, = torch.autograd.grad(objective, logits)       # eq. 6 lowers the objective
    assert torch.allclose(n["push"], -wanted, atol=1e-7)
    for place, stratum in zip(figures.find_three(pairs, rows, n["gap"]), figures.THREE):
        alike = np.flatnonzero(strata == stratum)
        lower = (n["gap"][alike] < n["gap"][place]).sum()
        assert place in alike and lower == (len(alike) - 1) // 2


def test_the_numbers_of_the_lecture_add_up():
    """The committed table, but for its roundings, obeys the equations that its rows name."""
    cells = {name: row for name, *row in (row for table in read_tables(LECTURE) for row in table)}
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


# ---- what is timed ---------------------------------------------------------------------------
def test_the_rows_of_a_gpu_are_filled_wherever_they_run(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SAMPLE_SECONDS", 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    bench.print_gpu_rows(common.CPU, "H100", (16,), 32, size=32, depth=1)
    (_, *rows), = read_tables(capsys.readouterr().out)
    assert len(rows) == 8 == len({tuple(row[:3]) for row in rows})            # stages, precisions
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)


def test_products_and_operations_of_a_step():
    """Two linear layers on 5 rows: three products, and no gradient of the first one's input."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    multiply, operations = bench.own_products(net, (torch.zeros(5, 3),))
    multiply()
    assert operations == 2 * 5 * (2 * 3 * 4 + 3 * 4 * 2)


@pytest.mark.slow
@pytest.mark.parametrize("script, rows", [
    ("scale.py --pairs 300 --jpeg 2000", 8), ("bench.py --repeats 2 --ratings 1000000", 7)])
def test_what_is_timed_fills_its_table(script, rows):
    done = subprocess.run([sys.executable, *f"tests/{script}".split()], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, check=True, timeout=600)
    (_, *found), = read_tables(done.stdout)
    assert len(found) == rows
