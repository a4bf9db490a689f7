"""All that the library prints: a banner, progress, lines and tables.

The functions of this module print through one shared `Console`; `configure(enabled=False)`
silences them, in a notebook or on every process but the first. Nothing here waits for a device:
callers pass numbers that are on the host already.
"""

import collections
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import rich.console
    import rich.progress

_WINDOW = 50  # updates over which rates are measured, so that compilation soon drops out


class Progress:
    """The progress of one stage; a context manager, made by `Console.progress`.

    In a terminal one line is redrawn in place; elsewhere a plain line is printed every
    `interval` seconds or `every` steps, whichever comes first, and at the end.
    """

    def __init__(
        self,
        console: "Console",
        stage: str,
        total: int,
        initial: int,
        unit: str,
        interval: float,
        every: int | None,
    ):
        self._console = console
        self._stage, self._total, self._unit = stage, total, unit
        self._interval, self._every = interval, every
        self._times = collections.deque([(console.clock(), initial, 0.0)], maxlen=_WINDOW)
        self._examples = 0.0
        self._started = self._printed_at = console.clock()
        self._step = self._printed_step = initial
        self._numbers: dict[str, float] = {}
        self._live: rich.progress.Progress | None = None
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if self._console.enabled and self._console.interactive:
            self._live = _live_progress(self._console.rich)
            self._live.start()
            self._bar = self._live.add_task(
                self._stage, total=self._total, completed=self._step, numbers="", rate="", left=""
            )
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._console.enabled and self._step > self._printed_step:
            self._print_line()
        if self._console.enabled and kind is None:
            took = duration(self._console.clock() - self._started)
            self._console.print(f"[{self._stage}] {self._step} {self._unit} in {took}")

    def update(self, step: int, examples: int = 0, **numbers: float) -> None:
        """Shows that `step` of the total are done.

        Args:
            step: Number of steps done, counted from the start of the stage.
            examples: Number of examples since the last update; 0 leaves their rate out.
            **numbers: Metrics, such as `loss=0.53`; those of earlier updates stay.
        """
        if not self._console.enabled:
            return
        now = self._console.clock()
        self._step = step
        self._examples += examples
        self._numbers |= numbers
        self._times.append((now, step, self._examples))
        if self._live is not None:
            shown, rate, left = self._columns()
            self._live.update(self._bar, completed=step, numbers=shown, rate=rate, left=left)
            return
        due = now - self._printed_at >= self._interval
        if due or (self._every is not None and step - self._printed_step >= self._every):
            self._print_line()

    def _columns(self) -> tuple[str, str, str]:
        """Returns the texts of metrics, rate and time left."""
        (then, first, before), (now, last, examples) = self._times[0], self._times[-1]
        seconds = now - then
        shown = "  ".join(f"{name} {number:.4g}" for name, number in self._numbers.items())
        if seconds <= 0 or last <= first:
            return shown, "", ""
        speed = (last - first) / seconds
        rate = f"{speed:.3g} {self._unit}/s"
        if examples > before:
            rate += f"  {(examples - before) / seconds:.4g} examples/s"
        return shown, rate, f"{duration((self._total - last) / speed)} left"

    def _print_line(self) -> None:
        self._printed_at, self._printed_step = self._console.clock(), self._step
        done = f"[{self._stage}] {self._step:>{len(str(self._total))}}/{self._total} {self._unit}"
        self._console.print("  ".join(filter(None, (done, *self._columns()))))


class Console:
    """Where the library prints.

    Args:
        enabled: Whether to print; False on every process but the first.
        file: The output; by default stdout, looked up at each print (a notebook replaces it).
        width: Columns; by default the terminal's, or 100.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        enabled: bool = True,
        file: TextIO | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.enabled = enabled
        self.clock = clock
        self._file = file
        self._width = width
        self._rich: rich.console.Console | None = None

    @property
    def rich(self) -> "rich.console.Console":
        """The rich console below; made at first use, since importing rich takes a while."""
        if self._rich is None:
            import rich.console

            width = self._width
            if width is None and not (self._file or sys.stdout).isatty():
                width = 100
            self._rich = rich.console.Console(file=self._file, width=width, highlight=False)
        return self._rich

    @property
    def interactive(self) -> bool:
        """Whether a line can be redrawn in place."""
        return self.rich.is_terminal and not self.rich.is_dumb_terminal

    def print(self, text: str = "", style: str | None = None) -> None:
        """Prints a line as it is: brackets in it are not markup, long lines are not broken."""
        if self.enabled:
            self.rich.print(text, style=style, markup=False, soft_wrap=True)

    def banner(self, title: str, facts: Mapping[str, object]) -> None:
        """Prints the first lines of a run: what runs, on what data, on which devices.

        Args:
            title: Such as "robust_ft: promot_rte".
            facts: Names and values, such as `{"model": ..., "parameters": ..., "devices": ...}`.
        """
        if not self.enabled:
            return
        self.print(title, style="bold")
        width = max((len(name) for name in facts), default=0)
        for name, value in facts.items():
            self.print(f"  {name:<{width}}  {value}")

    def print_table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        caption: str | None = None,
    ) -> None:
        """Prints a table; columns of numbers are right-aligned, except the first column.

        Args:
            title: The line above the table.
            columns: Column heads.
            rows: Cells of each row; floats are shown with one decimal.
            caption: Notes below the table.
        """
        if not self.enabled:
            return
        import rich.box
        import rich.table
        import rich.text

        cells = [[_cell(value) for value in row] for row in rows]
        table = rich.table.Table(
            title=rich.text.Text(title), title_justify="left", box=rich.box.SIMPLE_HEAD
        )
        for index, column in enumerate(columns):
            numeric = all(_is_number(row[index]) for row in cells) and bool(cells)
            table.add_column(
                rich.text.Text(column),
                justify="right" if numeric and index else "left",
                overflow="fold",
            )
        for row in cells:
            table.add_row(*(rich.text.Text(cell) for cell in row))
        self.rich.print(table)
        if caption:
            self.print(caption, style="dim")

    def progress(
        self,
        stage: str,
        total: int,
        initial: int = 0,
        unit: str = "steps",
        interval: float = 10.0,
        every: int | None = None,
    ) -> Progress:
        """Returns a context manager that shows progress.

        Args:
            stage: Name of the stage.
            total: Total number of steps.
            initial: Steps already done, when a run resumes.
            unit: What is counted.
            interval: Seconds between plain lines, where there is no terminal.
            every: Steps between plain lines, if that comes sooner.
        """
        return Progress(self, stage, total, initial, unit, interval, every)


def duration(seconds: float) -> str:
    """Returns seconds as `m:ss` or `h:mm:ss`."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    first = cell.split("(")[0].split("±")[0].split("†")[0].strip().rstrip("%").strip()
    try:
        float(first or "0")
    except ValueError:
        return first in {"–", "-"} or first.startswith("without ")
    return True


def _live_progress(console: "rich.console.Console") -> "rich.progress.Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[rate]}", style="dim", markup=False),
        TextColumn("{task.fields[left]}", markup=False),
        console=console,
        refresh_per_second=4,  # its thread shares the cores that train
        transient=True,
    )


_shared = Console()


def configure(enabled: bool = True, file: TextIO | None = None) -> Console:
    """Replaces the shared console, by which the functions below print, and returns it."""
    global _shared
    _shared = Console(enabled, file)
    return _shared


def get() -> Console:
    """Returns the shared console."""
    return _shared


def print_line(text: str = "", style: str | None = None) -> None:
    """Prints a line; see `Console.print`."""
    _shared.print(text, style)


def banner(title: str, facts: Mapping[str, object]) -> None:
    """Prints the first lines of a run; see `Console.banner`."""
    _shared.banner(title, facts)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    caption: str | None = None,
) -> None:
    """Prints a table; see `Console.print_table`."""
    _shared.print_table(title, columns, rows, caption)


def progress(
    stage: str,
    total: int,
    initial: int = 0,
    unit: str = "steps",
    interval: float = 10.0,
    every: int | None = None,
) -> Progress:
    """Returns a context manager that shows progress; see `Console.progress`."""
    return _shared.progress(stage, total, initial, unit, interval, every)
