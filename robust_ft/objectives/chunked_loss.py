"""What losses ask of logits at each target position, without all logits in memory at once.

A vocabulary of 250,112 tokens makes 8 GB of float32 logits out of 64 x 128 target positions, and
their gradient is as large. Here the head computes the logits of one block of the vocabulary after
the other, and the backward pass computes each block again: one matrix product more.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from robust_ft.models.model import Model
from robust_ft.objectives.vocab_chunks import Block, Blocks, Values, vocab_axes
from robust_ft.trainable import flatten, unflatten
from robust_ft.types import Batch, Params

# Logits of one model that a device computes at once, or weights that it gathers for them: 256 MB in
# float32. Blocks of this size keep a device busy; what stays below would only be slower in blocks.
MAX_NUMBERS = 2**26


class Statistics(NamedTuple):
    """What losses know of the logits at each target position; float32.

    Attributes:
        log_z: The logarithm of the sum of their exponentials.
        target: The target token's.
        total: Their sum.
        top: The largest. It has no gradient.
        divergence: KL(teacher || student), 0 without a teacher. Only the student has a gradient.
    """

    log_z: Float[Array, "batch target"]
    target: Float[Array, "batch target"]
    total: Float[Array, "batch target"]
    top: Float[Array, "batch target"]
    divergence: Float[Array, "batch target"]


class Side(NamedTuple):
    """One model's part in a loss.

    Attributes:
        hidden: What its head reads.
        head: The head's parameters (`Model.head_params`).
        rng: For dropout in the head, if any.
    """

    hidden: Float[Array, "batch target embed"]
    head: Params
    rng: jax.Array | None = None


class Setting(NamedTuple):
    """What is known when a loss is compiled.

    Attributes:
        blocks: How the vocabulary is divided.
        model: The student.
        teacher: The teacher's model, if there is one.
        temperature: What logits are divided by before the divergence is taken.
    """

    blocks: Blocks
    model: Model
    teacher: Model | None = None
    temperature: float = 1.0

    @property
    def softmaxes(self) -> tuple[str, ...]:
        """Names of the softmaxes that there are, see `_exponents`."""
        if self.teacher is None:
            return ("student",)
        return ("student", "teacher") if self.temperature == 1 else ("student", "warm", "teacher")


def statistics(
    model: Model,
    params: Params,
    batch: Batch,
    rng: jax.Array | None,
    teacher: tuple[Model, Params] | None = None,
    temperature: float = 1.0,
) -> Statistics:
    """Returns the statistics of a batch's target positions, in blocks where these save memory.

    Args:
        model: The student.
        params: All of its parameters.
        batch: Has `decoder_target_tokens`.
        rng: A key for the student's dropout, or None for none.
        teacher: A model over the same vocabulary and all of its parameters, which have no gradient.
        temperature: What both models' logits are divided by before the divergence is taken.
    """
    targets = batch["decoder_target_tokens"]
    rows, length = targets.shape
    config = model.config
    blocks = Blocks.holding(MAX_NUMBERS, rows, length, config.vocab_size, config.emb_dim)
    tutor, tutor_params = teacher or (None, {})
    tutor_params = jax.lax.stop_gradient(tutor_params)
    if blocks.count == 1:
        logits = model.logits(params, batch, rng)
        taught = None if tutor is None else tutor.logits(tutor_params, batch)
        return plain(logits, targets, taught, temperature)
    student = Side(model.hidden(params, batch, rng), model.head_params(params), rng)
    setting = Setting(blocks, model, tutor, temperature)
    if tutor is None:
        return blocked(setting, student, None, targets)
    hidden = tutor.hidden(tutor_params, batch)
    return blocked(setting, student, Side(hidden, tutor.head_params(tutor_params)), targets)


def plain(
    logits: Float[Array, "*rest vocab"],
    targets: Int[Array, "*rest"],
    teacher: Float[Array, "*rest vocab"] | None = None,
    temperature: float = 1.0,
) -> Statistics:
    """Returns the statistics of logits, and of a teacher's, that are all in memory."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    divergence = jnp.zeros_like(log_z)
    if teacher is not None:
        log_p = jax.nn.log_softmax(teacher / temperature)
        log_q = jax.nn.log_softmax(logits / temperature)
        divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return Statistics(
        log_z,
        jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0],
        jnp.sum(logits, axis=-1),
        jnp.max(jax.lax.stop_gradient(logits), axis=-1),
        divergence,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked(
    setting: Setting, student: Side, teacher: Side | None, targets: Int[Array, "batch target"]
) -> Statistics:
    """Returns what `plain` does for all of the heads' logits, which are never there at once.

    Args:
        setting: Models and blocks.
        student: It alone has a gradient; parameters of its head that do not train have none.
        teacher: As in `setting`.
        targets: The tokens that `Statistics.target` is about.
    """
    return _forward(setting, student, teacher, targets)[0]


class _Softmax(NamedTuple):
    """A sum of exponentials over the blocks so far, of each part of the vocabulary.

    Attributes:
        top: The largest exponent.
        mass: The sum, divided by exp(top).
        mean: The sum of exponentials times factors, divided by exp(top).
    """

    top: Float[Array, "batch target parts"]
    mass: Float[Array, "batch target parts"]
    mean: Float[Array, "batch target parts"]

    def seen(self, exponents: Values, factors: Values | None) -> "_Softmax":
        top = jnp.maximum(self.top, jnp.max(exponents, axis=-1))
        before = jnp.exp(self.top - top)
        terms = jnp.exp(exponents - top[..., None])
        mass = self.mass * before + jnp.sum(terms, axis=-1)
        mean = self.mean
        if factors is not None:
            mean = mean * before + jnp.sum(terms * factors, axis=-1)
        return _Softmax(top, mass, mean)

    def log_z(self) -> Float[Array, "batch target"]:
        return jax.nn.logsumexp(self.top + jnp.log(self.mass), axis=-1)

    def expectation(self) -> Float[Array, "batch target"]:
        """Returns the factors' mean, weighted by the exponentials."""
        shares = jax.nn.softmax(self.top + jnp.log(self.mass), axis=-1)
        return jnp.sum(shares * self.mean / self.mass, axis=-1)


class _Seen(NamedTuple):
    """What the forward pass carries from block to block, of each part of the vocabulary.

    Attributes:
        softmax: By name. The teacher's factors are its exponents minus the student's.
        target: As in `Statistics`.
        total: As in `Statistics`.
    """

    softmax: dict[str, _Softmax]
    target: Float[Array, "batch target parts"]
    total: Float[Array, "batch target parts"]


def _forward(
    setting: Setting, student: Side, teacher: Side | None, targets: Int[Array, "batch target"]
) -> tuple[Statistics, dict[str, Float[Array, "batch target"]]]:
    """Returns the statistics, and log_z of each softmax."""
    blocks = setting.blocks

    def body(turn: Int[Array, ""], seen: _Seen) -> _Seen:
        block = blocks.at(turn)
        logits = _logits(setting.model, block, student)
        exponents = _exponents(setting, block, logits, teacher)
        softmax = {
            name: seen.softmax[name].seen(
                jnp.where(block.fresh, values, -jnp.inf),
                values - exponents.get("warm", logits) if name == "teacher" else None,
            )
            for name, values in exponents.items()
        }
        return _Seen(
            softmax,
            seen.target + jnp.sum(jnp.where(block.holds(targets), logits, 0.0), axis=-1),
            seen.total + jnp.sum(jnp.where(block.fresh, logits, 0.0), axis=-1),
        )

    shape = (*targets.shape, blocks.parts)
    zeros = jnp.zeros(shape)
    nothing = _Softmax(jnp.full(shape, -jnp.inf), zeros, zeros)
    start = _Seen(dict.fromkeys(setting.softmaxes, nothing), zeros, zeros)
    seen = jax.lax.fori_loop(0, blocks.count, body, start)
    log_z = {name: softmax.log_z() for name, softmax in seen.softmax.items()}
    divergence = jnp.zeros(targets.shape)
    if "teacher" in log_z:
        # sum_v p_v (log p_v - log q_v), where both logarithms are exponents minus their log_z.
        differences = seen.softmax["teacher"].expectation()
        divergence = differences - log_z["teacher"] + log_z.get("warm", log_z["student"])
    found = Statistics(
        log_z["student"],
        jnp.sum(seen.target, axis=-1),
        jnp.sum(seen.total, axis=-1),
        jnp.max(seen.softmax["student"].top, axis=-1),
        divergence,
    )
    return found, log_z


def _logits(model: Model, block: Block, side: Side) -> Values:
    axes = vocab_axes(model)
    taken = {path: block.take(leaf, axes[path]) for path, leaf in flatten(side.head).items()}
    return block.logits(model, side.hidden, taken, side.rng)


def _exponents(
    setting: Setting, block: Block, logits: Values, teacher: Side | None
) -> dict[str, Values]:
    """Returns the exponents of a block in each softmax.

    Those of "student" are its logits; those of "teacher" and, unless they are the same as
    "student", "warm" are the teacher's and the student's logits divided by the temperature.
    """
    exponents = {"student": logits}
    if teacher is not None and setting.teacher is not None:
        exponents["warm"] = logits / setting.temperature
        exponents["teacher"] = _logits(setting.teacher, block, teacher) / setting.temperature
    return {name: exponents[name] for name in setting.softmaxes}


class _Kept(NamedTuple):
    """What the backward pass reads.

    Attributes:
        moving: What has a gradient, by path: parameters of the student's head that train, and its
            hidden states as "hidden".
        still: The student's other ones.
        rng: The student's.
        teacher: The teacher's part.
        targets: The target tokens.
        log_z: Of each softmax.
    """

    moving: dict[str, jax.Array]
    still: dict[str, jax.Array]
    rng: jax.Array | None
    teacher: Side | None
    targets: Int[Array, "batch target"]
    log_z: dict[str, Float[Array, "batch target"]]


def _forward_rule(setting: Setting, *inputs: Any) -> tuple[Statistics, _Kept]:
    # Every leaf comes as a CustomVJPPrimal, which says whether anything is differentiated by it.
    student, teacher, targets = jax.tree.map(
        lambda leaf: leaf.value, inputs, is_leaf=lambda x: isinstance(x, CustomVJPPrimal)
    )
    leaves = {"hidden": inputs[0].hidden, **flatten(inputs[0].head)}
    moving = {path: leaf.value for path, leaf in leaves.items() if leaf.perturbed}
    still = {path: leaf.value for path, leaf in leaves.items() if not leaf.perturbed}
    found, log_z = _forward(setting, student, teacher, targets)
    return found, _Kept(moving, still, student.rng, teacher, targets, log_z)


def _backward_rule(setting: Setting, kept: _Kept, gradient: Statistics) -> tuple[Side, None, None]:
    blocks, axes = setting.blocks, {"hidden": None, **vocab_axes(setting.model)}

    def body(turn: Int[Array, ""], sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        block = blocks.at(turn)
        moving, still = (
            {path: block.take(leaf, axes[path]) for path, leaf in leaves.items()}
            for leaves in (kept.moving, kept.still)
        )

        def logits_of(moving: dict[str, jax.Array]) -> Values:
            head = moving | still
            return block.logits(setting.model, head.pop("hidden"), head, kept.rng)

        logits, pull = jax.vjp(logits_of, moving)
        (found,) = pull(_logits_gradient(setting, block, logits, kept, gradient))
        return {path: block.add(sums[path], found[path], axes[path]) for path in sums}

    sums = {path: blocks.zeros(leaf, axes[path]) for path, leaf in kept.moving.items()}
    sums = jax.lax.fori_loop(0, blocks.count, body, sums)
    found: dict[str, Any] = dict.fromkeys(kept.still) | {
        path: sums[path].reshape(leaf.shape).astype(leaf.dtype)
        for path, leaf in kept.moving.items()
    }
    return Side(found.pop("hidden"), unflatten(found)), None, None


blocked.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _logits_gradient(
    setting: Setting, block: Block, logits: Values, kept: _Kept, gradient: Statistics
) -> Values:
    """Returns the loss's gradient by a block's logits, from that by the statistics."""
    exponents = _exponents(setting, block, logits, kept.teacher)
    softmax = {
        name: jnp.exp(values - kept.log_z[name][..., None, None])
        for name, values in exponents.items()
    }
    by_logits = {
        "log_z": softmax["student"],
        "target": block.holds(kept.targets),
        "total": jnp.ones_like(logits),
    }
    if "teacher" in softmax:
        difference = softmax.get("warm", softmax["student"]) - softmax["teacher"]
        by_logits["divergence"] = difference / setting.temperature
    total = jnp.zeros_like(logits)
    for name, factor in by_logits.items():
        by_statistic = getattr(gradient, name)
        if not isinstance(by_statistic, SymbolicZero):
            total += by_statistic[..., None, None] * factor
    return jnp.where(block.fresh, total, 0.0)
