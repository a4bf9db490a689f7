import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, example_batch, random_batch, random_params, tiny_model, tree_equal

from robust_ft.errors import UserError
from robust_ft.models.bart import BartConfig
from robust_ft.models.model import Model
from robust_ft.models.peft import Prompt
from robust_ft.models.t5 import T5Config
from robust_ft.trainable import flatten, merge, split
from robust_ft.vocabulary import Vocabulary

PATH = "encoder/prompt"
DATA = os.environ.get("ROBUST_FT_DATA_DIR")


@dataclasses.dataclass(frozen=True)
class Letters(Vocabulary):
    """One token a letter, "a" is 3; capitals are unknown, spaces are nothing."""

    pad_id: int = 0
    eos_id: int = 1
    unk_id: int | None = 2
    vocab_size: int = 29
    fingerprint: str = "letters"

    def encode(self, text):
        letters = text.replace(" ", "")
        return [ord(c) - ord("a") + 3 if c.islower() else self.unk_id for c in letters]

    def decode(self, ids):
        return "".join(chr(ord("a") + i - 3) for i in ids)


LETTERS = Letters()
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
    mask = torch.from_numpy(batch["encoder_input_mask"]).long()
    mask = torch.nn.functional.pad(mask, (5, 0), value=1)
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
    _, cache = jax.eval_shape(lambda p: model.prefill(p, example_batch(), 4), model.shapes())
    assert cache["layers"][0]["memory"]["key"].dtype == jnp.bfloat16
    assert cache["memory_mask"].shape == (2, 3 + 6)


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


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (-0.1, 2.0)])
def test_random_uniform_has_its_bounds(low, high):
    prompt = Prompt(length=500, initialization="random_uniform", low=low, high=high)
    model = tiny_model((prompt,), num_encoder_layers=1, num_decoder_layers=1)
    drawn = jax.jit(lambda key: model.init(key)["encoder"]["prompt"])(jax.random.key(0))
    share = (np.asarray(drawn) - low) / (high - low)
    assert 0 <= share.min() < 0.01 and 0.99 < share.max() < 1
    assert share.mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("length", [2, 3, 12])
def test_class_labels_are_averages_and_the_rest_is_sampled(length):
    prompt, table = initialized(
        length=length,
        initialization="class_labels",
        vocabulary=LETTERS,
        labels=("no", "a bee")[:length],
        first_token=10,
    )
    expected = [(table[16] + table[17]) / 2, (table[3] + table[4] + 2 * table[7]) / 4]
    np.testing.assert_allclose(prompt[:2], expected, rtol=0, atol=1e-6)
    sampled = rows_of(prompt[2:], table)
    assert len(set(sampled)) == length - 2 and set(sampled) <= set(range(10, VOCAB))


@pytest.mark.parametrize("length", [2, 4, 11])
def test_a_text_is_cut_or_repeated(length):
    settings = {"initialization": "text", "vocabulary": LETTERS, "text": "read"}
    tokens = rows_of(*initialized(length=length, **settings))
    assert LETTERS.decode(tokens) == "readreadread"[:length]


def test_embeddings_are_copied_as_the_model_scales_them():
    config = BartConfig(
        vocab_size=VOCAB, emb_dim=16, num_heads=2, mlp_dim=8, num_encoder_layers=1,
        num_decoder_layers=1, num_positions=32, scale_embedding=True,
    )  # fmt: skip
    settings = {"vocabulary": LETTERS, "labels": ("no", "b"), "first_token": 5}
    for changes in (settings | {"initialization": "class_labels"}, {"first_token": 5}):
        model = Model(config, (Prompt(length=6, **changes),))
        params = model.initialize_peft(jax.random.key(0), random_params(model))
        table = np.asarray(params["token_embedder"]["embedding"])
        prompt = np.asarray(params["encoder"]["prompt"])
        np.testing.assert_allclose(prompt[2:] / 4, table[rows_of(prompt[2:] / 4, table)])
    with_labels = dataclasses.replace(model, peft=(Prompt(length=2, **settings | {
        "initialization": "class_labels"}),))  # fmt: skip
    params = with_labels.initialize_peft(jax.random.key(0), params)
    np.testing.assert_allclose(params["encoder"]["prompt"][1], 4 * table[4], rtol=1e-6)


def saved(folder, name, shape, dtype=np.float32, seed=0):
    """Writes a random prompt; returns (path, array)."""
    array = np.random.default_rng(seed).normal(size=shape).astype(dtype)
    np.save(folder / name, array)
    return str(folder / name), array


def test_a_file_is_read_as_float32(tmp_path):
    path, array = saved(tmp_path, "prompt.npy", (4, 16), np.float64)
    prompt, _ = initialized(length=4, initialization="file", file=path)
    assert prompt.dtype == np.float32
    np.testing.assert_array_equal(prompt, array.astype(np.float32))


@pytest.mark.skipif(DATA is None, reason="needs published prompts: ROBUST_FT_DATA_DIR")
def test_published_prompts_load_into_t5_base():
    folder = Path(DATA) / "checkpoints" / "prompts"
    config = T5Config(vocab_size=32128, emb_dim=768, num_heads=12, mlp_dim=2048,
                      num_encoder_layers=12, num_decoder_layers=12)  # fmt: skip
    files = [str(folder / f"{name}.npy") for name in ("rte", "mrpc", "sst2")]
    model = Model(config, (Prompt(initialization="file", file=files[0]),))
    model.check()
    params = model.initialize_peft(jax.random.key(0), model.shapes())
    np.testing.assert_array_equal(params["encoder"]["prompt"], np.load(files[0]))
    tasks = ("rte", "mrpc", "sst2")
    model = Model(config, (Prompt(initialization="file", file=files, tasks=tasks),))
    model.check()
    params = model.initialize_peft(jax.random.key(0), model.shapes())
    assert flatten(model.shapes())[PATH].shape == (3, 100, 768)
    np.testing.assert_array_equal(params["encoder"]["prompt"], np.stack([*map(np.load, files)]))
    with pytest.raises(UserError, match=r"prompt_5x256.npy' is \[5, 256\].* \[5, 768\]"):
        wrong = Prompt(length=5, initialization="file", file=str(folder / "prompt_5x256.npy"))
        Model(config, (wrong,)).check()


# --- Several prompts


def test_each_task_draws_tokens_of_its_own():
    prompt, table = initialized(length=10, tasks=("a", "b"))
    tokens = [rows_of(each, table) for each in prompt]
    assert prompt.shape == (2, 10, 16) and list(tokens[0]) != list(tokens[1])


def test_tasks_share_a_file_or_have_one_each(tmp_path):
    paths, arrays = zip(
        *(saved(tmp_path, f"{seed}.npy", (4, 16), seed=seed) for seed in range(2)), strict=True
    )
    settings = {"length": 4, "initialization": "file", "tasks": ["a", "b"]}
    prompt, _ = initialized(**settings, file=list(paths))
    np.testing.assert_array_equal(prompt, np.stack(arrays))
    prompt, _ = initialized(**settings, file=paths[1])
    np.testing.assert_array_equal(prompt, np.stack([arrays[1]] * 2))


def test_the_model_has_the_tasks_of_its_prompt():
    model = tiny_model((Prompt(length=3, tasks=["rte", "d2t", "d2t_ood_1shot"]),))
    assert model.tasks == ("rte", "d2t", "d2t_ood_1shot")
    assert model.without("prompt").tasks == ()
    names = ["rte", "rte_1shot", "d2t_16shot", "d2t_ood", "d2t_ood_1shot", "d2t_ood_4shot"]
    assert [model.task_index(name) for name in names] == [0, 0, 1, 1, 2, 1]
    for name in ("cb", "rte2", "oldrte"):
        with pytest.raises(UserError, match=f"no prompt for the task '{name}', only for rte, d2t"):
            model.task_index(name)
    assert flatten(model.shapes())[PATH].shape == (3, 3, 16)
    assert flatten(model.logical_axes())[PATH] == (None, "prompt", "embed")


def test_what_is_exported_is_free_of_its_start():
    start = {"initialization": "class_labels", "vocabulary": LETTERS, "labels": ("no",)}
    kept = {"length": 3, "position": "infix", "tasks": ("a", "b")}
    assert Prompt(**kept, **start).exported() == Prompt(**kept)
    uniform = Prompt(initialization="random_uniform", low=0.0, vocabulary=LETTERS)
    assert uniform.exported() == Prompt()


# --- Mistakes


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"initialization": "sampled_vocab"}, "Did you mean 'sampled_vocabulary'"),
        ({"length": 0}, "length=0"),
        ({"first_token": -1}, "first_token=-1"),
        ({"first_token": 100, "vocabulary_top": 100}, "vocabulary_top=100"),
        ({"low": 0.5}, r"low=0.5 must be below Prompt.high=0.5"),
        ({"position": "inflix"}, "position='inflix' is not one of .* mean 'infix'"),
        ({"tasks": ["a", "a"]}, r"tasks needs different names, not \['a', 'a'\]"),
        ({"tasks": "rte"}, r"Prompt.tasks must be a list; write \['rte'\]"),
        ({"labels": "yes"}, r"Prompt.labels must be a list; write \['yes'\]"),
        ({"labels": ["yes"]}, "labels is for .*'class_labels', not 'sampled_vocabulary'"),
        ({"text": "a", "initialization": "file"}, "text is for .*'text', not 'file'"),
        ({"file": "x.npy"}, "file is for .*'file', not 'sampled_vocabulary'"),
        ({"initialization": "class_labels", "vocabulary": LETTERS}, "needs Prompt.labels"),
        ({"initialization": "text", "vocabulary": LETTERS}, "needs Prompt.text"),
        ({"initialization": "file"}, "needs Prompt.file"),
        ({"initialization": "text", "text": "a"}, "needs Prompt.vocabulary"),
        (
            {
                "labels": ["a", "b"],
                "initialization": "class_labels",
                "vocabulary": LETTERS,
                "length": 1,
            },
            "length=1 has no place for 2 labels",
        ),
        (
            {"initialization": "file", "file": ["a", "b"], "tasks": ["a", "b", "c"]},
            "one file, or one for each of 3 Prompt.tasks, not 2",
        ),
        ({"name": ""}, "name"),
        ({"name": "encoder/prompt"}, "name"),
    ],
)
def test_settings_out_of_range(settings, named):
    with pytest.raises(UserError, match=named):
        Prompt(**settings)


def test_a_vocabulary_with_too_few_tokens():
    with pytest.raises(UserError, match="first_token=40"):
        tiny_model((Prompt(length=3, first_token=VOCAB),)).check()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"labels": ["no", "N"]}, "no tokens for a part of 'N' in Prompt.labels"),
        ({"labels": ["nN"]}, "no tokens for a part of 'nN' in Prompt.labels"),
        ({"labels": [" "]}, "no tokens for ' ' in Prompt.labels"),
        ({"text": "  "}, "no tokens for '  ' in Prompt.text"),
        ({"labels": ["z"], "vocab_size": 20}, "token 28 for 'z' in Prompt.labels.*has 20 tokens"),
        ({"labels": ["a"], "first_token": 40}, "first_token=40 leaves no token"),
    ],
)
def test_what_a_vocabulary_cannot_encode(settings, sentence):
    sizes = {"vocab_size": settings.pop("vocab_size", VOCAB)}
    initialization = "text" if "text" in settings else "class_labels"
    prompt = Prompt(length=3, initialization=initialization, vocabulary=LETTERS, **settings)
    with pytest.raises(UserError, match=sentence):
        tiny_model((prompt,), **sizes).check()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("promt.npy", "no prompt file '.*promt.npy'. Did you mean 'prompt.npy'"),
        ("wide.npy", r"wide.npy' is \[4, 17\], but Prompt.length=4 .* of 16 asks for \[4, 16\]"),
        ("long.npy", r"long.npy' is \[5, 16\], but Prompt.length=4"),
        ("deep.npy", r"holds float32 \(2, 4, 16\), not a soft prompt"),
        ("whole.npy", "holds int32"),
        ("nan.npy", "not finite"),
        ("cut.npy", "no readable .npy file, or is truncated"),
        ("empty.npy", "no readable .npy file"),
        ("objects.npy", "no readable .npy file"),
        ("several.npy", "holds several arrays"),
        (".", "no prompt file"),
    ],
)
def test_a_file_that_is_no_prompt_of_this_model(tmp_path, name, sentence):
    path, array = saved(tmp_path, "prompt.npy", (4, 16))
    for other, shape in (("wide", (4, 17)), ("long", (5, 16)), ("deep", (2, 4, 16))):
        saved(tmp_path, f"{other}.npy", shape)
    np.save(tmp_path / "whole.npy", array.astype(np.int32))
    np.save(tmp_path / "nan.npy", array * np.nan)
    np.save(tmp_path / "objects.npy", array.astype(object))
    (tmp_path / "cut.npy").write_bytes(Path(path).read_bytes()[:-10])
    (tmp_path / "empty.npy").write_bytes(b"")
    with open(tmp_path / "several.npy", "wb") as file:
        np.savez(file, array)
    prompt = Prompt(length=4, initialization="file", file=str(tmp_path / name))
    with pytest.raises(UserError, match=sentence):
        tiny_model((prompt,)).check()


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
