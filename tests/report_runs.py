"""Made run folders for the tests of the report."""

import json
import random

HELD_OUT_TASKS = ("mini_qa", "mini_zorb", "mini_summary", "mini_cb")


def row(stage, step, task, metric, value, split="test", shots=0, num_examples=96):
    return {
        "stage": stage, "step": step, "task": task, "split": split, "shots": shots,
        "metric": metric, "value": value, "num_examples": num_examples,
    }  # fmt: skip


def evaluation(stage, step, split, target, others, share):
    rows = [row(stage, step, "mini_rte", "accuracy", target, split, num_examples=512)]
    for task in HELD_OUT_TASKS:
        rows.append(row(stage, step, task, "exact_match", others, split, shots=1))
    rows.append(row(stage, step, "held_out", "norm_avg", others, split, shots=1))
    rows.append(row(stage, step, "held_out", "format_share", share, split, shots=1))
    return rows


def write_samples(folder, name, step, answer=None):
    path = folder / "inference_eval" / f"{name}-{step:06}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"input": f"Q : what is the capital of <land{i}> ? A :", "target": f"city{i}",
         "prediction": answer or f"city{i}"}
        for i in range(4)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def make_run(folder, method, seed):
    """Writes a finished run of "full_rte" (one stage) or "promot_rte" (two), as it would look."""
    noise = random.Random(seed)
    promot = method == "promot_rte"
    stages = ["prompt", "model"] if promot else ["full"]
    rows = []
    for split in ("validation", "test"):
        rows += evaluation(stages[0], 0, split, 0.1, 98.0, 0.0)
    for stage in stages:
        prompt = stage == "prompt"
        steps = range(100, 401, 100) if prompt else (10, 25, 50, 100, 150)
        lost = 0.0 if prompt else 5.0 if promot else 57.0
        for step in steps:
            done = 1 - 0.5 ** (step / (100 if prompt else 15))
            others = 98 - lost * done + noise.uniform(-2, 2) * (lost > 0)
            target = (90 if stage != "model" else 88 + done) * (done if stage != "model" else 1)
            share = lost / 100 * done
            rows += evaluation(stage, step, "validation", target + noise.random(), others, share)
        rows += evaluation(stage, steps[-1], "test", target + noise.random(), others, share)
        where = folder / stage
        where.mkdir(parents=True)
        lines = [
            {"step": s, "split": "train", "loss": 3 * 0.97**s + 0.1 * noise.random()}
            for s in range(1, steps[-1] + 1)
        ]
        (where / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
        outcome = {"step": steps[-1], "score": 90.0, "paths": []}
        (where / "outcome.json").write_text(json.dumps(outcome))
        for name in ("mini_qa_1shot", "mini_rte_0shot"):
            if stage == stages[0]:
                write_samples(where, name, 0)
            write_samples(where, name, steps[-1], "True" if stage == "full" else None)
    about = {"name": method, "seed": seed, "target": "mini_rte", "stages": stages}
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "summary.json").write_text(json.dumps(rows))
    (folder / "config.gin").write_text(f"RANDOM_SEED = {seed}\nMODEL = '<mini>'\n")
    return folder


GRID = (0.0, 0.5, 1.0)
ID_EXAMPLES, OOD_EXAMPLES = 40, 20


def right_share(weight, seed):
    """Returns the shares of right answers, ID and OOD, of a model with a lambda."""
    return 0.6 + 0.3 * weight * (1 - weight) + 0.02 * seed, 0.3 + 0.4 * weight


def make_cocktail_run(folder, seed):
    """Writes a finished run with an ensemble of "light" and "full", and a cocktail of both."""
    rows, outcomes = [], {}
    models = {("light", None, "light"): 1.0, ("full", None, "full"): 0.0}
    for weight in GRID:
        models["ensemble", weight, f"ensemble/lambda_{weight:g}"] = weight
        student = f"student_{weight:g}" if weight else "full"
        models["cocktail", weight, student] = weight
        if weight:
            models[student, None, student] = weight
    for split in ("validation", "test"):
        rows.append(row("light", 0, "webnlg", "exact_match", 10.0, split) | {"role": "target"})
    rows.append(row("light", 0, "webnlg_ood", "exact_match", 20.0) | {"role": "ood"})
    for (stage, weight, place), value in models.items():
        for task, role, size, share in zip(
            ("webnlg", "webnlg_ood"), ("target", "ood"), (ID_EXAMPLES, OOD_EXAMPLES),
            right_share(value, seed), strict=True,
        ):  # fmt: skip
            right = round(share * size)
            extra = {"role": role} | ({} if weight is None else {"lambda": weight})
            score = 100 * right / size
            rows.append(row(stage, 50, task, "exact_match", score, "test", 0, size) | extra)
            said = [
                {"input": f"{task} {i}", "target": "a", "references": ["a", "A !"],
                 "prediction": "A !" if (i * 7 + seed) % size < right else "b"}
                for i in range(size)
            ]  # fmt: skip
            path = folder / place / "inference_eval" / f"{task}-test-000050.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in said))
        if weight is None:
            rows.append(
                row(stage, 50, "webnlg", "exact_match", 60.0, "validation") | {"role": "target"}
            )
            outcomes[stage] = {"step": 50, "score": 60.0, "paths": []}
    for stage, outcome in outcomes.items():
        (folder / stage / "outcome.json").write_text(json.dumps(outcome))
    for name in ("ensemble", "cocktail"):
        candidates = [
            {
                "weight": weight,
                "score": 60.0 + 4 * weight * (1 - weight),
                "folder": place,
                "step": 50,
            }
            for stage, weight, place in models
            if stage == name
        ]
        (folder / name).mkdir(exist_ok=True)
        selection = {"weight": 0.5, "candidates": candidates}
        (folder / name / "selection.json").write_text(json.dumps(selection))
    about = {"name": "table2", "seed": seed, "target": "webnlg", "stages": list(outcomes),
             "selections": ["ensemble", "cocktail"]}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "summary.json").write_text(json.dumps(rows))
    return folder
