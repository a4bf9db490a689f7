"""What the rest of the program sees of a model: pure functions of parameters and batches."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from robust_ft import task_names
from robust_ft.decoder_start import DecoderStart
from robust_ft.errors import UserError, nearest
from robust_ft.models.attention import input_mask
from robust_ft.models.config import ModelConfig
from robust_ft.models.peft.base import Peft, decoder_slots
from robust_ft.ranges import Whole, check_ranges
from robust_ft.types import AnyArray, Batch, Params


@runtime_checkable
class LanguageModel(Protocol):
    """What decoding and scoring need: of a `Model`, or of an ensemble of them. Hashable."""

    @property
    def peft(self) -> tuple[Peft, ...]: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...

    def task_index(self, task: str) -> int: ...

    def check_lengths(self, inputs: int, targets: int) -> None: ...

    def check_inputs(self, mask: Bool[np.ndarray, "batch source"], targets: int) -> None: ...

    def history(self, batch: Batch) -> Int[Array, "batch before"]: ...

    def prefill(
        self, params: Any, batch: Batch, max_length: int
    ) -> tuple[Int[Array, "batch"], Any]: ...

    def extend(
        self, params: Any, cache: Any, tokens: Int[AnyArray, "batch new"]
    ) -> tuple[Any, Any]: ...

    def head(self, params: Any, hidden: Any) -> Float[Array, "*rest vocab"]: ...

    def step(
        self, params: Any, cache: Any, tokens: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch vocab"], Any]: ...


@dataclasses.dataclass(frozen=True)
class Model:
    """An architecture, its PEFT methods and its token ids.

    Hashable, so that jitted functions can take it as a static argument. All methods are pure.

    Attributes:
        config: Sizes; knows how to build the Linen module.
        peft: The PEFT methods that are plugged in.
        pad_id: Fills arrays up. What is padding is told by masks, so it may be a token's id.
        eos_id: Ends every target.
        start_id: The first token of every decoder input; in a decoder-only model, what stands for
            an input without tokens.
        separator_id: A token between input and target of a decoder-only model. None, the default:
            the target continues the input, as in every program that serves such models.
        stop_ids: Further ids at which decoding stops.
    """

    config: ModelConfig
    peft: tuple[Peft, ...] = ()
    pad_id: Whole = 0
    eos_id: Whole = 1
    start_id: Whole = 0
    separator_id: Whole | None = None
    stop_ids: tuple[Whole, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "peft", tuple(self.peft))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        check_ranges(self)
        if self.separator_id is not None and not self.config.decoder_only:
            raise UserError(
                f"Model.separator_id={self.separator_id} is for decoder-only models; the decoder "
                f"of a {type(self.config).__name__.removesuffix('Config')} starts with start_id."
            )
        names = [method.name for method in self.peft]
        if len(set(names)) < len(names):
            raise UserError(f"Model.peft needs methods with different names, not {names}.")
        tasks = {tuple(method.tasks) for method in self.peft if method.tasks}
        if len(tasks) > 1:
            raise UserError(f"Model.peft needs methods for the same tasks, not {sorted(tasks)}.")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids at which decoding stops; `eos_id`, which ends targets, is the first."""
        return tuple(dict.fromkeys((self.eos_id, *self.stop_ids)))

    @property
    def decoder_start(self) -> DecoderStart:
        """How the decoder's first input token is found."""
        if self.separator_id is not None:
            return DecoderStart(self.separator_id)
        return DecoderStart(self.start_id, continues=self.config.decoder_only)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that have PEFT parameters of their own, see `task_index`."""
        return next((tuple(method.tasks) for method in self.peft if method.tasks), ())

    def task_index(self, task: str) -> int:
        """Returns the value of "task_index" [batch] for rows of a task: its position in `tasks`.

        Derived tasks (`task_names`) have the parameters of the task they come from, unless they
        have their own.

        Raises:
            UserError: The task has none.
        """
        for name in task_names.lineage(task):
            if name in self.tasks:
                return self.tasks.index(name)
        raise UserError(
            f"There is no prompt for the task '{task}', only for {', '.join(self.tasks)}."
            + nearest(task, self.tasks)
        )

    def with_peft(self, *methods: Peft) -> "Model":
        """Returns the model with more PEFT methods plugged in; parameters stay as they are."""
        return dataclasses.replace(self, peft=(*self.peft, *methods))

    def without(self, *names: str) -> "Model":
        """Returns the model with these PEFT methods removed; parameters stay as they are."""
        return dataclasses.replace(self, peft=tuple(p for p in self.peft if p.name not in names))

    def without_peft(self) -> "Model":
        """Returns the model without any PEFT method, as it was pretrained."""
        return dataclasses.replace(self, peft=())

    def init(self, rng: jax.Array) -> Params:
        """Draws all parameters."""
        params: Params = nn.unbox(self._init(rng))
        return params

    def shapes(self) -> Params:
        """Returns the parameters' shapes and types without drawing them."""
        return self._of_each(lambda box: box.value)

    def logical_axes(self) -> Params:
        """Returns each parameter's logical axis names, a tree like `init`'s."""
        return self._of_each(lambda box: box.names)

    def _of_each(self, function: Callable[[Any], Any]) -> Params:
        def is_leaf(x: Any) -> bool:
            return isinstance(x, nn.meta.AxisMetadata)

        tree: Params = jax.tree.map(function, self._boxed, is_leaf=is_leaf)
        return tree

    @functools.cached_property
    def _boxed(self) -> Any:
        # Cached, since a large model takes seconds to trace.
        return jax.eval_shape(self._init, jax.random.key(0))

    def initialize_peft(self, rng: jax.Array, params: Params) -> Params:
        """Sets PEFT parameters whose initial values depend on the pretrained ones."""
        flat = traverse_util.flatten_dict(params, sep="/")
        for i, method in enumerate(self.peft):
            flat |= method.initialize(jax.random.fold_in(rng, i), params, self.config)
        initialized: Params = traverse_util.unflatten_dict(flat, sep="/")
        return initialized

    def check(self) -> None:
        """Raises a UserError if a token id or a PEFT method does not fit this model."""
        self._check_ids()
        self.check_lengths(1, 1)  # prompts and prefixes leave room
        shapes = self.shapes()
        for method in self.peft:
            method.check(shapes, self.config)
            for path in _pretrained_paths(self.config):
                if method.owns(path):
                    kind = type(method).__name__
                    raise UserError(
                        f"{kind}.name='{method.name}' is a part of the model's own parameter "
                        f"'{path}'; choose another name."
                    )

    def _check_ids(self) -> None:
        ids = {name: getattr(self, name) for name in ("pad_id", "eos_id", "start_id")}
        if self.separator_id is not None:
            ids["separator_id"] = self.separator_id
        ids |= {f"stop_ids[{i}]": stop_id for i, stop_id in enumerate(self.stop_ids)}
        for name, token in ids.items():
            if not 0 <= token < self.config.vocab_size:
                raise UserError(
                    f"Model.{name}={token} is no token of a vocabulary of {self.config.vocab_size}."
                )
        for method in self.peft:
            if self.decoder_start.continues and method.is_infix:
                raise UserError(
                    f"'{method.name}' is an infix, between input and target; in a decoder-only "
                    "model it needs Model.separator_id behind it."
                )

    def check_lengths(self, inputs: int, targets: int) -> None:
        """Raises a UserError if the model has too few positions for inputs and targets.

        Soft prompts and prefixes count, padding does not.

        Args:
            inputs: Tokens of the longest input.
            targets: Tokens of the longest target, EOS included.
        """
        # The input's last token is the first that the target's side of the batch reads.
        read = max(inputs - 1, 0) if self.decoder_start.continues else inputs
        prompts = sum(method.input_slots() for method in self.peft)
        self.config.check_lengths(prompts + read, targets, decoder_slots(self.peft))

    def check_inputs(self, mask: Bool[np.ndarray, "batch source"], targets: int) -> None:
        """Does the same for a batch of inputs, whose padding may stand anywhere.

        Encoders count positions up to a token with the padding before it.
        """
        numbers = np.arange(1, mask.shape[1] + 1)[None]
        taken = mask.sum(axis=1) if self.config.decoder_only else (mask * numbers).max(1, initial=0)
        self.check_lengths(int(taken.max(initial=0)), targets)

    def exported(self) -> "Model":
        """Returns the model as it is used after training, for the parameters of `export`."""
        return dataclasses.replace(self, peft=tuple(method.exported() for method in self.peft))

    def export(self, params: Params) -> Params:
        """Returns the parameters of `exported()` that compute the same."""
        for method in self.peft:
            params = method.materialize(params)
        return params

    def peft_owns(self, path: str) -> bool:
        """Returns whether the parameter belongs to a PEFT method, not to the pretrained model."""
        return any(method.owns(path) for method in self.peft)

    def without_fixed(self, paths: Iterable[str]) -> frozenset[str]:
        """Returns the paths without those of parameters that no PEFT method lets train."""
        return frozenset(p for p in paths if not any(m.is_fixed(p) for m in self.peft))

    def logits(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> Float[Array, "batch target vocab"]:
        """Returns float32 logits; with a key, dropout is on.

        A decoder-only model reads [`encoder_input_tokens`; `decoder_input_tokens`].
        """
        self._check_unmasked(batch)
        logits: jax.Array = self._apply(params, rng)(batch)
        return logits

    def hidden(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> Float[Array, "batch target embed"]:
        """Returns the states before the output head, for losses that never hold all logits."""
        self._check_unmasked(batch)
        hidden: jax.Array = self._apply(params, rng, "hidden")(batch)
        return hidden

    def head(
        self,
        params: Params,
        hidden: Float[Array, "*rest embed"],
        rng: jax.Array | None = None,
    ) -> Float[Array, "*rest vocab"]:
        """Returns float32 logits of hidden states; `head_params` are all that it reads."""
        logits: jax.Array = self._apply(params, rng, "head")(hidden)
        return logits

    def head_params(self, params: Params) -> Params:
        """Returns the parameters that `head` reads: of a head of its own, or of the embedding."""
        flat = traverse_util.flatten_dict(params, sep="/")
        reads = r"decoder/(logits_dense/.*|final_logits_bias)"
        if "decoder/logits_dense/kernel" not in flat:
            reads += "|token_embedder/embedding"
        flat = {path: leaf for path, leaf in flat.items() if re.fullmatch(reads, path)}
        head: Params = traverse_util.unflatten_dict(flat, sep="/")
        return head

    def narrowed(self, tokens: int) -> "Model":
        """Returns the model whose `head` computes the logits of a shard of `tokens` tokens.

        It takes `head_params` whose "vocab" axes are sliced.
        """
        config: Any = self.config
        return dataclasses.replace(self, config=dataclasses.replace(config, vocab_size=tokens))

    def history(self, batch: Batch) -> Int[Array, "batch before"]:
        """Returns the tokens that the decoder reads before the target's first.

        Inputs are part of them in decoder-only models; padding is -1 and comes first.
        """
        inputs = batch["encoder_input_tokens"]
        mask, start = self.decoder_start.split_rows(inputs, input_mask(batch))
        if not self.config.decoder_only:
            return start[:, None]
        order = jnp.argsort(mask, axis=1, stable=True)  # padding (False) first
        inputs = jnp.take_along_axis(jnp.where(mask, inputs, -1), order, axis=1)
        return jnp.concatenate([inputs, start[:, None]], axis=1)

    def prefill(
        self, params: Params, batch: Batch, max_length: int
    ) -> tuple[Int[Array, "batch"], Any]:
        """Reads whole inputs, up to the decoder's first input token (`decoder_start`).

        Args:
            params: All parameters.
            batch: `encoder_input_tokens` and what goes with them; not packed.
            max_length: The most tokens that the decoder will read.

        Returns:
            The decoder's first input token of each row, and the KV cache, whose leaves all lead
            with the batch axis.
        """
        mask, start = self.decoder_start.split_rows(
            batch["encoder_input_tokens"], input_mask(batch)
        )
        read = {**batch, "encoder_input_mask": mask}
        return start, self._apply(params, None, "prefill")(read, max_length)

    def extend(
        self, params: Params, cache: Any, tokens: Int[AnyArray, "batch new"]
    ) -> tuple[Float[Array, "batch new embed"], Any]:
        """Reads the target's next tokens; returns what `head` turns into logits, and the cache."""
        hidden, cache = self._apply(params, None, "extend")(cache, tokens)
        return hidden, cache

    def step(
        self, params: Params, cache: Any, tokens: Int[Array, "batch"]
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """One decode step: reads one token of each row, and returns float32 log-probabilities of
        the next token and the cache.
        """
        hidden, cache = self.extend(params, cache, tokens[:, None])
        return jax.nn.log_softmax(self.head(params, hidden)[:, 0]), cache

    def _check_unmasked(self, batch: Batch) -> None:
        """Checks the lengths of a batch in which all are tokens; else only those who made it can.

        Without it, tokens would silently share the last position.
        """
        if batch.keys() & {"encoder_input_mask", "encoder_segment_ids"}:
            return
        read = batch["encoder_input_tokens"].shape[1]
        self.check_lengths(
            read + self.decoder_start.continues, batch["decoder_input_tokens"].shape[1]
        )

    def _init(self, rng: jax.Array) -> Any:
        batch = {
            name: jnp.ones((1, 1), jnp.int32)
            for name in ("encoder_input_tokens", "decoder_input_tokens")
        }
        if self.tasks:
            batch["task_index"] = jnp.zeros((1,), jnp.int32)
        # Parameters do not depend on the kernel, and must have shapes where cuDNN does not apply.
        config = dataclasses.replace(self.config, attention="xla")
        params = config.module(self.peft).init(rng, batch)["params"]
        for i, method in enumerate(self.peft):
            params = method.reparameterize(jax.random.fold_in(rng, i + 1), params)
        return params

    def _apply(
        self, params: Params, rng: jax.Array | None, method: str | None = None
    ) -> Callable[..., Any]:
        module = self.config.module(self.peft).clone(deterministic=rng is None)
        rngs = None if rng is None else {"dropout": rng}
        params = self.export(params)
        return lambda *args: module.apply({"params": params}, *args, rngs=rngs, method=method)


@functools.lru_cache(maxsize=16)
def _pretrained_paths(config: ModelConfig) -> frozenset[str]:
    """Returns the paths of a model's parameters without PEFT methods; tracing takes seconds."""
    return frozenset(traverse_util.flatten_dict(Model(config).shapes(), sep="/"))
