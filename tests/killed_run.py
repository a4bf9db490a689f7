"""Trains from a gin file and stops itself: killed_run.py WHERE STAGE STEP MODEL_DIR GIN_FILE.

WHERE is "nowhere", "step" (SIGKILL after that many steps), "terminated" (SIGTERM there), "saved"
(SIGKILL when the step's checkpoint is complete), "saving" (SIGKILL as soon as its writing has
begun) or "evaluated" (SIGKILL in place of the note that the stage has finished).
"""

import os
import signal
import sys

from robust_ft import command_line, train, trainer
from robust_ft.outcome import Outcome
from robust_ft.stage_checkpoints import StageCheckpoints

WHERE, STAGE, STEP, MODEL_DIR, GIN_FILE = sys.argv[1:]


def stop(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def here(directory, step):
    return STAGE in str(directory) and int(STEP) == step


def stopping(where, add, save, write):
    def stopping_add(self, step, sums):
        add(self, step, sums)
        if where in ("step", "terminated") and here(self._writer.directory, step):
            stop(signal.SIGTERM if where == "terminated" else signal.SIGKILL)

    def stopping_save(self, state, data_state, score):
        save(self, state, data_state, score)
        if where in ("saved", "saving") and here(self._manager.directory, int(state.step)):
            if where == "saved":
                self._manager.wait_until_finished()
            stop()

    def stopping_write(self, directory):
        if where == "evaluated" and here(directory, int(STEP)):
            stop()
        write(self, directory)

    return stopping_add, stopping_save, stopping_write


(
    trainer.TrainingLog.add,
    StageCheckpoints.save,
    Outcome.write,
) = stopping(
    WHERE,
    trainer.TrainingLog.add,
    StageCheckpoints.save,
    Outcome.write,
)
flags = [f"--gin_file={GIN_FILE}", f"--gin.MODEL_DIR={MODEL_DIR}"]
command_line.run(train.main, flags)
