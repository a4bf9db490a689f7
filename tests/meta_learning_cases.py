"""Meta-learning by the paper's Algorithms 1 and 2 as loops, and what they are tried on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_models import random_batch, tiny_model

from robust_ft.models.peft import Prefix, Prompt
from robust_ft.objectives.meta_learning import Fomaml, Reptile
from robust_ft.optim import Adafactor, AdamW, Schedule
from robust_ft.trainable import flatten, unflatten

TASKS, ROWS = 4, 4
RULES = {"fomaml": Fomaml, "reptile": Reptile}
PROMPTS = {"shallow": (Prompt(length=3),), "deep": (Prefix(length=2),)}
# The vocabulary makes several chunks of the loss where these are small, on two shards, too.
SIZES = {"num_encoder_layers": 1, "num_decoder_layers": 1, "vocab_size": 512}
RATE = 1e-2


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Plain gradient descent, which the library has not."""

    rate: float

    @property
    def learning_rate(self):
        return Schedule(self.rate)

    def build(self):
        return optax.sgd(self.rate)


OPTIMIZERS = {
    # Ours and Optax's own, with the same settings.
    # A large epsilon: a first step of sign(gradient) would turn rounding into steps.
    "adam": (AdamW(Schedule(RATE), weight_decay=0.0, epsilon=1e-2), optax.adam(RATE, eps=1e-2)),
    "adafactor": (
        Adafactor(Schedule(RATE)),
        optax.adafactor(RATE, min_dim_size_to_factor=128, weight_decay_rate=None),
    ),
    "sgd": (Sgd(0.1), optax.sgd(0.1)),
}


@functools.cache
def model_of(prompt, remat="full", dropout_rate=0.1):
    """Returns a model with a "shallow" or a "deep" prompt."""
    return tiny_model(PROMPTS[prompt], remat=remat, dropout_rate=dropout_rate, **SIZES)


def meta_batch(batches, tasks=TASKS, rows=ROWS):
    """Returns a batch [rows, tasks, batches, ...] and the same as lists: [task][batch]."""
    lists = []
    for task in range(tasks):
        lists.append([])
        for number in range(batches):
            rng = np.random.default_rng([task, number])
            lengths = rng.integers(1, 7, (2, rows))
            lengths[:, 0] = 6  # all batches are padded to one length
            lists[-1].append(
                random_batch(100 * task + number, *map(list, lengths), vocab=SIZES["vocab_size"])
            )
    stacked = {
        name: np.stack([np.stack([b[name] for b in task], 1) for task in lists], 1)
        for name in lists[0][0]
    }
    return stacked, lists


@functools.cache
def mean_gradient_of(prompt):
    """Returns a function from parameters, a batch and a key to the mean loss and its gradient.

    It neither recomputes layers nor divides the vocabulary.
    """
    model = model_of(prompt, remat="none")

    def mean(params, batch, key):
        log_probs = jax.nn.log_softmax(model.logits(params, batch, key))
        picked = jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], -1)
        weights = batch["decoder_loss_weights"]
        return -(picked[..., 0] * weights).sum() / weights.sum()

    return jax.jit(jax.value_and_grad(mean))


class Reference:
    """A loop over tasks and over steps, with Optax's own optimizer.

    Dropout has a key for each task, of which one half is the query's and the other is split over
    the steps of the inner loop.
    """

    def __init__(self, prompt, optimizer, reptile):
        self.optimizer, self.reptile = OPTIMIZERS[optimizer][1], reptile
        self.gradient = mean_gradient_of(prompt)
        self.tuned = sorted(Fomaml().paths(model_of(prompt)))
        self.states = None

    def mean_gradient(self, params, batch, key):
        loss, gradient = self.gradient(unflatten(params), batch, key)
        return float(loss), flatten(gradient)

    def step(self, params, gradient, kind, names):
        part = {name: params[name] for name in names}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, self.states[kind] = self.optimizer.update(
                {name: gradient[name] for name in names}, self.states[kind], part
            )
        return params | {name: part[name] + updates[name] for name in names}

    def __call__(self, params, lists, key, carries=False):
        """Returns the meta-gradient, a mean over tasks, and the mean loss of the queries."""
        start = flatten(params)
        parts = {"prompt": self.tuned, "rest": sorted(set(start) - set(self.tuned))}
        total, losses = {name: np.zeros(x.shape) for name, x in start.items()}, []
        for number, (*support, query) in enumerate(lists):
            if self.states is None or not carries:
                self.states = {
                    kind: self.optimizer.init({n: start[n] for n in names})
                    for kind, names in parts.items()
                }
            inner_key, query_key = jax.random.split(jax.random.fold_in(key, number))
            now = dict(start)
            keys = jax.random.split(inner_key, len(support))
            for batch, step_key in zip(support, keys, strict=True):
                _, gradient = self.mean_gradient(now, batch, step_key)
                now = self.step(now, gradient, "prompt", self.tuned)
            loss, gradient = self.mean_gradient(now, query, query_key)
            losses.append(loss)
            if self.reptile:
                for kind, names in parts.items():
                    now = self.step(now, gradient, kind, names)
                gradient = {name: start[name] - now[name] for name in start}
            for name, leaf in gradient.items():
                total[name] += np.asarray(leaf, np.float64) / len(lists)
        return total, float(np.mean(losses))


def assert_gradient(found, expected):
    """Checks {path: array} at the tolerance of all comparisons with `Reference`."""
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-5, err_msg=path)
