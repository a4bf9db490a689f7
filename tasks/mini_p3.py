"""seqio tasks of the mini world's prompted collection: `mini_p3_<family>_<template>`.

mini_p3_train      the templates of `mini_p3_world.TRAIN`, at the rates of their sizes
mini_p3_held_out   those of `mini_p3_world.HELD_OUT`, for rank classification

Training families have the splits train and validation, held-out ones test, too. Where a model ranks
answers, an example keeps them as `answer_choices`.
"""

import functools
from typing import Any

import seqio
import tensorflow as tf

from robust_ft import metrics
from robust_ft.data.seqio_tasks import text_features
from robust_ft.metrics import postprocess
from tasks import mini_p3_world


def _dataset(
    split: str, shuffle_files: bool, seed: int | None = None, *, family: str, template: str
) -> tf.data.Dataset:
    """Returns a split in a fixed order: the loader shuffles, not this."""
    del shuffle_files, seed
    words = mini_p3_world.FAMILIES[family].templates[template]
    examples = [mini_p3_world.render(item, words) for item in mini_p3_world.items(family, split)]
    columns: dict[str, list[Any]] = {
        "id": list(range(len(examples))),
        "inputs": [example.inputs for example in examples],
        "targets": [example.targets for example in examples],
    }
    if mini_p3_world.FAMILIES[family].ranked:
        columns["answer_choices"] = [example.choices for example in examples]
    return tf.data.Dataset.from_tensor_slices(columns)


def _add(family: str, template: str) -> str:
    task, sizes = f"mini_p3_{family}_{template}", dict(mini_p3_world.sizes(family))
    ranked = mini_p3_world.FAMILIES[family].ranked
    seqio.TaskRegistry.add(
        task,
        source=seqio.FunctionDataSource(
            dataset_fn=functools.partial(_dataset, family=family, template=template),
            splits=tuple(sizes),
            num_input_examples=sizes,
        ),
        preprocessors=[],
        output_features=text_features(),
        postprocess_fn=postprocess.identity,
        metric_fns=[metrics.accuracy if ranked else metrics.exact_match],
    )
    return task


def _add_all() -> None:
    for name, families in (("train", mini_p3_world.TRAIN), ("held_out", mini_p3_world.HELD_OUT)):
        tasks = [
            (_add(family, template), mini_p3_world.sizes(family)["train"])
            for family in families
            for template in families[family].templates
        ]
        seqio.MixtureRegistry.add(f"mini_p3_{name}", tasks)


_add_all()
