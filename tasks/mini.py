"""seqio tasks of the mini world (`tasks.mini_world`): `mini_<family>` and `mini_<family>_<k>shot`.

mini_pretrain                      what the shipped mini T5 is pretrained on
mini_rte, mini_rte_1shot, ...      entailment, absent from pretraining: the finetuning target
mini_d2t, mini_d2t_ood             table to text: finetuning set (ID topics) and OOD topics
mini_news, mini_news_ood           summaries: finetuning set (news from three places) and the others
mini_openqa, mini_openqa_ood       questions without passages: finetuning set (jobs) and capitals
mini_rte_d2t                       both finetuning tasks at equal rates
mini_held_out, mini_held_out_1shot mixtures of the held-out families (`mini_world.HELD_OUT`);
                                   two of these have only k-shot tasks, see `SHOT_ONLY`
"""

import functools
from typing import Any

import seqio
import tensorflow as tf

from robust_ft import metrics, task_names
from robust_ft.data.seqio_tasks import text_features
from robust_ft.metrics import postprocess
from tasks import mini_world

SHOTS = (0, 1)  # numbers of exemplars that pretraining has
TABLES = ("d2t", "d2t_ood")
NEWS = ("news", "news_ood")
CHOICES = {"rte": ("True", "False"), "fact": ("True", "False"), "cb": ("yes", "no")}


def task_name(family: str, shots: int = 0) -> str:
    """Returns the name of a family's seqio task, as `mini_rte` or `mini_rte_1shot`."""
    return task_names.with_shots(f"mini_{family}", shots)


def _dataset(
    split: str, shuffle_files: bool, seed: int | None = None, *, family: str, shots: int
) -> tf.data.Dataset:
    """Returns a split in a fixed order: the loader shuffles, not this."""
    del shuffle_files, seed
    examples = list(mini_world.examples(family, split, shots))
    columns: dict[str, list[Any]] = {
        "id": list(range(len(examples))),
        "inputs": [example.inputs for example in examples],
        "targets": [example.targets for example in examples],
    }
    if family != "pretrain":  # its examples have unequal numbers of references, and no evaluation
        columns["references"] = [example.references or [example.targets] for example in examples]
    if family in CHOICES:
        columns["choices"] = [CHOICES[family]] * len(examples)
    return tf.data.Dataset.from_tensor_slices(columns)


def _add(family: str, shots: int = 0) -> None:
    sizes = {split: mini_world.num_examples(family, split, shots) for split in mini_world.SPLITS}
    sizes = {split: size for split, size in sizes.items() if size}
    label = family in CHOICES
    scores = [metrics.accuracy if label else metrics.exact_match]
    if family in TABLES:
        scores = [metrics.bleu, *scores]
    if family in NEWS:
        scores = [metrics.rouge, *scores]
    seqio.TaskRegistry.add(
        task_name(family, shots),
        source=seqio.FunctionDataSource(
            dataset_fn=functools.partial(_dataset, family=family, shots=shots),
            splits=tuple(sizes),
            num_input_examples=sizes,
        ),
        preprocessors=[],
        output_features=text_features(),
        postprocess_fn=postprocess.first_word if label else postprocess.promot,
        metric_fns=scores,
    )


def _add_all() -> None:
    _add("pretrain")
    for shots in SHOTS:
        for family in mini_world.FAMILIES:
            if shots or family not in mini_world.SHOT_ONLY:
                _add(family, shots)
        held_out = [f for f in mini_world.HELD_OUT if shots or f not in mini_world.SHOT_ONLY]
        names = [task_name(family, shots) for family in held_out]
        seqio.MixtureRegistry.add(task_name("held_out", shots), names, default_rate=1.0)
    targets = [task_name("rte"), task_name("d2t")]
    seqio.MixtureRegistry.add("mini_rte_d2t", targets, default_rate=1.0)


_add_all()
