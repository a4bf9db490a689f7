"""Files are read as pandas and `datasets` read them, which are in the extra [parity]."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("seqio")

from test_file_kinds import CELLS, examples

pandas = pytest.importorskip("pandas")
datasets = pytest.importorskip("datasets")

datasets.disable_progress_bars()
pytestmark = pytest.mark.parity

ROWS = [
    {
        "question": f"Où, {i}?",
        "answer": "ab"[i % 2],
        "options": ["a", "b", f"c{i}"],
        "label": i % 2,
        "yes": i % 3 == 0,
        "x": i / 4,
        "answers": {"text": ["one", f"two {i}"], "start": [1, 2]},
    }
    for i in range(50)
]
TASK = {
    "inputs": "{question} {yes} {x} {answers.text[1]}",
    "targets": "{label}",
    "choices": "{options}",
    "answer": "index",
}
FLAT = {"inputs": "{question} {yes} {x}", "targets": "{answer}"}


def check(found, rows, nested=True):
    """Compares examples with what an f-string makes of rows as Python holds them."""
    inputs, targets = [], []
    for row in rows:
        text = f"{row['question']} {row['yes']} {row['x']}"
        inputs.append(f"{text} {row['answers']['text'][1]}" if nested else text)
        targets.append(row["options"][row["label"]] if nested else row["answer"])
    assert [example["inputs"] for example in found] == inputs
    assert [example["targets"] for example in found] == targets


FRAMES = {
    "a.csv": lambda frame, path: frame.to_csv(path, index=False),
    "indexed.csv": lambda frame, path: frame.to_csv(path),
    "a.csv.gz": lambda frame, path: frame.to_csv(path, index=False),
    "records.json": lambda frame, path: frame.to_json(path, orient="records"),
    "lines.json": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "table.json": lambda frame, path: frame.to_json(path, orient="table"),
    "a.jsonl.gz": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "a.parquet": lambda frame, path: frame.to_parquet(path),
    "brotli.parquet": lambda frame, path: frame.to_parquet(path, compression="brotli"),
    "a.feather": lambda frame, path: frame.to_feather(path),
}


@pytest.mark.parametrize("name", FRAMES)
def test_what_pandas_writes(name, tmp_path):
    FRAMES[name](pandas.DataFrame(ROWS), str(tmp_path / name))
    flat = name.split(".")[1] == "csv"
    found = examples(test=str(tmp_path / name), **(FLAT if flat else TASK))
    check(found, ROWS, nested=not flat)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1), st.sampled_from(",;\t|"), st.booleans())
@settings(max_examples=60, deadline=None)
def test_csv_files_read_as_pandas_reads_them(tmp_path_factory, cells, delimiter, quote_all):
    path = str(tmp_path_factory.mktemp("pandas") / "a.csv")
    frame = pandas.DataFrame(cells, columns=["question", "answer"])
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    frame.to_csv(path, sep=delimiter, index=False, quoting=quoting)
    read = pandas.read_csv(path, sep=delimiter, dtype=str, keep_default_na=False)
    found = examples(test=path, delimiter=delimiter)
    assert [[e["inputs"], e["targets"]] for e in found] == read.to_numpy().tolist()


FEATURES = datasets.Features(
    {
        "question": datasets.Value("large_string"),
        "answer": datasets.Value("string"),
        "options": datasets.Sequence(datasets.Value("string")),
        "label": datasets.ClassLabel(names=["no", "yes"]),
        "yes": datasets.Value("bool"),
        "x": datasets.Value("float64"),
        "answers": {
            "text": datasets.Sequence(datasets.Value("string")),
            "start": datasets.Sequence(datasets.Value("int32")),
        },
    }
)
DATASETS = {
    "plain": lambda: datasets.Dataset.from_list(ROWS),
    "features": lambda: datasets.Dataset.from_list(ROWS, features=FEATURES),
    "selected": lambda: datasets.Dataset.from_list(ROWS).select([5, 3, 40]).shuffle(seed=1),
    "mapped": lambda: datasets.Dataset.from_list(ROWS).map(
        lambda row: {"question": row["question"].upper()}
    ),
    "formatted": lambda: datasets.Dataset.from_list(ROWS).with_format("numpy"),
}


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_dataset_saved_to_disk(kind, shards, tmp_path):
    DATASETS[kind]().save_to_disk(str(tmp_path / "saved"), num_shards=shards)
    reference = datasets.load_from_disk(str(tmp_path / "saved")).with_format(None)
    check(examples(test=str(tmp_path / "saved"), **TASK), reference)


def test_a_dataset_with_splits_saved_to_disk(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    parts = datasets.DatasetDict(train=whole.select(range(40)), test=whole.select(range(40, 50)))
    folder = str(tmp_path / "saved")
    parts.save_to_disk(folder)
    for split in ("train", "test"):
        found = examples(split, train=folder, test=folder, validation=0.2, **TASK)
        rows = datasets.load_from_disk(folder)[split]
        if split == "train":
            found = sorted(
                [*found, *examples("validation", train=folder, validation=0.2, **TASK)],
                key=lambda example: int(example["inputs"].split("?")[0].split()[-1]),
            )
        check(found, rows)


@pytest.mark.parametrize("name", ["a.csv", "lines.json", "a.jsonl", "a.parquet"])
def test_what_datasets_writes(name, tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    write = {"csv": whole.to_csv, "json": whole.to_json, "jsonl": whole.to_json}
    write.get(name.split(".")[1], whole.to_parquet)(str(tmp_path / name))
    flat = name.endswith("csv")
    found = examples(test=str(tmp_path / name), **(FLAT if flat else TASK))
    check(found, ROWS, nested=not flat)
