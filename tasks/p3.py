"""P3: the datasets of continued pretraining for promptability, each under many templates.

  p3_train       313 templates of 35 datasets; rates are the numbers of examples, at most 500,000 a
                 template, as the paper counts them (31.6M examples in all)
  p3_train_t0    the same with T0's own cap: 500,000 a dataset, shared by its templates
  p3_eval        116 templates of 11 datasets, for rank classification (`p3_tasks`)

A task has P3's own name, such as `super_glue_rte_guaranteed_true_score_eval`. The splits are
`train` and, where the paper evaluates, `validation`; StoryCloze, which has no training examples,
has its validation split under the first name and its test split under the second. Inputs have no
EOS, as in T0. An example keeps its answer choices as `answer_choices`.

Below $ROBUST_FT_DATA_DIR a task is read from the first of these that is there:

  p3/<task>/<split>/*.arrow, p3/<task>/<split>[-.]*    ready records of P3 (`bigscience/P3` on the
                 Hub: TFRecords; as `datasets` saves them: Arrow; or Parquet), one a choice or one
                 an example
  p3_raw/<dataset>/<split>[-.]*    the dataset as it is on the Hub (Parquet, Arrow or JSON Lines),
                 put under promptsource's p3_promptsource/templates/<dataset>/templates.yaml
  superglue/...                    the official files of RTE, CB, WiC and COPA, likewise
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import seqio

from robust_ft import metrics
from robust_ft.data import promptsource, tables
from robust_ft.data.raw_files import Reader, Row, json_lines, one_of, text
from robust_ft.data.seqio_tasks import ExampleFn, Files, Splits, add
from robust_ft.errors import UserError, nearest
from robust_ft.metrics import postprocess
from tasks import p3_tasks, superglue

CAP = 500_000

_SCORE_EVAL = "_score_eval"
_ROUNDS = ("r1", "r2", "r3")
_SEED = 0


def _ready(files: Sequence[Path]) -> Iterator[Row]:
    """Yields P3's examples with their answer choices, each a record of its own in the files."""
    rows = ((place, _plain(record)) for place, record in tables.read(files))
    # Without an index every record is an example of its own.
    counter = itertools.count()
    groups = itertools.groupby(
        rows, key=lambda row: row[1]["idx"][0] if "idx" in row[1] else f"{next(counter)}"
    )
    for _, group in groups:
        members = list(group)
        place, record = members[0]
        if "is_correct" not in record:
            yield Row(place, record)
            continue
        choices = [text(member, "targets_pretokenized") for _, member in members]
        flags = [member["is_correct"] for _, member in members]
        if not any(flags):
            raise UserError(f"{place}: none of the {len(flags)} answer choices is correct.")
        target = choices[flags.index(True)]
        yield Row(place, {**record, "answer_choices": choices, "targets_pretokenized": target})


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Unpacks the texts and flags of a TFRecord, where every feature is a list."""
    single = ("inputs_pretokenized", "targets_pretokenized", "is_correct")
    return {
        key: value[0] if key in single and isinstance(value, list) and len(value) == 1 else value
        for key, value in record.items()
    }


def _templated(name: str, read: Reader) -> Reader:
    """Returns the reader of a file of templates and, after it, files of raw records."""

    def rows(files: Sequence[Path]) -> Iterator[Row]:
        named = {
            p3_tasks.word_name(key).strip("_"): value for key, value in _load(files[0]).items()
        }
        if name.strip("_") not in named:
            raise UserError(f"{files[0]}: there is no template '{name}'.{nearest(name, named)}")
        template = named[name.strip("_")]
        for number, (place, record) in enumerate(read(files[1:])):
            yield Row(place, {"record": record, "template": template, "seed": f"{_SEED} {number}"})

    return rows


# One entry: consecutive tasks have templates of the same dataset, and the files are large.
_load = functools.lru_cache(maxsize=1)(promptsource.load)


def _example(record: dict[str, Any]) -> Mapping[str, Any] | None:
    if "template" in record:
        prompt: promptsource.Prompt | None = record["template"].apply(
            record["record"], record["seed"]
        )
        return None if prompt is None else prompt._asdict()
    return {
        "inputs": text(record, "inputs_pretokenized").strip(),
        "targets": text(record, "targets_pretokenized").strip(),
        "answer_choices": [choice.strip() for choice in record.get("answer_choices") or []],
    }


def _ranked(record: dict[str, Any]) -> Mapping[str, Any] | None:
    example = _example(record)
    if example is not None and example["targets"] not in example["answer_choices"]:
        choices = ", ".join(example["answer_choices"])
        raise ValueError(f"target '{example['targets']}' is none of the choices {choices}")
    return example


def _with_class(answers: Sequence[str]) -> Reader:
    """Returns the reader of SuperGLUE's official files with the label as the Hub has it."""
    classes = {answer: str(number) for number, answer in enumerate(answers)}

    def rows(files: Sequence[Path]) -> Iterator[Row]:
        for place, record in json_lines(files):
            label = str(record.get("label")).lower()
            yield Row(place, {**record, "label": int(one_of({"label": label}, "label", classes))})

    return rows


_OFFICIAL: dict[str, tuple[str, Reader]] = {
    "super_glue/rte": ("RTE", _with_class(list(superglue.RTE_ANSWERS))),
    "super_glue/cb": ("CB", _with_class(list(superglue.CB_ANSWERS))),
    "super_glue/wic": ("WiC", _with_class(list(superglue.WIC_ANSWERS))),
    "super_glue/copa": ("COPA", _with_class(["0", "1"])),
}


def _splits(path: str, template: str, task: str, names: Mapping[str, tuple[str, str]]) -> Splits:
    """Returns each split's origins; `names` has P3's and the Hub's name for each of our splits."""
    templates = f"p3_promptsource/templates/{path}/templates.yaml"
    splits: Splits = {}
    for split, (ready, raw) in names.items():
        splits[split] = [
            Files((f"p3/{task}/{ready}/*.arrow",), _ready),
            Files((f"p3/{task}/{ready}[-.]*",), _ready),
            Files((templates, f"p3_raw/{path}/{raw}[-.]*"), _templated(template, tables.read)),
        ]
        if path in _OFFICIAL:
            folder, read = _OFFICIAL[path]
            file = f"superglue/{folder}/{superglue.FILES[split]}"
            splits[split].append(Files((templates, file), _templated(template, read)))
    return splits


def _add(task: str, splits: Splits, example: ExampleFn, metric: metrics.Metric) -> str:
    add(
        task,
        splits,
        example,
        metric_fns=[metric],
        postprocess_fn=postprocess.identity,
        answer_choices=True,
        add_eos_to_inputs=False,
    )
    return task


def _add_train(dataset: p3_tasks.Dataset, template: str) -> str:
    task = dataset.task(template)
    splits = _splits(dataset.path, template, task, {"train": ("train", "train")})
    return _add(task, splits, _example, metrics.exact_match)


def _add_eval(dataset: p3_tasks.Dataset, template: str) -> list[str]:
    if dataset.path == "anli":
        return [
            _ranking(dataset, template, f"_{r}", {"train": f"train_{r}", "validation": f"dev_{r}"})
            for r in _ROUNDS
        ]
    if dataset.path == "story_cloze/2016":
        return [_ranking(dataset, template, "", {"train": "validation", "validation": "test"})]
    return [_ranking(dataset, template, "", {"train": "train", "validation": "validation"})]


def _ranking(dataset: p3_tasks.Dataset, template: str, part: str, names: Mapping[str, str]) -> str:
    task = f"{dataset.task(template)}{part}{_SCORE_EVAL}"
    both = {split: (split if part else name, name) for split, name in names.items()}
    return _add(task, _splits(dataset.path, template, task, both), _ranked, metrics.accuracy)


_paper_rates: list[tuple[str, float]] = []
_t0_rates: list[tuple[str, float]] = []
for _dataset in p3_tasks.TRAIN:
    _size = _dataset.num_train
    for _template in _dataset.templates:
        _task = _add_train(_dataset, _template)
        _paper_rates.append((_task, min(_size, CAP)))
        _t0_rates.append((_task, _size if _size <= CAP else CAP // len(_dataset.templates)))
_eval = [
    task for dataset in p3_tasks.EVAL for t in dataset.templates for task in _add_eval(dataset, t)
]

seqio.MixtureRegistry.add("p3_train", _paper_rates)
seqio.MixtureRegistry.add("p3_train_t0", _t0_rates)
seqio.MixtureRegistry.add("p3_eval", _eval, default_rate=1.0)
