"""Few-shot evaluation of a model of a few thousand parameters on two small ranked tasks."""

import dataclasses

import toy

from robust_ft.data.in_memory import rows_task
from robust_ft.few_shot import FewShot
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.optim import AdamW, Schedule
from robust_ft.recipe import Recipe

# Without dropout, whose draws depend on padding and on the order of examples.
CONFIG = dataclasses.replace(toy.CONFIG, dropout_rate=0.0)
MODEL = Model(CONFIG, peft=(Prompt(length=3),))


def rows(name, sizes):
    """Returns {split: rows} of a task: is a number even or odd, with another answer at times."""
    return {
        split: [
            {"text": f"{name} {i}", "choices": ["even", "odd", "none"][: 2 + i % 2], "right": i % 2}
            for i in range(start, start + size)
        ]
        for start, (split, size) in zip((0, 40), sizes.items(), strict=True)
    }


def task(folder, name, changed=None, **sizes):
    """Returns a task in files; `changed` is what differs in the first evaluated row."""
    splits = rows(name, {"train": 12, "validation": 9, **sizes})
    splits["validation"][0] |= changed or {}
    return rows_task(
        name, **splits, inputs="{text}", targets="{right}", choices=("{choices}",),
        answer="index", cache_dir=str(folder),
    )  # fmt: skip


def evaluation(folder, of_task, **changes):
    data = dataclasses.replace(
        toy.DATA, task=of_task.name, module=None, split="validation", inputs_length=16,
        targets_length=8, file_tasks=(of_task,), cache_dir=str(folder),
    )  # fmt: skip
    return dataclasses.replace(toy.TARGET_EVALUATION, data=data, target_format=None, **changes)


def few_shot(folder, tasks=None, evaluation_changes=None, **changes):
    tasks = tasks or [task(folder, name) for name in ("toy_one", "toy_two")]
    evaluations = [evaluation(folder, each, **(evaluation_changes or {})) for each in tasks]
    settings = {
        "model": MODEL,
        "restore": "scratch",
        "evaluations": evaluations,
        "data": dataclasses.replace(evaluations[0].data, split="train"),
        "datasets": ["toy"],
        "optimizer": AdamW(Schedule(0.1)),
        "examples": 4,
        "epochs": 7,
        "eval_period": 3,
        "seeds": 2,
        "side_by_side": 3,
        "zero_shot_without": ["prompt"],
    }
    return FewShot(**{**settings, **changes})


def recipe(directory, stages=(), seed=0, **changes):
    few = few_shot(directory.parent / "data", **changes)
    return Recipe("toy_few_shot", str(directory), stages, seed, few_shot=few)
