import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import random_batch, random_params, tiny_model

from robust_ft import text_batches
from robust_ft.decoding import Decoder
from robust_ft.errors import UserError
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.predictor import Predictor
from robust_ft.trainable import flatten, merge, split, unflatten
from robust_ft.vocabulary import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=0)
SIZES = {"num_encoder_layers": 1, "num_decoder_layers": 1}
LENGTH = 8


def predictor_of(peft=(), seed=0):
    model = tiny_model(peft, vocab_size=VOCABULARY.vocab_size, **SIZES)
    params = random_params(model, seed)
    # Outputs depend on inputs, and some end early.
    attention = params["decoder"]["layers_0"]["encoder_decoder_attention"]
    attention["out"]["kernel"] *= 4
    head = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = head.at[:, VOCABULARY.eos_id].multiply(1.5)
    return Predictor(model, params, VOCABULARY)


def inputs(seed, lengths):
    batch = random_batch(seed, lengths, [1] * len(lengths), vocab=VOCABULARY.vocab_size)
    return {name: batch[name] for name in ("encoder_input_tokens", "encoder_input_mask")}


def slow_greedy(predictor, batch, length):
    """Argmax over the logits of the whole prefix, computed anew for each token."""
    logits = jax.jit(predictor.model.logits)
    rows = len(batch["encoder_input_tokens"])
    tokens, scores = np.zeros((rows, length), np.int32), np.zeros(rows)
    done = np.zeros(rows, bool)
    for i in range(length):
        prefix = np.pad(tokens, [(0, 0), (1, 0)])[:, :length]
        here = logits(predictor.params, batch | {"decoder_input_tokens": prefix})[:, i]
        log_probs = np.asarray(jax.nn.log_softmax(here), np.float64)
        best = log_probs.argmax(axis=-1)
        tokens[:, i] = np.where(done, VOCABULARY.pad_id, best)
        scores += np.where(done, 0, log_probs.max(axis=-1))
        done |= best == VOCABULARY.eos_id
    return tokens, scores


@pytest.mark.parametrize("peft", [(), (Prompt(length=3),)], ids=["plain", "prompt"])
def test_greedy_is_an_argmax_loop_over_uncached_logits(peft):
    predictor = predictor_of(peft)
    batch = inputs(2, [6, 1, 4, 3, 5, 2, 6, 6])
    decoded = predictor.generate(batch, Decoder(max_decode_len=LENGTH))
    tokens, scores = slow_greedy(predictor, batch, LENGTH)
    assert decoded.tokens.shape == (8, 1, LENGTH) and decoded.scores.shape == (8, 1)
    np.testing.assert_array_equal(decoded.tokens[:, 0], tokens)
    np.testing.assert_allclose(decoded.scores[:, 0], scores, atol=1e-4)
    ended = (tokens == VOCABULARY.eos_id).any(axis=1)
    assert 0 < ended.sum() < 8, "some rows, but not all, should end early"


def test_settings_build_a_decoder_or_change_one():
    predictor, batch = predictor_of(), inputs(1, [6, 1, 4, 3, 5, 2, 6, 6])
    settings = {"beam_size": 3, "num_return": 2, "alpha": 1.0, "length_penalty": "hf"}
    expected = predictor.generate(batch, Decoder(max_decode_len=LENGTH, **settings))
    for found in (
        predictor.generate(batch, max_decode_len=LENGTH, **settings),
        predictor.generate(batch, Decoder(max_decode_len=LENGTH, beam_size=2), **settings),
    ):
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.scores, expected.scores)
    with pytest.raises(UserError, match=r"no setting 'beam'\. Did you mean 'beam_size'"):
        predictor.generate(batch, beam=3)
    with pytest.raises(UserError, match="beam_size=0 must be at least 1"):
        predictor.predict(["a"], beam_size=0)


def test_generate_ignores_the_targets_in_a_batch():
    predictor = predictor_of()
    batch, decoder = inputs(1, [6, 1, 4, 3, 5, 2, 6, 6]), Decoder(max_decode_len=LENGTH)
    more = batch | {"decoder_target_tokens": np.ones((8, 3)), "example_index": np.arange(8)}
    expected = predictor.generate(batch, decoder)
    np.testing.assert_array_equal(predictor.generate(more, decoder).tokens, expected.tokens)


def test_a_detached_predictor_has_neither_prompt_nor_its_parameters():
    predictor = predictor_of((Prompt(length=3),))
    detached = predictor.without("prompt")
    assert detached.model == tiny_model(vocab_size=VOCABULARY.vocab_size, **SIZES)
    assert flatten(detached.params).keys() == flatten(predictor.params).keys() - {"encoder/prompt"}
    assert "encoder/prompt" in flatten(predictor.params) and predictor.model.peft
    assert predictor.without() is predictor
    assert flatten(predictor.without("prefix").params).keys() == flatten(predictor.params).keys()
    # What it says no longer depends on the prompt.
    batch, decoder = inputs(2, [6, 1, 4, 3, 5, 2, 6, 6]), Decoder(max_decode_len=LENGTH)
    prompt, rest = split(predictor.params, frozenset({"encoder/prompt"}))
    other = Predictor(
        predictor.model, merge(jax.tree.map(lambda p: p + 5, prompt), rest), VOCABULARY
    )
    said, expected, prompted = (
        p.generate(batch, decoder).tokens for p in (other.without("prompt"), detached, other)
    )
    np.testing.assert_array_equal(said, expected)
    assert np.any(np.asarray(prompted) != np.asarray(expected))


# --- Text in, text out


@dataclasses.dataclass(frozen=True)
class Parrot(Model):
    """A model that repeats what it read, token by token."""

    config: None = None
    eos_id: int = VOCABULARY.eos_id
    pad_id: int = VOCABULARY.pad_id

    def check_lengths(self, inputs, targets):
        pass

    def check_inputs(self, mask, targets):
        pass

    def history(self, batch):
        return jnp.zeros_like(batch["encoder_input_tokens"][:, :1])

    def prefill(self, params, batch, max_length):
        tokens = batch["encoder_input_tokens"]
        zeros = jnp.zeros(len(tokens), jnp.int32)
        return zeros, {"tokens": tokens, "position": zeros}

    def step(self, params, cache, tokens):
        rows = jnp.arange(len(tokens))
        said = cache["tokens"][rows, cache["position"]] + params["shift"]
        logits = 20 * jax.nn.one_hot(said, VOCABULARY.vocab_size)
        return jax.nn.log_softmax(logits), cache | {"position": cache["position"] + 1}


PARROT = Predictor(Parrot(), {"shift": jnp.asarray(0)}, VOCABULARY)
TEXTS = ["True", "", "naïve Übung", "日本", "a b  c", "False", "x"]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_predict_round_trips_text_in_order_whatever_the_batch_size(batch_size):
    decoder = Decoder(max_decode_len=16)
    said = PARROT.predict(TEXTS, decoder, inputs_length=16, batch_size=batch_size)
    assert said == TEXTS
    assert PARROT.predict([], decoder, inputs_length=16, batch_size=batch_size) == []


def test_predict_cuts_inputs_and_keeps_their_end():
    decoder = Decoder(max_decode_len=16)
    # 5 tokens are 4 bytes and the end.
    assert (
        PARROT.predict(["abcd", "abcdefgh"], decoder, inputs_length=5, batch_size=2) == ["abcd"] * 2
    )


def test_predict_returns_the_best_beam():
    decoder = Decoder(max_decode_len=16, beam_size=3, num_return=2)
    assert PARROT.predict(TEXTS, decoder, inputs_length=16, batch_size=4) == TEXTS


def test_predict_equals_generate_on_a_real_model():
    predictor, decoder = predictor_of(), Decoder(max_decode_len=LENGTH)
    texts = ["abc", "hello", "x"]
    tokens = predictor.generate(padded(map(encoded, texts)), decoder).tokens
    expected = [VOCABULARY.decode(np.asarray(row[0]).tolist()) for row in tokens[:3]]
    assert predictor.predict(texts, decoder, inputs_length=6, batch_size=8) == expected


def test_sampling_needs_a_key_and_uses_a_new_one_for_each_batch():
    predictor = predictor_of()
    decoder = Decoder(max_decode_len=LENGTH, temperature=2.0)
    with pytest.raises(UserError, match="random key"):
        predictor.predict(["a"], decoder, inputs_length=6, batch_size=8)
    settings = {"inputs_length": 6, "batch_size": 8}
    first, again = (
        predictor.predict(["a"] * 16, decoder, **settings, rng=jax.random.key(0)) for _ in range(2)
    )
    assert first == again
    assert first[:8] != first[8:]


# --- Scores

PAIRS = [("abc", "de"), ("hello there", ""), ("", "naïve"), ("x", "a longer target"), ("abc", "d")]
INPUTS, TARGETS = map(list, zip(*PAIRS, strict=True))


def log_likelihood(predictor, text, target):
    """The sum of one pair's log-softmax, without padding, blocks or batches."""
    tokens = np.array([[*VOCABULARY.encode(target), VOCABULARY.eos_id]])
    batch = {
        "encoder_input_tokens": np.array([[*VOCABULARY.encode(text), VOCABULARY.eos_id]]),
        "decoder_input_tokens": np.pad(tokens, [(0, 0), (1, 0)])[:, :-1],
    }
    logits = np.asarray(jax.jit(predictor.model.logits)(predictor.params, batch), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(log_probs, tokens[..., None], -1).sum()


@pytest.mark.parametrize("peft", [(), (Prompt(length=3),)], ids=["plain", "prompt"])
def test_scores_are_sums_of_log_softmax(peft):
    predictor = predictor_of(peft)
    expected = [log_likelihood(predictor, *pair) for pair in PAIRS]
    scores = predictor.score(INPUTS, TARGETS)
    assert scores.shape == (5,) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    tokens = [len(VOCABULARY.encode(target)) + 1 for target in TARGETS]
    per_token = predictor.score(INPUTS, TARGETS, per_token=True)
    np.testing.assert_allclose(per_token, np.array(expected) / tokens, rtol=1e-5)


def test_scores_do_not_depend_on_batches_and_padding():
    predictor = predictor_of()
    expected = predictor.score(INPUTS, TARGETS)
    for settings in ({"batch_size": 2}, {"inputs_length": 20}, {"targets_length": 16}):
        np.testing.assert_allclose(predictor.score(INPUTS, TARGETS, **settings), expected, 1e-5)
    assert predictor.score([], []).shape == (0,)
    # Longer than one block of positions, and a sum over several.
    long = "word " * 20
    np.testing.assert_allclose(
        predictor.score(["a", "b"], [long, "x"]),
        [log_likelihood(predictor, "a", long), log_likelihood(predictor, "b", "x")],
        rtol=1e-5,
    )


def test_what_cannot_be_scored():
    predictor = predictor_of()
    with pytest.raises(UserError, match="2 inputs and 1 targets"):
        predictor.score(["a", "b"], ["c"])
    with pytest.raises(
        UserError, match=r"Target 'toolong.*of input 1 has 8 tokens.*targets_length=7"
    ):
        predictor.score(["a", "b"], ["short", "toolong"], targets_length=7)
    with pytest.raises(UserError, match="targets must be a list of texts"):
        predictor.score(["a"], "b")
    with pytest.raises(UserError, match=r"write \['one text'\]"):
        predictor.predict("one text")
    with pytest.raises(UserError, match="batch_size=0 must be at least 1"):
        predictor.predict(["a"], batch_size=0)


# --- Answer choices

CHOICES = [["yes", "no"], ["a longer answer", "", "maybe", "no"], ["naïve"], ["no", "yes", "no"]]
QUESTIONS = ["is it", "which of these four", "", "x"]


def encoded(text):
    return [*VOCABULARY.encode(text), VOCABULARY.eos_id]


def padded(sequences):
    """Returns the features of inputs."""
    return text_batches.input_batch(list(sequences), None, VOCABULARY.pad_id)


def gpt2_predictor():
    sizes = {"emb_dim": 12, "num_heads": 2, "mlp_dim": 16, "num_layers": 1, "num_positions": 64}
    config = GPT2Config(vocab_size=VOCABULARY.vocab_size, **sizes)
    model = Model(config, (Prompt(length=3),), separator_id=0)
    return Predictor(model, random_params(model), VOCABULARY)


@pytest.mark.parametrize(
    "make", [lambda: predictor_of((Prompt(length=3),)), gpt2_predictor], ids=["t5", "gpt2"]
)
def test_choices_are_ranked_by_their_sums_of_log_softmax(make):
    predictor = make()
    pairs = [(i, j) for i, answers in enumerate(CHOICES) for j in range(len(answers))]
    rows = [(encoded(QUESTIONS[i]), encoded(CHOICES[i][j])) for i, j in pairs]
    tokens, _ = text_batches.padded([target for _, target in rows], None, VOCABULARY.pad_id)
    batch = padded([question for question, _ in rows])
    batch["decoder_input_tokens"] = np.pad(tokens, [(0, 0), (1, 0)])[:, :-1]
    logits = np.asarray(jax.jit(predictor.model.logits)(predictor.params, batch), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    said = np.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
    expected = np.full((4, 4), -np.inf)
    for (i, j), row, (_, target) in zip(pairs, said, rows, strict=True):
        expected[i, j] = row[: len(target)].sum()
    ranked = predictor.rank(QUESTIONS, CHOICES)
    assert ranked.scores.shape == (4, 4) and ranked.scores.dtype == np.float32
    np.testing.assert_allclose(ranked.scores, expected, rtol=1e-5)
    # Of the equal ones of the last input the first can be best.
    np.testing.assert_array_equal(ranked.best, expected.argmax(axis=1))
    lengths = [[len(encoded(answer)) for answer in answers] for answers in CHOICES]
    per_token = predictor.rank(QUESTIONS, CHOICES, per_token=True)
    for row, sums, count in zip(per_token.scores, expected, lengths, strict=True):
        np.testing.assert_allclose(row[: len(count)], sums[: len(count)] / count, rtol=1e-5)
    np.testing.assert_array_equal(per_token.best, per_token.scores.argmax(axis=1))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_ranks_do_not_depend_on_batches(batch_size):
    predictor = predictor_of()
    expected = predictor.rank(QUESTIONS, CHOICES)
    ranked = predictor.rank(QUESTIONS, CHOICES, batch_size=batch_size)
    np.testing.assert_allclose(ranked.scores, expected.scores, rtol=1e-5)
    for row, question, answers in zip(ranked.scores, QUESTIONS, CHOICES, strict=True):
        alone = predictor.score([question] * len(answers), answers)
        np.testing.assert_allclose(row[: len(answers)], alone, rtol=1e-5)


def test_an_input_is_read_once_for_all_its_choices(monkeypatch):
    read = []

    def prefill(self, params, batch, max_length):
        read.append(batch["encoder_input_tokens"].shape)
        return original(self, params, batch, max_length)

    original = Model.prefill
    monkeypatch.setattr(Model, "prefill", prefill)
    predictor_of(seed=3).rank(["a", "b"], [["x", "y", "z", "u", "v"]] * 2, inputs_length=11)
    assert read == [(2, 11)]


def test_what_cannot_be_ranked():
    predictor = predictor_of()
    assert predictor.rank([], []).best.shape == (0,)
    with pytest.raises(UserError, match="2 inputs and 1 targets"):
        predictor.rank(["a", "b"], [["c"]])
    with pytest.raises(UserError, match=r"choices must be a list of texts.*write \['yes'\]"):
        predictor.rank(["a"], ["yes"])
    with pytest.raises(UserError, match="Input 1 has no choices"):
        predictor.rank(["a", "b"], [["c"], []])


# --- Several prompts

TASKS = ("rte", "cb", "nq")


def with_prompt(predictor, task):
    """Returns a predictor with one task's prompt alone."""
    flat = flatten(predictor.params)
    model = dataclasses.replace(predictor.model, peft=(Prompt(length=3),))
    params = unflatten(flat | {"encoder/prompt": flat["encoder/prompt"][TASKS.index(task)]})
    return Predictor(model, params, VOCABULARY)


def test_each_text_gets_its_tasks_prompt():
    predictor = predictor_of((Prompt(length=3, tasks=TASKS),))
    texts = ["abc", "hello there", "x", "", "abc", "hello there", "abc"]
    tasks = ["cb", "rte", "nq", "nq_1shot", "rte", "rte", "nq"]
    decoder = Decoder(max_decode_len=LENGTH)
    settings = {"inputs_length": 16, "batch_size": 4}
    said = predictor.predict(texts, decoder, task=tasks, **settings)
    scores = predictor.score(texts, texts, task=tasks, **settings)
    ranked = predictor.rank(texts, [texts] * len(texts), task=tasks, **settings)
    np.testing.assert_allclose(np.diagonal(ranked.scores), scores, rtol=1e-5)
    assert len({said[0], said[4], said[6]}) == 3, "prompts should matter"
    for task in TASKS:
        single = with_prompt(predictor, task)
        own = [i for i, name in enumerate(tasks) if name.removesuffix("_1shot") == task]
        alone = single.predict(texts, decoder, **settings)
        assert [said[i] for i in own] == [alone[i] for i in own]
        expected = single.score(texts, texts, **settings)
        np.testing.assert_allclose(scores[own], expected[own], rtol=1e-5)
    assert predictor.predict(texts, decoder, task=TASKS[-1], **settings) == alone
    assert predictor.predict([], task="cb") == []


def test_whose_prompt_is_not_said():
    predictor = predictor_of((Prompt(length=3, tasks=TASKS),))
    with pytest.raises(UserError, match=r"Say whose prompt to take, .* one of rte, cb, nq"):
        predictor.predict(["a"])
    with pytest.raises(UserError, match="one name, or one for each of 2 texts"):
        predictor.score(["a", "b"], ["a", "b"], task=["rte"])
    with pytest.raises(UserError, match=r"task 'rtee', only for rte, .* mean 'rte'"):
        predictor.predict(["a"], task="rtee")
    with pytest.raises(UserError, match="leave out task"):
        predictor.without("prompt").predict(["a"], task="rte")


def test_predict_by_default():
    """Nothing but texts is needed, none is cut, and few shapes are compiled."""
    texts = ["a", "b" * 40, "c" * 70, "d" * 30, ""]
    decoder = Decoder(max_decode_len=64)
    expected = PARROT.predict(texts, decoder, inputs_length=128)
    assert PARROT.predict(texts) == expected
    assert [len(text) for text in expected] == [1, 40, 64, 30, 0]
    read = []
    predictor = Predictor(Parrot(), PARROT.params, VOCABULARY)
    predictor.generate = lambda batch, *rest: (
        read.append(batch["encoder_input_tokens"]) or PARROT.generate(batch, *rest)
    )
    predictor.predict(["a" * length for length in range(0, 200, 7)], batch_size=8)
    assert [rows.shape for rows in read] == [(8, 256), (8, 192), (8, 128), (8, 32)]
