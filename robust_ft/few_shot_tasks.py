"""The tasks of few-shot evaluation: what is drawn to tune on, and the answers that are ranked."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from robust_ft.data import cache, loader
from robust_ft.data.loader import EvalExample
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation
from robust_ft.few_shot import FewShot
from robust_ft.scoring import Scoring
from robust_ft.stage import stage_seed
from robust_ft.summary import FEW_SHOT


@dataclasses.dataclass(frozen=True, eq=False)
class RankedTask:
    """A task's examples, whose answer choices are ranked.

    Attributes:
        evaluation: The task, its split and how it is ranked.
        examples: In the split's order.
        choice_ids: The tokens of each example's choices.
        right: Whether each of an example's choices is right; False behind the last one.
    """

    evaluation: Evaluation
    examples: Sequence[EvalExample]
    choice_ids: Sequence[Sequence[Sequence[int]]]
    right: Bool[np.ndarray, "examples choices"]

    @classmethod
    def of(cls, evaluation: Evaluation) -> "RankedTask":
        """Reads a task.

        Raises:
            UserError: Examples lack answer choices, one is empty or there twice, or none is right.
        """
        examples, scoring = evaluation.read()
        most = max((len(example.answer_choices) for example in examples), default=0)
        right = np.zeros((len(examples), most), bool)
        for index, example in enumerate(examples):
            if problem := _problem(example, scoring, index, right[index]):
                raise UserError(
                    f"Task '{evaluation.task}' in FewShot.evaluations cannot be ranked: example "
                    f"{example.id} of split '{evaluation.split}' {problem}."
                )
        choice_ids = [evaluation.choice_ids(i, example) for i, example in enumerate(examples)]
        return cls(evaluation, examples, choice_ids, right)

    @property
    def random_accuracy(self) -> float:
        """The accuracy of guessing, in percent."""
        return float(np.mean([100 / len(example.answer_choices) for example in self.examples]))


def _problem(
    example: EvalExample, scoring: Scoring, index: int, right: Bool[np.ndarray, " choices"]
) -> str:
    """Fills in which of an example's choices are right; returns what is wrong with them, or ""."""
    choices = [choice.strip() for choice in example.answer_choices]
    if not choices:
        return "has no answer choices (`answer_choices`)"
    if "" in choices:
        return f"has an answer choice without text: {list(example.answer_choices)}"
    if twice := [choice for choice in choices if choices.count(choice) > 1]:
        return f"has the answer choice '{twice[0]}' twice"
    right[: len(choices)] = [scoring.is_right(index, each) for each in example.answer_choices]
    return "" if right.any() else f"has the answer '{example.targets_text}', which is no choice"


def check(few_shot: FewShot, seed: int) -> None:
    """Checks the examples of all tasks, whose caches are built where they are missing.

    Args:
        few_shot: What will run.
        seed: The recipe's.

    Raises:
        UserError: A task cannot be ranked, or has too few examples to draw from.
    """
    for evaluation in few_shot.evaluations:
        RankedTask.of(evaluation)
        drawn(few_shot, evaluation, seed, 0)


def drawn(few_shot: FewShot, evaluation: Evaluation, seed: int, draw: int) -> list[EvalExample]:
    """Returns the examples that a task's prompt is tuned on, a function of seed, task and draw.

    Args:
        few_shot: What runs.
        evaluation: The task.
        seed: The recipe's.
        draw: One of the seeds of few-shot tuning, from 0.

    Raises:
        UserError: There are too few.
    """
    data = few_shot.training_data(evaluation)
    size = sum(task.info.num_examples for task in cache.ensure(data))
    if size < few_shot.examples:
        raise UserError(
            f"Task '{data.task}' has {size} examples in its split '{data.split}', fewer than the "
            f"FewShot.examples={few_shot.examples} that are drawn; leave it out of "
            "FewShot.evaluations."
        )
    order = np.random.default_rng(stage_seed(seed, f"{tuning_name(data.task, draw)}/examples"))
    positions = order.choice(size, few_shot.examples, replace=False)
    return loader.eval_examples(data, positions=positions.tolist())


def tuning_name(task: str, draw: int) -> str:
    """Returns the name of a tuning, by which `stage_key` tells its randomness from others'."""
    return f"{FEW_SHOT}/{task}/{draw}"
