import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robust_ft.errors import UserError
from robust_ft.metric_writer import MetricWriter, read_metrics


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
    """Reads a folder as TensorBoard shows it, in a process that has no tensorflow."""
    code = (
        "import sys, json; sys.modules['tensorboard.compat.notf'] = sys\n"
        "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "acc = EventAccumulator(sys.argv[1]); acc.Reload()\n"
        "tags = acc.Tags()\n"
        "out = {t: [(e.step, e.value) for e in acc.Scalars(t)] for t in tags['scalars']}\n"
        "print(json.dumps(out))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_scalars_go_to_both_places(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": np.float32(0.5), "tokens": np.int64(7)})
        writer.write(2, {"loss": 0.25, "tokens": 9})
        writer.write(2, {"accuracy": 90.0}, split="validation", task="mini_rte_0shot")
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "split": "train", "loss": 0.5, "tokens": 7},
        {"step": 2, "split": "train", "loss": 0.25, "tokens": 9},
        {"step": 2, "split": "validation", "task": "mini_rte_0shot", "accuracy": 90.0},
    ]
    assert lines(tmp_path / "inference_eval/mini_rte_0shot-metrics.jsonl") == [
        {"step": 2, "split": "validation", "accuracy": 90.0}
    ]
    assert events(tmp_path / "train")["loss"] == [[1, 0.5], [2, 0.25]]
    assert events(tmp_path / "inference_eval/mini_rte_0shot") == {"accuracy": [[2, 90.0]]}


def test_not_finite_values_are_null_with_a_note(tmp_path):
    values = {"loss": math.nan, "norm": math.inf, "low": -math.inf, "fine": 1.0}
    with MetricWriter(tmp_path) as writer:
        writer.write(3, values)

    def forbid(text):
        raise AssertionError(f"{text} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=forbid)
    assert record["loss"] is None and record["not_finite"]["norm"] == "inf"
    (back,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(back["loss"]) and back["norm"] == math.inf and back["low"] == -math.inf
    assert back["fine"] == 1.0 and "not_finite" not in back


@given(st.lists(st.dictionaries(st.text(), st.floats(), max_size=3), max_size=4))
def test_read_returns_what_was_written(tmp_path_factory, records):
    reserved = {"step", "split", "task", "not_finite"}
    records = [{k: v for k, v in r.items() if k not in reserved} for r in records]
    directory = tmp_path_factory.mktemp("run")
    writer = MetricWriter(directory)
    for step, record in enumerate(records):
        writer.write(step, {k.encode("utf-8", "replace").decode(): v for k, v in record.items()})
    writer.close()
    if records:
        read = read_metrics(directory / "metrics.jsonl")
        for step, (found, record) in enumerate(zip(read, records, strict=True)):
            assert found.pop("step") == step and found.pop("split") == "train"
            np.testing.assert_equal(list(found.values()), list(record.values()))


def test_truncate_on_resume(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
            writer.write(step, {"accuracy": 1.0}, split="validation", task="t")
    with MetricWriter(tmp_path) as writer:
        writer.truncate(3)
        assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")][-1] == 3
        assert len(lines(tmp_path / "inference_eval/t-metrics.jsonl")) == 3
        writer.write(4, {"loss": 40.0})
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert steps == [1, 2, 3, 4]
    # TensorBoard hides the steps that were trained again.
    assert events(tmp_path / "train")["loss"] == [[1, 1.0], [2, 2.0], [3, 3.0], [4, 40.0]]
    assert not list(tmp_path.glob(".*tmp"))


def test_truncate_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        writer.truncate(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_metric_cannot_replace_a_field(tmp_path):
    with pytest.raises(ValueError, match="'step'"):
        MetricWriter(tmp_path).write(1, {"step": 2.0})


def test_truncate_without_files(tmp_path):
    MetricWriter(tmp_path / "new").truncate(10)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', '{"step": 2, "split": "train"}'])
def test_a_line_cut_off_by_a_crash(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train"}\n' + tail)
    whole = tail.endswith("}")
    assert [r["step"] for r in read_metrics(path)] == ([1, 2] if whole else [1])
    with MetricWriter(tmp_path) as writer:
        writer.write(3, {"loss": 1.0})
    assert [r["step"] for r in read_metrics(path)] == ([1, 2, 3] if whole else [1, 3])


def test_a_disabled_writer_touches_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.truncate(0)
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_read_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no metrics file"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[1]\n{"step": 2}\n')
    with pytest.raises(UserError, match="Line 2 of"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_task_names_make_no_folders(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"bleu": 1.0}, split="test", task="wmt:en/fr")
    assert (tmp_path / "inference_eval/wmt_en_fr-metrics.jsonl").exists()


def test_tensorflow_is_never_imported(tmp_path):
    code = (
        "import sys\n"
        "class Forbid:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('tensorflow', 'jax'):\n"
        "            raise AssertionError('imported ' + name)\n"
        "sys.meta_path.insert(0, Forbid())\n"
        "from robust_ft.metric_writer import MetricWriter\n"
        "with MetricWriter(sys.argv[1]) as w:\n"
        "    w.write(1, {'loss': 1.0}); w.truncate(1); w.flush()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(list((tmp_path / "train").iterdir())) == 1
