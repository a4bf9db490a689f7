"""What a task's metrics say of a model's outputs, computed as seqio's `Evaluator` computes it.

Its postprocessor sees every prediction, with its example, and every target, with `is_target=True`;
its metrics get what that returns. A metric of `scores` gets the log-likelihoods of the targets.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from robust_ft import metrics
from robust_ft.data.cache import CacheInfo
from robust_ft.data.loader import EvalExample
from robust_ft.errors import UserError


class Scoring:
    """The metrics and the postprocessor of a task, and the targets of its examples.

    Attributes:
        targets: Each example's target after the postprocessor; a list of all that counts as right
            for each, if the task lists that for any.
        needs_outputs: Whether a metric asks for predictions.
        needs_scores: Whether a metric asks for scores.
    """

    def __init__(self, info: CacheInfo, examples: Sequence[EvalExample]):
        """Finds the task's functions.

        Raises:
            UserError: One cannot be kept in a cache, or found again; or the first metric cannot
                select checkpoints.
        """
        _check(info)
        self._task = info.task
        self._metrics = {name: metrics.get(name) for name in info.metrics}
        self._of_scores = {n for n, metric in self._metrics.items() if metrics.takes_scores(metric)}
        self._postprocess = metrics.get_postprocess(info.postprocess)
        self._accepted = _accepted(self._postprocess)
        self._examples = examples
        self.needs_scores = bool(self._of_scores)
        self.needs_outputs = len(self._of_scores) < len(self._metrics)
        self._texts = [self._target(example, example.targets_text) for example in examples]
        self.targets = self._texts
        if info.num_references:
            self.targets = [[self._target(e, text) for text in e.references] for e in examples]

    def prediction(self, index: int, output: str) -> Any:
        """Returns an example's output after the postprocessor."""
        return self._processed(self._examples[index], output, is_target=False)

    def is_right(self, index: int, output: str) -> bool:
        """Returns whether an example's output is its target, after the postprocessor."""
        pair = [self.targets[index]], [self.prediction(index, output)]
        return metrics.accuracy(*pair)["accuracy"] > 0

    def values(
        self,
        predictions: Sequence[Any] | None,
        scores: Float[np.ndarray, "examples"] | None,
    ) -> dict[str, float]:
        """Returns the values of all metrics, in their order.

        Raises:
            UserError: Two metrics give a value of the same name, or none gives a number.
        """
        values: dict[str, float] = {}
        for name, metric in self._metrics.items():
            given = {"scores": scores} if name in self._of_scores else {"predictions": predictions}
            # Lists of its own for each: a metric may sort them.
            [(kind, outputs)] = given.items()
            copied = np.array(outputs) if kind == "scores" else list(outputs or ())
            found = _numbers(self._task, name, _call(metric, list(self.targets), kind, copied))
            if twice := values.keys() & found.keys():
                raise UserError(
                    f"Task '{self._task}' has two metrics that return '{min(twice)}'; the second "
                    f"is {name}."
                )
            values |= found
        if not values:
            raise UserError(f"The metrics of task '{self._task}' return no number.")
        score = next(iter(values))
        if not 0 <= values[score] <= 100:  # also for NaN
            _warn_of_scale(self._task, score, values[score])
        return values

    def record(self, index: int, **outputs: Any) -> dict[str, Any]:
        """Returns an example as files of predictions have it: its input, its target, outputs."""
        example = self._examples[index]
        record = {"input": example.inputs_text, "target": self._texts[index], **outputs}
        if self.targets is not self._texts and self.targets[index] != [self._texts[index]]:
            record["references"] = self.targets[index]
        return {name: _plain(value) for name, value in record.items()}

    def _target(self, example: EvalExample, text: str) -> Any:
        return self._processed(example, text, is_target=True)

    def _processed(self, example: EvalExample, text: str, is_target: bool) -> Any:
        given: dict[str, Any] = {"is_target": is_target}
        if "example" in self._accepted:
            given["example"] = example.as_seqio
        return self._postprocess(text, **{k: v for k, v in given.items() if k in self._accepted})


def _check(info: CacheInfo) -> None:
    if info.refused:
        raise UserError(info.refused[0])
    if not info.metrics:
        raise UserError(f"Task '{info.task}' names no metric to evaluate it with.")
    if metrics.is_less_better(info.metrics[0]):
        raise UserError(
            f"Task '{info.task}' names {info.metrics[0]} first, by which checkpoints are selected "
            "and tasks averaged; less of it is better, so name another metric before it."
        )


def _accepted(postprocess: metrics.Postprocess) -> set[str]:
    """Returns which of seqio's keywords a postprocessor takes; one of the text alone is fine."""
    parameters = inspect.signature(postprocess).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return {"example", "is_target"}
    return {"example", "is_target"} & parameters.keys()


def _call(metric: metrics.Metric, targets: list[Any], kind: str, outputs: Any) -> Any:
    parameters = inspect.signature(metric).parameters
    if {"targets", kind} <= parameters.keys():
        return metric(**{"targets": targets, kind: outputs})
    return metric(targets, outputs)


def _numbers(task: str, metric: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers among what a metric returns; seqio's texts and pictures are left out."""
    found = {}
    for name, value in values.items():
        number = getattr(value, "value", value)  # of seqio's Scalar
        if isinstance(number, np.ndarray) and number.ndim == 0:
            number = number.item()
        if isinstance(number, numbers.Real):
            found[name] = float(number)
        else:
            _warn_of_left_out(task, metric, name, type(value).__name__)
    return found


@functools.cache  # once in a process
def _warn_of_left_out(task: str, metric: str, name: str, kind: str) -> None:
    logging.warning(
        "Task '%s': '%s', which %s returns, is no number but a %s, and is left out.",
        task, name, metric, kind,
    )  # fmt: skip


_named: set[tuple[str, str, bool]] = set()


def _warn_of_scale(task: str, metric: str, value: float) -> None:
    key = task, metric, math.isnan(value)
    if key in _named:
        return
    _named.add(key)
    meaning = (
        "means over tasks are NaN with it, and no checkpoint is selected by it"
        if math.isnan(value)
        else "means over tasks and selections take it as it is"
    )
    logging.warning("Task '%s': %s is %g, not from 0 to 100; %s.", task, metric, value, meaning)


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it, what it has no form for as Python writes it."""
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
