"""Evaluations: decode a task's split, score it, and keep what was said.

The finetuned task is the *target*, its data from elsewhere are *out of distribution* (OOD), and
every other task is *held out*. ProMoT evaluates the target with the soft prompt and held-out tasks
without it (ProMoT, section 4, "Evaluation").
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from robust_ft import metrics, task_names
from robust_ft.data import cache, loader
from robust_ft.data.cache import TaskData
from robust_ft.decoding import Decoder
from robust_ft.errors import UserError, nearest
from robust_ft.files import write_json_lines
from robust_ft.metrics.format_share import format_share
from robust_ft.metrics.norm_avg import norm_avg
from robust_ft.metrics.postprocess import promot
from robust_ft.models.model import LanguageModel
from robust_ft.predictor import BasePredictor

TARGET, OOD, HELD_OUT = "target", "ood", "held_out"
ALL = "all"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One task to evaluate on: what data, how to decode, what to count.

    Attributes:
        data: The task and its split; `data.task` is the name without the number of shots.
        decoder: How outputs are decoded.
        shots: Number of exemplars in the input; above 0 the task is `"<task>_<shots>shot"`.
        role: "target" (what is being finetuned), "ood" (the same task on other data) or "held_out".
        detach: Names of PEFT methods that are removed from the model for this task, or "all".
        batch_size: Examples decoded at once.
        limit: Only the first so many examples, or None for all.
        target_format: A regex for outputs in the target task's format; the share of matching
            outputs is reported as `format_share`.
        per_token: Examples with answer choices are not decoded: the likeliest choice is the output
            (rank classification). This divides log-likelihoods by the choices' numbers of tokens.
        prompts: Names in `Model.tasks`: each example is answered with the prompt of each, all in
            one batch, and the answer that most give is taken, of equally many the earliest
            prompt's (Lester et al., 2021, section 6). Each metric is reported of this ensemble, and
            as `<metric>_prompt_average` and `<metric>_prompt_best` of the prompts alone. By default
            the task's own prompt answers, where tasks have prompts.
    """

    data: TaskData
    decoder: Decoder
    shots: int = 0
    role: str = TARGET
    detach: tuple[str, ...] | str = ()
    batch_size: int = 32
    limit: int | None = None
    target_format: str | None = None
    per_token: bool = False
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise UserError(f"Evaluation.prompts must be a list; write ['{self.prompts}'].")
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.detach != ALL:
            object.__setattr__(self, "detach", tuple(self.detach))
        for field in ("batch_size", "limit"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(
                    f"{field}={value} of the evaluation on '{self.task}' must be at least 1."
                )

    @property
    def task(self) -> str:
        return task_names.with_shots(self.data.task, self.shots)

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


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
        evaluation: The evaluation.
        preferred: The name of the task's first metric, the one that averages and selects.
        values: Metric values by name; 0..100, but `format_share` 0..1.
        predictions: One {"input", "target", "prediction"} for each example, in order, with its
            "references" where these are not the target alone.
    """

    evaluation: Evaluation
    preferred: str
    values: dict[str, float]
    predictions: list[dict[str, Any]]

    @property
    def score(self) -> float:
        return self.values[self.preferred]

    def rows(self, stage: str, step: int) -> list[dict[str, Any]]:
        """Returns the entries for `summary.json`."""
        return [
            {
                "stage": stage,
                "step": step,
                "task": self.evaluation.data.task,
                "role": self.evaluation.role,
                "split": self.evaluation.data.split,
                "shots": self.evaluation.shots,
                "metric": name,
                "value": value,
                "num_examples": len(self.predictions),
            }
            for name, value in self.values.items()
        ]

    def write(self, directory: Path, step: int) -> None:
        """Writes inputs, targets and predictions, one JSON object a line."""
        directory.mkdir(parents=True, exist_ok=True)
        # As t5x names them; a final evaluation repeats the step on another split.
        split = self.evaluation.data.split
        task = self.evaluation.task + ("" if split == "validation" else f"-{split}")
        name = f"{task}-{step:06}.jsonl"
        write_json_lines(directory / name, self.predictions)


def evaluate(evaluation: Evaluation, predictor: BasePredictor) -> Result:
    """Decodes or ranks, and scores, one evaluation, without the PEFT methods in `detach`."""
    examples, info = _examples(evaluation.task_data, evaluation.limit)
    if not info.metrics:
        raise UserError(f"Task '{info.task}' names no metric to evaluate it with.")
    if info.metrics[0] in metrics.LESS_IS_BETTER:
        raise UserError(
            f"Task '{info.task}' names {info.metrics[0]} first, by which checkpoints are selected "
            "and tasks averaged; less of it is better, so name another metric before it."
        )
    postprocess = metrics.get_postprocess(info.postprocess)
    references = [list(example.references) for example in examples]

    def score(predictions: list[str]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name in info.metrics:
            values |= metrics.get(name)(references, predictions)
        return values

    predictor = predictor.without(*evaluation.detached(predictor.model))
    answers = _answers(evaluation, predictor, examples)
    said = [[postprocess(output) for output in outputs] for outputs in answers]
    # Of equally frequent predictions `max` takes the first.
    predictions = [max(each, key=each.count) for each in said]
    values = score(predictions)
    if evaluation.prompts:
        of_each = [score(list(each)) for each in zip(*said, strict=True)]
        for name in list(values):
            alone = [found[name] for found in of_each]
            best = min(alone) if name in metrics.LESS_IS_BETTER else max(alone)
            values[f"{name}_prompt_average"] = float(np.mean(alone))
            values[f"{name}_prompt_best"] = best
    if evaluation.target_format is not None:
        trimmed = [
            promot(outputs[each.index(prediction)])
            for outputs, each, prediction in zip(answers, said, predictions, strict=True)
        ]
        values["format_share"] = format_share(trimmed, evaluation.target_format)
    kept = [_said(e, p) for e, p in zip(examples, predictions, strict=True)]
    return Result(evaluation, next(iter(values)), values, kept)


def _said(example: loader.EvalExample, prediction: str) -> dict[str, Any]:
    said: dict[str, Any] = {
        "input": example.inputs_text,
        "target": example.targets_text,
        "prediction": prediction,
    }
    if example.references != (example.targets_text,):
        said["references"] = list(example.references)
    return said


def held_out_rows(results: Sequence[Result], stage: str, step: int) -> list[dict[str, Any]]:
    """Returns summary entries over all held-out tasks, for each split and number of shots.

    "norm_avg" is ProMoT's Norm. Avg., the mean of the tasks' preferred metrics (0..100), and
    "format_share" the mean share of outputs in the target's format (0..1).
    """
    rows = []
    held_out = [result for result in results if result.evaluation.role == HELD_OUT]
    groups = {(r.evaluation.data.split, r.evaluation.shots) for r in held_out}
    for split, shots in sorted(groups):
        group = [
            r for r in held_out if (r.evaluation.data.split, r.evaluation.shots) == (split, shots)
        ]
        values = {"norm_avg": norm_avg([result.score for result in group])}
        shares = [r.values["format_share"] for r in group if "format_share" in r.values]
        if shares:
            values["format_share"] = float(np.mean(shares))
        rows += [
            {
                "stage": stage,
                "step": step,
                "task": HELD_OUT,
                "role": HELD_OUT,
                "split": split,
                "shots": shots,
                "metric": name,
                "value": value,
                "num_examples": sum(len(result.predictions) for result in group),
            }
            for name, value in values.items()
        ]
    return rows


def suite(
    split: str,
    target: Evaluation,
    held_out: Evaluation | None = None,
    held_out_tasks: Mapping[int, Sequence[str]] | None = None,
    target_tasks: Sequence[str] | None = None,
    ood_tasks: Sequence[str] = (),
    limit: int | None = None,
) -> tuple[Evaluation, ...]:
    """Returns an evaluation for each target, OOD task, and held-out task and number of shots.

    Args:
        split: The split of every task.
        target: How to evaluate what is finetuned.
        held_out: How to evaluate the others; its task is a placeholder.
        held_out_tasks: For each number of shots, the tasks' names without it.
        target_tasks: The finetuned tasks' names, where there are several (a mixture's) or none is
            evaluated; by default the one that `target` names.
        ood_tasks: Names of tasks that are evaluated as the target is, on other data.
        limit: Only the first so many examples of each, or None for all.
    """

    def on(evaluation: Evaluation, task: str, role: str, **changes: Any) -> Evaluation:
        data = dataclasses.replace(evaluation.data, task=task, split=split)
        return dataclasses.replace(evaluation, data=data, role=role, limit=limit, **changes)

    if target_tasks is None:
        target_tasks = [target.data.task]
    evaluations = [on(target, task, TARGET) for task in target_tasks]
    evaluations += [on(target, task, OOD) for task in ood_tasks]
    if held_out is not None:
        evaluations += [
            on(held_out, task, HELD_OUT, shots=count)
            for count, tasks in (held_out_tasks or {}).items()
            for task in tasks
        ]
    return tuple(evaluations)


@functools.lru_cache(maxsize=64)
def _examples(
    data: TaskData, limit: int | None
) -> tuple[Sequence[loader.EvalExample], cache.CacheInfo]:
    (cached,) = cache.ensure(data)
    return loader.eval_examples(data, limit), cached.info


def _answers(
    evaluation: Evaluation, predictor: BasePredictor, examples: Sequence[loader.EvalExample]
) -> list[list[str]]:
    """Returns each example's outputs, one for each prompt that votes.

    Raises:
        UserError: Some examples have answer choices and some have none, or there is no such prompt.
    """
    model, prompts = predictor.model, evaluation.prompts
    if prompts and not model.tasks:
        raise UserError(
            f"The evaluation on '{evaluation.task}' asks for the prompts {', '.join(prompts)}, but "
            "no task has a prompt of its own in this model."
        )
    if not prompts and model.tasks:
        prompts = (evaluation.task,)
    with_choices = sum(bool(example.answer_choices) for example in examples)
    if 0 < with_choices < len(examples):
        raise UserError(
            f"Task '{evaluation.task}' has answer choices for {with_choices} of {len(examples)} "
            "examples; give them to all or to none."
        )
    if with_choices:
        return _rank(evaluation, predictor, examples, prompts)
    return _decode(evaluation, predictor, examples, [model.task_index(name) for name in prompts])


def _rank(
    evaluation: Evaluation,
    predictor: BasePredictor,
    examples: Sequence[loader.EvalExample],
    prompts: Sequence[str],
) -> list[list[str]]:
    copies = [example for example in examples for _ in prompts or [""]]
    ranked = predictor.rank(
        [example.inputs_text for example in copies],
        [example.answer_choices for example in copies],
        evaluation.per_token,
        evaluation.data.inputs_length,
        evaluation.data.targets_length,
        evaluation.batch_size,
        list(prompts) * len(examples) or None,
    )
    said = [copies[i].answer_choices[best] for i, best in enumerate(ranked.best)]
    number = len(copies) // len(examples)
    return [said[i : i + number] for i in range(0, len(said), number)]


def _decode(
    evaluation: Evaluation,
    predictor: BasePredictor,
    examples: Sequence[loader.EvalExample],
    prompts: Sequence[int],
) -> list[list[str]]:
    data = evaluation.data
    outputs: dict[int, list[str]] = {}
    batches = loader.eval_batches(
        examples,
        evaluation.batch_size,
        data.inputs_length,
        data.targets_length,
        pad_id=data.vocabulary.pad_id,
        start_id=predictor.model.start_id,
    )
    for batch in batches:
        # Rows that only fill up the batch repeat a real one, so that none is waited for.
        filler = batch["example_index"] < 0
        for name, rows in batch.items():
            if name != "example_index":
                rows[filler] = rows[0]
        numbers = batch["example_index"]
        if prompts:
            batch = {name: np.repeat(rows, len(prompts), axis=0) for name, rows in batch.items()}
            batch["task_index"] = np.tile(np.array(prompts, np.int32), len(numbers))
        decoded = predictor.generate(batch, evaluation.decoder)
        best = np.asarray(decoded.tokens)[:, 0]
        for index, copies in zip(
            numbers, best.reshape(len(numbers), -1, best.shape[-1]), strict=True
        ):
            if index >= 0:
                outputs[int(index)] = [
                    predictor.vocabulary.decode(tokens.tolist()) for tokens in copies
                ]
    return [outputs[i] for i in range(len(examples))]
