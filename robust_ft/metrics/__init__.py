"""Metrics and postprocessors by name. Strings and numpy only.

A metric is a function (targets, predictions) -> {name: value}, as in seqio: one reference or
several for each example, and its prediction. A function (targets, scores) takes log-likelihoods of
the targets instead. The first value is averaged over tasks and selects checkpoints. Values go from
0 to 100 and more is better, except for `nist` and `cider`, which have scales of their own, and
`ter`, which counts errors. Libraries that are slow to import are imported when a metric is called.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from robust_ft.errors import UserError, nearest
from robust_ft.metrics import naming, postprocess
from robust_ft.metrics.answers import (
    exact_match,
    token_f1,
    trivia_qa_exact_match,
    trivia_qa_f1,
)
from robust_ft.metrics.arg import average_relative_gain
from robust_ft.metrics.bleu import (
    bleu,
    bleu_parts,
    multi_bleu,
    multi_bleu_parts,
    webnlg_bleu,
    webnlg_bleu_parts,
)
from robust_ft.metrics.cider import cider
from robust_ft.metrics.classification import accuracy, binary_f1, macro_f1
from robust_ft.metrics.edits import chrf, ter, ter_parts
from robust_ft.metrics.format_share import format_share
from robust_ft.metrics.meteor import meteor
from robust_ft.metrics.nist import nist
from robust_ft.metrics.norm_avg import norm_avg
from robust_ft.metrics.rouge import rouge, rouge_parts, rouge_stemmed, rouge_stemmed_parts

Metric = Callable[..., dict[str, float]]
Postprocess = Callable[..., Any]
_Function = TypeVar("_Function", Metric, Postprocess)

METRICS: Mapping[str, Metric] = {
    metric.__name__: metric
    for metric in (
        accuracy,
        binary_f1,
        bleu,
        chrf,
        cider,
        exact_match,
        macro_f1,
        meteor,
        multi_bleu,
        nist,
        rouge,
        rouge_stemmed,
        ter,
        token_f1,
        trivia_qa_exact_match,
        trivia_qa_f1,
        webnlg_bleu,
    )
}
LESS_IS_BETTER = ("ter",)
# The same score first, and then its components.
PARTS: Mapping[str, Metric] = {
    "bleu": bleu_parts,
    "multi_bleu": multi_bleu_parts,
    "rouge": rouge_parts,
    "rouge_stemmed": rouge_stemmed_parts,
    "ter": ter_parts,
    "webnlg_bleu": webnlg_bleu_parts,
}
POSTPROCESSORS: Mapping[str, Postprocess] = {
    "identity": postprocess.identity,
    "promot": postprocess.promot,
    "first_word": postprocess.first_word,
}


def get(name: str) -> Metric:
    """Returns the metric called `name`, or "module:function" for one defined elsewhere.

    A name may fix arguments, as `functools.partial` does: "my_tasks:at_least(threshold=0.5)".

    Raises:
        UserError: There is no such metric.
    """
    return _get("metric", METRICS, name)


def get_parts(name: str) -> Metric:
    """Returns the metric called `name` in the form that also returns its score's components.

    Raises:
        UserError: There is no such metric.
    """
    return PARTS.get(name) or get(name)


def get_postprocess(name: str) -> Postprocess:
    """Returns the postprocessor called `name` (as in `get`), `identity` for "".

    Raises:
        UserError: There is no such postprocessor.
    """
    return _get("postprocessor", POSTPROCESSORS, name or "identity")


def takes_scores(metric: Metric) -> bool:
    """Whether a metric is a function (targets, scores), told by its parameters as seqio does."""
    return "scores" in inspect.signature(metric).parameters


def is_less_better(name: str) -> bool:
    """Whether less of the metric called `name` is better."""
    return name.partition("(")[0] in LESS_IS_BETTER


def _get(kind: str, known: Mapping[str, _Function], name: str) -> _Function:
    try:
        path, args, keywords = naming.parse(name)
    except ValueError as error:
        raise UserError(
            f"The {kind} '{name}' has arguments that are not written as in Python, such as "
            f"'my_tasks:function(threshold=0.5)': {error}."
        ) from error
    function = known.get(path) or _imported(kind, known, path)
    if args or keywords:
        fixed: Any = functools.partial(function, *args, **keywords)
        return fixed  # type: ignore[no-any-return]
    return function


def _imported(kind: str, known: Mapping[str, _Function], name: str) -> _Function:
    module, separator, path = name.partition(":")
    if not separator:
        raise UserError(
            f"There is no {kind} '{name}', only {', '.join(known)}.{nearest(name, known)}"
        )
    try:
        function: _Function | None = naming.at(importlib.import_module(module), path)
    except ImportError as error:
        raise UserError(f"The {kind} '{name}' cannot be imported: {error}.") from error
    if not callable(function):
        raise UserError(f"The {kind} '{name}' is not a function of the module {module}.")
    return function


__all__ = [
    "LESS_IS_BETTER",
    "METRICS",
    "PARTS",
    "POSTPROCESSORS",
    "Metric",
    "Postprocess",
    "accuracy",
    "average_relative_gain",
    "binary_f1",
    "bleu",
    "chrf",
    "cider",
    "exact_match",
    "format_share",
    "get",
    "get_parts",
    "get_postprocess",
    "is_less_better",
    "macro_f1",
    "meteor",
    "multi_bleu",
    "nist",
    "norm_avg",
    "rouge",
    "rouge_stemmed",
    "takes_scores",
    "ter",
    "token_f1",
    "trivia_qa_exact_match",
    "trivia_qa_f1",
    "webnlg_bleu",
]
