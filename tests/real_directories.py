"""Directories of tiny random models of every decoder-only family, with real tokenizer files.

Each is laid out as its publishers do: tokenizer files, special tokens, templates, several
end-of-sequence ids. Needs transformers and the datasets.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np

DATA = Path(os.environ.get("ROBUST_FT_DATA_DIR", ""))
# Prompts to compare. ROBUST_FT_PROMPTS=200 takes most of an hour on two cores.
PROMPTS = int(os.environ.get("ROBUST_FT_PROMPTS", "32"))
WORDS_FROM = "wmt_newstest/newstest2016.eng-deu.eng"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GQA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 512}
CHAT = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def write(family, folder, seed=0):
    """Writes the directory of a random model; returns PyTorch's model in eval mode."""
    import transformers

    vocab_size, settings, ids = {
        "llama3": _llama3,
        "llama2": _llama2,
        "mistral": _llama2,
        "smollm2": _smollm2,
        "qwen2": _qwen,
        "qwen3": _qwen,
        "gpt2": _gpt2,
    }[family](folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    kinds = {
        "llama3": ("Llama", GQA),
        "llama2": ("Llama", GQA),
        "smollm2": ("Llama", {**GQA, "tie_word_embeddings": True}),
        "mistral": ("Mistral", {**GQA, "sliding_window": 16}),
        "qwen2": ("Qwen2", {**GQA, "tie_word_embeddings": True}),
        "qwen3": ("Qwen3", {**GQA, "head_dim": 12}),
        "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    }
    name, sizes = kinds[family]
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(
        transformers,
        f"{name}{'LMHead' if name == 'GPT2' else 'ForCausalLM'}"
        + ("Model" if name == "GPT2" else ""),
    )
    stop = ids.pop("generation_eos", None)
    model = model_class(config_class(vocab_size=vocab_size, **sizes, **ids))
    _randomize(model, seed)
    if stop is not None:
        model.generation_config.eos_token_id = stop
    model.save_pretrained(folder)
    return model_class.from_pretrained(folder).eval()


def prompts(count, seed=0, chat=CHAT):
    """Returns generated prompts: plain and chat-formatted ones, empty and one-token ones."""
    rng = np.random.default_rng(seed)
    lines = (DATA / WORDS_FROM).read_text(encoding="utf-8").split("\n")[:800]
    lines = [line for line in lines if line]

    def words(most):
        line = lines[rng.integers(len(lines))].split(" ")
        return " ".join(line[: rng.integers(1, most)])

    texts = ["", " ", "a", "The", "1 2\n\n3"]
    while len(texts) < count:
        start, end = chat
        turns = [f"{start}{role}\n{words(9)}{end}\n" for role in ("user", "assistant")]
        kinds = [
            words(30),
            f"Question: {words(20)}\nAnswer:",
            "".join(turns * int(rng.integers(1, 3))) + f"{start}assistant\n",
            f"{words(4)}{end}{words(4)}",
            words(6) + end,
        ]
        texts.append(kinds[rng.integers(len(kinds))])
    return texts


def targets(count, seed=1):
    """Returns short targets, some with a space before them."""
    rng = np.random.default_rng(seed)
    lines = [line for line in (DATA / WORDS_FROM).read_text("utf-8").split("\n")[800:1200] if line]
    picked = [lines[i].split(" ")[: int(rng.integers(1, 5))] for i in rng.integers(0, 300, count)]
    return [" " * int(rng.integers(2)) + " ".join(words) for words in picked]


def _randomize(model, seed):
    """Draws parameters whose outputs depend on all of the input, and sometimes end."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                scale = 1.0 if name.endswith(("embed_tokens.weight", "wte.weight")) else 0.3
                value.copy_(noise * scale)
            else:
                value.copy_(0.2 * noise + name.endswith("weight"))


def _bpe(folder, split, added, template=()):
    """Writes a tokenizer.json over GPT-2's tokens and merges; returns the number of tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    files = [str(DATA / "tokenizers/gpt2" / name) for name in ("encoder.json", "vocab.bpe")]
    tokenizer = Tokenizer(BPE.from_file(*files))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    first = split or pre_tokenizers.Digits(individual_digits=True)
    if isinstance(split, str):
        first = pre_tokenizers.Split(Regex(split), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    if template:
        tokens = [(token, tokenizer.token_to_id(token)) for token in template]
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=[*template, "$A"], pair=[*template, "$A", "$B"], special_tokens=tokens
                ),
            ]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


# Llama 3's and Qwen's, which take three digits and one at once.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _llama3(folder):
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    size = _bpe(folder, _SPLIT.format(digits=r"\p{N}{1,3}"), (begin, end, *HEADERS), (begin,))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": HEADERS[2],
        "clean_up_tokenization_spaces": False,
    }
    ids = {"bos_token_id": size - 5, "eos_token_id": [size - 4, size - 1]}
    return size, settings, ids | {"generation_eos": [size - 4, size - 1]}


def _llama2(folder):
    import sentencepiece

    texts = (DATA / WORDS_FROM).read_text(encoding="utf-8").split("\n")[:1500]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    added = {token: 900 + i for i, token in enumerate(CHAT)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return 902, settings, {"bos_token_id": 1, "eos_token_id": 2}


def _smollm2(folder):
    size = _bpe(folder, None, CHAT)
    settings = {
        # The published class is GPT2Tokenizer, for which transformers 5 drops the rule for digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CHAT[0],
        "eos_token": CHAT[1],
        "pad_token": CHAT[1],
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    ids = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    return size, settings, ids


def _qwen(folder):
    size = _bpe(folder, _SPLIT.format(digits=r"\p{N}"), CHAT)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": CHAT[1],
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    end_of_text = 50256
    ids = {"bos_token_id": end_of_text, "eos_token_id": size - 1, "pad_token_id": end_of_text}
    return size + 30, settings, ids | {"generation_eos": [size - 1, end_of_text]}


def _gpt2(folder):
    for theirs, ours in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(DATA / "tokenizers/gpt2" / theirs, folder / ours)
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    return 50257, settings, {}
