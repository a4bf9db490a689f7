"""Ensembles and Cocktails: Robust Finetuning for Natural Language Generation."""

from collections.abc import Iterator

from runs import Arm, arm

from papers.claim import BEST_OOD, OOD, TARGET, UNSEEN, Claim, Model, NotRun, Paper

# One run has all models of Table 2 on table-to-text.
WEBNLG, DISTILLED = arm("table2_webnlg"), arm("distill_full_xsum")
XSUM, OPENQA = arm("ensemble_xsum"), arm("ensemble_openqa")

# The paper's Table 2: means ID and OOD.
TABLE_2 = {
    "WebNLG": {
        "full": (63.25, 30.39), "prefix": (63.18, 43.75), "adapters": (60.43, 48.04),
        "ensemble_prefix": (65.04, 44.80), "cocktail_prefix": (65.35, 43.96),
        "ensemble_adapters": (64.57, 46.78), "cocktail_adapters": (64.61, 44.91),
    },
    "XSUM": {"full": (21.22, 15.47), "prefix": (19.75, 16.27), "ensemble_prefix": (21.99, 16.50)},
    "OpenQA": {"full": (16.8, 9.8), "prefix": (8.2, 11.0), "ensemble_prefix": (17.2, 11.4)},
}  # fmt: skip
ENSEMBLES = ("ensemble_prefix", "ensemble_adapters")
COCKTAILS = ("cocktail_prefix", "cocktail_adapters")
NO_WORSE = 1.0  # points of BLEU, ROUGE-2 or exact match


def _claim(name: str, words: str, data: str, above: Model, below: Model, quantity: str,
           margin: float = 0.0) -> Claim:  # fmt: skip
    """Returns a claim about two cells of Table 2."""
    index = int(quantity == OOD)
    figures = [TABLE_2[data][model.name][index] for model in (above, below)]
    where = "OOD" if index else "ID"
    suffix = "" if data == "WebNLG" else f"_{data.lower()}"
    return Claim(
        f"{name}{suffix}", f"{data}, {where}: {words}", f"{figures[0]:g} and {figures[1]:g}",
        "Table 2", above, below, quantity, margin=margin,
    )  # fmt: skip


def _of(data: str, models: dict[str, Model], mixtures: tuple[str, ...]) -> Iterator[Claim]:
    """Yields the claims about one dataset: the premise, then each mixture against its members."""
    full = models["full"]
    lights = [models[name] for name in ("prefix", "adapters") if name in models]
    for light in lights:
        if (data, light.name) == ("WebNLG", "prefix"):  # the one of six that is comparable
            yield _claim("premise_id_prefix", "prefix is as good as full finetuning",
                         data, light, full, TARGET, NO_WORSE)  # fmt: skip
        else:
            yield _claim(f"premise_id_{light.name}", f"full finetuning is better than {light.name}",
                         data, full, light, TARGET)  # fmt: skip
        yield _claim(f"premise_ood_{light.name}", f"{light.name} is better than full finetuning",
                     data, light, full, OOD)  # fmt: skip
    for name in mixtures:
        mixture = models[name]
        kind, _, of = name.partition("_")
        light, words = models[of], f"the {kind} of full and {of} is"
        yield _claim(f"{name}_ood", f"{words} better than full", data, mixture, full, OOD)
        yield _claim(f"{name}_id", f"{words} better than {of}", data, mixture, light, TARGET)
        yield _claim(f"{name}_keeps_id", f"{words} as good as full", data, mixture, full, TARGET,
                     NO_WORSE)  # fmt: skip
        # With adapters on WebNLG the paper's own mixtures are worse by more than the margin.
        if of != "adapters":
            yield _claim(f"{name}_keeps_ood", f"{words} as good as {of}", data, mixture, light,
                         OOD, NO_WORSE)  # fmt: skip


def _lambdas(names: tuple[str, ...]) -> Iterator[Claim]:
    """Yields the claims about the choice of lambda on ID validation."""
    for name in names:
        yield Claim(
            f"lambda_{name}", f"{name}: the λ that ID validation selects is as good OOD as the "
            "best λ there", "one λ is best for both in 2 of 3 tasks", "Section 8, figure 3",
            Model(WEBNLG, name), Model(WEBNLG, name, BEST_OOD), OOD, margin=NO_WORSE,
        )  # fmt: skip


def _pair(of: Arm) -> dict[str, Model]:
    """Returns the models of a run of ensemble_<data>.gin, by their names in Table 2."""
    return {
        "full": Model(of, "model", label="full"),
        "prefix": Model(of, "prefix"),
        "ensemble_prefix": Model(of, "ensemble", label="ensemble_prefix"),
    }


PAPER = Paper(
    "cocktails",
    "Ensembles and Cocktails",
    (
        *_of("WebNLG", {name: Model(WEBNLG, name) for name in TABLE_2["WebNLG"]},
             (*ENSEMBLES, *COCKTAILS)),
        *_lambdas((*ENSEMBLES, *COCKTAILS)),
        *_of("XSUM", _pair(XSUM), ("ensemble_prefix",)),
        *_of("OpenQA", _pair(OPENQA), ("ensemble_prefix",)),
        *(
            Claim(
                f"distill_full_{where.lower()}", f"XSUM, {where}: distilling full finetuning into "
                "full finetuning brings nothing", "no benefits, for any λ", "Section 8, figure 4",
                Model(DISTILLED, "model", label="full"),
                Model(DISTILLED, "cocktail", label="full distilled"), quantity,
                margin=NO_WORSE,
            )
            for where, quantity in (("ID", TARGET), ("OOD", OOD))
        ),
        Claim(
            "proposition_1", "Logistic regression: a student of hard labels cannot tell unseen "
            "classes apart, distillation can", "accuracy at most 1 − c", "Proposition 1",
            Model(None, "cocktail 0.5"), Model(None, "hard labels"), UNSEEN,
        ),
        Claim(
            "proposition_2", "Logistic regression: a student of the teacher's probabilities is the "
            "teacher on any input", "the same probabilities", "Proposition 2",
            Model(None, "cocktail 1"), Model(None, "teacher"), UNSEEN, margin=NO_WORSE,
        ),
    ),
    (
        NotRun("XSUM and OpenQA: adapters, cocktails and their ensembles", "–", "Table 2",
               "cocktail_xsum.gin and the like, seven students a seed"),
    ),
)  # fmt: skip
