"""robust_ft.load: every kind of directory, what is added to it, and what is wrong with it."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from random_checkpoints import edit_json, random_checkpoint
from safetensors.numpy import save_file
from tiny_models import random_batch
from tiny_vocabularies import write_bart, write_bpe

import robust_ft
from robust_ft.checkpoints_io import adapters, hf, native, t5x
from robust_ft.checkpoints_io.adapters import Adapter
from robust_ft.checkpoints_io.tensors import Tensor
from robust_ft.decoding import Decoder
from robust_ft.errors import UserError
from robust_ft.models.peft import Prompt
from robust_ft.trainable import flatten
from robust_ft.vocabulary import (
    ByteVocabulary,
    encode_inputs,
    encode_targets,
    vocabulary_from_directory,
)

BYTES = ByteVocabulary(extra_ids=0)
VOCAB = {"vocab_size": 264}
KINDS = ["native", "hf", "t5x"]


def checkpoint(**changes):
    return random_checkpoint(num_encoder_layers=1, num_decoder_layers=1, **VOCAB | changes)


def write(kind, folder, **changes):
    """Writes a model over bytes; of the three formats only Hugging Face's says so by itself."""
    folder.mkdir()
    made = checkpoint(**changes)
    if kind == "native":
        settings = {"kind": "ByteVocabulary", "extra_ids": 0}
        native.write(dataclasses.replace(made, vocabulary=settings), folder)
    elif kind == "hf":
        hf.write(made, folder)
        edit_json(folder / "config.json", tokenizer_class="ByT5Tokenizer")
        (folder / "tokenizer_config.json").write_text('{"extra_ids": 5}')
    else:
        t5x.write(made, folder)
        (folder.parent / "config.gin").write_text("RelativePositionBiases.max_distance = 20")
    return folder, made


def load(kind, folder, **options):
    given = {"vocabulary": BYTES} if kind == "t5x" else {}
    return robust_ft.load(folder, **given | options)


def test_importing_the_package_is_light():
    code = "import sys, robust_ft; print(sorted({'jax', 'flax', 'numpy'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert found.stdout.decode().strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = robust_ft.laod


def test_the_mini_model_answers_as_the_documentation_shows():
    predictor = robust_ft.load("asset:mini")
    question = "Q : what is the capital of Galdia ? A :"
    assert predictor.predict([question]) == ["Brell"]
    cities = ["Brell", "Tarn"]
    scores = predictor.score([question] * 2, cities)
    assert cities[int(np.argmax(scores))] == "Brell"
    assert scores[0] == pytest.approx(0, abs=0.1) and scores[1] < -1


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_directory(kind, tmp_path):
    folder, made = write(kind, tmp_path / "model")
    predictor = load(kind, folder)
    assert predictor.model.config == made.config
    params = flatten(predictor.params)
    assert params.keys() == made.tensors.keys()
    for path, tensor in made.tensors.items():
        assert np.asarray(params[path]).tobytes() == tensor.load().tobytes()
    batch = random_batch(0, [3, 5], [4, 2])
    assert predictor.model.logits(predictor.params, batch).shape == (2, 4, 264)
    said = predictor.predict(["abc", "d"], Decoder(max_decode_len=4))
    assert len(said) == 2 and predictor.score(["abc"], ["d"])[0] < 0


def test_types(tmp_path):
    folder, made = write("native", tmp_path / "model")
    predictor = robust_ft.load(folder, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(predictor.params)} == {"bfloat16"}
    config = predictor.model.config
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    np.testing.assert_array_equal(
        predictor.params["token_embedder"]["embedding"],
        made.tensors["token_embedder/embedding"].cast("bfloat16").load(),
    )
    with pytest.raises(UserError, match=r"dtype='bfloat61'.*Did you mean 'bfloat16'"):
        robust_ft.load(folder, dtype="bfloat61")


def test_peft_methods_start_fresh_or_from_weights(tmp_path):
    folder, made = write("native", tmp_path / "model")
    fresh, again, other = (
        robust_ft.load(folder, peft=[Prompt(length=3)], seed=seed) for seed in (0, 0, 1)
    )
    prompts = [p.params["encoder"]["prompt"] for p in (fresh, again, other)]
    np.testing.assert_array_equal(prompts[0], prompts[1])
    assert np.any(prompts[0] != prompts[2])
    assert flatten(fresh.without("prompt").params).keys() == made.tensors.keys()
    np.save(tmp_path / "prompt.npy", np.ones((3, 16), np.float32))
    save_file({"decoder/decoder_norm/scale": np.ones(16)}, tmp_path / "norm.safetensors")
    weights = f"{tmp_path}/prompt.npy, {tmp_path}/norm.safetensors"
    loaded = robust_ft.load(folder, peft=[Prompt(length=3)], weights=weights)
    for path in ("encoder/prompt", "decoder/decoder_norm/scale"):
        np.testing.assert_array_equal(flatten(loaded.params)[path], 1)
    assert loaded.score(["a"], ["b"]) != fresh.score(["a"], ["b"])
    with pytest.raises(UserError, match="encoder/prompt"):
        robust_ft.load(folder, weights=f"{tmp_path}/prompt.npy")
    with pytest.raises(UserError, match=r"prompt.npy.*has shape \(3, 16\), .*\(4, 16\)"):
        robust_ft.load(folder, peft=[Prompt(length=4)], weights=f"{tmp_path}/prompt.npy")


def test_adapters_bring_their_method_along(tmp_path):
    folder, _ = write("native", tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    prompt = Tensor.of(np.full((3, 16), 0.5, np.float32), "prompt")
    adapter = Adapter("test", (Prompt(length=3),), {"encoder/prompt": prompt})
    adapters.write(adapter, tmp_path / "adapter")
    weights = str(tmp_path / "adapter")
    for given in ([], [Prompt(length=3)]):
        predictor = robust_ft.load(folder, weights=weights, peft=given)
        assert predictor.model.peft == (Prompt(length=3),)
        np.testing.assert_array_equal(predictor.params["encoder"]["prompt"], 0.5)


def test_tokens_can_be_added(tmp_path):
    folder, _ = write("native", tmp_path / "model", vocab_size=259)
    larger = ByteVocabulary(extra_ids=5)
    with pytest.raises(UserError, match=r"has 264 tokens.* 259; .*config=\{'vocab_size': 264\}"):
        robust_ft.load(folder, vocabulary=larger)
    predictor = robust_ft.load(folder, vocabulary=larger, config=VOCAB)
    table = np.asarray(predictor.params["token_embedder"]["embedding"])
    np.testing.assert_allclose(table[259:], np.tile(table[:259].mean(0), (5, 1)), atol=1e-6)


def test_what_is_wrong(tmp_path):
    folder, _ = write("t5x", tmp_path / "my_model")
    with pytest.raises(UserError, match=r"no directory '.*my_modle'.*Did you mean 'my_model'"):
        robust_ft.load(tmp_path / "my_modle")
    with pytest.raises(UserError, match=r"holds no vocabulary.*load\(..., vocabulary="):
        robust_ft.load(folder)
    with pytest.raises(UserError, match="no model directory"):
        robust_ft.load(tmp_path)
    with pytest.raises(UserError, match=r"T5Config has no field 'dropout'.*dropout_rate"):
        write("native", tmp_path / "other")
        robust_ft.load(tmp_path / "other", config={"dropout": 0.1})


# --- Against Hugging Face

INPUTS = ["the cat", "a much longer input with the words", "", "ß"]
TARGETS = ["the mat", "b", "the the the", "naïve"]


def t5(transformers, folder):
    folder.mkdir()
    config = transformers.T5Config(
        vocab_size=264, d_model=18, d_kv=5, d_ff=20, num_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", tokenizer_class="ByT5Tokenizer",
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 5}')
    return transformers.T5ForConditionalGeneration(config)


def bart(transformers, folder):
    write_bart(folder)
    config = transformers.BartConfig(
        vocab_size=263, d_model=18, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=20,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        decoder_start_token_id=2,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def gpt2(transformers, folder):
    write_bpe(folder)
    config = transformers.GPT2Config(
        vocab_size=259, n_embd=18, n_layer=2, n_head=3, n_positions=128, bos_token_id=258,
        eos_token_id=258,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def losses(torch, model, vocabulary):
    """Returns Hugging Face's own loss of each pair, as a sum over its tokens."""
    for text, target in zip(INPUTS, TARGETS, strict=True):
        read, labels = encode_inputs(vocabulary, text), encode_targets(vocabulary, target)
        count = len(labels)
        if not model.config.is_encoder_decoder:  # one sequence; only the target counts
            read = read or [model.config.bos_token_id]
            read, labels = [*read, *labels], [-100] * len(read) + labels
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([read]), labels=torch.tensor([labels])).loss
        yield float(loss) * count


@pytest.mark.parity
@pytest.mark.parametrize("family", [t5, bart, gpt2])
def test_scores_equal_the_losses_of_hugging_face(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from models.checks import randomize

    folder = tmp_path / "model"
    reference = randomize(family(transformers, folder))
    reference.save_pretrained(folder)
    predictor = robust_ft.load(folder)
    assert predictor.vocabulary == vocabulary_from_directory(folder)
    expected = list(losses(torch, reference, predictor.vocabulary))
    assert min(expected) > 1
    np.testing.assert_allclose(-predictor.score(INPUTS, TARGETS), expected, rtol=1e-5)
    np.testing.assert_allclose(-predictor.score(INPUTS, TARGETS, batch_size=1), expected, rtol=1e-5)
