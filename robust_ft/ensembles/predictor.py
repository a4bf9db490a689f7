"""Several models as one: their probabilities mixed at every token, or their parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from robust_ft.ensembles.mixing import check_weights, ensemble, mixed
from robust_ft.errors import UserError
from robust_ft.models.model import LanguageModel
from robust_ft.models.peft.base import Peft
from robust_ft.predictor import BasePredictor
from robust_ft.types import Batch


class Ensemble(BasePredictor):
    """Decodes and scores with the weighted mean of several models' probabilities at every token.

    "Ensembles and Cocktails", section 6: with the weights (lambda, 1 - lambda) of a lightweight and
    a full model, p(y_t) = lambda p_light(y_t) + (1 - lambda) p_full(y_t), over what the ensemble
    has said so far. Members may have different architectures over one vocabulary.

    Attributes:
        members: The models with their parameters.
        weights: Of each member.
    """

    model: "MixedModel"

    def __init__(
        self, members: Sequence[BasePredictor], weights: Sequence[float] | None = None
    ) -> None:
        """Checks that the members can speak as one.

        Args:
            members: At least one; with one vocabulary, and on one mesh.
            weights: From 0 to 1, with the sum 1; by default all the same.

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
        """Returns the ensemble with other weights, for which nothing is compiled again."""
        return Ensemble(self.members, weights)


@dataclasses.dataclass(frozen=True)
class MixedModel:
    """Several models behind the functions of one, see `Model`.

    Parameters are {"weights": float32[members], "members": tuple of theirs}.
    """

    members: tuple[LanguageModel, ...]

    @property
    def pad_id(self) -> int:
        return self.members[0].pad_id

    @property
    def eos_id(self) -> int:
        return self.members[0].eos_id

    @property
    def start_id(self) -> int:
        """The first member's; each member reads its own."""
        return self.members[0].start_id

    @property
    def tasks(self) -> tuple[str, ...]:
        return next((member.tasks for member in self.members if member.tasks), ())

    def task_index(self, task: str) -> int:
        return next(member for member in self.members if member.tasks).task_index(task)

    @property
    def peft(self) -> tuple[Peft, ...]:
        """The members' methods; one of each name."""
        named = {method.name: method for member in self.members for method in member.peft}
        return tuple(named.values())

    def history(self, params: Any, batch: Batch) -> Int[Array, "batch before"]:
        """Returns what the first member's decoder reads before the target."""
        return self.members[0].history(params["members"][0], batch)

    def prefill(self, params: Any, batch: Batch, max_length: int) -> Any:
        """Lets each member read the input; returns {"read": int32[batch], "members": caches}."""
        caches = tuple(m.prefill(p, batch, max_length) for m, p in self._with(params))
        rows = batch["encoder_input_tokens"].shape[0]
        return {"read": jnp.zeros(rows, jnp.int32), "members": caches}

    def extend(
        self, params: Any, cache: Any, tokens: Int[Array, "batch new"]
    ) -> tuple[tuple[Any, ...], Any]:
        """Lets each member read the target's next tokens; returns what `head` reads of each."""
        found = [
            member.extend(own, kept, _read_by(member, cache, tokens))
            for (member, own), kept in zip(self._with(params), cache["members"], strict=True)
        ]
        hidden, caches = zip(*found, strict=True)
        return hidden, {"read": cache["read"] + tokens.shape[1], "members": caches}

    def head(self, params: Any, hidden: tuple[Any, ...]) -> Float[Array, "*rest vocab"]:
        """Returns the ensemble's log-probabilities, float32."""
        log_probs = [
            jax.nn.log_softmax(member.head(own, states))
            for (member, own), states in zip(self._with(params), hidden, strict=True)
        ]
        return mixed(log_probs, params["weights"])

    def step(
        self, params: Any, cache: Any, tokens: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        def step_of(member: LanguageModel, own: Any) -> Callable[..., Any]:
            return lambda kept, tokens: member.step(
                own, kept, _read_by(member, cache, tokens[:, None])[:, 0]
            )

        steps = [step_of(member, own) for member, own in self._with(params)]
        log_probs, caches = ensemble(steps, params["weights"])(cache["members"], tokens)
        return log_probs, {"read": cache["read"] + 1, "members": caches}

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
        for what, of in _SAME.items():
            if of(first) != of(member):
                raise UserError(f"{between} differ in {what}: {of(first)} and {of(member)}.")
        if member.model.tasks not in ((), with_tasks):
            raise UserError(f"{between} have prompts for different tasks.")


_SAME: dict[str, Callable[[BasePredictor], Any]] = {
    "their output's number of tokens": lambda member: _vocab_size(member.model),
    "the id of padding": lambda member: member.model.pad_id,
    "the id that ends a text": lambda member: member.model.eos_id,
    "their mesh": lambda member: member.partitioner,
}


def _vocab_size(model: Any) -> int:
    """Returns how many tokens a model gives probabilities to."""
    while isinstance(model, MixedModel):
        model = model.members[0]
    return model.config.vocab_size


def _read_by(
    member: LanguageModel, cache: Any, tokens: Int[Array, "batch new"]
) -> Int[Array, "batch new"]:
    """Returns tokens of which the target's first is the one that this member begins with."""
    places = cache["read"][:, None] + jnp.arange(tokens.shape[1])
    return jnp.where(places == 0, member.start_id, tokens)
