"""Intervals of shares and the distance of two sets of features."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.measure.estimates import frechet, main_axes, wilson


def test_wilson_as_in_the_tables():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_interval_holds_the_share_and_mirrors(case):
    right, of = case
    low, high = wilson(right, of)
    assert 0 <= low <= right / of <= high <= 1
    assert wilson(of - right, of) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("right", "of"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_share_is_refused(right, of):
    with pytest.raises(ValueError, match="is no share"):
        wilson(right, of)


def test_frechet_of_gaussians():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3)) * [1, 2, 1] + [3, 0, 0]
    # |m|^2 + sum (s1 - s2)^2 for independent coordinates.
    assert frechet(one, other) == pytest.approx(9 + 1, rel=0.05)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_features_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="same F"):
        frechet(np.zeros((4, 3)), np.zeros((4, 2)))


def test_main_axes_are_those_of_most_variance():
    rng = np.random.default_rng(0)
    axes, kept = main_axes(rng.normal(size=(2000, 3)) * [1, 5, 2], 2)
    assert axes.shape == (3, 2)
    np.testing.assert_allclose(np.abs(axes[1, 0]), 1, atol=0.02)
    np.testing.assert_allclose(np.abs(axes[2, 1]), 1, atol=0.05)
    assert kept == pytest.approx(29 / 30, abs=0.01)
    with pytest.raises(ValueError, match="pass fewer"):
        main_axes(np.zeros((3, 5)), 4)
