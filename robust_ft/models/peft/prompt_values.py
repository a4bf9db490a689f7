"""Where the first values of soft prompts come from: embeddings of tokens, or files.

Lester et al., 2021, section 3.2, "Prompt initialization".
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from robust_ft import assets
from robust_ft.bucket_copies import local
from robust_ft.errors import UserError, nearest


def sampled(
    table: Float[Array, "vocab embed"], candidates: range, count: int, rng: jax.Array
) -> Float[Array, "count embed"]:
    """Returns embeddings of tokens drawn from `candidates`, without replacement if they suffice."""
    tokens = jax.random.choice(
        rng, jnp.asarray(candidates), (count,), replace=count > len(candidates)
    )
    return table[tokens].astype(jnp.float32)


def averaged(
    table: Float[Array, "vocab embed"], tokens: Sequence[int]
) -> Float[Array, "one embed"]:
    """Returns the mean embedding of tokens, in float32."""
    return jnp.mean(table[jnp.asarray(tokens)].astype(jnp.float32), axis=0, keepdims=True)


def copied(
    table: Float[Array, "vocab embed"], tokens: Sequence[int], count: int
) -> Float[Array, "count embed"]:
    """Returns the embeddings of the first `count` tokens, starting again where they end."""
    return table[np.resize(tokens, count)].astype(jnp.float32)


def read(path: str) -> Float[np.ndarray, "prompt embed"]:
    """Returns the soft prompt in a `.npy` file, as it was saved; `path` may be an `asset:`.

    Raises:
        UserError: There is no such file, or it does not hold a soft prompt.
    """
    file = local(assets.resolve(path)).expanduser()
    if not file.is_file():
        siblings = [sibling.name for sibling in file.parent.glob("*")]
        raise UserError(f"There is no prompt file '{path}'." + nearest(file.name, siblings))
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"'{path}' is no readable .npy file, or is truncated.") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        held = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"'{path}' holds {held}, not a soft prompt [length, embed].")
    if not np.all(np.isfinite(array)):
        raise UserError(f"The soft prompt in '{path}' has values that are not finite.")
    return array
