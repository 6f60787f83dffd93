"""What the planted-truth evaluations say, over seeds, as Markdown.

    python tests/benchmarks/planted_truth.py runs/planted-truth/*/evaluation

Reads what jobs/planted-truth/ left; trains and judges nothing itself. Intervals are t intervals over seeds of the
simulation, each with models of its own.
"""

from __future__ import annotations

import argparse

import numpy as np

from cosmic_ray.evaluation.metrics.intervals import mean_interval
from cosmic_ray.output import read_manifest


def told(values: list[float | None]) -> str:
    """Mean and interval, and each seed's value."""
    if None in values:
        return "-"
    each = ", ".join(f"{value:.3f}" for value in values)
    if len(values) < 2:
        return each
    found = mean_interval(np.array(values))
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f}): {each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluations", nargs="+", help="folders of evaluate jobs, one a seed")
    results = [read_manifest(uri)["results"] for uri in parser.parse_args().evaluations]
    print("| planted strength | AUROC of the cycle | of the oracle |\n|---|---|---|")
    for place, row in enumerate(results[0]["planted"]["strengths"]):
        rows = [each["planted"]["strengths"][place] for each in results]
        cycle, oracle = ([each[key] for each in rows] for key in ("auroc", "oracle"))
        print(f"| {row['strength']:g} | {told(cycle)} | {told(oracle)} |")
    unplanted = [each["planted"]["unplanted"]["mean"] for each in results]
    print(f"\nUnplanted genes, mean r within batch and type: {told(unplanted)}")
    accuracy = [each["images"]["accuracy"] for each in results]
    print(f"Cell type told from real images: {told([each['real']['accuracy'] for each in accuracy])}")
    print(f"Cell type told from generated images: {told([each['generated']['mean'] for each in accuracy])}")


if __name__ == "__main__":
    main()
