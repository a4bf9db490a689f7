"""summary.json: rows replace each other, survive restarts and are forgotten on a resume."""

import json
import math

from robust_ft.summary import Row, Summary


def row(stage="model", step=0, metric="accuracy", value=1.0, **changes):
    fields = {"task": "toy", "role": "target", "split": "test", "shots": 0}
    rest = {"metric": metric, "value": value, "num_examples": 3}
    return Row(**{"stage": stage, "step": step, **fields, **rest, **changes})


def on_disk(folder):
    return [Row.from_json(entry) for entry in json.loads((folder / "summary.json").read_text())]


def test_rows_are_on_disk_at_once_and_read_again(tmp_path):
    summary = Summary(tmp_path)
    summary.add([row(), row(step=2)])
    summary.add([row(step=4)])
    assert on_disk(tmp_path) == summary.rows == [row(), row(step=2), row(step=4)]
    again = Summary(tmp_path)
    assert again.rows == summary.rows
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_row_replaces_its_equal(tmp_path):
    summary = Summary(tmp_path)
    summary.add([row(value=1.0), row(step=2)])
    summary.add([row(value=5.0, num_examples=9)])
    assert summary.rows == [row(value=5.0, num_examples=9), row(step=2)]
    for field in ("stage", "task", "split", "metric"):
        summary.add([row(**{field: "other"})])
    summary.add([row(shots=1)])
    assert len(summary.rows) == 7


def test_truncate_forgets_one_stage_after_a_step(tmp_path):
    summary = Summary(tmp_path)
    rows = [row(stage, step) for stage in ("prompt", "model") for step in (0, 2, 4)]
    summary.add(rows)
    summary.truncate("model", 2)
    assert on_disk(tmp_path) == summary.rows == rows[:-1]
    summary.truncate("model", -1)
    assert on_disk(tmp_path) == rows[:3]


def test_rows_of_earlier_versions_are_read(tmp_path):
    entry = {"stage": "full", "step": 5, "task": "toy", "split": "test", "shots": 0}
    entry |= {"metric": "accuracy", "value": None}
    (tmp_path / "summary.json").write_text(json.dumps([entry]))
    (read,) = Summary(tmp_path).rows
    assert (read.role, read.num_examples, read.weight) == ("", 0, None) and math.isnan(read.value)


def test_results_with_and_without_a_method_stand_side_by_side(tmp_path):
    summary = Summary(tmp_path)
    without = row(task="other", role="held_out", without=("lora",))
    kept = row(task="other", role="kept", value=0.0)
    summary.add([kept, without])
    summary.add([without])
    assert Summary(tmp_path).rows == summary.rows == [kept, without]
    text = (tmp_path / "summary.json").read_text()
    assert text.count("without") == 1 and text.count("kept") == 1
    # What else differs in `without` is one result: the baseline replaces a stage's own.
    summary.add([row(step=0)])
    summary.add([row(step=0, without=("lora",))])
    assert summary.rows[2:] == [row(step=0, without=("lora",))]


def test_rows_are_the_json_they_were_read_from(tmp_path):
    summary = Summary(tmp_path)
    summary.add([row(value=1.0), row(metric="count", value=3), row(weight=0.5)])
    text = (tmp_path / "summary.json").read_text()
    assert '"lambda": 0.5' in text and text.count("lambda") == 1 and '"value": 3,' in text
    Summary(tmp_path).add([])
    assert (tmp_path / "summary.json").read_text() == text


def test_other_processes_write_nothing(tmp_path):
    summary = Summary(tmp_path, enabled=False)
    summary.add([row()])
    summary.truncate("model", -1)
    assert summary.rows == [] and not list(tmp_path.iterdir())
