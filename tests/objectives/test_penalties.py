"""Penalties and the Fisher information against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from tiny_families import batch_of, model_of, params_of
from tiny_models import random_batch, random_params, tiny_model

from robust_ft import stage_anchor
from robust_ft.errors import UserError
from robust_ft.models.peft import Lora
from robust_ft.objectives import L2SP, CrossEntropy, Ewc, Fisher
from robust_ft.objectives.penalties import Anchor
from robust_ft.optim import AdamW, Schedule
from robust_ft.partitioning import Partitioner
from robust_ft.train_step import init_state, make_train_step
from robust_ft.trainable import flatten, split, unflatten

FISHER = Fisher(data=toy.DATA, examples=8)
HEAD = "decoder/logits_dense/kernel"


def drawn(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"a/kernel": (3, 4), "b/scale": (5,)}
    return {path: rng.normal(size=shape).astype(dtype) for path, shape in shapes.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weighted", [False, True], ids=["L2-SP", "EWC"])
def test_value_and_gradient(weighted, dtype):
    now, start = (
        {path: jnp.asarray(x, dtype) for path, x in drawn(seed).items()} for seed in (0, 1)
    )
    fisher = {path: np.square(x) for path, x in drawn(2).items()} if weighted else None
    penalty = Ewc(weight=0.3, fisher=FISHER) if weighted else L2SP(weight=0.3)
    own = {"c/prompt": jnp.ones(2)}  # of a PEFT method: not penalized
    anchor = Anchor(unflatten(start), unflatten(fisher) if weighted else None)
    value, gradient = penalty(unflatten(now | own), anchor)
    gradient = flatten(gradient)
    expected = 0.0
    for path, leaf in now.items():
        moved = np.asarray(leaf, np.float64) - np.asarray(start[path], np.float64)
        factor = 0.3 * (np.asarray(fisher[path], np.float64) if weighted else 1.0)
        expected += 0.5 * np.sum(factor * moved**2)
        assert gradient[path].dtype == jnp.float32
        np.testing.assert_allclose(gradient[path], factor * moved, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert not np.any(gradient["c/prompt"])
    differentiated = jax.grad(lambda p: penalty(p, anchor)[0])(unflatten(drawn(0)))
    closed = penalty(unflatten(drawn(0)), anchor)[1]
    for path, leaf in flatten(differentiated).items():
        np.testing.assert_allclose(flatten(closed)[path], leaf, rtol=1e-5, atol=1e-6)


def test_the_step_adds_the_gradient_to_that_of_the_mean_loss():
    """With momentum alone in the first moment, Adam's state shows the gradient."""
    model = tiny_model(num_encoder_layers=1, num_decoder_layers=1)
    trained, frozen = split(random_params(model), frozenset([HEAD]))
    optimizer = AdamW(Schedule(0.0), beta1=0.0)
    batch = random_batch(1, [4, 6], [5, 3])
    origin = {HEAD: flatten(random_params(model, seed=1))[HEAD]}
    found = {}
    for penalty in (None, L2SP(weight=0.2)):
        step = jax.jit(make_train_step(model, CrossEntropy(), optimizer, penalty=penalty))
        anchor = Anchor(unflatten(origin)) if penalty else None
        state = init_state(optimizer, trained)
        state, sums = step(state, frozen, None, batch, jax.random.key(0), anchor)
        found[penalty is None] = flatten(state.opt_state[0].mu)[HEAD], sums
    moved = np.asarray(flatten(trained)[HEAD], np.float64) - np.asarray(origin[HEAD], np.float64)
    (plain, plain_sums), (held, sums) = found[True], found[False]
    np.testing.assert_allclose(held - plain, 0.2 * moved, rtol=0, atol=1e-5)
    assert sums["loss"] == plain_sums["loss"] and "penalty" not in plain_sums
    penalty = sums["penalty"] / sums["weight"]
    np.testing.assert_allclose(penalty, 0.1 * np.sum(moved**2), rtol=1e-5)


class Rows:
    """Batches of one row each."""

    def __init__(self, batch):
        self.rows = iter(range(len(batch["decoder_target_tokens"])))
        self.batch = batch

    def __next__(self):
        row = next(self.rows)
        return {name: x[row : row + 1] for name, x in self.batch.items()}


@pytest.mark.parametrize("family", [pytest.param("t5", marks=pytest.mark.slow), "llama"])
def test_the_fisher_information_of_a_head_in_closed_form(family):
    """d log p(y) / d W = sum_t h_t (1[y_t] - p_t)^T at the target positions of one example."""
    model = model_of(family)
    params, batch = params_of(model), batch_of()
    trained, frozen = split(params, frozenset([HEAD]))
    found = stage_anchor.fisher_information(
        model, trained, frozen, Rows(batch), len(batch["decoder_target_tokens"]), Partitioner()
    )
    hidden = np.asarray(jax.jit(model.hidden)(params, batch), np.float64)
    logits = hidden @ np.asarray(flatten(params)[HEAD], np.float64)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    missing = np.eye(probs.shape[-1])[batch["decoder_target_tokens"]] - probs
    missing *= batch["decoder_loss_weights"][..., None]
    gradients = np.einsum("bte,btv->bev", hidden, missing)  # of each example
    expected = np.mean(gradients**2, axis=0)
    np.testing.assert_allclose(flatten(found)[HEAD], expected, rtol=1e-4, atol=1e-5)
    assert expected.max() > 0.1


def checked(**changes):
    stage_anchor.check(toy.stage(**{"model": toy.PLAIN, "trainable": ["base"]} | changes))


def test_what_a_penalty_needs():
    for penalty in (L2SP(weight=1.0), Ewc(weight=1.0, fisher=FISHER)):
        checked(penalty=penalty)
        with pytest.raises(UserError, match=r"Stage.penalty=\w+ of stage 'model' holds .*none of"):
            model = dataclasses.replace(toy.PLAIN, peft=(Lora(rank=2),))
            checked(penalty=penalty, model=model, trainable=["peft"])
    long = dataclasses.replace(toy.DATA, vocabulary=type(toy.DATA.vocabulary)(extra_ids=9))
    with pytest.raises(UserError, match=r"Fisher.data of stage 'model' has another vocabulary"):
        checked(penalty=Ewc(weight=1.0, fisher=Fisher(data=long)))
