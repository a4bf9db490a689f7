"""KL anchors and token weights against float64, with a chunked loss and with a whole one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import batch_of, model_of, params_of
from tiny_models import assert_trees_close, tiny_config

from robust_ft.errors import UserError
from robust_ft.models.model import Model
from robust_ft.objectives import (
    Cocktail,
    CrossEntropy,
    Dft,
    Eaft,
    Flow,
    KlAnchor,
    Stm,
    Teacher,
    chunked_loss,
)
from robust_ft.objectives.chunked_loss import unchunked_statistics

VOCAB = 300  # three chunks of at least 128 tokens
SMOOTHING, Z_LOSS, TAU, TOP = 0.1, 1e-2, 4.0, 7
OBJECTIVES = {
    "anchor": KlAnchor(0.3, CrossEntropy(SMOOTHING, Z_LOSS)),
    "asft": KlAnchor(0.05, CrossEntropy(token_weights=Dft())),
    "dft": CrossEntropy(SMOOTHING, Z_LOSS, Dft()),
    "eaft": CrossEntropy(token_weights=Eaft(TOP, scale=1.5)),
    "flow": CrossEntropy(token_weights=Flow(TAU)),
    "stm": CrossEntropy(0.0, Z_LOSS, Stm(perplexity=300.0)),
    "cocktail": Cocktail(0.25, 2.0, CrossEntropy(token_weights=Eaft(TOP))),
}


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def weight_of(rule, p, p0, target, example_loss):
    """Returns a token's weight, from the probabilities of the model and the pretrained one."""
    match rule:
        case None:
            return 1.0
        case Dft():
            return p[target]
        case Eaft(top, scale):
            largest = np.sort(p)[-top:]
            largest = largest / largest.sum()
            return min(-np.sum(largest * np.log(largest)) / scale, 1.0)
        case Flow(tau):
            return np.exp(-example_loss / tau)
        case Stm(perplexity):
            return float(1 / p0[target] <= perplexity)


def expected(objective, batch, logits, taught):
    """Returns (loss, weight, gradient by the logits) of an objective, token by token in float64."""
    rule_of = getattr(objective, "cross_entropy", objective)
    own, soft, temperature = 1.0, 0.0, 1.0
    if isinstance(objective, KlAnchor):
        soft = objective.weight
    if isinstance(objective, Cocktail):
        soft, temperature = objective.teacher_weight, objective.temperature
        own = 1 - soft
    rule, smoothing = rule_of.token_weights, rule_of.label_smoothing
    loss, total, gradient = 0.0, 0.0, np.zeros_like(logits)
    for row in range(len(logits)):
        counted = np.flatnonzero(batch["decoder_loss_weights"][row])
        targets = batch["decoder_target_tokens"][row]
        p, p0 = softmax(logits[row]), softmax(taught[row])
        example_loss = np.mean([-np.log(p0[t, targets[t]]) for t in counted])
        for t in counted:
            weight = weight_of(rule, p[t], p0[t], targets[t], example_loss)
            if isinstance(rule, Stm) and not weight:
                continue
            q = np.full(VOCAB, smoothing / (VOCAB - 1))
            q[targets[t]] = 1 - smoothing
            log_z = np.log(np.exp(logits[row, t]).sum())
            hard = np.sum(q[q > 0] * np.log(q[q > 0] / p[t][q > 0]))
            hot, hot0 = softmax(logits[row, t] / temperature), softmax(taught[row, t] / temperature)
            divergence = temperature**2 * np.sum(hot0 * np.log(hot0 / hot))
            loss += own * weight * hard + soft * divergence + rule_of.z_loss * log_z**2
            total += 1.0
            gradient[row, t] = (
                own * weight * (p[t] - q)
                + soft * temperature * (hot - hot0)
                + 2 * rule_of.z_loss * log_z * p[t]
            )
    return loss, total, gradient


@dataclasses.dataclass(frozen=True)
class HeadAlone(Model):
    """A model whose hidden states are parameters: all that a loss needs, cheap to compile."""

    def hidden(self, params, batch, rng=None):
        return params["hidden"]

    def head_params(self, params):
        return {"kernel": params["kernel"]}

    def head(self, params, hidden, rng=None):
        return hidden @ params["kernel"]

    def logits(self, params, batch, rng=None):
        return self.head(params, self.hidden(params, batch))

    def logical_axes(self):
        return {"kernel": ("embed", "vocab")}

    def draw(self, seed):
        rng = np.random.default_rng(seed)
        shape = batch_of()["decoder_target_tokens"].shape
        hidden, kernel = rng.normal(size=(*shape, 5)), rng.normal(size=(5, VOCAB)) / 2
        return {"hidden": jnp.asarray(hidden, "float32"), "kernel": jnp.asarray(kernel, "float32")}


@functools.cache
def models(family):
    """Returns (student, its parameters, the pretrained model)."""
    if family == "head":
        model = HeadAlone(tiny_config(vocab_size=VOCAB, emb_dim=5))
        return model, model.draw(0), Teacher(model, model.draw(1))
    model = model_of(family)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=VOCAB))
    return model, params_of(model), Teacher(model, params_of(model, seed=1))


@functools.cache
def of_logits(family):
    """Returns both models' logits in float64, and the student's pullback to its parameters."""
    model, params, teacher = models(family)
    logits, pullback = jax.vjp(jax.jit(lambda params: model.logits(params, batch_of())), params)
    taught = jax.jit(model.logits)(teacher.params, batch_of())
    return np.asarray(logits, np.float64), np.asarray(taught, np.float64), jax.jit(pullback)


def check(family, names, limit, monkeypatch):
    """Compares losses and gradients of objectives with those of float64."""
    monkeypatch.setattr(chunked_loss, "MAX_CHUNK_ELEMENTS", limit)
    batch, (model, params, teacher) = batch_of(), models(family)
    logits, taught, pullback = of_logits(family)

    def losses(params, teacher):
        sums = {n: OBJECTIVES[n](model, params, batch, None, teacher) for n in names}
        return {n: loss for n, (loss, _, _) in sums.items()}, sums

    # One program for all: compiling takes nearly all of the time.
    @jax.jit
    def gradients(params, teacher):
        _, vjp, sums = jax.vjp(lambda params: losses(params, teacher), params, has_aux=True)
        ones = {n: {other: jnp.float32(n == other) for other in names} for n in names}
        return {n: vjp(one)[0] for n, one in ones.items()}, sums

    found, sums = gradients(params, teacher)
    for name in names:
        loss, weight, by_logits = expected(OBJECTIVES[name], batch, logits, taught)
        assert float(sums[name][0]) == pytest.approx(loss, rel=1e-5), name
        assert float(sums[name][1]) == weight > 0, name
        (wanted,) = pullback(jnp.asarray(by_logits, jnp.float32))
        assert_trees_close(found[name], wanted, rtol=1e-5)


LIMITS = pytest.mark.parametrize("limit", [10**9, 2000], ids=["whole", "chunked"])


@LIMITS
def test_losses_and_gradients_are_those_of_float64(limit, monkeypatch):
    check("head", OBJECTIVES, limit, monkeypatch)


@pytest.mark.slow
@LIMITS
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_so_they_are_in_whole_models(family, limit, monkeypatch):
    check(family, ["asft", "eaft"], limit, monkeypatch)


def test_a_mask_leaves_some_tokens_and_not_all():
    logits, taught, _ = of_logits("head")
    _, kept, _ = expected(OBJECTIVES["stm"], batch_of(), logits, taught)
    assert 0 < kept < batch_of()["decoder_loss_weights"].sum()


def test_the_entropy_of_more_tokens_than_there_are_is_that_of_all():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    statistics = unchunked_statistics(logits, jnp.zeros((2, 3), jnp.int32), top=20)
    p = softmax(np.asarray(logits, np.float64))
    np.testing.assert_allclose(statistics.top_entropy, -np.sum(p * np.log(p), -1), rtol=1e-5)
    assert not np.any(unchunked_statistics(logits, jnp.zeros((2, 3), jnp.int32)).top_entropy)


def test_an_example_in_a_packed_row_has_its_own_weight():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, 5, 6)), jnp.float32)
    batch = {
        "decoder_loss_weights": np.array([[1, 1, 1, 1, 0]], np.float32),
        "decoder_segment_ids": np.array([[1, 1, 2, 2, 0]]),
    }
    statistics = unchunked_statistics(logits, jnp.zeros((1, 5), jnp.int32))
    weights = Flow(2.0)(batch, statistics, statistics)
    losses = -np.log(softmax(np.asarray(logits, np.float64))[0, :, 0])
    first, second = np.exp(-losses[:2].mean() / 2), np.exp(-losses[2:4].mean() / 2)
    np.testing.assert_allclose(weights[0, :4], [first, first, second, second], rtol=1e-6)


def test_without_weight_an_anchor_is_cross_entropy():
    objective = KlAnchor(0.0, CrossEntropy(SMOOTHING))
    assert objective.takes_teacher and not objective.needs_teacher
    model, params, _ = models("head")
    found = jax.eval_shape(lambda p: objective(model, p, batch_of(), None), params)
    wanted = jax.eval_shape(lambda p: CrossEntropy()(model, p, batch_of(), None), params)
    assert found[2].keys() == wanted[2].keys()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (KlAnchor(), "KlAnchor needs a teacher; set Stage.teacher='pretrained'"),
        (CrossEntropy(token_weights=Stm()), "Stm needs a teacher"),
        (CrossEntropy(token_weights=Flow(1.0)), "Flow needs a teacher"),
    ],
)
def test_what_compares_with_the_pretrained_model_needs_it(objective, message):
    assert objective.takes_teacher and objective.needs_teacher
    model, params, _ = models("head")
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda p: objective(model, p, batch_of(), None), params)
