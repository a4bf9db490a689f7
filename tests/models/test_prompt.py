import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, example_batch, random_batch, random_params, tiny_model, tree_equal

from robust_ft.errors import UserError
from robust_ft.models.peft import Prompt
from robust_ft.trainable import flatten, merge, split

PATH = "encoder/prompt"
T5_1_0 = {"mlp_activations": ("relu",), "logits_via_embedding": True}


@pytest.mark.parametrize("changes", [{}, T5_1_0], ids=["1.1", "1.0"])
def test_prompted_logits_are_hugging_faces_with_longer_inputs(changes):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from hugging_face import hugging_face_logits, hugging_face_t5

    model = tiny_model((Prompt(length=5),), **changes)
    params = random_params(model, seed=1)
    batch = random_batch(2, [7, 1, 12], [5, 9, 1], extra=1)
    prompt, pretrained = split(params, frozenset({PATH}))
    reference = hugging_face_t5(model.config, pretrained)
    prompt = torch.from_numpy(np.array(prompt["encoder"]["prompt"])).expand(3, -1, -1)
    tokens = torch.from_numpy(batch["encoder_input_tokens"]).long()
    mask = torch.nn.functional.pad((tokens != 0).long(), (5, 0), value=1)
    embedded = torch.cat([prompt, reference.shared(tokens)], dim=1)
    expected = hugging_face_logits(reference, batch, inputs_embeds=embedded, attention_mask=mask)
    logits = jax.jit(model.logits)(params, batch)
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=1e-4)


def test_without_prompt_is_the_model_that_never_had_one():
    plain, prompted = tiny_model(), tiny_model((Prompt(length=3),))
    assert prompted.without("prompt") == plain
    assert prompted.without("prefix") == prompted
    params = random_params(prompted)
    prompt, pretrained = split(params, frozenset({PATH}))
    assert flatten(pretrained).keys() == flatten(plain.shapes()).keys()
    assert flatten(prompt).keys() == {PATH}
    logits = jax.jit(lambda model, params: model.logits(params, example_batch()), static_argnums=0)
    expected = logits(plain, pretrained)
    # A prompt that is in the parameters but not in the model does not matter.
    np.testing.assert_array_equal(logits(prompted.without("prompt"), params), expected)
    assert np.abs(logits(prompted, params) - expected).max() > 0.1


def test_a_prompt_and_only_it_is_owned_by_the_method():
    model = tiny_model((Prompt(length=3),))
    assert [p for p in flatten(model.shapes()) if model.peft_owns(p)] == [PATH]
    assert not model.peft_owns("encoder/prompter/kernel")
    assert not model.peft_owns("encoder/soft_prompt")


def test_prompt_is_float32_and_changes_the_activations_type_nowhere():
    model = tiny_model((Prompt(length=3),), dtype="bfloat16", param_dtype="bfloat16")
    assert flatten(model.shapes())[PATH].dtype == jnp.float32
    cache = jax.eval_shape(lambda p: model.prefill(p, example_batch(), 4), model.shapes())
    assert cache["layers"][0]["memory"]["key"].dtype == jnp.bfloat16
    assert cache["memory_valid"].shape == (2, 3 + 6)


# --- Initialization


def initialized(seed=0, changes=None, **settings):
    """Returns (prompt, token embeddings) after `initialize_peft`."""
    model = tiny_model((Prompt(**settings),), num_encoder_layers=1, num_decoder_layers=1)
    params = random_params(model)
    after = model.initialize_peft(jax.random.key(seed), params)
    others = [split(p, frozenset({PATH}))[1] for p in (params, after)]
    assert tree_equal(*others)
    return np.asarray(after["encoder"]["prompt"]), np.asarray(params["token_embedder"]["embedding"])


def rows_of(prompt, table):
    """Returns for each prompt vector the one token whose embedding it equals bit for bit."""
    same = np.all(prompt[:, None] == table[None], axis=-1)
    assert np.all(same.sum(axis=1) == 1)
    return same.argmax(axis=1)


@pytest.mark.parametrize("seed", range(3))
def test_sampled_vocabulary_copies_different_tokens_but_no_special_ones(seed):
    tokens = rows_of(*initialized(seed, length=VOCAB - 3))
    assert sorted(tokens) == list(range(3, VOCAB))


def test_sampled_vocabulary_keeps_to_its_range():
    tokens = rows_of(*initialized(length=12, first_token=5, vocabulary_top=17))
    assert sorted(tokens) == list(range(5, 17))


def test_sampled_vocabulary_repeats_tokens_only_if_there_are_too_few():
    tokens = rows_of(*initialized(length=50, first_token=30))
    assert set(tokens) <= set(range(30, VOCAB)) and len(set(tokens)) > 5


def test_sampled_vocabulary_depends_on_the_key():
    first, again, other = (rows_of(*initialized(seed, length=10)) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)


def test_random_uniform_is_what_init_draws():
    prompt = Prompt(length=500, initialization="random_uniform")
    model = tiny_model((prompt,), num_encoder_layers=1, num_decoder_layers=1)
    drawn = jax.jit(lambda key: model.init(key)["encoder"]["prompt"])(jax.random.key(0))
    assert drawn.shape == (500, 16)
    assert -0.5 <= drawn.min() < -0.49 and 0.49 < drawn.max() < 0.5
    assert np.abs(drawn.mean()) < 0.02
    assert np.var(drawn) == pytest.approx(1 / 12, rel=0.05)
    params = merge({"encoder": {"prompt": drawn}}, split(model.shapes(), frozenset({PATH}))[1])
    after = model.initialize_peft(jax.random.key(1), params)
    np.testing.assert_array_equal(after["encoder"]["prompt"], drawn)


# --- Mistakes


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"initialization": "sampled_vocab"}, "Did you mean 'sampled_vocabulary'"),
        ({"length": 0}, "length=0"),
        ({"first_token": -1}, "first_token=-1"),
        ({"first_token": 100, "vocabulary_top": 100}, "vocabulary_top=100"),
        ({"name": ""}, "name"),
        ({"name": "encoder/prompt"}, "name"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(UserError, match=named):
        Prompt(**settings)


def test_a_vocabulary_with_too_few_tokens():
    with pytest.raises(UserError, match="first_token=40"):
        initialized(length=3, first_token=VOCAB)


def test_packed_batches_are_refused():
    model = tiny_model((Prompt(length=3),))
    ones = np.ones((2, 6), np.int32)
    batch = example_batch() | {"encoder_segment_ids": ones, "decoder_segment_ids": ones}
    with pytest.raises(UserError, match="Packed"):
        jax.eval_shape(model.logits, model.shapes(), batch)


def test_two_methods_of_one_name():
    with pytest.raises(UserError, match="'prompt'"):
        tiny_model((Prompt(length=3), Prompt(length=4)))


def test_two_prompts_of_different_names_come_in_order():
    model = tiny_model((Prompt("inner", length=3), Prompt("outer", length=2)))
    params, batch = random_params(model), example_batch()
    joined = jnp.concatenate([params["encoder"]["outer"], params["encoder"]["inner"]])
    _, pretrained = split(params, frozenset({"encoder/outer", "encoder/inner"}))
    single = tiny_model((Prompt(length=5),))
    expected = jax.jit(single.logits)(merge(pretrained, {"encoder": {"prompt": joined}}), batch)
    np.testing.assert_allclose(jax.jit(model.logits)(params, batch), expected, atol=1e-5)
