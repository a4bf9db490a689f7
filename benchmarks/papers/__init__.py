"""The claims of the five papers, one module each, and how they are told from runs."""

from papers import cocktails, prefix_tuning, promot, prompt_tuning, promptability
from papers.claim import Claim, Paper

MODULES = (promot, cocktails, prefix_tuning, prompt_tuning, promptability)
PAPERS: dict[str, Paper] = {module.PAPER.name: module.PAPER for module in MODULES}
# What tests/test_headline.py holds, in short runs.
IMPORTANT = (
    "promot.forgetting",
    "promot.format_share",
    "promot.keeps",
    "promot.target",
    "promot.transfer",
    "cocktails.premise_id_adapters",
    "cocktails.premise_ood_adapters",
    "cocktails.ensemble_adapters_ood",
    "cocktails.cocktail_adapters_ood",
    "cocktails.proposition_2",
)


def claims() -> dict[str, Claim]:
    """Returns all claims by their names, such as "promot.forgetting"."""
    return {f"{p.name}.{claim.name}": claim for p in PAPERS.values() for claim in p.claims}
