"""A recipe over a Parquet file whose rows have choices of their own: trained, ranked, selected."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

pytest.importorskip("seqio")

import robust_ft
from robust_ft import gin_config
from robust_ft.data import loader
from robust_ft.files import read_json

THINGS = ["lamp", "cup", "rope", "drum", "coat"]
PEOPLE = ["Mira", "Tovo", "Lena", "Arik", "Suni", "Beda", "Karo", "Nima"]


def exam():
    """Returns rows with two to four choices; the right one is at every place."""
    rows = []
    for i in range(40):
        right = THINGS[i % 5]
        choices = [f"the {THINGS[(i + k) % 5]}" for k in range(1, 2 + i % 3)]
        choices.insert(i % (len(choices) + 1), f"the {right}")
        question = f"{PEOPLE[i // 5]} found the {right} . Q : what ? A :"
        rows.append(
            {"question": question, "choices": choices, "answer": choices.index(f"the {right}")}
        )
    return rows


@pytest.mark.slow
def test_choices_of_each_row_are_ranked(tmp_path):
    rows = exam()
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "exam.parquet")
    (tmp_path / "exam.gin").write_text(f"""
MIXTURE_OR_TASK_NAME = 'exam'
MIXTURE_OR_TASK_MODULE = 'tasks.mini'
TASK_FEATURE_LENGTHS = {{'inputs': 24, 'targets': 6}}
MAX_DECODE_LENGTH = 6
HELD_OUT_TASKS = {{}}
TARGET_FORMAT = None
TRAIN_STEPS = 2
EVAL_PERIOD = 2
BATCH_SIZE = 8
TaskData.file_tasks = [@exam/FileTask()]
exam/FileTask:
  name = 'exam'
  train = '{tmp_path}/exam.parquet'
  validation = 0.25
  test = 0.2
  inputs = '{{question}}'
  targets = '{{answer}}'
  choices = '{{choices}}'
  answer = 'index'
""")
    files = ["gin_configs/full_rte.gin", str(tmp_path / "exam.gin")]
    macros = [f"MODEL_DIR={tmp_path}/run", f"CACHE_DIR={tmp_path}/cache"]
    recipe = gin_config.load(files, macros).recipe
    robust_ft.run(recipe)

    right = {row["question"]: row["choices"][row["answer"]] for row in rows}
    choices = {row["question"]: row["choices"] for row in rows}
    summary = read_json(tmp_path / "run" / "summary.json")
    seen = set()
    for split, name in (("validation", "exam-000000"), ("test", "exam-test-000000")):
        lines = (tmp_path / f"run/model/inference_eval/{name}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert records and not seen & {record["input"] for record in records}
        seen |= {record["input"] for record in records}
        for record in records:
            assert record["target"] == right[record["input"]]
            assert record["prediction"] in choices[record["input"]]
        # The pretrained model ranks these texts as it does outside of any recipe.
        ranked = robust_ft.load("asset:mini").rank(
            [record["input"] for record in records],
            [choices[record["input"]] for record in records],
        )
        best = [choices[record["input"]][i] for record, i in zip(records, ranked.best, strict=True)]
        assert best == [record["prediction"] for record in records]
        share = sum(record["prediction"] == record["target"] for record in records) / len(records)
        [value] = [
            row["value"]
            for row in summary
            if (row["split"], row["step"], row["metric"]) == (split, 0, "accuracy")
        ]
        assert value == pytest.approx(100 * share)
    trained = {e.inputs_text for e in loader.eval_examples(recipe.stages[0].data)}
    assert trained | seen == set(right) and not trained & seen
