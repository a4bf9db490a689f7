"""The programs of few-shot evaluation: tunings side by side, and rankings under many prompts."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from robust_ft import multihost, ranking, text_batches, trainable
from robust_ft.data.records import model_batch
from robust_ft.few_shot import FewShot
from robust_ft.few_shot_tasks import RankedTask
from robust_ft.models.model import Model
from robust_ft.objectives import CrossEntropy
from robust_ft.optim import Optimizer
from robust_ft.partitioning import Partitioner
from robust_ft.train_step import TrainState, init_state, make_train_step
from robust_ft.trainable import flatten, unflatten
from robust_ft.types import Batch, Params

# Batches are padded to the full lengths divided by one of these: so many programs are compiled.
DIVISORS = (4, 2, 1)
SHORT = 4  # tokens of the bucket of short answers


class Kept(NamedTuple):
    """What is kept of tunings: the epochs among which the best is chosen, the last one last.

    Attributes:
        prompts: {path: [tunings, epochs, ...]}, in the host's memory.
        losses: On the examples, without dropout.
    """

    prompts: dict[str, np.ndarray]
    losses: Float[np.ndarray, "tunings epochs"]


def kept_epochs(few_shot: FewShot) -> list[int]:
    """Returns the epochs of `Kept`."""
    period, last = few_shot.eval_period, few_shot.epochs
    return [*range(period, last, period), last]


def divisor(few_shot: FewShot, lengths: Sequence[tuple[int, int]]) -> int:
    """Returns by what the lengths of a batch are divided, given those of its examples."""
    most = (few_shot.data.inputs_length, few_shot.data.targets_length)
    return next(
        each
        for each in DIVISORS
        if all(n <= m // each for pair in lengths for n, m in zip(pair, most, strict=True))
        or each == 1
    )


class Tuner:
    """Tunes and ranks with one frozen model.

    Args:
        few_shot: What runs.
        frozen: The parameters that no tuning changes, on the mesh.
        partitioner: The mesh.
    """

    def __init__(self, few_shot: FewShot, frozen: Params, partitioner: Partitioner):
        self._few_shot, self._frozen, self._partitioner = few_shot, frozen, partitioner
        axes = flatten(few_shot.model.logical_axes())
        self._stacked = {
            path: partitioner.sharding((None, *axes[path])) for path in few_shot.trainable_paths()
        }

    def tune(
        self,
        starts: dict[str, np.ndarray],
        batches: Sequence[dict[str, np.ndarray]],
        keys: Sequence[jax.Array],
    ) -> Kept:
        """Tunes on a batch each, the same in all epochs.

        Args:
            starts: {path: [tunings, ...]}, what is tuned.
            batches: Of one shape.
            keys: For dropout.
        """
        few_shot, partitioner = self._few_shot, self._partitioner
        # [tunings, examples, ...]: the devices share each batch.
        stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
        sharding = partitioner.sharding((None, "batch"))
        with partitioner.activate():
            prompts, losses = _tune(
                few_shot.model,
                few_shot.optimizer,
                (few_shot.epochs, few_shot.eval_period),
                self._placed(starts),
                self._frozen,
                {name: multihost.put(rows, sharding) for name, rows in stacked.items()},
                jnp.stack(list(keys)),
            )
            prompts, losses = multihost.whole((flatten(prompts), losses))
        return Kept({path: np.asarray(x) for path, x in prompts.items()}, np.asarray(losses))

    def rank(
        self, task: RankedTask, prompts: dict[str, np.ndarray]
    ) -> Bool[np.ndarray, "prompts examples"]:
        """Returns whether each example is answered right under each prompt.

        The batches are the same as without tuning, each ranked under several prompts at once.

        Args:
            task: The task.
            prompts: {path: [prompts, ...]}.
        """
        evaluation, few_shot = task.evaluation, self._few_shot
        inputs = [example.inputs.tolist() for example in task.examples]
        choices = task.choice_ids
        count = len(next(iter(prompts.values())))
        rounds = -(-count // few_shot.side_by_side)
        width = -(-count // rounds)  # of all rounds, so that they share a program
        scores = np.full((count, *task.right.shape), -np.inf, np.float32)
        shards = self._partitioner.batch_shards
        parts = []
        for start in range(0, count, width):
            taken = np.minimum(np.arange(start, start + width), count - 1)
            part = {path: x[taken] for path, x in prompts.items()}
            parts.append((start, min(width, count - start), self._placed(part)))
        for indices, rows in ranking.groups(inputs, choices, evaluation.batch_size, shards):
            arrays = text_batches.ranking_batch(
                [inputs[n] for n in rows],
                [choices[n] for n in rows],
                evaluation.data.inputs_length,
                few_shot.data.vocabulary.pad_id,
            )
            # Most answers are a word or two: a bucket of a few tokens saves most of decoding.
            longest = max(len(ids) for n in indices for ids in choices[n])
            if longest <= SHORT:
                arrays |= {k: x[:, :SHORT] for k, x in arrays.items() if k.startswith("decoder")}
            with self._partitioner.activate():
                placed = self._partitioner.share_batch(arrays)
                for start, size, some in parts:
                    ranked = multihost.whole(_rank(few_shot.model, some, self._frozen, placed))
                    found = np.asarray(ranked)[:size, : len(indices)]
                    for n, of_input in zip(indices, np.moveaxis(found, 1, 0), strict=True):
                        known = len(choices[n])
                        scores[start : start + size, n, :known] = of_input[:, :known]
        if evaluation.per_token:
            scores = ranking.per_token(scores, choices)
        best = np.argmax(scores, axis=2)  # [prompts, examples]
        correct: Bool[np.ndarray, "prompts examples"] = task.right[np.arange(len(inputs)), best]
        return correct

    def _placed(self, prompts: dict[str, np.ndarray]) -> Params:
        return unflatten(
            {path: multihost.put(x, self._stacked[path]) for path, x in prompts.items()}
        )


def training_batch(
    few_shot: FewShot, examples: Sequence[Any], lengths_divisor: int
) -> dict[str, np.ndarray]:
    """Returns the batch of a tuning, padded to a bucket of lengths."""
    data = few_shot.data
    return model_batch(
        [example.inputs for example in examples],
        [example.targets for example in examples],
        data.inputs_length // lengths_divisor,
        data.targets_length // lengths_divisor,
        pad_id=data.vocabulary.pad_id,
        start=few_shot.model.decoder_start,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _tune(
    model: Model,
    optimizer: Optimizer,
    epochs: tuple[int, int],
    starts: Params,
    frozen: Params,
    batches: Batch,
    keys: jax.Array,
) -> tuple[Params, Float[Array, "tunings epochs"]]:
    """Tunes side by side, all epochs in one loop on the devices.

    Args:
        model: The model.
        optimizer: The optimizer.
        epochs: Their number, and the period after which prompt and loss are kept.
        starts: [tunings, ...] of each parameter that is tuned.
        frozen: All others.
        batches: [tunings, examples, ...]
        keys: [tunings]

    Returns:
        [tunings, kept epochs, ...] of each tuned parameter, and the losses.
    """
    objective = CrossEntropy()
    step = make_train_step(model, objective, optimizer)
    total, period = epochs

    def one(start: Params, batch: Batch, key: jax.Array) -> tuple[Params, jax.Array]:
        def update(state: TrainState, _: None) -> tuple[TrainState, None]:
            after, _sums = step(state, frozen, None, batch, key)
            return after, None

        def advance(state: TrainState, count: int) -> tuple[TrainState, Any]:
            state, _ = jax.lax.scan(update, state, length=count)
            params = trainable.merge(state.trainable, frozen)
            loss, weight, _sums = objective(model, params, batch, None)
            return state, (state.trainable, loss / weight)

        state = init_state(optimizer, start)
        state, kept = jax.lax.scan(lambda s, _: advance(s, period), state, length=total // period)
        if rest := total % period:
            _, last = advance(state, rest)
            kept = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), kept, last)
        prompts, losses = kept
        return prompts, losses

    tuned: tuple[Params, jax.Array] = jax.vmap(one)(starts, batches, keys)
    return tuned


@functools.partial(jax.jit, static_argnums=0)
def _rank(
    model: Model, prompts: Params, frozen: Params, batch: Batch
) -> Float[Array, "prompts batch choices"]:
    def under(prompt: Params) -> jax.Array:
        return ranking.log_likelihoods(model, trainable.merge(prompt, frozen), batch)

    found: jax.Array = jax.vmap(under)(prompts)
    return found
