"""The comparison's numbers against SciPy's, and against a second way to compute each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train.bootstrap import draws
from train.evaluation import significance, statistics
from train.evaluation.mapping import fit_map, resampled_rmse_mapped, rmse_mapped
from train.evaluation.records import CommonClips, Entry

CLOSE = 1e-9
MAP_CLOSE = 1e-6  # the map's search is a grid's: right to the seventh digit
mos = st.integers(100, 500).map(lambda hundredths: hundredths / 100)
pairs = st.lists(st.tuples(mos, mos), min_size=5, max_size=25)


def varied(pairs_N):
    truth_N, score_N = np.array(pairs_N).T
    assume(np.ptp(truth_N) > 0 and len(np.unique(score_N)) >= 4)
    return truth_N, score_N


# --- second implementations, by the definitions ---------------------------------------------------


def pcc_by_definition(x, y):
    return np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std())


def tau_b_by_pairs(x, y):
    along = one = two = 0
    for i in range(len(x)):
        for j in range(i):
            a, b = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
            along, one, two = along + a * b, one + abs(a), two + abs(b)
    return along / math.sqrt(one * two)


def mapped_by_squares(truth_N, score_N):
    """A slope that is never negative on -1 to 1 is (a + b t)^2 + g^2 (1 - t^2) (Lukacs)."""
    t = 2 * (score_N - score_N.min()) / np.ptp(score_N) - 1

    def errors(p):
        c, a, b, g = p
        return c + (a * a + g * g) * t + a * b * t**2 + (b * b - g * g) * t**3 / 3 - truth_N

    starts = [(a, b, g) for a in (0.3, 0.02) for b in (-0.5, 0.1, 0.5) for g in (0.01, 0.4)]
    tight = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15, "max_nfev": 3000}
    best = min(
        scipy.optimize.least_squares(errors, (truth_N.mean(), *start), **tight).cost
        for start in starts
    )
    return math.sqrt(2 * best / (len(t) - 4))


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_every_metric_is_scipys_and_its_definition(pairs_N):
    truth_N, score_N = varied(pairs_N)
    found, why = statistics.values_of(truth_N, score_N)
    assert not why
    ranked = [scipy.stats.rankdata(side) for side in (truth_N, score_N)]
    squares = [(a - b) ** 2 for a, b in pairs_N]
    expected = {
        "pcc": (scipy.stats.pearsonr, pcc_by_definition(truth_N, score_N)),
        "spearman": (scipy.stats.spearmanr, pcc_by_definition(*ranked)),
        "kendall": (scipy.stats.kendalltau, tau_b_by_pairs(truth_N, score_N)),
    }
    for name, (scipys, value) in expected.items():
        assert abs(found[name] - scipys(truth_N, score_N).statistic) < CLOSE, name
        assert abs(found[name] - value) < CLOSE, name
    assert abs(found["rmse"] - math.sqrt(sum(squares) / len(squares))) < CLOSE


@given(pairs)
@settings(max_examples=25, deadline=None)
def test_the_map_is_the_best_that_rises(pairs_N):
    truth_N, score_N = varied(pairs_N)
    # Where a score lies so near another that one t is nearly the other, the second way stalls.
    assert abs(rmse_mapped(truth_N, score_N) - mapped_by_squares(truth_N, score_N)) < MAP_CLOSE
    mapped = fit_map(truth_N, score_N)(np.linspace(score_N.min(), score_N.max(), 500))
    assert np.diff(mapped).min() > -1e-9


@pytest.mark.parametrize("slope", [1.0, -1.0, 0.1])
@pytest.mark.parametrize("steep", [0.5, 3.0, 10.0])
def test_maps_of_steep_flat_and_falling_scores_are_the_best(slope, steep):
    generator = np.random.default_rng(round(100 * steep))
    for clips in (6, 13, 40):
        score_N = generator.normal(3, 1, clips)
        bent_N = np.tanh((score_N - generator.uniform(1, 5)) * steep)
        truth_N = np.clip(3 + slope * bent_N + generator.normal(0, 0.3, clips), 1, 5)
        one, two = rmse_mapped(truth_N, score_N), mapped_by_squares(truth_N, score_N)
        assert abs(one - two) < MAP_CLOSE
        mapped = fit_map(truth_N, score_N)(np.linspace(score_N.min(), score_N.max(), 500))
        assert np.diff(mapped).min() > -1e-12


def test_a_cubic_that_rises_is_found_and_one_that_falls_is_a_constant():
    score_N = np.linspace(1, 5, 9)
    assert rmse_mapped(0.02 * (score_N - 2) ** 3 + score_N / 5, score_N) < 1e-7
    truth_N = 6 - score_N
    flat = fit_map(truth_N, score_N)
    assert flat.coefficients == pytest.approx([3, 0, 0, 0], abs=1e-12)
    expected = math.sqrt(np.sum((truth_N - 3) ** 2) / (9 - 4))
    assert rmse_mapped(truth_N, score_N) == pytest.approx(expected)


def test_a_map_needs_five_points_and_four_scores():
    assert rmse_mapped([1, 2, 3, 4], [1, 2, 3, 4]) is None
    assert rmse_mapped([1, 2, 3, 4, 5], [1, 1, 2, 3, 3]) is None
    assert fit_map([1, 2, 3, 4], [1, 2, 3, 4]) is None


# --- resamples ------------------------------------------------------------------------------------


@given(pairs, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_resample_is_measured_like_the_clips_that_it_holds(pairs_N, seed):
    truth_N, score_N = varied(pairs_N)
    counts_RN = draws([str(n // 2) for n in range(len(truth_N))], seed, resamples=6)
    for name in ("pcc", "spearman", "kendall", "rmse"):
        found_R = statistics.RESAMPLED[name](counts_RN, truth_N, score_N)
        for counts_N, found in zip(counts_RN, found_R, strict=True):
            taken = np.repeat(np.arange(len(truth_N)), counts_N.astype(int))
            expected = statistics.values_of(truth_N[taken], score_N[taken])[0][name]
            assert np.isnan(found) if expected is None else abs(found - expected) < CLOSE, name


def test_resampled_maps_are_those_of_the_resample():
    generator = np.random.default_rng(5)
    truth_N, score_N = generator.uniform(1, 5, (2, 40))
    score_N = np.where(np.arange(40) % 3, truth_N**1.5 / 2, score_N)
    counts_RN = draws([str(n) for n in range(40)], 0, resamples=30)
    counts_RN[:, [score_N.argmin(), score_N.argmax()]] += 1  # the same range: the same condition
    found_R = resampled_rmse_mapped(counts_RN, truth_N, score_N)
    for counts_N, found in zip(counts_RN, found_R, strict=True):
        taken = np.repeat(np.arange(40), counts_N.astype(int))
        assert abs(found - rmse_mapped(truth_N[taken], score_N[taken])) < CLOSE


def test_resamples_that_say_no_map_are_not_defined():
    counts_RN = np.array([[1.0, 1, 1, 1, 1, 0], [2, 2, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    found_R = resampled_rmse_mapped(counts_RN, [1, 2, 3, 4, 5, 5], [1, 2, 3, 4, 5, 5])
    assert np.isfinite(found_R).tolist() == [True, False, False]


# --- levels ---------------------------------------------------------------------------------------


def clips_of(truth_N, scores, conditions=(), systems=(), mos_scale=True):
    entries = [Entry(name, name, "zero", "0" * 64, mos_scale=mos_scale) for name in scores]
    keys = [f"{n}.wav" for n in range(len(truth_N))]
    scores = {name: np.asarray(values, float) for name, values in scores.items()}
    sides = list(conditions), list(systems)
    return CommonClips("set", "rated", keys, np.asarray(truth_N, float), scores, entries, *sides)


def noisy(seed, conditions=8, clips=6):
    generator = np.random.default_rng(seed)
    level_C = np.repeat(generator.uniform(1, 5, conditions), clips)
    truth_N = np.clip(level_C + generator.normal(0, 0.3, len(level_C)), 1, 5)
    scores = {
        "good": level_C + generator.normal(0, 0.3, len(level_C)),
        "bad": level_C + generator.normal(0, 2.0, len(level_C)),
    }
    return truth_N, scores, [f"c{n // clips}" for n in range(len(truth_N))]


def test_conditions_are_means_of_their_clips():
    truth_N, scores, conditions = noisy(0)
    systems = [f"s{name in ('c0', 'c1', 'c2', 'c3')}" for name in conditions]
    found = statistics.set_results(clips_of(truth_N, scores, conditions, systems), 0, 200)
    assert [(r.level, r.model, r.points, r.clips) for r in found] == [
        *(("clip", name, 48, 48) for name in scores),
        *(("condition", name, 8, 48) for name in scores),
        *(("system", name, 2, 48) for name in scores),
    ]
    members = [np.array(conditions) == name for name in sorted(set(conditions))]
    means = [[side[n].mean() for n in members] for side in (truth_N, scores["bad"])]
    row = found[3]
    assert row.pcc == pytest.approx(scipy.stats.pearsonr(*means).statistic, abs=CLOSE)
    assert row.rmse == pytest.approx(np.sqrt(np.mean(np.subtract(*means) ** 2)), abs=CLOSE)
    assert [(r.resampled, r.groups) for r in found[::2]] == [
        *(("condition", 8), ("condition", 8), ("system", 2))
    ]
    two = found[4]
    assert two.pcc is None and "fewer than three points" in two.reason and two.rmse is not None


def test_intervals_hold_the_value_and_clips_of_a_condition_are_no_independent_evidence():
    truth_N, scores, conditions = noisy(1)
    by_condition = statistics.set_results(clips_of(truth_N, scores, conditions), 0)[0]
    by_clip = statistics.set_results(clips_of(truth_N, scores), 0)[0]
    for name in ("pcc", "spearman", "kendall", "rmse"):
        low, high = getattr(by_condition, f"{name}_low"), getattr(by_condition, f"{name}_high")
        assert low < getattr(by_condition, name) < high
    wide, narrow = (r.pcc_high - r.pcc_low for r in (by_condition, by_clip))
    assert wide > 1.3 * narrow
    assert (by_clip.resampled, by_clip.groups) == ("clip", 48)


@pytest.mark.parametrize(
    ("truth", "score", "reason"),
    [
        ([3, 3, 3, 3, 3], [1, 2, 3, 4, 5], "the true scores are all equal"),
        ([1, 2, 3, 4, 5], [2, 2, 2, 2, 2], "the predictions are all equal"),
        ([1, 2], [2, 3], "fewer than three points"),
    ],
)
def test_what_is_not_defined_is_null_with_its_reason(truth, score, reason):
    (row,) = statistics.set_results(clips_of(truth, {"m": score}), 0, 50)
    assert row.pcc is row.spearman is row.kendall is row.pcc_low is None
    assert reason in row.reason and row.rmse is not None


def test_scores_of_another_unit_have_no_rmse_but_a_mapped_one():
    clips = clips_of([1, 2, 3, 4, 5, 4], {"si-sdr": [-5, 0, 8, 12, 20, 15]}, mos_scale=False)
    (row,) = statistics.set_results(clips, 0, 50)
    assert row.rmse is None and row.rmse_low is None and "not on the MOS scale" in row.reason
    assert row.rmse_mapped < 0.5 and row.pcc > 0.9


# --- significance ---------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=8))
def test_holm_is_its_definition(p_values):
    adjusted = significance.holm(p_values)
    defined = [p for p in p_values if p is not None]
    for p, found in zip(p_values, adjusted, strict=True):
        if p is None:
            assert found is None
            continue
        # The largest of (m - rank) p over all p that are as small.
        smaller = sorted(q for q in defined if q <= p)
        steps = [min(1.0, (len(defined) - rank) * q) for rank, q in enumerate(smaller)]
        assert found == pytest.approx(max(steps)) and found >= p


def test_williams_is_the_published_example():
    # R's psych: r.test(103, .4, .5, .1), Steiger's case A: t = -0.89, p = 0.37.
    t, p = significance.williams(0.4, 0.5, 0.1, 103)
    assert round(t, 2) == -0.89 and round(p, 2) == 0.37
    assert significance.williams(0.5, 0.4, 0.1, 103)[0] == pytest.approx(-t)
    assert significance.williams(0.5, 0.4, 0.1, 3) is None
    assert significance.williams(0.5, 0.5, 1.0, 50) is None


def test_equal_scorers_are_called_different_as_often_as_they_should():
    generator = np.random.default_rng(0)
    called = {"williams": 0, "bootstrap": 0}
    for _ in range(150):
        truth_N, *noise = generator.normal(size=(3, 60))
        clips = clips_of(truth_N, {name: truth_N + n for name, n in zip("ab", noise, strict=True)})
        (pair,) = significance.pairs_of(clips, seed=1, resamples=300)
        called["williams"] += pair.williams_p < 0.05
        called["bootstrap"] += pair.p < 0.05
    assert 0 < called["williams"] <= 16 and 0 < called["bootstrap"] <= 18  # 7.5 expected


def test_a_clear_difference_is_found_and_pairs_are_adjusted():
    truth_N, scores, conditions = noisy(2)
    scores["same"] = scores["good"] + 1e-6 * np.sin(truth_N)
    pairs_found = significance.pairs_of(clips_of(truth_N, scores, conditions), seed=0)
    by_names = {(pair.one, pair.other): pair for pair in pairs_found}
    clear = by_names["good", "bad"]
    assert clear.difference > 0.1 and clear.difference_low > 0 and clear.p_holm < 0.05
    assert clear.p_holm == pytest.approx(2 * clear.p) and clear.p >= 2 / 2001
    assert (clear.resampled, clear.groups, clear.clips) == ("condition", 8, 48)
    same = by_names["good", "same"]
    assert same.difference == 0 and same.p is None and "the same scores" in same.reason


def test_many_pairs_get_enough_resamples_for_the_smallest_p_to_be_clear():
    for entries in (2, 5, 11, 30):
        resamples = significance.resamples_for(entries, clips=174)
        pairs = entries * (entries - 1) // 2
        assert resamples >= 2000 and pairs * 2 / (resamples + 1) <= significance.LEVEL / 4
    assert significance.resamples_for(30, clips=10**6) == 2000


def test_a_pair_without_a_correlation_has_a_reason():
    clips = clips_of([1, 2, 3, 4], {"a": [1, 2, 3, 4], "b": [2, 2, 2, 2]})
    (pair,) = significance.pairs_of(clips, 0, 50)
    assert pair.difference is None and pair.reason == "a correlation is not defined"
