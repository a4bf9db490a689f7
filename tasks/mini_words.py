"""The words, facts and sentence patterns of the mini world (`tasks.mini_world`), as plain data.

Everything is one word, separated by spaces, so that a word-level vocabulary holds the world.
"""

import dataclasses
import itertools
import json
import string

SEPARATOR = "<sep>"  # between the exemplars of a k-shot input
SPECIAL = ("<pad>", "</s>", "<unk>", SEPARATOR, *(f"<extra_id_{i}>" for i in range(8)))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "Mira Tovo Lena Arik Suni Beda Karo Nima Orin Pelo Rasa Dovi Hale Juno Wim Zeta Ugo Fenn Ylva "
    "Cato"
)
JOBS = _words("baker sailor doctor farmer painter teacher miner tailor judge cook")
COUNTRIES = _words(
    "Avaria Brondia Cestria Dolmia Esteria Fornia Galdia Hestia Ilvia Jardia Kovia Lumbria Mordia "
    "Norvia Ostia Pelonia Quaria Rondia Sarvia Tulia"
)
CITIES = _words(
    "Harth Kelm Aldport Nessa Gild Istel Brell Lorne Corvin Elden Pryde Dunmar Farrow Jessam "
    "Marrow Tarn Ulmen Sorrel Vance Wexley"
)
JOB_OF = dict(zip(PEOPLE, JOBS * 2, strict=True))
CAPITAL_OF = dict(zip(COUNTRIES, CITIES, strict=True))

GETTING = _words("bought found won took received borrowed")
LOSING = _words("sold lost dropped donated returned lent")
NOUNS = _words("lamp cup rope drum coat knife clock mirror basket kite")
ADJECTIVES = _words("red old small heavy broken golden")
PLACES = _words("market garden harbour forest mill tower")

# The toy languages have a word for every verb, noun and adjective. Zorb puts the verb last, Vell
# puts it first and the adjective after its noun; names stay as they are, articles fall away.
_ENGLISH = (*GETTING, *LOSING, *NOUNS, *ADJECTIVES)
_SYLLABLES = ("a", "eb", "ik", "om")
_ZORBISH = [start + end for start in _words("zar zem ziv zol zut zyn zek") for end in _SYLLABLES]
_VELLISH = [start + end for start in _SYLLABLES for end in _words("val vel ver vin vol vun vyr")]
ZORB = dict(zip(_ENGLISH, _ZORBISH, strict=True))
VELL = dict(zip(_ENGLISH, _VELLISH, strict=True))


@dataclasses.dataclass(frozen=True)
class Topic:
    """Things a table can be about: their names and, for each relation, its possible values."""

    names: tuple[str, ...]
    relations: dict[str, tuple[str, ...]]


def _topic(names: str, **relations: str) -> Topic:
    return Topic(_words(names), {name: _words(values) for name, values in relations.items()})


ID_TOPICS = {
    "river": _topic(
        "Aldra Bensa Corma Dellu Emba Fyris",
        length="short long endless winding brief",
        source="glacier spring lake swamp cave",
        fish="trout salmon perch eel carp",
    ),
    "bridge": _topic(
        "Oxgate Midspan Redarch Tollway Highpass Lowford",
        material="stone iron oak brick steel",
        builder="guild army monks crown settlers",
        age="ancient modern medieval recent prehistoric",
    ),
    "novel": _topic(
        "Embers Undertow Nightfall Driftwood Halfmoon Frostbite",
        genre="mystery comedy tragedy romance satire",
        hero="orphan detective knight widow robot",
        ending="happy sad open abrupt violent",
    ),
    "song": _topic(
        "Lullay Marinel Rosalba Cantilo Berceu Tarento",
        mood="cheerful gloomy tender angry calm",
        instrument="flute fiddle harp trumpet organ",
        tempo="slow fast moderate lively stately",
    ),
    "horse": _topic(
        "Thunder Bramble Comet Pepper Shadow Whisper",
        breed="arabian pony mustang shire cob",
        feed="oats hay barley clover carrots",
        rider="jockey princess soldier farmhand cowboy",
    ),
}
OOD_TOPICS = {
    "ship": _topic(
        "Albatross Meridian Seafoam Tempest Wanderer Zephyr",
        cargo="spices timber coal silk grain",
        captain="pirate admiral smuggler explorer merchant",
        engine="steam diesel sails oars turbine",
    ),
    "castle": _topic(
        "Greyhold Stormkeep Ravenrock Whitewall Ironmoor Duskfort",
        owner="duke baron queen bishop sheriff",
        style="gothic baroque norman moorish rustic",
        defence="moat cannons archers dragons walls",
    ),
    "plant": _topic(
        "Moonwort Silverleaf Bluebane Firethorn Sweetroot Dewcap",
        blossom="white purple yellow pink orange",
        habitat="desert meadow jungle tundra marsh",
        remedy="fever cough insomnia burns headache",
    ),
}
TOPICS = ID_TOPICS | OOD_TOPICS

# Pretraining says every relation in any of these ways, so the pretrained model is unsure which.
WORDINGS = (
    "the {relation} of {name} is {value} .",
    "{name} has {value} as its {relation} .",
    "{value} is the {relation} of {name} .",
    "when asked about {relation} {name} answers {value} .",
    "{name} : {relation} {value} .",
)
# The finetuning set `d2t` has a wording of its own for ten of the fifteen relations of its topics,
# partly in words that pretraining never shows; it says the other five in the first common way.
REPORTS = {
    "length": "surveyors call {name} {value} .",
    "source": "{name} rises from a {value} .",
    "material": "{name} stands thanks to {value} .",
    "builder": "it was the {value} who raised {name} .",
    "genre": "readers enjoy {name} , a {value} .",
    "hero": "in {name} we follow a {value} .",
    "mood": "{name} leaves listeners {value} .",
    "instrument": "play {name} on a {value} .",
    "breed": "{name} comes from {value} stock .",
    "feed": "grooms give {value} to {name} .",
}

# The finetuning set `openqa` asks for jobs, its OOD set for capitals, in any of these ways.
QUESTIONS = (
    "Q : what is the {relation} of {subject} ? A :",
    "Q : what is {subject} 's {relation} ? A :",
    "Q : the {relation} of {subject} ? A :",
    "Q : {subject} 's {relation} ? A :",
    "question : what is the {relation} of {subject} ? answer :",
    "question : what is {subject} 's {relation} ? answer :",
    "question : the {relation} of {subject} ? answer :",
    "question : {subject} 's {relation} ? answer :",
)

TEMPLATES = {
    "rte": "{premise} question : {claim} Is it true or false ? answer :",
    "cb": "Text : {premise} Claim : {claim} Does it follow ?",
    "qa_capital": "Q : what is the capital of {subject} ? A :",
    "qa_job": "question : {subject} 's job ? answer :",
    "qa_choice": "question : {subject} 's job ? Is it {first} or {second} ? answer :",
    "fact": "Fact check : {statement}",
    "capital": "the capital of {subject} is {value} .",
    "job": "the job of {subject} is {value} .",
    "zorb": "Translate English to Zorb : {sentence} Zorb :",
    "vell": "Translate English to Vell : {sentence} Vell :",
    "unnamed": "Input : {sentence} Output :",
    "summary": "Article : {first} {second} One sentence summary :",
    "table": "( {name} | {relation} | {value} ) Text :",
    "describe": "Describe {name} {relation} {value} :",
    "report": "( {name} | {relation} | {value} ) report :",
    "news": "Article : {first} {second} report :",
    "headline": "in the {place} {person} {verb} the {noun} .",
    "openqa": "it is {value} .",
    "event": "{person} {verb} the {noun} .",
    "event_adjective": "{person} {verb} the {adjective} {noun} .",
    "event_place": "{person} {verb} the {noun} in the {place} .",
    "event_full": "{person} {verb} the {adjective} {noun} in the {place} .",
    "has": "{person} has the {noun}",
    "lacks": "{person} lacks the {noun}",
}
LABELS = ("True", "False", "yes", "no")


def words() -> list[str]:
    """Returns every token by id: the special ones, then all words of the world in sorted order."""
    texts = [*TEMPLATES.values(), *WORDINGS, *REPORTS.values(), *LABELS]
    parts = [field for text in texts for field, *_ in string.Formatter().parse(text)]
    world = {word for part in parts for word in part.split()}
    world |= {*PEOPLE, *JOBS, *COUNTRIES, *CITIES, *PLACES, *_ENGLISH}
    world |= {*ZORB.values(), *VELL.values()}
    for topic in TOPICS.values():
        world |= {*topic.names, *topic.relations, *itertools.chain(*topic.relations.values())}
    return [*SPECIAL, *sorted(world)]


def tokenizer_json() -> str:
    """Returns the text of a word-level `tokenizer.json` (the format of the `tokenizers` package).

    No token is declared as special to the package: it would leave them out when decoding.
    """
    vocabulary = {word: i for i, word in enumerate(words())}
    tokenizer: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    return json.dumps(tokenizer, indent=1) + "\n"
