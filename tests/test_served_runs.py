"""What a run ended with is what transformers and PEFT answer once it is converted."""

import os

import numpy as np
import pytest
import real_directories
from real_directories import CHAT, PROMPTS
from test_decoder_only_agreement import LENGTH, generated

import robust_ft
from robust_ft import AdamW, Lora, Prefix, Prompt, Recipe, Schedule, Stage, TaskData
from robust_ft.convert import convert

# The others take long: with ROBUST_FT_PROMPTS set.
FAMILIES = ["llama3"]
if "ROBUST_FT_PROMPTS" in os.environ:
    FAMILIES += ["mistral", "qwen2", "qwen3", "gpt2"]
METHODS = {
    "full": ((), ("base",)),
    "lora": ((Lora(rank=3, alpha=6.0),), ("peft",)),
    "prompt": ((Prompt(length=4),), ("peft",)),
    "prefix": ((Prefix(length=3, counted=True),), ("peft",)),
}
BATCH = 16
pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),  # PEFT makes its own
    pytest.mark.skipif("ROBUST_FT_DATA_DIR" not in os.environ, reason="needs the datasets"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    real_directories.write(request.param, folder)
    end = {"llama3": "<|eot_id|>", "gpt2": "<|endoftext|>"}.get(request.param, CHAT[1])
    return folder, real_directories.prompts(PROMPTS, chat=(CHAT[0] if end == CHAT[1] else "", end))


def trained(folder, directory, methods, trainable, vocab_size=None, steps=8):
    """Finetunes the model on pairs of texts in a few large steps; returns what it ends with."""
    config = None if vocab_size is None else {"vocab_size": vocab_size}
    loaded = robust_ft.load(folder, config=config)
    words = ["red", "green", "blue", "tall"]
    pairs = [(f"Say {a} {b}:", f" {b} {a}") for a in words for b in words]
    task = robust_ft.pairs_task("say", train=pairs, validation=pairs[:4])
    data = TaskData(
        task="say",
        file_tasks=(task,),
        inputs_length=24,
        targets_length=12,
        vocabulary=loaded.vocabulary,
        cache_dir=str(directory.parent / "cache"),
    )
    stage = Stage(
        name="model",
        model=loaded.model.with_peft(*methods),
        restore=str(folder),
        trainable=trainable,
        data=data,
        steps=steps,
        batch_size=8,
        optimizer=AdamW(Schedule(3e-2 if methods else 3e-3)),
    )
    robust_ft.run(Recipe("say", str(directory), (stage,)))
    return robust_ft.load(directory)


def answers(reference, tokenizer, predictor, texts):
    """Returns transformers' answer to each text, decoded by our vocabulary."""
    ends = reference.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    found = []
    for text in texts:
        tokens = generated(reference, tokenizer(text).input_ids or [predictor.model.start_id])
        stops = [i for i, token in enumerate(tokens) if token in ends]
        found.append(predictor.vocabulary.decode(tokens[: stops[0]] if stops else tokens))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_converted_run_answers_the_same(base, method, tmp_path):
    import peft
    import transformers

    folder, texts = base
    predictor = trained(folder, tmp_path / "run", *METHODS[method])
    said = predictor.predict(texts, max_decode_len=LENGTH, batch_size=BATCH)
    before = robust_ft.load(folder).predict(texts[:40], max_decode_len=LENGTH, batch_size=BATCH)
    assert np.mean([a == b for a, b in zip(said, before, strict=False)]) < 0.5, "it has trained"
    out = tmp_path / "out"
    convert(str(tmp_path / "run"), str(out), output_format="hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    adapter = next((f.parent for f in out.rglob("adapter_config.json")), None)
    assert (adapter is not None) == (method != "full")
    if method in ("full", "lora"):  # merged
        assert answers(model, tokenizer, predictor, texts) == said
    if method != "full":
        if method == "lora":
            model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        assert answers(model, tokenizer, predictor, texts) == said


@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_after_the_vocabulary_has_grown(base, method, tmp_path):
    import peft
    import transformers

    folder, texts = base
    size = robust_ft.load(folder).model.config.vocab_size + 7
    predictor = trained(folder, tmp_path / "run", *METHODS[method], vocab_size=size)
    said = predictor.predict(texts, max_decode_len=LENGTH, batch_size=BATCH)
    out = tmp_path / "out"
    convert(str(tmp_path / "run"), str(out), output_format="hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert model.config.vocab_size == size
    if method == "prompt":
        adapter = next(f.parent for f in out.rglob("adapter_config.json"))
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert answers(model, tokenizer, predictor, texts) == said
