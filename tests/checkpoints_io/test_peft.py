"""Adapters for PEFT and from PEFT: logits, files in both directions, and mistakes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import edit_json, same_tensors
from safetensors.numpy import load_file, save_file
from tiny_families import CONFIGS, PAD, START, batch_of, model_of, params_of

from robust_ft import command_line
from robust_ft.checkpoints_io import adapters, hf, native, peft, sources
from robust_ft.checkpoints_io.adapters import Adapter
from robust_ft.checkpoints_io.peft_methods import pattern
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.convert import main
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.models.peft import Lora, Prefix, Prompt
from robust_ft.restore import load_params
from robust_ft.trainable import flatten, unflatten

IDS = {"pad": PAD, "eos": 1, "start": START}
CONFIGS = CONFIGS | {
    # Files of T5 1.0 and of Llama leave no doubt in transformers 5 whether the head is tied.
    "t5": dataclasses.replace(
        CONFIGS["t5"], logits_via_embedding=True, mlp_activations=("relu",), num_encoder_layers=2
    ),
    # PEFT takes the encoder's number of layers for the decoder's.
    "bart": dataclasses.replace(CONFIGS["bart"], num_encoder_layers=2),
    # Mistral: every layer has a window.
    "llama": dataclasses.replace(CONFIGS["llama"], sliding_window=6, first_window_layer=0),
}
TASKS = {"t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
METHODS = {
    "lora": Lora(rank=3, alpha=5.0),
    "everywhere": Lora(rank=2, alpha=3.5, target=r".*layers_\d+/.*"),
    "one_layer": Lora(rank=2, target=r"decoder/layers_1/mlp/wo"),
    "prompt": Prompt(length=4),
    "prefix": Prefix(length=3, counted=True, encoder=False, cross=False),
}
cases = pytest.mark.parametrize(("family", "method"), [(f, m) for f in CONFIGS for m in METHODS])
families = pytest.mark.parametrize("family", CONFIGS)

logits_of = jax.jit(lambda model, params, batch: model.logits(params, batch), static_argnums=0)


def model_with(family, *methods):
    return Model(CONFIGS[family], methods, pad_id=PAD, start_id=START)


def tensors_of(params):
    return {path: Tensor.of(np.asarray(leaf), path) for path, leaf in flatten(params).items()}


def parts(family, method, seed=0):
    """Returns (model, parameters, the base's checkpoint, the adapter) of random numbers."""
    model = model_with(family, method)
    params = params_of(model, seed)
    tensors = tensors_of(params)
    owned = {path: tensor for path, tensor in tensors.items() if model.peft_owns(path)}
    rest = {path: tensor for path, tensor in tensors.items() if path not in owned}
    base = Checkpoint("the base", family, model.config, rest, IDS)
    return model, params, base, Adapter("the adapter", (method,), owned)


def folder_of(tmp_path, name, write, *arguments):
    folder = tmp_path / name
    folder.mkdir()
    write(*arguments, folder)
    return folder


def with_params(family, adapter, base):
    """Returns the model and the parameters of a base and an adapter."""
    loaded = {**base.load(), **{path: t.load() for path, t in adapter.tensors.items()}}
    params = unflatten({path: jnp.asarray(value) for path, value in loaded.items()})
    return model_with(family, *adapter.methods), params


# --- Against PEFT


def batch_without_padding():
    """PEFT counts padding between input and target as positions; targets may be padded."""
    batch = batch_of()
    tokens = np.maximum(batch["encoder_input_tokens"], 3)
    return batch | {
        "encoder_input_tokens": tokens,
        "encoder_input_mask": np.ones(tokens.shape, bool),
    }


def reference(family, base, tmp_path):
    """Returns transformers' model of a checkpoint."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.set_num_threads(1)
    folder = folder_of(tmp_path, "base", hf.write, base)
    kind = "AutoModelForSeq2SeqLM" if TASKS[family] == "SEQ_2_SEQ_LM" else "AutoModelForCausalLM"
    return getattr(transformers, kind).from_pretrained(folder).eval()


def reference_logits(family, model, batch):
    import torch

    x, y = (
        torch.from_numpy(np.asarray(batch[f"{stack}_input_tokens"], np.int64))
        for stack in ("encoder", "decoder")
    )
    with torch.no_grad():
        if TASKS[family] == "SEQ_2_SEQ_LM":
            inputs = {"input_ids": x, "attention_mask": (x != PAD).long(), "decoder_input_ids": y}
            return model(**inputs).logits.numpy()
        sequence = torch.cat([x, y], 1)
        mask = torch.ones_like(sequence)
        return model(input_ids=sequence, attention_mask=mask).logits[:, -y.shape[1] :].numpy()


def batch_for(family):
    return batch_of() if TASKS[family] == "SEQ_2_SEQ_LM" else batch_without_padding()


@pytest.mark.parity
@cases
def test_what_is_written_computes_the_same_in_peft(family, method, tmp_path):
    method = METHODS[method]
    model, params, base, adapter = parts(family, method)
    plain = reference(family, base, tmp_path)
    import peft as reference_peft

    folder = folder_of(tmp_path, "adapter", peft.write, adapter, base)
    batch = batch_for(family)
    before = reference_logits(family, plain, batch)
    loaded = reference_peft.PeftModel.from_pretrained(plain, folder).eval()
    expected = reference_logits(family, loaded, batch)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)
    assert np.abs(before - expected).max() > 0.01


def peft_configs(family):
    import peft as reference_peft

    task = {"task_type": TASKS[family]}
    return {
        "lora": lambda: reference_peft.LoraConfig(r=3, lora_alpha=7, **task),
        "rslora": lambda: reference_peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, **task),
        "all-linear": lambda: reference_peft.LoraConfig(r=2, target_modules="all-linear", **task),
        "prompt": lambda: reference_peft.PromptTuningConfig(num_virtual_tokens=4, **task),
        "prefix": lambda: reference_peft.PrefixTuningConfig(
            num_virtual_tokens=4, token_dim=12 if family == "t5" else None, **task
        ),
    }


@pytest.mark.parity
@pytest.mark.parametrize("method", ["lora", "rslora", "all-linear", "prompt", "prefix"])
@families
def test_what_peft_wrote_computes_the_same_here(family, method, tmp_path):
    _, _, base, _ = parts(family, METHODS["lora"])
    plain = reference(family, base, tmp_path)
    import peft as reference_peft
    import torch

    torch.manual_seed(0)
    theirs = reference_peft.get_peft_model(plain, peft_configs(family)[method]()).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    folder = tmp_path / "adapter"
    theirs.save_pretrained(folder)
    adapter = peft.read(str(folder))
    adapters.check(adapter, base)
    model, params = with_params(family, adapter, base)
    batch = batch_for(family)
    expected = reference_logits(family, theirs, batch)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)

    back = folder_of(tmp_path, "back", peft.write, adapter, base)
    held, written = (load_file(f / peft.WEIGHTS) for f in (folder, back))
    if method == "prompt":  # what PEFT holds and never reads is left out
        held = {name: value[:4] for name, value in held.items()}
    elif method == "prefix" and TASKS[family] == "SEQ_2_SEQ_LM":
        held = written  # layers that shared entries have their own now
    else:
        assert (back / peft.WEIGHTS).read_bytes() == (folder / peft.WEIGHTS).read_bytes()
        if method != "prefix":
            assert json.loads((back / peft.CONFIG).read_text()) == adapter.peft_config
    assert held.keys() == written.keys()
    for name, value in held.items():
        np.testing.assert_array_equal(written[name], value)
    again = peft.read(str(back))
    assert same_tensors(again, adapter) and again.methods == adapter.methods


# --- Files


@cases
def test_there_and_back(family, method, tmp_path):
    _, _, base, adapter = parts(family, METHODS[method])
    ours = folder_of(tmp_path, "ours", adapters.write, adapter)
    again = peft.read(str(ours))
    assert same_tensors(again, adapter) and again.methods == adapter.methods
    theirs = folder_of(tmp_path, "theirs", peft.write, again, base)
    back = peft.read(str(theirs))
    assert same_tensors(back, adapter)
    assert model_with(family, *back.methods).shapes() == model_with(family, *again.methods).shapes()
    found = load_params(str(theirs))
    assert found.keys() == adapter.tensors.keys()
    for path, value in found.items():
        np.testing.assert_array_equal(value, adapter.tensors[path].load())


def test_bfloat16_adapters(tmp_path):
    _, _, base, adapter = parts("gpt2", METHODS["lora"])
    halved = {path: tensor.cast("bfloat16") for path, tensor in adapter.tensors.items()}
    adapter = dataclasses.replace(adapter, tensors=halved)
    back = peft.read(str(folder_of(tmp_path, "theirs", peft.write, adapter, base)))
    assert same_tensors(back, adapter)


def test_target_modules_are_as_short_as_they_can_be(tmp_path):
    def written(family, method, name):
        _, _, base, adapter = parts(family, method)
        folder = folder_of(tmp_path, name, peft.write, adapter, base)
        return json.loads((folder / peft.CONFIG).read_text())["target_modules"]

    assert written("bart", METHODS["lora"], "a") == ["q_proj", "v_proj"]
    assert written("gpt2", METHODS["lora"], "b") == ["c_attn"]
    assert written("gpt2", METHODS["one_layer"], "c") == ["transformer.h.1.mlp.c_proj"]


def test_pattern():
    paths = [f"decoder/layers_{i}/mlp/{name}" for i in (1, 10) for name in ("wi", "wo")]
    assert pattern(paths) == "decoder/layers_(1|10)/(mlp/wi|mlp/wo)"
    assert pattern(["decoder/logits_dense"]) == "decoder/logits_dense"
    assert pattern([*paths[:1], "a/b"]) == "decoder/layers_1/mlp/wi|a/b"


def run(*arguments):
    """Runs the command line and returns its exit status."""
    with pytest.raises(SystemExit) as caught:
        command_line.run(main, [str(argument) for argument in arguments])
    return caught.value.code


def test_the_command_line(tmp_path, capsys):
    method = METHODS["lora"]
    model, params, base, adapter = parts("t5", method)
    base_folder = folder_of(tmp_path, "base", native.write, base)
    theirs = folder_of(tmp_path, "theirs", peft.write, adapter, base)
    ours, back, hugging_face = (tmp_path / name for name in ("ours", "back", "hf"))
    flags = [f"--input={theirs}", f"--base={base_folder}"]
    assert run("--from=peft", *flags, f"--output={ours}") == 0
    assert "parameters (Lora) in" in capsys.readouterr().out
    assert run("--to=peft", f"--input={ours}", f"--base={base_folder}", f"--output={back}") == 0
    for file in (peft.WEIGHTS, peft.CONFIG):
        assert (back / file).read_bytes() == (theirs / file).read_bytes()
    assert run(*flags, "--to=hf", f"--output={hugging_face}") == 0
    merged = unflatten(sources.read(str(hugging_face)).load())
    expected = logits_of(model, params, batch_of())
    plain = model.without("lora")
    np.testing.assert_allclose(logits_of(plain, merged, batch_of()), expected, rtol=0, atol=1e-5)


def test_the_command_line_with_bare_parameters(tmp_path, capsys):
    """As a stage leaves them: LoRA's alpha has to be given."""
    _, _, base, adapter = parts("bart", METHODS["lora"])
    base_folder = folder_of(tmp_path, "base", native.write, base)
    ours = folder_of(tmp_path, "ours", adapters.write, adapter) / adapters.WEIGHTS
    out = tmp_path / "out"
    flags = ["--to=peft", f"--input={ours}", f"--output={out}"]
    assert run(*flags) == 2
    assert "--base=DIR" in capsys.readouterr().err
    assert run(*flags, f"--base={base_folder}") == 2
    assert "--config=alpha=NUMBER" in capsys.readouterr().err
    assert not out.exists()
    assert run(*flags, f"--base={base_folder}", "--config=alpha=5") == 0
    found = peft.read(str(out))
    assert same_tensors(found, adapter) and found.methods[0].scale == METHODS["lora"].scale
    assert run(*flags, "--overwrite", f"--base={base_folder}", "--config=alfa=5") == 2


def test_a_prompt_cannot_be_merged(tmp_path, capsys):
    _, _, base, adapter = parts("t5", METHODS["prompt"])
    base_folder = folder_of(tmp_path, "base", native.write, base)
    ours = folder_of(tmp_path, "ours", adapters.write, adapter)
    out = tmp_path / "out"
    flags = [f"--input={ours}", f"--output={out}", f"--base={base_folder}"]
    assert run(*flags, "--to=hf") == 2
    assert "holds a Prompt, which cannot be merged" in capsys.readouterr().err
    assert not out.exists()


# --- Mistakes


@pytest.fixture
def lora(tmp_path):
    _, _, base, adapter = parts("t5", METHODS["lora"])
    return folder_of(tmp_path, "lora", peft.write, adapter, base)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "LORRA"}, r"'LORRA'.*LORA, .*Did you mean 'LORA'"),
        ({"peft_type": None}, "None.*not known"),
        ({"r": None}, "LORA config.*lacks 'r'"),
        ({"r": 4}, "r=4"),
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"q": 3}}, "rank_pattern"),
        ({"bias": "all"}, "biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ],
)
def test_configs_that_are_not_known(lora, changes, named):
    edit_json(lora / peft.CONFIG, **changes)
    with pytest.raises(UserError, match=named):
        peft.read(str(lora))


def test_tensors_that_do_not_fit(lora):
    tensors = load_file(lora / peft.WEIGHTS)
    name = "base_model.model.decoder.block.1.layer.1.EncDecAttention.q.lora_A.weight"
    value = tensors.pop(name)
    save_file(tensors, lora / peft.WEIGHTS)
    with pytest.raises(UserError, match=f"lacks the tensor '{name}'"):
        peft.read(str(lora))
    strange = name.replace(".q.", ".qq.")
    save_file(tensors | {name: value, strange: value}, lora / peft.WEIGHTS)
    with pytest.raises(UserError, match=rf"no dense layer of any model.*{strange}"):
        peft.read(str(lora))
    (lora / peft.WEIGHTS).unlink()
    with pytest.raises(UserError, match="lacks adapter_model"):
        peft.read(str(lora))


def test_another_base(lora):
    adapter = peft.read(str(lora))
    for changes, named in [
        ({"emb_dim": 18}, r"belongs to another base.*\(16, 3\).*\(18, 3\)"),
        ({"num_decoder_layers": 1}, "tensors have no place"),
    ]:
        config = dataclasses.replace(CONFIGS["t5"], **changes)
        with pytest.raises(UserError, match=named):
            adapters.check(adapter, Checkpoint("another", "t5", config, {}))
    # Modules of another family.
    _, _, base, _ = parts("gpt2", METHODS["lora"])
    with pytest.raises(UserError, match="24 tensors have no place"):
        adapters.check(adapter, base)


def test_prompts_that_do_not_fit(tmp_path):
    _, _, base, adapter = parts("bart", METHODS["prompt"])
    folder = folder_of(tmp_path, "prompt", peft.write, adapter, base)
    other = Checkpoint("another", "bart", dataclasses.replace(CONFIGS["bart"], emb_dim=18), {})
    with pytest.raises(UserError, match=r"another base.*\(4, 15\).*\(4, 18\)"):
        adapters.check(peft.read(str(folder)), other)
    edit_json(folder / peft.CONFIG, num_virtual_tokens=5)
    with pytest.raises(UserError, match="num_virtual_tokens=5"):
        peft.read(str(folder))
    edit_json(folder / peft.CONFIG, num_virtual_tokens=4, task_type="SEQ_CLS")
    with pytest.raises(UserError, match="'SEQ_CLS'; known are SEQ_2_SEQ_LM"):
        peft.read(str(folder))
    save_file({"prompt": np.ones((4, 15), np.float32)}, folder / peft.WEIGHTS)
    with pytest.raises(UserError, match="'prompt_embeddings'; it holds prompt"):
        peft.read(str(folder))


def test_prefixes_that_do_not_fit(tmp_path):
    _, _, base, adapter = parts("bart", METHODS["prefix"])
    folder = folder_of(tmp_path, "prefix", peft.write, adapter, base)
    edit_json(folder / peft.CONFIG, num_layers=3)
    with pytest.raises(UserError, match=r"\(3, 120\), its config says.*num_layers=3"):
        peft.read(str(folder))
    for method in (Prefix(length=3), Prefix(length=3, counted=True)):
        _, _, base, adapter = parts("bart", method)
        with pytest.raises(UserError, match="PEFT has no place for"):
            peft.write(adapter, base, tmp_path)


def test_parameters_of_a_prefix():
    _, _, _, adapter = parts("t5", METHODS["prefix"])
    found = peft.of_weights("a stage", adapter.tensors, {"counted": True})
    assert found.methods == adapter.methods


def test_parameters_of_no_adapter():
    tensors = tensors_of(params_of(model_of("gpt2")))
    with pytest.raises(UserError, match="not those of one LoRA, prefix"):
        peft.of_weights("a model", tensors)


def test_no_adapter(tmp_path):
    with pytest.raises(UserError, match=r"neither adapter_config\.json"):
        peft.read(str(tmp_path))
    (tmp_path / adapters.SETTINGS).write_text("{}")
    (tmp_path / adapters.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match="header is cut off"):
        peft.read(str(tmp_path))
    save_file({"a": np.ones(1)}, tmp_path / adapters.WEIGHTS)
    with pytest.raises(UserError, match="lacks version, methods or settings"):
        peft.read(str(tmp_path))
    settings = {"version": 1, "method": "Lorra", "settings": {}}
    (tmp_path / adapters.SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"'Lorra'; known are .*Did you mean 'Lora'"):
        peft.read(str(tmp_path))
