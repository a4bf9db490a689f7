"""Greedy and beam search against Hugging Face's `generate`: the same tokens for 200 prompts."""

import dataclasses
import re

import numpy as np
import pytest
from checks import converted, randomize

from robust_ft.predictor import Predictor
from robust_ft.text_batches import input_batch
from robust_ft.vocabulary import ByteVocabulary

VOCAB, PROMPTS, LENGTH = 43, 200, 16

pytestmark = pytest.mark.parity


def t5(transformers):
    sizes = {"d_model": 16, "num_heads": 2, "d_kv": 6, "d_ff": 24, "num_layers": 2}
    config = transformers.T5Config(
        vocab_size=VOCAB, **sizes, decoder_start_token_id=0, tie_word_embeddings=False
    )
    model = transformers.T5ForConditionalGeneration(config)
    # transformers 5 ties the head of every T5 that is made from a config.
    model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach().clone())
    return model


def bart(transformers):
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=15,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=22,
        decoder_ffn_dim=22,
        encoder_layers=2,
        decoder_layers=2,
        max_position_embeddings=32,
        forced_eos_token_id=None,
    )
    return transformers.BartForConditionalGeneration(config)


def gpt2(transformers):
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=15,
        n_head=3,
        n_inner=22,
        n_layer=2,
        n_positions=48,
        # As it is used: any other padding would count for n-grams there.
        pad_token_id=40,
        eos_token_id=40,
        bos_token_id=40,
        decoder_start_token_id=42,
    )
    return transformers.GPT2LMHeadModel(config)


def llama(transformers):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=24,
        num_hidden_layers=2,
        pad_token_id=40,
        eos_token_id=40,
        bos_token_id=42,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


FAMILIES = {"t5": t5, "bart": bart, "gpt2": gpt2, "llama": llama}


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """Returns PyTorch's model and ours, with the same random weights."""
    transformers = pytest.importorskip("transformers")
    reference = lively(randomize(FAMILIES[request.param](transformers), seed=4))
    model, params = converted(reference, tmp_path_factory.mktemp(request.param))
    return reference, Predictor(model, params, ByteVocabulary())


def lively(reference):
    """Changes weights so that outputs depend on inputs, and end early here and there."""
    for name, value in reference.named_parameters():
        if re.search(r"(q_proj|k_proj|\.q|\.k)\.weight$", name):
            value.data *= 2
        elif re.search(r"(v_proj|out_proj|\.v|\.o|c_attn|c_proj)\.weight$", name):
            value.data *= 1.5
    end = reference.config.eos_token_id
    if hasattr(reference, "final_logits_bias"):
        reference.final_logits_bias[0, end] += 1.5
    elif reference.config.is_encoder_decoder:
        reference.lm_head.weight.data *= 2
        reference.lm_head.weight.data[end] *= 3.3
    else:
        reference.lm_head.weight.data[end] *= 1.5
    return reference


def prompts(predictor, seed=0):
    """Uneven inputs [PROMPTS, 9], padded at the right; ids of padding and EOS are tokens too."""
    model, rng = predictor.model, np.random.default_rng(seed)
    rows = [rng.integers(VOCAB, size=rng.integers(1, 10)) for _ in range(PROMPTS)]
    for row in rows:
        row[-1] += row[-1] == model.eos_id  # PyTorch would count an n-gram of it and its padding
    return input_batch([row.tolist() for row in rows], 9, model.pad_id)


def theirs(reference, predictor, batch, settings):
    """Returns tokens [PROMPTS, num_return, LENGTH], and scores or None for greedy decoding."""
    import torch

    model, count = predictor.model, settings.get("num_return_sequences", 1)
    tokens, mask = batch["encoder_input_tokens"], batch["encoder_input_mask"]
    if not reference.config.is_encoder_decoder:  # padding at the left
        order = np.argsort(mask, axis=1, kind="stable")
        tokens, mask = (np.take_along_axis(each, order, axis=1) for each in (tokens, mask))
    given = torch.from_numpy(tokens).long()
    with torch.no_grad():
        out = reference.generate(
            given,
            attention_mask=torch.from_numpy(mask).long(),
            max_new_tokens=LENGTH,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
    before = 1 if reference.config.is_encoder_decoder else tokens.shape[1]
    said = out.sequences[:, before:].numpy()
    said = np.pad(said, [(0, 0), (0, LENGTH - said.shape[1])], constant_values=model.pad_id)
    # Its beam search pads with the end of the sequence where padding is token 0.
    ends = np.isin(said, model.eos_ids)
    said[np.cumsum(ends, axis=1) - ends > 0] = model.pad_id
    scores = out.sequences_scores.numpy().reshape(PROMPTS, count) if count > 1 else None
    return said.reshape(PROMPTS, count, LENGTH), scores


def assert_same(reference, predictor, ours, hugging_face):
    """Compares all prompts' tokens and, with beams, scores."""
    batch = prompts(predictor)
    found = predictor.generate(batch, max_decode_len=LENGTH, **ours)
    expected, scores = theirs(reference, predictor, batch, hugging_face)
    same = np.all(np.asarray(found.tokens) == expected, axis=(1, 2))
    if scores is not None:
        np.testing.assert_allclose(found.scores, scores, rtol=1e-5, atol=1e-5)
    # No two candidates tie, so none is forgiven.
    assert same.all(), f"prompts {np.flatnonzero(~same)} differ"
    best = expected[:, 0]
    ended = np.any(np.isin(best, predictor.model.eos_ids), axis=1)
    assert 0.05 < np.mean(ended) < 0.95 or "min_decode_len" in ours
    assert len(np.unique(best, axis=0)) > 30


def test_greedy(both):
    assert_same(*both, {}, {"num_beams": 1})


def beams(size=4, alpha=1.0, stopping=False, count=3, **more):
    """Returns our settings and theirs for one beam search."""
    ours = {"beam_size": size, "alpha": alpha, "early_stopping": stopping, "num_return": count}
    ours |= {"length_penalty": "hf"}
    hugging_face = {
        "num_beams": size,
        "length_penalty": alpha,
        "early_stopping": stopping,
        "num_return_sequences": count,
    }
    names = {
        "min_decode_len": "min_new_tokens",
        "no_repeat_ngram_size": "no_repeat_ngram_size",
        "banned_tokens": "suppress_tokens",
        "forced_first_token": "forced_bos_token_id",
        "forced_last_token": "forced_eos_token_id",
    }
    return ours | more, hugging_face | {names[name]: value for name, value in more.items()}


def test_beams(both):
    assert_same(*both, *beams())


@pytest.mark.parametrize(
    "settings",
    [({}, {"num_beams": 1}), beams(), beams(stopping=True), beams(stopping="never")],
    ids=["greedy", "beams", "stopped early", "stopped late"],
)
def test_several_ids_end_outputs(both, settings):
    reference, predictor = both
    ours, hugging_face = settings
    model = dataclasses.replace(predictor.model, stop_ids=(12, 30))
    several = Predictor(model, predictor.params, predictor.vocabulary)
    assert_same(reference, several, ours, hugging_face | {"eos_token_id": list(model.eos_ids)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        beams(stopping=True),
        beams(stopping="never", alpha=2.0),
        beams(stopping="never", alpha=-1.0),
        beams(size=3, alpha=0.0),
        beams(size=5, alpha=-0.5, count=5),
        beams(min_decode_len=5, no_repeat_ngram_size=2, banned_tokens=[5, 9]),
        beams(stopping=True, no_repeat_ngram_size=3, forced_last_token=7),
    ],
)
def test_beams_in_every_way(both, settings):
    assert_same(*both, *settings)


@pytest.mark.slow
def test_greedy_with_processors(both):
    settings = {"no_repeat_ngram_size": 2, "forced_last_token": 8, "min_decode_len": 4}
    assert_same(*both, settings, beams(size=1, count=1, **settings)[1] | {"num_beams": 1})
