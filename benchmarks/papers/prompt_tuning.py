"""The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al., 2021)."""

from runs import arm

from papers.claim import OOD, PRETRAINED, TARGET, Claim, Model, NotRun, Paper
from papers.prefix_tuning import embedding
from papers.prefix_tuning import full as webnlg_full
from papers.promot import PROMOT, full, prompt

LABELS = ("True", "False")

before = Model(PROMOT, PRETRAINED, label="pretrained")
random = Model(
    arm("prompt_rte", PROMPT_INITIALIZATION="random_uniform"), label="random initialization"
)
labels = Model(
    arm("prompt_rte", PROMPT_INITIALIZATION="class_labels", **{"Prompt.labels": LABELS}),
    label="class labels",
)
length_1 = Model(arm("prompt_rte", PROMPT_LENGTH=1), label="length 1")
length_20 = Model(arm("prompt_rte", PROMPT_LENGTH=20), label="length 20")
length_100 = Model(arm("prompt_rte", PROMPT_LENGTH=100), label="length 100")
webnlg_prompt = Model(embedding.arm, label="prompt tuning")

_SHIFT = "Here unseen topics of table-to-text, BLEU."

PAPER = Paper(
    "prompt_tuning",
    "Prompt tuning",
    (
        Claim("small_models", "Small models: model tuning is better than prompt tuning", "–",
              "Slides, “Closing the Gap”", full, prompt, TARGET),
        Claim("prompt_design", "Prompt tuning is better than a prompt in words", "–",
              "Slides, “Closing the Gap”", prompt, before, TARGET),
        Claim("vocabulary", "Initialized with words it is better than at random", "–",
              "Slides, “Prompt Initialization”", prompt, random, TARGET),
        Claim("class_labels", "Initialized with class labels it is better than at random", "–",
              "Slides, “Prompt Initialization”", labels, random, TARGET),
        Claim("class_labels_best", "Class labels are as good as sampled words or better", "–",
              "Slides, “Prompt Initialization”", labels, prompt, TARGET, margin=2),
        Claim("length", "Longer prompts are better: 20 vectors above 1", "–",
              "Slides, “Prompt Length”", length_20, length_1, TARGET),
        Claim("length_saturates", "Beyond 20 vectors little is gained", "“marginal gains”",
              "Slides, “Prompt Length”", length_20, length_100, TARGET, margin=2),
        Claim("domain_shift", "Prompt tuning is better than model tuning under domain shift",
              "TextbookQA 66.8 and 54.3; QQP → MRPC 76.3 and 73.1",
              "Slides, “Resilience to Domain Shift”", webnlg_prompt, webnlg_full, OOD,
              note=_SHIFT),
        Claim("in_domain", "In domain it is as good as model tuning", "SQuAD 94.8 and 94.9",
              "Slides, “Resilience to Domain Shift”", webnlg_prompt, webnlg_full, TARGET,
              margin=2, note="Here table-to-text, BLEU."),
    ),
    (
        NotRun("With scale prompt tuning catches up with model tuning, and length and "
               "initialization cease to matter", "–", "Slides, “Closing the Gap”",
               "several sizes of one model"),
        NotRun("Span corruption is worse to start from than LM adaptation, up to 100K steps", "–",
               "Slides, “Pre-training Method”", "models pretrained in these ways"),
        NotRun("An ensemble of prompts is better than their mean and their best",
               "SuperGLUE 91.3, 90.5 and 91.0", "Slides, “Prompt Ensembling”",
               "the vote of several prompts"),
        NotRun("Class labels persist in a prompt, its neighbours form clusters", "–",
               "Slides, “Interpretability”", "a figure to compare; `PromptNeighbors` lists them"),
    ),
)  # fmt: skip
