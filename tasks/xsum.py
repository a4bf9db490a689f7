"""XSum: BBC articles and their first sentence, in news categories read off the article's address.

  xsum        all articles with ProMoT's template: train 203,577, validation 11,305, test 11,301
  xsum_id     categories uk, business and world; the bare article (Ensembles and Cocktails)
  xsum_ood    all other news categories, under the names `validation` and `test`

The category is what follows `/news/`, up to the first hyphen where that ends in the article's
number: `/news/uk-england-london-1234` and `/news/uk/1234` are "uk", `/news/uk-england/1234` is
"uk-england". This rule made the data of prefix-tuning, and it explains the paper's list of
categories. Articles outside `/news/` (sport, newsround) are in neither. The paper has 129K, 7K and
7K ID examples and 20K OOD ones, more than the official validation and test splits leave: `xsum_ood`
is the OOD articles of all three. OOD data is never used for a choice.

Read from `$ROBUST_FT_DATA_DIR/xsum`: XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json and, in any folders
beside it, `<id>.data` or `<id>.summary` as published. Else TFDS's `xsum` 1.1.0, which has no
addresses, so only `xsum`. As in TFDS, empty lines and the page's buttons are left out.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from robust_ft import metrics
from robust_ft.data.raw_files import Row, text
from robust_ft.data.seqio_tasks import Files, Origin, Splits, Tfds, add
from robust_ft.errors import UserError
from robust_ft.files import read_json
from robust_ft.metrics import postprocess
from tasks import templates

ID_CATEGORIES = ("uk", "business", "world")
SPLIT_FILE = "xsum/XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"

_BUTTONS = {
    "Share this with",
    "Email",
    "Facebook",
    "Messenger",
    "Twitter",
    "Pinterest",
    "WhatsApp",
    "Linkedin",
    "LinkedIn",
    "Copy this link",
    "These are external links and will open in a new window",
}
# The names of a document's parts, in the two forms that are published.
_PARTS = {
    "url": ("URL",),
    "summary": ("INTRODUCTION", "FIRST-SENTENCE"),
    "document": ("RESTBODY",),
}


def category(url: str) -> str | None:
    """Returns the news category of an article's address, None if it is not news."""
    match = re.search(r"/news/(?:([\w-]+)/\d+|([a-z]+)(?:-[\w-]+)?)/?$", url.split("?")[0])
    return (match[1] or match[2]) if match else None


def parse(content: str) -> dict[str, str]:
    """Returns url, summary and document of a published document.

    Raises:
        ValueError: A part is missing.
    """
    lines = (line for line in content.splitlines() if line.strip() and line not in _BUTTONS)
    pieces = re.split(r"\[(?:XSUM|SN)\]([A-Z-]+)\[(?:XSUM|SN)\]", "\n".join(lines))
    parts = {name: piece.strip() for name, piece in zip(pieces[1::2], pieces[2::2], strict=True)}
    record = {}
    for part, names in _PARTS.items():
        present = [parts[name] for name in names if name in parts]
        if not present:
            raise ValueError(f"it has no part [{'] or ['.join(names)}]")
        record[part] = present[0]
    return record


def _reader(splits: Sequence[str]) -> Callable[[Sequence[Path]], Iterator[Row]]:
    return lambda files: _articles(files[0], splits)


def _articles(split_file: Path, splits: Sequence[str]) -> Iterator[Row]:
    ids = [number for split in splits for number in read_json(split_file)[split]]
    files = {file.stem: file for file in sorted(split_file.parent.glob("*/*"))}
    missing = sum(number not in files for number in ids)
    where = f"of the {len(ids)} articles of {' and '.join(splits)}"
    if missing == len(ids):
        raise UserError(f"{split_file}: {where} not one is in a folder beside it.")
    if missing:
        logging.warning("%s: %s %d are in no folder beside it.", split_file, where, missing)
    for number in ids:
        if number not in files:
            continue
        place = str(files[number])
        try:
            record = parse(files[number].read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{place}: {error}.") from error
        yield Row(place, record)


def _example(
    template: Callable[[str], str], wanted: Callable[[str | None], bool] | None = None
) -> Callable[[dict[str, Any]], Mapping[str, str] | None]:
    def to_example(record: dict[str, Any]) -> Mapping[str, str] | None:
        if wanted is not None and not wanted(category(record["url"])):
            return None
        return {"inputs": template(text(record, "document")), "targets": text(record, "summary")}

    return to_example


def _is_ood(name: str | None) -> bool:
    return name is not None and name not in ID_CATEGORIES


_SPLITS = ("train", "validation", "test")
_FILES = {split: Files((SPLIT_FILE,), _reader([split])) for split in _SPLITS}
_ALL: Splits = {split: [_FILES[split], Tfds("xsum:1.1.0", split)] for split in _SPLITS}
_OOD: list[Origin] = [Files((SPLIT_FILE,), _reader(_SPLITS))]

add(
    "xsum",
    {**_ALL, "reported": _ALL["test"]},
    _example(templates.summary),
    metric_fns=[metrics.rouge],
    postprocess_fn=postprocess.promot,
)
add(
    "xsum_id",
    {split: [files] for split, files in _FILES.items()},
    _example(str, ID_CATEGORIES.__contains__),
    metric_fns=[metrics.rouge_stemmed],
    postprocess_fn=postprocess.identity,
)
add(
    "xsum_ood",
    {"validation": _OOD, "test": _OOD},
    _example(str, _is_ood),
    metric_fns=[metrics.rouge_stemmed],
    postprocess_fn=postprocess.identity,
    exemplars="xsum_id",
)
