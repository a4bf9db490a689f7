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
    TokenizersVocabulary,
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
    assert vocabulary == SentencePieceVocabulary(str(t5_directory / "spiece.model"), 100)
    assert encode_inputs(vocabulary, "Is it <extra_id_0>?")[-1] == 1
    assert encode_inputs(vocabulary, "") == encode_targets(vocabulary, "") == [1]
    # As the hub saved it with the Rust tokenizer beside it, and under seqio's name without a word.
    both = write_tokenizer(tmp_path / "both")
    shutil.copytree(t5_directory, both, dirs_exist_ok=True)
    assert isinstance(vocabulary_from_directory(both), SentencePieceVocabulary)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(t5_directory / "spiece.model", bare / "sentencepiece.model")
    assert vocabulary_from_directory(bare).vocab_size == 32100


def test_t5_loses_only_what_is_documented(t5_directory):
    vocabulary = vocabulary_from_directory(t5_directory)
    for text, found in (
        ("  two  spaces \n", "two spaces"),
        ("ﬁ Ａ e\u0301", "fi A é"),
        ("so 😀 東京", "so  ⁇   ⁇ "),
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
    assert vocabulary.extra_ids == 0
    ids = vocabulary.encode("the <extra_id_0> cat <extra_id_4>")
    assert vocabulary.token_id("▁<extra_id_0>") in ids
    assert vocabulary.decode(ids) == "the <extra_id_0> cat <extra_id_4>"


def test_added_tokens_of_t5_need_its_tokenizer_json(tmp_path):
    folder = train_sentencepiece(tmp_path / "t5" / "spiece.model")
    configure(folder, tokenizer_class="T5Tokenizer", added_tokens_decoder={"3": "<eot>"})
    with pytest.raises(UserError, match=r"not in its spiece\.model; they need a tokenizer\.json"):
        vocabulary_from_directory(folder)
    write_tokenizer(folder, ("<pad>", "</s>", "<unk>", "<eot>"), template="$A </s>")
    vocabulary = vocabulary_from_directory(folder)
    assert isinstance(vocabulary, TokenizersVocabulary) and vocabulary.encode("a <eot>") == [4, 3]


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
    # tokenizer_config.json goes before both.
    configure(folder, eos_token="</s>", bos_token="<s>", add_bos_token=False, add_eos_token=True)
    vocabulary = vocabulary_from_directory(folder)
    assert encode_inputs(vocabulary, "a b") == [4, 5, 2]
    configure(folder, eos_token="</s>", add_bos_token=True)
    with pytest.raises(UserError, match="no bos_token"):
        vocabulary_from_directory(configure(folder, "config.json", model_type="qwen3"))


def test_llama_by_sentencepiece(tmp_path):
    ids = {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2, "model_type": "bpe"}
    file = tmp_path / "tokenizer.model"
    folder = train_sentencepiece(file, byte_fallback=True, vocab_size=300, **ids)
    vocabulary = vocabulary_from_directory(folder)
    assert encode_inputs(vocabulary, "the")[0] == 1 and encode_targets(vocabulary, "the")[-1] == 2
    assert vocabulary.decode(encode_targets(vocabulary, "the 😀 cat")) == "the 😀 cat"


def test_unknown_class_with_a_tokenizer_json(tmp_path):
    folder = write_tokenizer(tmp_path / "model")
    configure(folder, tokenizer_class="NovelTokenizer", eos_token="<eot>")
    assert encode_targets(vocabulary_from_directory(folder), "a") == [4, 3]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: None, "holds no vocabulary: there is none of tokenizer.json"),
        (lambda f: configure(f, tokenizer_class="T5Tokenizer"),
         r"no vocabulary of a T5Tokenizer \(tokenizer_config.json\): there is none of spiece"),
        (lambda f: (f / "vocab.json").write_text("{}"),
         "beside vocab.json, merges.txt is missing"),
        (lambda f: write_bpe(configure(f, tokenizer_class="Qwen2Tokenizer")),
         "no vocabulary of a Qwen2Tokenizer .*none of tokenizer.json"),
        (lambda f: configure(f, tokenizer_class="BertTokenizer"),
         "its tokenizer 'BertTokenizer' is not one that is supported"),
        (lambda f: write_tokenizer(write_bpe(f)),
         r"several vocabularies \(tokenizer.json; vocab.json \+ merges.txt\)"),
        (lambda f: write_tokenizer(f), "does not say what ends a sequence"),
        (lambda f: write_tokenizer(configure(f, eos_token="<end>")), "no token '<end>'"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "is not a tokenizer.json"),
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
