"""A run in a bucket that is killed and started again ends as an uninterrupted one in a folder."""

import json
import shutil
import signal

import pytest
import toy
from test_resume import STATUS, TESTS, start

import robust_ft
from robust_ft import buckets, train
from robust_ft.command_line import RESUME
from robust_ft.errors import UserError
from robust_ft.files import as_path
from robust_ft.report import write_report

pytestmark = [pytest.mark.slow, pytest.mark.buckets]

INTERRUPTIONS = [
    ("saving", "prompt", 2),  # some of the checkpoint's objects are there
    ("step", "model", 3),
    ("terminated", "model", 5),
    ("evaluated", "model", 0),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted local run."""
    folder = tmp_path_factory.mktemp("local") / "whole"
    ended = start("nowhere", "-", 0, folder)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module", params=["gs", "s3"])
def run(request, tmp_path_factory):
    """The place of a run in a bucket that was interrupted, while its bucket is served.

    Its cached data are in the bucket, too. Before it ends it is on a host that has no copies.
    """
    from emulators import BUCKET, served

    home = tmp_path_factory.mktemp("home")
    log = tmp_path_factory.mktemp("emulator") / "log.txt"
    with served(request.param, log), pytest.MonkeyPatch.context() as patch:
        place, caches = (f"{request.param}://{BUCKET}/{name}" for name in ("runs/broken", "caches"))
        patch.setenv("HOME", str(home))
        patch.setenv("ROBUST_FT_CACHE_DIR", caches)
        for where, stage, step in INTERRUPTIONS:
            ended = start(where, stage, step, place)
            wanted = STATUS.get(where, -signal.SIGKILL)
            assert ended.returncode == wanted, (where, stage, step, ended.stdout, ended.stderr)
            if wanted == RESUME:
                assert_refused(place, "an unfinished run")
        cached = objects(caches)
        assert any(name.endswith("examples.array_record") for name in cached)
        copies = home / ".cache" / "robust_ft" / "caches"
        shutil.rmtree(copies)
        last = start("nowhere", "-", 0, place)
        assert last.returncode == 0, last.stderr
        assert list(copies.glob("*/*/examples.array_record")) and objects(caches) == cached
        assert "Traceback" not in last.stderr
        yield place


def assert_refused(place, state):
    flags = [f"--gin_file={TESTS / 'toy_promot.gin'}", f"--gin.MODEL_DIR={place!r}"]
    before = objects(place)
    with pytest.raises(UserError, match=rf"{place} holds {state}, .*, now 0\.5"):
        train.main([*flags, "--gin.LEARNING_RATE=0.5"])
    assert objects(place) == before


def objects(place):
    """Returns the content of all objects below a place, by name."""
    folder = as_path(place)
    return {name: (folder / name).read_bytes() for name in buckets.listed(folder)}


@pytest.fixture
def copied(run, tmp_path):
    """A local copy of the run."""
    for name, content in objects(run).items():
        file = tmp_path / "copied" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "copied"


def test_checkpoints(whole, copied):
    for stage in ("prompt", "model"):
        assert (copied / stage / "outcome.json").read_text() == (
            whole / stage / "outcome.json"
        ).read_text()
        toy.assert_same(toy.final(copied, stage), toy.final(whole, stage))
        steps = [sorted(p.name for p in (f / stage).glob("checkpoint_*")) for f in (copied, whole)]
        assert steps[0] == steps[1]


def test_results_and_predictions(run, whole, copied):
    kinds = (".json", ".jsonl", ".gin", ".md", ".txt", ".html", ".png")
    names = [
        {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.suffix in kinds and "checkpoint_" not in str(path.relative_to(folder))
        }
        for folder in (copied, whole)
    ]
    assert names[0] == names[1] and len(names[0]) > 20
    for name in names[0]:
        if name.endswith((".html", ".png")):
            continue
        texts = [(folder / name).read_text() for folder in (copied, whole)]
        texts = [t.replace(str(place), "") for t, place in zip(texts, (run, whole), strict=True)]
        if name.endswith("metrics.jsonl"):  # the final evaluation is there twice
            texts = [list(dict.fromkeys(text.splitlines())) for text in texts]
        assert texts[0] == texts[1], name


def test_tensorboard(whole, copied):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    steps = [
        {
            event.step
            for file in (folder / "model" / "train").glob("events*")
            for event in EventFileLoader(str(file)).Load()
            if event.summary.value
        }
        for folder in (copied, whole)
    ]
    assert steps[0] == steps[1] and len(steps[0]) == 12


def test_report_and_used_folder(run, whole, tmp_path):
    report = write_report([run], tmp_path / "report")
    assert all(file.stat().st_size > 100 for file in report.files)
    assert report.markdown.read_text() == (whole / "report.md").read_text()
    assert_refused(run, "a finished run")


def test_a_finished_run_is_loaded(run, whole):
    inputs = ["is 4 odd", "is 5 odd", "count 3"]
    assert robust_ft.load(run).predict(inputs) == robust_ft.load(whole).predict(inputs)
    prompt = robust_ft.load(run, stage="prompt").score(inputs, ["a", "b", "x"])
    assert list(prompt) == list(
        robust_ft.load(whole, stage="prompt").score(inputs, ["a", "b", "x"])
    )


def test_seeds_and_inference_in_a_bucket(run):
    from robust_ft import infer

    file = TESTS / "toy_promot.gin"
    flags = [f"--gin_file={file}", f"--gin.MODEL_DIR={run!r}"]
    infer.main(flags)
    written = {name: text for name, text in objects(run).items() if "-predict.jsonl" in name}
    (lines,) = written.values()
    assert all("prediction" in json.loads(line) for line in lines.decode().splitlines())
