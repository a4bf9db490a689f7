"""The tokenizer classes of transformers 5: what they read, and what they take for granted."""

import dataclasses
from collections.abc import Mapping

# Sets of files that each define a vocabulary, and those of each class, in order of preference.
TOKENIZER = ("tokenizer.json",)
BPE = ("vocab.json", "merges.txt")
OPENAI = ("encoder.json", "vocab.bpe")
FAIRSEQ = (*OPENAI, "dict.txt")
LLAMA = ("tokenizer.model",)
T5 = (("spiece.model",), ("sentencepiece.model",))
_SENTENCEPIECE = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
    """A tokenizer class of transformers.

    Attributes:
        files: What it reads, in order of preference.
        tokens: Special tokens where the files name none.
        pipeline: How it cuts a text, None if as the tokenizer.json says.
    """

    files: tuple[tuple[str, ...], ...]
    tokens: Mapping[str, str]
    pipeline: str | None = None


BACKEND = "TokenizersBackend"  # what classes without a name of their own are
CLASSES = {
    BACKEND: TokenizerClass((TOKENIZER, LLAMA), {}),
    "LlamaTokenizer": TokenizerClass((TOKENIZER, LLAMA), _SENTENCEPIECE, "llama"),
    "CodeLlamaTokenizer": TokenizerClass(
        (TOKENIZER, LLAMA),
        {
            **_SENTENCEPIECE,
            "prefix_token": "▁<PRE>",
            "middle_token": "▁<MID>",
            "suffix_token": "▁<SUF>",
            "eot_token": "▁<EOT>",
            "fill_token": "<FILL_ME>",
        },
        "code_llama",
    ),
    "GPT2Tokenizer": TokenizerClass(
        (TOKENIZER, BPE, OPENAI),
        dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "gpt2",
    ),
    "Qwen2Tokenizer": TokenizerClass(
        (TOKENIZER, BPE),
        dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        "qwen2",
    ),
    "BartTokenizer": TokenizerClass(
        (TOKENIZER, BPE, FAIRSEQ),
        {
            **_SENTENCEPIECE,
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "cls_token": "<s>",
            "mask_token": "<mask>",
        },
        "gpt2",
    ),
    "T5Tokenizer": TokenizerClass(
        (TOKENIZER, *T5),
        {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        "t5",
    ),
    "ByT5Tokenizer": TokenizerClass((), {}),
}
ALIASES = {"RobertaTokenizer": "BartTokenizer", "MT5Tokenizer": "T5Tokenizer"}
# The class that transformers registers for a model type; for 'llama' it registers none.
REGISTERED = {
    "bart": "BartTokenizer", "roberta": "BartTokenizer", "byt5": "ByT5Tokenizer",
    "code_llama": "CodeLlamaTokenizer", "gpt2": "GPT2Tokenizer", "mistral": BACKEND,
    "mt5": "T5Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer",
    "t5": "T5Tokenizer", "umt5": BACKEND,
}  # fmt: skip
GENERIC = ("PreTrainedTokenizer", "PythonBackend", BACKEND, "AutoTokenizer")
# Whose classes transformers knows to be named wrongly in published directories.
MISNAMED = ("qwen2",)
