"""Paths in buckets: what is read and written there, what is refused, and what is said if it fails.

The bucket is in this process's memory; `test_bucket_runs` runs recipes in served ones.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
import toy
from fsspec.implementations.memory import MemoryFileSystem

import robust_ft
from robust_ft import assets, bucket_copies, buckets, train
from robust_ft.checkpoints_io import sources
from robust_ft.claiming import claim
from robust_ft.convert import convert
from robust_ft.data import build, cache
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError
from robust_ft.files import as_path, check_local, read_json, replacing, write_json
from robust_ft.inference import Inference
from robust_ft.metric_writer import MetricWriter, read_metrics
from robust_ft.recipe import Recipe
from robust_ft.report import write_report
from robust_ft.summary import Row, Summary

TESTS = Path(__file__).parent
BUCKETS = ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run"), "gs:/bucket/run"]
REFUSED = {
    "convert input": lambda path: convert(os.fspath(path), "/tmp/out"),
    "convert output": lambda path: convert("asset:mini", os.fspath(path)),
    "data file": lambda path: FileTask(name="t", inputs="{a}", targets="{b}", train=str(path)),
}
TAKEN = {
    "model_dir": lambda path: Recipe("toy", os.fspath(path), (toy.stage(),)),
    "output_dir": lambda path: Inference((), output_dir=path),
    "report of": lambda path: write_report([path], "/tmp/report"),
    "report in": lambda path: write_report(["/tmp/run"], path),
    "cache": lambda path: cache.root(os.fspath(path)),
    "load": robust_ft.load,
}
ASKED = {
    "claim": lambda path: claim(Recipe("toy", os.fspath(path), (toy.stage(),))),
    "load": robust_ft.load,
    "vocabulary": robust_ft.vocabulary.vocabulary_from_directory,
    "cache": TAKEN["cache"],
    "report of": TAKEN["report of"],
    "train": lambda path: train.main(
        [f"--gin_file={TESTS / 'toy_promot.gin'}", f"--gin.MODEL_DIR={path}"]
    ),
}


def failing(error):
    """Returns a function of any arguments that raises an error."""

    def fail(*_, **__):
        raise error

    return fail


class Memory(MemoryFileSystem):
    """A storage in memory; all instances share it."""

    protocol = ("s3",)
    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))


@pytest.fixture
def system(monkeypatch):
    """Lets s3:// be in memory; the test may replace its `ls`."""
    from etils.epath import backend

    monkeypatch.setitem(buckets._STORAGES, "s3", buckets._Storage("fsspec", "s3"))
    monkeypatch.setattr(buckets, "_answered", set())
    monkeypatch.setattr(Memory, "store", {})
    made = Memory()
    made.pipe("/bucket/there", b"")
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: made)
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: made)
    return made


@pytest.mark.parametrize("path", BUCKETS, ids=map(str, BUCKETS))
@pytest.mark.parametrize("place", REFUSED)
def test_a_bucket_is_refused(place, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'(gs|s3)://bucket/run' is in a bucket"):
        REFUSED[place](path)
    assert not list(tmp_path.iterdir()), "no folder called 'gs:'"


@pytest.mark.parametrize("place", TAKEN)
def test_other_storages_and_whole_buckets_are_refused(place):
    with pytest.raises(UserError, match=r"'hdfs://host/run' is in a storage .* does not know"):
        TAKEN[place]("hdfs://host/run")
    with pytest.raises(UserError, match=r"'gs://bucket' names no folder .* give gs://bucket/FOLD"):
        TAKEN[place]("gs://bucket")


@pytest.mark.parametrize("place", ASKED)
def test_what_is_not_installed(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gs://bucket/run.* gcsfs, .* 'robust_ft\[gcs\]'"):
        ASKED[place]("gs://bucket/run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError("b/bucket/o"), r"there is no bucket 's3://bucket'\.$"),
        (OSError("Name or service not known"), r"\(Name or service not known\); check the network"),
        (ValueError("Unable to locate credentials"), r"credentials\); run 'aws configure', or set"),
        (PermissionError("Access Denied"), r"\(Access Denied\); run 'aws configure'"),
    ],
)
@pytest.mark.parametrize("place", ASKED)
def test_a_bucket_that_cannot_be_reached(place, error, said, system, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(system, "ls", failing(error))
    with pytest.raises(UserError, match=rf"'s3://bucket/run' cannot be reached.*{said}"):
        ASKED[place]("s3://bucket/run")


def test_a_bucket_that_does_not_answer(system, monkeypatch):
    monkeypatch.setattr(buckets, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(system, "ls", lambda path: time.sleep(5))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0\.1 s; check the network"):
        as_path("s3://bucket/run")
    assert time.monotonic() - started < 2


def test_a_bucket_that_cannot_be_written(system, monkeypatch):
    monkeypatch.setattr(system, "_open", failing(PermissionError("Access Denied")))
    with pytest.raises(UserError, match=r"'s3://bucket/run' cannot be written \(Access Denied\)"):
        buckets.check_writable(as_path("s3://bucket/run"))


def test_a_bucket_is_asked_once(system, monkeypatch):
    assert as_path("s3://bucket/run") == as_path(Path("s3://bucket/run"))
    monkeypatch.setattr(system, "ls", failing(OSError("gone")))
    as_path("s3://bucket/other")


def test_paths(system):
    folder = as_path("s3://bucket/run")
    (folder / "a" / "b.txt").write_text("text")
    assert isinstance(folder, Path) and str(folder.absolute()) == "s3://bucket/run"
    assert (folder / "a").is_dir() and not (folder / "a").is_file()
    assert (folder / "a" / "b.txt").is_file() and not (folder / "c").exists()
    (folder / "c").mkdir(parents=True)
    assert list((folder / "c").iterdir()) == [] and not (folder / "c").exists()
    assert list(folder.glob("*/b.txt")) == [folder / "a" / "b.txt"]
    assert list(buckets.listed(folder)) == ["a/b.txt"]
    assert str(folder.parent / "x") == "s3://bucket/x"


def test_files_and_folders_are_put_whole(system):
    file = as_path("s3://bucket/run/a.json")
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, object())
    assert read_json("s3://bucket/run/a.json") == {"a": 1}
    assert read_json("s3://bucket/run/b.json", default=None) is None
    folder = file.with_name("export")
    for names in (["x", "y"], ["y", "z"]):
        with replacing(folder) as temporary:
            temporary.mkdir()
            for name in names:
                (temporary / name).write_text(name)
    with pytest.raises(KeyboardInterrupt), replacing(folder) as temporary:
        temporary.mkdir()
        raise KeyboardInterrupt
    assert sorted(buckets.listed(folder)) == ["y", "z"]


def test_metrics_and_summary(system, tmp_path):
    for directory in ("s3://bucket/run/stage", tmp_path / "stage"):
        with MetricWriter(directory) as writer:
            for step in range(4):
                writer.write(step, {"loss": 1 / (step + 1)})
            writer.flush()
            file = as_path(directory) / "metrics.jsonl"
            assert [line["step"] for line in read_metrics(file)] == [0, 1, 2, 3]
        with MetricWriter(directory) as writer:  # as after a kill
            writer.truncate(1)
            writer.write(2, {"loss": float("nan")})
            writer.write(2, {"accuracy": 50.0}, "validation", "toy")
        assert len(list((as_path(directory) / "train").glob("events*"))) == 2
        Summary(directory).add([Row("stage", 2, "toy", "target", "test", 0, "accuracy", 50.0, 4)])
        assert Summary(directory).rows[0].value == 50.0
    for name in ("metrics.jsonl", "inference_eval/toy-metrics.jsonl", "summary.json"):
        written = as_path(f"s3://bucket/run/stage/{name}").read_bytes()
        assert written == (tmp_path / "stage" / name).read_bytes(), name


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home of this test's own, for copies."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    bucket_copies._copied.cache_clear()
    yield tmp_path / "home"
    bucket_copies._copied.cache_clear()


def test_models_are_copied_once(system, home, monkeypatch):
    mini = Path(assets.resolve("asset:mini"))
    for file in mini.iterdir():
        system.pipe(f"/bucket/models/mini/{file.name}", file.read_bytes())
    question = ["Q : what is the capital of Galdia ? A :"]
    model = robust_ft.load("s3://bucket/models/mini")
    assert model.predict(question) == robust_ft.load("asset:mini").predict(question)
    weights = sources.weights("s3://bucket/models/mini/model.safetensors")
    assert weights.keys() == sources.weights("asset:mini/model.safetensors").keys()
    copies = sorted(path for path in home.rglob("*") if path.is_file())
    bucket_copies._copied.cache_clear()
    monkeypatch.setattr(system, "get", failing(AssertionError("copied again")))
    sources.read("s3://bucket/models/mini")
    assert copies == sorted(path for path in home.rglob("*") if path.is_file())
    with pytest.raises(UserError, match="There is nothing at 's3://bucket/models/other'"):
        robust_ft.load("s3://bucket/models/other")


def test_caches_are_copied_and_put(system, home, monkeypatch):
    local = cache.ensure(toy.DATA)
    data = dataclasses.replace(toy.DATA, cache_dir="s3://bucket/caches")
    (built,) = cache.ensure(data)
    assert [built.info.content] == [task.info.content for task in local]
    there = set(buckets.listed(as_path("s3://bucket/caches")))
    name = Path(built.directory).name
    assert there == {f"{name}/examples.array_record", f"{name}/info.json"}
    assert Path(built.directory).is_relative_to(home)
    shutil.rmtree(home)  # another host
    monkeypatch.setattr(build, "build", failing(AssertionError("built again")))
    assert cache.ensure(data) == [built]
    # One that is about to be replaced is not taken.
    shutil.rmtree(home)
    system.rm(f"/bucket/caches/{name}/info.json")
    assert cache.load(data) is None


def test_local_paths_need_nothing_of_this(tmp_path):
    for path in ("asset:mini", str(tmp_path), "C:/run", "google-t5/t5-small", "a,b"):
        check_local(path, "path")
        buckets.check(path, "path")
        assert type(as_path(path)) is type(tmp_path)
    program = (
        "import sys; from robust_ft import metric_writer; from robust_ft.report import runs;"
        "assert not {'gcsfs', 's3fs', 'robust_ft.bucket_path', 'tensorflow'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
