"""Chunked (fused linear) cross-entropy: what losses read of logits that are never all in memory.

A vocabulary of 250,112 tokens makes 8 GB of float32 logits out of 64 x 128 target positions, and
their gradient is as large. Here the output head computes the logits of one chunk of the vocabulary
after the other, reduced at once by an online softmax. The backward pass computes each chunk's
logits again, which costs one matrix product more.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Float, Int

from robust_ft.models.model import Model
from robust_ft.objectives.base import Teacher
from robust_ft.objectives.vocab_chunks import Chunk, ChunkValues, VocabChunks, vocab_axes
from robust_ft.partitioning import locally, shards
from robust_ft.trainable import flatten, unflatten
from robust_ft.types import Batch, Params

# The most logits of one model that a device computes at once, or head weights that it gathers for
# them: 256 MB in float32. Chunks of this size keep a device busy, and smaller ones are slower.
MAX_CHUNK_ELEMENTS = 2**26


class LogitStatistics(NamedTuple):
    """What losses read of the logits at each target position; float32.

    Attributes:
        log_z: The logsumexp of the logits.
        target_logit: The target token's logit.
        logit_sum: The sum of the logits, for label smoothing.
        max_logit: The largest logit. It has no gradient.
        kl: KL(teacher || student), 0 without a teacher. Only the student has a gradient.
        top_entropy: The entropy of the softmax over the largest logits, 0 if none are asked for. It
            has no gradient.
    """

    log_z: Float[Array, "*positions"]
    target_logit: Float[Array, "*positions"]
    logit_sum: Float[Array, "*positions"]
    max_logit: Float[Array, "*positions"]
    kl: Float[Array, "*positions"]
    top_entropy: Float[Array, "*positions"]


class HeadInputs(NamedTuple):
    """The inputs of one model's output head.

    Attributes:
        hidden: The hidden states.
        params: The head's parameters (`Model.head_params`).
        rng: For dropout in the head, if any.
    """

    hidden: Float[Array, "batch target embed"]
    params: Params
    rng: jax.Array | None = None


class LossSpec(NamedTuple):
    """The static arguments of a chunked loss.

    Attributes:
        chunks: The division of the vocabulary.
        student: The student's model.
        teacher: The teacher's model, if there is one.
        temperature: Divides the logits of both models in the KL divergence.
        top: Number of largest logits for `LogitStatistics.top_entropy`.
    """

    chunks: VocabChunks
    student: Model
    teacher: Model | None = None
    temperature: float = 1.0
    top: int = 0

    @property
    def softmaxes(self) -> tuple[str, ...]:
        """The names of the softmaxes that the loss needs, see `_softmax_logits`."""
        if self.teacher is None:
            return ("student",)
        # At temperature 1 the student's two softmaxes are the same.
        tempered = () if self.temperature == 1 else ("tempered_student",)
        return ("student", *tempered, "teacher")


def logit_statistics(
    model: Model,
    params: Params,
    batch: Batch,
    rng: jax.Array | None,
    teacher: Teacher | None = None,
    temperature: float = 1.0,
    top: int = 0,
) -> LogitStatistics:
    """Returns the statistics at a batch's target positions, chunked where that saves memory.

    Args:
        model: The student.
        params: All of the student's parameters.
        batch: Has `decoder_target_tokens` [batch, target].
        rng: A key for the student's dropout, or None for none.
        teacher: A model over the same vocabulary. Its parameters get no gradient.
        temperature: Divides the logits of both models in the KL divergence.
        top: Number of largest logits for `LogitStatistics.top_entropy`; 0 leaves it out.
    """
    targets = jnp.asarray(batch["decoder_target_tokens"])  # JAX, as custom_vjp needs
    rows, length = targets.shape
    config = model.config
    chunks = VocabChunks.fitting(
        MAX_CHUNK_ELEMENTS, rows, length, config.vocab_size, config.emb_dim
    )
    teacher = jax.lax.stop_gradient(teacher)
    if chunks.count == 1:
        logits = model.logits(params, batch, rng)
        teacher_logits = None if teacher is None else teacher.model.logits(teacher.params, batch)
        return unchunked_statistics(logits, targets, teacher_logits, temperature, top)
    student = HeadInputs(model.hidden(params, batch, rng), model.head_params(params), rng)
    if teacher is None:
        return chunked_statistics(LossSpec(chunks, model, top=top), student, None, targets)
    teacher_inputs = HeadInputs(
        teacher.model.hidden(teacher.params, batch), teacher.model.head_params(teacher.params)
    )
    spec = LossSpec(chunks, model, teacher.model, temperature, top)
    return chunked_statistics(spec, student, teacher_inputs, targets)


def unchunked_statistics(
    logits: Float[Array, "*positions vocab"],
    targets: Int[Array, "*positions"],
    teacher_logits: Float[Array, "*positions vocab"] | None = None,
    temperature: float = 1.0,
    top: int = 0,
) -> LogitStatistics:
    """Returns the statistics of logits that are all in memory."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    kl = jnp.zeros_like(log_z)
    if teacher_logits is not None:
        log_p = jax.nn.log_softmax(teacher_logits / temperature)
        log_q = jax.nn.log_softmax(logits / temperature)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    stopped = jax.lax.stop_gradient(logits)
    in_shards = stopped.reshape(*log_z.shape, *shards("vocab"), -1)
    return LogitStatistics(
        log_z=log_z,
        target_logit=jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0],
        logit_sum=jnp.sum(logits, axis=-1),
        max_logit=jnp.max(stopped, axis=-1),
        kl=kl,
        top_entropy=_top_entropy(in_shards, top),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_statistics(
    spec: LossSpec,
    student: HeadInputs,
    teacher: HeadInputs | None,
    targets: Int[Array, "batch target"],
) -> LogitStatistics:
    """Returns what `unchunked_statistics` does for the heads' logits, without holding them all.

    Args:
        spec: Models and chunks.
        student: It alone has a gradient; frozen parameters of its head cost none.
        teacher: The teacher's, if `spec` has a teacher.
        targets: The target tokens.
    """
    return _forward(spec, student, teacher, targets)[0]


class _OnlineSoftmax(NamedTuple):
    """A softmax over the chunks so far, for each shard of the vocabulary.

    Like FlashAttention's (Milakov and Gimelshein, 2018): sums of exponentials are kept relative to
    the largest logit so far, and rescaled when a larger one comes.

    Attributes:
        max: The largest logit.
        sum_exp: sum_v exp(logit_v - max).
        weighted_sum: sum_v exp(logit_v - max) * value_v, for the mean of `update`'s values.
    """

    max: Float[Array, "batch target shards"]
    sum_exp: Float[Array, "batch target shards"]
    weighted_sum: Float[Array, "batch target shards"]

    def update(self, logits: ChunkValues, values: ChunkValues | None) -> "_OnlineSoftmax":
        new_max = jnp.maximum(self.max, jnp.max(logits, axis=-1))
        rescale = jnp.exp(self.max - new_max)
        exp = jnp.exp(logits - new_max[..., None])
        sum_exp = self.sum_exp * rescale + jnp.sum(exp, axis=-1)
        weighted_sum = self.weighted_sum
        if values is not None:
            weighted_sum = weighted_sum * rescale + jnp.sum(exp * values, axis=-1)
        return _OnlineSoftmax(new_max, sum_exp, weighted_sum)

    def log_z(self) -> Float[Array, "batch target"]:
        return jax.nn.logsumexp(self.max + jnp.log(self.sum_exp), axis=-1)

    def mean(self) -> Float[Array, "batch target"]:
        """Returns the mean of the values under the softmax."""
        shard_probs = jax.nn.softmax(self.max + jnp.log(self.sum_exp), axis=-1)
        return jnp.sum(shard_probs * self.weighted_sum / self.sum_exp, axis=-1)


class _Carry(NamedTuple):
    """What the forward pass carries from chunk to chunk.

    Shards of the vocabulary are summed only after the last chunk: one collective instead of one
    for each chunk.

    Attributes:
        softmaxes: By name. The teacher's values are its logits minus the student's.
        target_logit: 0 until the target's chunk was seen.
        logit_sum: Of the chunks so far.
        largest: The largest logits so far.
    """

    softmaxes: dict[str, _OnlineSoftmax]
    target_logit: Float[Array, "batch target shards"]
    logit_sum: Float[Array, "batch target shards"]
    largest: Float[Array, "batch target shards top"]


def _forward(
    spec: LossSpec,
    student: HeadInputs,
    teacher: HeadInputs | None,
    targets: Int[Array, "batch target"],
) -> tuple[LogitStatistics, dict[str, Float[Array, "batch target"]]]:
    """Returns the statistics, and each softmax's log_z."""

    def body(index: Int[Array, ""], carry: _Carry) -> _Carry:
        chunk = spec.chunks.chunk(index)
        is_new = chunk.is_new[None, None, None]  # [1, 1, 1, width]
        logits = _chunk_logits(spec.student, chunk, student)  # [batch, target, shards, width]
        softmax_logits = _softmax_logits(spec, chunk, logits, teacher)
        softmaxes = {
            name: carry.softmaxes[name].update(
                jnp.where(is_new, values, -jnp.inf),
                values - softmax_logits.get("tempered_student", logits)
                if name == "teacher"
                else None,
            )
            for name, values in softmax_logits.items()
        }
        target_logit = jnp.where(chunk.is_target(targets), logits, 0.0)
        largest = carry.largest
        if spec.top:
            new = _largest(jnp.where(is_new, logits, -jnp.inf), spec.top)
            largest = _largest(jnp.concatenate([largest, new], axis=-1), spec.top)
        return _Carry(
            softmaxes,
            carry.target_logit + jnp.sum(target_logit, axis=-1),
            carry.logit_sum + jnp.sum(jnp.where(is_new, logits, 0.0), axis=-1),
            largest,
        )

    shape = (*targets.shape, spec.chunks.shards)
    zeros = jnp.zeros(shape)
    empty = _OnlineSoftmax(jnp.full(shape, -jnp.inf), zeros, zeros)
    least = jnp.full((*shape, spec.top), -jnp.inf)
    carry = _Carry(dict.fromkeys(spec.softmaxes, empty), zeros, zeros, least)
    carry = jax.lax.fori_loop(0, spec.chunks.count, body, carry)
    log_z = {name: softmax.log_z() for name, softmax in carry.softmaxes.items()}
    kl = jnp.zeros(targets.shape)
    if "teacher" in log_z:
        # sum_v p_v (log p_v - log q_v), where either log-probability is a logit minus its log_z.
        mean_difference = carry.softmaxes["teacher"].mean()
        kl = mean_difference - log_z["teacher"] + log_z.get("tempered_student", log_z["student"])
    statistics = LogitStatistics(
        log_z=log_z["student"],
        target_logit=jnp.sum(carry.target_logit, axis=-1),
        logit_sum=jnp.sum(carry.logit_sum, axis=-1),
        max_logit=jnp.max(carry.softmaxes["student"].max, axis=-1),
        kl=kl,
        top_entropy=_top_entropy(carry.largest, spec.top),
    )
    return statistics, log_z


def _top_entropy(
    logits: Float[Array, "*positions shards width"], count: int
) -> Float[Array, "*positions"]:
    """Returns the entropy of the softmax over the largest logits in nats, 0 over none.

    Logits of -inf do not count.
    """
    if not count:
        return jnp.zeros(logits.shape[:-2])
    of_shards = _largest(logits, count)
    logits = _largest(of_shards.reshape(*of_shards.shape[:-2], -1), count)
    log_p = jax.nn.log_softmax(logits, axis=-1)  # [*positions, count]
    p = jnp.exp(log_p)
    return -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)


def _largest(logits: Float[Array, "*rest width"], count: int) -> Float[Array, "*rest largest"]:
    """Returns the largest logits along the last axis, all of them if there are fewer."""

    def largest(logits: jax.Array) -> jax.Array:
        return jax.lax.top_k(logits, min(count, logits.shape[-1]))[0]

    axes = ("batch", "length", "vocab", None) if logits.ndim == 4 else ("batch", "length", None)
    return locally(largest, axes)(logits)  # the compiler would gather all logits


def _chunk_logits(model: Model, chunk: Chunk, inputs: HeadInputs) -> ChunkValues:
    axes = vocab_axes(model)
    params = flatten(inputs.params)
    head = {path: chunk.slice(param, axes[path]) for path, param in params.items()}
    return chunk.logits(model, inputs.hidden, head, inputs.rng)


def _softmax_logits(
    spec: LossSpec, chunk: Chunk, logits: ChunkValues, teacher: HeadInputs | None
) -> dict[str, ChunkValues]:
    """Returns a chunk's logits in each softmax.

    "student" has the student's logits. "teacher" and "tempered_student" have both models' logits
    divided by the temperature; the latter is left out where it would be the same as "student".
    """
    softmax_logits = {"student": logits}
    if teacher is not None and spec.teacher is not None:
        softmax_logits["tempered_student"] = logits / spec.temperature
        teacher_logits = _chunk_logits(spec.teacher, chunk, teacher)
        softmax_logits["teacher"] = teacher_logits / spec.temperature
    return {name: softmax_logits[name] for name in spec.softmaxes}


class _Residuals(NamedTuple):
    """What the backward pass reads.

    Attributes:
        differentiated: What needs a gradient, by path: parameters of the student's head that
            train, and its hidden states as "hidden".
        constant: The rest of these.
        rng: The student's.
        teacher: The inputs of the teacher's head.
        targets: The target tokens.
        log_z: Of each softmax.
    """

    differentiated: dict[str, jax.Array]
    constant: dict[str, jax.Array]
    rng: jax.Array | None
    teacher: HeadInputs | None
    targets: Int[Array, "batch target"]
    log_z: dict[str, Float[Array, "batch target"]]


def _forward_rule(spec: LossSpec, *primals: Any) -> tuple[LogitStatistics, _Residuals]:
    # With symbolic_zeros every leaf is a CustomVJPPrimal, which knows whether it is differentiated.
    # So a frozen embedding table gets no gradient, which would be as large as the table.
    student, teacher, targets = jax.tree.map(
        lambda leaf: leaf.value, primals, is_leaf=lambda x: isinstance(x, CustomVJPPrimal)
    )
    leaves = {"hidden": primals[0].hidden, **flatten(primals[0].params)}
    differentiated = {path: leaf.value for path, leaf in leaves.items() if leaf.perturbed}
    constant = {path: leaf.value for path, leaf in leaves.items() if not leaf.perturbed}
    statistics, log_z = _forward(spec, student, teacher, targets)
    return statistics, _Residuals(differentiated, constant, student.rng, teacher, targets, log_z)


def _backward_rule(
    spec: LossSpec, residuals: _Residuals, cotangents: LogitStatistics
) -> tuple[HeadInputs, None, None]:
    axes = {"hidden": None, **vocab_axes(spec.student)}

    def body(index: Int[Array, ""], total: dict[str, jax.Array]) -> dict[str, jax.Array]:
        chunk = spec.chunks.chunk(index)
        differentiated, constant = (
            {path: chunk.slice(leaf, axes[path]) for path, leaf in leaves.items()}
            for leaves in (residuals.differentiated, residuals.constant)
        )

        def logits_of(differentiated: dict[str, jax.Array]) -> ChunkValues:
            head = differentiated | constant
            return chunk.logits(spec.student, head.pop("hidden"), head, residuals.rng)

        logits, vjp = jax.vjp(logits_of, differentiated)
        (gradients,) = vjp(_logits_gradient(spec, chunk, logits, residuals, cotangents))
        return {
            path: chunk.add_gradient(total[path], gradient, axes[path])
            for path, gradient in gradients.items()
        }

    total = {
        path: spec.chunks.zero_gradient(leaf, axes[path])
        for path, leaf in residuals.differentiated.items()
    }
    total = jax.lax.fori_loop(0, spec.chunks.count, body, total)
    gradients: dict[str, Any] = dict.fromkeys(residuals.constant) | {
        path: total[path].reshape(leaf.shape).astype(leaf.dtype)
        for path, leaf in residuals.differentiated.items()
    }
    return HeadInputs(gradients.pop("hidden"), unflatten(gradients)), None, None


chunked_statistics.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _logits_gradient(
    spec: LossSpec,
    chunk: Chunk,
    logits: ChunkValues,
    residuals: _Residuals,
    cotangents: LogitStatistics,
) -> ChunkValues:
    """Returns the loss's gradient with respect to a chunk's logits.

    Args:
        spec: Models and chunks.
        chunk: The chunk.
        logits: The student's logits.
        residuals: Of the forward pass.
        cotangents: The loss's gradient with respect to the statistics.
    """
    probs = {
        name: jnp.exp(values - residuals.log_z[name][..., None, None])
        for name, values in _softmax_logits(spec, chunk, logits, residuals.teacher).items()
    }
    # The derivative of each statistic by each logit.
    derivatives = {
        "log_z": probs["student"],
        "target_logit": chunk.is_target(residuals.targets).astype(logits.dtype),
        "logit_sum": jnp.ones_like(logits),
    }
    if "teacher" in probs:
        student_probs = probs.get("tempered_student", probs["student"])
        derivatives["kl"] = (student_probs - probs["teacher"]) / spec.temperature
    total = jnp.zeros_like(logits)  # [batch, target, shards, width]
    for name, derivative in derivatives.items():
        cotangent = getattr(cotangents, name)  # [batch, target]
        if not isinstance(cotangent, SymbolicZero):
            total += cotangent[..., None, None] * derivative
    return jnp.where(chunk.is_new[None, None, None], total, 0.0)
