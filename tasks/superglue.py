"""SuperGLUE's RTE and CB with ProMoT's templates (ProMoT, appendix: input and output formats).

The official files (`RTE/train.jsonl`, `RTE/val.jsonl`, ...) are read from
`$ROBUST_FT_DATA_DIR/superglue`; without that variable, TFDS's `super_glue` 1.0.2 is downloaded.
The test split of SuperGLUE has no labels, so there are only `train` and `validation`.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf

from robust_ft import metrics
from robust_ft.data.seqio_tasks import JsonLinesSource, text_features
from robust_ft.errors import nearest
from robust_ft.metrics import postprocess

# In the order of TFDS's class labels.
RTE_ANSWERS = {"entailment": "True", "not_entailment": "False"}
CB_ANSWERS = {"entailment": "True", "contradiction": "False", "neutral": "Neither"}

_FILES = {"train": "train.jsonl", "validation": "val.jsonl"}
_KEYS = ("premise", "hypothesis", "label")


def _parse(example: Mapping[str, Any], answers: Mapping[str, str]) -> dict[str, str]:
    fields = {key: example[key] for key in _KEYS}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"field '{key}' is not a string but {value!r}")
    if fields["label"] not in answers:
        hint = nearest(fields["label"], answers)
        raise ValueError(f"label '{fields['label']}' is none of {', '.join(answers)}.{hint}")
    return fields


def _source(folder: str, tfds_name: str, answers: Mapping[str, str]) -> seqio.DataSource:
    data_dir = os.environ.get("ROBUST_FT_DATA_DIR")
    if not data_dir:
        return seqio.TfdsDataSource(tfds_name=tfds_name, splits=tuple(_FILES))
    directory = os.path.join(data_dir, "superglue", folder)
    parse = functools.partial(_parse, answers=answers)
    return JsonLinesSource(directory, _FILES, parse, _KEYS)


def entailment_text(
    dataset: tf.data.Dataset, question: str, answers: Mapping[str, str]
) -> tf.data.Dataset:
    """Maps premise, hypothesis and label to `[premise] question: [hypothesis] [question] answer:`.

    Labels are names (the official files) or class indices (TFDS), in the order of `answers`.
    """
    names, texts = list(answers), list(answers.values())

    def to_text(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        label = example["label"]
        if label.dtype == tf.string:
            label = tf.argmax(tf.equal(label, names))
        parts = [example["premise"], "question:", example["hypothesis"], question, "answer:"]
        return {
            "inputs": tf.strings.join(parts, separator=" "),
            "targets": tf.gather(texts, label),
            "choices": tf.constant(texts),
        }

    return dataset.map(to_text)


def _add(name: str, folder: str, question: str, answers: Mapping[str, str]) -> None:
    seqio.TaskRegistry.add(
        name,
        source=_source(folder, f"super_glue/{name}:1.0.2", answers),
        preprocessors=[functools.partial(entailment_text, question=question, answers=answers)],
        output_features=text_features(),
        postprocess_fn=postprocess.first_word,
        metric_fns=[metrics.accuracy],
    )


_add("rte", "RTE", "Is it true or false?", RTE_ANSWERS)
_add("cb", "CB", "Is it true or false or neither?", CB_ANSWERS)
