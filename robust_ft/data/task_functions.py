"""The functions that evaluate a seqio task, as a cache records them: by name."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import seqio

from robust_ft import metrics
from robust_ft.errors import UserError
from robust_ft.metrics import naming


class Named(NamedTuple):
    """What evaluates a task.

    Attributes:
        metrics: Names for `robust_ft.metrics.get`.
        postprocess: Name for `robust_ft.metrics.get_postprocess`, "" if there is none.
        refused: A sentence for each function that has no name. Such a task is trained on, but not
            evaluated.
    """

    metrics: tuple[str, ...]
    postprocess: str
    refused: tuple[str, ...]


def named(task: seqio.Task, module: str | None) -> Named:
    """Returns the names of a task's functions.

    Args:
        task: The task.
        module: The module that registers it.

    Raises:
        UserError: A metric function has other parameters than seqio allows.
    """
    functions = metric_fns(task)
    modules = [] if module is None else [module]
    refused: list[str] = []

    def name(kind: str, function: Callable[..., Any], known: Any) -> str:
        try:
            return naming.name_of(function, known, modules)
        except naming.Unnamed as error:
            refused.append(f"Task '{task.name}' cannot be evaluated: its {kind} {error}.")
            return ""

    names = [name("metric", function, metrics.METRICS) for function in functions]
    for function in task.predict_with_aux_metric_fns:
        refused.append(
            f"Task '{task.name}' cannot be evaluated: its metric {_called(function)} asks for "
            "aux_values, which our models do not give; use one of (targets, predictions) or "
            "(targets, scores)."
        )
    objects = task.metric_objs[: len(task.metric_objs) - len(functions)]
    for each in objects:
        kind = each if isinstance(each, type) else type(each)
        refused.append(
            f"Task '{task.name}' cannot be evaluated: its metric_objs has a {kind.__qualname__}, "
            "and only functions are kept; give the function in metric_fns."
        )
    postprocess = ""
    if task.postprocessor is not None:
        postprocess = name("postprocess_fn", task.postprocessor, metrics.POSTPROCESSORS)
    return Named(tuple(filter(None, names)), postprocess, tuple(refused))


def metric_fns(task: seqio.Task) -> Sequence[Callable[..., Any]]:
    """Returns a task's metric functions: those of predictions first, then those of scores.

    Raises:
        UserError: One has other parameters than seqio allows.
    """
    try:
        functions: Sequence[Callable[..., Any]] = task.metric_fns
    except ValueError as error:
        raise UserError(f"Task '{task.name}': {' '.join(str(error).split())}.") from error
    return functions


def _called(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", function))
