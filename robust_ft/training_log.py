"""Training metrics: collected on the device, written as means over windows of steps."""

import jax

from robust_ft.console import Progress
from robust_ft.metric_writer import MetricWriter
from robust_ft.types import Sums


class TrainingLog:
    """Collects metric sums on the device and writes their means, one window of steps late.

    A window is read when the next one is full, so the host never waits for a step in flight.

    Args:
        writer: Writes the means.
        progress: Shows the loss and the rate.
        period: Steps in a window.
        batch_size: Examples in a step.
    """

    def __init__(self, writer: MetricWriter, progress: Progress, period: int, batch_size: int):
        self._writer = writer
        self._progress = progress
        self._period, self._batch_size = period, batch_size
        self._full: list[tuple[int, Sums]] = []
        self._window: list[tuple[int, Sums]] = []
        self._shown: dict[str, float] = {}

    def add(self, step: int, sums: Sums) -> None:
        """Adds a step; at the end of a window writes the one before."""
        self._window.append((step, sums))
        if step % self._period == 0:
            self._rotate()
            self._progress.update(step, self._period * self._batch_size, **self._shown)

    def flush(self, step: int) -> None:
        """Writes everything collected so far."""
        self._rotate()
        self._rotate()
        self._progress.update(step, 0, **self._shown)

    def _rotate(self) -> None:
        self._write(self._full)
        self._full, self._window = self._window, []

    def _write(self, window: list[tuple[int, Sums]]) -> None:
        if not window:
            return
        totals: dict[str, float] = {}
        for sums in jax.device_get([sums for _, sums in window]):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        weight = totals.pop("weight")
        # The loss and its parts are sums over target tokens, these two are one number a step.
        per_step = {name: totals.pop(name) / len(window) for name in ("grad_norm", "learning_rate")}
        values = {name: total / (weight or 1.0) for name, total in totals.items()} | per_step
        self._writer.write(window[-1][0], values)
        self._shown = {"loss": values["loss"]}
