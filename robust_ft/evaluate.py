"""Evaluates a task: decodes or ranks the examples of a split and computes the task's metrics.

The finetuned task is the *target*, its data from elsewhere are *out of distribution* (OOD), and
every other task is *held out*. ProMoT evaluates the target with the soft prompt and held-out tasks
without it (ProMoT, section 4, "Evaluation").
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from robust_ft import metrics, ranking, task_names
from robust_ft.data import cache, loader
from robust_ft.data.cache import TaskData
from robust_ft.decoding import Decoder, NotANumber
from robust_ft.errors import UserError, nearest
from robust_ft.evaluator import HELD_OUT, OOD, TARGET, EvalContext, Evaluator, Result
from robust_ft.metrics.format_share import format_share
from robust_ft.metrics.postprocess import promot
from robust_ft.models.model import LanguageModel
from robust_ft.predictor import BasePredictor
from robust_ft.ranges import Count, Range, Whole, check, check_ranges
from robust_ft.scoring import Scoring

ALL = "all"  # of Evaluation.detach


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluates a task; an `Evaluator`.

    Attributes:
        data: The task and its split; `data.task` is the name without the number of shots.
        decoder: How outputs are decoded.
        shots: Number of exemplars in the input; above 0 the task is `"<task>_<shots>shot"`.
        role: "target" (the finetuned task), "ood" (the same task on out-of-distribution data) or
            "held_out".
        detach: Names of PEFT methods that are removed from the model for this task, or "all".
        batch_size: Examples decoded at once.
        limit: Number of examples, spread over the split; None for all.
        target_format: A regex for outputs in the target task's format; the share of matching
            outputs is reported as `format_share`.
        per_token: For rank classification, which evaluates examples with answer choices: whether
            to divide each choice's log-likelihood by its number of tokens.
        prompts: Names in `Model.tasks`, for a prompt ensemble: the majority vote over these
            prompts, which are decoded in one batch; the earliest prompt wins ties (Lester et al.,
            2021, section 6). Metrics of the single prompts are reported as
            `<metric>_prompt_average` and `<metric>_prompt_best`. By default the task's own prompt,
            where tasks have prompts.
    """

    data: TaskData
    decoder: Decoder
    shots: Whole = 0
    role: str = TARGET
    detach: tuple[str, ...] | str = ()
    batch_size: Count = 32
    limit: Count | None = None
    target_format: str | None = None
    per_token: bool = False
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise UserError(f"Evaluation.prompts must be a list; write ['{self.prompts}'].")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.detach != ALL:
            object.__setattr__(self, "detach", tuple(self.detach))
        check_ranges(self, f" of the evaluation on '{self.data.task}'")

    @property
    def task(self) -> str:
        """The task's name with its number of shots."""
        return task_names.with_shots(self.data.task, self.shots)

    @property
    def split(self) -> str:
        return self.data.split

    def detached(self, model: LanguageModel) -> tuple[str, ...]:
        """Returns the names of the model's PEFT methods that are removed for this task.

        Raises:
            UserError: `detach` names one that the model does not have.
        """
        names = tuple(method.name for method in model.peft)
        if self.detach == ALL:
            return names
        for name in self.detach:
            if name not in names:
                raise UserError(
                    f"The evaluation on '{self.task}' detaches '{name}', but the model has "
                    f"{', '.join(names) or 'no PEFT methods'}." + nearest(name, names)
                )
        return tuple(self.detach)

    @property
    def task_data(self) -> TaskData:
        """The data of the task with its shots."""
        return dataclasses.replace(self.data, task=self.task)

    def read(self) -> tuple[Sequence[loader.EvalExample], Scoring]:
        """Returns the examples, from the task's cache, and how outputs are scored."""
        examples, info = _examples(self.task_data, self.limit)
        return examples, Scoring(info, examples)

    def __call__(self, context: EvalContext) -> Result:
        """Decodes or ranks all examples and computes the task's metrics.

        Raises:
            UserError: The task names no metric that can select checkpoints, only some examples
                have answer choices, or the model has no such prompt.
        """
        examples, scoring = self.read()
        numbers = range(len(examples))
        # Of each example an output, and a vote, for each prompt.
        outputs: list[list[str]] = []
        if scoring.needs_outputs or self.target_format is not None:
            outputs = self.outputs(context.predictor, examples)
        votes = [[scoring.prediction(i, text) for text in outputs[i]] for i in range(len(outputs))]
        # Of equally frequent votes `max` takes the first.
        predictions = [max(each, key=each.count) for each in votes]
        scores = self._scores(context.predictor, examples) if scoring.needs_scores else None
        values = scoring.values(predictions, scores)
        if self.prompts:
            each_prompt = zip(*votes, strict=True)
            values |= _of_prompts([scoring.values(each, scores) for each in each_prompt])
        if self.target_format is not None:
            winners = [
                promot(output[vote.index(prediction)])
                for output, vote, prediction in zip(outputs, votes, predictions, strict=True)
            ]
            values["format_share"] = format_share(winners, self.target_format)
        columns = {"prediction": predictions} if outputs else {}
        if scores is not None:
            columns["score"] = scores.tolist()
        records = [
            scoring.record(i, **{name: column[i] for name, column in columns.items()})
            for i in numbers
        ]
        return Result(
            self.data.task, self.split, self.role, values, len(records), records, self.shots
        )

    def _scores(
        self, predictor: BasePredictor, examples: Sequence[loader.EvalExample]
    ) -> Float[np.ndarray, " examples"]:
        """Returns the log-likelihood of each example's target, by the tokens in the cache."""
        if self.prompts:
            raise UserError(
                f"Task '{self.task}' has a metric of scores, on which the prompts "
                f"{', '.join(self.prompts)} cannot vote; leave out Evaluation.prompts."
            )
        try:
            ranked = predictor.rank_tokens(
                [example.inputs.tolist() for example in examples],
                [[example.targets.tolist()] for example in examples],
                False,
                self.data.inputs_length,
                self.batch_size,
                self.task if predictor.model.tasks else None,
            )
        except NotANumber as error:
            raise self._broken(error.row, examples[error.row], ()) from None
        return ranked.scores[:, 0]

    def outputs(
        self, predictor: BasePredictor, examples: Sequence[loader.EvalExample]
    ) -> list[list[str]]:
        """Returns each example's outputs, one for each prompt."""
        model, prompts = predictor.model, self.prompts
        if prompts and not model.tasks:
            raise UserError(
                f"The evaluation on '{self.task}' asks for the prompts {', '.join(prompts)}, but "
                "no task has a prompt of its own in this model."
            )
        if not prompts and model.tasks:
            prompts = (self.task,)
        with_choices = sum(bool(example.answer_choices) for example in examples)
        if 0 < with_choices < len(examples):
            raise UserError(
                f"Task '{self.task}' has answer choices for {with_choices} of {len(examples)} "
                "examples; give them to all or to none."
            )
        if with_choices:
            return self._rank(predictor, examples, prompts)
        return self._decode(predictor, examples, [model.task_index(name) for name in prompts])

    def _rank(
        self,
        predictor: BasePredictor,
        examples: Sequence[loader.EvalExample],
        prompts: Sequence[str],
    ) -> list[list[str]]:
        """Returns each example's likeliest answer choice under each prompt."""
        choices = [self.choice_ids(i, example) for i, example in enumerate(examples)]
        copies = [example for example in examples for _ in prompts or [""]]
        try:
            ranked = predictor.rank_tokens(
                [example.inputs.tolist() for example in copies],
                [ids for ids in choices for _ in prompts or [""]],
                self.per_token,
                self.data.inputs_length,
                self.batch_size,
                list(prompts) * len(examples) or None,
            )
        except NotANumber as error:
            raise self._broken(error.row, copies[error.row], prompts) from None
        answers = [copies[i].answer_choices[best] for i, best in enumerate(ranked.best)]
        per_example = len(copies) // len(examples)
        return [answers[i : i + per_example] for i in range(0, len(answers), per_example)]

    def choice_ids(self, index: int, example: loader.EvalExample) -> list[list[int]]:
        """Returns the tokens of an example's choices, which end as its target does in the cache."""
        length, vocabulary = self.data.targets_length, self.data.vocabulary
        choices = ranking.encoded_choices(vocabulary, index, example.answer_choices, length)
        targets = example.targets.tolist()
        if targets[-1:] != [vocabulary.eos_id] and len(targets) < length:
            return [ids[:-1] if ids[-1:] == [vocabulary.eos_id] else ids for ids in choices]
        return choices

    def _decode(
        self,
        predictor: BasePredictor,
        examples: Sequence[loader.EvalExample],
        prompts: Sequence[int],
    ) -> list[list[str]]:
        """Returns each example's decoded output under each prompt, given by its index."""
        data = self.data
        outputs: dict[int, list[str]] = {}
        batches = loader.eval_batches(
            examples, self.batch_size, data.inputs_length, data.vocabulary.pad_id
        )
        for batch in batches:
            # Padding rows repeat a real one: decoding ends when all rows have ended.
            is_padding = batch["example_index"] < 0
            for name, rows in batch.items():
                if name != "example_index":
                    rows[is_padding] = rows[0]
            indices = batch["example_index"]
            if prompts:
                # [batch * prompts, ...]: the copies of an example stand together.
                batch = {
                    name: np.repeat(rows, len(prompts), axis=0) for name, rows in batch.items()
                }
                batch["task_index"] = np.tile(np.array(prompts, np.int32), len(indices))
            try:
                decoded = predictor.generate(batch, self.decoder)
            except NotANumber as error:
                index = int(indices[error.row // max(len(prompts), 1)])
                names = [predictor.model.tasks[prompt] for prompt in prompts]
                raise self._broken(error.row, examples[index], names) from None
            best = np.asarray(decoded.tokens)[:, 0]  # [batch * prompts, length]
            by_example = best.reshape(len(indices), -1, best.shape[-1])
            for index, copies in zip(indices, by_example, strict=True):
                if index >= 0:
                    outputs[int(index)] = [predictor.text(tokens) for tokens in copies]
        return [outputs[i] for i in range(len(examples))]

    def _broken(self, row: int, example: loader.EvalExample, prompts: Sequence[str]) -> NotANumber:
        """Returns the error for a row of copies of examples, of which each prompt has one."""
        under = f" under the prompt of '{prompts[row % len(prompts)]}'" if prompts else ""
        what = f"example {example.id} of task '{self.task}', split '{self.split}'{under}"
        return NotANumber(row, what)


def of_tasks(evaluators: Iterable[Evaluator]) -> list[Evaluation]:
    """Returns the evaluations of tasks; the other evaluators are analyses."""
    return [evaluator for evaluator in evaluators if isinstance(evaluator, Evaluation)]


def suite(
    split: str,
    target: Evaluation,
    held_out: Evaluation | None = None,
    held_out_tasks: Mapping[int, Sequence[str]] | None = None,
    target_tasks: Sequence[str] | None = None,
    ood_tasks: Sequence[str] = (),
    limit: Count | None = None,
) -> tuple[Evaluation, ...]:
    """Returns an evaluation for each target, OOD task, and held-out task and number of shots.

    Args:
        split: The split of every task.
        target: How to evaluate the finetuned task.
        held_out: How to evaluate the others; its task is a placeholder.
        held_out_tasks: Names of tasks for each number of shots.
        target_tasks: Names of the finetuned tasks; by default the one that `target` names. A
            mixture has several.
        ood_tasks: Names of the out-of-distribution tasks, evaluated like the target.
        limit: Number of examples of each task, spread over its split; None for all.
    """
    check("suite.limit", limit, Range(least=1), "at least 1, or None")

    def on(evaluation: Evaluation, task: str, role: str, shots: int) -> Evaluation:
        data = dataclasses.replace(evaluation.data, task=task, split=split)
        return dataclasses.replace(evaluation, data=data, role=role, shots=shots, limit=limit)

    if target_tasks is None:
        target_tasks = [target.data.task]
    evaluations = [on(target, task, TARGET, target.shots) for task in target_tasks]
    evaluations += [on(target, task, OOD, target.shots) for task in ood_tasks]
    if held_out is not None:
        evaluations += [
            on(held_out, task, HELD_OUT, shots)
            for shots, tasks in (held_out_tasks or {}).items()
            for task in tasks
        ]
    return tuple(evaluations)


@functools.lru_cache(maxsize=64)
def _examples(
    data: TaskData, limit: int | None
) -> tuple[Sequence[loader.EvalExample], cache.CacheInfo]:
    (cached,) = cache.ensure(data)
    return loader.eval_examples(data, limit), cached.info


def _of_prompts(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean and the best of each metric over prompts, given each prompt's values."""
    values: dict[str, float] = {}
    for name in scores[0]:
        each = [score[name] for score in scores]
        best = min(each) if metrics.is_less_better(name) else max(each)
        values[f"{name}_prompt_average"] = float(np.mean(each))
        values[f"{name}_prompt_best"] = best
    return values
