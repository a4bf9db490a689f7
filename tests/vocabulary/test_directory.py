"""What a Hugging Face model directory holds: recognised, or refused in one sentence."""

import json
import shutil

import pytest
import tokenizers
from tiny_vocabularies import write_bart, write_bpe

import robust_ft.vocabulary
from robust_ft.errors import UserError
from robust_ft.vocabulary import (
    BpeVocabulary,
    ByteVocabulary,
    SentencePieceVocabulary,
    encode_inputs,
    encode_targets,
    vocabulary_files,
    vocabulary_from_directory,
    vocabulary_settings,
)


def configure(folder, file="tokenizer_config.json", **settings):
    folder.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(settings))
    return folder


def write_tokenizer(folder, words=("<unk>", "<s>", "</s>", "<eot>"), template="<s> $A"):
    """Writes a word-level tokenizer.json with a template."""
    folder.mkdir(exist_ok=True)
    vocab = {word: i for i, word in enumerate([*words, "a", "b"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(words))
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[(word, vocab[word]) for word in words]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def train_sentencepiece(file, sentinels=0, **settings):
    """Trains a SentencePiece model on a few words."""
    import sentencepiece

    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "vocab_size": 40 + sentinels}
    file.parent.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a cat and a hat", "that is that"] * 9),
        model_prefix=str(file.with_suffix("")),
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=[f"▁<extra_id_{i}>" for i in reversed(range(sentinels))],
        **{**ids, **settings},
    )
    return file.parent


def test_t5(t5_directory, tmp_path):
    vocabulary = vocabulary_from_directory(t5_directory)
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    seqio = SentencePieceVocabulary(str(t5_directory / "spiece.model"), 100)
    text = "Is it <extra_id_0> or <extra_id_99> false?"
    assert encode_inputs(vocabulary, text) == encode_inputs(seqio, text)
    assert encode_inputs(vocabulary, "") == encode_targets(vocabulary, "") == [1]
    assert vocabulary.encode("Is it</s>") == [*vocabulary.encode("Is it"), 1]
    assert "<extra_id_0>" in vocabulary.decode(encode_inputs(vocabulary, text))
    # Under seqio's name without a word.
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(t5_directory / "spiece.model", bare / "sentencepiece.model")
    assert vocabulary_from_directory(bare).vocab_size == 32100
    assert encode_inputs(vocabulary_from_directory(bare), text) == encode_inputs(seqio, text)


def test_t5_loses_only_what_is_documented(t5_directory):
    vocabulary = vocabulary_from_directory(t5_directory)
    for text, found in (
        ("  two  spaces \n", "two spaces"),
        ("ﬁ Ａ e\u0301", "fi A é"),
        ("so 😀 東京", "so <unk> <unk>"),
        ("Zürich, Straße", "Zürich, Straße"),
    ):
        assert vocabulary.decode(vocabulary.encode(text)) == found


def test_t5s_number_of_sentinels(tmp_path):
    folder = train_sentencepiece(tmp_path / "t5" / "spiece.model")
    size = SentencePieceVocabulary(str(folder / "spiece.model")).vocab_size
    for settings, count in (
        ({}, 100),
        ({"extra_ids": 7}, 7),
        ({"extra_ids": 0}, 0),
        ({"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]}, 2),
        ({"added_tokens_decoder": {str(size): {"content": "<extra_id_0>"}}}, 1),
    ):
        configure(folder, tokenizer_class="T5TokenizerFast", **settings)
        assert vocabulary_from_directory(folder).vocab_size == size + count


def test_mt5_has_its_sentinels_in_its_model(tmp_path):
    folder = train_sentencepiece(tmp_path / "mt5" / "spiece.model", sentinels=5)
    configure(folder, "config.json", model_type="mt5")
    vocabulary = vocabulary_from_directory(folder)
    assert vocabulary.token_id("<extra_id_0>") is None
    ids = vocabulary.encode("the <extra_id_0> cat <extra_id_4>")
    assert vocabulary.token_id("▁<extra_id_0>") in ids
    assert vocabulary.decode(ids) == "the <extra_id_0> cat <extra_id_4>"


def test_added_tokens_of_t5(tmp_path):
    folder = train_sentencepiece(tmp_path / "t5" / "spiece.model")
    size = SentencePieceVocabulary(str(folder / "spiece.model")).vocab_size
    eot = {"content": "<eot>", "lstrip": True}
    configure(
        folder, tokenizer_class="T5Tokenizer", extra_ids=2, added_tokens_decoder={size + 2: eot}
    )
    vocabulary = vocabulary_from_directory(folder, added_tokens=["<sep>"])
    again = vocabulary_from_directory(folder, added_tokens=["<eot>", "<sep>"])
    assert again.encode("the <eot>") == vocabulary.encode("the <eot>")  # its flag stays
    ids = vocabulary.encode("the <eot><extra_id_0><sep>")
    assert ids == [*vocabulary.encode("the"), size + 2, size + 1, size + 3]
    configure(folder, tokenizer_class="T5Tokenizer", added_tokens_decoder={"3": {"content": "<a>"}})
    with pytest.raises(UserError, match=r"'<a>' with the id 3, but its spiece\.model gives it"):
        vocabulary_from_directory(folder)
    # A tokenizer.json goes before the SentencePiece model.
    write_tokenizer(folder, ("<pad>", "</s>", "<unk>", "<eot>"), template="$A </s>")
    configure(folder, tokenizer_class="T5Tokenizer")
    vocabulary = vocabulary_from_directory(folder)
    assert encode_inputs(vocabulary, "a <eot>") == [4, 3, 1]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_byt5_has_no_file(tmp_path, file):
    folder = configure(tmp_path / "byt5", file, tokenizer_class="ByT5Tokenizer", model_type="t5")
    assert vocabulary_from_directory(folder) == ByteVocabulary(extra_ids=125)
    assert vocabulary_from_directory(folder).vocab_size == 384
    with pytest.raises(UserError, match=r"No tokens can be added to .* \(ByT5\)"):
        vocabulary_from_directory(folder, added_tokens=["<sep>"])


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2(tmp_path, names, declared):
    folder = write_bpe(tmp_path / "gpt2", names=names)
    if declared:
        configure(folder, "config.json", model_type="gpt2", eos_token_id=258)
    vocabulary = vocabulary_from_directory(folder)
    assert isinstance(vocabulary, BpeVocabulary)
    assert encode_inputs(vocabulary, "the") == [257]
    assert encode_targets(vocabulary, "the") == [257, 258]
    added = vocabulary_from_directory(folder, ("<|pad|>", "<|sep|>"), pad_token="<|pad|>")
    assert (added.pad_id, added.token_id("<|sep|>"), added.vocab_size) == (259, 260, 261)
    with pytest.raises(UserError, match=r"no token '<\|pad\|>' \(pad_token\)"):
        vocabulary_from_directory(folder, pad_token="<|pad|>")


def test_tokens_that_were_added_before(tmp_path):
    folder = write_bpe(tmp_path / "gpt2")
    configure(folder, "added_tokens.json", **{"<|sep|>": 260, "<|pad|>": 259})
    configure(folder, pad_token={"content": "<|pad|>"}, unk_token="<|endoftext|>")
    vocabulary = vocabulary_from_directory(folder)
    assert (vocabulary.pad_id, vocabulary.unk_id) == (259, None)
    assert vocabulary.encode("<|pad|><|sep|>") == [259, 260]
    configure(folder, "added_tokens.json", **{"<|sep|>": 300})
    configure(folder)
    with pytest.raises(UserError, match=r"'<\|sep\|>' with the id 300, but its vocab.json.* 259"):
        vocabulary_from_directory(folder)


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "BartTokenizer"}])
def test_bart(tmp_path, settings):
    folder = configure(write_bart(tmp_path / "bart"), **settings)
    vocabulary = vocabulary_from_directory(folder)
    assert encode_inputs(vocabulary, "the") == encode_targets(vocabulary, "the") == [0, 261, 2]
    assert (vocabulary.pad_id, vocabulary.vocab_size) == (1, 263)


def test_llama(tmp_path):
    folder = write_tokenizer(tmp_path / "llama")
    configure(folder, "config.json", model_type="llama", eos_token_id=[3, 2])
    vocabulary = vocabulary_from_directory(folder)
    # The template says what stands around an input, config.json which id ends a sequence.
    assert encode_inputs(vocabulary, "a b") == [1, 4, 5]
    assert encode_targets(vocabulary, "a b") == [4, 5, 3]
    assert vocabulary.pad_id == vocabulary.eos_id == 3
    assert vocabulary.decode([1, 4, 5, 3, 4]) == "a b"
    # The template goes before the flags of tokenizer_config.json.
    configure(folder, eos_token="</s>", bos_token="<s>", add_bos_token=False, add_eos_token=True)
    vocabulary = vocabulary_from_directory(folder)
    assert encode_inputs(vocabulary, "a b") == [1, 4, 5]
    assert encode_targets(vocabulary, "a b") == [4, 5, 2]


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast", "NovelTokenizer"])
@pytest.mark.parametrize("add_eos_token", [None, True, False])
@pytest.mark.parametrize(
    ("template", "around"),
    [(None, ([], [])), ("<s> $A", ([1], [])), ("$A </s>", ([], [2])), ("<s> $A </s>", ([1], [2]))],
)
def test_template_goes_before_flags(tmp_path, name, add_eos_token, template, around):
    folder = write_tokenizer(tmp_path / "model", template=template)
    flags = {} if add_eos_token is None else {"add_eos_token": add_eos_token}
    configure(folder, tokenizer_class=name, bos_token="<s>", eos_token="</s>", **flags)
    configure(folder, "config.json", model_type="llama")
    vocabulary = vocabulary_from_directory(folder)
    # Words, which a LlamaTokenizer of transformers would lose.
    assert encode_inputs(vocabulary, "a b") == [*around[0], 4, 5, *around[1]]


LLAMA = {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2, "model_type": "bpe"}


def train_llama(folder):
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    settings = {**LLAMA, **identity, "byte_fallback": True, "vocab_size": 300}
    return train_sentencepiece(folder / "tokenizer.model", **settings)


def test_lone_tokenizer_model_is_a_llamas(tmp_path):
    vocabulary = vocabulary_from_directory(train_llama(tmp_path / "llama"))
    assert encode_inputs(vocabulary, "the")[0] == 1 and encode_targets(vocabulary, "the")[-1] == 2
    assert vocabulary.decode(encode_targets(vocabulary, "the 😀 cat")) == "the 😀 cat"
    plain = SentencePieceVocabulary(str(tmp_path / "llama" / "tokenizer.model"), decoder_only=True)
    assert encode_inputs(vocabulary, "the cat") == encode_inputs(plain, "the cat")


@pytest.mark.parametrize(
    ("flags", "around"),
    [
        ({}, (0, 0)),
        ({"add_bos_token": True}, (1, 0)),
        ({"add_bos_token": False}, (0, 0)),
        ({"add_eos_token": True}, (0, 1)),
        ({"add_bos_token": True, "add_eos_token": True}, (1, 1)),
    ],
)
def test_flags_of_a_tokenizer_model(tmp_path, flags, around):
    folder = train_llama(tmp_path / "llama")
    configure(folder, tokenizer_class="LlamaTokenizer", **flags)
    vocabulary = vocabulary_from_directory(folder)
    assert (vocabulary.input_prefix_ids, vocabulary.input_suffix_ids) == (
        (1,) * around[0], (2,) * around[1],
    )  # fmt: skip


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_added_tokens_of_a_tokenizer_model(tmp_path, file):
    folder = train_llama(tmp_path / "llama")
    size = SentencePieceVocabulary(str(folder / "tokenizer.model")).vocab_size
    tokens = {"<|im_end|>": size, "<|im_start|>": size + 1}
    settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "<|im_end|>"}
    if file == "added_tokens.json":
        configure(folder, file, **tokens)
    else:
        settings["added_tokens_decoder"] = {
            str(i): {"content": token, "special": True} for token, i in tokens.items()
        }
    configure(folder, add_bos_token=True, pad_token="<|im_end|>", **settings)
    vocabulary = vocabulary_from_directory(folder)
    assert (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.pad_id) == (size + 2, size, size)
    ids = encode_inputs(vocabulary, "<|im_start|>the<|im_end|>")
    # No space is put before a text that follows a token.
    assert (ids[:2], ids[-1]) == ([1, size + 1], size)
    assert vocabulary.token(ids[2]) in ("t", "th", "the")
    assert encode_targets(vocabulary, "the")[-1] == size


def test_unknown_class_with_a_tokenizer_json(tmp_path):
    folder = write_tokenizer(tmp_path / "model")
    configure(folder, tokenizer_class="NovelTokenizer", eos_token="<eot>")
    assert encode_targets(vocabulary_from_directory(folder), "a") == [4, 3]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: None, "holds no vocabulary: there is none of tokenizer.json"),
        (lambda f: configure(f, tokenizer_class="T5Tokenizer"),
         r"no vocabulary of a T5Tokenizer \(tokenizer_config.json\): there is none of tokenizer"),
        (lambda f: (f / "vocab.json").write_text("{}"),
         "beside vocab.json, merges.txt is missing"),
        (lambda f: configure(f, tokenizer_class="Qwen2Tokenizer"),
         "no vocabulary of a Qwen2Tokenizer .*none of tokenizer.json, vocab.json"),
        (lambda f: write_bpe(configure(f, tokenizer_class="GPT2Tokenizer", add_eos_token="yes")),
         "tokenizer_config.json' has add_eos_token: 'yes'; it is true or false"),
        (lambda f: write_bpe(configure(f, eos_token=5)), "has eos_token: 5, which is not a token"),
        (lambda f: write_bpe(configure(f, "added_tokens.json", a="b")),
         "added_tokens.json' gives 'a' the id 'b', which is no id"),
        (lambda f: write_bpe(configure(f, "added_tokens.json", a=259, b=259)),
         "added_tokens.json' gives the id 259 to both 'a' and 'b'"),
        (lambda f: configure(f, tokenizer_class="BertTokenizer"),
         r"its tokenizer 'BertTokenizer' \(tokenizer_config.json\) is not one that is supp"),
        (lambda f: write_tokenizer(write_bpe(f)),
         r"several vocabularies \(tokenizer.json; vocab.json \+ merges.txt\)"),
        (lambda f: write_tokenizer(f), "does not say what ends a sequence"),
        (lambda f: write_tokenizer(configure(f, eos_token="<end>")), "no token '<end>'"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "is not a tokenizer.json"),
        (lambda f: (configure(f, tokenizer_class="GPT2Tokenizer") / "tokenizer.json").write_text(
            '{"model": {"type": "BPE", "vocab": {}, "merges": ["a"]}}'), "is not a tokenizer.json"),
        (lambda f: (f / "spiece.model").write_text("{"), "is not a SentencePiece model"),
        (lambda f: (f / "spiece.model").write_text(""), "is not a SentencePiece model|no end-of"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "config.json' is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json' is not a JSON object"),
        (lambda f: configure(write_bpe(f), added_tokens_decoder={"x": {}}),
         "tokenizer_config.json' has an added_tokens_decoder that is not tokens by their ids"),
    ],
)  # fmt: skip
def test_refused(tmp_path, make, sentence):
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=sentence) as raised:
        vocabulary_from_directory(folder)
    assert "\n" not in str(raised.value)


def test_two_different_sentencepiece_models(tmp_path):
    folder = train_sentencepiece(tmp_path / "t5" / "spiece.model")
    configure(folder, tokenizer_class="T5Tokenizer")
    shutil.copy(folder / "spiece.model", folder / "sentencepiece.model")
    assert vocabulary_from_directory(folder).path.endswith("spiece.model")
    train_sentencepiece(folder / "sentencepiece.model", sentinels=3)
    with pytest.raises(UserError, match=r"both spiece\.model and sentencepiece\.model; keep one"):
        vocabulary_from_directory(folder)


def test_missing_directory_names_the_nearest(tmp_path):
    (tmp_path / "bart-base").mkdir()
    with pytest.raises(UserError, match=r"does not exist\. Did you mean 'bart-base'\?"):
        vocabulary_from_directory(tmp_path / "bart-bas")


def test_copied_files_are_the_same_vocabulary(tmp_path):
    folder = write_bart(tmp_path / "bart")
    (folder / "model.safetensors").write_text("")
    configure(folder, tokenizer_class="BartTokenizer")
    names = vocabulary_files(folder)
    assert names == ("merges.txt", "tokenizer_config.json", "vocab.json")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in names:
        shutil.copy(folder / name, copy)
    vocabulary = vocabulary_from_directory(folder)
    assert vocabulary_from_directory(copy).fingerprint == vocabulary.fingerprint
    # And by its settings alone.
    settings, files = vocabulary_settings(vocabulary)
    settings = json.loads(json.dumps(settings))
    assert [file.name for file in files] == ["vocab.json", "merges.txt"]
    kind = getattr(robust_ft.vocabulary, settings.pop("kind"))
    paths = {file.name: str(copy / file.name) for file in files}
    again = kind(**{k: paths.get(v, v) if isinstance(v, str) else v for k, v in settings.items()})
    assert again.fingerprint == vocabulary.fingerprint


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_smollm2s_kind_of_directory(tmp_path, name):
    """GPT-2's class over a tokenizer.json that splits digits; EOS is padding and ends turns."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", *alphabet, "th", "the", "12"]
    ids = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.BPE(ids, [("t", "h"), ("th", "e"), ("1", "2")])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(words[:3])
    folder = tmp_path / "smollm2"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    configure(folder, tokenizer_class=name, **end)
    configure(folder, "config.json", model_type="llama")
    vocabulary = vocabulary_from_directory(folder)
    assert (vocabulary.eos_id, vocabulary.pad_id, vocabulary.bos_id) == (1, 1, 0)
    assert vocabulary.encode("12") == [ids["1"], ids["2"]]
    chat = "<|im_start|>the<|im_end|>\nthe"
    assert encode_inputs(vocabulary, chat) == [0, ids["the"], 1, ids["Ċ"], ids["the"]]
    assert vocabulary.vocab_size == len(words)
