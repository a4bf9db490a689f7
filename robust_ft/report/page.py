"""The page of a report: one HTML file that loads nothing, in light and dark, on any screen."""

import html
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robust_ft.analysis_results import DRIFT
from robust_ft.report import (
    choices,
    figure,
    promptability_figure,
    promptability_table,
    results,
    table,
    tradeoff,
    tradeoff_figure,
    verdicts,
)
from robust_ft.report import samples as side_by_side
from robust_ft.report.comparisons import Comparisons
from robust_ft.report.groups import Groups
from robust_ft.report.runs import Run

if TYPE_CHECKING:
    from robust_ft.report.promptability import Promptability

_WORDS = {
    "loses": "loses the other tasks",
    "keeps": "keeps the other tasks",
    "improves": "improves the other tasks",
    "": "other tasks not measured",
}
_CAPTIONS = {
    "target": "Score on the task that the model is finetuned on. Higher is better.",
    results.NORM_AVG: "Plain mean over the held-out tasks, which no method was trained on. "
    "Higher is better; the dashed line is the pretrained model.",
    results.FORMAT_SHARE: "How often an answer to another task has the form of the target's "
    "answers. Lower is better: high means the model answers everything as if it were the target.",
    "loss": "Loss on the training data.",
}
_TAGS = {side_by_side.EXTRA: "mark", side_by_side.MISSING: "del"}


def render(
    runs: Sequence[Run],
    all_results: results.Table,
    id_and_ood: tradeoff.Tradeoff,
    compared: Comparisons,
    groups: Groups = Groups(()),
    prompted: "Promptability | None" = None,
) -> str:
    """Returns the whole page.

    Args:
        runs: The runs with their samples and configs.
        all_results: The table of these runs.
        id_and_ood: Their ID and OOD results.
        compared: The differences of the methods, with their tests.
        groups: The settings in which runs of one name differ.
        prompted: Their few-shot evaluations, if there are any. Runs that were evaluated in no other
            way have no other sections.
    """
    style = (pathlib.Path(__file__).parents[1] / "assets" / "report.css").read_text("utf-8")
    evaluated = [run for run in runs if run.rows]
    trained = [run for run in runs if run.stages]
    found = verdicts.verdicts(evaluated)
    panels = figure.svg_panels(trained)
    targets = ", ".join(all_results.targets)
    if prompted is not None and not any(run.target for run in evaluated):
        title = promptability_table.TITLE
        sentence = promptability_table.headline(prompted)
        lead = promptability_table.describe(prompted)
    else:
        title = f"Finetuning on {targets}"
        sentence = verdicts.headline(found, numbers=False)
        lead = _lead(evaluated, targets)
    body = [
        f"<header><p class='over'>robust_ft report</p><h1>{_text(sentence or title)}</h1>",
        f"<p class='lead'>{_text(lead)}</p></header>",
    ]
    if evaluated:
        body += [
            _cards(evaluated, found),
            _section("Before and after", _before_after(evaluated, panels)),
            _section(id_and_ood.title, _tradeoff(evaluated, id_and_ood)),
        ]
    else:
        body.append(_notes(groups))
    body.append(_section(promptability_table.TITLE, _promptability(prompted)))
    if trained:
        body.append(_section("While it trained", _curves(trained, panels)))
        body.append(_section("Drift", _drift(trained)))
    if evaluated:
        body += [
            _section("All results", _table(all_results) + _notes(groups)),
            _section("Differences", _differences(compared)),
        ]
    body += [
        _section(table.DIFFERENT, _settings(groups)),
        _section(choices.TITLE, _choices(groups)),
        _samples(evaluated),
        _section("Configuration", _configs(runs)),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<meta name='color-scheme' content='light dark'><title>{_text(title)}</title>"
        f"<style>{style}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>" if content else ""


def _lead(runs: Sequence[Run], targets: str) -> str:
    seeds = max(len(group) for group in results.methods(runs).values())
    spread = f"the mean of {seeds} seeds" if seeds > 1 else "of one seed"
    return (
        f"A pretrained model was finetuned on {targets}. A good method learns this task and still "
        f"does every other task as well as before. Numbers are {spread}."
    )


def _cards(runs: Sequence[Run], found: Sequence[verdicts.Verdict]) -> str:
    palette = figure.colors(runs)
    cards = []
    for verdict in found:
        rows = [
            _change(f"Target task, {verdict.target}", verdict.target_before, verdict.target_after),
            _change(
                f"Other tasks, {verdict.how}" if verdict.how else "Other tasks",
                verdict.others_before,
                verdict.others_after,
            ),
            _change(
                f"Other tasks with {results.joined(verdict.without)}",
                verdict.others_before,
                verdict.others_kept,
            ),
        ]
        words = _WORDS[verdict.word] + (f", {verdict.how}" if verdict.how else "")
        cards.append(
            f"<article class='card {verdict.word}' style='--method:{palette[verdict.method]}'>"
            f"<h3>{_text(verdict.method)}</h3>{''.join(rows)}"
            f"<p class='word'>{_text(words)}</p></article>"
        )
    note = (
        "<p class='note'>“Keeps” means that at least nine tenths of the pretrained score on the "
        "other tasks is left, “improves” that it grew by more than a fiftieth.</p>"
    )
    return f"<section><div class='cards'>{''.join(cards)}</div>{note}</section>"


def _change(label: str, before: float | None, after: float | None) -> str:
    if after is None:
        return ""
    start = "" if before is None else f"<span class='from'>{before:.1f} →</span> "
    return (
        f"<div class='change'><span class='label'>{_text(label)}</span>"
        f"<span class='value'>{start}<b>{after:.1f}</b></span></div>"
    )


def _panel(title: str, svg: str, caption: str = "") -> str:
    note = f"<p>{_text(caption)}</p>" if caption else ""
    svg = svg.replace("<svg", f"<svg role='img' aria-label='{_text(title)}'", 1)
    return f"<figure><figcaption><h3>{_text(title)}</h3>{note}</figcaption>{svg}</figure>"


def _before_after(runs: Sequence[Run], panels: dict[str, str]) -> str:
    shown = [
        _panel(figure.describe(runs, quantity), panels[f"bars_{quantity}"])
        for quantity in ("target", results.NORM_AVG)
        if f"bars_{quantity}" in panels
    ]
    return (
        f"<div class='grid two'>{''.join(shown)}</div><p class='note'>The checkpoint that each "
        "method selected, on the test split; in brackets the change from the pretrained "
        "model.</p>"
    )


def _curves(runs: Sequence[Run], panels: dict[str, str]) -> str:
    shown = []
    palette = figure.colors(runs)
    for quantity, caption in _CAPTIONS.items():
        if quantity in panels:
            title = "Training loss" if quantity == "loss" else figure.describe(runs, quantity)
            shown.append(_panel(title, panels[quantity], caption))
    keys = [
        f"<span class='key' style='--method:{palette[verdict.method]}'>{_text(verdict.method)}"
        + (f" (other tasks {_text(verdict.how)})" if verdict.how else "")
        + "</span>"
        for verdict in verdicts.verdicts(runs)
    ]
    keys.append("<span class='key dashed'>pretrained</span>")
    return (
        f"<p class='keys'>{''.join(keys)}</p><div class='grid two'>{''.join(shown)}</div>"
        "<p class='note'>On the validation split; a dot marks the selected checkpoint, bands are "
        "± one standard deviation over seeds. The last stage of each method is at the right, "
        "earlier ones at the left.</p>"
    )


def _tradeoff(runs: Sequence[Run], id_and_ood: tradeoff.Tradeoff) -> str:
    if not id_and_ood.columns:
        return ""
    drawing = _panel(
        "Each λ on both",
        tradeoff_figure.svg_panel(id_and_ood, figure.colors(runs)),
        "Small points are seeds, large ones their means. λ is chosen on ID validation data alone; "
        "OOD data is never used for a selection.",
    )
    rows = _plain_table(table.tradeoff_rows(id_and_ood))
    return f"{rows}{drawing}"


def _drift(runs: Sequence[Run]) -> str:
    from robust_ft.report import analyses, analysis_figure  # numpy, which nothing else here needs

    if not analyses.columns_of(runs, DRIFT):
        return ""
    return _panel(
        "Distance from the pretrained model",
        analysis_figure.svg_panel(DRIFT, runs),
        "KL(pretrained || model) in nats a target token; below, against what was forgotten.",
    )


def _promptability(found: "Promptability | None") -> str:
    if found is None:
        return ""
    drawing = _panel(
        "Accuracy on each dataset",
        promptability_figure.svg_panel(found),
        "A dot is a template, a bar their mean; the dashed line is guessing.",
    )
    notes = "".join(f"<p class='note'>{_text(n)}</p>" for n in promptability_table.notes(found))
    parts = [_plain_table(promptability_table.gain_rows(found)), notes, drawing]
    if len(rows := promptability_table.difference_rows(found)) > 1:
        tests = f"<p class='note'>{_text(promptability_table.TESTS)}</p>"
        parts.append(f"<h3>Differences in ARG</h3>{_plain_table(rows)}{tests}")
    for setting in found.settings:
        rows = promptability_table.accuracy_rows(found, setting)
        parts.append(
            f"<details><summary>The templates one by one, {_text(setting.text)}</summary>"
            f"{_plain_table(rows)}</details>"
        )
    return "".join(parts)


def _differences(found: Comparisons) -> str:
    if not found.all:
        return ""
    rows = _plain_table(table.comparison_rows(found))
    tasks = ""
    if found.tasks:
        tasks = (
            "<details><summary>The held-out tasks one by one</summary>"
            f"{_plain_table(table.task_comparison_rows(found))}</details>"
        )
    return f"{rows}<p class='note'>{_text(table.TESTS)}</p>{tasks}"


def _plain_table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th scope='col'>{_text(cell)}</th>" for cell in rows[0][1:])
    body = "".join(
        f"<tr><th scope='row'>{_text(row[0])}</th>"
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows[1:]
    )
    return (
        f"<div class='scroll'><table><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _table(all_results: results.Table) -> str:
    """Tasks are rows and models are columns, so that many tasks fit on a phone."""
    heads = "".join(
        f"<th scope='col'>{_text(line.method)}<small>{_text(line.checkpoint)}</small>"
        f"<small>{line.seeds} seed{'s' * (line.seeds > 1)}</small>"
        + (
            f"<small>held-out tasks evaluated {_text(table.without(line))}</small>"
            if line.without
            else ""
        )
        + "</th>"
        for line in all_results.lines
    )
    rows = []
    for column in all_results.columns:
        start = {
            line.method: line.cells[column].mean
            for line in all_results.lines
            if line.stage == results.PRETRAINED and column in line.cells
        }
        cells = [_cell(line, column, start) for line in all_results.lines]
        group = "target" if column.task in all_results.targets else "all"
        group = "mean" if column.task == results.HELD_OUT else group
        rows.append(
            f"<tr class='{group}'><th scope='row'>{_text(table.head(column))}</th>"
            f"{''.join(cells)}</tr>"
        )
    return (
        f"<div class='scroll'><table><thead><tr><td></td>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class='note'>{_text(table.caption(all_results))} Small numbers are the change from "
        "the pretrained model.</p>"
    )


def _notes(groups: Groups) -> str:
    return "".join(f"<p class='note'>{_text(note)}</p>" for note in table.notes(groups))


def _settings(groups: Groups) -> str:
    return _plain_table(table.settings_rows(groups)) if groups.differences else ""


def _choices(groups: Groups) -> str:
    rows = choices.rows(groups.runs)
    return f"{_plain_table(rows)}<p class='note'>{_text(choices.CAPTION)}</p>" if rows else ""


def _cell(line: results.Line, column: results.Column, start: dict[str, float]) -> str:
    cell = line.cells.get(column)
    if cell is None:
        return "<td>–</td>"
    before = start.get(line.method, start.get(results.PRETRAINED))
    small = ""
    if line.stage != results.PRETRAINED and before is not None:
        change = round(cell.mean - before, 1)
        better = -change if column.percent else change
        kind = "up" if better >= 1 else "down" if better <= -1 else "same"
        shown = f"{change:+.1f}".replace("-", "−") if change else "±0"
        small = f"<small class='{kind}'>{shown}</small>"
    hint = f" title='{cell.num_examples} examples'" if cell.num_examples else ""
    return f"<td{hint}>{_text(line.text(column))}{small}</td>"


def _samples(runs: Sequence[Run]) -> str:
    samples = side_by_side.samples(runs)
    if not samples.rows:
        return ""
    cards = []
    for sample in samples.rows:
        outputs = "".join(_output(m, o, sample) for m, o in zip(samples.models, sample.outputs,
                                                                strict=True))  # fmt: skip
        cards.append(
            f"<article class='sample'><p class='over'>{_text(sample.task)}</p>"
            f"<p class='input'>{_text(sample.input)}</p><dl>"
            f"<div class='wanted'><dt>wanted</dt><dd>{_text(sample.target)}</dd></div>"
            f"{outputs}</dl></article>"
        )
    note = f"<p class='note'>{_text(table.SAMPLES)}</p>"
    return _section("The same question before and after", f"<div class='grid'>{''.join(cards)}"
                    f"</div>{note}")  # fmt: skip


def _output(model: str, output: str | None, sample: side_by_side.Sample) -> str:
    if output is None:
        return f"<div><dt>{_text(model)}</dt><dd class='none'>not recorded</dd></div>"
    right = sample.is_right(output)
    kind, mark = ("right", "✓") if right else ("wrong", "✗") if sample.has_right else ("", "")
    words = " ".join(
        f"<{tag}>{_text(piece.text)}</{tag}>" if tag else _text(piece.text)
        for piece in side_by_side.pieces(output, sample.references)
        for tag in [_TAGS.get(piece.kind)]
    )
    return (
        f"<div class='{kind}'><dt>{_text(model)}</dt><dd>{words or '<i>nothing</i>'} "
        f"<span class='mark'>{mark}</span></dd></div>"
    )


def _configs(runs: Sequence[Run]) -> str:
    parts = []
    shown = set()  # the methods of one run have one config
    for name, group in results.methods(runs).items():
        if group[0].directory in shown:
            continue
        shown.add(group[0].directory)
        seeds = ", ".join(str(run.seed) for run in group)
        stages = " → ".join(group[0].stages)
        config = f"<pre>{_text(group[0].config)}</pre>" if group[0].config else ""
        parts.append(
            f"<details><summary><b>{_text(name)}</b> · stages {_text(stages)} · seeds "
            f"{_text(seeds)}</summary>{config or '<p>No config.gin was found.</p>'}</details>"
        )
    return "".join(parts)
