"""Which of the tied tensors a directory holds, and what its flags say, against `transformers`."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_checkpoints import edit_json
from tiny_models import random_batch

from robust_ft.checkpoints_io import hf, native, t5x
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.errors import UserError
from robust_ft.trainable import unflatten

SHARED, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
FLAGS = (
    {},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": True, "scale_decoder_outputs": False},
    {"tie_word_embeddings": False, "scale_decoder_outputs": True},
)
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
DECODER_ONLY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
BART = {
    "vocab_size": 40,
    "d_model": 16,
    "max_position_embeddings": 40,
    **{f"{stack}_layers": 1 for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": 2 for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": 12 for stack in ("encoder", "decoder")},
}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 48}


@functools.cache
def saved(kind):
    """Returns a random model's config.json and tensors, as NumPy arrays, without the head."""
    import tempfile
    from pathlib import Path

    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, sizes, head = {
        "t5": ("T5", T5, "ForConditionalGeneration"),
        "mt5": ("MT5", T5, "ForConditionalGeneration"),
        "bart": ("Bart", BART, "ForConditionalGeneration"),
        "gpt2": ("GPT2", GPT2, "LMHeadModel"),
        "llama": ("Llama", DECODER_ONLY, "ForCausalLM"),
        "qwen2": ("Qwen2", DECODER_ONLY, "ForCausalLM"),
    }[kind]
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}{head}")(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        settings = json.loads((Path(folder) / "config.json").read_text())
        tensors = {n: t.load() for n, t in hf.read_weights(Path(folder)).items() if n != HEAD}
    for flag in ("tie_word_embeddings", "scale_decoder_outputs"):
        settings.pop(flag, None)
    return settings, tensors


def write(folder, kind, flags, tensors, prefix=""):
    settings, others = saved(kind)
    embedding = {"t5": SHARED, "mt5": SHARED, "bart": "model.shared.weight"}.get(kind)
    embedding = embedding or {"gpt2": "transformer.wte.weight"}.get(
        kind, "model.embed_tokens.weight"
    )
    whole = {name: array for name, array in others.items() if name != embedding} | tensors
    named = {n.removeprefix(prefix): Tensor.of(array, n) for n, array in whole.items()}
    hf.safetensors_files.write(folder / "model.safetensors", named, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings | flags))


def embeddings(kind):
    _, tensors = saved(kind)
    table = next(array for array in tensors.values() if array.shape == (40, 16))
    other = np.random.default_rng(1).normal(size=table.shape).astype(np.float32)
    return table, other


def their_logits(folder, batch):
    """Returns the logits of `transformers`, None where it draws parameters at random."""
    import torch
    import transformers

    settings = json.loads((folder / "config.json").read_text())
    one = settings["model_type"] in ("gpt2", "llama", "qwen2")
    kind = transformers.AutoModelForCausalLM if one else transformers.AutoModelForSeq2SeqLM
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    missing = set(info["missing_keys"])
    if settings.get("tie_word_embeddings") is False:
        missing -= {"model.shared.weight"}  # which an untied BART does not use
    if missing:
        return None
    inputs, targets = (
        torch.from_numpy(batch[f"{side}_input_tokens"]).long() for side in ("encoder", "decoder")
    )
    with torch.no_grad():
        if one:
            logits = model.eval()(torch.cat([inputs, targets], 1)).logits[:, inputs.shape[1] :]
        else:
            # A mask of its own: theirs would take token 0 for padding.
            mask = torch.ones_like(inputs)
            logits = model.eval()(
                input_ids=inputs, attention_mask=mask, decoder_input_ids=targets
            ).logits
    return logits.numpy()


def our_logits(folder, batch):
    found = hf.read(str(folder), vocabulary=False)
    params = jax.tree.map(jnp.asarray, unflatten(found.load()))
    return np.asarray(native.model(found).logits(params, batch))


def check(folder, batch, refusals):
    """Compares logits; only what `transformers` draws may be refused, or `refusals`."""
    expected = their_logits(folder, batch)
    try:
        found = our_logits(folder, batch)
    except UserError as error:
        assert expected is None or refusals, str(error)
        return False
    assert expected is not None
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # And what is written has the same logits, its flag being true to its tensors.
    back = folder / "back"
    back.mkdir()
    hf.write(hf.read(str(folder), vocabulary=False), back)
    np.testing.assert_allclose(their_logits(back, batch), expected, rtol=0, atol=1e-5)
    tensors = hf.read_weights(back)
    flag = json.loads((back / "config.json").read_text()).get("tie_word_embeddings", None)
    others = [t for n, t in tensors.items() if t.shape == (40, 16) and n != HEAD]
    if HEAD in tensors and others and not tensors[HEAD].equals(others[0]):
        assert flag is False or (flag is None and folder.name.startswith(("llama", "qwen")))
    return True


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "flags"), [*(("t5", flags) for flags in FLAGS), *(("mt5", f) for f in FLAGS[:3])]
)
def test_t5s_tensors_in_all_combinations(tmp_path, kind, flags):
    table, other = embeddings(kind)
    batch = random_batch(0, [9, 3], [5, 8])
    batch = {name: batch[name] for name in ("encoder_input_tokens", "decoder_input_tokens")}
    read = 0
    combinations = itertools.product((False, True), (False, True), (False, True), (None, 0, 1))
    for i, (shared, encoder, decoder, head) in enumerate(combinations):
        present = dict(zip((SHARED, *COPIES), (shared, encoder, decoder), strict=True))
        tensors = {name: table for name, there in present.items() if there}
        if head is not None:
            tensors[HEAD] = (table, other)[head]
        (folder := tmp_path / str(i)).mkdir()
        write(folder, kind, flags, tensors)
        # A tensor that the flags say is not tied, and that is missing, has been lost.
        untied = flags.get("tie_word_embeddings") is False or (kind == "t5" and not flags)
        lost = head is None or not (shared or encoder or decoder)
        read += check(folder, batch, untied and lost)
    assert read >= 14


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "bart"])
def test_tensors_of_other_families_in_all_combinations(tmp_path, kind):
    table, other = embeddings(kind)
    batch = random_batch(0, [9, 3], [5, 8])
    batch = {name: batch[name] for name in ("encoder_input_tokens", "decoder_input_tokens")}
    prefix = "transformer." if kind == "gpt2" else "model."
    names = {"gpt2": ["transformer.wte.weight"]}.get(kind, ["model.embed_tokens.weight"])
    if kind == "bart":
        copies = [f"model.{copy}" for copy in COPIES]
        names = ["model.shared.weight", *copies]
    presences = list(itertools.product((False, True), repeat=len(names)))
    read = 0
    everything = itertools.product((None, True, False), presences, (None, 0, 1), ("", prefix))
    for i, (flag, presence, head, base) in enumerate(everything):
        if base and (flag is not None or sum(presence) > 1):
            continue  # files of base models: one combination is enough
        tensors = {n: table for n, there in zip(names, presence, strict=True) if there}
        if head is not None:
            tensors[HEAD] = (table, other)[head]
        (folder := tmp_path / f"{kind}{i}").mkdir()
        flags = {} if flag is None else {"tie_word_embeddings": flag}
        write(folder, kind, flags, tensors, base)
        # A BART or GPT-2 has one place for all of them.
        read += check(folder, batch, kind in ("gpt2", "bart") and head == 1)
    assert read >= 10


def t5(folder, head=None, **flags):
    """Writes a T5 of one layer without `transformers`; returns its embedding."""
    from random_checkpoints import random_checkpoint

    checkpoint = random_checkpoint(logits_via_embedding=True)
    hf.write(checkpoint, folder)
    edit_json(folder / "config.json", **{"tie_word_embeddings": None} | flags)
    tensors = {n: Tensor.of(t.load(), n) for n, t in hf.read_weights(folder).items()}
    table = tensors.pop(SHARED)
    tensors[COPIES[1]] = table
    if head is not None:
        tensors[HEAD] = Tensor.of(table.load() * head, HEAD)
    hf.safetensors_files.write(folder / "model.safetensors", tensors)
    return table.load()


def test_an_embedding_that_is_stored_for_the_decoder_only(tmp_path):
    """As in madlad400, with a head of its own."""
    table = t5(tmp_path, 2, tie_word_embeddings=False)
    found = hf.read(str(tmp_path))
    assert not found.config.logits_via_embedding and not found.config.scaled_head
    np.testing.assert_array_equal(found.tensors["token_embedder/embedding"].load(), table)
    (tmp_path / "back").mkdir()
    hf.write(found, tmp_path / "back")
    assert hf.read_weights(tmp_path / "back").keys() == hf.read_weights(tmp_path).keys()


def test_a_head_of_its_own_whose_input_is_scaled(tmp_path):
    """As version 5 computes what has no flag; t5x has no such model."""
    t5(tmp_path, 2)
    found = hf.read(str(tmp_path))
    assert found.config.scaled_head and not found.config.logits_via_embedding
    batch = random_batch(0, [9, 3], [5, 8])
    scaled = our_logits(tmp_path, batch)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    plain = our_logits(tmp_path, batch)
    np.testing.assert_allclose(scaled, plain * found.config.emb_dim**-0.5, rtol=1e-5, atol=1e-6)
    (tmp_path / "back").mkdir()
    hf.write(found, tmp_path / "back")
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (settings["tie_word_embeddings"], settings["scale_decoder_outputs"]) == (False, True)
    assert hf.read(str(tmp_path / "back")).config == found.config
    with pytest.raises(UserError, match=r"scaled_head=True.*t5x scales those of tied heads only"):
        t5x.write(found, tmp_path / "t5x")
