"""Outputs of the models of a report for the same inputs, side by side, differences marked."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import NamedTuple

from robust_ft.report.results import PRETRAINED, methods, selected_step
from robust_ft.report.runs import Run
from robust_ft.summary import ANALYSIS, KEPT

SAME, EXTRA, MISSING = "same", "extra", "missing"
_MOST_WORDS = 400  # of an output that is compared; comparing takes their square


class Piece(NamedTuple):
    """Words of an output: as in the reference, not in it ("extra"), or only there ("missing")."""

    text: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """One input with the outputs of the models, in the order of `Samples.models`.

    `references` are all texts that count as right.
    """

    task: str
    input: str
    references: tuple[str, ...]
    outputs: tuple[str | None, ...]

    @property
    def target(self) -> str:
        """The references as one text."""
        return " | ".join(self.references)

    def is_right(self, output: str) -> bool:
        """Whether an output is one of the references."""
        return output.strip() in {reference.strip() for reference in self.references}

    @property
    def has_right(self) -> bool:
        """Whether any output is. Of free text no model hits the wanted words exactly."""
        return any(output is not None and self.is_right(output) for output in self.outputs)


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
        analyses = {row.task for row in run.rows if row.role == ANALYSIS}
        for file in run.samples:
            task = file.name.split("-")[0]
            if task.endswith(f"_{KEPT}") or task in analyses:
                continue  # the table has their scores, and analyses answer no question
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
            text, wanted = str(row.get("input")), row.get("references") or row.get("target", "")
            references = tuple(map(str, wanted if isinstance(wanted, list) else [wanted]))
            shown.append(Sample(name, text, references, tuple(b.get(text) for b in by_input)))
    return Samples(tuple(columns), tuple(shown))


def pieces(output: str, references: Sequence[str]) -> list[Piece]:
    """Returns an output word by word against the reference that it is nearest to.

    Words that it lacks stand where the reference has them, unless it has no word of that.
    """
    words = output.split()
    candidates = [reference.split() for reference in references]
    if not words or len(words) > _MOST_WORDS or not candidates:
        return [Piece(" ".join(words), SAME)] if words else []
    matchers = [difflib.SequenceMatcher(None, each, words, autojunk=False) for each in candidates]
    best = max(range(len(matchers)), key=lambda i: matchers[i].ratio())
    codes = matchers[best].get_opcodes()
    agrees = any(kind == "equal" for kind, *_ in codes)
    found = []
    for kind, low, high, first, last in codes:
        if kind in ("delete", "replace") and agrees:
            found.append(Piece(" ".join(candidates[best][low:high]), MISSING))
        if kind != "delete":
            said = SAME if kind == "equal" else EXTRA
            found.append(Piece(" ".join(words[first:last]), said))
    return found


def _is_of(name: str, task: str) -> bool:
    return name == task or name.startswith((task + "_", task + "-"))
