"""Random tokenizer directories: class, files, template, flags, special and added tokens."""

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "the cat sat on the mat, and that is that", "A cat in 1999 had 12 hats.", "Zürich, Straße, é",
    "user says hi", "it's  two  spaces", "def f(x):\n\treturn x + 10", "ﬁne ½ …", "hello world",
] * 5  # fmt: skip
TEXTS = (
    "", " ", "hello", " hello", "hello ", "  the  cat ", "it's 1999 12", "Zürich 東京 😀",
    "<s>hello</s>", "a <s> b </s> c", "<|im_start|>user\nHi<|im_end|>\n", "the <|im_end|> cat",
    "x<|im_end|>y <tag> z", "a  <tag>  b<tag>c", "e\u0301 ﬁ Ａ", "line\nline\n\n1\t2",
    "<unk> <pad>",
    "<|endoftext|> x<|endoftext|>", "<mask> a <mask>", "<extra_id_0> the <extra_id_1>cat", "<mytag",
)  # fmt: skip
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>")
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend", "PreTrainedTokenizer", "NovelTokenizer")
LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast", "BartTokenizer", "BartTokenizerFast")
QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
T5 = ("T5Tokenizer", "T5TokenizerFast")
# By kind of file, classes that can read it, and types of models that have it.
KINDS = {
    "words": (GENERIC, ("llama", "mistral")),
    "byte_level": (
        (None, *GENERIC, *GPT2, *QWEN, "LlamaTokenizer"),
        ("llama", "mistral", "gpt2", "bart", "qwen2", "qwen3"),
    ),
    "digits": ((None, *GENERIC, *GPT2, "LlamaTokenizerFast"), ("llama", "mistral", "qwen3")),
    "metaspace": ((None, *GENERIC, *LLAMA), ("llama", "mistral", "qwen3")),
    "unigram": ((None, *T5), ("t5", "mt5")),
    "two_files": ((*GPT2, *QWEN), ("llama", "gpt2", "qwen2", "qwen3", "bart")),
    "llama_model": ((None, *GENERIC[:-1], *LLAMA), ("llama", "mistral")),
    "unigram_model": ((None, *GENERIC[:-1], *LLAMA), ("llama", "mistral")),
    "t5_model": ((None, *T5), ("t5", "mt5")),
}
TEMPLATES = (None, "<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A")
FLAGS = ("absent", None, True, False)


@functools.cache
def trained(kind):
    """Returns a folder with the files of a kind of model."""
    folder = Path(tempfile.mkdtemp(prefix=kind))
    if kind == "words":
        vocab = {w: i for i, w in enumerate([*SPECIAL, *sorted({*" ".join(CORPUS).split()})])}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(["<s>", "</s>"])
    elif kind in ("byte_level", "digits", "two_files"):
        tokenizer = tokenizers.Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        steps = pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.pre_tokenizer = steps if kind == "digits" else byte_level
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330, special_tokens=[*SPECIAL, "<mask>"], show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        tokenizer.train_from_iterator(CORPUS, trainer)
        if kind == "two_files":
            tokenizer.model.save(str(folder))
            return folder
    elif kind == "metaspace":
        tokenizer = tokenizers.Tokenizer(
            models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)]
        )  # fmt: skip
        trainer = trainers.BpeTrainer(
            vocab_size=420, show_progress=False,
            special_tokens=[*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))],
        )  # fmt: skip
        tokenizer.train_from_iterator(CORPUS, trainer)
    elif kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=120, show_progress=False, unk_token="<unk>",
            special_tokens=["<pad>", "</s>", "<unk>", "<s>"],
        )  # fmt: skip
        tokenizer.train_from_iterator(CORPUS, trainer)
    else:
        import sentencepiece

        bpe = kind == "llama_model"
        llama = {
            "model_type": "bpe" if bpe else "unigram", "byte_fallback": True, "vocab_size": 380,
            "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        }  # fmt: skip
        t5 = {"vocab_size": 100, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        name = "spiece" if kind == "t5_model" else "tokenizer"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=str(folder / name), minloglevel=2,
            hard_vocab_limit=False, **(t5 if kind == "t5_model" else llama),
        )  # fmt: skip
        (folder / f"{name}.vocab").unlink()
        return folder
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def size_of(kind):
    """Returns how many ids the files of a kind of model have."""
    [file, *_] = sorted(trained(kind).iterdir())
    if file.name == "tokenizer.json":
        return tokenizers.Tokenizer.from_file(str(file)).get_vocab_size()
    if file.suffix == ".txt":
        return len(json.loads((trained(kind) / "vocab.json").read_text()))
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(str(file))
    return processor.get_piece_size()


def write(folder, seed):
    """Writes a random directory and returns what it is, for messages."""
    draw = random.Random(seed)
    kind = draw.choice(list(KINDS))
    name, model_type = map(draw.choice, KINDS[kind])
    folder.mkdir(parents=True, exist_ok=True)
    for file in trained(kind).iterdir():
        shutil.copy(file, folder)
    file = folder / "tokenizer.json"
    template = draw.choice(TEMPLATES)
    if file.exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        if template:
            ids = [(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=ids
            )
        if draw.random() < 0.3:
            token = tokenizers.AddedToken("<tag>", lstrip=True, normalized=draw.random() < 0.5)
            tokenizer.add_tokens([token])
        tokenizer.save(str(file))
    size = size_of(kind)
    if file.exists():
        size = tokenizers.Tokenizer.from_file(str(file)).get_vocab_size()
    elif kind == "t5_model":
        size += 100
    settings = {} if name is None else {"tokenizer_class": name}
    for flag in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"):
        if (value := draw.choice(FLAGS)) != "absent":
            settings[flag] = value
    if draw.random() < 0.1 and kind != "t5_model":
        settings["split_special_tokens"] = True
    eos = draw.choice(("</s>", "</s>", "<|im_end|>", None))
    special = {"bos_token": draw.choice(("<s>", "<s>", None))}
    if draw.random() < 0.3:
        special["pad_token"] = draw.choice(("<pad>", "</s>", "<|new|>", None))
    if draw.random() < 0.3:
        special["unk_token"] = "<unk>"
    if eos:
        special["eos_token"] = eos
    if draw.random() < 0.2:
        special["bos_token"] = None
    where = draw.choice(("config", "map", "both"))
    tokens = {}
    if eos == "<|im_end|>" or draw.random() < 0.4:
        names = ["<|im_end|>", "<|im_start|>", "<tag>"][: draw.randint(1, 3)]
        for token in names:
            known = file.exists() and tokenizers.Tokenizer.from_file(str(file)).token_to_id(token)
            tokens[token] = (
                known if known else size + len([i for i in tokens.values() if i >= size])
            )
        if draw.random() < 0.5:
            (folder / "added_tokens.json").write_text(json.dumps(tokens))
        else:
            own = json.loads(file.read_text())["added_tokens"] if file.exists() else []
            settings["added_tokens_decoder"] = {
                str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in own
            } | {
                str(i): {
                    "content": token, "special": draw.random() < 0.7, "single_word": False,
                    "normalized": draw.random() < 0.3, "lstrip": draw.random() < 0.3,
                    "rstrip": draw.random() < 0.3,
                }
                for token, i in tokens.items()
            }  # fmt: skip
    if draw.random() < 0.2 and kind != "t5_model":  # T5's are its sentinels
        settings["additional_special_tokens"] = ["<|im_start|>"]
    if where in ("config", "both"):
        settings |= special
    if where in ("map", "both"):
        named = {k: v for k, v in special.items() if v}
        (folder / "special_tokens_map.json").write_text(json.dumps(named))
    if settings or draw.random() < 0.7:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": model_type, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return f"seed {seed}: {kind}, {name}, {model_type}, {template}, {tokens}, {settings}, {special}"
