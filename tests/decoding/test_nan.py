"""Decoding, ranking and scoring with NaN is an error that says where; -inf is none."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

from robust_ft.decoding import Decoder, NotANumber, beam_search, greedy, sample
from robust_ft.ensembles.predictor import Ensemble
from robust_ft.evaluate import Evaluation
from robust_ft.evaluator import evaluate
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.predictor import Predictor

TASKS = ("toy", "toy_other")
VOCABULARY = toy.DATA.vocabulary
EOS, VOCAB, LENGTH = 1, 6, 4
DECODERS = {
    "greedy": Decoder(max_decode_len=3),
    "sampling": Decoder(max_decode_len=3, temperature=1.0, top_k=5),
    "nucleus": Decoder(max_decode_len=3, temperature=1.0, top_p=0.9, num_return=2),
    "beams": Decoder(max_decode_len=3, beam_size=2),
    "hf": Decoder(max_decode_len=3, beam_size=2, length_penalty="hf", num_return=2),
    "forced": Decoder(max_decode_len=1, forced_first_token=5),
    "banned": Decoder(max_decode_len=2, banned_tokens=[VOCABULARY.vocab_size - 1]),
}


def predictor(model=toy.PLAIN, value=None):
    """Returns a model; with a value, in one place of a parameter that every token passes."""
    params = model.init(jax.random.key(0))
    if value is not None:
        scale = params["decoder"]["decoder_norm"]["scale"]
        params["decoder"]["decoder_norm"]["scale"] = scale.at[3].set(value)
    return Predictor(model, params, VOCABULARY)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_decoding(name, value):
    decoder, rng = DECODERS[name], jax.random.key(0)
    assert len(predictor().predict(["a", "bcd"], decoder, rng=rng)) == 2
    with pytest.raises(NotANumber, match=r"NaN in place of probabilities for input 1, 'bcd':"):
        predictor(value=value).predict(["a", "bcd"], decoder, rng=rng)


def test_ranking_and_scoring():
    broken = predictor(value=np.nan)
    with pytest.raises(NotANumber, match="for input 0, 'one'"):
        broken.score(["one"], ["two"], per_token=True)
    with pytest.raises(NotANumber, match=r"dtype='float32'\.$"):
        broken.rank(["a", "b"], [["x", "y"], ["x"]])
    # -inf fills up what has fewer choices than others.
    scores = predictor().rank(["a", "b"], [["x", "y"], ["x"]]).scores
    assert np.isneginf(scores).tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0)])
def test_an_ensemble_with_one_broken_member(weights):
    ensemble = Ensemble([predictor(value=np.nan), predictor()], weights)
    for decoder in (DECODERS["greedy"], DECODERS["beams"]):
        with pytest.raises(NotANumber):
            ensemble.predict(["a"], decoder)
    with pytest.raises(NotANumber):
        ensemble.rank(["a"], [["x", "y"]])
    assert Ensemble([predictor()] * 2, weights).rank(["a"], [["x", "y"]]).best.shape == (1,)


def test_the_prompt_is_named():
    model = Model(toy.CONFIG, peft=(Prompt(length=2, tasks=TASKS),))
    params = model.init(jax.random.key(0))
    prompts = params["encoder"]["prompt"]
    params["encoder"]["prompt"] = prompts.at[1].set(jnp.nan)
    one = Predictor(model, params, VOCABULARY)
    tasks = ["toy", "toy_other", "toy"]
    with pytest.raises(NotANumber, match="input 1, 'bb' under the prompt of 'toy_other'"):
        one.predict(["a", "bb", "ccc"], task=tasks)
    with pytest.raises(NotANumber, match="input 1, 'bb' under the prompt of 'toy_other'"):
        one.rank(["a", "bb", "ccc"], [["x", "y"]] * 3, task=tasks)
    decoding = Evaluation(
        dataclasses.replace(toy.DATA, split="validation"), DECODERS["greedy"], prompts=TASKS
    )
    with pytest.raises(NotANumber) as caught:
        evaluate(decoding, one)
    assert "of task 'toy', split 'validation' under the prompt of 'toy_other'" in str(caught.value)


@pytest.mark.parametrize("search", ["greedy", "sample", "beams", "hf"])
def test_scores_of_the_rows_that_are_broken_at_any_step(search):
    """Row 1 is NaN at its second step only; row 2 after it has ended; row 0 never."""

    def step_fn(cache, tokens):
        position, row = cache["position"], cache["row"]
        likeliest = jnp.where((row == 2) | (position == 3), EOS, 3)
        logits = 20.0 * jax.nn.one_hot(likeliest, VOCAB)
        bad = ((row == 1) & (position == 1)) | ((row == 2) & (position == 2))
        # A token without probability is no mistake.
        logits = logits.at[:, 4].set(-jnp.inf)
        log_probs = jnp.where(bad[:, None], jnp.nan, jax.nn.log_softmax(logits))
        return log_probs, {"position": position + 1, "row": row}

    cache = {"position": jnp.zeros(3, jnp.int32), "row": jnp.arange(3)}
    arguments = (step_fn, cache, np.zeros(3, np.int32), LENGTH, EOS)
    decoded = {
        "greedy": lambda: greedy(*arguments),
        "sample": lambda: sample(*arguments, jax.random.key(0), num_return=2),
        "beams": lambda: beam_search(*arguments, beam_size=2),
        "hf": lambda: beam_search(*arguments, 2, length_penalty="hf", early_stopping=True),
    }[search]()
    rows = 2 if search == "beams" else 3  # t5x's search goes on with examples that are done
    found = np.isnan(decoded.scores).any(axis=1).tolist()
    assert found[:rows] == [False, True, False][:rows]
