"""The cache: what it holds, when it is rebuilt, what is left of a build that dies."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from robust_ft.data import cache, fingerprints, loader, records
from robust_ft.data.batching import ExampleReader
from robust_ft.errors import UserError
from robust_ft.vocabulary import ByteVocabulary

REPOSITORY = Path(__file__).parents[2]


def stored(cached):
    """Returns all (inputs, targets) of a cached task as lists of ids."""
    reader = ArrayRecordReader(cached.examples_file)
    decoded = (records.decode(record, cached.info.token_dtype) for record in reader.read_all())
    return [(inputs.tolist(), targets.tolist()) for inputs, targets in decoded]


def run_python(code, *arguments, env=None, **settings):
    """Starts Python on `code` where the repository and our modules can be imported."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )


def test_texts_are_tokenized_and_end_in_eos(toy):
    [cached] = cache.ensure(toy("toy_a"))
    assert cached.task == "toy_a" and cached.rate == 1.0
    vocabulary = ByteVocabulary()
    expected = [
        (
            [*vocabulary.encode(f"a train {i} " + "x" * (i * 7 % 23)), 1],
            [*vocabulary.encode(f"a{i}"), 1],
        )
        for i in range(50)
    ]
    assert stored(cached) == expected
    info = cached.info
    assert info.num_examples == 50
    assert info.num_truncated == {"inputs": 0, "targets": 0}
    assert info.max_length == {
        "inputs": max(len(inputs) for inputs, _ in expected),
        "targets": max(len(targets) for _, targets in expected),
    }
    assert info.num_tokens["targets"] == sum(len(targets) for _, targets in expected)
    assert info.metrics == ("accuracy", "exact_match")
    assert info.postprocess == "first_word"


def test_a_task_that_tokenizes_gives_the_same_ids(toy):
    [ours], [theirs] = cache.ensure(toy("toy_a")), cache.ensure(toy("toy_tokenized"))
    assert stored(theirs) == stored(ours)
    validation = toy("toy_tokenized", split="validation")
    assert loader.eval_examples(validation)[3].inputs_text.startswith("a validation 3 ")


def test_inputs_without_eos(toy):
    [cached] = cache.ensure(toy("toy_no_eos"))
    assert all(inputs[-1] != 1 and targets[-1] == 1 for inputs, targets in stored(cached))


def test_truncation_is_on_the_right_keeps_eos_and_is_counted(toy, caplog):
    data = toy("toy_a", inputs_length=15, targets_length=3)
    [full], [cut] = cache.ensure(toy("toy_a")), cache.ensure(data)
    pairs = list(zip(stored(full), stored(cut), strict=True))
    for (inputs, targets), (short_inputs, short_targets) in pairs:
        assert short_inputs == (inputs if len(inputs) <= 15 else [*inputs[:14], 1])
        assert short_targets == (targets if len(targets) <= 3 else [*targets[:2], 1])
    long = sum(len(inputs) > 15 for (inputs, _), _ in pairs)
    assert cut.info.num_truncated == {"inputs": long, "targets": 40}
    assert f"{long} of 50 examples have their inputs cut to 15 tokens" in caplog.text
    [tokenized] = cache.ensure(dataclasses.replace(data, task="toy_tokenized"))
    assert tokenized.info.num_truncated == cut.info.num_truncated


def test_datasets_from_python(toy):
    cache.ensure(toy("toy_c"))  # brings tensorflow in without its log
    from robust_ft.data.seqio_tasks import from_python

    examples = [
        {"inputs": f"x{i}", "targets": "ü", "references": [str(i)] * (i % 3), "id": i}
        for i in range(600)
    ]
    dataset = from_python(lambda: examples, lists=["references"], integers=["id"])
    for _ in range(2):  # a dataset is read as often as one likes
        found = list(dataset.as_numpy_iterator())
        assert [e["id"] for e in found] == list(range(600))
        assert [e["inputs"].decode() for e in found] == [e["inputs"] for e in examples]
        assert found[5]["targets"].decode() == "ü"
        assert [[r.decode() for r in e["references"]] for e in found] == [
            e["references"] for e in examples
        ]


def test_features_of_unknown_shape_are_taken_too(toy):
    [known], [unknown] = cache.ensure(toy("toy_a")), cache.ensure(toy("toy_unknown_shape"))
    assert stored(known) == stored(unknown)


def test_mixture_has_its_tasks_and_rates(toy):
    cached = cache.ensure(toy("toy_ab"))
    assert [(task.task, task.rate) for task in cached] == [("toy_a", 3.0), ("toy_b", 1.0)]
    # Its tasks' caches are those of the tasks alone.
    assert cached[0].directory == cache.ensure(toy("toy_a"))[0].directory
    nested = cache.ensure(toy("toy_nested"))
    assert [(task.task, task.rate) for task in nested] == [
        ("toy_a", 0.75),
        ("toy_b", 0.25),
        ("toy_c", 0.5),
    ]


def test_references_ids_and_choices(toy):
    examples = loader.eval_examples(toy("toy_references", split="validation"))
    assert [e.id for e in examples] == [1000, 1001, 1002, 1003, 1004]
    assert examples[2].references == ("r2", "other")
    assert examples[2].choices == ("yes", "no")
    assert (examples[2].targets_text, examples[2].inputs_text[:16]) == ("r2", "r validation 2 x")


def test_training_splits_keep_no_texts_but_can_be_evaluated(toy):
    [train] = cache.ensure(toy("toy_references"))
    example = loader.eval_examples(toy("toy_references"))[2]
    assert "inputs" not in records.decode_texts(
        ExampleReader([train]).read(np.arange(3))[2], train.info.token_dtype
    )
    assert example.inputs_text == "r train 2 " + "x" * 14
    assert example.references == ("r2", "other") and example.id == 1002
    assert example.choices == ("yes", "no")
    assert train.info.num_references == train.info.num_examples


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"task": "toy_aa"}, r"registers no task or mixture 'toy_aa'\. Did you mean 'toy_a"),
        (
            {"split": "validate"},
            r"'toy_a' has no split 'validate', only train, validation\. Did you",
        ),
        (
            {"module": "toy_package.toyz"},
            r"no task module 'toy_package.toyz'\. Did .*package.toys'",
        ),
        (
            {"module": "toy_pakage.toys"},
            r"'toy_pakage.toys': Python finds no 'toy_pakage'\. Did you mean 'toy_package'",
        ),
        (
            {"module": "toy_package.toys.a"},
            "no task module 'toy_package.toys.a': 'toy_package.toys'",
        ),
        ({"task": "toy_empty"}, "'toy_empty' has no examples in its split 'train'"),
        ({"task": "toy_other_vocabulary"}, "'inputs' is tokenized by the task with another vocab"),
        ({"task": "toy_no_targets"}, "'toy_no_targets' makes no feature 'targets'"),
        ({"inputs_length": 1}, "inputs_length=1 of task 'toy_a' must be at least 2"),
    ],
)
def test_mistakes_are_one_sentence(toy, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        cache.ensure(toy(**settings))


def test_bad_lines_name_file_and_line(toy, toy_folder):
    files = toy_folder / "toy_package" / "files"
    files.mkdir(exist_ok=True)
    bad = files / "bad.jsonl"
    for line, reason in [
        ('{"q": "x"', r"it is not JSON \("),
        ('{"q": "x"}', r"no field 'a'\."),
        ('["x"]', "not a JSON object"),
        ("\xff", "line 2: "),
    ]:
        bad.write_bytes(b'{"q": "x", "a": "y"}\n' + line.encode("latin-1") + b"\n")
        with pytest.raises(UserError, match=rf"bad\.jsonl, line 2: .*{reason.split(': ')[-1]}"):
            cache.ensure(toy("toy_files", split="validation"))
    with pytest.raises(UserError, match=r"'toy_files', split 'test', has no file .*missing.jsonl"):
        cache.ensure(toy("toy_files", split="test"))
    assert not list(Path(toy().cache_dir).glob("toy_files*"))


def test_rebuilt_when_a_raw_file_changes(toy, toy_folder):
    data = toy("toy_files")
    file = toy_folder / "toy_package" / "files" / "train.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"q": "one", "a": "1"}\n')
    os.utime(file, (1, 1))
    [before] = cache.ensure(data)
    assert before.info.raw_files[0].size == file.stat().st_size
    os.utime(file, (1, 1))  # touched, not changed
    assert cache.load(data) == [before]
    file.write_text('{"q": "two", "a": "2"}\n')
    os.utime(file, (1, 1))  # changed, and its time set back
    assert cache.load(data) is None
    assert stored(cache.ensure(data)[0])[0][1] == [ord("2") + 3, 1]
    file.unlink()  # a machine without the raw files
    assert cache.load(data) is not None


def test_raw_files_are_relative_to_the_data_directory(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name / "rte").mkdir(parents=True)
        (tmp_path / name / "rte" / "train").write_text("same")
    monkeypatch.setenv("ROBUST_FT_DATA_DIR", str(tmp_path / "here"))
    raw = fingerprints.describe_file(tmp_path / "here" / "rte" / "train")
    assert raw.path == "rte/train"
    monkeypatch.setenv("ROBUST_FT_DATA_DIR", str(tmp_path / "there"))
    assert not fingerprints.has_changed(raw)
    (tmp_path / "there" / "rte" / "train").write_text("else")
    assert fingerprints.has_changed(raw)
    monkeypatch.delenv("ROBUST_FT_DATA_DIR")
    assert not fingerprints.has_changed(raw)


def test_key_depends_on_all_that_matters(toy):
    data = toy("toy_a")
    same = toy("toy_a", module="toy_package")  # the same package, so the same tasks
    assert cache.directory(same) == cache.directory(data)
    others = [
        toy("toy_a", **change)
        for change in (
            {"split": "validation"},
            {"inputs_length": 41},
            {"targets_length": 13},
            {"vocabulary": ByteVocabulary(7)},
        )
    ]
    assert len({cache.directory(d) for d in (data, toy("toy_b"), *others)}) == 6


def test_another_seqio_version_is_rebuilt_none_is_taken(toy, monkeypatch):
    data = toy("toy_c")
    cache.ensure(data)
    monkeypatch.setattr(cache, "seqio_version", lambda: "9.9")
    assert cache.load(data) is None
    monkeypatch.setattr(cache, "seqio_version", lambda: None)
    assert cache.load(data) is not None


def test_sources_of_a_module_outside_packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lone_tasks.py").write_text("import lone_helper\nfrom json import dumps\n")
    (tmp_path / "lone_helper.py").write_text("import lone_tasks\n")
    (tmp_path / "lone_other.py").write_text("x = 1\n")
    before = fingerprints.module_fingerprint("lone_tasks")
    (tmp_path / "lone_other.py").write_text("x = 2\n")
    assert fingerprints.module_fingerprint("lone_tasks") == before
    (tmp_path / "lone_helper.py").write_text("import lone_tasks\nx = 2\n")
    assert fingerprints.module_fingerprint("lone_tasks") != before


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("top", "import helpers.clean"),
        ("top", "from helpers import clean"),
        ("top", "from helpers.clean import f as g"),
        ("top", "from helpers import *"),
        ("top", "def late():\n    import helpers.clean"),
        ("top", "import again"),  # which imports it
        ("own.tasks", "from helpers import clean"),
        ("own.sub.tasks", "from .. import middle"),  # which imports it
        ("own.sub.tasks", "from ..middle import f"),
        ("own", "import helpers.clean as c"),
    ],
)
@pytest.mark.parametrize("has_init", [True, False])
def test_sources_that_are_imported_from_beside(tmp_path, monkeypatch, module, statement, has_init):
    for name in ("helpers", "own", "own/sub"):
        (tmp_path / name).mkdir()
        if has_init or name != "helpers":
            (tmp_path / name / "__init__.py").write_text("")
    clean, other = tmp_path / "helpers/clean.py", tmp_path / "helpers/other.py"
    clean.write_text("def f(): return 1\n")
    other.write_text("x = 1\n")
    (tmp_path / "again.py").write_text("import helpers.clean, no_such_module\n")
    (tmp_path / "own/middle.py").write_text("from helpers.clean import f\n")
    file = tmp_path / module.replace(".", "/")
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    file.write_text(statement + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = fingerprints.module_fingerprint(module)
    if "*" not in statement:
        other.write_text("x = 2\n")
        assert fingerprints.module_fingerprint(module) == before
    clean.write_text("def f(): return 2\n")
    assert fingerprints.module_fingerprint(module) != before


def test_what_is_installed_beside_a_package_does_not_count(tmp_path, monkeypatch):
    root = tmp_path / "site-packages"
    for name in ("installed_tasks", "installed_tasks/sub", "installed_library"):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
    (root / "installed_tasks/sub/tasks.py").write_text(
        "import installed_library\nfrom installed_tasks import rows\nimport broken"
    )
    (root / "broken.py").write_text("def (")
    (root / "installed_tasks/rows.py").write_text("")
    monkeypatch.syspath_prepend(root)
    before = fingerprints.module_fingerprint("installed_tasks.sub.tasks")
    (root / "installed_library/__init__.py").write_text("x = 1")
    assert fingerprints.module_fingerprint("installed_tasks.sub.tasks") == before
    (root / "installed_tasks/rows.py").write_text("x = 1")
    assert fingerprints.module_fingerprint("installed_tasks.sub.tasks") != before


CHANGING = """
import seqio, tensorflow as tf, time
from robust_ft.data.seqio_tasks import text_features

def examples(split, shuffle_files):
    def slow():
        for i in range(3):
            yield {"inputs": "VALUE", "targets": str(i)}
            time.sleep(SECONDS)
    signature = {k: tf.TensorSpec([], tf.string) for k in ("inputs", "targets")}
    return tf.data.Dataset.from_generator(slow, output_signature=signature)

source = seqio.FunctionDataSource(examples, splits=("train",))
seqio.TaskRegistry.add("NAME", source=source, preprocessors=[], output_features=text_features())
"""


def write_module(folder, name, value, seconds=0.0):
    """Writes a task module whose three examples take `seconds` each."""
    text = CHANGING.replace("NAME", name).replace("VALUE", value)
    (folder / f"{name}.py").write_text(text.replace("SECONDS", str(seconds)))


def test_rebuilt_when_the_task_file_changes(toy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    data = toy("changing_task", module="changing_task", cache_dir=str(tmp_path / "cache"))
    write_module(tmp_path, "changing_task", "before")
    [before] = cache.ensure(data)
    write_module(tmp_path, "changing_task", "after")
    assert cache.load(data) is None
    # This Python still has the old tasks; it must not store them under the new key.
    with pytest.raises(UserError, match="'changing_task' has changed since it was imported"):
        cache.ensure(data)
    forget("changing_task")
    [after] = cache.ensure(data)
    texts = [ByteVocabulary().decode(stored(cached)[0][0]) for cached in (before, after)]
    assert texts == ["before", "after"]


def forget(module):
    """Makes this Python like one that never imported `module`, with its task of that name."""
    import seqio

    from robust_ft.data import build

    del build._imported[module], sys.modules[module]
    seqio.TaskRegistry.remove(module)
    importlib.invalidate_caches()


@pytest.mark.parametrize("locks", [True, False])
def test_two_builds_at_once(toy, tmp_path, monkeypatch, locks):
    from robust_ft.data import build, publishing

    data = toy("toy_b", cache_dir=str(tmp_path))
    builds = []
    barrier = threading.Barrier(1 if locks else 2)
    write = build._write_examples

    def counted(*arguments):
        builds.append(arguments)
        barrier.wait(30)  # without locks: go on only when both are here
        return write(*arguments)

    def no_locks(*arguments):
        raise OSError("this file system has no locks")

    monkeypatch.setattr(build, "_write_examples", counted)
    if not locks:
        monkeypatch.setattr(publishing.fcntl, "flock", no_locks)
    found = []
    threads = [threading.Thread(target=lambda: found.append(cache.ensure(data))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == (1 if locks else 2)
    assert len(found) == 2
    assert len(stored(cache.load(data)[0])) == 101
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [cache.directory(data).name]


def test_an_incomplete_folder_is_not_ready(toy, tmp_path):
    data = toy("toy_c", cache_dir=str(tmp_path))
    [cached] = cache.ensure(data)
    Path(cached.examples_file).unlink()
    assert cache.load(data) is None
    assert len(stored(cache.ensure(data)[0])) == 7
    mixture = toy("toy_ab", cache_dir=str(tmp_path))
    shutil.rmtree(cache.ensure(mixture)[1].directory)
    assert cache.load(mixture) is None
    assert len(cache.ensure(mixture)) == 2


def test_a_ready_cache_needs_neither_tensorflow_nor_seqio(toy, toy_folder):
    data = toy("toy_ab")
    cache.ensure(data)
    validation = toy("toy_b", split="validation")
    expected = [e.inputs_text for e in loader.eval_examples(validation)]
    code = """
        import json, sys

        class Forbidden:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("tensorflow", "seqio", "tensorflow_datasets"):
                    raise AssertionError(f"{name} is imported")

        sys.meta_path.insert(0, Forbidden())
        from robust_ft import vocabulary
        from robust_ft.data import cache, loader

        def data(task, split):
            return cache.TaskData(task=task, module="toy_package.toys", split=split,
                inputs_length=40, targets_length=12, vocabulary=vocabulary.ByteVocabulary(),
                cache_dir=sys.argv[1])

        assert len(cache.ensure(data("toy_ab", "train"))) == 2
        for packing in (False, True):
            source = loader.train_batches(data("toy_ab", "train"), 8, seed=0, packing=packing)
            batch = next(source)
            source.set_state(source.get_state())
            assert batch["encoder_input_tokens"].shape == (8, 40)
        examples = loader.eval_examples(data("toy_b", "validation"))
        assert not {"toy_package", "tensorflow", "seqio"} & set(sys.modules)
        print(json.dumps([e.inputs_text for e in examples]))
        """
    process = run_python(
        code,
        data.cache_dir,
        env={"PYTHONPATH": f"{REPOSITORY}:{toy_folder}", "JAX_PLATFORMS": "cpu"},
    )
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors == ""  # and it ends without a word
    assert json.loads(output) == expected


def test_records_keep_wide_ids_and_texts():
    inputs, targets = [70000, 5, 1], [9, 1]
    dtype = records.token_dtype(100_000)
    record = records.encode(inputs, targets, dtype, {"references": ["ü"]})
    decoded = records.decode(record, dtype)
    assert [tokens.tolist() for tokens in decoded] == [inputs, targets]
    assert all(tokens.dtype == np.int32 for tokens in decoded)
    assert records.decode_texts(record, dtype) == {"references": ["ü"]}
    assert records.token_dtype(1 << 16) == "<u2"


def test_a_bad_line_is_one_sentence_without_tensorflows_log(toy, toy_folder, tmp_path):
    code = """
    import sys
    import jax  # sets the level of tensorflow's log for itself
    from robust_ft.data import cache
    from robust_ft.errors import UserError
    from robust_ft.vocabulary import ByteVocabulary

    sys.path.insert(0, sys.argv[1])
    data = cache.TaskData(
        task="toy_files", module="toy_package.toys", split="validation", inputs_length=40,
        targets_length=12, vocabulary=ByteVocabulary(), cache_dir=sys.argv[2],
    )
    try:
        cache.ensure(data)
    except UserError as error:
        print(error)
    """
    files = toy_folder / "toy_package" / "files"
    files.mkdir(exist_ok=True)
    (files / "bad.jsonl").write_text('{"q": "x"}\n')
    process = run_python(code, toy_folder, tmp_path)
    out, err = process.communicate()
    assert out == f"{files / 'bad.jsonl'}, line 1: no field 'a'.\n"
    assert "Traceback" not in err and "UserError" not in err
