"""The results of few-shot evaluation: `MODEL_DIR/few_shot/<task>.jsonl`, an evaluation a line."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation
from robust_ft.few_shot import FewShot
from robust_ft.files import write_json_lines
from robust_ft.metric_writer import read_metrics
from robust_ft.summary import FEW_SHOT, Row

ZERO, LAST, BEST = "zero", "last", "best"

# (task, seed, which) of an evaluation; there is no seed at 0 shots.
Key = tuple[str, int | None, str]


@dataclasses.dataclass(frozen=True)
class Line:
    """One evaluation of a task.

    Attributes:
        task: Name of the task.
        dataset: The dataset that it belongs to.
        split: The split that was evaluated.
        shots: Number of examples that the prompt was tuned on; 0 for none.
        seed: Which draw of these examples; None at 0 shots.
        which: "zero" at 0 shots; the "last" or the "best" epoch (`FewShot.best_on`).
        epoch: Number of epochs that the prompt was tuned for.
        accuracy: In percent.
        random_accuracy: The accuracy of guessing, in percent.
        correct: 1 for each example that was answered right, else 0, in the split's order.
    """

    task: str
    dataset: str
    split: str
    shots: int
    seed: int | None
    which: str
    epoch: int
    accuracy: float
    random_accuracy: float
    correct: tuple[int, ...]

    @property
    def key(self) -> Key:
        return self.task, self.seed, self.which


def keys(few_shot: FewShot) -> list[Key]:
    """Returns all evaluations, in the order of each file."""
    tuned = [(seed, which) for seed in range(few_shot.seeds) for which in (LAST, BEST)]
    return [
        (evaluation.task, seed, which)
        for evaluation in few_shot.evaluations
        for seed, which in [(None, ZERO), *tuned]
    ]


class Results:
    """The lines of a run, in memory and in its folder.

    Args:
        directory: MODEL_DIR.
        few_shot: What runs.
        enabled: Whether to write.
    """

    def __init__(self, directory: Path, few_shot: FewShot, enabled: bool = True):
        self._directory = directory / FEW_SHOT
        self._few_shot = few_shot
        self._enabled = enabled
        self._lines: dict[Key, Line] = {}
        for task in dict.fromkeys(each.task for each in few_shot.evaluations):
            if self._file(task).exists():
                for number, entry in enumerate(read_metrics(self._file(task)), start=1):
                    try:
                        line = Line(**{**entry, "correct": tuple(entry["correct"])})
                    except (KeyError, TypeError):
                        raise UserError(
                            f"Evaluation {number} in {self._file(task)} cannot be understood; "
                            "delete the file to evaluate the task again."
                        ) from None
                    self._lines[line.key] = line

    def __len__(self) -> int:
        return len(self._lines)

    def missing(self) -> list[Key]:
        """Returns the evaluations that are not there yet."""
        return [key for key in keys(self._few_shot) if key not in self._lines]

    def add(self, lines: Iterable[Line]) -> None:
        """Adds lines that are missing; a file has its earlier content or the new one, whole."""
        new = [line for line in lines if line.key not in self._lines]
        self._lines |= {line.key: line for line in new}
        for task in dict.fromkeys(line.task for line in new):
            if self._enabled:
                self._directory.mkdir(parents=True, exist_ok=True)
                write_json_lines(self._file(task), map(dataclasses.asdict, self._of(task)))

    def rows(self) -> list[Row]:
        """Returns the rows for `summary.json`, means over seeds.

        The last epoch's is the task's `accuracy`, the best one's `accuracy_of_best_epoch`.
        """
        rows = []
        for evaluation in self._few_shot.evaluations:
            lines = self._of(evaluation.task)
            for which, metric in _METRICS.items():
                if found := [line for line in lines if line.which == which]:
                    rows.append(self._row(evaluation, metric, found))
        return rows

    def mean(self, which: str) -> float:
        """Returns the mean accuracy over tasks and seeds, in percent."""
        return float(np.mean([x.accuracy for x in self._lines.values() if x.which == which]))

    def mean_random(self) -> float:
        """Returns the mean accuracy of guessing over tasks, in percent."""
        found = [x.random_accuracy for x in self._lines.values() if x.which == ZERO]
        return float(np.mean(found))

    def _row(self, evaluation: Evaluation, metric: str, lines: list[Line]) -> Row:
        first = lines[0]
        return Row(
            FEW_SHOT,
            self._few_shot.epochs if first.shots else 0,
            first.task,
            evaluation.role,
            first.split,
            first.shots,
            metric,
            float(np.mean([line.accuracy for line in lines])),
            len(first.correct),
            without=() if first.shots else tuple(self._few_shot.zero_shot_without),
        )

    def _of(self, task: str) -> list[Line]:
        """Returns a task's lines, in the order of its file."""
        order = [key for key in keys(self._few_shot) if key[0] == task]
        return [self._lines[key] for key in order if key in self._lines]

    def _file(self, task: str) -> Path:
        return self._directory / f"{task}.jsonl"


_METRICS: Mapping[str, str] = {
    ZERO: "accuracy",
    LAST: "accuracy",
    BEST: "accuracy_of_best_epoch",
}
