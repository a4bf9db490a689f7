"""Tasks written for seqio have the values here that `seqio.Evaluator` gives them."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio
import seqio_contract_tasks as tasks
import tensorflow as tf
import toy

from robust_ft import metrics
from robust_ft.data import loader, records
from robust_ft.data.cache import TaskData, ensure
from robust_ft.data.seqio_tasks import text_features
from robust_ft.decoding import Decoder
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation
from robust_ft.evaluator import evaluate
from robust_ft.metrics import naming
from robust_ft.models.model import Model
from robust_ft.predictor import Predictor
from robust_ft.vocabulary import ByteVocabulary

SAME = [
    "c_plain", "c_lower", "c_no_texts", "c_labels", "c_partial_metric", "c_positional", "c_nested",
    "c_scores", "c_both", "c_rank", "c_answers", "c_negative", "c_nan", "c_groups", "c_scalar",
    "c_made", "c_object",
]  # fmt: skip
VOCABULARY = ByteVocabulary(extra_ids=0)
MODEL = Model(dataclasses.replace(toy.CONFIG, vocab_size=259, dropout_rate=0.0))


class Told(Predictor):
    """A model that says what it is told to, and scores by itself."""

    def generate(self, batch, decoder=None, rng=None, **settings):
        tokens = np.zeros((len(batch["encoder_input_tokens"]), 1, 16), np.int32)
        for row, ids in zip(tokens, batch["encoder_input_tokens"], strict=True):
            said = tasks.OUTPUTS[tasks.INPUTS.index(VOCABULARY.decode(ids.tolist()))]
            ids = [*VOCABULARY.encode(said), VOCABULARY.eos_id]
            row[0, : len(ids)] = ids
        return types.SimpleNamespace(tokens=tokens)


@pytest.fixture(scope="module")
def predictor():
    params = jax.tree.map(lambda x: x * 2, MODEL.init(jax.random.key(0)))
    return Told(MODEL, params, VOCABULARY)


def data(task, split="validation", module="seqio_contract_tasks"):
    return TaskData(
        task=task,
        module=module,
        split=split,
        inputs_length=16,
        targets_length=16,
        vocabulary=VOCABULARY,
    )


def ours(task, predictor, split="validation"):
    return evaluate(Evaluation(data(task, split), Decoder(max_decode_len=16)), predictor)


def of_seqio(task, predictor, split="validation"):
    """Returns what seqio's Evaluator says, given the same outputs and the model's own scores."""

    def predict(dataset):
        padded = [(VOCABULARY.encode(text) + [1] + [0] * 16)[:16] for text in tasks.OUTPUTS]
        return list(enumerate(padded))

    def score(dataset):
        [batch] = dataset.batch(6).as_numpy_iterator()
        numbers, features = batch
        inputs = features["encoder_input_tokens"]
        given = {**features, "encoder_input_mask": inputs > 0}
        with predictor.partitioner.activate():
            logits = predictor.model.logits(predictor.params, given)
        of_tokens = jnp.take_along_axis(
            jax.nn.log_softmax(logits), features["decoder_target_tokens"][..., None], axis=-1
        )[..., 0]  # [batch, target]
        weights = features["decoder_loss_weights"].astype(np.float32)
        sums = np.asarray(jnp.sum(of_tokens * weights, axis=1))
        return list(zip(numbers.tolist(), sums.tolist(), strict=True))

    evaluator = seqio.Evaluator(
        task,
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        eval_split=split,
        sequence_length=tasks.LENGTHS,
        async_compute_metrics=False,
    )
    found, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict, score_fn=score)
    values = found.result()[task]
    return {name: float(getattr(value, "value", value)) for name, value in values.items()}


@pytest.mark.parametrize("task", SAME)
def test_values_are_those_of_seqio(task, predictor):
    expected = of_seqio(task, predictor)
    result = ours(task, predictor)
    for name, value in expected.items():
        print(f"| {task} | {name} | {value:.6g} | {result.values[name]:.6g} |")
    assert list(result.values) == list(expected)
    assert result.values == pytest.approx(expected, rel=1e-5, nan_ok=True)
    # On the training split, too, whose cache is made for reading ids.
    assert ours(task, predictor, "train").values == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("c_lambda", r"'c_lambda' cannot be evaluated: its metric the lambda \(.*tasks.py, line"),
        ("c_local", "its metric the local function counted.<locals>.count"),
        ("c_lambda_postprocess", "its postprocess_fn the lambda"),
        ("c_argument", "f1 has an argument positive of type float32, which no file can hold"),
        ("c_unnamed_object", "its metric the object of the class seqio_contract_tasks.Share"),
        ("c_metric_objs", "its metric_objs has a .*FromMetricFun"),
        ("c_aux", "its metric with_aux asks for aux_values"),
        ("c_twice", "'c_twice' has two metrics that return 'at_most'"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(task, message, predictor):
    # It can be trained on.
    loader.train_batches(data(task, "train"), 2, seed=0).close()
    with pytest.raises(UserError, match=message):
        ours(task, predictor)


def test_metrics_of_other_parameters_are_refused_as_by_seqio(predictor):
    with pytest.raises(UserError, match=r"'c_other_words': Metric functions must have positional"):
        ours("c_other_words", predictor)


def test_functions_in_the_cache_are_named():
    [cached] = ensure(data("c_partial_metric"))
    module = "seqio_contract_tasks"
    assert cached.info.metrics == (f"{module}:f1(beta=0.5, positive=1)",)
    assert cached.info.postprocess == (
        f"{module}:label_id(label_classes=['No', 'Yes', 'Maybe so'], default=1)"
    )
    [cached] = ensure(data("c_made"))
    assert cached.info.metrics == (f"{module}:count_no",)
    for name in ("f1(beta=0.5, positive=1)", "at_most(3)", "Share.length", "share_of_yes"):
        found = metrics.get(f"{module}:{name}")
        assert naming.name_of(found, {}) == f"{module}:{name}" or name == "share_of_yes"
    assert metrics.get("accuracy").__name__ == "accuracy"


@pytest.mark.parametrize(
    "name", ["accuracy(x", "accuracy(x=y)", "accuracy()[0]", "accuracy(1) + 1"]
)
def test_arguments_that_cannot_be_read(name):
    with pytest.raises(UserError, match="has arguments that are not written as in Python"):
        metrics.get(name)


def test_examples_are_those_that_seqio_hands_to_postprocessors():
    found = loader.eval_examples(data("c_answers"))[3].as_seqio
    task = seqio.get_mixture_or_task("c_answers")
    dataset = task.get_dataset(tasks.LENGTHS, split="validation", shuffle=False)
    expected = list(dataset.as_numpy_iterator())[3]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert type(found[name]) is type(value), name
        assert np.asarray(found[name]).dtype == np.asarray(value).dtype, name
        np.testing.assert_array_equal(found[name], value)


def test_predictions_are_recorded_as_json(predictor, tmp_path):
    result = ours("c_groups", predictor)
    assert result.predictions[1] == {
        "input": "b two",
        "target": {"group": "g1", "value": "No", "number": 1},
        "prediction": {"group": "g1", "value": "No", "number": 1},
    }
    result.write(tmp_path, 0)
    scored = ours("c_scores", predictor)
    assert set(scored.predictions[0]) == {"input", "target", "score"}
    scored.write(tmp_path, 0)


def test_partials_keep_what_literals_say():
    f = functools.partial(tasks.f1, positive=("a", None, {"b": [1, -2.5, b"c", True]}))
    again = metrics.get(naming.name_of(f, {}))
    assert again.func is f.func and again.keywords == f.keywords


@pytest.mark.parametrize("split", ["validation", pytest.param("train", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("task", "eos_on_inputs", "eos_on_targets"),
    [
        pytest.param("c_ranked", True, True, marks=pytest.mark.slow),
        ("c_ranked_no_eos", False, True),
        pytest.param("c_ranked_no_end", False, False, marks=pytest.mark.slow),
    ],
)
def test_ranking_reads_the_tokens_that_are_trained_on(
    task, eos_on_inputs, eos_on_targets, split, predictor, monkeypatch
):
    read = []
    rank = predictor.rank_tokens
    monkeypatch.setattr(
        predictor, "rank_tokens", lambda *given: read.append(given[:2]) or rank(*given)
    )
    result = ours(task, predictor, split)
    [(inputs, choices)] = read
    texts = ("no", "yes", "x y z")
    for row, ids, of_row in zip(tasks.ROWS, inputs, choices, strict=True):
        assert ids == VOCABULARY.encode(row["inputs"]) + [1] * eos_on_inputs
        assert of_row == [VOCABULARY.encode(text) + [1] * eos_on_targets for text in texts]
    # By the model's logits over the rows of training batches.
    for row, ids, of_row, record in zip(
        tasks.ROWS, inputs, choices, result.predictions, strict=True
    ):
        likelihoods = []
        for choice in of_row:
            batch = records.model_batch([np.array(ids)], [np.array(choice)], 16, 16)
            logits = predictor.model.logits(predictor.params, batch)[0, : len(choice)]
            log_probs = jax.nn.log_softmax(logits)
            likelihoods.append(float(log_probs[np.arange(len(choice)), choice].sum()))
        assert record["prediction"] == texts[int(np.argmax(likelihoods))], row


def test_derived_tasks_have_the_fields_of_their_examples():
    plain, shots, shuffled = (
        loader.eval_examples(dataclasses.replace(data(name), inputs_length=60))
        for name in ("c_texts", "c_texts_1shot", "c_texts_shuffled")
    )
    answers = [example.as_seqio["answers"].tolist() for example in plain]
    assert answers == [[a.encode() for a in each] for each in tasks.FIELDS["answers"]]
    assert [example.as_seqio["answers"].tolist() for example in shots] == answers
    assert shots[0].inputs_text.endswith("\n\na one")
    # The fields of a shuffled target are those of the example that it comes from.
    numbers = [answers.index(example.as_seqio["answers"].tolist()) for example in shuffled]
    assert sorted(numbers) == list(range(6)) and numbers != list(range(6))
    assert [tasks.TARGETS[n] for n in numbers] == [e.targets_text for e in shuffled]


def test_fields_that_no_record_holds_are_left_out():
    ragged = tf.ragged.constant([[[1], [2, 3]], [[4]]])
    fields = {"inputs": ["a", "b"], "targets": ["c", "d"], "ragged": ragged, "deep": {"x": [1, 2]}}
    seqio.TaskRegistry.add(
        "c_ragged",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files: tf.data.Dataset.from_tensor_slices(fields),
            splits=("validation",),
        ),
        preprocessors=[],
        output_features=text_features(),
        postprocess_fn=tasks.qa,
        metric_fns=[tasks.squad],
    )
    found = loader.eval_examples(data("c_ragged"))
    assert [example.fields for example in found] == [{"deep": {"x": 1}}, {"deep": {"x": 2}}]
