"""A path in a bucket is refused wherever a path is given; it never becomes a local folder."""

import os
from pathlib import Path

import pytest
import toy

import robust_ft
from robust_ft.convert import convert
from robust_ft.data import cache
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError
from robust_ft.files import check_local
from robust_ft.inference import Inference
from robust_ft.recipe import Recipe
from robust_ft.report import write_report

BUCKETS = ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run"), "gs:/bucket/run"]
PLACES = {
    "model_dir": lambda path: Recipe("toy", os.fspath(path), (toy.stage(),)),
    "output_dir": lambda path: Inference((), output_dir=path),
    "load": robust_ft.load,
    "convert input": lambda path: convert(os.fspath(path), "/tmp/out"),
    "convert output": lambda path: convert("asset:mini", os.fspath(path)),
    "report of": lambda path: write_report([path], "/tmp/report"),
    "report in": lambda path: write_report(["/tmp/run"], path),
    "data file": lambda path: FileTask(name="t", inputs="{a}", targets="{b}", train=str(path)),
    "cache": lambda path: cache.root(os.fspath(path)),
}


@pytest.mark.parametrize("path", BUCKETS, ids=map(str, BUCKETS))
@pytest.mark.parametrize("place", PLACES)
def test_a_bucket_is_refused(place, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'(gs|s3)://bucket/run' is in a bucket"):
        PLACES[place](path)
    assert not list(tmp_path.iterdir()), "no folder called 'gs:'"


def test_other_paths_are_none(tmp_path):
    for path in ("asset:mini", str(tmp_path), "C:/run", "google-t5/t5-small", "a,b"):
        check_local(path, "path")
