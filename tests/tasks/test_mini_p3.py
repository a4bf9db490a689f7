"""The prompted collection: halves and splits apart, in the mini T5's words, with known chances."""

import collections
import functools
import itertools
import re
import string

import pytest
import seqio

import robust_ft
from robust_ft import gin_config
from tasks import mini_p3, mini_p3_world, mini_words
from tasks.mini_p3_world import FAMILIES, HELD, HELD_OUT, TRAIN, TRAINING

CONFIG = "gin_configs/data/mini_p3.gin"


@functools.cache
def items(family, split):
    return list(mini_p3_world.items(family, split))


def examples(family, split):
    templates = FAMILIES[family].templates
    return {
        name: [mini_p3_world.render(item, template) for item in items(family, split)]
        for name, template in templates.items()
    }


def splits(*families):
    return [(family, split) for family in families for split in mini_p3_world.sizes(family)]


@pytest.mark.parametrize(("family", "split"), splits(*FAMILIES))
def test_items_are_repeatable_and_different(family, split):
    found = items(family, split)
    assert found == list(mini_p3_world.items(family, split))
    assert len(found) == mini_p3_world.sizes(family)[split]
    identities = {(*sorted(item.fields.items()), item.choices) for item in found}
    assert len(identities) == len(found)
    assert found[:9] != list(itertools.islice(mini_p3_world.items(family, split, seed=1), 9))


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint(family):
    keys = [{item.key for item in items(family, split)} for split in mini_p3_world.sizes(family)]
    assert all(not one & two for one, two in itertools.combinations(keys, 2))


def events(family, split):
    """Returns the events that a family's inputs and answers tell, as "person verb noun"."""
    verbs, adjectives = "|".join(mini_p3_world.VERBS), "|".join(mini_words.ADJECTIVES)
    event = re.compile(rf"(\w+) ({verbs}) the (?:(?:{adjectives}) )?(\w+)")
    each = itertools.chain(*examples(family, split).values())
    texts = [text for example in each for text in (example.inputs, *example.choices)]
    return {" ".join(found) for text in texts for found in event.findall(text)}


def test_training_and_held_out_families_share_no_item():
    for family, split in splits(*FAMILIES):
        half = TRAINING if family in TRAIN else HELD
        for item in items(family, split):
            subjects = [item.fields[f] for f in ("subject", "word", "value") if f in item.fields]
            assert all(mini_p3_world.half_of(subject) == half for subject in subjects)
        told = events(family, split)
        assert told or family in ("relation", "capital", "vell", "retell")
        assert all(mini_p3_world.half_of(event) == half for event in told)


def test_templates_are_different_and_several_a_family():
    assert not set(TRAIN) & set(HELD_OUT)
    texts = [t.inputs for family in FAMILIES.values() for t in family.templates.values()]
    assert len(set(texts)) == len(texts)
    for name, family in FAMILIES.items():
        assert len(family.templates) >= 3, name


def test_numbers_of_choices_and_labels():
    """Random baselines differ, and no answer is right more often than it should be."""
    numbers = {}
    for family, split in splits(*HELD_OUT):
        found = items(family, split)
        (numbers[family],) = {len(item.choices) for item in found}
        assert all(len(set(item.choices)) == len(item.choices) for item in found)
        counts = collections.Counter(item.answer for item in found)
        for answer in range(numbers[family]):
            share = 1 / numbers[family]
            deviation = (share * (1 - share) / len(found)) ** 0.5
            assert abs(counts[answer] / len(found) - share) < 3 * deviation, (family, split)
    assert numbers == {"nli": 2, "ending": 4, "coref": 3, "cause": 2}


def test_everything_is_in_the_mini_models_vocabulary_and_fits():
    vocabulary = robust_ft.load("asset:mini").vocabulary
    unknown = mini_words.words().index("<unk>")
    lengths = gin_config.load(["gin_configs/p3_mtl_t.gin"]).recipe.stages[0].data
    for family, split in splits(*FAMILIES):
        for each in itertools.chain(*examples(family, split).values()):
            for text, most in [
                (each.inputs, lengths.inputs_length),
                *((choice, lengths.targets_length) for choice in each.choices),
            ]:
                ids = vocabulary.encode(text)
                assert unknown not in ids, text
                assert len(ids) < most, text  # and the end of the sequence
    for family in FAMILIES.values():
        for template in family.templates.values():
            fields = [name for _, name, *_ in string.Formatter().parse(template.inputs) if name]
            assert fields, template


def test_seqio_tasks_have_what_the_world_says():
    names = {
        f"mini_p3_{family}_{template}": (family, template)
        for family in FAMILIES
        for template in FAMILIES[family].templates
    }
    mixtures = [seqio.MixtureRegistry.get(f"mini_p3_{half}") for half in ("train", "held_out")]
    assert {task.name for mixture in mixtures for task in mixture.tasks} == set(names)
    assert all(mixtures[0].get_rate(task) == 384 for task in mixtures[0].tasks)
    for name in ("mini_p3_mood_enjoy", "mini_p3_retell_table", "mini_p3_ending_options"):
        family, template = names[name]
        task = seqio.TaskRegistry.get(name)
        assert dict(mini_p3_world.sizes(family)) == {
            split: task.num_input_examples(split) for split in task.splits
        }
        source = task.source.get_dataset("validation", shuffle=False)
        for row, expected in zip(
            source.as_numpy_iterator(), examples(family, "validation")[template], strict=True
        ):
            assert row["inputs"].decode() == expected.inputs
            assert row["targets"].decode() == expected.targets
            choices = [choice.decode() for choice in row.get("answer_choices", [])]
            assert choices == (list(expected.choices) if FAMILIES[family].ranked else [])


def test_the_config_names_every_held_out_task():
    recipe = gin_config.load(["gin_configs/joint_rte.gin", CONFIG], ["DROPOUT_RATE=0.1"]).recipe
    found = [evaluation.task for evaluation in recipe.stages[0].evaluations]
    assert found == [
        f"mini_p3_{family}_{template}"
        for family in HELD_OUT
        for template in HELD_OUT[family].templates
    ]
    assert mini_p3.__name__ == recipe.stages[0].data.module
