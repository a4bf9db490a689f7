"""Prefix-Tuning: Optimizing Continuous Prompts for Generation (Li and Liang, 2021)."""

from runs import arm

from papers.claim import OOD, TARGET, Claim, Model, NotRun, Paper
from papers.cocktails import WEBNLG, XSUM

full, prefix = Model(WEBNLG, "full"), Model(WEBNLG, "prefix")
adapters = Model(WEBNLG, "adapters")
top2 = Model(arm("ft_top2_webnlg"), label="FT-Top2")
short = Model(arm("prefix_webnlg", PREFIX_LENGTH=1), label="prefix of 1")
direct = Model(arm("prefix_webnlg", PREFIX_MID_DIM=None), label="prefix without an MLP")
from_words = Model(
    arm(
        "prefix_webnlg",
        **{
            "Prefix.initialization": "text",
            "Prefix.text": "report :",
            "Prefix.vocabulary": "%VOCABULARY",
        },
    ),
    label="prefix from words",
)
embedding = Model(arm("full_webnlg+prompt"), label="EMB-10")
embedding_1 = Model(arm("full_webnlg+prompt", PROMPT_LENGTH=1), label="EMB-1")
infix = Model(arm("full_webnlg+infix"), label="INFIX-10")
xsum_full = Model(XSUM, "model", label="full")
xsum_prefix = Model(XSUM, "prefix")
xsum_short = Model(arm("prefix_webnlg+mini_xsum", PREFIX_LENGTH=1), label="prefix of 1")

_E2E = "E2E, BLEU"
_HERE = "Here on WebNLG's counterpart, the paper's figures are of E2E."

PAPER = Paper(
    "prefix_tuning",
    "Prefix-tuning",
    (
        Claim("full_data", "On table-to-text it is as good as full finetuning", "comparable",
              "Abstract; slides, “Results (Table to Text)”", prefix, full, TARGET, margin=1),
        Claim("top2", "It is better than training the two top layers", "–",
              "Slides, “Results (Table to Text)”", prefix, top2, TARGET),
        Claim("ood", "It is better than full finetuning on topics unseen in training", "–",
              "Abstract; slides, “Unseen Domains”", prefix, full, OOD),
        Claim("ood_adapters", "Adapters are better than full finetuning on unseen topics, too", "–",
              "Slides, “Unseen Domains”", adapters, full, OOD),
        Claim("xsum", "On XSUM it is worse than full finetuning", "ROUGE-2 20.93 and 22.27",
              "Slides, “Results (Summarization)”", xsum_full, xsum_prefix, TARGET),
        Claim("xsum_size", "On XSUM a larger prefix is better", "ROUGE-2 20.93 (2%), 20.03 (0.1%)",
              "Slides, “Results (Summarization)”", xsum_prefix, xsum_short, TARGET),
        Claim("length", "A longer prefix is better", "rises up to a length of 10",
              "Slides, “Prefix-length”", prefix, short, TARGET),
        Claim("embedding_only", "Vectors before the input alone (EMB) are worse", "69.7, 62.2",
              f"{_E2E}; slides, “Embedding-Only Tuning”", prefix, embedding, TARGET, note=_HERE),
        Claim("embedding_length", "10 of these are better than 1", "62.2, 48.1",
              f"{_E2E}; slides, “Embedding-Only Tuning”", embedding, embedding_1, TARGET,
              note=_HERE),
        Claim("infix", "Between input and output (INFIX) they are worse than a prefix",
              "69.7, 67.2", f"{_E2E}; slides, “Prefix vs Infix”", prefix, infix, TARGET,
              note=f"{_HERE} The infix here is of embeddings, the paper's of all layers."),
        Claim("initialization", "Initialized from words it is better than at random", "–",
              "Slides, “Initialization”", from_words, prefix, TARGET,
              note="The paper shows it with few examples, here all are there."),
        Claim("mlp", "Trained through an MLP it is better than directly", "“a slight drop”",
              "Summary, “Resolving Unstable Optimization”", prefix, direct, TARGET),
    ),
    (
        NotRun("With few training examples it is better than full finetuning", "–",
               "Slides, “Low-data regimes”", "a recipe with a part of the training data"),
        NotRun("It is better than adapters with as few parameters (0.1%)", "–",
               "Slides, “Results (Table to Text)”", "adapters of that size"),
        NotRun("Words of the task are better than other words", "–", "Slides, “Initialization”",
               "a recipe with few examples"),
    ),
)  # fmt: skip
