"""Training metrics: collected on the device, written as means over windows of steps."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int64

from robust_ft.console import Progress
from robust_ft.finite import NonFinite
from robust_ft.metric_writer import MetricWriter
from robust_ft.types import Sums


class Done(NamedTuple):
    """A step that was done, its arrays on the device.

    Attributes:
        step: Its number, from 1.
        sums: Metric sums.
        flags: What is not finite, see `finite.checked`.
        examples: The numbers of its examples.
    """

    step: int
    sums: Sums
    flags: Bool[Array, "1+parameters"]
    examples: Int64[np.ndarray, " examples"]


class TrainingLog:
    """Collects metric sums on the device and writes their means, one window of steps late.

    A window is read when the next one is full, so the host never waits for a step in flight.

    Args:
        writer: Writes the means.
        progress: Shows the loss and the rate.
        nonfinite: Looks at each step's flags before its window is written.
        period: Steps in a window.
        batch_size: Examples in a step.
    """

    def __init__(
        self,
        writer: MetricWriter,
        progress: Progress,
        nonfinite: NonFinite,
        period: int,
        batch_size: int,
    ):
        self._writer = writer
        self._progress = progress
        self._nonfinite = nonfinite
        self._period, self._batch_size = period, batch_size
        self._full: list[Done] = []
        self._window: list[Done] = []
        self._shown: dict[str, float] = {}

    def add(self, done: Done) -> None:
        """Adds a step; at the end of a window writes the one before.

        Raises:
            UserError: A step of that window is not finite, see `NonFinite`.
        """
        self._window.append(done)
        if done.step % self._period == 0:
            self._rotate()
            self._progress.update(done.step, self._period * self._batch_size, **self._shown)

    def flush(self, step: int) -> None:
        """Writes everything collected so far; raises as `add` does."""
        self._rotate()
        self._rotate()
        self._progress.update(step, 0, **self._shown)

    def _rotate(self) -> None:
        self._write(self._full)
        self._full, self._window = self._window, []

    def _write(self, window: list[Done]) -> None:
        if not window:
            return
        totals: dict[str, float] = {}
        read = jax.device_get([(done.sums, done.flags) for done in window])
        for done, (sums, flags) in zip(window, read, strict=True):
            self._nonfinite(done.step, flags, done.examples)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        weight = totals.pop("weight")
        # Sums over the steps that were not skipped.
        skipped = {"skipped": totals.pop("skipped")} if "skipped" in totals else {}
        steps = len(window) - sum(skipped.values())
        # The loss and its parts are sums over target tokens, these two are one number a step.
        per_step = {
            name: totals.pop(name) / (steps or 1) for name in ("grad_norm", "learning_rate")
        }
        values = {name: total / (weight or 1.0) for name, total in totals.items()} | per_step
        self._writer.write(window[-1].step, values | skipped)
        self._shown = {"loss": values["loss"]}
