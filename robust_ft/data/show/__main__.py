"""Shows examples of a task: python -m robust_ft.data.show --task=webnlg_ood -n 3

Prints the first examples as text and tokens, how long all are, and what is cut. Lengths and the
vocabulary are those of the recipe that the gin files describe:

  python -m robust_ft.data.show --gin_file=gin_configs/promot_rte.gin [--task=mini_cb_1shot]

Without a recipe, texts are tokenized with --vocabulary, else as bytes. Examples come from the
task's source; no cache is written.
"""

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robust_ft import command_line, console

if TYPE_CHECKING:
    from robust_ft.data.cache import TaskData
    from robust_ft.data.preview import Preview

_BUCKETS = 12
_BAR = 40


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = command_line.data_parser("data.show", __doc__)
    parser.add_argument("-n", type=int, default=3, metavar="COUNT", help="examples to show (3)")
    parser.add_argument(
        "--limit",
        type=int,
        default=10_000,
        metavar="COUNT",
        help="examples to measure (10,000; 0 for all)",
    )
    arguments = command_line.parse_gin(parser, argv)
    data = command_line.task_data(arguments)[0]
    from robust_ft.data import quiet

    with quiet.without_native_log():
        from robust_ft.data import build
    if arguments.split is None:
        data = dataclasses.replace(data, split=build.any_split(data))
    names = build.tasks_of(data)
    if names != [data.task]:
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        console.print_line(f"'{data.task}' is a mixture of {len(names)} tasks: {listed}")
        console.print_line(f"Below is {names[0]}; see another one with --task=NAME.")
    _show(dataclasses.replace(data, task=names[0]), arguments.n, arguments.limit)
    return 0


def _show(data: "TaskData", count: int, limit: int) -> None:
    from robust_ft.data.preview import previews
    from robust_ft.errors import UserError

    console.banner(
        f"{data.task}, split {data.split}",
        {
            "module": data.module,
            "vocabulary": f"{type(data.vocabulary).__name__}, {data.vocabulary.vocab_size} ids",
            "lengths": f"inputs {data.inputs_length}, targets {data.targets_length}",
        },
    )
    lengths: dict[str, Counter[int]] = {"inputs": Counter(), "targets": Counter()}
    measured = dropped = 0
    examples = previews(data)
    for example in itertools.islice(examples, max(limit, count) if limit else None):
        if measured < count:
            _show_example(data, measured, example)
        measured += 1
        dropped += example.num_dropped_exemplars
        for feature, tokenized in example.features.items():
            lengths[feature][tokenized.length] += 1
    if not measured:
        raise UserError(f"Task '{data.task}' has no examples in its split '{data.split}'.")
    is_all = next(examples, None) is None
    whose = f"all {measured}" if is_all else f"the first {measured}"
    for feature, counts in lengths.items():
        _show_lengths(feature, counts, data.lengths[feature], whose)
    if dropped:
        console.print_line(f"{dropped} exemplars do not fit into the inputs and are left out.")


def _show_example(data: "TaskData", number: int, example: "Preview") -> None:
    console.print_line()
    console.print_line(f"example {example.texts.get('id', number)}", style="bold")
    from robust_ft.data.rendering import feature_lines

    for feature, (ids, length) in example.features.items():
        cut = length - len(ids)
        note = f", {cut} more are cut" if cut else ""
        text = example.texts[feature]
        for line in feature_lines(feature, ids, text, data.vocabulary, note):
            console.print_line(*line)
    for name in ("references", "choices", "answer_choices"):
        if example.texts.get(name):
            console.print_line(f"  {name}: {' | '.join(example.texts[name])}")


def _show_lengths(feature: str, counts: Counter[int], limit: int, whose: str) -> None:
    """Prints a histogram of lengths in tokens."""
    longest = max(counts)
    width = -(-(longest + 1) // _BUCKETS)
    buckets: Counter[int] = Counter()
    for length, count in counts.items():
        buckets[length // width] += count
    most = max(buckets.values())
    rows = []
    for bucket in range(longest // width + 1):
        first, last = bucket * width, (bucket + 1) * width - 1
        note = "" if last <= limit else ("cut" if first > limit else "partly cut")
        bar = "█" * -(-buckets[bucket] * _BAR // most)
        rows.append((f"{first}-{last}" if width > 1 else f"{first}", buckets[bucket], bar, note))
    console.print_line()
    console.print_table(
        f"{feature}: tokens of {whose} examples", ["tokens", "examples", "", ""], rows
    )
    total = sum(counts.values())
    cut = sum(count for length, count in counts.items() if length > limit)
    middle = sorted(counts.elements())[total // 2]
    console.print_line(
        f"median {middle}, longest {longest}; "
        + (f"{cut} ({cut / total:.1%}) are cut to {limit}" if cut else f"none is cut to {limit}")
    )


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
