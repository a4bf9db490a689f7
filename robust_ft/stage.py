"""A stage of a recipe: data only."""

import dataclasses
import zlib
from collections.abc import Sequence

import jax

from robust_ft import optim, trainable
from robust_ft.data.cache import TaskData
from robust_ft.data.replay import Replay
from robust_ft.errors import UserError, nearest
from robust_ft.evaluator import TARGET, Evaluator
from robust_ft.models.model import Model
from robust_ft.models.peft import Peft
from robust_ft.objectives import CrossEntropy, Objective, Penalty, cross_entropy_of
from robust_ft.objectives.gradients import GradientFn, backprop
from robust_ft.objectives.meta_learning import MetaLearning
from robust_ft.ranges import Count, Rate, Whole, check_ranges

# The prefix of `Stage.restore` and `Stage.teacher` that names an earlier stage.
STAGE = "stage:"
SCRATCH = "scratch"
# As a teacher: the pretrained model behind the stage, see `Stage.teacher`.
PRETRAINED = "pretrained"

TYPES = ("bfloat16", "float32")
# What `Stage.on_nonfinite` may be.
STOP, SKIP = ON_NONFINITE = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe: what trains, on which data, and for how long.

    Attributes:
        name: The stage's folder in MODEL_DIR, and what `"stage:<name>"` refers to.
        model: The model with the PEFT methods of this stage.
        restore: Where parameters come from: a checkpoint's path, `"stage:<name>"` of an earlier
            stage, or "scratch".
        trainable: "peft" for the parameters of the model's PEFT methods, "base" for all others,
            or regexes, which must match a parameter's path in full; behind "!", what is left out of
            those before it.
        data: The training data.
        steps: Number of updates.
        batch_size: Examples per update; with packing, packed rows; with a meta-learning rule,
            examples in each support or query batch of a task.
        optimizer: Optimizer and learning rate.
        objective: The loss.
        penalty: Added to the mean loss, a term of parameters alone that holds those of the
            pretrained model to what they were at the stage's start.
        teacher: The objective's teacher, if it needs one: `"stage:<name>"` of an earlier stage;
            "pretrained", the model that this stage or the first one before it restored, without
            PEFT methods; or a model directory, optionally with an adapter, such as
            "DIRECTORY,EXPORT".
        teacher_dtype: Dtype of the teacher's parameters, "bfloat16" or "float32". Those of the
            pretrained model that this stage holds frozen are not kept again: they have its dtype.
        gradient: The gradient rule.
        gradient_dtype: Dtype of gradients until they are applied, such as "bfloat16" to save
            memory; by default each parameter's own.
        ema_decay: The trained parameters' exponential moving average is evaluated, selected and
            handed on in their place: it starts at the stage's start and forgets 1 - `ema_decay` of
            itself in each step. None for the parameters themselves.
        microbatches: Number of microbatches over which gradients are accumulated; with a
            meta-learning rule, of groups of tasks.
        replay: Other examples that are mixed into the data; None for none.
        packing: Whether to pack several short examples into one row.
        by_length: Length bucketing: the examples of this many batches are re-sorted into length
            buckets and padded to the bucket's length. Up to four programs are compiled; 0 for off.
        evaluations: Evaluations of tasks, or analyses, run before the first step, every
            `eval_period` steps and after the last step. The mean score of those with the role
            "target" scores the checkpoint.
        final_evaluations: Run once on the selected checkpoint, and before the recipe's first step.
        final_kept: Whether final evaluations of held-out tasks that detach PEFT methods are
            repeated with these kept, so that both scores are there.
        eval_period: Steps between evaluations, each followed by a checkpoint.
        log_period: Steps between lines of training metrics.
        select_best: Whether to select the checkpoint with the best score; otherwise the last.
        patience: The stage ends when this many evaluations in a row have no better score than an
            earlier checkpoint's; None for all `steps`. The learning rate follows its schedule.
        on_nonfinite: What a step does whose loss or parameters are NaN or infinite: "stop" ends the
            run before anything of it is saved; "skip" leaves parameters and optimizer as they were,
            which takes memory for a second copy of them, and counts such steps as `skipped`.
    """

    name: str
    model: Model
    restore: str
    trainable: Sequence[str]
    data: TaskData
    steps: Count
    batch_size: Count
    optimizer: optim.Optimizer
    objective: Objective = CrossEntropy()
    penalty: Penalty | None = None
    teacher: str | None = None
    teacher_dtype: str = "bfloat16"
    gradient: GradientFn | MetaLearning = backprop
    gradient_dtype: str | None = None
    ema_decay: Rate | None = None
    microbatches: Count = 1
    replay: Replay | None = None
    packing: bool = False
    by_length: Whole = 0
    evaluations: Sequence[Evaluator] = ()
    final_evaluations: Sequence[Evaluator] = ()
    final_kept: bool = True
    eval_period: Count = 1000
    log_period: Count = 20
    select_best: bool = True
    patience: Count | None = None
    on_nonfinite: str = STOP

    def __post_init__(self) -> None:
        for field in ("trainable", "evaluations", "final_evaluations"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.trainable:
            raise UserError(f"Stage '{self.name}' trains nothing; give Stage.trainable a pattern.")
        check_ranges(self, f" of stage '{self.name}'")
        self._check_microbatches()
        self._check_replay()
        for field, known in (
            ("gradient_dtype", TYPES),
            ("teacher_dtype", TYPES),
            ("on_nonfinite", ON_NONFINITE),
        ):
            value = getattr(self, field)
            if value is not None and value not in known:
                raise UserError(
                    f"Stage.{field}='{value}' of stage '{self.name}' must be one of "
                    f"{', '.join(known)}." + nearest(value, known)
                )
        scored = any(getattr(each, "role", None) == TARGET for each in self.evaluations)
        if self.patience is not None and not (self.select_best and scored):
            raise UserError(
                f"Stage.patience={self.patience} of stage '{self.name}' waits for a better score, "
                f"so it needs Stage.select_best=True and evaluations with the role '{TARGET}'."
            )
        objective = type(self.objective).__name__
        if self.objective.takes_teacher and self.teacher is None:
            raise UserError(
                f"The objective of stage '{self.name}' is a {objective}, which needs a teacher; "
                "set Stage.teacher='stage:NAME', 'pretrained' or to a model directory."
            )
        if self.teacher is not None and not self.objective.takes_teacher:
            raise UserError(
                f"Stage '{self.name}' has the teacher '{self.teacher}', from which its objective "
                f"{objective} learns nothing; choose one that does, such as a Cocktail."
            )
        hard = cross_entropy_of(self.objective)
        if hard is not None and hard.takes_teacher and (self.teacher or "").startswith(STAGE):
            raise UserError(
                f"{type(hard.token_weights).__name__} weighs tokens by the pretrained model's "
                f"losses, but stage '{self.name}' has the teacher '{self.teacher}'; set "
                "CrossEntropy.token_weights=None, or Stage.teacher='pretrained'."
            )

    @property
    def examples_per_step(self) -> int:
        """Examples of an update, of all its tasks and batches with a meta-learning rule."""
        rule = self.gradient
        episodes = rule.tasks * rule.batches if isinstance(rule, MetaLearning) else 1
        return self.batch_size * episodes

    def is_over(self, step: int, best: int | None) -> bool:
        """Returns whether the stage ends after a step, at which it may have been evaluated.

        Args:
            step: Number of steps done.
            best: The step of the checkpoint with the best score, if any has one.
        """
        if step >= self.steps:
            return True
        if self.patience is None or best is None:
            return False
        return step // self.eval_period - best // self.eval_period >= self.patience

    def _check_microbatches(self) -> None:
        where = f"of stage '{self.name}'"
        if not isinstance(self.gradient, MetaLearning):
            if self.batch_size % self.microbatches:
                raise UserError(
                    f"Stage.microbatches={self.microbatches} {where} does not divide its "
                    f"batch_size={self.batch_size}."
                )
            return
        rule, tasks = type(self.gradient).__name__, self.gradient.tasks
        if tasks % self.microbatches:
            divisors = [n for n in range(1, tasks + 1) if tasks % n == 0]
            near = sorted(divisors, key=lambda n: abs(n - self.microbatches))[:2]
            raise UserError(
                f"Stage.microbatches={self.microbatches} {where} are groups of a meta-batch's "
                f"tasks, and {rule}.tasks={tasks} is no multiple of it; choose "
                f"{' or '.join(map(str, sorted(near)))}."
            )
        if self.gradient.carries_state and self.microbatches != tasks:
            raise UserError(
                f"{rule}.carries_state=True takes one task after the other: set "
                f"Stage.microbatches={tasks} {where}, its {rule}.tasks."
            )
        for field in ("packing", "by_length"):
            if value := getattr(self, field):
                raise UserError(
                    f"Stage.{field}={value} {where} mixes the examples of several tasks, but the "
                    f"batches of a {rule} are of one task each; leave it out."
                )

    @property
    def prompts_are_left_out(self) -> bool:
        """Whether replayed rows are without the soft prompts that the model has."""
        has_prompt = any(type(method).embed is not Peft.embed for method in self.model.peft)
        return self.replay is not None and not self.replay.prompts and has_prompt

    @property
    def rows(self) -> TaskData:
        """The data with the lengths of a batch's rows."""
        return self.data if self.replay is None else self.replay.widened(self.data)

    def _check_replay(self) -> None:
        if self.replay is None:
            return
        where = f"of stage '{self.name}'"
        if isinstance(self.gradient, MetaLearning):
            raise UserError(
                f"Stage.replay {where} mixes examples of other tasks in, but the batches of a "
                f"{type(self.gradient).__name__} are of one task each; leave it out."
            )
        prefixes = [m.name for m in self.model.peft if type(m).kv is not Peft.kv]
        if prefixes and not self.replay.prompts:
            raise UserError(
                f"Replay.prompts=False {where} leaves prompts out of replayed rows, but "
                f"'{prefixes[0]}', a prefix, is the same for all rows of a batch; set "
                "Replay.prompts=True."
            )

    def trainable_paths(self) -> frozenset[str]:
        """Returns the paths of the parameters that train.

        Raises:
            UserError: A pattern is no regular expression, or names no parameter of the model; or a
                meta-learning rule tunes what does not train.
        """
        shapes, owns = self.model.shapes(), self.model.peft_owns
        paths = trainable.trainable_paths(shapes, self.trainable, owns)
        paths = self.model.without_fixed(paths)
        if isinstance(self.gradient, MetaLearning):
            for path in sorted(self.gradient.paths(self.model) - paths):
                raise UserError(
                    f"{type(self.gradient).__name__}.tunes names '{path}', which does not train in "
                    f"stage '{self.name}'; name it in Stage.trainable, too."
                )
        return paths


def stage_seed(seed: int, stage: str) -> int:
    """Returns a stage's own seed, so that no two stages share randomness."""
    return zlib.crc32(f"{seed}/{stage}".encode())


def stage_key(seed: int, stage: str, use: str) -> jax.Array:
    """Returns the key for one use of randomness in a stage.

    Uses have names, not numbers: `split(key)[i]` and `fold_in(key, i)` are the same key, so numbers
    would collide.
    """
    return jax.random.key(stage_seed(seed, f"{stage}/{use}"))
