"""Two-stage LLM Fine-tuning with Less Specialization and More Generalization (ProMoT)."""

from runs import arm

from papers.claim import FORMAT, HELD_OUT, PRETRAINED, TARGET, Claim, Model, NotRun, Paper

FULL, PROMOT = arm("full_rte"), arm("promot_rte")
FULL_1SHOT, PROMOT_1SHOT = arm("full_rte_1shot"), arm("promot_rte_1shot")
FULL_MULTI, PROMOT_MULTI = arm("full_rte+mini_multitask"), arm("promot_multitask")
ALIGNED = arm("full_rte+drift_and_alignment")

before = Model(FULL, PRETRAINED, label="pretrained")
full, promot = Model(FULL, label="full"), Model(PROMOT, label="ProMoT")
prompt = Model(PROMOT, "prompt", label="prompt tuning")  # ProMoT's first stage is nothing else
joint = Model(arm("joint_rte"), label="joint")
random = Model(arm("random_prompt_rte"), label="random prompt")
lora = Model(arm("promot_lora"), label="ProMoT with LoRA")
full_1shot = Model(FULL_1SHOT, label="full + 1-shot")
promot_1shot = Model(PROMOT_1SHOT, label="ProMoT + 1-shot")
full_multi = Model(FULL_MULTI, label="multi-task full")
promot_multi = Model(PROMOT_MULTI, label="multi-task ProMoT")
before_multi = Model(PROMOT_MULTI, PRETRAINED, label="pretrained")

_ONE_TASK = "One finetuning task, mini RTE, for the paper's four."
_LORA = "The paper's figures are those of En-Fr; here the target is mini RTE."

PAPER = Paper(
    "promot",
    "ProMoT",
    (
        Claim(
            "forgetting", "Full finetuning loses the other tasks", "17.52 → 15.43 after RTE, "
            "17.52 → 9.15 after En-Fr", "Tables 5.2 and 5.3, 1-shot", before, full, HELD_OUT,
        ),
        Claim(
            "format_share", "Full finetuning answers other tasks in the target's format",
            "90% True or False after 300 steps", "Section 3.2, figure 2", full, before, FORMAT,
        ),
        Claim(
            "keeps", "ProMoT loses less of the other tasks than full finetuning",
            "20.10 and 15.43 after RTE, 18.87 and 9.15 after En-Fr", "Tables 5.2 and 5.3, 1-shot",
            promot, full, HELD_OUT,
        ),
        Claim(
            "less_format", "ProMoT answers other tasks in the target's format less often",
            "–", "Sections 3.2 and 4", full, promot, FORMAT,
        ),
        Claim(
            "target", "ProMoT is as good on the target as full finetuning",
            "92.78 and 92.06 on RTE, 41.30 and 41.80 on En-Fr", "Table 5.2", promot, full, TARGET,
            margin=2, note=_ONE_TASK,
        ),
        Claim(
            "target_above_prompt", "ProMoT is better on the target than prompt tuning",
            "92.78 and 91.34 on RTE, 41.30 and 39.28 on En-Fr", "Table 5.2", promot, prompt, TARGET,
        ),
        Claim(
            "target_full_above_prompt", "Full finetuning is better on the target than prompt "
            "tuning", "92.06 and 91.34 on RTE, 41.80 and 39.28 on En-Fr", "Table 5.2", full, prompt,
            TARGET,
        ),
        Claim(
            "transfer", "ProMoT improves other tasks beyond the pretrained model",
            "20.10 and 17.52 after RTE, 18.87 and 17.52 after En-Fr", "Tables 5.2 and 5.3, 1-shot",
            promot, before, HELD_OUT,
        ),
        Claim(
            "transfer_summary", "ProMoT on entailment improves summaries beyond the pretrained "
            "model", "XSum 6.41 → 7.02, WikiLingua 4.59 → 4.84", "Table 5.2, 1-shot", promot,
            before, "mini_summary@1",
        ),
        Claim(
            "similar_task", "Full finetuning does not lose the task whose format is the target's",
            "CB 46.43 → 73.21", "Table 5.2, 1-shot", full, before, "mini_cb@1", margin=2,
            note="The counterpart of CB answers yes or no.",
        ),
        Claim(
            "joint", "Training prompt and model together forgets more than ProMoT",
            "TriviaQA 0.75 and 17.82", "Table 3", promot, joint, HELD_OUT,
            note="The paper's ProMoT has a 1-shot prompt in training.",
        ),
        Claim(
            "joint_forgets", "Training prompt and model together still loses the other tasks",
            "TriviaQA 17.58 → 0.75, XSum 6.41 → 0.00", "Table 3", before, joint, HELD_OUT,
        ),
        Claim(
            "random_prompt", "Training under a random prompt forgets more than ProMoT",
            "TriviaQA 0.83 and 17.82", "Table 3", promot, random, HELD_OUT,
            note="The paper's ProMoT has a 1-shot prompt in training.",
        ),
        Claim(
            "random_prompt_no_help", "A random prompt does not help against forgetting",
            "TriviaQA 0.83 and 0.15", "Tables 3 and 5.2", full, random, HELD_OUT, margin=2,
        ),
        Claim(
            "lora_target", "With LoRA in the first stage, ProMoT is worse on the target",
            "39.09 and 39.97 (ranks 2 and 4), 41.19", "Table 11", promot, lora, TARGET, note=_LORA,
        ),
        Claim(
            "lora_forgets", "With LoRA in the first stage, ProMoT forgets more",
            "TriviaQA 4.98 and 5.19 (ranks 2 and 4), 13.63", "Table 11", promot, lora, HELD_OUT,
            note=_LORA,
        ),
        Claim(
            "lora_keeps", "With LoRA in the first stage, ProMoT still forgets less than full "
            "finetuning", "TriviaQA 4.98 and 5.19 (ranks 2 and 4), 0.03", "Table 11", lora, full,
            HELD_OUT, note=_LORA,
        ),
        Claim(
            "one_shot", "ProMoT trained on 1-shot prompts is better still on the other tasks",
            "22.26 and 20.10 after RTE, 19.91 and 18.87 after En-Fr", "Tables 5.2 and 5.3, 1-shot",
            promot_1shot, promot, HELD_OUT,
        ),
        Claim(
            "one_shot_full", "Full finetuning on 1-shot prompts forgets more than ProMoT on them",
            "TriviaQA 0.03 and 17.82", "Table 3", promot_1shot, full_1shot, HELD_OUT,
        ),
        Claim(
            "one_shot_target", "ProMoT trained on 1-shot prompts is as good on the target as "
            "full finetuning", "93.86 and 92.06 on RTE, 41.19 and 41.80 on En-Fr",
            "Tables 5.2 and 5.3", promot_1shot, full, TARGET, margin=2,
        ),
        Claim(
            "multitask", "Multi-task ProMoT is better on the other tasks than multi-task full "
            "finetuning", "25.88 and 20.06", "Table 2, 1-shot", promot_multi, full_multi, HELD_OUT,
        ),
        Claim(
            "multitask_transfer", "Multi-task ProMoT improves other tasks beyond the pretrained "
            "model", "25.88 and 17.52", "Table 2, 1-shot", promot_multi, before_multi, HELD_OUT,
        ),
        Claim(
            "multitask_target", "Multi-task ProMoT is as good on RTE as multi-task full finetuning",
            "91.34 and 90.25", "Table 2", promot_multi, full_multi, "mini_rte", margin=2,
        ),
        Claim(
            "multitask_target_2", "Multi-task ProMoT is as good on the second task as multi-task "
            "full finetuning", "40.73 and 41.34 on En-Fr", "Table 2", promot_multi, full_multi,
            "mini_d2t", margin=2, note="The second task is table-to-text, the paper's translation.",
        ),
        Claim(
            "alignment", "At the start the gradient is that of the format: its cosine with the "
            "format gradient is higher than after finetuning", "near 1 at step 0, near 0.2 at "
            "step 400", "Section 3.3, figures 3 and 7", Model(ALIGNED, PRETRAINED, label="step 0"),
            Model(ALIGNED, label="the selected step"), "gradient_alignment",
        ),
    ),
    (
        NotRun(
            "SNLI and OpenbookQA as targets, mT5-XL, T5.1.1-XXL and PaLM-8B as models agree",
            "Norm. Avg. 16.20 and 19.83 on SNLI, 0.00 and 17.40 on OpenbookQA",
            "Tables 7 to 10", "other targets and sizes of model",
        ),
        NotRun(
            "Multi-task training on 1-shot prompts is better still", "26.17 and 25.88; 22.62 and "
            "20.06", "Table 2", "a mixture with exemplars",
        ),
        NotRun(
            "With the same target accuracy, ProMoT has forgotten less, up to 20,000 steps", "–",
            "Figures 5 and 6", "checkpoints of long runs",
        ),
    ),
)  # fmt: skip
