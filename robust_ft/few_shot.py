"""Few-shot prompt tuning: how promptable a model is, at 0 shots and with a few examples a task."""

import dataclasses
from collections.abc import Iterable, Sequence

from robust_ft import optim, trainable
from robust_ft.data.cache import TaskData
from robust_ft.errors import UserError, nearest
from robust_ft.evaluate import Evaluation
from robust_ft.models.model import Model
from robust_ft.ranges import Count, check_ranges
from robust_ft.summary import FEW_SHOT

# What `FewShot.best_on` may be.
SPLIT, EXAMPLES = BEST_ON = ("split", "examples")


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Tunes a prompt on a few examples of each task, and evaluates it; and the model without.

    A recipe's last part (`Recipe.few_shot`), run when all stages have finished. Every task is
    ranked at 0 shots, and once for each seed after its prompt was tuned on one batch of
    `examples`, the same in every epoch, while all else is frozen ("Continued Pretraining for
    Better Zero- and Few-Shot Promptability", section 4 and appendix C). Prompts that no stage has
    trained start anew for each seed; trained ones start as they are.

    The last epoch is what the paper reports. The original code also keeps the best one, and it
    chooses it by the accuracy on the very examples that are reported (`best_on='split'`): an upper
    bound, not a result. With `best_on='examples'` the epoch with the lowest loss on the few
    examples is the best, for which no more labels are needed.

    Attributes:
        model: The model, with the prompt that is tuned.
        restore: Where parameters come from, as in `Stage.restore`: a checkpoint's path,
            `"stage:<name>"` of a stage of the recipe, or "scratch".
        evaluations: The tasks: evaluations whose examples have answer choices.
        data: The split that examples are drawn from, their lengths and vocabulary; its task and
            module are each evaluation's.
        datasets: Names of datasets. A task belongs to the longest one that its name begins with,
            as "rte" or "rte_template".
        optimizer: Optimizer and learning rate.
        trainable: What is tuned, as in `Stage.trainable`.
        examples: Number of examples that a prompt is tuned on, one batch.
        epochs: Number of updates, each on all examples.
        seeds: Number of tunings of each task; each draws other examples, and values of a prompt
            that starts anew. Seeds are counted from 0, and depend on the recipe's.
        zero_shot_without: Names of PEFT methods that are removed at 0 shots: those that no stage
            has trained.
        best_on: How the best epoch is chosen: by the accuracy on the evaluated "split", or by the
            loss on the "examples".
        eval_period: Epochs between those among which the best is chosen; the last is one of them.
        side_by_side: The most tunings that run in one program, vectorized; of more, some wait.
    """

    model: Model
    restore: str
    evaluations: Sequence[Evaluation]
    data: TaskData
    datasets: Sequence[str]
    optimizer: optim.Optimizer
    trainable: Sequence[str] = (trainable.PEFT,)
    examples: Count = 16
    epochs: Count = 100
    seeds: Count = 1
    zero_shot_without: Sequence[str] = ()
    best_on: str = SPLIT
    eval_period: Count = 10
    side_by_side: Count = 8

    def __post_init__(self) -> None:
        for field in ("trainable", "evaluations", "datasets", "zero_shot_without"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        check_ranges(self)
        if self.best_on not in BEST_ON:
            raise UserError(
                f"FewShot.best_on='{self.best_on}' must be one of {', '.join(BEST_ON)}."
                + nearest(self.best_on, BEST_ON)
            )
        self._check_model()
        if not self.evaluations:
            raise UserError("FewShot.evaluations is empty; name the tasks to evaluate.")
        for evaluation in self.evaluations:
            self._check_evaluation(evaluation)
            self.dataset(evaluation.task)
        tasks = [evaluation.task for evaluation in self.evaluations]
        if twice := [task for task in tasks if tasks.count(task) > 1]:
            raise UserError(
                f"FewShot.evaluations names task '{twice[0]}' twice; evaluate each on one split."
            )

    @property
    def name(self) -> str:
        return FEW_SHOT

    def dataset(self, task: str) -> str:
        """Returns the dataset that a task belongs to.

        Raises:
            UserError: It belongs to none.
        """
        owners = [each for each in self.datasets if task == each or task.startswith(f"{each}_")]
        if not owners:
            raise UserError(
                f"Task '{task}' in FewShot.evaluations belongs to none of FewShot.datasets: "
                f"{', '.join(self.datasets) or 'there are none'}; name the dataset with which its "
                "name begins." + nearest(task, self.datasets)
            )
        return max(owners, key=len)

    def training_data(self, evaluation: Evaluation) -> TaskData:
        """Returns the data that an evaluated task's examples are drawn from."""
        task = evaluation.data
        return dataclasses.replace(
            self.data, task=task.task, module=task.module, file_tasks=task.file_tasks
        )

    def trainable_paths(self) -> frozenset[str]:
        """Returns the paths of the parameters that are tuned.

        Raises:
            UserError: A pattern is no regular expression, or names no parameter of the model.
        """
        shapes, owns = self.model.shapes(), self.model.peft_owns
        try:
            paths = trainable.trainable_paths(shapes, self.trainable, owns)
        except UserError as error:
            raise UserError(f"FewShot.trainable={list(self.trainable)}: {error}") from None
        return self.model.without_fixed(paths)

    def check_zero_shot(self, fresh: Iterable[str]) -> None:
        """Raises a UserError if 0 shots would be evaluated with values drawn at random.

        Args:
            fresh: Paths of the parameters that nothing restores.
        """
        for path in sorted(fresh):
            for method in self.model.without(*self.zero_shot_without).peft:
                if method.owns(path):
                    raise UserError(
                        f"FewShot.zero_shot_without lacks '{method.name}', whose '{path}' no stage "
                        f"has trained and FewShot.restore='{self.restore}' does not hold: 0 shots "
                        "would be evaluated with random values."
                    )

    def _check_model(self) -> None:
        names = [method.name for method in self.model.peft]
        for name in self.zero_shot_without:
            if name not in names:
                raise UserError(
                    f"FewShot.zero_shot_without names '{name}', but FewShot.model has "
                    f"{', '.join(names) or 'no PEFT methods'}." + nearest(name, names)
                )
        if self.model.tasks:
            raise UserError(
                "FewShot.model has a prompt for each of the tasks "
                f"{', '.join(self.model.tasks[:3])}; few-shot tuning starts from one for all."
            )

    def _check_evaluation(self, evaluation: Evaluation) -> None:
        if not isinstance(evaluation, Evaluation):
            raise UserError(
                f"FewShot.evaluations has a {type(evaluation).__name__}, but only the evaluation "
                "of a task has answer choices to rank."
            )
        instead = {
            "shots": "examples are tuned on, not put before the input",
            "detach": "FewShot.zero_shot_without removes methods at 0 shots",
            "prompts": "each task has the prompt that is tuned",
        }
        for field, reason in instead.items():
            if value := getattr(evaluation, field):
                raise UserError(
                    f"Evaluation.{field}={value!r} of task '{evaluation.data.task}' in "
                    f"FewShot.evaluations has no meaning: {reason}; leave it out."
                )
