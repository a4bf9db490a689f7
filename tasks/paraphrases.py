"""MRPC and QQP: whether two sentences, or questions, mean the same.

  task    train       validation   test
  mrpc        3,668          408   1,725
  qqp     some 364K       40,430   (its labels are not public)

Each tests transfer from the other (prompt tuning, domain shift). So their inputs are T5's without
the task's name, `sentence1: ... sentence2: ...`, and both have the same answers: otherwise a model
of one task could never be right on the other.

Read from `$ROBUST_FT_DATA_DIR/mrpc/msr_paraphrase_{train,test}.txt` and `qqp/{train,dev}.tsv`
(GLUE's files), else TFDS's `glue` 2.0.0, where the test labels of MRPC are hidden. The validation
pairs of MRPC are those in GLUE's `mrpc/mrpc_dev_ids.tsv`; without that file they are every tenth
training pair, the same number of other pairs. GLUE's file of QQP has a few broken lines, which are
left out and counted in the log.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from robust_ft import metrics
from robust_ft.data.raw_files import Reader, Row, lines, one_of, tab_separated, text
from robust_ft.data.seqio_tasks import Files, Origin, Tfds, add
from robust_ft.metrics import postprocess

# In the order of TFDS's class labels.
ANSWERS = {"0": "not_equivalent", "1": "equivalent"}

_TRAIN = "mrpc/msr_paraphrase_train.txt"
_DEV_IDS = "mrpc/mrpc_dev_ids.tsv"
_IDS = ("#1 ID", "#2 ID")


def _example(record: dict[str, Any]) -> Mapping[str, str]:
    return {
        "inputs": f"sentence1: {record['sentence1']} sentence2: {record['sentence2']}",
        "targets": one_of(record, "label", ANSWERS),
    }


def _pairs(first: str, second: str, label: str, read: Reader = tab_separated) -> Reader:
    """Returns `read` with the record's two texts and its label under the names that we use."""

    def renamed(files: Sequence[Path]) -> Iterator[Row]:
        for place, record in read(files):
            names = {"sentence1": first, "sentence2": second, "label": label}
            yield Row(place, {ours: record.get(theirs) for ours, theirs in names.items()})

    return renamed


def _of_tfds(first: str, second: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: {
        "sentence1": text(record, first),
        "sentence2": text(record, second),
        "label": str(record["label"]),
    }


def _mrpc(validation: bool) -> Reader:
    """Returns the reader of the training file's validation part, or of the rest."""

    def read(files: Sequence[Path]) -> Iterator[Row]:
        ids = {tuple(row.record.values()) for row in tab_separated(files[1:], columns=_IDS)}
        for number, row in enumerate(tab_separated(files[:1])):
            own = tuple(row.record[name] for name in _IDS)
            if (own in ids if ids else number % 10 == 0) == validation:
                yield row

    return _pairs("#1 String", "#2 String", "Quality", read)


def _whole_lines(files: Sequence[Path]) -> Iterator[Row]:
    for file in files:
        columns: list[str] = []
        broken = 0
        for place, line in lines(file):
            fields = line.split("\t")
            if not columns:
                columns = fields
            elif len(fields) == len(columns):
                yield Row(place, dict(zip(columns, fields, strict=True)))
            else:
                broken += 1
        if broken:
            logging.warning("%s: %d lines are broken and left out.", file, broken)


def _add(task: str, splits: Mapping[str, Sequence[Origin]]) -> None:
    add(
        task,
        splits,
        _example,
        metric_fns=[metrics.accuracy, metrics.binary_f1],
        postprocess_fn=postprocess.first_word,
        choices=list(ANSWERS.values()),
    )


_QUESTIONS = ("question1", "question2")
_add(
    "mrpc",
    {
        **{
            split: [
                Files((_TRAIN, _DEV_IDS), _mrpc(split == "validation")),
                Files((_TRAIN,), _mrpc(split == "validation")),
                Tfds("glue/mrpc:2.0.0", split, _of_tfds("sentence1", "sentence2")),
            ]
            for split in ("train", "validation")
        },
        "test": [
            Files(("mrpc/msr_paraphrase_test.txt",), _pairs("#1 String", "#2 String", "Quality"))
        ],
    },
)
_add(
    "qqp",
    {
        split: [
            Files((f"qqp/{file}.tsv",), _pairs(*_QUESTIONS, "is_duplicate", _whole_lines)),
            Tfds("glue/qqp:2.0.0", split, _of_tfds(*_QUESTIONS)),
        ]
        for split, file in {"train": "train", "validation": "dev"}.items()
    },
)
