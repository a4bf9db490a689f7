"""All tasks of the papers under one module name, and their mixtures.

webnlg_id, webnlg_ood, xsum_id, xsum_ood,     Ensembles and Cocktails: in and out of distribution
openqa_id, openqa_ood                         (one task each)
rte_wmt14                                     ProMoT's multi-task finetuning, at equal rates
promot_eval, promot_eval_1shot, _4shot        ProMoT's eight evaluation tasks; what all of them
                                              have is the split `reported`
"""

import seqio

from robust_ft import task_names
from robust_ft.data import derived
from tasks import (  # noqa: F401, importing them registers their tasks
    dart,
    e2e,
    mrqa,
    openbookqa,
    openqa,
    paraphrases,
    snli,
    superglue,
    trivia_qa,
    web_questions,
    webnlg,
    wiki_lingua,
    wmt,
    xsum,
)

PROMOT_EVAL = (
    "cb",
    "wic",
    "trivia_qa",
    "web_questions",
    "wmt16_ende",
    "wmt16_enro",
    "xsum",
    "wiki_lingua_en",
)

seqio.MixtureRegistry.add("rte_wmt14", ["rte", "wmt14_enfr"], default_rate=1.0)
seqio.MixtureRegistry.add("promot_eval", list(PROMOT_EVAL), default_rate=1.0)
for _shots in (1, 4):
    derived.find(task_names.with_shots("promot_eval", _shots))
