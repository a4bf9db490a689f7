"""Several models as one, against each of them and against NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import CONFIGS
from tiny_models import random_batch, random_params

from robust_ft import predictor as predictor_lib
from robust_ft.ensembles.interpolation import interpolate
from robust_ft.ensembles.predictor import Ensemble
from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.models.peft import Prefix, Prompt
from robust_ft.partitioning import Partitioner
from robust_ft.predictor import Predictor
from robust_ft.trainable import flatten, unflatten
from robust_ft.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=0)
TEXTS, TARGETS = ["abc", "hello", ""], ["de", "naïve", "x"]
LENGTH = 6


def member(family, *peft, seed=0, **changes):
    """A model that decides, and that sometimes ends early; families begin with different tokens."""
    config = dataclasses.replace(CONFIGS[family], vocab_size=VOCABULARY.vocab_size)
    ids = {"start_id": {"bart": 2}.get(family, 0)}
    if config.decoder_only:
        ids["separator_id"] = 0
    model = Model(config, peft, **(ids | changes))
    flat = flatten(random_params(model, seed))
    if "decoder/logits_dense/kernel" in flat:
        flat["decoder/logits_dense/kernel"] *= 3
    return Predictor(model, unflatten(flat), VOCABULARY)


@functools.cache
def members():
    """A T5, a BART with a prefix and a GPT-2."""
    return member("t5"), member("bart", Prefix(length=3), seed=1), member("gpt2", seed=2)


@functools.cache
def inputs():
    batch = random_batch(0, [6, 4, 5], [1, 1, 1], vocab=VOCABULARY.vocab_size)
    return {name: batch[name] for name in ("encoder_input_tokens", "encoder_input_mask")}


def assert_same(found, expected):
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)


SEARCHES = pytest.mark.parametrize(
    "settings", [{}, {"beam_size": 3, "num_return": 2}], ids=["greedy", "beams"]
)


@SEARCHES
def test_one_member_and_weights_of_one(settings):
    t5, _, gpt2 = members()
    settings = {"max_decode_len": LENGTH} | settings
    alone = [each.generate(inputs(), **settings) for each in (t5, gpt2)]
    assert np.any(np.asarray(alone[0].tokens) != np.asarray(alone[1].tokens))
    assert_same(Ensemble([t5]).generate(inputs(), **settings), alone[0])
    ensemble = Ensemble([t5, gpt2])
    programs = None
    for i, weights in enumerate(np.eye(2)):
        assert_same(ensemble.weighted(*weights).generate(inputs(), **settings), alone[i])
        programs = programs or predictor_lib.decode._cache_size()
    # One program serves all weights.
    mixed = ensemble.weighted(0.2, 0.8).generate(inputs(), **settings)
    assert predictor_lib.decode._cache_size() == programs
    assert all(np.any(np.asarray(mixed.scores) != np.asarray(each.scores)) for each in alone)


def distribution(predictor, said):
    """Probabilities of each next token over uncached logits, in float64."""
    start = np.full((len(said), 1), predictor.model.start_id, np.int32)
    batch = inputs() | {"decoder_input_tokens": np.concatenate([start, said], 1)}
    logits = np.asarray(jax.jit(predictor.model.logits)(predictor.params, batch), np.float64)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def test_the_distribution_at_each_step_is_the_mean_of_the_members():
    weights = [0.2, 0.3, 0.5]
    ensemble = Ensemble(members(), weights)
    said = np.random.default_rng(1).integers(3, VOCABULARY.vocab_size, (3, LENGTH)).astype(np.int32)

    @jax.jit
    def steps(params, batch):
        start, cache = ensemble.model.prefill(params, batch, LENGTH + 1)
        read = jnp.concatenate([start[:, None], said], 1)

        def step(cache, tokens):
            log_probs, cache = ensemble.model.step(params, cache, tokens)
            return cache, log_probs

        return jax.lax.scan(step, cache, read.T)[1]

    found = np.exp(np.asarray(steps(ensemble.params, inputs()), np.float64))
    parts = [w * distribution(each, said) for w, each in zip(weights, members(), strict=True)]
    np.testing.assert_allclose(np.swapaxes(found, 0, 1), sum(parts), rtol=0, atol=1e-6)


def test_scores_are_of_the_mixture():
    weights = [0.2, 0.3, 0.5]
    ensemble = Ensemble(members(), weights)
    tokens, lengths = padded(TARGETS)
    expected = np.zeros(3)
    for i, length in enumerate(lengths):
        probabilities = [token_probabilities(each, tokens)[i, :length] for each in members()]
        expected[i] = np.sum(np.log(np.average(probabilities, axis=0, weights=weights)))
    ranked = ensemble.rank(TEXTS, [TARGETS] * 3, inputs_length=8)
    np.testing.assert_allclose(np.diagonal(ranked.scores), expected, rtol=1e-5)


def padded(texts):
    """Returns tokens [texts, 8] and their numbers."""
    rows, encoded = np.zeros((len(texts), 8), np.int32), []
    for row, text in zip(rows, texts, strict=True):
        encoded.append([*VOCABULARY.encode(text), VOCABULARY.eos_id])
        row[: len(encoded[-1])] = encoded[-1]
    return rows, list(map(len, encoded))


@functools.cache
def probabilities_of(predictor):
    return jax.jit(lambda batch: jax.nn.softmax(predictor.model.logits(predictor.params, batch)))


def token_probabilities(predictor, tokens):
    """Probabilities of targets' tokens [texts, 8] given TEXTS."""
    read = np.pad(tokens, [(0, 0), (1, 0)], constant_values=predictor.model.start_id)[:, :-1]
    inputs, lengths = padded(TEXTS)
    batch = {
        "encoder_input_tokens": inputs,
        "encoder_input_mask": np.arange(inputs.shape[1]) < np.array(lengths)[:, None],
        "decoder_input_tokens": read,
    }
    found = np.asarray(probabilities_of(predictor)(batch), np.float64)
    return np.take_along_axis(found, tokens[..., None], -1)[..., 0]


def test_members_without_their_methods():
    t5, bart, gpt2 = members()
    ensemble = Ensemble([t5, bart, gpt2], [0.5, 0.25, 0.25])
    assert [method.name for method in ensemble.model.peft] == ["prefix"]
    detached = ensemble.without("prefix")
    assert detached.weights == ensemble.weights and not detached.model.peft
    assert detached.model.members[1] == bart.without("prefix").model
    assert flatten(detached.params["members"][1]).keys() < flatten(bart.params).keys()
    assert ensemble.without() is ensemble


def test_members_with_a_prompt_for_each_task():
    many = member("t5", Prompt(length=2, tasks=("a", "b")))
    ensemble = Ensemble([member("gpt2"), many], [0, 1])
    assert ensemble.model.tasks == ("a", "b") and ensemble.model.task_index("b_1shot") == 1
    found = ensemble.score(TEXTS, TARGETS, task=["a", "b", "a"])
    np.testing.assert_allclose(found, many.score(TEXTS, TARGETS, task=["a", "b", "a"]), rtol=1e-5)
    other = member("t5", Prompt(length=2, tasks=("a", "c")))
    with pytest.raises(UserError, match=r"Members 0 and 1 .* prompts for different tasks"):
        Ensemble([many, other])


# --- In weight space


def test_interpolated_parameters():
    trees = [member("bart", Prefix(length=3), seed=seed).params for seed in range(3)]
    weights = [0.2, 0.5, 0.3]
    found = flatten(interpolate(trees, weights))
    for path, leaf in found.items():
        parts = [
            w * np.asarray(flatten(t)[path], np.float64)
            for w, t in zip(weights, trees, strict=True)
        ]
        np.testing.assert_allclose(leaf, sum(parts), rtol=0, atol=1e-6)
        assert leaf.dtype == flatten(trees[0])[path].dtype
    for i, alone in enumerate(np.eye(3).tolist()):
        for path, leaf in flatten(interpolate(trees, alone)).items():
            np.testing.assert_array_equal(leaf, flatten(trees[i])[path])
    halves = interpolate([{"a": jnp.array([1.0, 3.0], jnp.bfloat16)}] * 2, [0.5, 0.5])
    assert halves["a"].dtype == jnp.bfloat16 and halves["a"].tolist() == [1, 3]


def test_parameters_that_cannot_be_interpolated():
    one = {"decoder": {"b": np.zeros((2, 3)), "c": np.zeros(1)}, "encoder": {"a": np.zeros(2)}}
    other = {"decoder": {"b": np.zeros((2, 4)), "c": np.zeros(1)}, "encoder": {}}
    with pytest.raises(UserError, match=r"'decoder/b' is \[2, 3\] in member 0, .*\[2, 4\] in memb"):
        interpolate([one, one, other], [0.5, 0.25, 0.25])
    with pytest.raises(UserError, match=r"'encoder/a' is \[2\] in member 0, but missing in member"):
        interpolate([one, one | {"encoder": {}}], [0.5, 0.5])
    with pytest.raises(UserError, match="at least one member"):
        interpolate([], [])


# --- What does not fit together


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.25, -0.25, 0], "from 0 to 1, not 1.25"),
        ([0.5, 0.25, 0.2], "must sum to 1, not 0.95"),
        ([0.5, 0.5], "3 members needs 3 weights"),
        ([float("nan"), 0.5, 0.5], "from 0 to 1, not nan"),
    ],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(UserError, match=message):
        Ensemble(members(), weights)
    with pytest.raises(UserError, match=message):
        interpolate([{}, {}, {}], weights)


def test_members_are_checked():
    first = members()[0]
    with pytest.raises(UserError, match="at least one member"):
        Ensemble([])
    assert Ensemble(members()).weights == pytest.approx([1 / 3] * 3)
    larger = Predictor(first.model, first.params, ByteVocabulary(extra_ids=10))
    with pytest.raises(
        UserError, match=r"0 and 1 .* different vocabularies, of 259 and 269 tokens"
    ):
        Ensemble([first, larger])
    config = dataclasses.replace(first.model.config, vocab_size=300)
    wider = Predictor(dataclasses.replace(first.model, config=config), {}, VOCABULARY)
    with pytest.raises(UserError, match=r"Members 0 and 2 .* number of tokens: 259 and 300"):
        Ensemble([first, Ensemble([first]), wider])
    with pytest.raises(UserError, match="the id that ends a text: 1 and 5"):
        Ensemble([first, member("t5", eos_id=5)])
    elsewhere = Predictor(first.model, {}, VOCABULARY, Partitioner(rules=(("embed", None),)))
    with pytest.raises(UserError, match="differ in their mesh"):
        Ensemble([first, elsewhere])
