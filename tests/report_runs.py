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
