"""Rows that are marked as such are computed as by the model without its soft prompt."""

import jax
import numpy as np
import pytest
from tiny_families import CONFIGS, batch_of, model_of, params_of
from tiny_models import assert_trees_close

from robust_ft.models.peft import Prompt
from robust_ft.objectives import CrossEntropy

FAMILIES = [pytest.param(f, marks=[] if f == "t5" else pytest.mark.slow) for f in CONFIGS]


@pytest.mark.parametrize("position", ["before", pytest.param("infix", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_without_it(family, position):
    model = model_of(family, Prompt(length=3, position=position))
    params, batch = params_of(model), batch_of()
    logits_of = jax.jit(model.logits)
    with_it = logits_of(params, batch)
    without = jax.jit(model.without("prompt").logits)(params, batch)
    rows = len(batch["encoder_input_tokens"])
    counted = batch["decoder_loss_weights"] > 0
    for marked in (np.arange(rows) == 1, np.ones(rows, bool), np.zeros(rows, bool)):
        found = logits_of(params, batch | {"without_prompt": marked})
        expected = np.where(marked[:, None, None], without, with_it)
        np.testing.assert_allclose(found[counted], expected[counted], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_such_rows_teach_the_prompt_nothing():
    model = model_of("t5", Prompt(length=3))
    params, batch = params_of(model), batch_of()
    gradient = jax.jit(jax.grad(lambda p, b: CrossEntropy()(model, p, b, None)[0]))
    marked = np.arange(len(batch["encoder_input_tokens"])) == 0
    weights = batch["decoder_loss_weights"] * ~marked[:, None]
    rest = gradient(params, batch | {"decoder_loss_weights": weights})["encoder"]["prompt"]
    both = gradient(params, batch | {"without_prompt": marked})["encoder"]["prompt"]
    assert_trees_close({"prompt": both}, {"prompt": rest}, rtol=1e-5)
