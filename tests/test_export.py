"""What a lightweight stage leaves behind, what it is laid over, and what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from random_checkpoints import edit_json
from safetensors.numpy import load_file
from tiny_models import example_batch, random_params

import robust_ft
from robust_ft import command_line, export, runner, stage_start
from robust_ft.checkpoints_io import adapters, native, peft, sources
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.checkpoints_io.tokens import Tokens
from robust_ft.convert import main
from robust_ft.errors import UserError
from robust_ft.fingerprint import fingerprint
from robust_ft.models.peft import IA3, Adapter, Lora, Prefix, Prompt
from robust_ft.outcome import Outcome
from robust_ft.partitioning import Partitioner
from robust_ft.recipe import Recipe
from robust_ft.restore import load_for_model
from robust_ft.trainable import flatten, trainable_paths, unflatten
from robust_ft.vocabulary import ByteVocabulary

LORA = Lora(rank=2, alpha=6.0, dropout_rate=0.1)
# The start of a prompt, and how it trained, are of no use any more.
STARTED = Prompt(
    length=3, initialization="text", text="True", vocabulary=ByteVocabulary(extra_ids=0)
)
NORMS = ".*_norm/scale"


def with_methods(*methods):
    return dataclasses.replace(toy.PLAIN, peft=methods)


def base_params(seed=0):
    return flatten(random_params(toy.PLAIN, seed))


def write_base(folder, seed=0, dtype="float32"):
    """Writes a model directory and returns its path."""
    folder.mkdir()
    tensors = {
        path: Tensor.of(np.asarray(leaf), path).cast(dtype)
        for path, leaf in base_params(seed).items()
    }
    vocabulary = {"kind": "ByteVocabulary", "extra_ids": 0}
    ids = {"pad": 0, "eos": 1, "start": 0}
    native.write(Checkpoint("toy", "t5", toy.CONFIG, tensors, ids, vocabulary), folder)
    return str(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two models, one of which is there twice."""
    folder = tmp_path_factory.mktemp("bases")
    return {
        "base": write_base(folder / "base"),
        "bfloat16": write_base(folder / "bfloat16", dtype="bfloat16"),
        "other": write_base(folder / "other", seed=1),
    }


def tokens_of(model):
    return Tokens.of(model, ByteVocabulary(extra_ids=0))


def train(folder, model, patterns, restored_from="the base", seed=5):
    """Changes what matches and exports it, as a stage does; returns all parameters."""
    flat = flatten(random_params(model, seed)) | base_params()
    before = unflatten(flat)
    trained = trainable_paths(before, patterns)
    after = unflatten({p: leaf + 0.25 * (p in trained) for p, leaf in flat.items()})
    base = export.base_of(model, before, trained, restored_from)
    export.write(folder, model, after, trained, base, tokens_of(model), Partitioner())
    return after


logits_of = jax.jit(lambda model, params, batch: model.logits(params, batch), static_argnums=0)


def logits(model, params):
    return np.asarray(logits_of(model, params, example_batch()))


METHODS = {
    "prompt": (STARTED,),
    "prefix": (Prefix(length=2, mid_dim=5),),
    "lora": (LORA,),
    "adapter": (Adapter(size=3),),
    "ia3": (IA3(),),
    "prompt and lora": (STARTED, LORA),
    "two prompts": (Prompt(length=2), Prompt(name="infix", length=3, position="infix")),
}


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
def test_an_export_and_its_base_are_the_model(bases, tmp_path, methods):
    model = with_methods(*methods)
    names = "|".join(method.name for method in methods)
    params = train(tmp_path / "export", model, [rf".*\b({names})(_mlp|_.*attention)?(/.*)?"])
    assert not list(tmp_path.glob(".*"))
    adapter = peft.read(str(tmp_path / "export"))
    assert adapter.methods == tuple(method.exported() for method in methods)
    assert not adapter.changed and adapter.tensors
    assert adapter.base.restored_from == "the base"
    assert adapter.base.fingerprint == fingerprint(base_params().items())
    expected = logits(model, params)
    for base in ("base", "bfloat16") if methods == METHODS["lora"] else ("base",):
        predictor = robust_ft.load(bases[base], weights=str(tmp_path / "export"), dtype="float32")
        assert predictor.model.peft == adapter.methods
        # bfloat16 has other values, and yet is the same base.
        atol = 1e-5 if base == "base" else 0.5
        found = logits(predictor.model, predictor.params)
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    plain = robust_ft.load(bases["base"])
    assert np.abs(logits(plain.model, plain.params) - expected).max() > 0.01
    with pytest.raises(UserError) as error:
        robust_ft.load(bases["other"], weights=str(tmp_path / "export"))
    assert str(error.value) == (
        f"'{tmp_path}/export' belongs to another base: it was trained on 'the base', and the "
        f"parameters of '{bases['other']}' are not the same."
    )


def test_a_prompt_takes_kilobytes_and_is_an_array_too(tmp_path):
    params = train(tmp_path / "export", with_methods(STARTED), [toy.PROMPT])
    files = {file.name: file.stat().st_size for file in (tmp_path / "export").iterdir()}
    assert files.keys() == {adapters.SETTINGS, adapters.WEIGHTS, "prompt.npy"}
    assert sum(files.values()) < 2500
    held = np.load(tmp_path / "export" / "prompt.npy")
    np.testing.assert_array_equal(held, params["encoder"]["prompt"])
    settings = json.loads((tmp_path / "export" / adapters.SETTINGS).read_text())
    (method,) = settings["methods"]
    assert settings["version"] == 3 and method["method"] == "Prompt"
    assert method["settings"]["length"] == 3 and method["settings"]["position"] == "before"
    assert not method["settings"].keys() & {"text", "vocabulary", "labels", "file", "tasks"}


def test_each_task_has_an_array_of_its_own(bases, tmp_path):
    prompt = Prompt(length=2, tasks=("a_b", "a/b"))
    params = train(tmp_path / "export", with_methods(prompt), [toy.PROMPT])
    names = ("prompt-a_b.npy", "prompt-a%2Fb.npy")
    assert {file.name for file in (tmp_path / "export").glob("*.npy")} == set(names)
    for name, value in zip(names, params["encoder"]["prompt"], strict=True):
        np.testing.assert_array_equal(np.load(tmp_path / "export" / name), value)
    predictor = robust_ft.load(bases["base"], weights=str(tmp_path / "export"))
    assert predictor.model.tasks == prompt.tasks


# --- Parameters of the base that trained


def test_changed_parameters_of_the_base(bases, tmp_path):
    params = train(tmp_path / "export", toy.PLAIN, [NORMS])
    adapter = peft.read(str(tmp_path / "export"))
    assert adapter.methods == () and set(adapter.changed) == set(adapter.tensors)
    assert all(path.endswith("_norm/scale") for path in adapter.changed)
    # The base is what was there before.
    assert adapter.base.fingerprint == fingerprint(base_params().items())
    predictor = robust_ft.load(bases["base"], weights=str(tmp_path / "export"))
    toy.assert_same(toy.flat(predictor.params), toy.flat(params))


def test_frozen_methods_are_needed_too(tmp_path):
    train(tmp_path / "export", with_methods(STARTED, LORA), [NORMS])
    adapter = peft.read(str(tmp_path / "export"))
    assert [method.name for method in adapter.methods] == ["prompt", "lora"]
    owned = set(adapter.tensors) - set(adapter.changed)
    assert toy.PROMPT in owned and any(path.endswith("lora/a") for path in owned)


@pytest.mark.parametrize("patterns", [[".*"], ["(?!encoder/prompt$).*"]])
def test_no_export_where_the_whole_base_trains(patterns):
    model = with_methods(STARTED)
    params = random_params(model)
    assert export.base_of(model, params, trainable_paths(params, patterns), "x") is None


# --- Stages of recipes


def test_stages_leave_exports_that_recipes_start_from(bases, tmp_path):
    quiet = {"evaluations": (), "final_evaluations": (), "steps": 1, "microbatches": 1}
    second = with_methods(Prompt("second", length=2))
    stages = (
        toy.prompt_stage(restore=bases["bfloat16"], **quiet),
        toy.stage("norms", restore="stage:prompt", trainable=[NORMS], **quiet),
        toy.stage("late", restore="stage:norms", model=second, trainable=[".*/second"], **quiet),
    )
    recipe = Recipe("toy", str(tmp_path), stages)
    runner.run(recipe)
    found = {stage.name: f"{tmp_path}/{stage.name}/export" for stage in stages}
    made = {name: peft.read(folder) for name, folder in found.items()}
    # The prompt stage changes nothing of the base, the stage of norms does.
    assert {name: adapter.base.restored_from for name, adapter in made.items()} == {
        "prompt": bases["bfloat16"],
        "norms": bases["bfloat16"],
        "late": f"{tmp_path}/norms",
    }
    assert made["prompt"].base == made["norms"].base != made["late"].base
    assert toy.PROMPT in made["norms"].tensors and toy.PROMPT not in made["late"].tensors

    ended = toy.flat(stage_start.finished(recipe, "norms"))
    toy.assert_same(load_for_model(toy.MODEL, f"{bases['bfloat16']},{found['norms']}"), ended)
    ended = toy.flat(stage_start.finished(recipe, "late"))
    both = with_methods(*toy.MODEL.peft, *second.peft)
    chain = f"{bases['bfloat16']}, {found['norms']}, {found['late']}"
    again = load_for_model(both, chain)
    assert stage_start.origin(recipe, dataclasses.replace(stages[2], restore=chain)) == (
        f"{bases['bfloat16']},{found['norms']}"
    )
    again.pop(toy.PROMPT)
    toy.assert_same(again, ended)
    loaded = robust_ft.load(bases["base"], weights=f"{found['norms']},{found['late']}")
    assert [method.name for method in loaded.model.peft] == ["prompt", "second"]
    for weights in (found["late"], f"{found['late']},{found['norms']}"):
        with pytest.raises(
            UserError, match=f"late/export' belongs .* trained on '{tmp_path}/norms'"
        ):
            robust_ft.load(bases["base"], weights=weights)


def test_a_stage_that_died_before_its_end_exports_the_same(bases, tmp_path, monkeypatch):
    """Its base is what the stage started from, not what its checkpoint holds."""
    quiet = {"evaluations": (), "final_evaluations": (), "steps": 2, "microbatches": 1}
    stage = toy.stage(restore=bases["base"], model=toy.PLAIN, trainable=[NORMS], **quiet)
    recipe = Recipe("toy", str(tmp_path / "run"), (stage,))

    def dies(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Outcome, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            runner.run(recipe)
    folder = tmp_path / "run" / "model" / "export"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    runner.run(recipe)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert peft.read(str(folder)).base.fingerprint == fingerprint(base_params().items())


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (toy.PLAIN, "holds a Lora named 'lora', which the model does not have; its methods are no"),
        (with_methods(Lora(rank=2)), r"was trained with Lora.alpha=6.0, the model has 8.0"),
        (with_methods(IA3(name="lora")), "a Lora named 'lora', which is a IA3 in the model"),
        (
            with_methods(Lora(rank=3, alpha=6.0)),
            "was trained with Lora.rank=2, the model has 3",
        ),
        (with_methods(Lora(rank=2, alpha=6.0, target=".*query")), "6 have no place in it"),
    ],
)
def test_a_recipe_with_other_methods(bases, tmp_path, model, sentence):
    train(tmp_path / "export", with_methods(LORA), [".*lora.*"])
    with pytest.raises(UserError, match=sentence):
        load_for_model(model, f"{bases['base']},{tmp_path}/export")


def test_settings_that_only_training_reads_may_differ(bases, tmp_path):
    train(tmp_path / "export", with_methods(STARTED, LORA), [".*lora.*|.*prompt"])
    same = with_methods(
        Prompt(length=3, initialization="random_uniform"),
        Lora(rank=2, alpha=6.0, target=r".*attention/(value|query)"),
    )
    assert (
        load_for_model(same, f"{bases['base']},{tmp_path}/export").keys()
        == flatten(same.shapes()).keys()
    )


def test_a_plain_prefix_is_no_reparameterized_one(bases, tmp_path):
    model = with_methods(Prefix(length=2, mid_dim=5))
    train(tmp_path / "export", model, [".*prefix.*"])
    with pytest.raises(UserError, match=r"6 have no place in it \(decoder/layers_0.*/prefix/key"):
        load_for_model(model, f"{bases['base']},{tmp_path}/export")
    plain = with_methods(Prefix(length=2))
    found = load_for_model(plain, f"{bases['base']},{tmp_path}/export")
    assert found.keys() == flatten(plain.shapes()).keys()


# --- Conversions


def run(*arguments):
    """Runs `robust_ft.convert` and returns its exit status."""
    with pytest.raises(SystemExit) as caught:
        command_line.run(main, [str(argument) for argument in arguments])
    return caught.value.code


@pytest.mark.parametrize(
    ("methods", "patterns"),
    [
        ((LORA,), [".*lora.*"]),
        ((IA3(),), [".*ia3"]),
        # What goes into a layer is rescaled for LoRA too, what comes out as they follow each other.
        ((IA3(outputs=".*/wi_0", inputs=".*/wo|.*/out"), Lora(target=".*")), [".*(ia3|lora).*"]),
        ((Lora(target=".*"), IA3(outputs=".*/wi_0|.*/query")), [".*(ia3|lora).*", NORMS]),
        ((), [NORMS, "decoder/.*"]),
    ],
)
def test_what_can_be_merged_is_merged(bases, tmp_path, capsys, methods, patterns):
    model = with_methods(*methods)
    params = train(tmp_path / "export", model, patterns)
    flags = [f"--input={tmp_path}/export", f"--base={bases['base']}"]
    to = "hf" if methods else "robust_ft"
    assert run(*flags, f"--to={to}", f"--output={tmp_path}/whole") == 0
    kinds = peft.read(str(tmp_path / "export")).kinds
    assert f"parameters ({kinds}) in" in capsys.readouterr().out
    whole = unflatten(sources.read(str(tmp_path / "whole")).load())
    merged = logits(toy.PLAIN, jax.tree.map(jnp.asarray, whole))
    np.testing.assert_allclose(merged, logits(model, params), rtol=0, atol=2e-5)


def test_conversions_refuse_what_does_not_fit(bases, tmp_path, capsys):
    train(tmp_path / "export", with_methods(STARTED, LORA), [".*lora.*|.*prompt"])
    flags = [f"--input={tmp_path}/export", f"--output={tmp_path}/out"]
    assert run(*flags, "--to=hf") == 2
    assert "--to=hf needs --base=DIR" in capsys.readouterr().err
    assert run(*flags, f"--base={bases['base']}", "--to=hf") == 2
    assert "holds a Prompt, which cannot be merged" in capsys.readouterr().err
    assert run(*flags, f"--base={bases['base']}", "--to=peft") == 2
    assert (
        "holds Prompt and Lora, but a directory for PEFT holds exactly" in capsys.readouterr().err
    )
    for to in ("hf", "peft", "robust_ft"):
        assert run(*flags, f"--base={bases['other']}", f"--to={to}") == 2
        error = capsys.readouterr().err
        assert f"it was trained on 'the base', and the parameters of '{bases['other']}'" in error
    assert not (tmp_path / "out").exists()
    assert run(*flags, f"--base={bases['base']}") == 0
    again, before = (peft.read(str(tmp_path / name)) for name in ("out", "export"))
    assert again.methods == before.methods and again.base == before.base


def test_a_stages_directory_stands_for_its_export(bases, tmp_path):
    """LoRA's alpha comes along, and need not be said."""
    train(tmp_path / "stage" / "export", with_methods(LORA), [".*lora.*"])
    Outcome(1, None, ("x",)).write(tmp_path / "stage")
    flags = [f"--input={tmp_path}/stage", f"--base={bases['base']}", "--to=peft"]
    assert run(*flags, f"--output={tmp_path}/peft") == 0
    assert json.loads((tmp_path / "peft" / peft.CONFIG).read_text())["lora_alpha"] == 6
    assert run(f"--input={tmp_path}/stage", f"--output={tmp_path}/all.safetensors") == 0
    written = load_file(tmp_path / "all.safetensors")
    assert written.keys() == peft.read(f"{tmp_path}/stage/export").tensors.keys()


@pytest.mark.parametrize(
    "prompt", [Prompt(length=2, position="infix"), Prompt(length=2, tasks=("a", "b"))]
)
def test_prompts_that_peft_does_not_know(bases, tmp_path, capsys, prompt):
    train(tmp_path / "export", with_methods(prompt), [toy.PROMPT])
    flags = [f"--input={tmp_path}/export", f"--base={bases['base']}", "--to=peft"]
    assert run(*flags, f"--output={tmp_path}/out") == 2
    assert "is a prompt that PEFT has no place for" in capsys.readouterr().err


# --- Files


def test_version_1_had_one_method_and_no_base(bases, tmp_path):
    train(tmp_path / "export", with_methods(LORA), [".*lora.*"])
    file = tmp_path / "export" / adapters.SETTINGS
    (entry,) = json.loads(file.read_text())["methods"]
    file.write_text(json.dumps({"version": 1, **entry, "peft": {}}))
    adapter = peft.read(str(tmp_path / "export"))
    assert adapter.methods == (LORA.exported(),) and adapter.base is None
    predictor = robust_ft.load(bases["other"], weights=str(tmp_path / "export"))
    assert predictor.model.peft == adapter.methods


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"version": 4}, "was written by a newer robust_ft"),
        ({"version": "two"}, "lacks version, methods or settings"),
        ({"methods": None}, "lacks version, methods or settings"),
        ({"methods": [{"method": "Lora"}]}, "lacks version, methods or settings"),
        ({"base": {"fingerprnt": ""}}, "lacks version, methods or settings"),
        ({"methods": [{"method": "Lora", "settings": {"rnak": 1}}]}, "'rnak'.*mean 'rank'"),
    ],
)
def test_settings_that_are_broken(tmp_path, changes, sentence):
    train(tmp_path / "export", with_methods(LORA), [".*lora.*"])
    edit_json(tmp_path / "export" / adapters.SETTINGS, **changes)
    with pytest.raises(UserError, match=sentence):
        peft.read(str(tmp_path / "export"))


def test_an_export_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    train(folder, with_methods(LORA), [".*lora.*"])
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(UserError, match="cannot be written: No space left"):
            train(folder, with_methods(STARTED), [toy.PROMPT])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    train(folder, with_methods(STARTED), [toy.PROMPT])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


SHARDED = """
import pathlib
import sys
import jax
import test_export
from robust_ft import export
from robust_ft.models.peft import Lora, Prefix
from robust_ft.partitioning import Partitioner
from robust_ft.trainable import trainable_paths

model = test_export.with_methods(Prefix(length=2, mid_dim=5), test_export.LORA)
partitioner = Partitioner(2)
assert (partitioner.mesh.shape["data"], partitioner.mesh.shape["model"]) == (4, 2)
params = test_export.random_params(model)
params = jax.device_put(params, partitioner.shardings(model.logical_axes()))
trained = trainable_paths(params, [".*(prefix|lora).*", "decoder/.*"])
with partitioner.activate():
    base = export.base_of(model, params, trained, "the base")
    tokens = test_export.tokens_of(model)
    export.write(pathlib.Path(sys.argv[1]), model, params, trained, base, tokens, partitioner)
"""


def test_sharded_parameters_are_exported_whole(tmp_path):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "sharded")]
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    model = with_methods(Prefix(length=2, mid_dim=5), LORA)
    params = random_params(model)
    trained = trainable_paths(params, [".*(prefix|lora).*", "decoder/.*"])
    base = export.base_of(model, params, trained, "the base")
    export.write(tmp_path / "one", model, params, trained, base, tokens_of(model), Partitioner())
    one, sharded = (peft.read(str(tmp_path / name)) for name in ("one", "sharded"))
    assert one.base == sharded.base and one.methods == sharded.methods
    assert one.tensors.keys() == sharded.tensors.keys()
    for path, tensor in one.tensors.items():
        np.testing.assert_allclose(sharded.tensors[path].load(), tensor.load(), atol=1e-6)
