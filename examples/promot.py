"""ProMoT on the mini world, in Python: python examples/promot.py [STEPS] [MODEL_DIR]

A soft prompt learns the format on the frozen model, then the model learns the task under it.
"""

import dataclasses
import sys

import robust_ft
from robust_ft import AdamW, Decoder, Evaluation, Prompt, Recipe, Schedule, Stage, TaskData

HELD_OUT = {0: ["mini_cb", "mini_qa_capital", "mini_zorb", "mini_summary"]}  # by number of shots
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300
model_dir = sys.argv[2] if len(sys.argv) > 2 else "/tmp/robust_ft/promot_in_python"

mini = robust_ft.load("asset:mini")
data = TaskData(
    task="mini_rte",
    module="tasks.mini",
    inputs_length=64,
    targets_length=12,
    vocabulary=mini.vocabulary,
)
target = Evaluation(data, Decoder(max_decode_len=12))
held_out = dataclasses.replace(target, detach="all")
prompt = Stage(
    name="prompt",
    model=mini.model.with_peft(Prompt(length=10)),
    restore="asset:mini",
    trainable=("peft",),
    data=data,
    steps=steps,
    batch_size=32,
    optimizer=robust_ft.Adafactor(Schedule(0.3), multiply_by_parameter_scale=False),
    evaluations=robust_ft.suite("validation", target, held_out, HELD_OUT),
    final_evaluations=robust_ft.suite("test", target, held_out, HELD_OUT),
    eval_period=100,
)
adamw = AdamW(Schedule(1e-3), epsilon=1e-3)
model = dataclasses.replace(
    prompt, name="model", restore="stage:prompt", trainable=("base",), optimizer=adamw
)
robust_ft.run(Recipe("promot", model_dir, (prompt, model)))
robust_ft.write_report([model_dir], model_dir)
