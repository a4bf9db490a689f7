"""TriviaQA without its documents, with ProMoT's template for QA.

Read from `$ROBUST_FT_DATA_DIR/trivia_qa`: the official archive (`triviaqa-rc/qa/*.json`), or DPR's
questions of the unfiltered version (`topics.dpr.trivia.{dev,test}.txt`); else TFDS's
`trivia_qa/rc.nocontext` 1.1.0 (train 138,384, validation 18,669).

The answers of the official test questions are not public, so ProMoT's numbers must be on the
development questions: these are both `test` and `validation`. DPR's files have a development and a
test set of their own.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from robust_ft import metrics
from robust_ft.data.raw_files import Row, json_list
from robust_ft.data.seqio_tasks import Files, Origin, Tfds, add
from robust_ft.metrics import postprocess
from tasks import questions, templates

_ARCHIVE = "trivia_qa/triviaqa-rc/qa"
_TRAIN = ("web-train", "wikipedia-train")
# What TFDS counts as its validation split.
_DEV = ("web-dev", "wikipedia-dev", "verified-web-dev", "verified-wikipedia-dev")


def _archive(names: Sequence[str]) -> Files:
    return Files(tuple(f"{_ARCHIVE}/{name}.json" for name in names), _read)


def _read(files: Sequence[Path]) -> Iterator[Row]:
    for place, record in json_list(files, key="Data"):
        answer = record.get("Answer", {})
        answers = [answer.get("Value"), *answer.get("Aliases", [])]
        yield Row(place, {"question": record.get("Question"), "answers": answers})


def _of_tfds(record: dict[str, Any]) -> dict[str, Any]:
    answer = record["answer"]
    return {"question": record["question"], "answers": [answer["value"], *answer["aliases"]]}


def _dpr(name: str) -> Files:
    return Files((f"trivia_qa/topics.dpr.trivia.{name}.txt",), questions.dpr_topics)


_TFDS = "trivia_qa/rc.nocontext:1.1.0"
_TEST: list[Origin] = [_archive(_DEV), _dpr("test"), Tfds(_TFDS, "validation", _of_tfds)]

add(
    "trivia_qa",
    {
        "train": [_archive(_TRAIN), Tfds(_TFDS, "train", _of_tfds)],
        "validation": [_archive(_DEV), _dpr("dev"), Tfds(_TFDS, "validation", _of_tfds)],
        "test": _TEST,
        "reported": _TEST,
    },
    questions.example(templates.question),
    metric_fns=[metrics.trivia_qa_exact_match, metrics.trivia_qa_f1],
    postprocess_fn=postprocess.promot,
    references=True,
)
