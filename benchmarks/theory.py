"""Distillation and unseen classes: Ensembles and Cocktails, section 9, in numbers and a picture.

    python benchmarks/theory.py --output=/tmp/theory

Accuracy on seen and unseen classes of a teacher, of a student of its hard labels, and of cocktails
of both, while the number of classes or the dimension varies. Needs no accelerator.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path

from robust_ft.analysis.logistic_regression import Experiment

WEIGHTS = (0.0, 0.1, 0.5, 0.9, 1.0)
CLASSES, DIMENSIONS = (10, 30, 100, 300), (4, 8, 16, 32)
BASE = Experiment()


def mean_accuracies(experiment: Experiment, seeds: int) -> dict[str, tuple[float, float]]:
    """Returns {model: (mean accuracy on seen, on unseen classes)}."""
    runs = [experiment.accuracies(seed, WEIGHTS) for seed in range(seeds)]
    return {
        name: tuple(statistics.fmean(run[name][i] for run in runs) for i in (0, 1))
        for name in runs[0]
    }


def table(title: str, values: tuple[int, ...], results: list[dict]) -> str:
    """Returns a Markdown table: seen / unseen accuracy, a column for each value."""
    lines = [f"| {title} | " + " | ".join(map(str, values)) + " |", "|---|" + "---:|" * len(values)]
    for name in results[0]:
        cells = [f"{r[name][0]:.1f} / {r[name][1]:.1f}" for r in results]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(sweeps: dict[str, tuple[tuple[int, ...], list[dict]]], file: Path) -> None:
    """Draws accuracy on unseen classes against what varies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (title, (values, results)) in zip(
        figure.subplots(1, len(sweeps), sharey=True), sweeps.items(), strict=True
    ):
        for name in results[0]:
            axes.plot(values, [r[name][1] for r in results], marker="o", label=name)
        axes.set(xscale="log", xlabel=title, xticks=values, xticklabels=map(str, values))
        axes.minorticks_off()
    figure.axes[0].set_ylabel("accuracy on unseen classes, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of teachers")
    parser.add_argument("--output", type=Path, default=Path("/tmp/robust_ft/theory"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    sweeps = {
        title: (
            values,
            [
                mean_accuracies(dataclasses.replace(BASE, **{field: value}), arguments.seeds)
                for value in values
            ],
        )
        for title, field, values in (
            ("classes k", "classes", CLASSES),
            ("dimension d", "dim", DIMENSIONS),
        )
    }
    text = "\n\n".join(table(title, *sweep) for title, sweep in sweeps.items())
    (arguments.output / "theory.md").write_text(text + "\n", encoding="utf-8")
    draw(sweeps, arguments.output / "theory.png")
    print(text)


if __name__ == "__main__":
    main()
