"""How each tokenizer class of transformers 5 cuts a text, as pipelines of the `tokenizers` package.

Where tokenizer_config.json names a class of its own (`LlamaTokenizer`, `GPT2Tokenizer`, ...),
`AutoTokenizer` takes from a tokenizer.json no more than tokens, merges and template: the class
brings its normalizer, pre-tokenizer and decoder. The same classes read SentencePiece models and
vocab.json with merges.txt. These are their pipelines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from robust_ft.errors import UserError
from robust_ft.files import parse_json
from robust_ft.vocabulary.base import read

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Qwen's: words with their mark before them, single digits, runs of symbols, line ends, spaces.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "▁"
# Spaces, digits, line ends, marks and letters: where ways to cut a text part.
PROBES = ("the  cat's 12\n\n1", " Ünï 東京 e\u0301 ", "x\t\r\n 1999-10 I'LL...")


@dataclass(frozen=True)
class Pieces:
    """The tokens of a model file.

    Attributes:
        scores: Token -> score, in the order of their ids: a unigram model. None for BPE.
        ids: Token -> id, of BPE.
        merges: Pairs in the order of their rank, of BPE.
        unk: The unknown token, None if there is none.
        unk_id: Its id.
        charsmap: SentencePiece's compiled normalization.
        byte_fallback: Whether what no piece covers is written in bytes.
        declared: Tokens that the file itself marks as never split, and whether they are special.
        named: Special tokens by their settings ('bos_token').
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    scores: list[tuple[str, float]] | None = None
    unk: str | None = None
    unk_id: int | None = None
    charsmap: bytes = b""
    byte_fallback: bool = False
    declared: tuple[tuple[str, bool], ...] = ()
    named: tuple[tuple[str, str], ...] = ()


def build(pipeline: str, pieces: Pieces, prefix_space: str | None) -> "Tokenizer":
    """Returns a tokenizer over `pieces`, without added tokens.

    Args:
        pipeline: A name in `PIPELINES`.
        pieces: What the files hold.
        prefix_space: Where a space is put before the text: 'first' (before the text), 'always'
            (before what follows an added token, too) or 'never'; None is the class's own choice.

    Raises:
        UserError: If there is no such pipeline, or the merges do not fit the tokens.
    """
    from tokenizers import Tokenizer, models

    if pipeline not in PIPELINES:
        raise UserError(f"There is no pipeline '{pipeline}'; there are {', '.join(PIPELINES)}.")
    if prefix_space not in (None, "first", "always", "never"):
        raise UserError(f"prefix_space is '{prefix_space}', not 'first', 'always' or 'never'.")
    options, decorate = PIPELINES[pipeline]
    if pieces.scores is not None:
        byte_fallback = pieces.byte_fallback and pipeline == "sentencepiece"
        model: models.Model = models.Unigram(pieces.scores, pieces.unk_id, byte_fallback)
    else:
        if options.get("unk_token"):
            options = {**options, "unk_token": pieces.unk}
        if pipeline == "sentencepiece":
            options = {**options, "byte_fallback": pieces.byte_fallback}
        model = models.BPE(pieces.ids, pieces.merges, **options)
    tokenizer = Tokenizer(model)
    decorate(tokenizer, pieces, prefix_space)
    return tokenizer


def from_tokenizer_json(path: str) -> Pieces | None:
    """Returns the tokens of a tokenizer.json's BPE or unigram model, None for other models."""
    model = tokenizer_json(path)["model"]
    vocab, merges = model.get("vocab"), model.get("merges")
    if isinstance(vocab, list):
        scores = [(token, score) for token, score in vocab]
        ids = {token: i for i, (token, _) in enumerate(scores)}
        unk_id = model.get("unk_id")
        return Pieces(ids, [], scores, unk_id=unk_id, charsmap=_charsmap(path))
    if isinstance(vocab, dict) and isinstance(merges, list):
        halves = [m.split(" ") if isinstance(m, str) else m for m in merges]
        return Pieces(vocab, [(left, right) for left, right in halves], unk=model.get("unk_token"))
    return None


def cuts_alike(path: str, pipeline: str) -> bool:
    """Returns whether a tokenizer.json cuts texts into words as a byte-level class does.

    A space before the text is no difference: settings ask for it.
    """
    from tokenizers import Tokenizer

    def words(tokenizer: Tokenizer) -> list[list[str]]:
        normalizer, cutter = tokenizer.normalizer, tokenizer.pre_tokenizer
        texts = [normalizer.normalize_str(text) if normalizer else text for text in PROBES]
        return [[w for w, _ in cutter.pre_tokenize_str(t)] if cutter else [t] for t in texts]

    found = words(Tokenizer.from_str(read(path, "tokenizer").decode()))
    nothing = Pieces({}, [])
    return any(found == words(build(pipeline, nothing, space)) for space in ("never", "always"))


def tokenizer_json(path: str) -> dict[str, Any]:
    """Returns what a tokenizer.json says."""
    content = parse_json(read(path, "tokenizer"), path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"'{path}' is not a tokenizer.json: it has no model.")
    return content


def from_sentencepiece(path: str, pipeline: str) -> Pieces:
    """Returns the pieces of a SentencePiece model, with merges where the pipeline is BPE.

    Args:
        path: The model file.
        pipeline: The pipeline that they are for: 'sentencepiece' takes the model's own kind.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2  # generated code, without types
    try:
        model = proto.ModelProto.FromString(read(path, "SentencePiece"))
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is not a SentencePiece model ({reason}).") from error
    kinds = proto.ModelProto.SentencePiece
    trainer = model.trainer_spec
    scores = [(piece.piece, piece.score) for piece in model.pieces]
    if not scores:
        raise UserError(f"'{path}' is not a SentencePiece model (it has no pieces).")
    ids = {token: i for i, (token, _) in enumerate(scores)}
    unigram = pipeline == "t5" or (pipeline == "sentencepiece" and trainer.model_type == 1)
    named = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    return Pieces(
        ids,
        [] if unigram else _merges(ids),
        scores if unigram else None,
        unk=trainer.unk_piece,
        unk_id=trainer.unk_id,
        charsmap=model.normalizer_spec.precompiled_charsmap,
        byte_fallback=trainer.byte_fallback,
        declared=tuple(
            (piece.piece, piece.type == kinds.CONTROL)
            for piece in model.pieces
            if piece.type in (kinds.CONTROL, kinds.USER_DEFINED)
        ),
        named=tuple(
            (f"{name}_token", getattr(trainer, f"{name}_piece") or piece)
            for name, piece in named.items()
            if getattr(trainer, f"{name}_id") >= 0
        ),
    )


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """Returns every way to put a piece together from two, the pieces of lower ids first."""
    merges = []
    for piece, rank in ids.items():
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in halves if left in ids and right in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += [(rank, pair) for pair in pairs]
    merges.sort(key=lambda item: (item[0], len(item[1][0]), len(item[1][1])))
    return [pair for _, pair in merges]


def _charsmap(path: str) -> bytes:
    """Returns the compiled normalization in a tokenizer.json."""
    import base64

    normalizer = tokenizer_json(path).get("normalizer") or {}
    for step in normalizer.get("normalizers") or [normalizer]:
        if step.get("type") == "Precompiled":
            return base64.b64decode(step.get("precompiled_charsmap") or "")
    return b""


def _llama(tokenizer: "Tokenizer", pieces: Pieces, prefix_space: str | None) -> None:
    from tokenizers import decoders, pre_tokenizers

    scheme = prefix_space or "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    steps: list[Any] = [
        decoders.Replace(_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if scheme != "never":
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)


def _code_llama(tokenizer: "Tokenizer", pieces: Pieces, prefix_space: str | None) -> None:
    from tokenizers import pre_tokenizers

    _llama(tokenizer, pieces, "first")  # its decoder always drops a space at the front
    scheme = prefix_space or "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)


def _gpt2(tokenizer: "Tokenizer", pieces: Pieces, prefix_space: str | None) -> None:
    from tokenizers import decoders, pre_tokenizers

    prefix = prefix_space not in (None, "never")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()


def _qwen2(tokenizer: "Tokenizer", pieces: Pieces, prefix_space: str | None) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    prefix = prefix_space not in (None, "never")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()


def _t5(tokenizer: "Tokenizer", pieces: Pieces, prefix_space: str | None) -> None:
    from tokenizers import decoders, normalizers, pre_tokenizers

    if pieces.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(pieces.charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always", split=True)


def _sentencepiece(tokenizer: "Tokenizer", pieces: Pieces, prefix_space: str | None) -> None:
    from tokenizers import decoders, normalizers

    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if pieces.charsmap:
        steps.insert(0, normalizers.Precompiled(pieces.charsmap))
    tokenizer.normalizer = normalizers.Sequence(steps)
    last = [decoders.ByteFallback(), decoders.Fuse()] if pieces.byte_fallback else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), *last])


# Options of the BPE model, and what is put around it. A true `unk_token` stands for the file's.
_Decorate = Callable[["Tokenizer", Pieces, str | None], None]
PIPELINES: dict[str, tuple[dict[str, Any], _Decorate]] = {
    "llama": ({"fuse_unk": True, "byte_fallback": True}, _llama),
    "code_llama": ({"fuse_unk": True, "byte_fallback": True, "unk_token": True}, _code_llama),
    "gpt2": ({}, _gpt2),
    "qwen2": ({}, _qwen2),
    "t5": ({}, _t5),
    "sentencepiece": ({"fuse_unk": True, "unk_token": True}, _sentencepiece),
}
