"""Parameters that a model starts from, checked against it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from robust_ft.errors import UserError
from robust_ft.restore import fit_to_model


def test_restoring_casts_and_starts_peft_fresh():
    shapes = {
        "a": jax.ShapeDtypeStruct((2,), jnp.float32),
        "prompt": jax.ShapeDtypeStruct((1,), int),
    }
    restored = fit_to_model(shapes, {"a": np.ones(2, np.float16)}, "file", lambda p: p == "prompt")
    assert restored.keys() == {"a"} and restored["a"].dtype == np.float32
    # Another method's parameters in the checkpoint have no place, unless it may be dropped.
    extra = {"a": np.ones(2), "lora": np.ones(1)}
    with pytest.raises(UserError, match=r"1 have no place in it \(lora\)"):
        fit_to_model(shapes, extra, "file", lambda p: p != "a")
    dropped = fit_to_model(shapes, extra, "file", lambda p: p != "a", lambda p: p == "lora")
    assert dropped.keys() == {"a"}


def test_restoring_names_both_sides():
    shapes = {f"p{i:02}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(10)}
    with pytest.raises(UserError) as error:
        fit_to_model(shapes, {"q": np.ones(1)}, "file", lambda path: False)
    assert "10 parameters of the model are missing (p00, " in str(error.value)
    assert "p07 and 2 more), 1 have no place in it (q)" in str(error.value)
