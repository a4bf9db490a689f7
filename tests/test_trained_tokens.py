"""Exports and runs keep the token ids and the vocabulary that they were trained with."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import toy
from random_checkpoints import edit_json
from test_export import run
from tiny_models import random_params
from tiny_vocabularies import write_bpe

import robust_ft
from robust_ft import export, runner
from robust_ft.checkpoints_io import adapters, hf, peft
from robust_ft.checkpoints_io.tensors import Checkpoint, Tensor
from robust_ft.checkpoints_io.tokens import Tokens
from robust_ft.errors import UserError
from robust_ft.models.gpt2 import GPT2Config
from robust_ft.models.model import Model
from robust_ft.models.peft import Lora, Prompt
from robust_ft.partitioning import Partitioner
from robust_ft.recipe import Recipe
from robust_ft.restore import load_for_model
from robust_ft.trainable import flatten, trainable_paths, unflatten
from robust_ft.vocabulary import BpeVocabulary, ByteVocabulary, vocabulary_from_directory

# 256 bytes, two merges and <|endoftext|>.
SIZE, END = 259, 258
CONFIG = GPT2Config(
    vocab_size=SIZE, emb_dim=16, num_heads=2, mlp_dim=16, num_layers=2, num_positions=64
)
IDS = {"pad_id": END, "eos_id": END, "start_id": END}
NEWLINE = 10  # any token but the end of text


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A GPT-2 as Hugging Face's files have it, with the tokenizer's two files."""
    folder = write_bpe(tmp_path_factory.mktemp("models") / "gpt2")
    settings = {"tokenizer_class": "GPT2Tokenizer"}
    settings |= {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tensors = {
        path: Tensor.of(np.asarray(leaf), path)
        for path, leaf in flatten(random_params(Model(CONFIG), 0)).items()
    }
    ids = {"pad": END, "eos": END, "start": END}
    hf.write(Checkpoint("made", "gpt2", CONFIG, tensors, ids), folder)
    return folder


def bpe(base, **changes):
    return BpeVocabulary(str(base / "vocab.json"), str(base / "merges.txt"), **changes)


def exported(folder, base, vocabulary, separator=None, name="prompt"):
    """Writes a prompt as a stage does that trained it on the base; returns model and parameters."""
    model = Model(CONFIG, (Prompt(name, length=3),), **IDS, separator_id=separator)
    known = robust_ft.load(base).params
    params = unflatten(flatten(random_params(model, 1)) | flatten(known))
    trained = trainable_paths(params, [f".*/{name}"])
    made = export.base_of(model, params, trained, str(base))
    tokens = Tokens.of(model, vocabulary)
    export.write(folder, model, params, trained, made, tokens, Partitioner())
    return model, params


@pytest.mark.parametrize("separator", [None, NEWLINE])
def test_a_separator_is_applied(base, tmp_path, separator):
    model, params = exported(tmp_path / "export", base, bpe(base), separator)
    loaded = robust_ft.load(base, weights=tmp_path / "export")
    assert loaded.model.separator_id == separator
    batch = {
        "encoder_input_tokens": np.array([[5, 6, 7]], np.int32),
        "encoder_input_mask": np.array([[True, True, True]]),
    }
    expected = robust_ft.Predictor(model, params, bpe(base))
    np.testing.assert_array_equal(
        loaded.generate(batch, max_decode_len=6).tokens,
        expected.generate(batch, max_decode_len=6).tokens,
    )


def test_recipes_that_say_otherwise_are_refused(base, tmp_path):
    model, _ = exported(tmp_path / "export", base, bpe(base), NEWLINE)
    path = f"{base},{tmp_path}/export"
    assert load_for_model(model, path, bpe(base)).keys() == flatten(model.shapes()).keys()
    for changes, sentence in [
        ({"separator_id": None}, f"Model.separator_id={NEWLINE}, the model has None"),
        ({"pad_id": 3}, f"Model.pad_id={END}, the model has 3"),
        ({"stop_ids": (4,)}, r"Model.stop_ids=None, the model has \[4\]"),
    ]:
        with pytest.raises(UserError, match=f"'{tmp_path}/export' was trained with {sentence}"):
            load_for_model(dataclasses.replace(model, **changes), path)
    with pytest.raises(UserError, match=r"trained with a BpeVocabulary.*this recipe has a Byte"):
        load_for_model(model, path, ByteVocabulary(extra_ids=0))


def test_exports_of_earlier_versions_have_the_ids_of_their_base(base, tmp_path):
    exported(tmp_path / "export", base, bpe(base), NEWLINE)
    edit_json(tmp_path / "export" / adapters.SETTINGS, version=2)
    settings = json.loads((tmp_path / "export" / adapters.SETTINGS).read_text())
    del settings["tokens"]
    (tmp_path / "export" / adapters.SETTINGS).write_text(json.dumps(settings))
    assert peft.read(str(tmp_path / "export")).tokens is None
    assert robust_ft.load(base, weights=tmp_path / "export").model.separator_id is None


def test_tokens_that_are_broken(base, tmp_path):
    exported(tmp_path / "export", base, bpe(base))
    edit_json(tmp_path / "export" / adapters.SETTINGS, tokens={"ids": {}})
    with pytest.raises(UserError, match=r"tokens in '.*adapter.json' need ids, vocab_size, voc"):
        robust_ft.load(base, weights=tmp_path / "export")


def test_two_exports_must_agree(base, tmp_path):
    exported(tmp_path / "one", base, bpe(base), NEWLINE, "one")
    exported(tmp_path / "two", base, bpe(base), None, "two")
    with pytest.raises(
        UserError, match=r"'.*/one' and '.*/two' were .* different tokens: their id"
    ):
        robust_ft.load(base, weights=f"{tmp_path}/one,{tmp_path}/two")


def test_the_vocabulary_is_the_one_of_training_or_refused(base, tmp_path):
    files = tmp_path / "files"
    write_bpe(files, names=("encoder.json", "vocab.bpe"))
    other = BpeVocabulary(
        str(files / "encoder.json"), str(files / "vocab.bpe"), input_prefix=("the",)
    )
    exported(tmp_path / "export", base, other)
    assert robust_ft.load(base, weights=tmp_path / "export").vocabulary == other
    with pytest.raises(UserError, match=r"with a BpeVocabulary.*the given vocabulary has a Byte"):
        robust_ft.load(base, weights=tmp_path / "export", vocabulary=ByteVocabulary(extra_ids=0))
    # The files have moved: beside the base they are found by their names, elsewhere not.
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    shutil.move(files, tmp_path / "away")
    with pytest.raises(UserError, match=r"neither '.*gpt2' has nor any file: .*encoder.json'"):
        robust_ft.load(base, weights=tmp_path / "export")
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copyfile(tmp_path / "away" / name, moved / name)
    loaded = robust_ft.load(moved, weights=tmp_path / "export")
    assert loaded.vocabulary.input_prefix == ("the",)


# --- Added tokens


@pytest.fixture(scope="module")
def grown(base, tmp_path_factory):
    """Runs of one step with the <pad> and <sep> that GPT-2 lacks."""
    vocabulary = bpe(base, added_tokens=("<pad>", "<sep>"), pad_token="<pad>")
    config = dataclasses.replace(CONFIG, vocab_size=SIZE + 2)
    ids = {"pad_id": SIZE, "eos_id": END, "start_id": END, "separator_id": SIZE + 1}
    data = dataclasses.replace(toy.DATA, vocabulary=vocabulary, inputs_length=12)
    runs = {}
    for name, methods, patterns in (
        ("full", (), [".*"]),
        ("lora", (Lora(rank=2),), ["peft"]),
        ("prompt", (Prompt(length=2, first_token=0, vocabulary_top=200),), ["peft"]),
    ):
        runs[name] = tmp_path_factory.mktemp("runs") / name
        stage = toy.stage(
            model=Model(config, methods, **ids),
            restore=str(base),
            trainable=patterns,
            data=data,
            steps=1,
            microbatches=1,
            evaluations=(),
            final_evaluations=(),
        )
        runner.run(Recipe("toy", str(runs[name]), (stage,)))
    return runs


TEXTS = ["is 3 odd", "the the", "a<sep>b", ""]


def answers(predictor):
    return predictor.predict(TEXTS, max_decode_len=6)


def assert_grown(predictor):
    """Asserts that a model has the ids and the tokens of the run."""
    model, vocabulary = predictor.model, predictor.vocabulary
    assert (model.pad_id, model.eos_id, model.config.vocab_size) == (SIZE, END, SIZE + 2)
    assert vocabulary.encode("a<sep>b<pad>")[1::2] == [SIZE + 1, SIZE]
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.vocab_size) == (SIZE, END, SIZE + 2)


@pytest.mark.parametrize("name", ["full", "lora", "prompt"])
@pytest.mark.parametrize("to", ["hf", "robust_ft"])
def test_added_tokens_go_out(base, grown, tmp_path, name, to):
    loaded = robust_ft.load(grown[name])
    assert_grown(loaded)
    assert loaded.model.separator_id == SIZE + 1
    assert run(f"--to={to}", f"--input={grown[name]}", f"--output={tmp_path}/run") == 0
    stage = [f"--input={grown[name]}/model", f"--base={base}"]
    assert run(f"--to={to}", *stage, f"--output={tmp_path}/stage") == 0
    for written in ("run", "stage"):
        weights = f"{tmp_path}/{written}/export" if (name, to) == ("prompt", "robust_ft") else None
        again = robust_ft.load(tmp_path / written, weights=weights)
        assert_grown(again)
        expected = loaded
        if (name, to) == ("prompt", "hf"):
            expected = loaded.without("prompt")
            assert (tmp_path / written / "prompt" / peft.CONFIG).is_file()
        if to == "hf":  # which has no word for a separator
            again = with_separator(again)
        assert again.model.separator_id == SIZE + 1
        assert answers(again) == answers(expected)


def with_separator(predictor):
    model = dataclasses.replace(predictor.model, separator_id=SIZE + 1)
    return robust_ft.Predictor(model, predictor.params, predictor.vocabulary)


def test_an_export_and_its_base_have_the_added_tokens(base, grown):
    loaded = robust_ft.load(base, weights=f"{grown['prompt']}/model/export")
    assert_grown(loaded)
    assert answers(loaded) == answers(robust_ft.load(grown["prompt"]))
    # And so has a checkpoint, which has no record of its own.
    full = robust_ft.load(base, weights=f"{grown['full']}/model/checkpoint_1")
    assert_grown(full)
    assert answers(full) == answers(robust_ft.load(grown["full"]))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["full", "prompt"])
def test_transformers_reads_the_added_tokens(grown, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    assert run("--to=hf", f"--input={grown[name]}", f"--output={tmp_path}/out") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    vocabulary = vocabulary_from_directory(tmp_path / "out")
    assert len(tokenizer) == SIZE + 2
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (SIZE, END)
    assert tokenizer.convert_tokens_to_ids("<sep>") == SIZE + 1
    for text in [*TEXTS, " the<pad> x <sep>", "naïve"]:
        assert tokenizer(text).input_ids == vocabulary.encode(text)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.vocab_size, config.pad_token_id) == (SIZE + 2, SIZE)
    assert config.eos_token_id == END


def test_peft_cannot_say_a_separator(grown, tmp_path, caplog):
    assert run("--to=peft", f"--input={grown['prompt']}", f"--output={tmp_path}/out") == 0
    assert "put token 260 ('<sep>') behind each input" in caplog.text
    assert json.loads((tmp_path / "out" / peft.CONFIG).read_text())["num_virtual_tokens"] == 2


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("name", ["full", "lora", "prompt"])
def test_transformers_and_peft_answer_the_same(grown, tmp_path, name):
    """With the separator behind each input, which their files cannot say."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    import peft as theirs

    out = tmp_path / "out"
    assert run("--to=hf", f"--input={grown[name]}", f"--output={out}") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    if name == "prompt":
        model = theirs.PeftModel.from_pretrained(model, out / "prompt").eval()
    loaded = robust_ft.load(grown[name])
    for text, expected in zip(TEXTS, answers(loaded), strict=True):
        inputs = tokenizer(text + "<sep>", return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        new = made[0, inputs.input_ids.shape[1] :].tolist()
        assert loaded.text(np.array(new)) == expected
