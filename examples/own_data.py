"""LoRA on your own pairs of texts, then predict: python examples/own_data.py [STEPS] [MODEL_DIR]

For a file of examples, `robust_ft.FileTask(name="qa", train="train.jsonl", validation=...,
inputs="{question}", targets="{answer}")` takes the place of `pairs_task`.
"""

import itertools
import sys

import robust_ft
from robust_ft import AdamW, Decoder, Evaluation, Lora, Recipe, Schedule, Stage, TaskData

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
model_dir = sys.argv[2] if len(sys.argv) > 2 else "/tmp/robust_ft/own_data"

people = ["Mira", "Tovo", "Lena", "Arik", "Suni", "Beda", "Karo", "Nima"]
things = ["lamp", "cup", "rope", "drum", "coat", "knife", "clock", "mirror"]
pairs = [
    (f"{who} found the {thing} . Q : what ? A :", f"the {thing}")
    for who, thing in itertools.product(people, things)
]
task = robust_ft.pairs_task("qa", train=pairs[16:], validation=pairs[:16])

mini = robust_ft.load("asset:mini")
data = TaskData(
    task="qa", file_tasks=(task,), inputs_length=16, targets_length=4, vocabulary=mini.vocabulary
)
stage = Stage(
    name="lora",
    model=mini.model.with_peft(Lora(rank=4)),
    restore="asset:mini",
    trainable=("peft",),
    data=data,
    steps=steps,
    batch_size=16,
    optimizer=AdamW(Schedule(5e-3)),
    evaluations=robust_ft.suite("validation", Evaluation(data, Decoder(max_decode_len=4))),
)
robust_ft.run(Recipe("own_data", model_dir, (stage,)))
finetuned = robust_ft.load("asset:mini", weights=f"{model_dir}/lora/export")
print(finetuned.predict(["Zeta found the clock . Q : what ? A :"]))
