"""Outputs of the models of a report for the same inputs, side by side."""

import dataclasses
from collections.abc import Sequence

from robust_ft.report.results import PRETRAINED, methods, selected_step
from robust_ft.report.runs import Run
from robust_ft.summary import KEPT


@dataclasses.dataclass(frozen=True)
class Sample:
    """One input with the outputs of the models, in the order of `Samples.models`."""

    task: str
    input: str
    target: str
    outputs: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Outputs side by side."""

    models: tuple[str, ...]
    rows: tuple[Sample, ...]


def samples(runs: Sequence[Run], per_task: int = 2) -> Samples:
    """Returns outputs of the pretrained and the finetuned models for the same inputs.

    The first examples of each evaluation are taken, unpicked; of each method its first run. The
    evaluations of held-out tasks come first.
    """
    columns: dict[str, dict[str, list[dict[str, str]]]] = {PRETRAINED: {}}
    for name, group in methods(runs).items():
        run, stage = group[0], group[0].stages[-1]
        step = selected_step(run, stage)
        for file in run.samples:
            if file.name.split("-")[0].endswith(f"_{KEPT}"):
                continue  # the table has their scores
            if file.stage == run.stages[0] and file.step == 0:
                if file.name not in columns[PRETRAINED]:
                    columns[PRETRAINED][file.name] = file.read()
            elif file.stage == stage and file.step == step:
                columns.setdefault(name, {})[file.name] = file.read()
    columns = {model: files for model, files in columns.items() if files}
    shown: list[Sample] = []
    names = sorted({name for files in columns.values() for name in files})
    targets = {run.target for run in runs}
    for name in sorted(names, key=lambda name: any(_is_of(name, t) for t in targets)):
        if sum(name in files for files in columns.values()) < min(2, len(columns)):
            continue  # nothing to compare
        by_input = [
            {str(row.get("input")): str(row.get("prediction")) for row in files.get(name, ())}
            for files in columns.values()
        ]
        first = next(files[name] for files in columns.values() if name in files)
        for row in first[:per_task]:
            text, wanted = str(row.get("input")), row.get("target", "")
            target = " | ".join(wanted) if isinstance(wanted, list) else str(wanted)
            shown.append(Sample(name, text, target, tuple(b.get(text) for b in by_input)))
    return Samples(tuple(columns), tuple(shown))


def _is_of(name: str, task: str) -> bool:
    return name == task or name.startswith((task + "_", task + "-"))
