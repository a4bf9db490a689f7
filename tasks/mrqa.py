"""The reading comprehension sets of the MRQA 2019 shared task, for domain shift (prompt tuning).

  in domain (train, validation)     mrqa_squad mrqa_news_qa mrqa_trivia_qa mrqa_search_qa
                                    mrqa_hotpot_qa mrqa_natural_questions
  out of domain (validation, test:  mrqa_bio_asq mrqa_drop mrqa_duo_rc mrqa_race
  the same examples)                mrqa_relation_extraction mrqa_textbook_qa

The paper trains on SQuAD, so the exemplars of the other tasks are from SQuAD. Inputs are T5's,
`question: ... context: ...`; all answers are references.

Read from `$ROBUST_FT_DATA_DIR/mrqa/{train,dev}/<official name>.jsonl.gz`, else TFDS's `mrqa` 1.0.0.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from robust_ft import metrics
from robust_ft.data.raw_files import Row, json_lines, text, texts
from robust_ft.data.seqio_tasks import Files, Tfds, add
from robust_ft.metrics import postprocess

# TFDS's names and the official files'.
IN_DOMAIN = {
    "squad": "SQuAD",
    "news_qa": "NewsQA",
    "trivia_qa": "TriviaQA-web",
    "search_qa": "SearchQA",
    "hotpot_qa": "HotpotQA",
    "natural_questions": "NaturalQuestionsShort",
}
OUT_OF_DOMAIN = {
    "bio_asq": "BioASQ",
    "drop": "DROP",
    "duo_rc": "DuoRC.ParaphraseRC",
    "race": "RACE",
    "relation_extraction": "RelationExtraction",
    "textbook_qa": "TextbookQA",
}


def _read(files: Sequence[Path]) -> Iterator[Row]:
    for place, record in json_lines(files):
        if "header" in record:
            continue
        for question in record["qas"]:
            yield Row(place, {"context": record.get("context"), **question})


def _example(record: dict[str, Any]) -> Mapping[str, Any]:
    answers = list(dict.fromkeys(texts(record, "answers")))
    question, context = (" ".join(text(record, name).split()) for name in ("question", "context"))
    return {
        "inputs": f"question: {question} context: {context}",
        "targets": answers[0],
        "references": answers,
    }


def _add(name: str, folders: Mapping[str, tuple[str, str]], file: str) -> None:
    """Registers a task; `folders` are the official folder and TFDS's split of each of ours."""
    add(
        f"mrqa_{name}",
        {
            split: [
                Files((f"mrqa/{folder}/{file}.jsonl.gz",), _read),
                Tfds(f"mrqa/{name}:1.0.0", tfds_split),
            ]
            for split, (folder, tfds_split) in folders.items()
        },
        _example,
        metric_fns=[metrics.token_f1, metrics.exact_match],
        postprocess_fn=postprocess.identity,
        references=True,
        exemplars=None if "train" in folders else "mrqa_squad",
    )


for _name, _file in IN_DOMAIN.items():
    _add(_name, {"train": ("train", "train"), "validation": ("dev", "validation")}, _file)
for _name, _file in OUT_OF_DOMAIN.items():
    _add(_name, dict.fromkeys(("validation", "test"), ("dev", "test")), _file)
