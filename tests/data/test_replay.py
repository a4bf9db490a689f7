"""Replay: an exact share of other examples, the same for all shards, without prompts."""

import collections
import dataclasses
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
import toy
from test_loader import VOCABULARY, assert_equal, take

from robust_ft import checks
from robust_ft.data import loader, mixing
from robust_ft.data.replay import Replay
from robust_ft.errors import UserError
from robust_ft.models.peft import Lora, Prefix
from robust_ft.objectives.meta_learning import Reptile
from robust_ft.recipe import Recipe


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.2, 1 / 3, 0.999])
def test_the_share_is_exact_after_any_number_of_examples(share):
    order = mixing.MixedOrder(Replay(data=toy.DATA, share=share).rates)
    exact, given = Fraction(repr(share)), 0
    for n in [*range(300), 10**15]:
        if n < 300:
            is_own, number = order[n]
            assert number == (n - given if is_own else given)
            given += not is_own
            assert given == (n + 1) * exact.numerator // exact.denominator
        else:
            assert order[n][1] in (n * exact // 1, n - n * exact // 1)


def source(toy, share=0.125, replayed="toy_b", **options):
    """Returns training batches of `toy_a` with a share of `replayed`, whose targets are longer."""
    other = dataclasses.replace(toy(replayed), targets_length=20)
    replay = Replay(data=other, share=share)
    settings = {"seed": 0, "replay": replay, "marks_replay": True}
    return loader.train_batches(toy("toy_a"), 8, **settings | options)


def test_every_batch_has_its_share_and_marks_it(toy):
    batches, replayed = source(toy), []
    for batch in take(batches, 6):
        tasks = [task for task, _ in batches.named(batches.examples)]
        assert collections.Counter(tasks) == {"toy_a": 7, "toy_b": 1}
        assert batch["without_prompt"].tolist() == [task == "toy_b" for task in tasks]
        assert batch["decoder_target_tokens"].shape == (8, 20)
        replayed += [VOCABULARY.decode(batch["decoder_target_tokens"][tasks.index("toy_b")])]
    assert all(text.startswith("b") for text in replayed)


def test_own_examples_come_in_their_own_order(toy):
    def own(batches):
        while True:
            next(batches)
            yield from (each for each in batches.named(batches.examples) if each[0] == "toy_a")

    alone = loader.train_batches(toy("toy_a"), 8, seed=0)
    both = [list(itertools.islice(own(each), 60)) for each in (alone, source(toy))]
    assert both[0] == both[1]


def test_shards_are_parts_of_the_one_batch_and_resume_exactly(toy):
    whole = take(source(toy, 0.1), 5)
    shards = [source(toy, 0.1, shard=(index, 2)) for index in range(2)]
    for batch in whole:
        halves = [next(shard) for shard in shards]
        assert_equal([batch], [{n: np.concatenate([h[n] for h in halves]) for n in batch}])
    first = source(toy, 0.1)
    take(first, 2)
    position = json.loads(json.dumps(first.get_state()))
    resumed = source(toy, 0.1)
    resumed.set_state(position)
    assert_equal(take(resumed, 3), whole[2:])
    with pytest.raises(UserError, match=r"its replay is .*'train', 0.1.*, but this run's is"):
        source(toy, 0.2).set_state(position)


def test_rows_without_a_prompt_need_none_of_their_task(toy):
    batch = next(source(toy, task_index=["toy_a"].index))
    assert not batch["task_index"].any()
    with pytest.raises(ValueError):
        source(toy, task_index=["toy_a"].index, marks_replay=False)


def test_what_a_stage_trains_on_anyway_is_not_replayed(toy):
    with pytest.raises(UserError, match=r"Replay.data has 'toy_a', one of the stage's own tasks"):
        source(toy, replayed="toy_a")


# --- Stages


OTHER = Replay(data=dataclasses.replace(toy.DATA, task="toy_other", targets_length=6))


def test_a_stage_says_which_rows_have_no_prompt():
    plain = toy.stage(model=toy.PLAIN, replay=OTHER)
    assert not plain.prompts_are_left_out and toy.stage(replay=OTHER).prompts_are_left_out
    kept = toy.stage(replay=dataclasses.replace(OTHER, prompts=True))
    assert not kept.prompts_are_left_out
    lora = dataclasses.replace(toy.PLAIN, peft=(Lora(),))
    assert not toy.stage(model=lora, trainable=["peft"], replay=OTHER).prompts_are_left_out
    assert (plain.rows.inputs_length, plain.rows.targets_length) == (12, 6)


def test_what_cannot_be_done_is_refused(tmp_path):
    prefix = dataclasses.replace(toy.PLAIN, peft=(Prefix(length=2),))
    with pytest.raises(UserError, match=r"Replay.prompts=False of stage 'model' .*'prefix', a pre"):
        toy.stage(model=prefix, trainable=["base"], replay=OTHER)
    rule = Reptile(tasks=1, inner_steps=1)
    with pytest.raises(UserError, match=r"Stage.replay of stage 'model' .* batches of a Reptile"):
        toy.stage(gradient=rule, microbatches=1, replay=OTHER)
    prompt = toy.prompt_stage(replay=OTHER)
    with pytest.raises(UserError, match=r"Stage.replay of stage 'prompt' teaches it nothing"):
        checks.check(Recipe("toy", str(tmp_path), (prompt,)))
