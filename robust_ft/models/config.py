"""What the configs of all model families share."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from flax import linen as nn

from robust_ft.errors import UserError, nearest
from robust_ft.models.attention_kernels import KERNELS
from robust_ft.models.options import DTYPES, REMAT_POLICIES
from robust_ft.models.peft.base import Peft
from robust_ft.ranges import Count, Rate, check_ranges

# Fields of every config that say how a model is computed and trained, and that no checkpoint
# determines.
COMPUTE_FIELDS = ("dropout_rate", "attention", "remat", "dtype", "param_dtype")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """An architecture's sizes, and how it is computed: what a family's config extends.

    Configs are flat and hashable, so that modules and jitted functions can hold them.

    Attributes:
        decoder_only: Whether input and target are one sequence, read by a decoder alone.
        vocab_size: Number of tokens, which is also the number of logits.
        emb_dim: Width of the residual stream.
        dropout_rate: Of the embedded tokens and of what sublayers add.
        attention: What computes attention: "xla", "cudnn" (on NVIDIA GPUs), or "auto", cuDNN
            where it applies; see `attention_kernels`.
        remat: What the backward pass keeps of a layer: "none" keeps everything, "dots" the
            products with parameters, "full" nothing but the layer's input.
        dtype: Type of activations. Softmax, norms and logits are float32 whatever it is.
        param_dtype: Type in which parameters are drawn and kept.
    """

    decoder_only: ClassVar[bool] = False

    vocab_size: Count
    emb_dim: Count
    dropout_rate: Rate = 0.0
    attention: str = "auto"
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_ranges(self)
        self.check_choice("attention", KERNELS)
        self.check_choice("remat", tuple(REMAT_POLICIES))
        self.check_choice("dtype", DTYPES)
        self.check_choice("param_dtype", DTYPES)

    @abc.abstractmethod
    def module(self, peft: tuple[Peft, ...] = ()) -> nn.Module:
        """Returns the Linen module with these PEFT methods plugged in."""

    def check_lengths(self, inputs: int, targets: int, slots: int) -> None:  # noqa: B027
        """Raises a UserError if the model has too few positions; most have no limit.

        Args:
            inputs: Tokens that are read before the target, soft prompts included.
            targets: Tokens of the target that are read.
            slots: Positions that prefixes take before the decoder's tokens.
        """

    def check_choice(self, field: str, choices: Sequence[str]) -> None:
        """Raises a UserError unless a field, a string or several, has only valid values."""
        value = getattr(self, field)
        for each in (value,) if isinstance(value, str) else value:
            if each not in choices:
                raise UserError(
                    f"{type(self).__name__}.{field}='{each}' is not one of {tuple(choices)}."
                    + nearest(each, choices)
                )
