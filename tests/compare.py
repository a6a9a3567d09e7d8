"""Paired difference of any two arms in a results CSV of stage 5, which prints those with baselines.

    python tests/compare.py .assets/results-main.csv "eq. 9, Block 50%" "eq. 9, Shift-Gsample 50%"

Prints the mean over seeds of first arm minus second, its 95 % interval and what that means.
"""
import csv
import sys

from common import s5


def compare(path, one, two):
    """{metric: 'difference, interval, verdict'} of two arms over the seeds that both have."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(file)}
    seeds = sorted(seed for arm, seed in rows if arm == one and (two, seed) in rows)
    if not seeds:
        raise SystemExit(f"{path}: no seed with both arms, {one} and {two}; it has "
                         f"{', '.join(sorted({arm for arm, _ in rows}))}")
    return {metric: s5.show_difference([float(rows[one, seed][metric])
                                        - float(rows[two, seed][metric]) for seed in seeds], sign)
            for metric, sign in s5.METRICS.items()}


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    print(f"{sys.argv[2]}, minus {sys.argv[3]}: " + ", ".join(
        f"{metric} {words}" for metric, words in compare(*sys.argv[1:]).items()))
