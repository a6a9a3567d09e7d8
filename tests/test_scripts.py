"""The experiment scripts beside the tests, tiny: each prints its tables and draws its figures."""
import subprocess
import sys

import pytest

from conftest import ROOT

SCRIPTS = {"meta_gradient.py exact --smoke --seeds 1": "| 8 | 0.05 |",
           "departures.py additions weights --smoke --seeds 1": "| eq. 6, no entropy term"}


@pytest.mark.parametrize("command", SCRIPTS)
def test_prints_its_table(command, tmp_path):
    done = subprocess.run([sys.executable, *f"tests/{command}".split(), "--out", str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert SCRIPTS[command] in done.stdout


def test_draws_the_figures_of_the_readme(chain):
    done = subprocess.run([sys.executable, "tests/figures.py", "--out", str(chain)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (chain / "pipeline.png").exists() and (chain / "eq6.png").exists()


def test_compares_two_arms_of_the_committed_table():
    done = subprocess.run([sys.executable, "tests/compare.py", ".assets/results-main.csv",
                           "eq. 6, Top-K 50%", "full"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "wins" in done.stdout, done.stdout + done.stderr
