"""What decoder-only models answer by default is what transformers computes from their directory."""

import os

import numpy as np
import pytest
import real_directories
from real_directories import CHAT, PROMPTS

import robust_ft
from robust_ft.vocabulary import encode_inputs, encode_targets

FAMILIES = ["llama3", "llama2", "mistral", "smollm2", "qwen2", "qwen3", "gpt2"]
LENGTH, BATCH = 8, 16
pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif("ROBUST_FT_DATA_DIR" not in os.environ, reason="needs the datasets"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """Returns PyTorch's model, its tokenizer, our predictor and the family's end of a turn."""
    import transformers

    folder = tmp_path_factory.mktemp(request.param)
    reference = real_directories.write(request.param, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    end = {"llama3": "<|eot_id|>", "gpt2": "<|endoftext|>"}.get(request.param, CHAT[1])
    return reference, tokenizer, robust_ft.load(folder), end


def texts_of(end, count=PROMPTS):
    return real_directories.prompts(count, chat=(CHAT[0] if end == CHAT[1] else "", end))


def input_ids(tokenizer, predictor, text):
    """Returns an input as `generate` reads it: without any token, it is the BOS."""
    return tokenizer(text).input_ids or [predictor.model.start_id]


def generated(reference, ids, **settings):
    """Returns the new tokens of one input alone, without padding."""
    import torch

    given = torch.tensor([ids])
    out = reference.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=LENGTH,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    return out[0, len(ids) :].tolist()


def log_likelihood(reference, ids, target_ids):
    import torch

    with torch.no_grad():
        logits = reference(torch.tensor([[*ids, *target_ids]])).logits[0].double()
    log_probs = torch.log_softmax(logits, -1)[len(ids) - 1 : -1]
    return float(log_probs.gather(1, torch.tensor(target_ids)[:, None]).sum())


def ends_of(reference):
    ends = reference.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends)


@pytest.mark.parametrize("beams", [1, 3])
def test_predict_is_generate(both, beams):
    reference, tokenizer, predictor, end = both
    texts = texts_of(end, PROMPTS if beams == 1 else PROMPTS // 2)
    settings = {"beam_size": beams, "alpha": 1.0, "length_penalty": "hf"} if beams > 1 else {}
    found = predictor.predict(texts, max_decode_len=LENGTH, batch_size=BATCH, **settings)
    ends, ended = ends_of(reference), 0
    for text, answer in zip(texts, found, strict=True):
        ids = input_ids(tokenizer, predictor, text)
        tokens = generated(reference, ids, num_beams=beams)
        assert encode_inputs(predictor.vocabulary, text) == tokenizer(text).input_ids, text
        stops = [i for i, token in enumerate(tokens) if token in ends]
        ended += bool(stops)
        tokens = tokens[: stops[0]] if stops else tokens
        assert answer == predictor.vocabulary.decode(tokens), (text, tokens)
    assert beams > 1 or ended < len(texts)


def test_score_is_the_log_likelihood(both):
    reference, tokenizer, predictor, end = both
    texts, targets = texts_of(end), real_directories.targets(PROMPTS)
    expected = []
    for text, target in zip(texts, targets, strict=True):
        target_ids = [*tokenizer(target, add_special_tokens=False).input_ids]
        target_ids.append(predictor.model.eos_id)
        assert encode_targets(predictor.vocabulary, target) == target_ids
        ids = input_ids(tokenizer, predictor, text)
        expected.append(log_likelihood(reference, ids, target_ids))
    found = predictor.score(texts, targets, batch_size=BATCH)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_rank_prefers_what_is_likelier(both):
    reference, tokenizer, predictor, end = both
    texts, rng = texts_of(end, PROMPTS // 2), np.random.default_rng(5)
    choices = [real_directories.targets(int(rng.integers(2, 5)), seed=i) for i in range(len(texts))]
    ranked = predictor.rank(texts, choices, batch_size=BATCH)
    for i, (text, answers) in enumerate(zip(texts, choices, strict=True)):
        ids = input_ids(tokenizer, predictor, text)
        expected = [
            log_likelihood(reference, ids, encode_targets(predictor.vocabulary, answer))
            for answer in answers
        ]
        np.testing.assert_allclose(ranked.scores[i, : len(answers)], expected, rtol=2e-5, atol=2e-5)
        assert ranked.best[i] == int(np.argmax(expected))
