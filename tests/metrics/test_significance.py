import math
import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from robust_ft.errors import UserError
from robust_ft.metrics.significance import paired_bootstrap, paired_bootstrap_arg, welch_t_test

SEEDS = st.lists(st.integers(0, 1000).map(lambda value: value / 10), min_size=2, max_size=6)


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's; the seeds are nearly equal
@given(SEEDS, SEEDS)
@settings(deadline=None)
def test_welch_against_scipy(first, second):
    found = welch_t_test(first, second)
    assert found.difference == pytest.approx(statistics.fmean(first) - statistics.fmean(second))
    if len(set(first)) == len(set(second)) == 1:
        assert found.p_value == float(first[0] == second[0])
        return
    expected = scipy.stats.ttest_ind(first, second, equal_var=False)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.degrees_of_freedom == pytest.approx(expected.df)
    assert found.p_value == pytest.approx(expected.pvalue)
    turned = welch_t_test(second, first)
    assert (turned.statistic, turned.p_value) == pytest.approx((-found.statistic, found.p_value))


def test_seeds_that_do_not_vary():
    # 0.1 is not the mean of three 0.1 in floating point.
    assert welch_t_test([0.1] * 3, [0.1] * 3).p_value == 1.0
    found = welch_t_test([0.1] * 3, [0.3] * 3)
    assert found.p_value == 0.0 and found.statistic == -math.inf


def test_welch_needs_two_seeds():
    with pytest.raises(UserError, match="two seeds of each method, not 1"):
        welch_t_test([1.0, 2.0], [1.0])


def scores(rng, share, size=200):
    return {f"example {i}": float(right) for i, right in enumerate(rng.random(size) < share)}


def test_bootstrap_pairs_by_id():
    rng = np.random.default_rng(3)
    first = scores(rng, 0.7)
    second = dict(first)
    for key in list(second)[:5]:
        second[key] = 0.0
    lost = sum(first[key] for key in list(first)[:5])
    assert lost >= 2
    shuffled = {key: second[key] for key in rng.permutation(list(second)).tolist()}
    found = paired_bootstrap(first, shuffled)
    # No example is worse, so only a draw without any of the lost ones says that nothing is.
    assert found.difference == pytest.approx(lost / 200)
    assert 0 <= found.low <= found.difference <= found.high
    assert found.p_value == pytest.approx((1 - lost / 200) ** 200, abs=0.04)
    assert found == paired_bootstrap(dict(reversed(first.items())), second)
    assert found == paired_bootstrap(first, second, draws=1000, seed=0)
    assert found != paired_bootstrap(first, second, seed=1)


def test_bootstrap_has_the_spread_of_a_normal_mean():
    rng = np.random.default_rng(0)
    values = dict(enumerate(rng.normal(0.2, 1.0, 2000)))
    found = paired_bootstrap(values, dict.fromkeys(values, 0.0), draws=4000)
    error = np.std(list(values.values())) / math.sqrt(2000)
    assert found.difference == pytest.approx(np.mean(list(values.values())))
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.2 * error)


def test_bootstrap_in_blocks_is_the_same(monkeypatch):
    first, second = (scores(np.random.default_rng(seed), 0.5) for seed in (1, 2))
    whole = paired_bootstrap(first, second)
    monkeypatch.setattr("robust_ft.metrics.significance._BLOCK", 200 * 7)
    assert paired_bootstrap(first, second) == whole


@pytest.mark.parametrize(("share", "p_value"), [(0.5, 1.0), (1.0, 0.0)])
def test_bootstrap_at_its_ends(share, p_value):
    second = {i: float(i % 2) for i in range(100)}
    first = second if share == 0.5 else dict.fromkeys(second, 2.0)
    assert paired_bootstrap(first, second).p_value == p_value


def test_bootstrap_refuses():
    with pytest.raises(UserError, match=r"same examples on both sides; 'b' is only on one \(2 are"):
        paired_bootstrap({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0})
    with pytest.raises(UserError, match="needs examples"):
        paired_bootstrap({}, {})
    with pytest.raises(UserError, match="same templates on both sides"):
        paired_bootstrap_arg({"cb": [{1: 0.0}]}, {"cb": [{1: 0.0}, {1: 0.0}]})
    with pytest.raises(UserError, match="under template 0 of cb; '1' is only on one"):
        paired_bootstrap_arg({"cb": [{1: 0.0}]}, {"cb": [{2: 0.0}]})


def test_bootstrap_of_arg_against_one_that_goes_step_by_step():
    rng = np.random.default_rng(5)
    sides = [
        {"rte": [scores(rng, s, 30), scores(rng, s, 30)], "cb": [scores(rng, s, 20)]}
        for s in (0.62, 0.6)
    ]
    sides = [
        {name: [{k: 100 * v for k, v in t.items()} for t in found] for name, found in side.items()}
        for side in sides
    ]

    def arg(accuracies):
        rte, cb = accuracies["rte"], accuracies["cb"]
        return 100 * ((rte[0] - 50) / 50 + (rte[1] - 50) / 50 + (cb[0] - 100 / 3) / (100 / 3)) / 3

    drawn = []
    for _ in range(1000):
        accuracies = [{}, {}]
        for name in sides[0]:
            for first, second in zip(sides[0][name], sides[1][name], strict=True):
                keys = rng.choice(list(first), len(first))
                for side, found in zip(accuracies, (first, second), strict=True):
                    side.setdefault(name, []).append(np.mean([found[key] for key in keys]))
        drawn.append(arg(accuracies[0]) - arg(accuracies[1]))
    whole = [
        arg({name: [np.mean(list(t.values())) for t in found] for name, found in side.items()})
        for side in sides
    ]
    found = paired_bootstrap_arg(*sides)
    assert found.difference == pytest.approx(whole[0] - whole[1])
    assert found.p_value == pytest.approx(np.mean(np.array(drawn) <= 0), abs=0.06)
    spread = np.std(drawn)
    assert found.low == pytest.approx(np.percentile(drawn, 2.5), abs=0.3 * spread)
    assert found.high == pytest.approx(np.percentile(drawn, 97.5), abs=0.3 * spread)
    assert paired_bootstrap_arg(*sides, by_dataset=True).difference != found.difference
