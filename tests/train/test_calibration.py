"""Scales of datasets and the universal one: the maps undo each other, the fit finds the truth."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.models.calibration import Affine, Calibration
from train.teacher.calibrate import fit_universal, squared_error

# Beyond these a double has too few digits near 1 and 5 to come back to 1e-6: a logit of 36 is 5.
SCALES = st.floats(0.6, 1.7)
SHIFTS = st.floats(-1, 1)
RATINGS = st.floats(1.01, 4.99)
AFFINES = st.builds(Affine, scale=SCALES, shift=SHIFTS)
CALIBRATIONS = st.builds(
    lambda universal, ours: Calibration(universal=universal, datasets={"ours": ours}),
    AFFINES,
    AFFINES,
)


def in_ours(calibration, mos):
    """The other way: universal MOS as the dataset's listeners would give it."""
    return calibration.datasets["ours"].mos(calibration.universal.raw_logit(mos))


@given(CALIBRATIONS, RATINGS)
def test_the_inverse_undoes_the_map(calibration, mos):
    there = in_ours(calibration, mos)
    assert calibration.to_universal(there, "ours") == pytest.approx(mos, abs=1e-6)
    back = calibration.to_universal(mos, "ours")
    assert in_ours(calibration, back) == pytest.approx(mos, abs=1e-6)


@given(CALIBRATIONS, st.lists(st.floats(1, 5), min_size=2))
def test_the_order_of_clips_is_kept(calibration, ratings):
    ordered = np.sort(ratings)
    found = calibration.to_universal(ordered, "ours")
    assert (np.diff(found) >= -1e-12).all()
    assert found.min() >= 1
    assert found.max() <= 5


@given(
    st.builds(Affine, scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3)),
    st.builds(Affine, scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3)),
)
def test_the_ends_stay(universal, ours):
    calibration = Calibration(universal=universal, datasets={"ours": ours})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibration.to_universal([1.0, 5.0], "ours").tolist() == [1.0, 5.0]
        assert float(calibration.to_universal(1, "ours")) == 1


def test_what_the_maps_do():
    calibration = Calibration(
        universal=Affine(scale=2.0, shift=1.0), datasets={"ours": Affine(scale=0.5, shift=-0.25)}
    )
    z = 0.3
    universal, ours = 1 + 4 / (1 + np.exp(-1.6)), 1 + 4 / (1 + np.exp(0.1))
    assert in_ours(calibration, universal) == pytest.approx(ours)
    assert calibration.to_universal(ours, "ours") == pytest.approx(universal)
    assert calibration.universal.mos(z) == pytest.approx(universal)
    assert calibration.to_universal([[ours] * 3] * 2, "ours").shape == (2, 3)


@pytest.mark.parametrize("wrong", [0.999, 5.001, float("nan"), float("inf"), [3.0, 0.0]])
def test_ratings_off_the_scale_are_refused(wrong):
    calibration = Calibration(datasets={"ours": Affine()})
    with pytest.raises(ValueError, match="within 1 to 5"):
        calibration.to_universal(wrong, "ours")


def test_an_unknown_dataset_names_the_known_ones():
    calibration = Calibration(datasets={"tencent": Affine(), "pstn": Affine()})
    with pytest.raises(ValueError, match=r"did you mean 'pstn'.*pstn, tencent"):
        calibration.to_universal(3.0, "pstm")
    with pytest.raises(ValueError, match="none"):
        Calibration().to_universal(3.0, "pstn")


@pytest.mark.parametrize("wrong", [{"scale": 0}, {"scale": -1}, {"shift": float("inf")}, {"x": 1}])
def test_a_wrong_map_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Affine(**wrong)


def test_without_scales_nothing_moves():
    ratings = np.linspace(1, 5, 41)
    calibration = Calibration(datasets={"a": Affine()})
    np.testing.assert_allclose(calibration.to_universal(ratings, "a"), ratings, atol=1e-12)


def test_it_is_the_same_after_json():
    calibration = Calibration(
        universal=Affine(scale=1 / 3, shift=0.1), datasets={"a": Affine(scale=2 / 3, shift=-0.7)}
    )
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


@pytest.mark.parametrize(
    ("scale", "shift", "centre", "spread"),
    [(1.0, 0.0, 0.0, 1.0), (0.4, 1.2, 3.0, 2.0), (30.0, -3.0, 0.1, 0.02), (0.01, 0.5, 0.0, 100.0)],
)
def test_the_universal_scale_is_found(scale, shift, centre, spread):
    logits = np.random.default_rng(0).normal(centre, spread, 500)
    found = fit_universal(logits, Affine(scale=scale, shift=shift).mos(logits))
    assert found.scale == pytest.approx(scale, rel=1e-3)
    assert found.shift == pytest.approx(shift, abs=1e-3)


def test_the_universal_scale_errs_least():
    rng = np.random.default_rng(1)
    logits = rng.normal(0.3, 1.2, 400)
    of_sets = [Affine(scale=0.7, shift=0.5), Affine(scale=1.6, shift=-0.8)]
    mos = np.concatenate([of_sets[0].mos(logits[:300]), of_sets[1].mos(logits[300:])])
    mos = np.clip(mos + rng.normal(0, 0.3, 400), 1, 5)
    found = fit_universal(logits, mos)
    least = squared_error(found, logits, mos)
    for scale, shift in rng.uniform([0.2, -2], [3, 2], (300, 2)):
        assert squared_error(Affine(scale=scale, shift=shift), logits, mos) >= least
    # Each clip counts, not each set: the larger one pulls more.
    shares = [squared_error(found, logits[s], mos[s]) for s in (slice(300), slice(300, 400))]
    assert shares[0] < shares[1]


def test_ratings_against_the_order_still_give_a_positive_scale():
    logits = np.linspace(-1, 1, 50)
    found = fit_universal(logits, 3 - logits)
    assert found.scale > 0
    assert found.mos(0.0) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize(
    ("logits", "mos", "message"),
    [
        ([1.0, 2.0], [3.0], "shape"),
        ([1.0, 1.0], [3.0, 4.0], "two different"),
        ([], [], "two different"),
        ([1.0, float("nan")], [3.0, 4.0], "finite"),
    ],
)
def test_what_cannot_be_fitted_is_said(logits, mos, message):
    with pytest.raises(ValueError, match=message):
        fit_universal(logits, mos)
