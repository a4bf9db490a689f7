"""SuperGLUE's RTE, CB and WiC with ProMoT's templates (ProMoT, appendix A.2.1).

The official files (`RTE/train.jsonl`, `RTE/val.jsonl`, ...) are read from
`$ROBUST_FT_DATA_DIR/superglue`, else TFDS's `super_glue` 1.0.2. The test split of SuperGLUE has no
labels, so there are only `train` and `validation`; `reported`, the split that ProMoT reports on, is
the latter.
"""

from collections.abc import Callable, Mapping
from typing import Any

from robust_ft import metrics
from robust_ft.data.raw_files import json_lines, one_of, text
from robust_ft.data.seqio_tasks import ExampleFn, Files, Splits, Tfds, add
from robust_ft.metrics import postprocess
from tasks import templates

# In the order of TFDS's class labels.
RTE_ANSWERS = {"entailment": "True", "not_entailment": "False"}
CB_ANSWERS = {"entailment": "True", "contradiction": "False", "neutral": "Neither"}
WIC_ANSWERS = {"false": "False", "true": "True"}

FILES = {"train": "train.jsonl", "validation": "val.jsonl"}


def _wic(record: dict[str, Any]) -> Mapping[str, str]:
    # The official files have JSON's true and false.
    label = record["label"]
    label = str(label).lower() if isinstance(label, bool) else label
    return {
        "inputs": templates.wic(*(text(record, key) for key in ("sentence1", "sentence2", "word"))),
        "targets": one_of({**record, "label": label}, "label", WIC_ANSWERS),
    }


def _entailment(
    template: Callable[[str, str], str], answers: Mapping[str, str]
) -> Callable[[dict[str, Any]], Mapping[str, str]]:
    return lambda record: {
        "inputs": template(text(record, "premise"), text(record, "hypothesis")),
        "targets": one_of(record, "label", answers),
    }


def _add(name: str, folder: str, answers: Mapping[str, str], example: ExampleFn) -> None:
    def named(record: dict[str, Any]) -> dict[str, Any]:
        """TFDS gives the label as a class index."""
        return {**record, "label": list(answers)[record["label"]]}

    splits: Splits = {
        split: [
            Files((f"superglue/{folder}/{file}",), json_lines),
            Tfds(f"super_glue/{name}:1.0.2", split, named),
        ]
        for split, file in FILES.items()
    }
    add(
        name,
        {**splits, "reported": splits["validation"]},
        example,
        metric_fns=[metrics.accuracy],
        postprocess_fn=postprocess.first_word,
        choices=list(answers.values()),
    )


_add("rte", "RTE", RTE_ANSWERS, _entailment(templates.entailment, RTE_ANSWERS))
_add("cb", "CB", CB_ANSWERS, _entailment(templates.entailment_or_neither, CB_ANSWERS))
_add("wic", "WiC", WIC_ANSWERS, _wic)
