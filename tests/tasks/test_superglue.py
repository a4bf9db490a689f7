"""RTE and CB: official sizes, ProMoT's templates, bad lines."""

import os

import pytest

from robust_ft.data import cache, loader
from robust_ft.errors import UserError
from robust_ft.vocabulary import ByteVocabulary

pytestmark = pytest.mark.skipif(
    "ROBUST_FT_DATA_DIR" not in os.environ,
    reason="needs the official files: ROBUST_FT_DATA_DIR is not set",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Makes the `TaskData` of a SuperGLUE task."""
    pytest.importorskip("seqio")
    cache_dir = str(tmp_path_factory.mktemp("cache"))

    def make(task, split):
        return cache.TaskData(
            task=task,
            module="tasks.superglue",
            split=split,
            inputs_length=2048,
            targets_length=16,
            vocabulary=ByteVocabulary(),
            cache_dir=cache_dir,
        )

    return make


@pytest.mark.parametrize(
    ("task", "train", "validation", "question", "answers"),
    [
        ("rte", 2490, 277, "Is it true or false? answer:", ("True", "False")),
        ("cb", 250, 56, "Is it true or false or neither? answer:", ("True", "False", "Neither")),
    ],
)
def test_sizes_and_templates(data, task, train, validation, question, answers):
    [cached] = cache.ensure(data(task, "train"))
    assert cached.info.num_examples == train
    assert cached.info.metrics == ("accuracy",) and cached.info.postprocess == "first_word"
    assert cached.info.raw_files[0].path == f"superglue/{task.upper()}/train.jsonl"
    for split, size in (("train", train), ("validation", validation)):
        examples = loader.eval_examples(data(task, split))
        assert len(examples) == size
        assert {e.targets_text for e in examples} == set(answers)
        assert all(e.inputs_text.endswith(" " + question) for e in examples)
        assert all(" question: " in e.inputs_text for e in examples)
    assert examples[0].choices == answers


def test_first_examples_word_for_word(data):
    rte = loader.eval_examples(data("rte", "validation"))[0]
    assert rte.inputs_text == (
        "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, "
        "according to the Christopher Reeve Foundation. question: Christopher Reeve had an "
        "accident. Is it true or false? answer:"
    )
    assert (rte.targets_text, rte.references) == ("False", ("False",))
    cb = loader.eval_examples(data("cb", "validation"))[1]
    assert cb.inputs_text == (
        "``Who knows? The point is, do we go with it or not?'' Do we assume there is a shipment? "
        "question: there is a shipment Is it true or false or neither? answer:"
    )
    assert cb.targets_text == "Neither"


def test_class_indices_of_tfds_read_the_same():
    tf = pytest.importorskip("tensorflow")
    from tasks import superglue

    for answers in (superglue.RTE_ANSWERS, superglue.CB_ANSWERS):
        texts = []
        for labels in (list(answers), list(range(len(answers)))):
            dataset = tf.data.Dataset.from_tensor_slices(
                {"premise": ["p"] * len(labels), "hypothesis": ["h"] * len(labels), "label": labels}
            )
            dataset = superglue.entailment_text(dataset, "Is it?", answers)
            texts.append([x["targets"].decode() for x in dataset.as_numpy_iterator()])
        assert texts[0] == texts[1] == list(answers.values())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"premise": "p", "hypothesis": "h"}', "no field 'label'"),
        ('{"premise": "p", "hypothesis": "h", "label": 1}', "field 'label' is not a string but 1"),
        (
            '{"premise": "p", "hypothesis": "h", "label": "entailement"}',
            "label 'entailement' is none of .* Did you mean 'entailment'",
        ),
        ("{", "it is not JSON"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path, monkeypatch, line, sentence):
    pytest.importorskip("seqio")
    from tasks import superglue

    (tmp_path / "superglue" / "RTE").mkdir(parents=True)
    good = '{"premise": "p", "hypothesis": "h", "label": "entailment", "idx": 0}'
    (tmp_path / "superglue" / "RTE" / "train.jsonl").write_text(f"{good}\n{line}\n")
    monkeypatch.setenv("ROBUST_FT_DATA_DIR", str(tmp_path))
    source = superglue._source("RTE", "super_glue/rte:1.0.2", superglue.RTE_ANSWERS)
    with pytest.raises(UserError, match=rf"RTE/train\.jsonl, line 2: {sentence}"):
        list(source.examples("train"))
