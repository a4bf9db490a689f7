"""Trains from a gin file and stops itself: killed_run.py WHERE STAGE STEP MODEL_DIR GIN_FILE.

WHERE is "nowhere", "step" (SIGKILL after that many steps), "terminated" (SIGTERM there),
"interrupted" (Ctrl-C there), "interrupted_twice", "saving" (SIGKILL as soon as the step's
checkpoint is being written), "saved" (SIGKILL when it is complete), "evaluated" (SIGKILL after the
final evaluation, before the stage is marked as finished) or "interrupted_outside" (Ctrl-C there).
"""

import functools
import os
import signal
import sys
import time

from robust_ft import command_line, train
from robust_ft.files import as_path
from robust_ft.run_context import Callback
from robust_ft.stage_checkpoints import saved_steps

WHERE, STAGE, STEP, MODEL_DIR, GIN_FILE = sys.argv[1:]
# As in a terminal: what a shell starts in the background ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


ON_STEP = {
    "step": [signal.SIGKILL],
    "terminated": [signal.SIGTERM],
    "interrupted": [signal.SIGINT],
    "interrupted_twice": [signal.SIGINT, signal.SIGINT],
}


class Killer(Callback):
    """Ends the process at one place of the training loop."""

    def on_step(self, stage, step, state, sums):
        if WHERE in ON_STEP:
            for number in ON_STEP[WHERE]:
                self.stop(stage, step, number)

    def on_checkpoint(self, stage, step):
        folder = as_path(MODEL_DIR) / stage.name
        # Orbax completes it, and then removes all but the newest and the best.
        while WHERE == "saved" and (
            step not in saved_steps(folder) or len([*folder.glob("checkpoint_*")]) > 2
        ):
            time.sleep(0.01)
        if WHERE in ("saved", "saving"):
            self.stop(stage, step)

    def on_evaluation(self, stage, step, results):
        if step > 0 and results and results[0].split == "test":
            if WHERE == "evaluated":
                self.stop(stage, int(STEP))
            if WHERE == "interrupted_outside":
                self.stop(stage, int(STEP), signal.SIGINT)

    def stop(self, stage, step, number=signal.SIGKILL):
        if (stage.name, step) == (STAGE, int(STEP)):
            os.kill(os.getpid(), number)


flags = [f"--gin_file={GIN_FILE}", f"--gin.MODEL_DIR={MODEL_DIR!r}"]
command_line.run(functools.partial(train.main, callbacks=[Killer()]), flags)
