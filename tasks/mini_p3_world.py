"""The mini world's prompted collection: families of tasks under several templates, in plain Python.

A P3 in small. Each family has items of one kind, three or four templates that put an item in words,
and answer choices, of which a model ranks the likeliest. `TRAIN` is for continued pretraining,
`HELD_OUT` is what it should make easier: other tasks in other words. Everything is written in the
vocabulary of the mini T5.

The world is cut in two halves that share nothing an item is about: an event (who did what to which
thing), a country, a property, a word of Vell. Training families have one half and held-out families
the other. Within a family, a checksum of what an item is about decides its split, as in
`tasks.mini_world`. All templates of a family have the same items.

What held-out families need is in the training families, but never in this form: whether a verb
means getting or losing (`mood`), what occurs in a sentence (`thing`, `adjective`), what goes
together (`relation`, `capital`, `vell`). A model of half a million parameters does not learn in
minutes to tell apart what two people did, so no family asks for that.

`python -m tasks.mini_p3_world` prints one item of every family under all its templates.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tasks.mini_words import (
    ADJECTIVES,
    CAPITAL_OF,
    CITIES,
    COUNTRIES,
    GETTING,
    LOSING,
    NOUNS,
    PEOPLE,
    PLACES,
    TEMPLATES,
    TOPICS,
    VELL,
)
from tasks.mini_world import checksum, pick, split_of

VERBS = (*GETTING, *LOSING)
RELATIONS = tuple(relation for topic in TOPICS.values() for relation in topic.relations)
TRAINING, HELD = range(2)  # the halves of the world


@dataclasses.dataclass(frozen=True)
class Item:
    """What a family asks for, before a template puts it in words.

    Attributes:
        fields: What templates refer to.
        choices: The answers to choose from, in the order in which templates list them.
        answer: The number of the right one.
        key: What the item is about; items with the same key are in the same split.
    """

    fields: Mapping[str, str]
    choices: tuple[str, ...]
    answer: int
    key: str


@dataclasses.dataclass(frozen=True)
class Template:
    """Puts an item in words.

    Attributes:
        inputs: Text with an item's fields in brackets; `{options}` are its choices.
        answers: Words that this template has for the choices; none for the item's own.
    """

    inputs: str
    answers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """A dataset of the collection.

    Attributes:
        draw: From a random generator and a half of the world to an item.
        templates: By name.
        ranked: Whether its answers are chosen from several; otherwise they are generated.
    """

    draw: Callable[[np.random.Generator, int], Item]
    templates: Mapping[str, Template]
    ranked: bool = True


@dataclasses.dataclass(frozen=True)
class Example:
    """An item in the words of a template: input, right answer, and all answer choices."""

    inputs: str
    targets: str
    choices: tuple[str, ...]


def half_of(subject: str) -> int:
    """Returns the half of the world that a subject belongs to, TRAINING or HELD."""
    return checksum(f"half {subject}") % 2


def _subject(rng: np.random.Generator, subjects: Sequence[str], half: int) -> str:
    """Returns one of `subjects` in this half of the world."""
    while half_of(subject := pick(rng, subjects)) != half:
        pass
    return subject


def event_half(event: Mapping[str, str]) -> int:
    """Returns the half of an event, which is told by its person, verb and noun."""
    return half_of("{person} {verb} {noun}".format(**event))


def _event(rng: np.random.Generator, half: int) -> dict[str, str]:
    """Returns the words of something that happened in this half of the world."""
    while True:
        event = {
            "person": pick(rng, PEOPLE),
            "verb": pick(rng, GETTING if rng.integers(2) else LOSING),
            "adjective": pick(rng, ADJECTIVES),
            "noun": pick(rng, NOUNS),
            "place": pick(rng, PLACES),
        }
        if event_half(event) == half:
            return event


def _choice(
    rng: np.random.Generator, right: str, others: Sequence[str], number: int
) -> tuple[tuple[str, ...], int]:
    """Returns `number` choices, the right one and some of the others, and where the right one is.

    Args:
        rng: Draws the others and the order.
        right: The right one.
        others: May repeat themselves and the right one.
        number: Of choices.
    """
    wrong = sorted(set(others) - {right})
    drawn = [right, *(wrong[i] for i in rng.permutation(len(wrong))[: number - 1])]
    choices = tuple(drawn[i] for i in rng.permutation(number))
    return choices, choices.index(right)


def _asked(fields: Mapping[str, str], choices: tuple[tuple[str, ...], int], key: str) -> Item:
    """Returns an item whose templates can list its choices."""
    return Item({**fields, "options": " or ".join(choices[0])}, *choices, key)


# --- Families to train on ----------------------------------------------------------------------


def _part(
    rng: np.random.Generator, half: int, part: str, words: Sequence[str], number: int, sentence: str
) -> Item:
    """Which of some words an event is about, in a `sentence` of `mini_words.TEMPLATES`."""
    event = _event(rng, half)
    text = TEMPLATES[sentence].format(**event)
    return _asked({"text": text, **event}, _choice(rng, event[part], words, number), text)


def _polarity(rng: np.random.Generator, half: int, sentence: str) -> Item:
    """Whether someone got (0) or lost (1) something."""
    event = _event(rng, half)
    text = TEMPLATES[sentence].format(**event)
    fields = {"text": text, "claim": TEMPLATES["has"].format(**event), **event}
    return Item(fields, ("getting", "losing"), int(event["verb"] in LOSING), text)


def _relation(rng: np.random.Generator, half: int) -> Item:
    topic = TOPICS[pick(rng, list(TOPICS))]
    relation = pick(rng, list(topic.relations))
    name, value = pick(rng, topic.names), pick(rng, topic.relations[relation])
    if half_of(value) != half:
        return _relation(rng, half)
    fields = {"name": name, "value": value}
    # The other relations of the topic are the hardest to rule out.
    others = [*topic.relations, pick(rng, RELATIONS, but=relation)]
    while len(set(others)) < 4:
        others.append(pick(rng, RELATIONS))
    return _asked(fields, _choice(rng, relation, others, 4), f"{name} {value}")


def _capital(rng: np.random.Generator, half: int) -> Item:
    """A memorised fact: only which other cities are listed tells one split from another."""
    country = _subject(rng, COUNTRIES, half)
    choices, answer = _choice(rng, CAPITAL_OF[country], CITIES, 4)
    key = " ".join([country, *sorted(choices)])
    return _asked({"subject": country}, (choices, answer), key)


def _vell(rng: np.random.Generator, half: int) -> Item:
    """A word of the toy language, among those for the same part of speech."""
    word = _subject(rng, list(VELL), half)
    (alike,) = (words for words in (VERBS, NOUNS, ADJECTIVES) if word in words)
    choices, answer = _choice(rng, VELL[word], [VELL[other] for other in alike], 3)
    return _asked({"word": word}, (choices, answer), " ".join([word, *sorted(choices)]))


def _retell(rng: np.random.Generator, half: int) -> Item:
    event = _event(rng, half)
    text = TEMPLATES["event"].format(**event)
    return Item(event, (text,), 0, text)


def _headline(rng: np.random.Generator, half: int) -> Item:
    """What the first of two sentences says, without the place."""
    lead = _event(rng, half)
    while (rest := _event(rng, half))["noun"] == lead["noun"]:
        pass
    first, second = (TEMPLATES["event_place"].format(**event) for event in (lead, rest))
    return Item({"text": f"{first} {second}"}, (TEMPLATES["event"].format(**lead),), 0, first)


# --- Held-out families -------------------------------------------------------------------------


def _ending(rng: np.random.Generator, half: int) -> Item:
    """How a story goes on; wrong endings are about another thing, or say the opposite, or both."""
    event = _event(rng, half)
    other = {**event, "noun": pick(rng, NOUNS, but=event["noun"])}
    true, false = ("has", "lacks") if event["verb"] in GETTING else ("lacks", "has")
    right, *wrong = (
        f"{claim} the {each['noun']} ." for each in (event, other) for claim in (true, false)
    )
    text = TEMPLATES["event_place"].format(**event)
    return _asked({"text": text, **event}, _choice(rng, right, wrong, 4), text)


def _cause(rng: np.random.Generator, half: int) -> Item:
    """Which of two events explains how things are now; the other one has the opposite outcome."""
    event = _event(rng, half)
    got = event["verb"] in GETTING
    other = {**event, "verb": pick(rng, LOSING if got else GETTING)}
    if event_half(other) != half:
        return _cause(rng, half)
    right, wrong = (TEMPLATES["event"].format(**each) for each in (event, other))
    fields = {**event, "has": "has" if got else "lacks", "mood": "happy" if got else "sad"}
    return _asked(fields, _choice(rng, right, [wrong], 2), "{person} {noun}".format(**event))


YES, TRUE = ("yes", "no"), ("true", "false")
TRAIN: Mapping[str, Family] = {
    "thing": Family(
        functools.partial(_part, part="noun", words=NOUNS, number=3, sentence="event"),
        {
            "what_is_it": Template(
                "Text : {text} question : what is it {person} {verb} ? answer :"
            ),
            "options": Template("{text} Q : what {person} {verb} ? Is it {options} ? A :"),
            "question_first": Template("what {person} {verb} ? {text} {options} ?"),
        },
    ),
    "adjective": Family(
        functools.partial(
            _part, part="adjective", words=ADJECTIVES, number=4, sentence="event_adjective"
        ),
        {
            "options": Template("Text : {text} question : Is the {noun} {options} ? answer :"),
            "describe": Template("{text} Describe the {noun} :"),
            "describe_options": Template("Q : {text} Describe the {noun} : {options} ? A :"),
        },
    ),
    "mood": Family(
        functools.partial(_polarity, sentence="event_adjective"),
        {
            "happy": Template("{text} Is {person} happy or sad ? answer :", ("happy", "sad")),
            "mood": Template("Text : {text} mood :", ("cheerful", "gloomy")),
            "enjoy": Template("Q : {text} Does {person} enjoy it ? A :", YES),
            "true_or_false": Template(
                "{text} question : Is it true {person} is happy ? answer :", TRUE
            ),
        },
    ),
    "relation": Family(
        _relation,
        {
            "options": Template("Is {value} {options} ? answer :"),
            "table": Template("( {name} | {value} ) what is it ? {options} ?"),
            "when": Template("Q : what is {value} when {name} has {value} ? A :"),
        },
    ),
    "capital": Family(
        _capital,
        {
            "options": Template("{subject} : what capital of {options} ?"),
            "question": Template("Q : Is the capital of {subject} {options} ? A :"),
            "no_options": Template("Input : capital of {subject} ? Output :"),
        },
    ),
    "vell": Family(
        _vell,
        {
            "translate": Template("Translate {word} to Vell : {options} ?"),
            "no_options": Template("Q : what is {word} in Vell ? A :"),
            "english": Template("English : {word} Vell : {options} ? answer :"),
        },
    ),
    "retell": Family(
        _retell,
        {
            "table": Template("( {person} | {verb} | {noun} ) sentence :"),
            "describe": Template("Describe {person} {verb} {noun} in One sentence :"),
            "when": Template("Describe when {person} {verb} the {noun} :"),
        },
        ranked=False,
    ),
    "headline": Family(
        _headline,
        {
            "about": Template("Article : {text} what was it about ?"),
            "answer": Template("{text} One sentence answer :"),
            "report": Template("Text : {text} report in One sentence :"),
        },
        ranked=False,
    ),
}
HELD_OUT: Mapping[str, Family] = {
    "nli": Family(
        functools.partial(_polarity, sentence="event_place"),
        {
            "true_or_false": Template(
                "{text} question : {claim} Is it true or false ? answer :", TRUE
            ),
            "claim": Template("Text : {text} Claim : {claim} Is it true ? answer :", YES),
            "yes_or_no": Template("{text} Q : Does {person} has the {noun} ? yes or no ? A :", YES),
            "claim_first": Template("Claim : {claim} Text : {text} true or false ?", TRUE),
        },
    ),
    "ending": Family(
        _ending,
        {
            "plain": Template("{text} {person}"),
            "what_follows": Template("Text : {text} what follow ? {person}"),
            "options": Template("{text} Is it {options} ? {person}"),
            "question": Template("Q : {text} what is true of {person} ? {options} ? A :"),
        },
    ),
    "coref": Family(
        functools.partial(_part, part="noun", words=NOUNS, number=3, sentence="event_place"),
        {
            "what_was": Template("{text} it was {adjective} . what was {adjective} ?"),
            "options": Template("{text} Is it {adjective} ? what is it , {options} ?"),
            "question": Template(
                "Text : {text} it was {adjective} . question : was the {options} {adjective} ? "
                "answer :"
            ),
            "when": Template("when {person} {verb} it it was {adjective} . {text} it is the"),
        },
    ),
    "cause": Family(
        _cause,
        {
            "what_was_it": Template("{person} {has} the {noun} . what was it ?"),
            "mood": Template(
                "Text : {person} is {mood} about the {noun} . question : {options} ? answer :"
            ),
            "when": Template("Q : when is it true : {person} {has} the {noun} ? A : when"),
            "leaves": Template("{person} leaves {mood} . {options} ?"),
        },
    ),
}
FAMILIES = TRAIN | HELD_OUT  # type: ignore[operator]

# --- Examples and splits -----------------------------------------------------------------------

# Of every template. One epoch of the training families is 300 batches of 32.
_TRAIN_SIZES = {"train": 384, "validation": 64}
# From the training split come the examples of few-shot tuning.
_HELD_OUT_SIZES = {"train": 64, "validation": 64, "test": 128}


def sizes(family: str) -> Mapping[str, int]:
    """Returns the splits of a family's tasks with their numbers of examples."""
    return _TRAIN_SIZES if family in TRAIN else _HELD_OUT_SIZES


def items(family: str, split: str, seed: int = 0) -> Iterator[Item]:
    """Yields the items of a family in one split, all different.

    An item is a function of (seed, family, split, number) and of nothing else.
    """
    half = TRAINING if family in TRAIN else HELD
    wanted, number = sizes(family)[split], 0
    seen: set[tuple[object, ...]] = set()
    while len(seen) < wanted:
        if number > 1000 + 100 * wanted:
            raise ValueError(f"{family} has no {wanted} different {split} items.")
        name = checksum(f"p3/{family}/{split}")
        rng = np.random.Generator(np.random.PCG64([seed, name, number]))
        item, number = FAMILIES[family].draw(rng, half), number + 1
        identity = (*sorted(item.fields.items()), item.choices)
        if split_of(item.key) == split and identity not in seen:
            seen.add(identity)
            yield item


def render(item: Item, template: Template) -> Example:
    """Returns an item in the words of a template."""
    choices = template.answers or item.choices
    return Example(template.inputs.format(**item.fields), choices[item.answer], choices)


def main() -> None:
    """Prints one item of every family."""
    for name, family in FAMILIES.items():
        item = next(items(name, "train"))
        for template, words in family.templates.items():
            example = render(item, words)
            print(f"{name}_{template}: {example.inputs} -> {example.targets}")


if __name__ == "__main__":
    main()
