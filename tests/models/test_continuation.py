"""Decoder-only models read [input; target] and nothing between, unless they have a separator.

The reference is one row without padding, [input; target] as plain tokens, through `Model.logits`.
Ids of padding and of EOS are tokens too: masks alone tell what is padding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import logits_of
from tiny_families import CONFIGS, VOCAB, params_of

from robust_ft.data.records import model_batch, packed_batch, to_pack
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.models.peft import Prefix, Prompt
from robust_ft.predictor import Predictor
from robust_ft.vocabulary import ByteVocabulary

PAD, EOS, START, SEPARATOR = 1, 1, 2, 3
SOURCE, TARGET = 7, 5
families = pytest.mark.parametrize("family", ["gpt2", "llama"])
separators = pytest.mark.parametrize("separator", [None, SEPARATOR], ids=["continued", "separated"])


@functools.cache
def model_and_params(family, separator, *peft):
    """A model whose padding is its EOS, as GPT-2, Llama and SmolLM2 are used."""
    model = Model(CONFIGS[family], peft, PAD, EOS, START, separator_id=separator)
    return model, params_of(model)


@functools.partial(jax.jit, static_argnums=0)
def extended(model, params, batch, targets):
    """Returns log-probabilities of targets [batch, target, vocab], read at once over a cache."""
    first, cache = model.prefill(params, batch, TARGET)
    read = jnp.concatenate([first[:, None], targets[:, :-1]], 1)
    return jax.nn.log_softmax(model.head(params, model.extend(params, cache, read)[0]))


def alone(model, params, source, target):
    """Returns the target's log-probabilities [target, vocab] in one plain sequence, unpadded."""
    separated = model.separator_id is not None
    before = [*source, model.separator_id] if separated else source or [START]
    read = np.array([[*before, *target[:-1]]], np.int32)
    batch = {"encoder_input_tokens": read[:, :0], "decoder_input_tokens": read}
    return jax.nn.log_softmax(logits_of(model, params, batch)[0, -len(target) :])


def inputs(rng, rows=4):
    """Masks with holes; one row is empty, one has a single token, a third of all tokens is EOS."""
    tokens = rng.integers(0, VOCAB, (rows, SOURCE)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.3] = EOS
    mask = rng.random(tokens.shape) < 0.6
    mask[0] = False
    mask[1] = np.arange(SOURCE) == rng.integers(SOURCE)
    return {"encoder_input_tokens": tokens, "encoder_input_mask": mask}


def rows_of(batch):
    names = ("encoder_input_tokens", "encoder_input_mask")
    return [row[kept].tolist() for row, kept in zip(*(batch[n] for n in names), strict=True)]


@families
@separators
def test_over_a_cache_targets_have_the_log_probabilities_of_plain_sequences(family, separator):
    model, params = model_and_params(family, separator)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        batch = inputs(rng)
        targets = rng.integers(0, VOCAB, (4, TARGET)).astype(np.int32)
        found = extended(model, params, batch, targets)
        for row, source, target in zip(found, rows_of(batch), targets.tolist(), strict=True):
            expected = alone(model, params, source, target)
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "peft",
    [Prompt(length=3), Prefix(length=2), Prefix(length=2, counted=True)],
    ids=["prompt", "prefix", "counted prefix"],
)
@families
@separators
def test_prompts_and_prefixes_stand_before_all_of_it(family, separator, peft):
    model, params = model_and_params(family, separator, peft)
    rng = np.random.default_rng(5)
    batch, targets = inputs(rng), rng.integers(0, VOCAB, (4, TARGET)).astype(np.int32)
    found = extended(model, params, batch, targets)
    for row, source, target in zip(found, rows_of(batch), targets.tolist(), strict=True):
        expected = alone(model, params, source, target)
        np.testing.assert_allclose(row, expected, rtol=0, atol=1e-5)


@families
@separators
def test_batches_of_training_and_evaluation_have_them_too(family, separator):
    model, params = model_and_params(family, separator)
    rng = np.random.default_rng(6)
    sources = [rng.integers(0, VOCAB, length) for length in (0, 1, 6, 3)]
    targets = [rng.integers(0, VOCAB, length) for length in (5, 2, 1, 4)]
    batch = model_batch(sources, targets, SOURCE, TARGET, 0, PAD, model.decoder_start)
    found = jax.nn.log_softmax(logits_of(model, params, batch))
    for row, source, target in zip(found, sources, targets, strict=True):
        expected = alone(model, params, source.tolist(), target.tolist())
        np.testing.assert_allclose(row[: len(target)], expected, rtol=0, atol=1e-5)


@families
@separators
def test_packed_examples_have_them_too(family, separator):
    model, params = model_and_params(family, separator)
    rng = np.random.default_rng(9)
    sources = [rng.integers(0, VOCAB, length) for length in (0, 4, 1)]
    targets = [rng.integers(0, VOCAB, length) for length in (2, 3, 2)]
    pairs = zip(sources, targets, strict=True)
    examples = [to_pack(*pair, model.decoder_start, i) for i, pair in enumerate(pairs)]
    packed = {}
    for name in examples[0]:
        parts = [example[name] for example in examples]
        ids = np.repeat([1, 2, 3, 0], [*map(len, parts), 2])  # and two places are left
        packed[f"{name}_segment_ids"] = ids[None].astype(np.int32)
        packed[name] = np.pad(np.concatenate(parts), (0, 2))[None].astype(np.int32)
    found = jax.nn.log_softmax(logits_of(model, params, packed_batch(packed, PAD)))[0]
    parts = np.split(found, np.cumsum([len(target) for target in targets]))
    for part, source, target in zip(parts, sources, targets, strict=False):
        expected = alone(model, params, source.tolist(), target.tolist())
        np.testing.assert_allclose(part, expected, rtol=0, atol=1e-5)


@families
@separators
def test_generated_tokens_are_the_likeliest_of_plain_sequences(family, separator):
    model, params = model_and_params(family, separator)
    batch = inputs(np.random.default_rng(7))
    predictor = Predictor(model, params, ByteVocabulary())
    found = predictor.generate(batch, max_decode_len=TARGET)
    for tokens, source in zip(np.asarray(found.tokens)[:, 0].tolist(), rows_of(batch), strict=True):
        expected = []
        while len(expected) < TARGET and EOS not in expected:
            log_probs = alone(model, params, source, [*expected, 0])[-1]
            expected.append(int(np.argmax(log_probs)))
        assert tokens == expected + [PAD] * (TARGET - len(expected))


@families
@separators
def test_the_history_is_what_the_decoder_reads_before_the_target(family, separator):
    model, _ = model_and_params(family, separator)
    batch = inputs(np.random.default_rng(8))
    for row, source in zip(np.asarray(model.history(batch)).tolist(), rows_of(batch), strict=True):
        read = (source or [START]) if separator is None else [*source, separator]
        assert [token for token in row if token >= 0] == read
        assert row == [-1] * (len(row) - len(read)) + read


@families
@separators
def test_inputs_of_no_width(family, separator):
    model, params = model_and_params(family, separator)
    batch = {"encoder_input_tokens": np.zeros((1, 0), np.int32)}
    batch["encoder_input_mask"] = np.zeros((1, 0), bool)
    targets = np.arange(4, 4 + TARGET, dtype=np.int32)
    found = extended(model, params, batch, targets[None])[0]
    expected = alone(model, params, [], targets.tolist())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_separators_are_for_decoder_only_models_and_infixes_need_one():
    with pytest.raises(UserError, match=r"Model.separator_id=3 is for decoder-only models.*T5"):
        Model(CONFIGS["t5"], separator_id=3)
    infix = Prompt(length=2, position="infix")
    with pytest.raises(UserError, match=r"needs Model.separator_id behind it"):
        Model(CONFIGS["gpt2"], (infix,)).check()
    Model(CONFIGS["gpt2"], (infix,), separator_id=3).check()
    with pytest.raises(UserError, match=r"Model.separator_id=40 is no token"):
        Model(CONFIGS["gpt2"], separator_id=VOCAB).check()
