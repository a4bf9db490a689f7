"""Reads the evaluations of few-shot tuning: `MODEL_DIR/few_shot/<task>.jsonl`, one a line."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from robust_ft.errors import UserError, nearest
from robust_ft.metric_writer import read_metrics
from robust_ft.summary import FEW_SHOT

WHICH = ("zero", "last", "best")
_FIELDS = (
    "task", "dataset", "split", "shots", "seed", "which", "epoch", "accuracy", "random_accuracy",
    "correct",
)  # fmt: skip
_TOLERANCE = 0.01  # of accuracies, which may be rounded


class Template(NamedTuple):
    """A task under one template, and on what it was evaluated; other examples are another one.

    Attributes:
        task: Name of the task.
        dataset: Name of the dataset that its template words.
        split: The split that was evaluated.
        num_examples: Number of examples in it.
        random_accuracy: Accuracy of guessing among the choices, 0..100; None if it is unknown.
        examples: A hash of the examples, "" if the run did not record it.
    """

    task: str
    dataset: str
    split: str
    num_examples: int
    random_accuracy: float | None
    examples: str = ""


class Setting(NamedTuple):
    """How a model was evaluated.

    Attributes:
        shots: Number of examples that the prompt was tuned on; 0 for none.
        which: "zero" without tuning; the "last" or the "best" epoch of a tuning.
    """

    shots: int
    which: str

    @property
    def text(self) -> str:
        """Returns it in words: "16-shot, last epoch"."""
        return f"{self.shots}-shot" + (f", {self.which} epoch" if self.shots else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """One evaluation.

    Attributes:
        template: What was evaluated.
        setting: How.
        seed: The draw of the examples that the prompt was tuned on; None at 0 shots.
        correct: Whether each example was answered right, in the split's order.
    """

    template: Template
    setting: Setting
    seed: int | None
    correct: Bool[np.ndarray, "examples"]


def read(folder: pathlib.Path, contents: Mapping[str, Any] | None = None) -> list[Evaluated]:
    """Reads all evaluations of a run, sorted by task; none if it has no such files.

    Args:
        folder: MODEL_DIR.
        contents: The settings that the run recorded, which have a hash of each task's examples.

    Raises:
        UserError: A line lacks a field or contradicts itself, or an evaluation is there twice.
    """
    evaluations = []
    seen: dict[tuple[str, str, Setting, int | None], pathlib.Path] = {}
    for path in sorted((folder / FEW_SHOT).glob("*.jsonl")):
        for number, line in enumerate(read_metrics(path), start=1):
            found = _evaluated(line, f"Evaluation {number} in {path}", contents or {})
            template = found.template
            key = (template.task, template.split, found.setting, found.seed)
            if key in seen:
                raise UserError(
                    f"Evaluation {number} in {path} is there twice: {found.setting.text} of "
                    f"'{template.task}' with seed {found.seed} is also in {seen[key]}; keep one."
                )
            seen[key] = path
            evaluations.append(found)
    return evaluations


def _evaluated(line: Mapping[str, Any], place: str, contents: Mapping[str, Any]) -> Evaluated:
    for field in _FIELDS:
        if field not in line:
            raise UserError(f"{place} has no '{field}'.{nearest(field, line)}")
    try:
        task, split, which = str(line["task"]), str(line["split"]), str(line["which"])
        shots, accuracy = int(line["shots"]), float(line["accuracy"])
        seed = None if line["seed"] is None else int(line["seed"])
        chance = None if line["random_accuracy"] is None else float(line["random_accuracy"])
        answers = [int(answer) for answer in line["correct"]]
    except (TypeError, ValueError):
        shown = {name: value for name, value in line.items() if name != "correct"}
        raise UserError(f"{place} cannot be understood: {shown}.") from None
    if which not in WHICH or (which == "zero") != (shots == 0) or (seed is None) != (shots == 0):
        raise UserError(
            f"{place} has which='{which}', shots={shots} and seed={seed}; 0 shots are 'zero' "
            "without a seed, tunings are 'last' or 'best' with one."
        )
    if not answers or not set(answers) <= {0, 1}:
        raise UserError(f"{place} needs 'correct' to hold 0 or 1 for each example.")
    if abs(accuracy - 100 * sum(answers) / len(answers)) > _TOLERANCE:
        raise UserError(
            f"{place} has accuracy={accuracy:g}, but {sum(answers)} of {len(answers)} in 'correct'."
        )
    if chance is not None:
        known = math.isfinite(chance) and 0 < chance <= 100
        chance = round(chance, 6) if known else None
    examples = str(contents.get(f"data.{task}.{split}.examples", ""))
    template = Template(task, str(line["dataset"]), split, len(answers), chance, examples)
    return Evaluated(template, Setting(shots, which), seed, np.array(answers, bool))
