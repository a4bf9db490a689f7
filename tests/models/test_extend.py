"""Reading several tokens at once over a cache, as ranking answers does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import logits_of
from tiny_families import CONFIGS, batch_of, model_of, params_of

from robust_ft.models.peft import Prefix


@pytest.mark.parametrize("family", CONFIGS)
def test_a_target_in_parts_has_the_logits_of_the_whole(family):
    # A prefix and a window of Llama's: both count positions.
    model = model_of(family, Prefix(length=3, counted=True))
    params, batch = params_of(model), batch_of()

    @jax.jit
    def in_parts(params, batch):
        _, cache = model.prefill(params, batch, 9)  # more room than is needed
        parts = []
        for part in jnp.split(batch["decoder_input_tokens"], [4, 5], axis=1):
            hidden, cache = model.extend(params, cache, part)
            parts.append(model.head(params, hidden))
        return jnp.concatenate(parts, axis=1)

    expected = logits_of(model, params, batch)
    np.testing.assert_allclose(in_parts(params, batch), expected, rtol=0, atol=1e-5)
