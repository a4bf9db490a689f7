"""A user's own CSV, TSV and JSONL files as tasks: texts, references, bad lines, the cache's key."""

import dataclasses
import gzip
import json

import pytest

pytest.importorskip("seqio")

from robust_ft import gin_config
from robust_ft.data import cache, derived, loader
from robust_ft.data.cache import TaskData
from robust_ft.data.file_task import FileTask
from robust_ft.errors import UserError
from robust_ft.vocabulary import ByteVocabulary

CSV = 'question,answer\n"Who, ""exactly""?",Ann\nWhere?,in\n'
TSV = 'question\tanswer\nWho, "exactly"?\tAnn\nWhere?\tin\n'
JSONL = (
    '{"question": "Who, \\"exactly\\"?", "answer": ["Ann", "Anna"], "n": 1}\n'
    '{"question": "Where?", "answer": "in", "n": 2.5}\n'
)


@pytest.fixture
def data(tmp_path):
    """Writes files and makes `TaskData` of a task in them."""

    def make(files=None, task=None, split="test", others=(), **settings):
        for name, content in (files or {}).items():
            content = content if isinstance(content, bytes) else content.encode("utf-8")
            (tmp_path / name).write_bytes(content)
        for part in ("train", "validation", "test"):
            if part in settings:
                settings[part] = str(tmp_path / settings[part])
        file_task = FileTask(
            **{"name": "own", "inputs": "Q: {question} A:", "targets": "{answer}"} | settings
        )
        return TaskData(
            task=task or file_task.name,
            module="tasks.mini",
            split=split,
            inputs_length=200,
            targets_length=40,
            vocabulary=ByteVocabulary(),
            cache_dir=str(tmp_path / "cache"),
            file_tasks=(file_task, *others),
        )

    return make


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV),
        ("a.tsv", TSV),
        ("a.jsonl", JSONL),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)),
    ],
)
def test_every_form_gives_the_same(data, name, content):
    first, second = loader.eval_examples(data({name: content}, test=name))
    assert first.inputs_text == 'Q: Who, "exactly"? A:'
    assert first.targets_text == "Ann"
    assert first.references == (("Ann", "Anna") if "jsonl" in name else ("Ann",))
    assert (second.inputs_text, second.targets_text) == ("Q: Where? A:", "in")


def test_templates(data):
    found = data({"a.jsonl": JSONL}, test="a.jsonl", inputs="{{{n}}} {question}", targets="<{n}>")
    assert [(e.inputs_text, e.targets_text) for e in loader.eval_examples(found)] == [
        ('{1} Who, "exactly"?', "<1>"),
        ("{2.5} Where?", "<2.5>"),
    ]


def test_metrics_and_choices(data):
    found = data(
        {"a.csv": CSV},
        test="a.csv",
        metrics=["accuracy", "exact_match"],
        choices=["Ann", "in"],
        postprocess="first_word",
    )
    [cached] = cache.ensure(found)
    assert cached.info.metrics == ("accuracy", "exact_match")
    assert cached.info.postprocess == "first_word"
    assert loader.eval_examples(found)[0].choices == ("Ann", "in")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"inputs": "{qestion}"},
            r"a\.csv, line 1: there is no column 'qestion' .*inputs\), only question, .* Did",
        ),
        ({"choices": ("Ann", "inn")}, r"a\.csv, line 4: target 'in' is none of Ann, inn\. Did you"),
        ({"test": "b.csv"}, r"b\.csv, line 3: it has 1 fields, but there are 2 columns"),
        ({"test": "c.jsonl"}, r"c\.jsonl, line 2: it is not JSON"),
        ({"test": "d.jsonl"}, r"d\.jsonl, line 1: column 'question' is empty \(null\)"),
        ({"test": "e.jsonl"}, r"e\.jsonl, line 1: column 'answer' is an empty list"),
        ({"test": "f.csv"}, r"f\.csv: it has no rows \(task 'own', split 'test'\)"),
        ({"test": "g.csv"}, r"'own', split 'test', has no file .*g\.csv\.$"),
        ({"split": "train"}, "'own' has no split 'train', only test"),
        ({"task": "owm"}, "no task or mixture 'owm'.* Did you mean 'own'"),
        (
            {"task": "own_1shot"},
            "'own' has no 1-shot .* come from 'own', which is no task",
        ),
        ({"metrics": ("exact_mach",)}, "no metric 'exact_mach'.* Did you mean 'exact_match'"),
        ({"name": "mini_rte"}, "'mini_rte' is the name of another task"),
    ],
)
def test_what_is_wrong_and_where(data, settings, sentence, tmp_path):
    files = {
        "a.csv": 'question,answer\n"Who,\nexactly?",Ann\nWhere?,in\n',
        "b.csv": "question,answer\na,b\nc\n",
        "c.jsonl": JSONL.splitlines()[0] + "\n{\n",
        "d.jsonl": '{"question": null, "answer": "x"}\n',
        "e.jsonl": '{"question": "q", "answer": []}\n',
        "f.csv": "question,answer\n",
    }
    with pytest.raises(UserError, match=sentence):
        cache.ensure(data(files, **{"test": "a.csv"} | settings))
    left = [path for path in (tmp_path / "cache").glob("*") if path.suffix != ".lock"]
    assert not left  # nothing half-written


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"test": "a.txt"}, r"a\.txt' \(task 'x', split 'test'\) must end in one of \.csv, \.tsv"),
        ({}, "Task 'x' names no file"),
        ({"test": "a.csv", "name": "x y"}, "'x y' may have only letters"),
    ],
)
def test_what_a_config_may_not_say(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        FileTask(**{"name": "x", "inputs": "{a}", "targets": "{b}"} | settings)


def test_few_shot_and_shuffled_versions(data):
    rows = [f"q{i},a{i}" for i in range(20)]
    content = "question,answer\n" + "\n".join(rows) + "\n"
    found = data({"a.csv": content, "b.csv": CSV}, train="a.csv", test="b.csv", task="own_2shot")
    for example in loader.eval_examples(found):
        *exemplars, query = example.inputs_text.split(derived.SEPARATOR)
        assert query in ('Q: Who, "exactly"? A:', "Q: Where? A:")
        assert len(exemplars) == 2
        assert set(exemplars) <= {f"Q: q{i} A: a{i}" for i in range(20)}
    shuffled = dataclasses.replace(found, task="own_shuffled", split="train")
    targets = [e.targets_text for e in loader.eval_examples(shuffled)]
    assert sorted(targets) == sorted(f"a{i}" for i in range(20))
    assert targets != [f"a{i}" for i in range(20)]


def test_one_task_can_have_its_exemplars_from_another(data, tmp_path):
    (tmp_path / "ood.csv").write_text("question,answer\nood?,yes\n")
    ood = FileTask(
        name="own_ood",
        inputs="{question}",
        targets="{answer}",
        test=str(tmp_path / "ood.csv"),
        exemplars="own",
    )
    found = data({"a.csv": CSV}, train="a.csv", task="own_ood_1shot", others=[ood])
    [example] = loader.eval_examples(found)
    assert example.inputs_text.endswith(f"{derived.SEPARATOR}ood?")
    assert example.inputs_text.startswith("Q: Wh")


def test_the_cache_follows_files_and_definition(data):
    first = data({"a.csv": CSV, "b.csv": CSV.replace("Where", "When")}, test="a.csv")
    assert loader.eval_examples(first)[1].inputs_text == "Q: Where? A:"
    other = data(test="b.csv")
    assert cache.load(other) is None
    assert loader.eval_examples(other)[1].inputs_text == "Q: When? A:"
    template = data(test="a.csv", inputs="{question}")
    assert cache.load(template) is None
    assert loader.eval_examples(template)[1].inputs_text == "Where?"
    assert cache.load(first) is not None
    data({"a.csv": CSV.replace("Where", "Why")}, test="a.csv")
    assert cache.load(first) is None
    assert loader.eval_examples(first)[1].inputs_text == "Q: Why? A:"
    # Tasks that are in no file of one's own have the key that they always had.
    rte = dataclasses.replace(first, task="mini_rte")
    assert cache.directory(rte) == cache.directory(dataclasses.replace(rte, file_tasks=()))


def test_one_gin_file_and_no_python(tmp_path):
    for split, number in (("train", 8), ("validation", 3), ("test", 2)):
        lines = [{"text": f"{split} {i}", "label": "ab"[i % 2]} for i in range(number)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = tmp_path / "own.gin"
    config.write_text(
        f"""
MIXTURE_OR_TASK_NAME = 'letters'
MIXTURE_OR_TASK_MODULE = 'tasks.mini'
TASK_FEATURE_LENGTHS = {{'inputs': 32, 'targets': 8}}
MAX_DECODE_LENGTH = 8
HELD_OUT_TASKS = {{0: ['mini_cb']}}
TARGET_FORMAT = None

TaskData.file_tasks = [@letters/FileTask()]
letters/FileTask:
  name = 'letters'
  train = '{tmp_path}/train.jsonl'
  validation = '{tmp_path}/validation.jsonl'
  test = '{tmp_path}/test.jsonl'
  inputs = '{{text}}'
  targets = '{{label}}'
  choices = ['a', 'b']
  metrics = ['accuracy']
"""
    )
    loaded = gin_config.load(["gin_configs/full_rte.gin", str(config)], [f"CACHE_DIR={tmp_path}"])
    [stage] = loaded.recipe.stages
    [cached] = cache.ensure(stage.data)
    assert cached.info.num_examples == 8
    target, held_out = stage.evaluations
    assert [e.inputs_text for e in loader.eval_examples(target.data, 2)] == [
        "validation 0",
        "validation 1",
    ]
    assert held_out.data.task == "mini_cb"
    wrong = "letters/FileTask.inputs={text} {nope}"  # as a shell hands it on
    wrongly = gin_config.load(["gin_configs/full_rte.gin", str(config)], [wrong]).recipe
    with pytest.raises(
        UserError, match=r"train\.jsonl, line 1: no column 'nope', only text, label"
    ):
        cache.ensure(dataclasses.replace(wrongly.stages[0].data, cache_dir=str(tmp_path)))
    again = tmp_path / "again.gin"
    again.write_text(loaded.operative)
    assert gin_config.load([str(again)]).recipe == loaded.recipe
