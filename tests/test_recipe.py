"""Stages chain, finished ones are skipped, and what a run leaves behind."""

import dataclasses
import itertools
import json
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from safetensors.numpy import save_file

from robust_ft import claiming, runner, stage_start, trainer
from robust_ft.errors import UserError
from robust_ft.evaluate import Evaluation, suite
from robust_ft.evaluator import HELD_OUT
from robust_ft.models.bart import BartConfig
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.outcome import Outcome
from robust_ft.recipe import Recipe
from robust_ft.summary import Row
from robust_ft.vocabulary import ByteVocabulary

# Validation scores at steps 0, 2, 4 and 6: the prompt's best is step 4, the model's first best 2.
SCORES = [0.0, 10.0, 30.0, 20.0, 0.0, 9.0, 5.0, 9.0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished ProMoT run: its folder, the calls of its evaluations and the summary."""
    directory = tmp_path_factory.mktemp("runs") / "promot"
    with pytest.MonkeyPatch.context() as patch:
        evaluate = toy.ScriptedEvaluate(patch, SCORES)
        summary = runner.run(toy.promot(directory))
    return types.SimpleNamespace(directory=directory, calls=evaluate.calls, rows=summary.rows)


def validated(calls):
    """Returns the parameters at steps 0, 2, 4 and 6 of both stages, as the target saw them."""
    found = [
        call.params
        for call in calls
        if call.evaluation.role == "target" and call.evaluation.data.split == "validation"
    ]
    return found[:4], found[4:]


def at_the_end(calls):
    """Returns the parameters of both stages' final evaluations."""
    is_test = [c for c in calls if c.evaluation.role == "target" and not c.detached]
    return [call.params for call in is_test if call.evaluation.data.split == "test"]


def test_selects_best_score_and_earliest_of_equals(finished):
    outcomes = [Outcome.read(finished.directory / name) for name in ("prompt", "model")]
    assert [(o.step, o.score, o.steps) for o in outcomes] == [(4, 30.0, 6), (2, 9.0, 6)]
    assert outcomes[0].paths == (toy.PROMPT,)


def test_model_stage_starts_where_the_selected_prompt_left_it(finished):
    prompt_steps, model_steps = validated(finished.calls)
    toy.assert_same(model_steps[0], prompt_steps[2])
    assert toy.final(finished.directory, "prompt").keys() == {toy.PROMPT}
    toy.assert_same(
        toy.final(finished.directory, "prompt"), {toy.PROMPT: prompt_steps[2][toy.PROMPT]}
    )


def test_only_what_trains_changes(finished):
    prompt_steps, model_steps = validated(finished.calls)
    for before, after in itertools.pairwise(prompt_steps):
        changed = {p for p in before if before[p].tobytes() != after[p].tobytes()}
        assert changed == {toy.PROMPT}
    for before, after in itertools.pairwise(model_steps):
        changed = {p for p in before if before[p].tobytes() != after[p].tobytes()}
        # Of the embeddings and biases some rows may stay, but no whole parameter does.
        assert changed == before.keys() - {toy.PROMPT}


def test_final_evaluation_sees_the_selected_checkpoint(finished):
    prompt_steps, model_steps = validated(finished.calls)
    after_prompt, after_model = at_the_end(finished.calls)
    toy.assert_same(after_prompt, prompt_steps[2])
    toy.assert_same(after_model, model_steps[1])
    trained = {p: a for p, a in after_model.items() if p != toy.PROMPT}
    toy.assert_same(toy.final(finished.directory, "model"), trained)


def test_evaluations_that_cannot_change_run_once(finished):
    # The prompt stage trains the prompt only, and held-out tasks are evaluated without it.
    held_out = [c for c in finished.calls if c.evaluation.role == HELD_OUT]
    keys = [(c.evaluation.task, c.evaluation.data.split) for c in held_out]
    per_stage = {"toy_other", "toy_other_1shot"}
    assert {task for task, _ in keys} == per_stage
    for task in per_stage:
        # Once in the prompt stage; in the model stage at steps 0, 2, 4 and 6 and at the end.
        assert keys.count((task, "validation")) == 1 + 4
        # At the end of each stage with the prompt, too.
        without = [c for c in held_out if c.evaluation.task == task and c.detached]
        assert [c.evaluation.split for c in without].count("test") == 1 + 1
        assert keys.count((task, "test")) == 1 + 1 + 2


def test_final_results_of_held_out_tasks_are_there_with_and_without(finished):
    for stage, step in (("prompt", 4), ("model", 2)):
        rows = [r for r in finished.rows if (r.stage, r.step, r.split) == (stage, step, "test")]
        other = [r for r in rows if r.task != "toy"]
        assert {(r.role, r.without) for r in other} == {("held_out", ("prompt",)), ("kept", ())}
        for role in ("held_out", "kept"):
            names = [(r.task, r.shots) for r in other if r.role == role]
            assert set(names) == {(t, s) for t in ("toy_other", "held_out") for s in (0, 1)}
        assert {r.without for r in rows if r.task == "toy"} == {()}
        folder = finished.directory / stage / "inference_eval"
        assert (folder / f"toy_other_1shot_kept-test-{step:06}.jsonl").exists()
        assert (folder / f"toy_other_1shot-test-{step:06}.jsonl").exists()
    # Training is followed by the headline number alone.
    assert not [r for r in finished.rows if r.role == "kept" and r.split != "test"]


def test_a_task_that_needs_a_prompt_of_its_own_has_one_number(
    tmp_path, monkeypatch, capsys, finished
):
    toy.ScriptedEvaluate(monkeypatch, SCORES)
    scripted = Evaluation.__call__

    def call(self, context):
        if self.role == HELD_OUT and context.predictor.model.peft:
            raise UserError("No task 'toy_other' has a prompt.")
        return scripted(self, context)

    monkeypatch.setattr(Evaluation, "__call__", call)
    rows = runner.run(toy.promot(tmp_path / "run")).rows
    assert rows == [row for row in finished.rows if row.role != "kept"]
    shown = capsys.readouterr().out
    assert shown.count("[model] toy_other is evaluated without prompt only: No task") == 1


def test_final_results_with_the_methods_can_be_left_out(tmp_path, monkeypatch, finished):
    toy.ScriptedEvaluate(monkeypatch, SCORES)
    off = {"final_kept": False}
    rows = runner.run(toy.promot(tmp_path / "run", off, off)).rows
    assert rows == [row for row in finished.rows if row.role != "kept"]


def test_baseline_is_the_model_without_prompt(finished):
    (baseline,) = [c for c in finished.calls if c.evaluation.role == "target" and c.detached]
    assert baseline.evaluation.split == "test" and toy.PROMPT not in baseline.params


def test_summary_rows(finished):
    entries = json.loads((finished.directory / "summary.json").read_text())
    assert [Row.from_json(entry) for entry in entries] == finished.rows
    fields = ["stage", "step", "task", "role", "split", "shots", "metric", "value"]
    fields += ["num_examples"]
    rest = [list(entry)[len(fields) :] for entry in entries]
    assert all(list(entry)[: len(fields)] == fields for entry in entries)
    assert all(keys in ([], ["without"]) for keys in rest)
    scores = [
        (row.stage, row.step, row.value)
        for row in finished.rows
        if row.role == "target" and row.split == "validation"
    ]
    steps = [(stage, step) for stage in ("prompt", "model") for step in (0, 2, 4, 6)]
    assert scores == [(*key, score) for key, score in zip(steps, SCORES, strict=True)]
    final = {(r.stage, r.step) for r in finished.rows if r.split == "test"}
    assert final == {("prompt", 0), ("prompt", 4), ("model", 2)}
    average = [r for r in finished.rows if r.task == "held_out" and r.metric == "norm_avg"]
    assert {row.shots for row in average} == {0, 1}


def test_files_of_a_run(finished):
    about = json.loads((finished.directory / "run.json").read_text())
    assert {"settings", "origins", "times", "changes"} < about.keys()
    assert {k: about[k] for k in ("name", "seed", "target", "stages", "selections")} == {
        "name": "toy_promot",
        "seed": 0,
        "target": "toy",
        "stages": ["prompt", "model"],
        "selections": [],
    }
    for stage, selected in (("prompt", 4), ("model", 2)):
        folder = finished.directory / stage
        # The best checkpoint and the newest one.
        assert {p.name for p in folder.glob("checkpoint_*")} == {
            f"checkpoint_{selected}",
            "checkpoint_6",
        }
        lines = toy.read_lines(folder / "metrics.jsonl")
        train = [line for line in lines if line["split"] == "train"]
        assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
        assert all(np.isfinite(line["loss"]) and line["learning_rate"] > 0 for line in train)
        assert list((folder / "train").glob("events.*"))
        outputs = folder / "inference_eval"
        for task in ("toy", "toy_other", "toy_other_1shot"):
            assert list((outputs / task).glob("events.*"))
            steps = [x["step"] for x in toy.read_lines(outputs / f"{task}-metrics.jsonl")]
            assert sorted(set(steps)) == [0, 2, 4, 6]
            for step in (0, 2, 4, 6):
                lines = toy.read_lines(outputs / f"{task}-{step:06}.jsonl")
                assert lines == [{"input": "i", "target": "t", "prediction": "p"}]
            assert (outputs / f"{task}-test-{selected:06}.jsonl").exists()
    info = (finished.directory / "model" / "model-info.txt").read_text()
    assert f"{toy.PROMPT} " in info and "frozen" in info and "trainable" in info


def test_finished_stages_are_skipped(finished, monkeypatch):
    before = (finished.directory / "summary.json").read_text()
    monkeypatch.setattr(runner, "fit", None)
    assert runner.run(toy.promot(finished.directory)).rows == finished.rows
    assert (finished.directory / "summary.json").read_text() == before


def test_a_stage_that_patience_ended_is_skipped_too(tmp_path, monkeypatch):
    recipe = toy.promot(tmp_path, prompt={"steps": 20, "patience": 1}, model={"steps": 2})
    toy.ScriptedEvaluate(monkeypatch, [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    rows = runner.run(recipe).rows
    assert max(row.step for row in rows if row.stage == "prompt") == 4
    monkeypatch.setattr(runner, "fit", None)
    assert runner.run(recipe).rows == rows


def test_restoring_a_stage_from_files_equals_handing_it_over(finished, tmp_path, monkeypatch):
    recipe = toy.promot(tmp_path)
    toy.ScriptedEvaluate(monkeypatch, SCORES)
    with pytest.raises(KeyboardInterrupt):
        runner.run(recipe, [toy.At("model", 1, toy.raising(KeyboardInterrupt))])
    toy.ScriptedEvaluate(monkeypatch, SCORES[4:])
    again = runner.run(recipe)
    assert again.rows == finished.rows
    toy.assert_same(toy.final(tmp_path, "model"), toy.final(finished.directory, "model"))


@pytest.mark.parametrize(("stage", "step"), [("prompt", 1), ("model", 4)])
def test_sigterm_saves_and_the_resumed_run_equals_the_uninterrupted(
    finished, tmp_path, monkeypatch, stage, step
):
    toy.ScriptedEvaluate(monkeypatch, SCORES)
    before = signal.getsignal(signal.SIGTERM)
    terminate = toy.At(stage, step, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(trainer.Stopped, match=f"step {step} of stage '{stage}'"):
        runner.run(toy.promot(tmp_path), [terminate])
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / stage / f"checkpoint_{step}").is_dir()
    assert runner.run(toy.promot(tmp_path)).rows == finished.rows
    for name in ("prompt", "model"):
        toy.assert_same(toy.final(tmp_path, name), toy.final(finished.directory, name))
        lines = [toy.read_lines(d / name / "metrics.jsonl") for d in (tmp_path, finished.directory)]
        assert lines[0] == lines[1]


# What a stage starts from.


def checkpoint(folder, model=toy.PLAIN, **changes):
    """Writes a checkpoint of a model's shapes; changes are arrays, or None to leave one out."""
    shapes = toy.flat_shapes(model)
    arrays = {path: np.full(leaf.shape, 0.5, np.float32) for path, leaf in shapes.items()}
    arrays |= changes
    kept = {path: array for path, array in arrays.items() if array is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(kept, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def start(folder, **changes):
    stage = toy.stage(**changes)
    return toy.flat(stage_start.restore(Recipe("toy", str(folder), (stage,)), stage))


def test_pretrained_parameters_and_a_fresh_prompt(tmp_path):
    table = np.random.default_rng(0).normal(size=(264, 16)).astype(np.float32)
    path = checkpoint(tmp_path, **{"token_embedder/embedding": table})
    params = start(tmp_path, restore=path)
    assert (params["encoder/encoder_norm/scale"] == 0.5).all()
    # The prompt is drawn from the pretrained embeddings, not from the model's own random ones.
    rows = {row.tobytes() for row in table}
    assert all(row.tobytes() in rows for row in params[toy.PROMPT])
    toy.assert_same(params, start(tmp_path, restore=path))


def test_half_precision_files_become_the_models_type(tmp_path):
    table = np.full((264, 16), 0.25, np.float16)
    path = checkpoint(tmp_path, **{"token_embedder/embedding": table})
    assert start(tmp_path, restore=path)["token_embedder/embedding"].dtype == np.float32


def test_what_an_earlier_stage_kept_narrower_is_handed_on_unrounded(tmp_path, monkeypatch):
    toy.ScriptedEvaluate(monkeypatch)
    table = np.random.default_rng(0).normal(size=(264, 16)).astype(np.float32)
    path = checkpoint(tmp_path, **{"token_embedder/embedding": table})
    config = dataclasses.replace(toy.CONFIG, param_dtype="bfloat16")
    narrow = dataclasses.replace(toy.MODEL, config=config)
    recipe = toy.promot(
        tmp_path / "run",
        prompt={"model": narrow, "restore": path, "steps": 2},
        model={"steps": 2},
    )
    starts = {}

    def fit(stage, params, run):
        starts[stage.name] = jax.tree.map(np.array, toy.flat(params))
        return trainer.fit(stage, params, run)

    monkeypatch.setattr(runner, "fit", fit)
    runner.run(recipe)
    assert starts["prompt"]["token_embedder/embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(starts["model"]["token_embedder/embedding"], table)
    trained = toy.final(tmp_path / "run", "prompt")[toy.PROMPT]
    np.testing.assert_array_equal(starts["model"][toy.PROMPT], trained)
    # Files give the same as what is in memory.
    toy.assert_same(starts["model"], toy.flat(stage_start.restore(recipe, recipe.stages[1])))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decoder/decoder_norm/scale": None}, r"1 parameters of the model are missing \(dec"),
        ({"decoder/other/scale": np.ones(2)}, r"1 have no place in it \(decoder/other/scale\)"),
        ({"encoder/encoder_norm/scale": np.ones(8)}, r"scale with shape \(8,\), the model \(16,\)"),
        ({toy.PROMPT: np.ones((5, 16))}, r"encoder/prompt with shape \(5, 16\), the model \(3"),
    ],
)
def test_a_checkpoint_that_does_not_fit(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        start(tmp_path, restore=checkpoint(tmp_path, **changes))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("modle.safetensors", "no checkpoint at .*modle.safetensors.* mean .*model.safetensors"),
        ("text.safetensors", "no readable safetensors file"),
        (".", "is no checkpoint: neither "),
    ],
)
def test_a_checkpoint_that_is_none(tmp_path, path, sentence):
    checkpoint(tmp_path)
    (tmp_path / "text.safetensors").write_text("{}")
    with pytest.raises(UserError, match=sentence):
        start(tmp_path, restore=str(tmp_path / path))


def test_a_stage_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"'stage:promt'.*are \['prompt'\].* mean 'prompt'"):
        toy.promot(tmp_path, model={"restore": "stage:promt"})
    with pytest.raises(UserError, match=r"stages before it are \[\]"):
        Recipe("toy", str(tmp_path), (toy.stage(restore="stage:model"),))
    with pytest.raises(UserError, match="different names"):
        Recipe("toy", str(tmp_path), (toy.stage(), toy.stage()))
    with pytest.raises(UserError, match="'prompt' has not finished"):
        recipe = toy.promot(tmp_path)
        stage_start.restore(recipe, recipe.stages[1])


def test_a_later_stage_may_drop_the_prompt(finished):
    recipe = toy.promot(finished.directory, model={"model": toy.PLAIN})
    params = toy.flat(stage_start.restore(recipe, recipe.stages[1]))
    assert params.keys() == toy.flat_shapes(toy.PLAIN).keys()


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (dataclasses.replace(toy.MODEL, peft=(Prompt(length=5),)), r"shape \(3, 16\), the model"),
        (
            dataclasses.replace(toy.MODEL, config=dataclasses.replace(toy.CONFIG, mlp_dim=8)),
            r"'stage:prompt' has decoder/layers_0/mlp/wi_0/kernel with shape",
        ),
        (
            dataclasses.replace(
                toy.MODEL, config=dataclasses.replace(toy.CONFIG, num_decoder_layers=2)
            ),
            "'stage:prompt' does not fit the model: .* parameters of the model are missing",
        ),
    ],
)
def test_a_later_stage_of_another_shape(finished, model, sentence):
    recipe = toy.promot(finished.directory, model={"model": model})
    with pytest.raises(UserError, match=sentence):
        stage_start.restore(recipe, recipe.stages[1])


# Prompts of several tasks.

TWO = dataclasses.replace(toy.MODEL, peft=(Prompt(length=3, tasks=("toy", "toy_other")),))


def of_two(directory, **changes):
    """Returns a recipe that trains two tasks' prompts, and evaluates the first."""
    data = dataclasses.replace(toy.DATA, task="toy_both")
    settings = {"model": TWO, "data": data, "steps": 2, **changes}
    return Recipe("toy_two", str(directory), (toy.prompt_stage(**settings),))


def test_each_task_trains_its_own_prompt(tmp_path, monkeypatch):
    toy.ScriptedEvaluate(monkeypatch)
    recipe = of_two(tmp_path / "both")
    before = toy.flat(stage_start.restore(recipe, recipe.stages[0]))[toy.PROMPT]
    runner.run(recipe)
    after = toy.final(tmp_path / "both", "prompt")[toy.PROMPT]
    assert before.shape == after.shape == (2, 3, 16)
    assert (before != after).any(axis=(1, 2)).all()
    runner.run(of_two(tmp_path / "one", data=toy.DATA))
    after = toy.final(tmp_path / "one", "prompt")[toy.PROMPT]
    assert (before != after).any(axis=(1, 2)).tolist() == [True, False]


def test_tasks_without_a_prompt(tmp_path):
    model = dataclasses.replace(toy.MODEL, peft=(Prompt(length=3, tasks=("toi", "toy_other")),))
    with pytest.raises(UserError, match=r"no prompt for the task 'toy', .* mean 'toi'"):
        runner.run(of_two(tmp_path / "run", model=model))
    with pytest.raises(UserError, match=r"for the task 'toy_other_1shot', only for toy\."):
        held_out = dataclasses.replace(toy.HELD_OUT_EVALUATION, detach=())
        evaluations = suite("test", toy.TARGET_EVALUATION, held_out, {1: ["toy_other"]})
        model = dataclasses.replace(toy.MODEL, peft=(Prompt(length=3, tasks=("toy",)),))
        runner.run(of_two(tmp_path / "run", model=model, final_evaluations=evaluations))
    assert not (tmp_path / "run").exists()


def test_soft_prompts_are_not_packed(tmp_path):
    with pytest.raises(
        UserError, match=r"'prompt' packs examples, but a soft prompt .*Stage\.packing=False"
    ):
        runner.run(toy.promot(tmp_path / "run", prompt={"packing": True}))
    assert not (tmp_path / "run").exists()
    plain = toy.promot(tmp_path / "run", model={"packing": True, "model": toy.PLAIN})
    claiming.claim(plain)


def test_evaluations_have_the_vocabulary_of_their_stage(tmp_path):
    data = dataclasses.replace(toy.DATA, vocabulary=ByteVocabulary(extra_ids=5))
    evaluation = dataclasses.replace(toy.TARGET_EVALUATION, data=data)
    recipe = toy.promot(tmp_path / "run", model={"final_evaluations": (evaluation,)})
    message = "The evaluation on 'toy' of stage 'model' has another vocabulary than Stage.data"
    with pytest.raises(UserError, match=message):
        runner.run(recipe)
    assert not (tmp_path / "run").exists()


def test_a_prompt_longer_than_the_positions(tmp_path):
    config = BartConfig(
        vocab_size=264, emb_dim=8, num_heads=2, mlp_dim=8, num_positions=16,
        num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    fits = toy.promot(tmp_path / "run", *[{"model": Model(config, (Prompt(length=4),))}] * 2)
    claiming.claim(fits)
    long = toy.promot(tmp_path / "long", *[{"model": Model(config, (Prompt(length=5),))}] * 2)
    with pytest.raises(UserError, match=r"soft prompts included, of 17 .*num_positions=16"):
        claiming.claim(long)
    assert not (tmp_path / "long").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file cannot be written: File exists"):
        runner.run(toy.promot(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        runner.run(toy.promot(tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "mine"
