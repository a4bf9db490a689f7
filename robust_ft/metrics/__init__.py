"""Metrics and postprocessors, found by name. Strings and numpy only.

A metric is a function (targets, predictions) -> {name: value}, as seqio calls it: one text or
several for each example, and what was predicted. Its first value is the one that averages and
selects. Values go from 0 to 100, more is better, but for `nist` and `cider`, which have scales of
their own, and `ter`, which counts errors. Libraries that are slow to import are imported when a
metric is called.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from robust_ft.errors import UserError, nearest
from robust_ft.metrics import postprocess
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
Postprocess = Callable[..., str]

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
# The same scores first, and then what they are made of.
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

    Raises:
        UserError: There is none.
    """
    return _get("metric", METRICS, name)


def get_parts(name: str) -> Metric:
    """Returns the metric called `name` in the form that also tells the parts of its score.

    Raises:
        UserError: There is none.
    """
    return PARTS.get(name) or get(name)


def get_postprocess(name: str) -> Postprocess:
    """Returns the postprocessor called `name` (as in `get`), `identity` for "".

    Raises:
        UserError: There is none.
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
    "macro_f1",
    "meteor",
    "multi_bleu",
    "nist",
    "norm_avg",
    "rouge",
    "rouge_stemmed",
    "ter",
    "token_f1",
    "trivia_qa_exact_match",
    "trivia_qa_f1",
    "webnlg_bleu",
]
