"""(IA)³ on every family; tests/models/test_methods.py holds what all methods have in common."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from checks import logits_of
from tiny_families import CONFIGS, PAD, START, batch_of, model_of, params_of

from robust_ft.checkpoints_io import families as families_io
from robust_ft.checkpoints_io import hf
from robust_ft.checkpoints_io.names import expand
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.errors import UserError
from robust_ft.models.peft import IA3
from robust_ft.trainable import flatten, unflatten

families = pytest.mark.parametrize("family", CONFIGS)
ENCODER_DECODERS = ("t5", "bart")


def owned(model):
    return {path: leaf for path, leaf in flatten(model.shapes()).items() if model.peft_owns(path)}


@families
def test_places_and_shapes(family):
    model = model_of(family, IA3())
    attentions = {f"decoder/layers_{i}/self_attention" for i in range(2)}
    mlps = {f"decoder/layers_{i}/mlp" for i in range(2)}
    if family in ENCODER_DECODERS:
        attentions |= {f"decoder/layers_{i}/encoder_decoder_attention" for i in range(2)}
        attentions |= {"encoder/layers_0/attention"}
        mlps |= {"encoder/layers_0/mlp"}
    projections = ["qkv"] if family == "gpt2" else ["key", "value"]
    shapes = flatten(model.shapes())
    expected = {
        f"{attention}/{projection}/ia3": shapes[f"{attention}/{projection}/kernel"].shape[1:]
        for attention in attentions
        for projection in projections
    } | {f"{mlp}/wo/ia3": shapes[f"{mlp}/wo/kernel"].shape[:1] for mlp in mlps}
    found = owned(model)
    assert {path: leaf.shape for path, leaf in found.items()} == expected
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype("float32")}
    axes = flatten(model.logical_axes())
    for path in found:
        assert axes[path] == (("mlp",) if path.endswith("/wo/ia3") else ("joined_kv",))


@families
def test_it_is_the_model_with_rescaled_kernels(family):
    """Columns of the kernels whose outputs, rows of those whose inputs are rescaled."""
    model = model_of(family, IA3())
    params, batch = params_of(model), batch_of()
    flat = flatten(params)
    for path in owned(model):
        layer, vector = path.removesuffix("/ia3"), flat[path]
        if path.endswith("/wo/ia3"):
            flat[f"{layer}/kernel"] = flat[f"{layer}/kernel"] * vector[:, None]
        else:
            for leaf in (f"{layer}/kernel", f"{layer}/bias"):
                if leaf in flat:
                    flat[leaf] = flat[leaf] * (vector if leaf.endswith("bias") else vector[None])
    plain = model.without("ia3")
    expected = logits_of(plain, unflatten(flat), batch)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)
    assert np.abs(logits_of(plain, params, batch) - expected).max() > 0.1


def test_a_layer_whose_input_is_rescaled_keeps_its_output():
    model = model_of("t5", IA3(outputs=".*", inputs=".*(wo|out)"))
    model.check()
    shapes = flatten(model.shapes())
    for path, leaf in owned(model).items():
        rows, columns = shapes[path.replace("/ia3", "/kernel")].shape
        assert leaf.shape == ((rows,) if path.endswith(("wo/ia3", "out/ia3")) else (columns,))


# --- Against PEFT

# PEFT's own choice for T5 and GPT-2; for BART it would rescale queries instead of keys.
MODULES = {
    "t5": {},
    "bart": {"target_modules": ["k_proj", "v_proj", "fc2"], "feedforward_modules": ["fc2"]},
    "gpt2": {},
}
# Files of T5 1.0 leave no doubt in transformers 5 whether the head is tied.
T5_1_0 = {"logits_via_embedding": True, "mlp_activations": ("relu",)}


@pytest.mark.parity
@pytest.mark.parametrize("family", MODULES)
def test_logits_are_pefts(family, tmp_path):
    torch = pytest.importorskip("torch")
    reference_peft = pytest.importorskip("peft")
    model = model_of(family, IA3())
    if family == "t5":
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, **T5_1_0))
    params, batch = params_of(model), batch_of()
    # transformers' GPT-2 counts padding between input and target as positions: so there is none.
    batch["encoder_input_tokens"] = np.maximum(batch["encoder_input_tokens"], 3)
    batch["encoder_input_mask"][:] = True
    plain = hugging_face(family, model.config, params, tmp_path)
    before = hugging_face_logits(family, plain, batch)
    task = "SEQ_2_SEQ_LM" if family in ENCODER_DECODERS else "CAUSAL_LM"
    config = reference_peft.IA3Config(task_type=task, **MODULES[family])
    theirs = reference_peft.get_peft_model(plain, config).eval()
    modules = dict(theirs.base_model.model.named_modules())
    names = expand(families_io.get(family).NAMES, model.config)
    copied = 0
    for path in owned(model):
        vector = np.array(flatten(params)[path])
        module = names[path.replace("/ia3", "/kernel")][0].removesuffix(".weight")
        weight = modules[module].ia3_l["default"]
        weight.data = torch.from_numpy(vector).reshape(weight.shape)
        copied += vector.size
    assert copied == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    expected = hugging_face_logits(family, theirs, batch)
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=0, atol=1e-4)
    assert np.abs(before - expected).max() > 0.1


def hugging_face(family, config, params, folder):
    """Returns transformers' model with our parameters."""
    import torch
    import transformers

    torch.set_num_threads(1)
    tensors = {
        path: Tensor.of(np.asarray(leaf), path)
        for path, leaf in flatten(params).items()
        if not path.endswith("/ia3")
    }
    ids = {"pad": PAD, "eos": 1, "start": START}
    hf.write(Checkpoint("the base", family, config, tensors, ids), folder)
    kind = "Seq2SeqLM" if family in ENCODER_DECODERS else "CausalLM"
    return getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()


def hugging_face_logits(family, reference, batch):
    import torch

    x, y = (
        torch.from_numpy(np.asarray(batch[f"{stack}_input_tokens"], np.int64))
        for stack in ("encoder", "decoder")
    )
    with torch.no_grad():
        if family in ENCODER_DECODERS:
            return reference(input_ids=x, decoder_input_ids=y).logits.numpy()
        sequence = torch.cat([x, y], 1)
        mask = torch.ones_like(sequence)
        logits = reference(input_ids=sequence, attention_mask=mask).logits
        return logits[:, -y.shape[1] :].numpy()


# --- Mistakes


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"outputs": "(key"}, r"IA3.outputs='\(key' is no valid regex"),
        ({"inputs": "wo)"}, r"IA3.inputs='wo\)' is no valid regex"),
        ({"name": "a/b"}, "one word"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(UserError, match=named):
        IA3(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"outputs": ".*attention/kye"}, "IA3.outputs=.*Did you mean '.*attention/key'"),
        ({"inputs": ".*mlp/w"}, "IA3.inputs=.*none of the model's 30 dense layers"),
        ({"outputs": ".*mlp/wo"}, "IA3.outputs="),
    ],
)
def test_patterns_that_match_nothing(settings, named):
    with pytest.raises(UserError, match=named):
        model_of("t5", IA3(**settings)).check()
