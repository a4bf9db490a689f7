"""Continued Pretraining for Better Zero- and Few-Shot Promptability."""

from collections.abc import Iterator

from runs import arm

from papers.claim import ARG_0, ARG_16, Claim, Model, Paper

DEEP = "+deep_prompt"
ARMS = {
    "no continued pretraining": "p3_none", "P": "p3_mtl_p", "T": "p3_mtl_t", "T+P": "p3_mtl_tp",
    "FOMAML": "p3_fomaml", "Reptile": "p3_reptile",
}  # fmt: skip
# Table 1: ARG of T5-Large and of T5-XL, by arm and number of shots.
TABLE_1 = {
    ("p3_none", 0): (-1.9, -1.5),
    ("p3_none", 16): (-1.5, -1.5),
    (f"p3_none{DEEP}", 0): (-1.9, -1.5),
    (f"p3_none{DEEP}", 16): (2.3, 3.7),
    ("p3_mtl_p", 0): (2.8, -1.7),
    ("p3_mtl_p", 16): (2.9, -1.6),
    ("p3_mtl_t", 0): (26.7, 32.4),
    ("p3_mtl_t", 16): (23.1, 30.0),
    (f"p3_mtl_t{DEEP}", 0): (26.7, 32.4),
    (f"p3_mtl_t{DEEP}", 16): (32.6, 42.9),
    ("p3_mtl_tp", 0): (30.2, 33.5),
    ("p3_mtl_tp", 16): (30.2, 33.5),
    (f"p3_mtl_tp{DEEP}", 0): (28.7, 33.3),
    (f"p3_mtl_tp{DEEP}", 16): (37.4, 43.2),
    ("p3_fomaml", 0): (21.8, 27.7),
    ("p3_fomaml", 16): (21.8, 27.7),
    (f"p3_fomaml{DEEP}", 0): (20.8, 24.5),
    (f"p3_fomaml{DEEP}", 16): (32.8, 40.0),
    ("p3_reptile", 0): (18.4, 23.1),
    ("p3_reptile", 16): (18.4, 23.2),
    (f"p3_reptile{DEEP}", 0): (24.9, 26.3),
    (f"p3_reptile{DEEP}", 16): (33.0, 39.7),
}
SHOTS = ((0, ARG_0), (16, ARG_16))
NO_GAIN = 5.0  # points of ARG: what is still near guessing, about the paper's largest
# The paper's order of arms: the first of each pair has the higher ARG.
ORDER = [
    ("T+P", "T"), ("T", "P"), ("T+P", "FOMAML"), ("T+P", "Reptile"),
    ("T", "no continued pretraining"),
]  # fmt: skip


def _model(files: str) -> Model:
    (words,) = (words for words, name in ARMS.items() if name == files.removesuffix(DEEP))
    return Model(arm(files), label=f"{words}, {'deep' if files.endswith(DEEP) else 'shallow'}")


def _figure(above: tuple[str, int], below: tuple[str, int]) -> str:
    """Returns the differences of two of Table 1's cells, of T5-Large and of T5-XL."""
    pairs = zip(TABLE_1[above], TABLE_1[below], strict=True)
    return ", ".join(f"{one - two:+.1f}" for one, two in pairs).replace("-", "−")


def _claims() -> Iterator[Claim]:
    for above, below in ORDER:
        # The paper has no deep prompt in the arm P.
        for depth, added in (("shallow", ""), ("deep", DEEP))[: 1 if below == "P" else 2]:
            for shots, quantity in SHOTS:
                files = ARMS[above] + added, ARMS[below] + added
                yield Claim(
                    f"{files[0]}_{files[1]}_{shots}".replace("p3_", "").replace(DEEP, "_deep"),
                    f"{above} is above {below}: {depth}, {shots}-shot",
                    _figure((files[0], shots), (files[1], shots)),
                    "Table 1", _model(files[0]), _model(files[1]), quantity,
                )  # fmt: skip
    for shots, quantity in SHOTS:
        cells = ("p3_none", shots), ("p3_mtl_p", shots)
        yield Claim(
            f"mtl_p_{shots}", f"P gains little over no continued pretraining: {shots}-shot",
            _figure(*cells), "Table 1", _model("p3_none"), _model("p3_mtl_p"), quantity,
            margin=NO_GAIN,
        )  # fmt: skip
    for words, files in ARMS.items():
        if words != "P":
            yield Claim(
                f"deep_{files.removeprefix('p3_')}", f"Deep is above shallow, 16-shot: {words}",
                _figure((files + DEEP, 16), (files, 16)), "Table 1",
                _model(files + DEEP), _model(files), ARG_16,
            )  # fmt: skip
    yield Claim(
        "t_16_below_0", "T: 16 shots are below 0 shots, shallow",
        _figure(("p3_mtl_t", 0), ("p3_mtl_t", 16)), "Table 1",
        _model("p3_mtl_t"), _model("p3_mtl_t"), ARG_0, below_quantity=ARG_16,
    )  # fmt: skip
    yield Claim(
        "tp_deep_16_above_0", "T+P: 16 shots are above 0 shots, deep",
        _figure((f"p3_mtl_tp{DEEP}", 16), (f"p3_mtl_tp{DEEP}", 0)), "Table 1",
        _model(f"p3_mtl_tp{DEEP}"), _model(f"p3_mtl_tp{DEEP}"), ARG_16, below_quantity=ARG_0,
    )  # fmt: skip
    yield Claim(
        "shallow_tp_0", "T+P: a shallow prompt is above a deep one, 0-shot",
        _figure(("p3_mtl_tp", 0), (f"p3_mtl_tp{DEEP}", 0)), "Table 1",
        _model("p3_mtl_tp"), _model(f"p3_mtl_tp{DEEP}"), ARG_0,
    )  # fmt: skip


PAPER = Paper("promptability", "Promptability", tuple(_claims()))
