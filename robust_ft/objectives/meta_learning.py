"""Meta-learning rules: FOMAML and Reptile, whose inner loop is prompt tuning.

Continued pretraining for promptability, section 3.2 and appendix B. A meta-batch has batches of
many tasks. For each task the prompt is tuned for some steps, each on another support batch, while
all else stays. Then, from there and on a query batch,

- FOMAML (Algorithm 1) takes the gradient of all parameters that train;
- Reptile (Algorithm 2) makes one step of all of them, and the gradient is what they were before the
  inner loop minus what they are now.

The meta-gradient is the mean over tasks. It is of first order: nothing is differentiated through
the inner loop.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from robust_ft import optim
from robust_ft.models.model import Model
from robust_ft.objectives.gradients import LossFn, cast
from robust_ft.ranges import Count, Whole, check_ranges
from robust_ft.trainable import flatten, merge, split, trainable_paths
from robust_ft.types import Batch, Params, Sums

# Parameters, or states of the inner optimizer: of what the inner loop tunes, and of all else that
# trains.
Parts = tuple[Params, Params]
InnerState = tuple[Any, Any]


class Task(NamedTuple):
    """What a rule is given of one task of a meta-batch.

    Attributes:
        loss_fn: The stage's objective, of all parameters that train.
        start: These parameters before the task: those that the inner loop tunes, and the others.
        support: The inner loop's batches, arrays [inner steps, rows, ...], and their keys.
        query: The batch after them, arrays [rows, ...], and its key.
    """

    loss_fn: LossFn
    start: Parts
    support: tuple[Batch, jax.Array]
    query: tuple[Batch, jax.Array]

    def query_gradient(self, parts: Parts) -> tuple[Params, Sums]:
        """Returns the query's gradient of all parameters, and the means of its metrics."""
        return _mean_gradient(self.loss_fn, merge(*parts), {}, *self.query)


@dataclasses.dataclass(frozen=True)
class MetaLearning:
    """What FOMAML and Reptile share.

    Attributes:
        tasks: Tasks in a meta-batch; the paper has 128.
        inner_steps: Steps on support batches; the paper has 7.
        inner_optimizer: The inner loop's optimizer, and of Reptile's step of all parameters. What
            the inner loop tunes and all else have states of their own, clipped norms included.
        tunes: What the inner loop tunes, as patterns of `Stage.trainable`.
        carries_state: Whether the inner optimizer's state goes on from task to task and from step
            to step, as in the authors' code. Otherwise each task starts with a fresh one.
    """

    tasks: Count = 128
    inner_steps: Whole = 7
    inner_optimizer: optim.Optimizer = optim.Adafactor(optim.Schedule(1e-3))
    tunes: Sequence[str] = ("peft",)
    carries_state: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tunes", tuple(self.tunes))
        check_ranges(self)

    @property
    def batches(self) -> int:
        """Batches of each task: one for each inner step, and the query."""
        return self.inner_steps + 1

    def paths(self, model: Model) -> frozenset[str]:
        """Returns the paths of what the inner loop tunes.

        Raises:
            UserError: A pattern is no regular expression, or names no parameter of the model.
        """
        return trainable_paths(model.shapes(), self.tunes, model.peft_owns)

    def init(self, model: Model, trainable: Params) -> InnerState | None:
        """Returns the inner state before the first step, None if it is not carried."""
        return self._fresh(split(trainable, self.paths(model))) if self.carries_state else None

    def of_task(self, task: Task, state: InnerState) -> tuple[Params, Sums, InnerState]:
        """Returns a task's meta-gradient, the means of its query's metrics, and the inner state."""
        raise NotImplementedError

    def __call__(
        self,
        loss_fn: LossFn,
        trainable: Params,
        paths: frozenset[str],
        state: InnerState | None,
        batch: Batch,
        rng: jax.Array,
        microbatches: int = 1,
        dtype: str | None = None,
    ) -> tuple[Params, Sums, InnerState | None]:
        """Returns the meta-gradient summed over tasks, metric sums, and the inner state after it.

        Args:
            loss_fn: The stage's objective.
            trainable: The parameters that train.
            paths: Those that the inner loop tunes.
            state: The inner state that is carried, or None.
            batch: Arrays [rows, tasks, batches, ...]; a task's last batch is its query. Rows are
                what the mesh shards: all devices work on the same task.
            rng: The step's key. Each task has its own, however tasks are grouped.
            microbatches: Groups of tasks that are computed one after the other. The tasks of a
                group are computed side by side, each with its own copy of what changes, which a
                state that is carried does not allow.
            dtype: Of a task's meta-gradient; by default its own. The sum over tasks is in float32.

        Returns:
            Every task counts the same: "weight" is their number, and other sums are sums of the
            means over their queries' target tokens.
        """
        start = split(trainable, paths)
        first_state = self._fresh(start) if state is None else state
        # [tasks, batches, rows, ...]
        by_task = {name: jnp.moveaxis(x, 0, 2) for name, x in batch.items()}
        keys = jax.vmap(lambda number: jax.random.fold_in(rng, number))(jnp.arange(self.tasks))

        def of_task(state: InnerState, batches: Batch, key: jax.Array) -> Any:
            key, query_key = jax.random.split(key)
            support = {name: x[:-1] for name, x in batches.items()}
            query = {name: x[-1] for name, x in batches.items()}
            support_keys = jax.random.split(key, self.inner_steps)
            task = Task(loss_fn, start, (support, support_keys), (query, query_key))
            gradient, sums, state = self.of_task(task, state)
            return cast(gradient, dtype), sums, state

        def of_group(carry: Any, group: Any) -> Any:
            total, state = carry
            if microbatches == self.tasks:
                *terms, after = of_task(state, *jax.tree.map(lambda x: x[0], group))
                state = after if self.carries_state else state
            else:
                *terms, _ = jax.vmap(of_task, (None, 0, 0))(state, *group)
                terms = jax.tree.map(lambda x: x.astype(jnp.float32).sum(0), terms)
            total = jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, tuple(terms))
            return (total, state), None

        groups = jax.tree.map(
            lambda x: x.reshape(microbatches, self.tasks // microbatches, *x.shape[1:]),
            (by_task, keys),
        )
        first = jax.tree.map(lambda x: x[0], (by_task, keys))
        *shapes, _ = jax.eval_shape(of_task, first_state, *first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), tuple(shapes))
        ((gradient, sums), last), _ = jax.lax.scan(of_group, (zeros, first_state), groups)
        return gradient, sums, last if self.carries_state else None

    def _fresh(self, parts: Parts) -> InnerState:
        tuned, rest = map(self.inner_optimizer.build().init, parts)
        return tuned, rest

    def _inner_loop(self, task: Task, state: InnerState) -> tuple[Parts, InnerState]:
        """Tunes the prompt: a step on each support batch, in which all else stays."""
        (tuned, rest), (tuned_state, rest_state) = task.start, state

        def step(carry: tuple[Params, Any], inputs: tuple[Batch, jax.Array]) -> Any:
            tuned, state = carry
            gradient, _ = _mean_gradient(task.loss_fn, tuned, rest, *inputs)
            return self._stepped(tuned, gradient, state), None

        (tuned, tuned_state), _ = jax.lax.scan(step, (tuned, tuned_state), task.support)
        return (tuned, rest), (tuned_state, rest_state)

    def _stepped(self, part: Params, gradient: Params, state: Any) -> tuple[Params, Any]:
        """Returns parameters and their state after a step of the inner optimizer."""
        updates, state = self.inner_optimizer.build().update(gradient, state, part)
        return optim.apply_updates(part, updates), state


@dataclasses.dataclass(frozen=True)
class Fomaml(MetaLearning):
    """First-order MAML (Algorithm 1): the query's gradient of all parameters, after the inner loop.

    Without inner steps it is backpropagation. Attributes: see `MetaLearning`.
    """

    def of_task(self, task: Task, state: InnerState) -> tuple[Params, Sums, InnerState]:
        parts, state = self._inner_loop(task, state)
        gradient, sums = task.query_gradient(parts)
        return gradient, sums, state


@dataclasses.dataclass(frozen=True)
class Reptile(MetaLearning):
    """Reptile for prompts (Algorithm 2): the inner loop, then one step of all parameters.

    The meta-gradient is initial minus final parameters; the stage's optimizer, such as Adafactor,
    sets its scale. Attributes: see `MetaLearning`.
    """

    def of_task(self, task: Task, state: InnerState) -> tuple[Params, Sums, InnerState]:
        parts, state = self._inner_loop(task, state)
        gradient, sums = task.query_gradient(parts)
        gradients = split(gradient, frozenset(flatten(parts[0])))
        (tuned, tuned_state), (rest, rest_state) = map(self._stepped, parts, gradients, state)
        difference: Params = jax.tree.map(
            lambda before, after: before.astype(jnp.float32) - after.astype(jnp.float32),
            merge(*task.start),
            merge(tuned, rest),
        )
        return difference, sums, (tuned_state, rest_state)


def _mean_gradient(
    loss_fn: LossFn, params: Params, held: Params, batch: Batch, key: jax.Array
) -> tuple[Params, Sums]:
    """Returns the gradient of the mean loss over target tokens, and the means of metrics.

    Args:
        loss_fn: Of all parameters that train.
        params: Those to differentiate by.
        held: The others.
        batch: Arrays [rows, ...].
        key: For dropout.
    """

    def loss_of(params: Params) -> Any:
        loss, (weight, sums) = loss_fn(merge(params, held), batch, key)
        weight = jnp.where(weight > 0, weight, 1.0)
        means = {name: value / weight for name, value in sums.items()}
        return loss / weight, {**means, "loss": loss / weight, "weight": jnp.ones(())}

    gradient, means = jax.grad(loss_of, has_aux=True)(params)
    return gradient, means
