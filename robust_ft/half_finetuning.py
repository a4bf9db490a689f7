"""Half finetuning: an optimizer that leaves a random part of the matrices as they are, for a while.

HFT (Hui et al., 2024, arXiv 2404.18466): in each epoch half of each kind of matrix is frozen.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from robust_ft.optim import Optimizer, Schedule
from robust_ft.ranges import Count, Integer, Share, check_ranges
from robust_ft.trainable import flatten, unflatten
from robust_ft.types import Params


class State(NamedTuple):
    """The optimizer's state.

    Attributes:
        clock: Number of updates so far; a schedule's state, as it goes on where a step is skipped.
        states: Of the optimizer, one for each parameter by sorted path: what was not updated yet is
            new to Adam, whose averages are corrected by the number of their own updates.
    """

    clock: optax.ScaleByScheduleState
    states: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfFinetuning:
    """An optimizer of which a part of the matrices is held as it is, drawn anew every `period`.

    A matrix (with its bias), or a norm, is frozen as a whole: it is not updated, has no weight
    decay and keeps its optimizer state. The part is drawn among those of one kind: the matrices of
    a stack's attention, of its MLPs, its norms, and all that belongs to no layer. The draw is a
    function of seed and period, and of nothing else.

    Attributes:
        optimizer: Updates the others. Its `clip_norm` is of their gradients.
        period: Number of updates between two draws; in the paper an epoch, which has as many as
            the training examples divided by `Stage.batch_size`.
        share: The part of each kind that is frozen, rounded to whole matrices.
        seed: Of the draws.
    """

    optimizer: Optimizer
    period: Count
    share: Share = 0.5
    seed: Integer = 0

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def learning_rate(self) -> Schedule:
        return self.optimizer.learning_rate

    def build(self) -> optax.GradientTransformation:
        clip_norm: float | None = getattr(self.optimizer, "clip_norm", None)
        inner: Any = self.optimizer
        if clip_norm is not None:
            inner = dataclasses.replace(inner, clip_norm=None)
        return optax.GradientTransformation(
            functools.partial(_init, inner.build()),
            functools.partial(self._update, inner.build(), clip_norm),
        )

    def frozen(self, paths: tuple[str, ...], step: Int[Array, ""]) -> dict[str, Bool[Array, ""]]:
        """Returns which parameters are frozen in the update from `step` to `step + 1`, by path."""
        key = jax.random.fold_in(jax.random.key(self.seed), step // self.period)
        frozen: dict[str, Bool[Array, ""]] = {}
        for number, units in enumerate(_kinds(paths)):
            rank = jax.random.permutation(jax.random.fold_in(key, number), len(units))
            for i, members in enumerate(units):
                held = rank[i] < round(self.share * len(units))
                frozen |= dict.fromkeys(members, held)
        return frozen

    def _update(
        self,
        inner: optax.GradientTransformation,
        clip_norm: float | None,
        gradient: Params,
        state: State,
        params: Params | None = None,
    ) -> tuple[Params, State]:
        assert params is not None
        flat, own = flatten(gradient), flatten(params)
        frozen = self.frozen(tuple(flat), state.clock.count)
        flat = {path: jnp.where(frozen[path], jnp.zeros_like(g), g) for path, g in flat.items()}
        if clip_norm is not None:
            flat = optax.clip_by_global_norm(clip_norm).update(flat, optax.EmptyState())[0]
        updates, states = {}, []
        for (path, leaf), before in zip(flat.items(), state.states, strict=True):
            update, after = inner.update(
                unflatten({path: leaf}), before, unflatten({path: own[path]})
            )
            # Adding -0 changes no number, not even 0.
            held = functools.partial(jnp.where, frozen[path])
            updates[path] = jax.tree.map(lambda u, held=held: held(-0.0, u), flatten(update)[path])
            states.append(
                jax.tree.map(functools.partial(_kept, held), before, after, is_leaf=_clock)
            )
        clock = optax.ScaleByScheduleState(count=optax.safe_increment(state.clock.count))
        return unflatten(updates), State(clock, tuple(states))


def _init(inner: optax.GradientTransformation, params: Params) -> State:
    clock = optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))
    flat = flatten(params)
    return State(clock, tuple(inner.init(unflatten({path: x})) for path, x in flat.items()))


def _clock(state: Any) -> bool:
    """Returns whether it counts the steps for a schedule, which goes on for all."""
    return isinstance(state, optax.ScaleByScheduleState)


def _kept(held: Any, before: Any, after: Any) -> Any:
    return after if _clock(after) else held(before, after)


def _kinds(paths: tuple[str, ...]) -> list[list[list[str]]]:
    """Returns, for each kind of matrices, the paths of each: kernel and bias are of one."""
    kinds: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for path in paths:
        unit, _, _ = path.rpartition("/")
        kind = "outside of layers"
        if match := re.fullmatch(r"(.*)/layers_\d+/([^/]+)(/.*)?", unit):
            kind = f"{match[1]}/{match[2] if match[3] else 'norms'}"
        kinds[kind].setdefault(unit, []).append(path)
    return [list(kinds[kind].values()) for kind in sorted(kinds)]
