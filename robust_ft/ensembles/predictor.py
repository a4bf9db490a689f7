"""The ensemble predictor: several models that decode and score as one."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from robust_ft.decoding import StepFn
from robust_ft.ensembles.mixing import check_weights, ensemble, mixed
from robust_ft.errors import UserError
from robust_ft.models.model import LanguageModel
from robust_ft.models.peft.base import Peft
from robust_ft.predictor import BasePredictor
from robust_ft.types import AnyArray, Batch


class Ensemble(BasePredictor):
    """Decodes and scores with the weighted mean of several models' probabilities at every token.

    "Ensembles and Cocktails", section 6: with the weights (lambda, 1 - lambda) of a lightweight and
    a full model, p(y_t) = lambda p_light(y_t) + (1 - lambda) p_full(y_t), given the tokens that
    the ensemble has generated so far. Members may have different architectures over one vocabulary.

    Attributes:
        members: The members' predictors.
        weights: The weight of each member.
    """

    model: "MixedModel"

    def __init__(
        self, members: Sequence[BasePredictor], weights: Sequence[float] | None = None
    ) -> None:
        """Checks that the members fit together.

        Args:
            members: At least one; with the same vocabulary, and on the same mesh.
            weights: From 0 to 1, with the sum 1; by default all equal.

        Raises:
            UserError: Members or weights do not fit together.
        """
        _check_members(members)
        if weights is None:
            weights = [1 / len(members)] * len(members)
        self.weights = check_weights(weights, len(members))
        self.members = tuple(members)
        self.model = MixedModel(tuple(member.model for member in members))
        self.params = {
            "weights": jnp.asarray(self.weights, jnp.float32),
            "members": tuple(member.params for member in members),
        }
        self.vocabulary = members[0].vocabulary
        self.partitioner = members[0].partitioner

    def without(self, *names: str) -> "Ensemble":
        """Returns the ensemble of the members without these PEFT methods, where they have them."""
        if not names:
            return self
        return Ensemble([member.without(*names) for member in self.members], self.weights)

    def weighted(self, *weights: float) -> "Ensemble":
        """Returns the ensemble with other weights; weights are arrays, so nothing is recompiled."""
        return Ensemble(self.members, weights)


@dataclasses.dataclass(frozen=True)
class MixedModel:
    """The `LanguageModel` of an ensemble.

    Parameters are {"weights": float32[members], "members": tuple of the members' parameters}.

    Attributes:
        members: The members' models.
    """

    members: tuple[LanguageModel, ...]

    @property
    def pad_id(self) -> int:
        return self.members[0].pad_id

    @property
    def eos_id(self) -> int:
        return self.members[0].eos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids at which any member's decoding stops."""
        return tuple(dict.fromkeys(i for member in self.members for i in member.eos_ids))

    @property
    def tasks(self) -> tuple[str, ...]:
        return next((member.tasks for member in self.members if member.tasks), ())

    def task_index(self, task: str) -> int:
        return next(member for member in self.members if member.tasks).task_index(task)

    @property
    def peft(self) -> tuple[Peft, ...]:
        """The members' PEFT methods, one of each name."""
        by_name = {method.name: method for member in self.members for method in member.peft}
        return tuple(by_name.values())

    def check_lengths(self, inputs: int, targets: int) -> None:
        for member in self.members:
            member.check_lengths(inputs, targets)

    def check_inputs(self, mask: Bool[np.ndarray, "batch source"], targets: int) -> None:
        for member in self.members:
            member.check_inputs(mask, targets)

    def history(self, batch: Batch) -> Int[Array, "batch before"]:
        """Returns the tokens that the first member's decoder reads before the target."""
        return self.members[0].history(batch)

    def prefill(
        self, params: Any, batch: Batch, max_length: int
    ) -> tuple[Int[Array, "batch"], Any]:
        """Returns the first member's first token, and the cache after the input.

        That is {"position": int32[batch], the number of target tokens read, "members": caches,
        "starts": each member's own first token, which it reads in place of the first member's}.
        """
        starts, caches = zip(
            *(m.prefill(p, batch, max_length) for m, p in self._with(params)), strict=True
        )
        position = jnp.zeros(starts[0].shape, jnp.int32)
        return starts[0], {"position": position, "starts": starts, "members": caches}

    def extend(
        self, params: Any, cache: Any, tokens: Int[AnyArray, "batch new"]
    ) -> tuple[tuple[Any, ...], Any]:
        """Reads the target's next tokens; returns each member's hidden states, and the cache."""
        extended = [
            member.extend(member_params, member_cache, _with_start(start, cache, tokens))
            for (member, member_params), start, member_cache in zip(
                self._with(params), cache["starts"], cache["members"], strict=True
            )
        ]
        hidden, caches = zip(*extended, strict=True)
        position = cache["position"] + tokens.shape[1]
        return hidden, {**cache, "position": position, "members": caches}

    def head(self, params: Any, hidden: tuple[Any, ...]) -> Float[Array, "*rest vocab"]:
        """Returns the ensemble's log-probabilities, float32."""
        log_probs = [
            jax.nn.log_softmax(member.head(member_params, states))
            for (member, member_params), states in zip(self._with(params), hidden, strict=True)
        ]
        return mixed(log_probs, params["weights"])

    def step(
        self, params: Any, cache: Any, tokens: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Reads one token a row; returns the next token's log-probabilities, and the cache."""

        def step_of(member: LanguageModel, member_params: Any, start: jax.Array) -> StepFn:
            return lambda member_cache, tokens: member.step(
                member_params, member_cache, _with_start(start, cache, tokens[:, None])[:, 0]
            )

        steps = [
            step_of(member, member_params, start)
            for (member, member_params), start in zip(
                self._with(params), cache["starts"], strict=True
            )
        ]
        log_probs, caches = ensemble(steps, params["weights"])(cache["members"], tokens)
        return log_probs, {**cache, "position": cache["position"] + 1, "members": caches}

    def _with(self, params: Any) -> list[tuple[LanguageModel, Any]]:
        return list(zip(self.members, params["members"], strict=True))


def _check_members(members: Sequence[BasePredictor]) -> None:
    if not members:
        raise UserError("An ensemble needs at least one member.")
    first = members[0]
    with_tasks = next((m.model.tasks for m in members if m.model.tasks), ())
    for number, member in enumerate(members[1:], start=1):
        between = f"Members 0 and {number} of the ensemble"
        if first.vocabulary.fingerprint != member.vocabulary.fingerprint:
            sizes = [each.vocabulary.vocab_size for each in (first, member)]
            raise UserError(
                f"{between} have different vocabularies, of {sizes[0]} and {sizes[1]} tokens; "
                "probabilities are mixed token by token."
            )
        for what, value_of in _SHARED.items():
            if value_of(first) != value_of(member):
                raise UserError(
                    f"{between} differ in {what}: {value_of(first)} and {value_of(member)}."
                )
        if member.model.tasks not in ((), with_tasks):
            raise UserError(f"{between} have prompts for different tasks.")


# What all members must share.
_SHARED: dict[str, Callable[[BasePredictor], Any]] = {
    "their output's number of tokens": lambda member: _vocab_size(member.model),
    "the id of padding": lambda member: member.model.pad_id,
    "the id that ends a text": lambda member: member.model.eos_id,
    "their mesh": lambda member: member.partitioner,
}


def _vocab_size(model: Any) -> int:
    """Returns the number of a model's logits at a position."""
    while isinstance(model, MixedModel):  # an ensemble may be a member
        model = model.members[0]
    size: int = model.config.vocab_size
    return size


def _with_start(
    start: Int[Array, "batch"], cache: Any, tokens: Int[AnyArray, "batch new"]
) -> Int[Array, "batch new"]:
    """Puts a member's own first tokens at the target's position 0, in place of the ensemble's."""
    positions = cache["position"][:, None] + jnp.arange(tokens.shape[1])[None]  # [batch, new]
    return jnp.where(positions == 0, start[:, None], tokens)
