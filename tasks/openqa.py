"""Closed-book QA of Ensembles and Cocktails: Natural Questions (ID), WebQuestions (OOD).

  openqa_id     NQ-open: train 87,925; its 3,610 development questions are halved into validation
                (the first 1,805) and test
  openqa_ood    the 2,032 test questions of WebQuestions, under both names; OOD data is never used
                for a choice
  nq_open       as openqa_id, with ProMoT's template for QA

Inputs of the first two are the bare questions, targets the first answer; all answers are
references. Read from `$ROBUST_FT_DATA_DIR/nq_open/NQ-open.{train,dev}.jsonl`, else TFDS's
`natural_questions_open` 1.0.0, whose questions have another order, so that the halves differ.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from robust_ft import metrics
from robust_ft.data.raw_files import Row, json_lines
from robust_ft.data.seqio_tasks import Files, Splits, Tfds, add
from robust_ft.metrics import postprocess
from tasks import questions, templates, web_questions

_TFDS = "natural_questions_open:1.0.0"
_HALF = 1805


def _record(record: dict[str, Any]) -> dict[str, Any]:
    return {"question": record.get("question"), "answers": record.get("answer")}


def _read(files: Sequence[Path]) -> Iterator[Row]:
    for place, record in json_lines(files):
        yield Row(place, _record(record))


def _first_half(files: Sequence[Path]) -> Iterator[Row]:
    return itertools.islice(_read(files), _HALF)


def _second_half(files: Sequence[Path]) -> Iterator[Row]:
    return itertools.islice(_read(files), _HALF, None)


_DEV = ("nq_open/NQ-open.dev.jsonl",)
_ID: Splits = {
    "train": [Files(("nq_open/NQ-open.train.jsonl",), _read), Tfds(_TFDS, "train", _record)],
    "validation": [Files(_DEV, _first_half), Tfds(_TFDS, f"validation[:{_HALF}]", _record)],
    "test": [Files(_DEV, _second_half), Tfds(_TFDS, f"validation[{_HALF}:]", _record)],
}

_METRICS = [metrics.exact_match, metrics.token_f1]

add("openqa_id", _ID, questions.example(str), _METRICS, postprocess.identity, references=True)
add(
    "openqa_ood",
    {"validation": web_questions.TEST, "test": web_questions.TEST},
    questions.example(str),
    _METRICS,
    postprocess.identity,
    references=True,
    exemplars="openqa_id",
)
add(
    "nq_open",
    _ID,
    questions.example(templates.question),
    _METRICS,
    postprocess.promot,
    references=True,
)
