"""Soft prompts in every family: before the input or behind it, one or one for each task.

A prompt is what a larger vocabulary would have: tokens whose embeddings are its vectors. That is
the reference: the model without prompts, whose inputs hold these tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import decode_cached, grad_of, logits_of, scattered
from tiny_families import CONFIGS, PAD, START, VOCAB, model_of, params_of
from tiny_models import random_batch

from robust_ft.errors import UserError
from robust_ft.models.peft import Prompt
from robust_ft.trainable import flatten, unflatten

TASKS = ("rte", "cb", "wic", "xsum", "nq")
INDEX = np.array([3, 0, 4, 1, 2], np.int32)
LENGTH = 3
POSITIONS = ("before", "infix")
DECODER_ONLY = ("gpt2", "llama")


def batch_of(extra=0):
    """Five uneven examples, one of each task."""
    batch = random_batch(0, [6, 4, 1, 5, 2], [5, 7, 3, 1, 4], extra=extra)
    batch["decoder_input_tokens"][:, 0] = START
    return batch | {"task_index": INDEX}


def path_of(model):
    (path,) = (path for path in flatten(model.shapes()) if model.peft_owns(path))
    return path


def with_task(params, path, task):
    """Returns the parameters with one task's prompt as the only one."""
    flat = flatten(params)
    return unflatten(flat | {path: flat[path][task]})


def reference_inputs(batch, position):
    """Returns inputs in which the prompt is tokens, those from VOCAB on, and their mask."""
    tokens, mask = [], []
    names = ("encoder_input_tokens", "encoder_input_mask", "task_index")
    for row, kept, task in zip(*(batch[name].tolist() for name in names), strict=True):
        prompt = [VOCAB + task * LENGTH + i for i in range(LENGTH)]
        end = max(i + 1 for i, is_token in enumerate(kept) if is_token)
        place = 0 if position == "before" else end
        tokens.append(row[:place] + prompt + row[place:])
        mask.append(kept[:place] + [True] * LENGTH + kept[place:])
    inputs = np.array(tokens, np.int32)
    return {"encoder_input_tokens": inputs, "encoder_input_mask": np.array(mask)}


def reference_logits(model, params, batch, position):
    flat = flatten(params)
    prompts = flat.pop(path_of(model)).reshape(len(TASKS) * LENGTH, -1)
    table = flat["token_embedder/embedding"]
    flat["token_embedder/embedding"] = jnp.concatenate([table, prompts])
    head = "decoder/logits_dense/kernel"
    if head in flat:
        flat[head] = jnp.pad(flat[head], ((0, 0), (0, len(prompts))))
    plain = dataclasses.replace(
        model.without("prompt"),
        config=dataclasses.replace(model.config, vocab_size=VOCAB + len(prompts)),
    )
    logits = logits_of(plain, unflatten(flat), batch | reference_inputs(batch, position))
    return logits[..., :VOCAB]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_prompts_are_tokens_of_a_larger_vocabulary(family, position):
    model = model_of(family, Prompt(length=LENGTH, tasks=TASKS, position=position))
    params, batch = params_of(model), batch_of(extra=1)
    if family in DECODER_ONLY:
        batch = scattered(batch, pad_id=PAD)
    logits = logits_of(model, params, batch)
    np.testing.assert_allclose(
        logits, reference_logits(model, params, batch, position), rtol=0, atol=1e-5
    )
    # And token by token.
    found = decode_cached(model, params, batch, batch["decoder_input_tokens"].shape[1])
    np.testing.assert_allclose(found, jax.nn.log_softmax(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "position"), [*zip(CONFIGS, POSITIONS * 2, strict=True)])
def test_a_mixed_batch_gives_each_example_what_it_gets_alone(family, position):
    model = model_of(family, Prompt(length=LENGTH, tasks=TASKS, position=position))
    single = model_of(family, Prompt(length=LENGTH, position=position))
    params, batch = params_of(model), batch_of()
    mixed = logits_of(model, params, batch)
    path = path_of(model)
    for i, task in enumerate(INDEX):
        row = {name: leaf[i : i + 1] for name, leaf in batch.items() if name != "task_index"}
        alone = logits_of(single, with_task(params, path, task), row)
        np.testing.assert_allclose(mixed[i], alone[0], rtol=0, atol=1e-5)
        other = logits_of(single, with_task(params, path, (task + 1) % len(TASKS)), row)
        assert np.abs(other[0] - mixed[i]).max() > 0.01


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_changes_nothing_with_an_infix(family):
    model = model_of(family, Prompt(length=LENGTH, position="infix"))
    params, batch = params_of(model), batch_of()
    # Encoders count positions with the padding between tokens.
    wider = scattered(batch, pad_id=PAD) if family in DECODER_ONLY else batch_of(extra=3)
    names = ("encoder_input_tokens", "encoder_input_mask")
    wider = batch | {name: wider[name] for name in names}
    found, expected = (logits_of(model, params, b) for b in (wider, batch))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_inputs_that_are_all_padding_still_have_their_infix(family):
    infix, before = (model_of(family, Prompt(length=LENGTH, position=p)) for p in POSITIONS)
    params, batch = params_of(infix), batch_of()
    batch["encoder_input_tokens"][2], batch["encoder_input_mask"][2] = PAD, False
    found = [logits_of(model, params, batch) for model in (infix, before)]
    np.testing.assert_allclose(found[0][2], found[1][2], rtol=0, atol=1e-5)
    assert np.abs(found[0][0] - found[1][0]).max() > 0.01


def test_only_tasks_in_the_batch_get_a_gradient():
    model = model_of("t5", Prompt(length=LENGTH, tasks=TASKS))
    batch = batch_of() | {"task_index": np.array([3, 0, 3, 0, 3], np.int32)}
    gradient = np.asarray(flatten(grad_of(model, params_of(model), batch))["encoder/prompt"])
    assert gradient.shape == (5, LENGTH, 16)
    moved = np.abs(gradient).max(axis=(1, 2)) > 0
    assert list(moved) == [True, False, False, True, False]


def test_prompts_before_and_behind_the_input_combine():
    model = model_of("gpt2", Prompt("inner", 2), Prompt("infix", 3, position="infix"))
    params, batch = params_of(model), batch_of()
    both = flatten(params)
    tables = [both.pop(f"decoder/{name}") for name in ("inner", "infix")]
    before = model_of("gpt2", Prompt(length=2))
    behind = model_of("gpt2", Prompt(length=3, position="infix"))
    logits = logits_of(model, params, batch)
    for model, table in ((before, tables[0]), (behind, tables[1])):
        one = logits_of(model, unflatten(both | {"decoder/prompt": table}), batch)
        assert np.abs(one - logits).max() > 0.01
    # The order in which they are listed does not matter.
    swapped = model_of("gpt2", Prompt("infix", 3, position="infix"), Prompt("inner", 2))
    np.testing.assert_allclose(logits_of(swapped, params, batch), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_batch_without_tasks(family):
    model = model_of(family, Prompt(length=LENGTH, tasks=TASKS))
    batch = batch_of()
    del batch["task_index"]
    with pytest.raises(UserError, match=r"tasks rte, cb, wic, .* task_index \[batch\]"):
        jax.eval_shape(model.logits, model.shapes(), batch)
    with pytest.raises(UserError, match="task_index"):
        jax.eval_shape(lambda p, b: model.prefill(p, b, 4), model.shapes(), batch)


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_a_prompt_longer_than_the_models_positions(family):
    model = model_of(family, Prompt(length=CONFIGS[family].num_positions))
    with pytest.raises(UserError, match=r"soft prompts included, .*num_positions="):
        model.check()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_packed_batches_are_refused(family, position):
    model = model_of(family, Prompt(length=3, position=position))
    batch = {name: np.ones((2, 4), np.int32) for name in (
        "encoder_input_tokens", "decoder_input_tokens", "encoder_segment_ids", "decoder_segment_ids"
    )}  # fmt: skip
    with pytest.raises(UserError, match="Packed"):
        jax.eval_shape(model.logits, model.shapes(), batch)
