import inspect
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_ft import metrics
from robust_ft.errors import UserError

PERCENTAGES = [
    "accuracy",
    "bleu",
    "chrf",
    "exact_match",
    "multi_bleu",
    "rouge",
    "rouge_stemmed",
    "token_f1",
    "trivia_qa_exact_match",
    "trivia_qa_f1",
    "webnlg_bleu",
]
WORDS = st.sampled_from(["cats", "sat", "on", "the", "Mats", "with", "dogs"])
TEXT = st.lists(WORDS, min_size=5, max_size=8).map(" ".join)


@pytest.mark.parametrize("name", sorted(set(metrics.METRICS) - {"meteor"}))
@pytest.mark.parametrize(
    ("targets", "predictions", "message"),
    [
        ([], [], "no predictions"),
        (["a", "b"], ["a"], "1 predictions .* 2 targets"),
        ([["a"], []], ["a", "b"], "example 1 has no reference"),
    ],
)
def test_what_cannot_be_scored(name, targets, predictions, message):
    with pytest.raises(UserError, match=f"{name}: .*{message}"):
        metrics.get(name)(targets, predictions)


@given(st.data(), st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=4))
@settings(max_examples=20, deadline=None)
def test_what_holds_for_all_metrics_of_texts(data, examples):
    targets, predictions = zip(*examples, strict=True)
    shuffled = data.draw(st.permutations(examples))
    for name in PERCENTAGES:
        metric = metrics.get(name)
        scores = metric(targets, predictions)
        assert all(0 <= score <= 100 for score in scores.values())
        assert metric(*zip(*shuffled, strict=True)) == pytest.approx(scores)
        identical = metric(predictions, predictions)
        assert list(identical.values()) == pytest.approx([100] * len(scores))
        # The prediction among several references, and one reference twice.
        several = metric(list(zip(targets, predictions, strict=True)), predictions)
        assert several == pytest.approx(identical)
        assert metric([[target, target] for target in targets], predictions) == scores


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_several_references_are_at_least_as_good_as_any(examples):
    first, second, predictions = zip(*examples, strict=True)
    several = list(zip(first, second, strict=True))
    # Corpus-level BLEU and chrF are no means over examples: another length may be closer.
    for name in set(PERCENTAGES) - {"bleu", "multi_bleu", "webnlg_bleu", "chrf"}:
        metric = metrics.get(name)
        scores = metric(several, predictions)
        for one in (first, second):
            assert all(scores[k] >= v - 1e-9 for k, v in metric(one, predictions).items())


@pytest.mark.parametrize("name", metrics.METRICS)
def test_names_are_found_again(name):
    metric = metrics.get(name)
    assert metric.__name__ == name
    assert metric.__module__.startswith("robust_ft.metrics.")
    # seqio tells metrics apart by the names of their parameters.
    assert list(inspect.signature(metric).parameters) == ["targets", "predictions"]
    assert hasattr(metrics, name) and name in metrics.__all__


@pytest.mark.parametrize("name", sorted(set(metrics.METRICS) - {"meteor"}))
def test_the_score_comes_first(name):
    targets, predictions = ["True", "a b"], ["True", "a c"]
    scores = metrics.get(name)(targets, predictions)
    kind = {"rouge": "rouge2", "rouge_stemmed": "rouge2_stemmed"}
    assert next(iter(scores)) == kind.get(name, name)
    assert all(type(score) is float for score in scores.values())
    parts = metrics.get_parts(name)(targets, predictions)
    assert list(parts.items())[: len(scores)] == list(scores.items())
    assert (len(parts) > len(scores)) == (name in metrics.PARTS)


def test_a_name_that_is_none():
    with pytest.raises(UserError, match=r"no metric 'acuracy'.* Did you mean 'accuracy'"):
        metrics.get("acuracy")
    with pytest.raises(UserError, match=r"no metric 'rogue'.* Did you mean 'rouge'"):
        metrics.get_parts("rogue")


def test_a_metric_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_metrics.py").write_text("def mine(targets, predictions): return {'mine': 1.0}")
    monkeypatch.syspath_prepend(tmp_path)
    assert metrics.get("own_metrics:mine")([], []) == {"mine": 1.0}
    with pytest.raises(UserError, match="'own_metrics:yours' is not a function"):
        metrics.get("own_metrics:yours")
    with pytest.raises(UserError, match="'no_such_module:f' cannot be imported"):
        metrics.get("no_such_module:f")


def test_norm_avg_of_the_paper():
    # Pretrained mT5-XXL, 1-shot (ProMoT, table 1): CB, WiC, TriviaQA, WebQuestions, En-De, En-Ro,
    # XSum, WikiLingua; the table says 17.52.
    scores = [46.43, 49.69, 17.58, 9.70, 3.97, 1.82, 6.41, 4.59]
    assert metrics.norm_avg(scores) == pytest.approx(17.52, abs=0.005)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=10))
def test_norm_avg_lies_between_its_scores(scores):
    assert min(scores) - 1e-9 <= metrics.norm_avg(scores) <= max(scores) + 1e-9


def test_norm_avg_takes_scores_as_they_are():
    assert metrics.norm_avg([-20.0, 130.0]) == 55
    assert math.isnan(metrics.norm_avg([50.0, math.nan]))
    with pytest.raises(UserError, match="norm_avg: there are no scores"):
        metrics.norm_avg([])


@pytest.mark.parametrize(
    ("outputs", "pattern", "expected"),
    [
        (["True", "False", "Paris", " True\n"], "True|False", 0.75),
        (["True story", "untrue", "true"], "True|False", 0.0),
        (["A", "B)", "D"], r"[A-D]\)?", 1.0),
        ([""], "", 1.0),
    ],
)
def test_format_share(outputs, pattern, expected):
    assert metrics.format_share(outputs, pattern) == expected


def test_format_share_refuses():
    with pytest.raises(UserError, match=r"'\(' is not a regular expression"):
        metrics.format_share(["a"], "(")
    with pytest.raises(UserError, match="no outputs"):
        metrics.format_share([], "a")


def test_metrics_are_cheap_to_import():
    code = (
        "import sys, robust_ft.metrics; "
        "heavy = 'jax tensorflow seqio flax sacrebleu rouge_score nltk scipy'.split(); "
        "assert not set(heavy) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
