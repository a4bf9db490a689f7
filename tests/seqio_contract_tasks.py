"""Tasks as T5's users write them for seqio: their metrics and postprocessors know nothing of us."""

import functools
import math

import numpy as np
import seqio
import tensorflow as tf

from robust_ft.data.seqio_tasks import text_features

BYTES = seqio.ByteVocabulary()
LENGTHS = {"inputs": 16, "targets": 16}
INPUTS = ["a one", "b two", "c three", "d four", "e five", "f six"]
TARGETS = ["Yes", "No", "Yes", "Maybe so", "No", "Yes"]
# What a model says to each input.
OUTPUTS = ["yes", "No", "No", "Maybe so", "Yes ", "what"]
FIELDS = {
    "idx": [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]],
    "is_correct": [True, False, False, True, True, False],
    "answers": [["yes", "Yes"], ["no", "nope"], ["no", "x"], ["so", "y"], ["Yes", "z"], ["q", "q"]],
    "group": [b"g1", b"g1", b"g2", b"g2", b"g3", b"g3"],
    "weight": np.array([0.5, 1, 2, 1, 1, 4], np.float32),
}


def examples(split, shuffle_files=False, seed=None):
    return tf.data.Dataset.from_tensor_slices({"inputs": INPUTS, "targets": TARGETS, **FIELDS})


def add(name, metric_fns, postprocess_fn=None, copy_pretokenized=True, **settings):
    tokenize = functools.partial(
        seqio.preprocessors.tokenize, copy_pretokenized=copy_pretokenized, with_eos=False
    )
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(examples, splits=("train", "validation")),
        preprocessors=[tokenize, seqio.preprocessors.append_eos],
        output_features={n: seqio.Feature(BYTES, add_eos=True) for n in ("inputs", "targets")},
        postprocess_fn=postprocess_fn,
        metric_fns=metric_fns,
        **settings,
    )


def accuracy(targets, predictions):
    assert all(isinstance(target, str | int | float) for target in targets)
    return {
        "accuracy": 100
        * float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))
    }


def lower_text(string, **unused):
    return string.lower()


def label_id(text, label_classes, example=None, is_target=False, default=-1):
    if is_target:
        assert text in label_classes
    text = text.strip()
    return label_classes.index(text) if text in label_classes else default


def f1(targets, predictions, beta=1.0, positive=0):
    hits = sum(t == p == positive for t, p in zip(targets, predictions, strict=True))
    recall = hits / max(sum(t == positive for t in targets), 1)
    precision = hits / max(sum(p == positive for p in predictions), 1)
    bottom = beta**2 * precision + recall
    return {"f1": 100 * (1 + beta**2) * precision * recall / bottom if bottom else 0.0}


def at_most(length, targets, predictions):
    return {"at_most": sum(len(p) <= length for p in predictions), "of": len(targets)}


def mean_score(targets, scores):
    assert isinstance(scores, np.ndarray)
    return {"mean_score": float(np.mean(scores)), "worst_score": scores.min()}


def rank_classification(score, example=None, is_target=False):
    if not is_target:
        return score
    return tuple(example["idx"].tolist()), bool(example["is_correct"]), float(example["weight"])


def rank_accuracy(targets, scores, num_classes=None):
    groups = {}
    for (index, is_correct, weight), score in zip(targets, scores, strict=True):
        groups.setdefault(index[0], []).append((score * weight, is_correct))
    assert all(len(group) == num_classes for group in groups.values())
    return {"rank_accuracy": 100 * float(np.mean([max(g)[1] for g in groups.values()]))}


def qa(answer, example=None, is_target=False):
    if is_target:
        return [text.decode("utf-8") for text in example["answers"]]
    return answer.strip()


def squad(targets, predictions):
    assert all(isinstance(answers, list) for answers in targets)
    return {"em": 100 * float(np.mean([p in t for t, p in zip(targets, predictions, strict=True)]))}


def signed(text, example=None, is_target=False):
    return {"yes": 1.0, "no": -1.0}.get(text.strip().lower(), 0.0)


def bias(targets, predictions):
    return {"bias": 100 * float(np.mean(np.subtract(predictions, targets)))}


def pearson(targets, predictions):
    with np.errstate(invalid="ignore"):
        constant = [1.0] * len(predictions)
        return {"pearson": 100 * np.corrcoef(targets, constant)[0, 1]}


def grouped(text, example, is_target):
    return {"group": example["group"], "value": text.strip(), "number": example["idx"][1]}


def group_accuracy(targets, predictions):
    right = {}
    for target, prediction in zip(targets, predictions, strict=True):
        assert target["group"] == prediction["group"] and target["number"] == prediction["number"]
        right.setdefault(target["group"], []).append(target["value"] == prediction["value"])
    return {"group_accuracy": 100 * float(np.mean([any(each) for each in right.values()]))}


def perplexity(targets, scores):
    return {"perplexity": seqio.metrics.Scalar(math.exp(-float(np.mean(scores)) / 10))}


def counted(what):
    def count(targets, predictions):
        return {f"count_{what}": sum(p == what for p in predictions)}

    return count


count_no = counted("No")


class Share:
    def __init__(self, text):
        self.text = text

    def __call__(self, targets, predictions):
        return {"share": 100 * sum(self.text in t for t in targets) / len(predictions)}

    @staticmethod
    def length(targets, predictions):
        return {"length": sum(map(len, predictions)) / sum(map(len, targets))}


share_of_yes = Share("Yes")
LABELS = ["Yes", "No", "Maybe so"]

add("c_plain", [accuracy])
add("c_lower", [accuracy], lower_text)
add("c_no_texts", [accuracy], lower_text, copy_pretokenized=False)
add(
    "c_labels",
    [accuracy, functools.partial(f1, positive=1)],
    functools.partial(label_id, label_classes=LABELS),
)
add(
    "c_partial_metric",
    [functools.partial(f1, beta=0.5, positive=1)],
    functools.partial(label_id, label_classes=["No", "Yes", "Maybe so"], default=1),
)
add("c_positional", [functools.partial(at_most, 3)])
add("c_nested", [functools.partial(functools.partial(f1, positive="No", beta=3.0), beta=2.0)])
add("c_scores", [mean_score])
add("c_both", [mean_score, accuracy], lower_text)
add(
    "c_rank",
    [functools.partial(rank_accuracy, num_classes=2)],
    rank_classification,
)
add("c_answers", [squad], qa)
add("c_negative", [bias], signed)
add("c_nan", [pearson], signed)
add("c_groups", [group_accuracy], grouped)
add("c_scalar", [perplexity])
add("c_made", [count_no])
add("c_object", [share_of_yes, Share.length])

# What no name leads to.
add("c_lambda", [lambda targets, predictions: {"x": 1.0}])
add("c_local", [counted("Yes")])
add("c_lambda_postprocess", [accuracy], lambda text, example, is_target: text)
add("c_argument", [functools.partial(f1, positive=np.float32(1))])
add("c_unnamed_object", [Share("No")])
add("c_metric_objs", [], metric_objs=[
    seqio.metrics.PassthroughLegacyMetric.from_metric_fn(accuracy).empty()
])  # fmt: skip


def with_aux(targets, predictions, aux_values):
    return {"aux": len(aux_values)}


def other_words(references, outputs):
    return {"other": 1.0}


add("c_aux", [with_aux])
add("c_other_words", [other_words])
add("c_twice", [accuracy, functools.partial(at_most, 3), functools.partial(at_most, 4)])

ROWS = [{"inputs": text, "targets": choice} for text in INPUTS for choice in ("yes", "no", "x y z")]


def ranked(name, eos_on_inputs, eos_on_targets=True):
    def rows(split, shuffle_files=False, seed=None):
        columns = {key: [row[key] for row in ROWS] for key in ("inputs", "targets")}
        choices = [["no", "yes", "x y z"]] * len(ROWS)
        return tf.data.Dataset.from_tensor_slices({**columns, "answer_choices": choices})

    features = {
        "inputs": seqio.Feature(BYTES, add_eos=eos_on_inputs),
        "targets": seqio.Feature(BYTES, add_eos=eos_on_targets),
    }
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(rows, splits=("train", "validation")),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=features,
        metric_fns=[accuracy],
    )


ranked("c_ranked", True)
ranked("c_ranked_no_eos", False)
ranked("c_ranked_no_end", False, False)

seqio.TaskRegistry.add(
    "c_texts",
    source=seqio.FunctionDataSource(examples, splits=("train", "validation")),
    preprocessors=[],
    output_features=text_features(),
    postprocess_fn=qa,
    metric_fns=[squad],
)
