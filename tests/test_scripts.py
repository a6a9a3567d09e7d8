"""The experiment scripts beside the tests, tiny: each prints its tables and draws its figures."""
import importlib
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
    assert (chain / "pipeline.png").exists() and (chain / "eq6.png").exists()


def test_compares_two_arms_of_the_committed_table():
    done = subprocess.run([sys.executable, "tests/compare.py", ".assets/results-main.csv",
                           "eq. 6, Top-K 50%", "full"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "match +47.9 ± 6.8 wins" in done.stdout, done.stdout


def test_areas_and_rank_correlation():
    strata = np.array(["informative", "plain", "informative", "plain", "chaotic-noise"])
    assert common.areas(np.array([5.0, 1, 4, 2, 4]), strata) == [0.75, 1.0]   # noise ties once
    assert common.spearman([1, 2, 3, 4], [2, 8, 9, 100]) == pytest.approx(1)
    assert common.spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)


def test_retention_is_drawn_from_the_committed_table(tmp_path):
    figures.draw_retention(tmp_path / "retention.png", ROOT / ".assets/results-retention.csv")
    assert (tmp_path / "retention.png").stat().st_size > 10000


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
