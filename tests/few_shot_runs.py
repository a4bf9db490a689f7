"""Made few-shot evaluations, as a run leaves them: `MODEL_DIR/few_shot/<task>.jsonl`."""

import json

import numpy as np

DATASETS = {"nli": 3, "copa": 2}  # dataset -> its number of choices
TEMPLATES = 3
SIZE = 40  # examples of each dataset


def line(task, dataset, shots, which, seed, correct, chance, split="validation"):
    """Returns one evaluation."""
    correct = [int(answer) for answer in correct]
    return {
        "task": task, "dataset": dataset, "split": split, "shots": shots, "seed": seed,
        "which": which, "epoch": {"zero": 0, "last": 100, "best": 60}[which],
        "accuracy": 100 * sum(correct) / len(correct), "random_accuracy": chance,
        "correct": correct,
    }  # fmt: skip


def answers(share, *seeds):
    """Returns answers of which about a share is right."""
    return np.random.default_rng(seeds).random(SIZE) < share


def write(folder, name, lines):
    (folder / "few_shot").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(each) + "\n" for each in lines)
    (folder / "few_shot" / f"{name}.jsonl").write_text(text)


def make_few_shot_run(folder, name, seed, skill, draws=2, stages=("mtl",)):
    """Writes a finished run of an arm that is right `skill` more often than guessing."""
    for number, (dataset, choices) in enumerate(DATASETS.items()):
        for template in range(TEMPLATES):
            task = f"mini_p3_{dataset}_{template}"
            place = (seed, number, template)
            lines = [
                line(task, dataset, 0, "zero", None, answers(1 / choices + skill / 2, *place),
                     100 / choices)
            ]  # fmt: skip
            for draw in range(draws):
                for offset, which in enumerate(("last", "best")):
                    right = answers(1 / choices + skill + 0.05 * offset, *place, draw)
                    lines.append(line(task, dataset, 16, which, draw, right, 100 / choices))
            write(folder, task, lines)
    about = {"name": name, "seed": seed, "target": None, "stages": list(stages)}
    (folder / "run.json").write_text(json.dumps(about))
    rows = [
        {"stage": "few_shot", "step": 100, "task": "mini_p3_nli_0", "role": "target",
         "split": "validation", "shots": 16, "metric": "accuracy", "value": 50.0,
         "num_examples": SIZE}
    ]  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(rows))
    return folder
