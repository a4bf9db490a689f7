"""Lets a model write examples: python -m robust_ft.generate --model=DIR --output=FILE.jsonl

Outputs are sampled, each from an input of --task or of the file --prompts; a decoder-only model
without either begins with nothing. FILE has an object {"inputs": ..., "targets": ...} a line, which
a FileTask reads: what a pretrained model has written before it is finetuned can be mixed into the
finetuning (gin_configs/methods/self_replay.gin), so that it forgets less (Marek et al., 2026,
arXiv:2605.26097).

  --model=asset:mini --task=mini_qa_job --module=tasks.mini --output=replay.jsonl

Outputs that are empty, or that do not end within --max_decode_len tokens, are left out.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robust_ft import command_line, cpu_settings

if TYPE_CHECKING:
    from robust_ft.decoding import Decoder
    from robust_ft.predictor import Predictor


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    from robust_ft import console, loading
    from robust_ft.checkpoints_io import outputs
    from robust_ft.decoding import Decoder
    from robust_ft.errors import UserError
    from robust_ft.files import as_path, write_json_lines

    if min(arguments.examples, arguments.batch_size) < 1:
        raise UserError("--examples and --batch_size must be at least 1.")
    if not arguments.temperature > 0:
        raise UserError(f"--temperature={arguments.temperature:g} must be above 0, to sample.")
    outputs.check(as_path(arguments.output), arguments.overwrite)  # before sampling, which is long
    decoder = Decoder(
        max_decode_len=arguments.max_decode_len,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
    )
    predictor = loading.load(arguments.model)
    predictor.partitioner.check_batch("--batch_size", arguments.batch_size, "generating")
    inputs = _inputs(arguments, predictor)
    texts = sampled(
        predictor, inputs, decoder, arguments.seed, arguments.batch_size, arguments.inputs_length
    )
    pairs = zip(inputs, texts, strict=True)
    rows = [{"inputs": text, "targets": output} for text, output in pairs if output]
    if not rows:
        raise UserError(
            f"None of {len(inputs)} outputs has text that ends within --max_decode_len="
            f"{arguments.max_decode_len} tokens; raise it."
        )
    write_json_lines(arguments.output, rows)
    console.print_line(f"{len(rows)} of {len(inputs)} outputs: {arguments.output}")
    return 0


def sampled(
    predictor: "Predictor",
    inputs: Sequence[str],
    decoder: "Decoder",
    seed: int,
    batch_size: int,
    inputs_length: int,
) -> list[str]:
    """Returns a sampled output for each input, "" for one that does not end.

    A function of the seed and the batch size.

    Args:
        predictor: The model.
        inputs: Texts.
        decoder: Samples.
        seed: Of all samples.
        batch_size: Inputs that are decoded at once.
        inputs_length: Tokens to which inputs are cut and padded, the end-of-sequence one included.
    """
    import jax
    import numpy as np

    from robust_ft import text_batches
    from robust_ft.vocabulary import encode_inputs

    vocabulary, eos_ids = predictor.vocabulary, predictor.model.eos_ids
    encoded = [encode_inputs(vocabulary, text, inputs_length) for text in inputs]
    outputs: list[str] = []
    for start in range(0, len(inputs), batch_size):
        own = range(start, min(start + batch_size, len(inputs)))
        rows = text_batches.filled(own, batch_size, predictor.partitioner.batch_shards)
        batch = text_batches.input_batch(
            [encoded[row] for row in rows], inputs_length, vocabulary.pad_id
        )
        key = jax.random.fold_in(jax.random.key(seed), start)
        tokens = np.asarray(predictor.generate(batch, decoder, key).tokens)[: len(own), 0]
        for row in tokens:  # [length]
            ends = np.flatnonzero(np.isin(row, eos_ids))
            outputs.append(vocabulary.decode(row[: ends[0]].tolist()).strip() if len(ends) else "")
    return outputs


def _inputs(arguments: argparse.Namespace, predictor: "Predictor") -> list[str]:
    """Returns as many inputs as there are examples to write; each may come several times."""
    from robust_ft.data import cache, loader
    from robust_ft.errors import UserError

    if arguments.task:
        data = cache.TaskData(
            task=arguments.task,
            module=arguments.module,
            split=arguments.split,
            inputs_length=arguments.inputs_length,
            targets_length=2,  # they are not read
            vocabulary=predictor.vocabulary,
        )
        texts = [each.inputs_text for each in loader.eval_examples(data, arguments.examples)]
    elif arguments.prompts:
        texts = _lines(arguments.prompts)
    elif predictor.model.config.decoder_only:
        texts = [""]
    else:
        raise UserError(
            "An encoder-decoder needs inputs: name a task with --task=NAME --module=MODULE, or a "
            "file with --prompts=FILE."
        )
    return list(itertools.islice(itertools.cycle(texts), arguments.examples))


def _lines(file: str) -> list[str]:
    from robust_ft.errors import UserError
    from robust_ft.files import as_path

    try:
        lines = as_path(file).read_text(encoding="utf-8").splitlines()
        if file.endswith(".jsonl"):
            lines = [json.loads(line)["inputs"] for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--prompts={file} is no text file with an input a line, nor a .jsonl file of objects "
            f"with 'inputs' ({type(error).__name__})."
        ) from None
    texts = [line for line in lines if isinstance(line, str) and line.strip()]
    if not texts:
        raise UserError(f"--prompts={file} has no inputs.")
    return texts


def _parser() -> command_line.Parser:
    parser = command_line.Parser(
        "python -m robust_ft.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="what robust_ft.load takes, or asset:mini")
    parser.add_argument("--output", required=True, metavar="FILE", help="a .jsonl file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--examples", type=int, default=1000, help="outputs to sample (1000)")
    parser.add_argument("--task", help="a task whose inputs begin them")
    parser.add_argument("--module", help="the module that registers it")
    parser.add_argument("--split", default="train", help="one of its splits (train)")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with an input a line")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the softmax (1)")
    parser.add_argument("--top_k", type=int, default=0, help="sample among so many tokens; 0: all")
    parser.add_argument("--top_p", type=float, default=1.0, help="among this share of probability")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    parser.add_argument("--max_decode_len", type=int, default=64, help="tokens of an output (64)")
    parser.add_argument("--inputs_length", type=int, default=64, help="tokens of an input (64)")
    parser.add_argument("--batch_size", type=int, default=32, help="outputs sampled at once (32)")
    return parser


if __name__ == "__main__":
    cpu_settings.use()
    command_line.run(main, sys.argv[1:])
