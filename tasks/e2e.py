"""E2E NLG: texts for attributes of restaurants, e.g. `name : Alimentum | area : city centre`.

train 42,061 (one example a text), validation 547 and test 630 (one example a set of attributes,
with all its texts as references). Read from `$ROBUST_FT_DATA_DIR/e2e_nlg/trainset.csv`,
`devset.csv` and `testset_w_refs.csv`. TFDS has only cleaned versions of the corpus, with other
examples.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_ft import metrics
from robust_ft.data.raw_files import Row, quoted, text
from robust_ft.data.seqio_tasks import Files, add
from robust_ft.metrics import postprocess

_ATTRIBUTE = re.compile(r"\s*([^\[\],]+)\[([^\[\]]*)\]\s*(?:,|$)")


def linearize(meaning: str) -> str:
    """Returns `name : Alimentum | area : city centre` for `name[Alimentum], area[city centre]`.

    Raises:
        ValueError: `meaning` is not of this form.
    """
    attributes = _ATTRIBUTE.findall(meaning)
    if not attributes or _ATTRIBUTE.sub("", meaning):
        raise ValueError(f"'{meaning}' is not a list of attributes 'name[value], ...'")
    return " | ".join(f"{name} : {value}" for name, value in attributes)


def _grouped(files: Sequence[Path]) -> Iterator[Row]:
    """Yields each set of attributes once, at its first line, with all its texts."""
    groups: dict[str, Row] = {}
    for place, record in quoted(files):
        first = groups.setdefault(record["mr"], Row(place, {**record, "texts": []}))
        first.record["texts"].append(record["ref"])
    yield from groups.values()


def _example(record: dict[str, Any]) -> Mapping[str, Any]:
    references = record.get("texts", [text(record, "ref")])
    return {
        "inputs": linearize(text(record, "mr")),
        "targets": text(record, "ref"),
        "references": references,
    }


add(
    "e2e",
    {
        "train": [Files(("e2e_nlg/trainset.csv",), quoted)],
        "validation": [Files(("e2e_nlg/devset.csv",), _grouped)],
        "test": [Files(("e2e_nlg/testset_w_refs.csv",), _grouped)],
    },
    _example,
    metric_fns=[metrics.bleu, metrics.nist, metrics.rouge, metrics.cider],
    postprocess_fn=postprocess.identity,
    references=True,
)
