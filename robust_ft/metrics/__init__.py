"""Metrics and postprocessors, found by name. Strings and numpy only.

A metric is a function (targets, predictions) -> {name: value from 0 to 100}, as seqio calls it.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from robust_ft.errors import UserError, nearest
from robust_ft.metrics import postprocess
from robust_ft.metrics.exact_match import accuracy, exact_match
from robust_ft.metrics.format_share import format_share
from robust_ft.metrics.norm_avg import norm_avg

Metric = Callable[..., dict[str, float]]
Postprocess = Callable[..., str]

METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
}
POSTPROCESSORS: Mapping[str, Postprocess] = {
    "identity": postprocess.identity,
    "promot": postprocess.promot,
    "first_word": postprocess.first_word,
}


def get(name: str) -> Metric:
    """Returns the metric called `name`, or "module:function" for one defined elsewhere.

    Raises:
      UserError: there is none.
    """
    return _get("metric", METRICS, name)


def get_postprocess(name: str) -> Postprocess:
    """Returns the postprocessor called `name` (as in `get`), `identity` for "".

    Raises:
      UserError: there is none.
    """
    return _get("postprocessor", POSTPROCESSORS, name or "identity")


def _get(kind: str, choices: Mapping[str, Any], name: str) -> Any:
    if name in choices:
        return choices[name]
    module, separator, function = name.partition(":")
    if not separator:
        raise UserError(
            f"There is no {kind} '{name}', only {', '.join(choices)}.{nearest(name, choices)}"
        )
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UserError(f"The {kind} '{name}' cannot be imported: {error}.") from error
    if not callable(found):
        raise UserError(f"The {kind} '{name}' is not a function of the module {module}.")
    return found


__all__ = [
    "METRICS",
    "POSTPROCESSORS",
    "Metric",
    "Postprocess",
    "accuracy",
    "exact_match",
    "format_share",
    "get",
    "get_postprocess",
    "norm_avg",
]
