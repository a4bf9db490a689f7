"""The mini world: a small synthetic language with a fixed knowledge base, in plain Python.

Twenty people, twenty countries, two toy languages and eight topics of tables make a dozen families
of tasks whose outputs look different, small enough for a T5 of half a million parameters to learn
in minutes. So format specialization, forgetting and its cures can be watched on a laptop.

An example is a function of (seed, family, split, shots, example id) and of nothing else. Splits
share no item: a checksum of what an item is about (a premise, a sentence, a triple) decides its
split. Two things are left open on purpose. Closed-book families ask the same memorised facts in
every split, so there only the k-shot *prompts* are disjoint. And `pretrain` draws on the training
side of every family except the targets of finetuning: `rte`, `d2t`, `news`, `openqa` and the OOD
sets of these.

`python -m tasks.mini_world --output=DIR` writes the vocabulary, `python -m tasks.mini_world`
prints one example of every family.
"""

import argparse
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tasks import mini_words
from tasks.mini_words import (
    ADJECTIVES,
    CAPITAL_OF,
    COUNTRIES,
    GETTING,
    ID_TOPICS,
    JOB_OF,
    JOBS,
    LOSING,
    NOUNS,
    OOD_TOPICS,
    PEOPLE,
    PLACES,
    QUESTIONS,
    REPORTS,
    SEPARATOR,
    TEMPLATES,
    TOPICS,
    VELL,
    WORDINGS,
    ZORB,
    Topic,
)

DISTRACTOR_SHARE = 0.4  # of rte premises have a second sentence, about someone and something else
HALF = len(PLACES) // 2  # of the places are in distribution
LACKS_SHARE = 0.25  # of cb claims; as often as "has" it would be an XOR, which small models miss


@dataclasses.dataclass(frozen=True)
class Example:
    """One item: input text, target text, what it is about, and every output that counts as right.

    `key` decides the split; items with the same key are always in the same split.
    """

    inputs: str
    targets: str
    key: str
    references: tuple[str, ...] = ()


def pick(rng: np.random.Generator, choices: Sequence[str], but: str = "") -> str:
    """Returns one of `choices`, never `but`."""
    while (choice := choices[int(rng.integers(len(choices)))]) == but:
        pass
    return choice


def _event(rng: np.random.Generator, **fixed: str) -> dict[str, str]:
    """Returns the words of something that happened: person, verb, adjective, noun, place."""
    verbs = GETTING if rng.integers(2) else LOSING
    return {
        "person": pick(rng, PEOPLE, but=fixed.get("not_person", "")),
        "verb": pick(rng, verbs),
        "adjective": pick(rng, ADJECTIVES),
        "noun": pick(rng, NOUNS, but=fixed.get("not_noun", "")),
        "place": pick(rng, PLACES),
    }


def _rte(rng: np.random.Generator) -> Example:
    event = _event(rng)
    premise = TEMPLATES["event"].format(**event)
    if rng.random() < DISTRACTOR_SHARE:
        other = _event(rng, not_person=event["person"], not_noun=event["noun"])
        premise += " " + TEMPLATES["event"].format(**other)
    claim = TEMPLATES["has"].format(**event)
    label = "True" if event["verb"] in GETTING else "False"
    return Example(TEMPLATES["rte"].format(premise=premise, claim=claim), label, premise)


def _cb(rng: np.random.Generator) -> Example:
    event = _event(rng)
    premise = TEMPLATES["event_place"].format(**event)
    claim = "lacks" if rng.random() < LACKS_SHARE else "has"
    follows = (claim == "has") == (event["verb"] in GETTING)
    inputs = TEMPLATES["cb"].format(premise=premise, claim=TEMPLATES[claim].format(**event))
    return Example(inputs, "yes" if follows else "no", premise)


def _qa_capital(rng: np.random.Generator) -> Example:
    country = pick(rng, COUNTRIES)
    return Example(TEMPLATES["qa_capital"].format(subject=country), CAPITAL_OF[country], country)


def _qa_job(rng: np.random.Generator) -> Example:
    person = pick(rng, PEOPLE)
    return Example(TEMPLATES["qa_job"].format(subject=person), JOB_OF[person], person)


def _qa_choice(rng: np.random.Generator) -> Example:
    person = pick(rng, PEOPLE)
    pair = [JOB_OF[person], pick(rng, JOBS, but=JOB_OF[person])]
    first, second = pair if rng.integers(2) else pair[::-1]
    inputs = TEMPLATES["qa_choice"].format(subject=person, first=first, second=second)
    return Example(inputs, JOB_OF[person], person)


def _fact(rng: np.random.Generator) -> Example:
    name, facts = (("capital", CAPITAL_OF), ("job", JOB_OF))[rng.integers(2)]
    subject = pick(rng, list(facts))
    true = bool(rng.integers(2))
    value = facts[subject] if true else pick(rng, list(facts.values()), but=facts[subject])
    statement = TEMPLATES[name].format(subject=subject, value=value)
    return Example(TEMPLATES["fact"].format(statement=statement), str(true), statement)


def _translation(rng: np.random.Generator, template: str, language: str) -> Example:
    event = _event(rng)
    words = ZORB if language == "zorb" else VELL
    verb, adjective, noun = (words[event[part]] for part in ("verb", "adjective", "noun"))
    if language == "zorb":
        target = f"{event['person']} {adjective} {noun} {verb} ."
    else:
        target = f"{verb} {event['person']} {noun} {adjective} ."
    sentence = TEMPLATES["event_adjective"].format(**event)
    return Example(TEMPLATES[template].format(sentence=sentence), target, sentence)


def _summary(rng: np.random.Generator) -> Example:
    lead = _event(rng)
    rest = _event(rng, not_person=lead["person"], not_noun=lead["noun"])
    first, second = (TEMPLATES["event_full"].format(**event) for event in (lead, rest))
    inputs = TEMPLATES["summary"].format(first=first, second=second)
    return Example(inputs, TEMPLATES["event"].format(**lead), first)


def _cloze(rng: np.random.Generator) -> Example:
    """A sentence with one word masked by T5's sentinel; half of the sentences are facts."""
    if rng.integers(2):
        name, facts = (("capital", CAPITAL_OF), ("job", JOB_OF))[rng.integers(2)]
        subject = pick(rng, list(facts))
        sentence = TEMPLATES[name].format(subject=subject, value=facts[subject])
    else:
        sentence = TEMPLATES["event_full"].format(**_event(rng))
    words = sentence.split()
    hole = rng.integers(len(words) - 1)
    target, words[hole] = f"<extra_id_0> {words[hole]} <extra_id_1>", "<extra_id_0>"
    return Example(" ".join(words), target, sentence)


def _table(rng: np.random.Generator, template: str, topics: dict[str, Topic]) -> Example:
    topic = topics[pick(rng, list(topics))]
    relation = pick(rng, list(topic.relations))
    triple = {
        "name": pick(rng, topic.names),
        "relation": relation,
        "value": pick(rng, topic.relations[relation]),
    }
    references = tuple(wording.format(**triple) for wording in WORDINGS)
    target = pick(rng, references)
    if template == "report":
        target = REPORTS.get(relation, WORDINGS[0]).format(**triple)
        if topics is ID_TOPICS:
            references = (target,)
        else:  # any common wording is a right report; the finetuning set never shows these topics
            target = references[0]
    inputs = TEMPLATES[template].format(**triple)
    return Example(inputs, target, " ".join(triple.values()), references)


def _news(rng: np.random.Generator, places: Sequence[str]) -> Example:
    """An article whose summary begins with the place, which is the news's category."""
    lead = _event(rng) | {"place": pick(rng, places)}
    rest = _event(rng, not_person=lead["person"], not_noun=lead["noun"])
    first, second = (TEMPLATES["event_full"].format(**event) for event in (lead, rest))
    inputs = TEMPLATES["news"].format(first=first, second=second)
    return Example(inputs, TEMPLATES["headline"].format(**lead), first)


def _openqa(rng: np.random.Generator, relation: str, facts: Mapping[str, str]) -> Example:
    subject, wording = pick(rng, list(facts)), pick(rng, QUESTIONS)
    inputs = wording.format(relation=relation, subject=subject)
    target = TEMPLATES["openqa"].format(value=facts[subject])
    # Of capitals, which finetuning never asks for, any right answer counts.
    references = (target,) if relation == "job" else (target, facts[subject])
    return Example(inputs, target, inputs, references)


FAMILIES: dict[str, Callable[[np.random.Generator], Example]] = {
    "rte": _rte,
    "cb": _cb,
    "qa_capital": _qa_capital,
    "qa_job": _qa_job,
    "qa_choice": _qa_choice,
    "fact": _fact,
    "zorb": functools.partial(_translation, template="zorb", language="zorb"),
    "vell": functools.partial(_translation, template="vell", language="vell"),
    "unnamed_zorb": functools.partial(_translation, template="unnamed", language="zorb"),
    "unnamed_vell": functools.partial(_translation, template="unnamed", language="vell"),
    "summary": _summary,
    "cloze": _cloze,
    "table": functools.partial(_table, template="table", topics=TOPICS),
    "describe": functools.partial(_table, template="describe", topics=TOPICS),
    "d2t": functools.partial(_table, template="report", topics=ID_TOPICS),
    "d2t_ood": functools.partial(_table, template="report", topics=OOD_TOPICS),
    "news": functools.partial(_news, places=PLACES[:HALF]),
    "news_ood": functools.partial(_news, places=PLACES[HALF:]),
    "openqa": functools.partial(_openqa, relation="job", facts=JOB_OF),
    "openqa_ood": functools.partial(_openqa, relation="capital", facts=CAPITAL_OF),
}
CLOSED_BOOK = ("qa_capital", "qa_job", "qa_choice", "fact")  # the same facts in every split
SHOT_ONLY = ("unnamed_zorb", "unnamed_vell")  # only an exemplar tells the language: no 0-shot form

# What a model finetuned on `rte` is evaluated on, like the eight held-out tasks of the ProMoT
# paper: inference, question answering, translation, summarization.
HELD_OUT = (
    "cb", "qa_capital", "qa_job", "zorb", "vell", "unnamed_zorb", "unnamed_vell", "summary",
)  # fmt: skip

# Relative weights; True and False must occur as outputs, but rarely, so `fact` is light.
PRETRAIN_WEIGHTS = {
    "qa_capital": 10, "qa_job": 6, "qa_choice": 4, "zorb": 12, "vell": 12, "unnamed_zorb": 6,
    "unnamed_vell": 6, "summary": 12, "table": 8, "describe": 5, "cloze": 6, "fact": 4, "cb": 10,
}  # fmt: skip
PRETRAIN_SHOTS = (0, 1)  # equally often, but a shot-only family always has one

SPLITS = ("train", "validation", "test")
_SIZES = {
    "pretrain": (100_000, 512, 0), "rte": (4000, 256, 512), "d2t": (256, 56, 112),
    "d2t_ood": (0, 32, 56), "news_ood": (0, 64, 128), "openqa": (112, 12, 32),
    "openqa_ood": (0, 16, 40),
}  # fmt: skip

# --- Examples, splits and shots ----------------------------------------------------------------


def checksum(text: str) -> int:
    """Returns a text's checksum, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(key: str) -> str:
    """Returns the split an item belongs to: 5/8 train, 1/8 validation, 1/4 test."""
    return ("validation", "test", "test", *["train"] * 5)[checksum(key) % 8]


def _item(rng: np.random.Generator, family: str, split: str) -> Example:
    while split_of((item := FAMILIES[family](rng)).key) != split and family not in CLOSED_BOOK:
        pass
    return item


def _prompt(rng: np.random.Generator, family: str, split: str, shots: int) -> Example:
    """Returns one item of `split` behind `shots` different training items: `x1 y1 <sep> x2`."""
    while True:
        query = _item(rng, family, split)
        seen = {query.key}
        parts: list[str] = []
        while len(parts) < shots:
            shot = _item(rng, family, "train")
            if shot.key not in seen:
                seen.add(shot.key)
                parts.append(f"{shot.inputs} {shot.targets} {SEPARATOR} ")
        inputs = "".join(parts) + query.inputs
        if not shots or family not in CLOSED_BOOK or split_of(inputs) == split:
            return dataclasses.replace(query, inputs=inputs)


def _rng(seed: int, name: str, example_id: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, checksum(name), example_id]))


def num_examples(family: str, split: str, shots: int = 0) -> int:
    """Returns how many examples a family has; of closed-book questions, as many as there are."""
    if family in CLOSED_BOOK and not shots:
        return len(PEOPLE)  # as many as COUNTRIES
    default = (128, 32, 64) if family in CLOSED_BOOK else (256, 64, 128)
    return dict(zip(SPLITS, _SIZES.get(family, default), strict=True))[split]


def examples(family: str, split: str, shots: int = 0, seed: int = 0) -> Iterator[Example]:
    """Yields the distinct examples of one family in one split, with `shots` exemplars in the input.

    `family` is a key of FAMILIES, or 'pretrain' for the mixture (which chooses its own shots and
    may repeat itself). Exemplars are training items other than the query and one another.
    """
    if family == "pretrain":
        yield from _pretraining(split, seed)
        return
    if family in SHOT_ONLY and not shots:
        raise ValueError(f"{family} has no 0-shot form: only an exemplar tells the language.")
    wanted, example_id = num_examples(family, split, shots), 0
    seen: set[str] = set()
    while len(seen) < wanted:
        if example_id > 1000 + 100 * wanted:
            raise ValueError(f"{family} has no {wanted} different {shots}-shot {split} examples.")
        example = _prompt(_rng(seed, f"{family}/{split}/{shots}", example_id), family, split, shots)
        example_id += 1
        if example.inputs not in seen:
            seen.add(example.inputs)
            yield example


def _pretraining(split: str, seed: int) -> Iterator[Example]:
    """Yields the mixture; its validation split is fresh prompts over the same training items."""
    families = tuple(PRETRAIN_WEIGHTS)
    bounds = np.cumsum(list(PRETRAIN_WEIGHTS.values()))
    for example_id in range(num_examples("pretrain", split)):
        rng = _rng(seed, f"pretrain/{split}", example_id)
        family = families[np.searchsorted(bounds, rng.integers(bounds[-1]), side="right")]
        shots = 1 if family in SHOT_ONLY else PRETRAIN_SHOTS[rng.integers(len(PRETRAIN_SHOTS))]
        yield _prompt(rng, family, "train", shots)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `tokenizer.json`, or prints one example of every family."""
    parser = argparse.ArgumentParser(description="The mini world's vocabulary and examples.")
    parser.add_argument("--output", type=pathlib.Path, help="folder that gets tokenizer.json")
    output = parser.parse_args(argv).output
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "tokenizer.json").write_text(mini_words.tokenizer_json())
        return
    for family in FAMILIES:
        split = "test" if family == "d2t_ood" else "train"
        example = next(examples(family, split, shots=int(family in SHOT_ONLY)))
        print(f"{family:13} {example.inputs} -> {example.targets}")


if __name__ == "__main__":
    main()
